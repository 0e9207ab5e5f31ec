"""A safetensors file, written past the page cache where the file system allows it: a third of the processor time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from concurrent.futures import Future
from io import FileIO
from pathlib import Path
from typing import Any

from counterpoise.checkpoints.bits import Array
from counterpoise.checkpoints.hashing import in_background
from counterpoise.checkpoints.headers import array_dtype

SPAN = 4 << 20  # bytes written at once
BLOCK = 4096  # what goes past the page cache begins and ends at multiples of it
DIRECT = getattr(os, "O_DIRECT", 0)


class TensorFile:
    """A safetensors file being written from its first byte to its last, by a thread of its own.

    Args:
        tensors: name -> kind (of `headers.DTYPES`) and shape, in the order in which they will be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (kind, shape) in tensors.items():
            stop = offset + array_dtype(kind).itemsize * math.prod(shape)
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._size = 8 + len(text) + offset
        self._file = _opened(path)
        self._buffer, self._other = mmap.mmap(-1, SPAN), mmap.mmap(-1, SPAN)  # at the beginning of a page
        self._filled, self._taken = 0, 0
        self._writing: Future[None] | None = None
        self._add(memoryview(struct.pack("<Q", len(text)) + text))

    def write(self, values: Array) -> None:
        """The next contiguous values."""
        if values.size:
            self._add(values.data.cast("B"))

    def take(self, source: Path) -> bool:
        """Whether a file has the header of this one: then it is copied whole, by reference where the file system can."""
        if self._taken != self._filled or not source.is_file() or not hasattr(os, "copy_file_range"):
            return False
        done, head = 0, self._buffer[: self._filled]
        with source.open("rb") as given, open(self._file.name, "r+b") as taker, contextlib.suppress(OSError):
            same = given.read(len(head)) == head and os.fstat(given.fileno()).st_size == self._size
            while same and done < self._size:
                count = os.copy_file_range(given.fileno(), taker.fileno(), self._size - done, done, done)
                same, done = count > 0, done + count
        if done == self._size:
            self._taken, self._filled = done, 0
        return done == self._size

    def close(self) -> None:
        """Flush to the disk and close.

        Raises:
            ValueError: fewer or more bytes were written than the header says.
        """
        if (written := self._taken) != self._size:
            raise ValueError(f"{self._file.name}: expected {self._size} bytes to be written, found {written}")
        self._hand_over(-(-self._filled // BLOCK) * BLOCK)
        self._wait()
        self._file.truncate(self._size)
        os.fsync(self._file.fileno())
        self._file.close()

    def _add(self, content: memoryview) -> None:
        self._taken += len(content)
        while content:
            part, content = content[: SPAN - self._filled], content[SPAN - self._filled :]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == SPAN:
                self._hand_over(SPAN)

    def _hand_over(self, count: int) -> None:
        self._wait()
        full = memoryview(self._buffer)[:count]
        self._writing = in_background(lambda: _write(self._file, full))
        self._buffer, self._other, self._filled = self._other, self._buffer, 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()


def _opened(path: Path) -> FileIO:
    try:
        return FileIO(path, "x", opener=lambda name, flags: os.open(name, flags | DIRECT, 0o666))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # some file systems make it, and refuse it then
        return FileIO(path, "x")


def _write(file: FileIO, content: memoryview) -> None:
    while content:
        try:
            content = content[file.write(content) :]
        except OSError as error:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & DIRECT:
                raise
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~DIRECT)
