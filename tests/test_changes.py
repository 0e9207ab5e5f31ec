"""An input that changes while it is read is noticed, and never recorded under the hash of what it was."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from counterpoise.averaging.average import average
from counterpoise.averaging.diff import diff
from counterpoise.averaging.merge import Merge, merge
from counterpoise.checkpoints.checkpoint import Checkpoint, companions_sha256
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.hashing import Watch
from tiny import save_pair

CHANGED = "found it changed while it was read; run again once nothing writes to it"


def in_place(file: Path) -> None:
    """Another number at the end, with the size and the time of before."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\1\2\3\4")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    save_file({n: t + 1 for n, t in load_file(file).items()}, file.with_name("new"), {"format": "pt"})
    file.with_name("new").rename(file)


def cut(file: Path) -> None:
    os.truncate(file, 5000)


WAYS: list[Callable[[Path], None]] = [in_place, replaced, cut]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["pre", "post"])
@pytest.mark.parametrize("command", ["average", "merge", "diff"])
def test_weights_that_change_midway_end_the_run(
    tmp_path: Path, way: Callable[[Path], None], side: str, command: str
) -> None:
    pre, post = save_pair(tmp_path)
    done = []

    def meddle(*counts: object) -> None:
        if not done:
            way(tmp_path / side / "model.safetensors")
        done.append(counts)

    out = tmp_path / "out"
    commands = {
        "average": lambda: average(pre, post, out, 0.5, progress=meddle),
        "merge": lambda: merge(pre, [post], out, Merge("dare", seed=1), progress=meddle),
        "diff": lambda: diff(pre, post, progress=meddle),
    }
    with pytest.raises(CheckpointError, match=CHANGED):
        commands[command]()
    assert done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["post", "pre"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_touched_but_stays_the_same_is_no_matter(tmp_path: Path, name: str) -> None:
    pre, post = save_pair(tmp_path)
    watched = Checkpoint(post)
    hashes = dict(watched.sha256)
    os.utime(post / name)
    shutil.copy(post / name, tmp_path / "copy")
    (tmp_path / "copy").rename(post / name)
    watched.refuse_changed()
    assert watched.sha256 == hashes
    recipe = average(pre, post, tmp_path / "out", 0.5, also=lambda _: os.utime(post / name))
    assert recipe.inputs["post"]["sha256"] == hashes


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_companion_that_changes_after_it_was_hashed_is_noticed(tmp_path: Path, name: str, gone: bool) -> None:
    _, post = save_pair(tmp_path)
    watched = Checkpoint(post)
    companions_sha256(watched)
    watched.refuse_changed()
    (post / name).unlink() if gone else (post / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name}: .*{CHANGED}"):
        watched.refuse_changed()


def test_weights_that_change_before_they_are_hashed_are_noticed(tmp_path: Path) -> None:
    """The header, and perhaps the first tensors, are already those of another file."""
    _, post = save_pair(tmp_path)
    for read in (lambda c: c.sha256, lambda c: c["model.norm.weight"], lambda c: c.refuse_changed()):
        opened = Checkpoint(post)
        in_place(post / "model.safetensors")
        with pytest.raises(CheckpointError, match=CHANGED):
            read(opened)


def test_a_file_that_shrinks_while_it_is_hashed_ends_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = hashlib.sha256

    def meddling() -> object:
        os.truncate(tmp_path / "f", 10)
        return really()

    (tmp_path / "f").write_bytes(bytes(9 << 20))
    monkeypatch.setattr("counterpoise.checkpoints.hashing.hashlib.sha256", meddling)
    with pytest.raises(CheckpointError, match=CHANGED):
        Watch([tmp_path / "f"]).sha256(tmp_path / "f")


def test_what_is_measured_is_what_was_hashed(tmp_path: Path) -> None:
    """The resident model reads the files again and again; restore, search and tax measure it."""
    from counterpoise.averaging.partition import whole
    from counterpoise.averaging.resident import ResidentAverage
    from counterpoise.checkpoints.preflight import preflight, scan

    pair = preflight(*save_pair(tmp_path))
    scan(pair)
    resident = ResidentAverage(pair)
    cut = whole(pair.names)
    resident.set(cut, [0.5])
    in_place(tmp_path / "post" / "model.safetensors")
    with pytest.raises(CheckpointError, match=CHANGED):
        resident.set(cut, [0.7])
    with pytest.raises(CheckpointError, match=CHANGED):
        resident.loss_and_gradient(cut, [0.7], lambda model: float(torch.zeros(())))
