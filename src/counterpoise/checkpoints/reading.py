"""Text and json that other people wrote: opened with the same care everywhere, and an error names the file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GZIP, UTF16 = b"\x1f\x8b", (b"\xff\xfe", b"\xfe\xff")
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def read_text(path: str | Path) -> str:
    """A file's text, lines ending in "\\n": utf-8 or marked utf-16, with or without a byte order mark, gzipped or not.

    Raises:
        ValueError: another encoding, with the line; a gzip file that is cut short or damaged.
    """
    content = Path(path).read_bytes()
    try:
        return decoded(gzip.decompress(content) if content.startswith(GZIP) else content, str(path))
    except DAMAGED as error:
        raise ValueError(f"{path}: expected a whole gzip file, found it damaged ({error}); fetch it again") from None


def decoded(content: bytes, place: str, first: int = 1) -> str:
    """`read_text` of bytes that `place` names and whose first line has the number `first` there."""
    try:
        text = content.decode("utf-16" if content.startswith(UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + first
        raise ValueError(f"{place}, line {line}: expected utf-8, found {error}; save it as utf-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str, place: str) -> Any:
    """The value of a json text that stands at `place`.

    Raises:
        ValueError: not json, nested too deeply, half of a surrogate pair, which is no text.
    """
    try:
        found = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeEncodeError:
        problem = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    except RecursionError:
        problem = "brackets nested too deeply"
    except ValueError as error:
        problem = str(error)
    raise ValueError(f"{place}: expected json, found {text.strip()[:60]!r} ({problem})")


def lines_of(text: str, path: str | Path) -> Iterator[tuple[str, str]]:
    """Where each line that is not blank stands, and the line; only "\n" ends one, not U+2028 or U+0085."""
    return ((f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())


def json_lines(path: str | Path, text: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a jsonl file, blank lines left out, each after its place ("FILE, line N") for messages.

    Raises:
        ValueError: a line that is no json object.
    """
    for place, line in lines_of(read_text(path) if text is None else text, path):
        yield place, json_object(line, place)


def stream_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`json_lines` of a file that may be too large for memory: one line is held at a time.

    Raises:
        ValueError: as `json_lines`.
    """
    with open(path, "rb") as file:
        head = file.read(2)
    if head in UTF16:
        yield from json_lines(path)
        return
    for n, content in enumerate(byte_lines(path), start=1):
        if content.strip():
            yield (place := f"{path}, line {n}"), json_object(decoded(content, str(path), n), place)


def byte_lines(path: str | Path) -> Iterator[bytes]:
    """A file's lines one by one, gzipped or not.

    Raises:
        ValueError: a gzip file that is cut short or damaged.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == GZIP
    try:
        with gzip.open(path, "rb") if zipped else open(path, "rb") as file:
            yield from file
    except DAMAGED as error:
        raise ValueError(f"{path}: expected a whole gzip file, found it damaged ({error}); fetch it again") from None


def json_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """`json_lines`, or the items of a file that is one json list ("FILE, item N")."""
    if not (text := read_text(path)).lstrip().startswith("["):
        return json_lines(path, text)
    return ((f"{path}, item {i}", record) for i, record in enumerate(parse_json(text, str(path)), start=1))


def table(text: str, place: str, *needed: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a csv or, as the end of `place` says, a tsv, by the columns of the first line, after their places.

    A tsv has no quoting: a quote in it is a quote.

    Raises:
        ValueError: no csv, a column missing that is `needed`, or there twice, a row with more or fewer of them.
    """
    tabs = place.lower().removesuffix(".gz").endswith(".tsv")
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, "excel-tab", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
    before = csv.field_size_limit(sys.maxsize)  # otherwise it refuses fields above 128 KiB
    try:
        header = [name.strip() for name in next(reader, [])]
        if not {*needed} <= {*header}:
            raise ValueError(f"{place}: expected the columns {' and '.join(needed)} in the first line, found {header}")
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise ValueError(
                f"{place}: expected each column once in the first line, found {twice[0]!r} again; rename one"
            )
        for values in filter(None, reader):
            where = f"{place}, line {reader.line_num}"
            if len(values) != len(header):
                raise ValueError(
                    f"{where}: expected {len(header)} columns {header}, found {len(values)}; "
                    f"{'remove the tabs in the text' if tabs else 'quote texts with commas or line breaks'}"
                )
            yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{place}, line {reader.line_num}: expected csv, found: {error}") from None
    finally:
        csv.field_size_limit(before)


def json_object(text: str, place: str) -> dict[str, Any]:
    """As `parse_json`; a ValueError for what is no object."""
    if not isinstance(record := parse_json(text, place), dict):
        raise ValueError(f"{place}: expected a json object, found {text.strip()[:60]!r}")
    return record
