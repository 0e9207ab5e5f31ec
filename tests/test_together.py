"""Several processes with one work folder share a restore, and a killed one's work is done by the others."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from counterpoise.checkpoints.locks import alone
from counterpoise.cli.app import app
from counterpoise.evaluation import panel as measuring
from counterpoise.language.sampling import Drawing
from counterpoise.records import Store
from counterpoise.restoration.cluster import Cluster
from counterpoise.restoration.request import Details
from counterpoise.restoration.restore import restore
from world import make, panel, searches

FORKED = multiprocessing.get_context("forkserver")
WEIGHTS = "model.safetensors"


def restored(world: Path, folder: Path, rank: int) -> None:
    """One process of a restore; how many batches of prompts it drew for lies beside OUT."""
    drawn, sample = [], measuring.sample
    measuring.sample = lambda *args, **more: drawn.append(1) or sample(*args, **more)  # type: ignore[assignment, func-returns-value]
    asked: dict[str, Any] = {"means": (0.3, 0.7), "keep_reward": 0.5, "details": Details(confidence=0.5), **searches()}
    restore(
        world / "pre",
        world / "post",
        folder / "out",
        panel(world, drawing=Drawing(max_new_tokens=6, batch_size=32)),
        **asked,
    )
    (folder / f"drawn-{rank}").write_text(str(len(drawn)))


def finished(world: Path, folder: Path, processes: int) -> tuple[dict[str, Any], bytes, list[int]]:
    folder.mkdir()
    FORKED.set_forkserver_preload(["transformers", "counterpoise.restoration.restore"])
    begun = [FORKED.Process(target=restored, args=(world, folder, rank)) for rank in range(processes)]
    for process in begun:
        process.start()
    for process in begun:
        process.join()
        assert process.exitcode == 0
    result = json.loads((folder / "out" / "restore.json").read_text())
    counts = [int(path.read_text()) for path in folder.glob("drawn-*")]
    return result, (folder / "out" / WEIGHTS).read_bytes(), counts


def test_two_processes_give_what_one_gives_and_do_nothing_twice(tmp_path: Path) -> None:
    world = make(tmp_path)
    one, weights, (alone_drew,) = finished(world, tmp_path / "one", 1)
    two, also, drew = finished(world, tmp_path / "two", 2)
    assert {k: v for k, v in two.items() if k not in ("seconds", "command")} == {
        k: v for k, v in one.items() if k not in ("seconds", "command")
    } | {"out": two["out"]}
    assert also == weights
    assert sum(drew) == alone_drew
    assert min(drew) > 0


def held(path: Path) -> None:
    with alone(path):
        path.touch()
        time.sleep(60)


def test_a_killed_process_lets_go_of_its_work(tmp_path: Path) -> None:
    path = tmp_path / "piece"
    process = FORKED.Process(target=held, args=(path,))
    process.start()
    while not path.exists():
        time.sleep(0.05)
    with alone(path, wait=False) as mine:
        assert not mine
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with alone(path) as mine:
        assert mine
    assert [p.name for p in tmp_path.iterdir()] == ["piece"]


def test_finished_works_are_read_where_nothing_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, key = Store(tmp_path), {"what": "w"}
    assert store.once(key, lambda: 7) == 7

    def refused(path: object, flags: int, *more: int) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", refused)
    assert store.each([({"what": "name"}, lambda: store.once(key, lambda: 8))]) == [7]


def test_works_are_done_in_their_order_and_given_in_it(tmp_path: Path) -> None:
    store, done = Store(tmp_path / "pieces"), []
    works = [({"what": "w", "n": n}, lambda n=n: done.append(n) or n * n) for n in (3, 1, 2)]  # type: ignore[misc]
    assert store.each(works) == [9, 1, 4]
    assert done == [3, 1, 2]


def test_commands_that_share_nothing_are_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["average", "a", "b", "-o", "c", "--ratio", "0.5"], ["front", "a"], ["demo"]):
        run = CliRunner().invoke(app, command)
        assert run.exit_code == 1, run.output
        assert f"{command[0]}: expected one process, found 2" in run.output


def test_a_cluster_needs_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"expected the package, found none; pip install 'counterpoise\[ray\]'"
    ):
        Cluster(lambda device: panel(Path(device))).check()
