"""Lines of stdin, answered as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from queue import Queue
from threading import Thread


def stdin() -> Iterator[str]:
    """Its lines, in UTF-8 whatever the locale is."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            found = error.object[error.start : error.end]
            raise ValueError(
                f"stdin, line {number}: expected UTF-8, found the bytes {found!r}; convert it first"
            ) from None


def as_they_come(lines: Iterable[str], at_most: int) -> Iterator[list[str]]:
    """The lines that wait to be read, so many at once; the next ones are read meanwhile."""
    waiting: Queue[str | Exception | None] = Queue()

    def read() -> None:
        try:
            for line in lines:
                waiting.put(line.rstrip("\r\n"))
        except Exception as error:  # of the decoding: told where it would have been
            waiting.put(error)
        waiting.put(None)

    Thread(target=read, daemon=True).start()
    batch: list[str] = []
    while (line := waiting.get()) is not None:
        if isinstance(line, Exception):
            raise line
        batch.append(line)
        if len(batch) == at_most or waiting.empty():
            yield batch
            batch = []
    if batch:
        yield batch
