"""Who may be at a piece of work: one process at a time, of this machine or another."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Inside, whether nobody else is inside with the same path, in this process or another, of this machine or another.

    The lock is a file beside `path`, gone afterwards; a killed process lets go of it. On a file system without locks, or one
    that may only be read, all are alone.

    Args:
        wait: until the others are out; else they make it False.
    """
    beside = path.with_name(f".{path.name[:200]}.lock")
    lock: int | None
    while True:
        try:
            lock = at = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            lock = None
            break
        try:
            fcntl.flock(at, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(at)
            yield False
            return
        except OSError:  # no locks here
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(at), beside.stat()):
                break
        os.close(at)  # the last one inside has removed it meanwhile
    try:
        yield True
    finally:
        if lock is not None:
            beside.unlink(missing_ok=True)
            os.close(lock)


def hold(descriptor: int) -> None:
    """Lock an open file or folder for as long as it is open."""
    with contextlib.suppress(OSError):  # a file system without locks: then nothing is swept up there
        fcntl.flock(descriptor, fcntl.LOCK_EX)
