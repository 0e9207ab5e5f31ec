"""Lines of stdin, answered as they come."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import UnsupportedOperation
from queue import Queue
from threading import Thread
from typing import BinaryIO, TypeVar

T = TypeVar("T")


def stdin() -> Iterator[tuple[int, str]]:
    """Its lines with their numbers, in UTF-8 whatever the locale is."""
    file: BinaryIO = sys.stdin.buffer
    with suppress(UnsupportedOperation):  # a reader of its own: Python cannot end while a thread waits in sys.stdin
        file = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    for number, line in enumerate(file, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            found = error.object[error.start : error.end]
            raise ValueError(
                f"stdin, line {number}: expected UTF-8, found the bytes {found!r}; convert it first"
            ) from None


def as_they_come(items: Iterable[T], at_most: int) -> Iterator[list[T]]:
    """The items that wait to be read, so many at once; the next ones are read meanwhile. What raises comes after the
    items before it."""
    waiting: Queue[T | Exception | None] = Queue(4 * at_most)

    def read() -> None:
        try:
            for item in items:
                waiting.put(item)
            waiting.put(None)
        except Exception as error:
            waiting.put(error)

    Thread(target=read, daemon=True).start()
    batch: list[T] = []
    while not isinstance(item := waiting.get(), Exception | None):
        batch.append(item)
        if len(batch) == at_most or waiting.empty():
            yield batch
            batch = []
    if batch:
        yield batch
    if item is not None:
        raise item
