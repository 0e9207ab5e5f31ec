"""The store of finished work."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from counterpoise.records import Store, digest

KEY = {"what": "reward", "model": ["pre", 0.5], "part": "held-out"}


class Counter:
    """Work that counts how often it is done."""

    def __init__(self, value: object = 1.5) -> None:
        self.value, self.calls = value, 0

    def __call__(self) -> object:
        self.calls += 1
        return self.value


def test_the_digest_is_that_of_the_sorted_text() -> None:
    wanted = hashlib.sha256(b'{"a":[1,2.5],"b":{"c":null,"d":"x"}}').hexdigest()
    assert digest({"b": {"d": "x", "c": None}, "a": [1, 2.5]}) == wanted
    assert digest({"a": 1}) != digest({"a": "1"})


def test_a_piece_is_computed_once(tmp_path: Path) -> None:
    value = {"scores": [0.1, 1 / 3, -2.5e-300], "name": "ça"}
    work = Counter(value)
    folder = tmp_path / "deep" / "work"
    assert Store(folder).once(KEY, work) == value
    assert Store(folder).once(dict(reversed(KEY.items())), work) == value  # read back bit for bit
    assert work.calls == 1
    (file,) = folder.iterdir()
    assert file.name.startswith("reward-")
    assert json.loads(file.read_text()) == {"key": KEY, "value": value}


@pytest.mark.parametrize(
    "other", [{"model": ["pre", 0.25]}, {"model": ["post", 0.5]}, {"part": "proxy"}, {"what": "ability"}, {"seed": 0}]
)
def test_another_key_is_another_piece(tmp_path: Path, other: dict) -> None:
    store, first, second = Store(tmp_path), Counter(1), Counter(2)
    assert [store.once(KEY, first), store.once({**KEY, **other}, second)] == [1, 2]
    assert [store.once(KEY, first), store.once({**KEY, **other}, second)] == [1, 2]
    assert (first.calls, second.calls) == (1, 1)


def test_work_that_fails_is_not_stored(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).once(KEY, fail)
    with pytest.raises(TypeError, match="not JSON serializable"):
        Store(tmp_path).once(KEY, lambda: object())
    assert list(tmp_path.iterdir()) == []
    assert Store(tmp_path).once(KEY, Counter(3)) == 3


@pytest.mark.parametrize("torn", [b"", b'{"key": {"wh', b"\0" * 40, b"\xff"])
def test_a_torn_piece_is_done_again(tmp_path: Path, torn: bytes) -> None:
    Store(tmp_path).once(KEY, Counter(1))
    (file,) = tmp_path.iterdir()
    file.write_bytes(torn)
    work = Counter(2)
    assert [Store(tmp_path).once(KEY, work) for _ in range(2)] == [2, 2]
    assert work.calls == 1
    assert list(tmp_path.iterdir()) == [file]


def test_two_containers_with_one_process_id_may_write_one_piece_where_nothing_can_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def refused(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refused)

    def meanwhile(file: int) -> None:  # the first has written and not yet renamed
        monkeypatch.setattr(os, "fsync", sync)
        assert Store(tmp_path).once(KEY, Counter(7)) == 7
        sync(file)

    monkeypatch.setattr(os, "fsync", meanwhile)
    assert Store(tmp_path).once(KEY, Counter(7)) == 7
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["value"] == 7


WAIT = "(print('go', flush=True), time.sleep(60))"


@pytest.mark.parametrize("moment", [
    f"work = lambda: {WAIT}",
    f"work = lambda: 1; os.fsync = lambda fd: {WAIT}",  # the file is written but does not have its name yet
])  # fmt: skip
def test_a_killed_process_leaves_nothing_finished(tmp_path: Path, moment: str) -> None:
    script = (
        f"import os, sys, time; from counterpoise.records import Store\n{moment}\n"
        f"Store(sys.argv[1]).once({KEY!r}, work)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"go\n"
        run.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob("*.json")) == []
    work = Counter(7)
    assert [Store(tmp_path).once(KEY, work) for _ in range(2)] == [7, 7]
    assert work.calls == 1
