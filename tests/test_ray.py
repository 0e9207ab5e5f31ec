"""Engines on a Ray cluster find what one process finds, also when some of them are lost. Skipped where Ray is not installed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from counterpoise.evaluation import panel as measuring
from counterpoise.evaluation.panel import Panel
from counterpoise.language.sampling import Drawing
from counterpoise.restoration import cluster
from counterpoise.restoration.cluster import Cluster
from counterpoise.restoration.request import Request
from counterpoise.restoration.restore import run
from world import early_letters, make, panel, searches

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'counterpoise[ray]'")
WEIGHTS = "model.safetensors"
Told = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def local() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=2)
    ray.init(nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def loaded(world: Path, reward: Told, device: str) -> Panel:
    """The panel in an engine; the name of its reward stays."""
    assert device == "cpu"
    return replace(panel(world, drawing=Drawing(max_new_tokens=6, batch_size=32)), reward=reward)


def restored(world: Path, out: Path, engines: Cluster | None = None, *, race: bool = False) -> tuple[Any, bytes]:
    """What a restore writes: its json without what tells of the run, and the weights."""
    asked: dict[str, Any] = {"means": (0.7,), "keep_reward": 0.5, "confidence": 0.0, "race": race, **searches(controls=race)}
    request = Request(world / "pre", world / "post", out, **asked)
    run(request, loaded(world, early_letters, "cpu"), cluster=engines)
    told = json.loads((out / "restore.json").read_text())
    return {k: v for k, v in told.items() if k not in ("seconds", "command", "out")}, (out / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def plain(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, bytes]:
    return restored(world, tmp_path_factory.mktemp("plain") / "out")


def tells(folder: Path, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward, leaving the node and the process behind."""
    (folder / f"{ray.get_runtime_context().get_node_id()}-{os.getpid()}").touch()
    return early_letters(prompts, responses)


def dies_once(flag: Path, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return early_letters(prompts, responses)


def hangs_beside(driver: str, flag: Path, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward; on another node than the driver's it never comes."""
    if ray.get_runtime_context().get_node_id() != driver:
        flag.touch()
        time.sleep(600)
    return early_letters(prompts, responses)


def fails(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    raise ValueError("the reward is ill")


@pytest.mark.usefixtures("local")
@pytest.mark.parametrize("race", [False, True])
def test_engines_measure_what_one_process_measures(
    world: Path, plain: tuple[Any, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, race: bool
) -> None:
    wanted = restored(world, tmp_path / "one", race=race) if race else plain
    (nodes := tmp_path / "nodes").mkdir()
    engines = Cluster(partial(loaded, world, partial(tells, nodes)), replicas=2)
    drawn, sample = [], measuring.sample
    monkeypatch.setattr(measuring, "sample", lambda *args, **more: drawn.append(1) or sample(*args, **more))
    assert restored(world, tmp_path / "out", engines, race=race) == wanted
    assert not drawn
    assert len([*nodes.iterdir()]) == 2


@pytest.mark.usefixtures("local")
def test_the_work_of_a_killed_engine_is_done_again(world: Path, plain: tuple[Any, bytes], tmp_path: Path) -> None:
    engines = Cluster(partial(loaded, world, partial(dies_once, tmp_path / "died")), replicas=1)
    assert restored(world, tmp_path / "out", engines) == plain
    assert (tmp_path / "died").exists()


def test_an_engine_has_all_its_devices_on_one_node(
    two_nodes: Any, world: Path, plain: tuple[Any, bytes], tmp_path: Path
) -> None:
    (nodes := tmp_path / "nodes").mkdir()
    engines = Cluster(partial(loaded, world, partial(tells, nodes)), replicas=2, needs={"CPU": 2})
    assert restored(world, tmp_path / "out", engines) == plain
    assert len({path.name.split("-")[0] for path in nodes.iterdir()}) == 2


def test_the_work_of_a_lost_node_is_done_on_another(
    two_nodes: Any, world: Path, plain: tuple[Any, bytes], tmp_path: Path
) -> None:
    flag, here = tmp_path / "hangs", ray.get_runtime_context().get_node_id()
    engines = Cluster(partial(loaded, world, partial(hangs_beside, here, flag)), replicas=2, needs={"CPU": 2})
    [other] = [n for n in two_nodes.list_all_nodes() if n.node_id != here]

    def lose() -> None:
        while not flag.exists():
            time.sleep(0.1)
        two_nodes.remove_node(other, allow_graceful=False)

    (thread := threading.Thread(target=lose)).start()
    assert restored(world, tmp_path / "out", engines) == plain
    thread.join()


@pytest.mark.usefixtures("local")
def test_what_cannot_be_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = partial(loaded, world, early_letters)
    monkeypatch.setattr(cluster, "ROOM", 1.0)
    with pytest.raises(ValueError, match=r"expected room for 2 times .*'CPU': 2.* found .*'CPU': 2"):
        restored(world, tmp_path / "out", Cluster(load, replicas=2, needs={"CPU": 2}))
    with pytest.raises(ValueError, match="the reward is ill"):
        restored(world, tmp_path / "out", Cluster(partial(loaded, world, fails)))
    with pytest.raises(ValueError, match=r"found another panel at .* copy the same files there"):
        restored(world, tmp_path / "out", Cluster(partial(fewer, world)))
    with pytest.raises(ValueError, match="expected at least 1 engine, found 0"):
        Cluster(load, replicas=0).check()


def fewer(world: Path, device: str) -> Panel:
    found = loaded(world, early_letters, device)
    return replace(found, prompts=found.prompts[1:])
