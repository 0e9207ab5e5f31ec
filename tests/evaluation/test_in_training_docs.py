"""docs/in-training.md: its example runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainingArguments

from tiny import tiny, tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "in-training.md"


@pytest.mark.filterwarnings("ignore")
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    choices = [{"query": f"q{n}", "choices": ["a", "b"], "gold": n % 2} for n in range(40)]
    prose = [{"context": f"c{n}", "continuation": "one two"} for n in range(40)]
    for name, rows in (("science", choices), ("prose", prose)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [[4 + (n + k) % 30 for k in range(8)] for n in range(8)]
    given = {
        "model": tiny("llama"),
        "tokenizer": tokenizer(),
        "dataset": Dataset.from_list([{"input_ids": i, "labels": i} for i in ids]),
        "arguments": TrainingArguments(
            "out", max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no"
        ),
    }
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    exec(compile(block, str(PAGE), "exec"), given)
    said = capsys.readouterr().out
    assert "not stopped {'path': 'out/checkpoint-2', 'step': 2, 'ours': False}" in said
    assert [e["step"] for e in given["trainer"].state.log_history if "tax/mean" in e] == [1, 2]  # type: ignore[attr-defined]
