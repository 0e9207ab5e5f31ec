"""Engines on a Ray cluster find what one process finds, also when some of them are lost. Skipped where Ray is not installed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation import panel as measuring
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.workbench import Model, Piece, Workbench
from counterpoise.language.sampling import Drawing
from counterpoise.records import Store
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


AGENTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def node() -> dict[str, Any]:
    """Two cores, and free ports for its agents: a node gives up when they need more than 15 s to choose one."""
    with contextlib.ExitStack() as held:
        free = [held.enter_context(socket.socket()) for _ in AGENTS]
        for one in free:
            one.bind(("127.0.0.1", 0))
        return {"num_cpus": 2, **{name: one.getsockname()[1] for name, one in zip(AGENTS, free, strict=True)}}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    from ray.cluster_utils import Cluster as Nodes

    found = Nodes(initialize_head=True, head_node_args={**node(), "include_dashboard": False})
    found.add_node(**node())
    yield found
    found.shutdown()


def loaded(world: Path, reward: Told, device: str) -> Panel:
    """The panel in an engine; the name of its reward stays."""
    assert device == "cpu"
    return replace(panel(world, drawing=Drawing(max_new_tokens=6, batch_size=32)), reward=reward)


def restored(world: Path, out: Path, engines: Cluster | None = None, *, race: bool = False) -> tuple[Any, bytes]:
    """What a restore writes: its json without what tells of the run, and the weights."""
    asked: dict[str, Any] = {
        "means": (0.7,),
        "keep_reward": 0.5,
        "confidence": 0.0,
        "race": race,
        **searches(controls=race),
    }
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


def hangs_on(node: str, flag: Path, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward; on one node it never comes."""
    if ray.get_runtime_context().get_node_id() == node:
        flag.touch()
        time.sleep(600)
    return early_letters(prompts, responses)


def fewer(world: Path, reward: Told, device: str) -> Panel:
    found = loaded(world, reward, device)
    return replace(found, prompts=found.prompts[1:])


def fails(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    raise ValueError("the reward is ill")


@pytest.mark.parametrize("race", [False, True])
def test_engines_measure_what_one_process_measures(
    nodes: Any, world: Path, plain: tuple[Any, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, race: bool
) -> None:
    wanted = restored(world, tmp_path / "one", race=race) if race else plain
    (told := tmp_path / "told").mkdir()
    engines = Cluster(partial(loaded, world, partial(tells, told)), nodes.address, replicas=2)
    drawn, sample = [], measuring.sample
    monkeypatch.setattr(measuring, "sample", lambda *args, **more: drawn.append(1) or sample(*args, **more))
    assert restored(world, tmp_path / "out", engines, race=race) == wanted
    assert not drawn
    assert len([*told.iterdir()]) == 2


def test_the_work_of_a_killed_engine_is_done_again(
    nodes: Any, world: Path, plain: tuple[Any, bytes], tmp_path: Path
) -> None:
    engines = Cluster(partial(loaded, world, partial(dies_once, tmp_path / "died")), nodes.address)
    assert restored(world, tmp_path / "out", engines) == plain
    assert (tmp_path / "died").exists()


def test_an_engine_has_all_its_devices_on_one_node(
    nodes: Any, world: Path, plain: tuple[Any, bytes], tmp_path: Path
) -> None:
    (told := tmp_path / "told").mkdir()
    load = partial(loaded, world, partial(tells, told))
    engines = Cluster(load, nodes.address, replicas=2, needs={"CPU": 2})
    assert restored(world, tmp_path / "out", engines) == plain
    assert len({path.name.split("-")[0] for path in told.iterdir()}) == 2


def test_what_was_healed_is_measured_by_the_driver(world: Path, tmp_path: Path) -> None:
    """Its weights lie in the work folder, which other nodes need not see: nothing is asked of an engine."""
    bench = Workbench(preflight(world / "pre", world / "post"), loaded(world, early_letters, "cpu"), Store(tmp_path))
    healed = Model("healed", "healed", bench.whole, (0.0,), world / "post")
    cluster._measure(bench, [], [Piece(healed, "validation")])
    bench.elsewhere = partial(cluster._measure, bench, [])
    [point] = bench.points([healed], "validation")
    assert len(point.scores.reward.statistics) > 0


def test_what_cannot_be_is_refused(nodes: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(reward: Told, match: str, *, load: Callable[..., Panel] = loaded, **how: Any) -> None:
        with pytest.raises(ValueError, match=match):
            restored(world, tmp_path / "out", Cluster(partial(load, world, reward), nodes.address, **how))

    monkeypatch.setattr(cluster, "ROOM", 1.0)
    refused(early_letters, r"expected room for 3 times .*'CPU': 2.* found .*'CPU': 4", replicas=3, needs={"CPU": 2})
    refused(fails, "the reward is ill")
    refused(early_letters, r"found another panel at .* copy the same files there", load=fewer)
    refused(early_letters, "expected at least 1 engine, found 0", replicas=0)


def test_the_work_of_a_lost_node_is_done_on_another(
    nodes: Any, world: Path, plain: tuple[Any, bytes], tmp_path: Path
) -> None:
    flag, other = tmp_path / "hangs", nodes.list_all_nodes()[-1]
    load = partial(loaded, world, partial(hangs_on, other.node_id, flag))
    engines = Cluster(load, nodes.address, replicas=2, needs={"CPU": 2})

    def lose() -> None:
        while not flag.exists():
            time.sleep(0.1)
        nodes.remove_node(other, allow_graceful=False)

    (thread := threading.Thread(target=lose, daemon=True)).start()
    assert restored(world, tmp_path / "out", engines) == plain
    thread.join()
    assert flag.exists()
