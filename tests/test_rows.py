"""Prompts and preferences in the files and data sets that people hold, written as their owners write them."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from counterpoise.alignment.preferences import Preference, read_preferences
from counterpoise.language.prompts import Prompt, read_prompts

HI = (("user", "Hi"),)
SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "good"}]
WORSE = [SAID[0], {"role": "assistant", "content": "bad"}]
PROMPTS: list[tuple[dict[str, Any], tuple[tuple[str, str], ...]]] = [
    ({"prompt": "Hi", "group": "a"}, HI),
    ({"prompt": SAID[:1]}, HI),
    ({"messages": SAID}, HI),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]}, HI),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "good"}]}, HI),
    ({"conversations": [{"from": "human", "value": "Hi"}], "system": "Be kind."}, (("system", "Be kind."), *HI)),
    ({"instruction": "Hi", "input": "", "output": "good"}, HI),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, (("user", "Add.\n1 2"),)),
    ({"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
     (("user", "a"), ("assistant", "b"), ("user", "c"))),
    ({"question": "Hi", "answer": "good", "system": "Be kind."}, (("system", "Be kind."), *HI)),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant: good"}, HI),
]  # fmt: skip
PAIRS: list[dict[str, Any]] = [
    {"prompt": "Hi", "chosen": SAID, "rejected": WORSE, "messages": SAID, "score_chosen": 8.5},  # UltraFeedback, binarized
    {"chosen": SAID, "rejected": WORSE},
    {"prompt": "Hi", "chosen": SAID[1:], "rejected": WORSE[1:]},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"},
    {"instruction": "Hi", "input": "", "chosen": "good", "rejected": "bad"},
    {"question": "Hi", "chosen": "good", "rejected": "bad"},
    {"instruction": "Hi", "completions": [
        {"response": "bad", "overall_score": 2.0, "model": "a"}, {"response": "good", "overall_score": 9.0, "model": "b"},
        {"response": "so so", "overall_score": 5.0, "model": "c"},
    ]},
]  # fmt: skip


def as_lines(row: dict[str, Any], folder: Path) -> str | Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    return folder / "a.jsonl.gz"


def as_list(row: dict[str, Any], folder: Path) -> str | Path:
    (folder / "a.json").write_text(json.dumps([row], indent=2))
    return folder / "a.json"


def as_parquet(row: dict[str, Any], folder: Path) -> str | Path:
    Dataset.from_list([row]).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def as_data_set(row: dict[str, Any], folder: Path) -> str | Path:
    (folder / "data").mkdir()
    Dataset.from_list([row]).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return f"hf:{folder}:train"


WRITERS = [as_lines, as_list, as_parquet, as_data_set]
Writer = Callable[[dict[str, Any], Path], str | Path]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("row", "messages"), PROMPTS)
def test_a_prompt_is_the_same_in_every_layout_and_file(
    row: dict[str, Any], messages: tuple[tuple[str, str], ...], write: Writer, tmp_path: Path
) -> None:
    assert read_prompts(write(row, tmp_path)) == [Prompt(messages)]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("row", PAIRS)
def test_a_pair_is_the_same_in_every_layout_and_file(row: dict[str, Any], write: Writer, tmp_path: Path) -> None:
    assert read_preferences(write(row, tmp_path)) == [Preference(Prompt(HI), "good", "bad")]


def test_a_table_of_texts_is_read_and_its_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "prompt", "chosen", "rejected"], [1, 'Say "hi",\nplease', "hi", "no"]])
    assert read_preferences(path) == [Preference(Prompt((("user", 'Say "hi",\nplease'),)), "hi", "no")]
    assert read_prompts(path)[0].place == f"{path}, line 3"
    path.with_suffix(".tsv").write_text('instruction\tinput\nSay "hi"\tnow\n')
    assert read_prompts(path.with_suffix(".tsv")) == [Prompt((("user", 'Say "hi"\nnow'),))]


def test_one_column_of_a_data_set_is_the_prompts(tmp_path: Path) -> None:
    source = as_data_set({"id": 3, "theme": "Hi", "chat": SAID}, tmp_path)
    assert [read_prompts(f"{source}:{column}") for column in ("theme", "chat")] == [[Prompt(HI)]] * 2
    assert read_prompts(f"{source}:theme")[0].place == f"{source}, row 1"


@pytest.mark.parametrize(("named", "said"), [
    ("hf:{}/set", "row 1: expected .*, found the columns id, theme; rename one of them to prompt"),
    ("hf:{}/set:test:theme", "expected one of the splits train, found 'test'"),
    ("hf:{}/set:train:them", "expected one of the columns id, theme, found 'them'"),
    ("hf:{}/nothing:train:theme", "expected a data set, found none"),
    ("hf:{}:b:c:d", "expected hf:NAME:SPLIT:COLUMN"),
    ("{}/set", "expected a file, found a folder; as a data set it is hf:"),
    ("{}/damaged.parquet", "expected a parquet file, found"),
    ("{}/short.csv", "line 3: expected 2 columns .*, found 1"),
    ("{}/twice.csv", "expected each column once .*, found 'prompt' again"),
    ("{}/scores.jsonl", "line 1: expected completions with response and overall_score"),
])  # fmt: skip
def test_what_cannot_be_read_says_where_and_what_to_do(named: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    as_data_set({"id": 3, "theme": "Hi"}, tmp_path / "set")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "twice.csv").write_text("prompt,id,prompt\nHi,1,Ho\n")
    (tmp_path / "short.csv").write_text("prompt,id\nHi,1\nHi\n")
    (tmp_path / "scores.jsonl").write_text('{"instruction": "Hi", "completions": [{"response": "good"}]}\n')
    with pytest.raises(ValueError, match=f"^{re.escape(named.format(tmp_path))}.*{said}"):
        (read_preferences if "scores" in named else read_prompts)(named.format(tmp_path))
