"""Every code block of every page: Python and console blocks run, other commands are read by their own parser."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import counterpoise
import world
from counterpoise.cli.app import app
from multitask.text.worlds import write_folder
from pages import PAGES, ROOT, SHELL, blocks, commands, ours, parse
from tiny import tiny, tokenizer

LONGEST = 120
OUTSIDE = [*ROOT.glob("*.md"), *(ROOT / "experiments").rglob("*.md")]
"""Pages that the site, whose build is strict, does not hold."""
RUN = [page for page in PAGES if any(b.language in ("python", "console") and not b.why for b in blocks(page))]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages name: a pair, prompts, abilities, rewards, preferences, labelled texts, a demo."""
    folder = world.make(tmp_path_factory.mktemp("world"))
    for name, theirs in {"guess": "arc_easy science", "text": "lambada prose"}.items():
        for other in theirs.split():
            shutil.copy(folder / f"{name}.jsonl", folder / f"{other}.jsonl")
    for side in ("pre", "post"):
        shutil.copytree(folder / side, folder / side.upper())
    rows = [f"{'good fine' if n % 2 else 'bad sad'} a b c {n},{n % 2}" for n in range(40)]
    (folder / "reviews.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    pairs = [{"prompt": f"q {n}", "chosen": "good", "rejected": "bad"} for n in range(20)]
    (folder / "pairs.jsonl").write_text(lines(pairs))
    for name in ("pre", "post"):
        said = [{"instruction": f"q {n}", "output": f"{name} {n}", "generator": name} for n in range(20)]
        (folder / f"{name}.json").write_text(json.dumps(said))
    (folder / "mymodule.py").write_text("def better(instructions, firsts, seconds):\n    return [0.6] * len(firsts)\n")
    write_folder(folder / "reviews", colours=120, animals=90)
    small_demo(folder / "counterpoise-demo")
    return folder


def small_demo(folder: Path) -> None:
    """What `counterpoise demo` leaves, of a model that has learned for seconds and forgot in one."""
    from counterpoise import demo
    from counterpoise.evaluation.panel import Panel
    from counterpoise.restoration.restore import restore
    from counterpoise.search.candidates import Ramp

    folder.mkdir()
    invented = demo.World.invent(0)
    abilities = demo.write_world(invented, folder, 0)
    words = demo.make_tokenizer(invented.vocabulary())
    model: Any = demo.make_model(len(words), 0)
    demo.study(model, words, invented, seed=0, epochs=1)
    for side in ("pre", "post"):
        model.save_pretrained(folder / side)
        words.save_pretrained(folder / side)
        with torch.no_grad():  # an alignment in one line: glad words become likelier, all else a little worse
            model.model.norm.weight.mul_(0.8)
            model.model.embed_tokens.weight[words.convert_tokens_to_ids(list(demo.GLAD))] *= 2
    drawing = demo.Drawing(max_new_tokens=8, batch_size=64)
    panel = Panel.load(folder / "prompts.jsonl", demo.cheer, abilities, drawing=drawing, prompt_limit=30)
    restore(folder / "pre", folder / "post", folder / "restored", panel, searches=[Ramp("linear")], means=[0.5])


def for_training(folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainingArguments

    ids = [[4 + (n + k) % 30 for k in range(8)] for n in range(8)]
    arguments = {"save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return {
        "model": tiny("llama"),
        "tokenizer": tokenizer(),
        "dataset": Dataset.from_list([{"input_ids": i, "labels": i} for i in ids]),
        "arguments": TrainingArguments("out", max_steps=2, **arguments),
    }


def for_tasks(folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainingArguments
    from trl import GRPOConfig, SFTConfig

    from multitask.hf import tiny_llama, token_rows

    common = {"max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    small = {"bf16": False, "gradient_checkpointing": False, "logging_steps": 1, **common}
    drawn = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 12, "beta": 0.0}
    return {
        "grpo_arguments": GRPOConfig("grpo", **drawn, **small),
        "prompts": Dataset.from_list(
            [{"prompt": f"w{i}", "task": t} for i in range(4) for t in ("books", "dvd", "kitchen")]
        ),
        "reward": lambda completions, task, **_: [float(len(c) % 2) for c in completions],
        "model": tiny_llama(),
        "dataset": token_rows().remove_columns("attention_mask"),
        "arguments": TrainingArguments(output_dir="trainer", **common),
        "sft_arguments": SFTConfig("sft", **small),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2"),
    }


def for_readme(folder: Path) -> dict[str, Any]:
    task_losses = torch.ones(3, requires_grad=True).unbind()
    return {"optimizer": torch.optim.SGD([torch.zeros(1)]), **dict(zip(("l1", "l2", "l3"), task_losses, strict=True))}


def for_align(folder: Path) -> dict[str, Any]:
    from counterpoise.language.prompts import read_prompts

    given = {"model": tiny("llama"), "tokenizer": tokenizer(), "reward": world.early_letters}
    return {**given, "prompts": read_prompts("prompts.jsonl")[:8]}


def for_front(folder: Path) -> dict[str, Any]:
    scores = world.panel(folder, drawing=world.Drawing(max_new_tokens=2)).measure(
        tiny("llama"), tokenizer(), "held-out"
    )
    return dict.fromkeys(("pre", "post", "averaged", "penalised"), scores)


def for_merge(folder: Path) -> dict[str, Any]:
    from counterpoise.averaging.resident import ResidentAverage
    from counterpoise.checkpoints.preflight import preflight
    from counterpoise.language.scoring import Example

    return {"resident": ResidentAverage(preflight("pre", "post")), "examples": [Example((4, 5, 6), (7, 8))] * 4}


def for_both_sides(folder: Path) -> dict[str, Any]:
    from counterpoise.checkpoints.preflight import preflight
    from counterpoise.evaluation.workbench import Workbench
    from counterpoise.records import Store

    pair = preflight("pre", "post")
    return {"pair": pair, "bench": Workbench(pair, world.panel(folder), Store(folder / "work"))}


GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "README.md": for_readme,
    "how-to/align.md": for_align,
    "how-to/front.md": for_front,
    "how-to/in-training.md": for_training,
    "how-to/merge.md": for_merge,
    "how-to/multitask.md": for_tasks,
    "explanation/two-sided.md": for_both_sides,
}
"""What a page takes for granted, by its place below docs."""


def page_name(page: Path) -> str:
    return page.name if page.parent == ROOT else page.relative_to(ROOT / "docs").as_posix()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs_from_top_to_bottom(
    page: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    torch.manual_seed(0)
    names = {"__name__": "page", **GIVEN.get(page_name(page), lambda _: {})(folder)}
    for block in blocks(page):
        if block.language == "python" and not block.why:
            exec(compile("\n" * block.line + block.text, block.place, "exec"), names)
        elif block.language == "console" and not block.why:
            for words in commands(block):
                arguments = ours(words)
                assert arguments is not None, f"{block.place}: expected a command of counterpoise, found {words}"
                found = CliRunner().invoke(app, arguments)
                assert found.exit_code == 0, f"{block.place}: {' '.join(words)}\n{found.output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_a_real_one_with_real_options(page: Path) -> None:
    for block in blocks(page):
        for words in commands(block) if block.language in SHELL else []:
            try:
                arguments = ours(words)
                if arguments is not None:
                    parse(arguments)
            except Exception as error:
                pytest.fail(f"{block.place}: {' '.join(words)}: {getattr(error, 'message', error)}")
            for script in words if words[0] == "python" else []:
                assert not script.endswith(".py") or (ROOT / script).is_file(), f"{block.place}: no {script}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is_and_python_that_does_not_run_is_python_all_the_same(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("python", "json", "text", "yaml", *SHELL), f"{block.place}: a block of no language"
        assert block.language != "text" or "$ counterpoise" not in block.text, f"{block.place}: commands as text"
        if block.language == "python" and block.why:
            imports = [n for n in ast.walk(ast.parse(block.text)) if isinstance(n, ast.ImportFrom)]
            for one in (n for n in imports if (n.module or "").startswith("counterpoise")):
                room = importlib.import_module(str(one.module))
                assert not [n.name for n in one.names if not hasattr(room, n.name)], block.place


@pytest.mark.parametrize(
    "words",
    ["averge PRE POST", "average PRE POST -o OUT --rato 2", "average PRE POST", "merge PRE POST -o O --method x"],
)
def test_a_command_that_is_none_is_noticed(words: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|invalid|not one of"):
        parse(words.split())


def test_what_is_left_out_of_a_command_may_be_anything_but_wrong() -> None:
    parse("restore PRE POST ... --dry-run".split())
    with pytest.raises(Exception, match="No such option"):
        parse("restore PRE POST ... --dry-rum".split())


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_outside_tables_have_at_most_120_characters(page: Path) -> None:
    long = [n for n, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1) if len(line) > LONGEST
            and not line.lstrip().startswith("|")]  # fmt: skip
    assert not long, f"{page}: lines {long}"


@pytest.mark.parametrize("room", ["counterpoise", "counterpoise.multitask", "counterpoise.classification"])
def test_every_public_name_is_in_the_reference(room: str) -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    shown = {line.split(".")[-1] for line in re.findall(r"^::: (\S+)$", page, re.M)}
    names = counterpoise._HOMES if room == "counterpoise" else importlib.import_module(room).__all__
    assert set(names) - shown == set()
    for path in re.findall(r"^::: (\S+)$", page, re.M):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_between_files_leads_to_one_and_no_merge_left_its_marks(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [at for at in re.findall(r"\]\(([^)\s#]+)", text) if not at.startswith(("http:", "https:"))]
    assert not [at for at in links if not (page.parent / at).exists()]
    assert not re.search(r"^(<{7}|>{7}) ", text, re.M)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_verdict_that_is_shown_is_the_committed_one(page: str) -> None:
    kept = json.loads((ROOT / "experiments" / "demo" / "results" / "seed-0.json").read_text(encoding="utf-8"))
    shown = " ".join(re.findall(r"^> (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.M))
    assert len(shown) > 80
    assert kept["verdict"].startswith(shown.removesuffix(" ..."))


def test_the_lowest_versions_are_those_of_the_record() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["align"], *extras["eval"]]
    lowest = dict(re.sub(r"\[.*\]", "", text).split(">=") for text in wanted)
    kept = json.loads((ROOT / "experiments" / "firstfive" / "results" / "floors.json").read_text(encoding="utf-8"))
    assert {name: lowest[name] for name in kept["versions"]} == kept["versions"]


@pytest.mark.parametrize("page", [p for p in PAGES if "LiNeS 0.8 keeps" in p.read_text()], ids=str)
def test_the_demos_verdict_is_quoted_from_its_results(page: Path) -> None:
    verdict = json.loads((ROOT / "experiments/demo/results/seed-0.json").read_text(encoding="utf-8"))["verdict"]
    text = " ".join(page.read_text(encoding="utf-8").replace("\n>", "\n").split())
    for said in re.findall(r"LiNeS 0\.8 keeps \d.*?of 4 abilities", text):
        assert verdict.startswith(said)
