"""docs/multitask.md, run from top to bottom as it stands."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from .text.worlds import write_folder

PAGE = Path(__file__).parents[2] / "docs" / "multitask.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.S | re.M)


def given(folder: Path) -> dict:
    """What the page takes for granted: a model with its tokenizer, rows of three tasks, and settings of a trainer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainingArguments
    from trl import SFTConfig

    from .hf import tiny_llama, token_rows

    common = {"max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    return {
        "model": tiny_llama(),
        "dataset": token_rows().remove_columns("attention_mask"),
        "arguments": TrainingArguments(output_dir=str(folder / "trainer"), **common),
        "sft_arguments": SFTConfig(output_dir=str(folder / "sft"), bf16=False, gradient_checkpointing=False, **common),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2"),
    }


@pytest.mark.filterwarnings("ignore")
def test_every_block_of_the_page_runs(tmp_path, monkeypatch):
    from counterpoise.cli.app import app

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write_folder(tmp_path / "reviews", colours=120, animals=90)
    names, ran = given(tmp_path), []
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, str(PAGE), "exec"), names)
        elif language == "console":
            for line in block.splitlines():
                _, *arguments = shlex.split(line)
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, f"{line}\n{result.output}"
        ran.append(language)
    assert (ran.count("python"), ran.count("console"), ran.count("")) == (15, 1, 1)
    assert (tmp_path / "model" / "report.html").read_text() == (tmp_path / "again.html").read_text()
