"""Rows of data sets as people hold them: jsonl, a json list, csv, tsv, parquet, or a data set that `datasets` loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from counterpoise.checkpoints.files import first_line
from counterpoise.checkpoints.reading import json_records, read_text, table

HUB = re.compile(r"hf:(?P<name>[^:]+)(?::(?P<split>[^:]*))?(?::(?P<column>[^:]+))?")
"""hf:NAME:SPLIT:COLUMN; a name is org/name, org/name/config, either with @revision, or a folder."""


def rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Each row after its place, "FILE, line N", for messages; told apart by how the name ends. Text may be gzipped.

    Of `hf:NAME:SPLIT:COLUMN` only that column is read, as a prompt.

    Raises:
        ValueError: a file that is none of these, a data set, split or column that is not there.
    """
    name = str(source)
    if name.startswith("hf:"):
        return _data_set(name)
    if Path(source).is_dir():
        raise ValueError(f"{source}: expected a file, found a folder; as a data set it is hf:{source}:SPLIT:COLUMN")
    if name.endswith(".parquet"):
        return _parquet(Path(source))
    if name.removesuffix(".gz").endswith((".csv", ".tsv")):
        return table(read_text(source), name)
    return json_records(source)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    _refuse_without("pyarrow", str(path))
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as file:
            batches = (batch.to_pylist() for batch in ParquetFile(file).iter_batches())
            for n, row in enumerate((row for batch in batches for row in batch), start=1):
                yield f"{path}, row {n}", row
    except ArrowException as error:
        raise ValueError(f"{path}: expected a parquet file, found: {first_line(error)}; fetch it again") from None


def _data_set(spec: str) -> Iterator[tuple[str, Any]]:
    if (found := HUB.fullmatch(spec)) is None:
        raise ValueError(
            f"{spec}: expected hf:NAME:SPLIT:COLUMN, where a name is org/name, org/name/config or a folder"
        )
    _refuse_without("datasets", spec)
    import datasets

    name, _, revision = found["name"].partition("@")
    config = None
    if not Path(name).exists() and name.count("/") == 2:
        name, _, config = name.rpartition("/")
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, revision=revision or None)
    except Exception as error:  # of whatever it is made of: no such id, no network, no file of a kind it knows
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{spec}: expected a data set, found none ({type(error).__name__}: {said})") from None
    finally:
        if shown:
            datasets.enable_progress_bars()
    split, column = found["split"] or (next(iter(loaded)) if len(loaded) == 1 else ""), found["column"]
    if split not in loaded:
        raise ValueError(f"{spec}: expected one of the splits {', '.join(loaded)}, found {split!r}")
    held = loaded[split]
    if column is not None and column not in held.column_names:
        raise ValueError(f"{spec}: expected one of the columns {', '.join(held.column_names)}, found {column!r}")
    for n, row in enumerate(held, start=1):
        yield f"hf:{found['name']}:{split}, row {n}", row if column is None else {"prompt": row[column]}


def _refuse_without(package: str, source: str) -> None:
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{source}: reading it needs {package}; pip install 'counterpoise[align]'")
