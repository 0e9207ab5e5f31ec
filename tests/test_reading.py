"""Text that others wrote: every encoding, every broken line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from counterpoise.checkpoints.reading import json_lines, json_records, read_text, stream_json_lines
from counterpoise.language.prompts import read_prompts

LINES = '{"a": "\u2028 \u0085 é"}\n\n{"a": 2}\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_line_ends_and_gzip_are_no_part_of_the_text(
    tmp_path: Path, encoding: str, gzipped: bool, end: str
) -> None:
    content = LINES.replace("\n", end).encode(encoding)
    (tmp_path / "a").write_bytes(gzip.compress(content) if gzipped else content)
    assert read_text(tmp_path / "a") == LINES
    found = list(json_lines(tmp_path / "a"))
    assert found == [(f"{tmp_path}/a, line 1", {"a": "\u2028 \u0085 é"}), (f"{tmp_path}/a, line 3", {"a": 2})]
    if end != "\r" and not (
        gzipped and encoding == "utf-16"
    ):  # what was written by a program, and is read line by line
        assert list(stream_json_lines(tmp_path / "a")) == found


@pytest.mark.parametrize(("content", "message"), [
    (b'{"a": 1}\n{"a": "\xe9"}\n', "line 2: expected utf-8, .*save it as utf-8"),
    (gzip.compress(LINES.encode() * 99, mtime=0)[:-20], "expected a whole gzip file"),
    (b"\x1f\x8bnothing", "expected a whole gzip file"),
    (b'{"a": 1}\n{"a": "\\ud83d"}\n', "line 2: expected json, .*half of a surrogate pair"),
    (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "line 1: expected json, .*nested too deeply"),
    (b'{"a": ' + b"1" * 5_000 + b"}", "line 1: expected json, .*digits"),
    (b"{'a': 1}", "line 1: expected json, .*Expecting property name"),
    (b"\n7\n", "line 2: expected a json object, found '7'"),
])  # fmt: skip
def test_what_cannot_be_read_is_said_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl.*{message}"):
        list(json_lines(tmp_path / "a.jsonl"))


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}')
    assert read_prompts(tmp_path / "a.jsonl")[0].text == "😀"


def test_a_list_and_lines_are_the_same_records(tmp_path: Path) -> None:
    records = [{"a": 1}, {"a": 2}]
    (tmp_path / "list").write_text("\ufeff\n " + json.dumps(records, indent=1))
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, records)))
    found = [list(json_records(tmp_path / name)) for name in ("list", "lines")]
    assert [[r for _, r in f] for f in found] == [records, records]
    assert [f[1][0].rpartition(", ")[2] for f in found] == ["item 2", "line 2"]
