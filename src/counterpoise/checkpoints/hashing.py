"""Hashes of files, begun early and taken once, and whether a file is still what it was. Nothing here needs torch."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from counterpoise.checkpoints.files import CheckpointError, weight_files

Outcome = TypeVar("Outcome")
State = tuple[Path, int, int, int, int]
"""Where a file really lies, its inode, size, and the times when its content and its inode changed."""
_under_way: dict[State, Future[dict[State, str]]] = {}


def sha256(file: Path) -> str:
    """sha256 of a file's content; waits for it where `hash_early` has begun, reads the file otherwise.

    Raises:
        CheckpointError: the file changed meanwhile.
    """
    begun = _under_way.pop(state := state_of(file), None)
    found = _hash(file) if begun is None else begun.result()[state]
    if state_of(file) != state:
        raise changed(file)
    return found


def changed(file: Path) -> CheckpointError:
    """The error for an input that something else writes to."""
    return CheckpointError(
        f"{file}: expected a file that stays as it is, found it changed while it was read; run again once nothing writes to it"
    )


class Watch:
    """Files that are read for a while: none may change between its first reading and its last.

    Size, times and inode tell; where they alone differ (`touch`), the hash decides.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._states = {file: state_of(file) for file in files}
        self._hashes: dict[Path, str] = {}

    def sha256(self, file: Path) -> str:
        """sha256 of a file, which is watched from now on, if it was not."""
        self._states.setdefault(file, state_of(file))
        found = sha256(file)
        self.check(file)
        self._hashes[file] = found
        return found

    def check(self, *files: Path) -> None:
        """Look at these files, or at all that are watched, once more.

        Raises:
            CheckpointError: one is not what it was.
        """
        for file in files or self._states:
            state = state_of(file) if file.is_file() else None
            if state == self._states[file]:
                continue
            if state is None or file not in self._hashes or sha256(file) != self._hashes[file]:
                raise changed(file)
            self._states[file] = state


def hash_early(*sources: str | Path) -> None:
    """Begin hashing the weights of local folders in the background, while other things are imported.

    What cannot be read is left for the preflight to complain about.
    """
    work: dict[State, Path] = {}  # two names may lead to one file
    for folder in (Path(s).expanduser() for s in sources):
        with contextlib.suppress(CheckpointError, OSError):
            work |= {state: file for file in weight_files(folder) if (state := state_of(file)) not in _under_way}
    hashes = in_background(lambda: {state: _hash(file) for state, file in work.items()})
    _under_way.update(dict.fromkeys(work, hashes))


def in_background(work: Callable[[], Outcome]) -> Future[Outcome]:
    """Start `work` in a thread of its own, a daemon: a failed or stopped run does not wait for it."""
    done: Future[Outcome] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # whatever it is: somebody waits
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def state_of(file: Path) -> State:
    """What tells that a file is no longer what it was."""
    found = file.stat()
    return file.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _hash(file: Path) -> str:
    """Read, not mapped: a file that shrinks meanwhile would kill the process that maps it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
