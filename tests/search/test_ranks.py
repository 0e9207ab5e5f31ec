"""Processes that torchrun starts share a search, and find what one finds, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from counterpoise.averaging.partition import thirds
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation import workbench
from counterpoise.evaluation.panel import Panel
from counterpoise.language import sampling
from counterpoise.language.sampling import Drawing
from counterpoise.records import Store
from counterpoise.restoration import distance
from counterpoise.restoration.request import Request
from counterpoise.restoration.restore import run
from counterpoise.search import proxies
from counterpoise.search.candidates import HMA, TwoSided
from counterpoise.search.recipes import Wanted, find_recipe
from tiny import save_pair
from world import make, panel, searches


def small(world: Path) -> Panel:
    return panel(world, drawing=Drawing(max_new_tokens=6, batch_size=4))


def searched(world: Path, folder: Path) -> None:
    """Every search on its own, and a whole restore; how often this process ran the model lies beside."""
    counts = {"passes": 0, "drawn": 0}
    backward, generate, diverge = proxies.response_nll, sampling.begun_rows, distance.divergences

    def passed(*args: Any, **more: Any) -> torch.Tensor:
        counts["passes"] += 1
        return backward(*args, **more)

    def generated(*args: Any, **more: Any) -> Any:
        counts["drawn"] += 1
        return generate(*args, **more)

    apart: list[int] = []
    proxies.response_nll, sampling.begun_rows = passed, generated
    distance.divergences = lambda *args, **more: apart.append(1) or diverge(*args, **more)  # type: ignore[func-returns-value]
    for name, how in {"hma": HMA(proxy_size=24), "two-sided": TwoSided(blocks=3, proxy_size=16)}.items():
        at, work = (0.6 if name == "hma" else 1.0), folder / f"{name}.work"
        wanted = Wanted(world / "pre", world / "post", folder / f"{name}.json", how, at, work, 2)
        find_recipe(wanted, small(world))
    rank = os.environ.get("RANK", "0")
    (folder / f"counts-{rank}.json").write_text(json.dumps(counts))
    asked: dict[str, Any] = {"means": (0.9,), "keep_reward": 0.5, "confidence": 0.0, **searches(controls=False)}
    found = run(Request(world / "pre", world / "post", folder / "out", **asked), small(world))
    (folder / f"restored-{rank}.json").write_text(json.dumps(found))
    (folder / f"apart-{rank}.json").write_text(json.dumps(len(apart)))


def entry(rank: int, port: int, world_size: int, world: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {k: str(v) for k, v in place.items()}
    if rank == 1:
        workbench.compute_dtype = lambda pair, device: torch.float64  # type: ignore[assignment]  # timed otherwise there
    searched(world, folder)
    if dist.is_initialized():
        dist.destroy_process_group()


def of(processes: int, world: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    multiprocessing.set_forkserver_preload(["transformers", __name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(entry, args=(port, processes, world, folder), nprocs=processes, start_method="forkserver")
    told = json.loads((folder / "out" / "restore.json").read_text())
    return {
        "recipes": {p.name: p.read_bytes() for p in folder.glob("*.json") if p.stem in ("hma", "two-sided")},
        "restored": {k: v for k, v in told.items() if k not in ("seconds", "command", "out")},
        "weights": (folder / "out" / "model.safetensors").read_bytes(),
        "counts": [json.loads(p.read_text()) for p in sorted(folder.glob("counts-*.json"))],
        "apart": sum(json.loads(p.read_text()) for p in folder.glob("apart-*.json")),
        "told": [json.loads(p.read_text())["pick"] for p in folder.glob("restored-*.json")],
    }


def test_ranks_find_what_one_process_finds_and_share_the_work(tmp_path: Path) -> None:
    world = make(tmp_path)
    one, two = of(1, world, tmp_path / "one"), of(2, world, tmp_path / "two")
    assert len(one["recipes"]) == 2
    for what in ("recipes", "restored", "weights", "apart"):
        assert two[what] == one[what]
    assert two["told"] == one["told"] * 2
    [alone], shares = one["counts"], two["counts"]
    for what, count in alone.items():
        assert max(of[what] for of in shares) < count
    assert [of["passes"] for of in shares] == [alone["passes"] / 2] * 2


def test_a_pass_in_parts_is_the_pass(tmp_path: Path) -> None:
    pair = preflight(*save_pair(tmp_path, dtype=torch.float32))
    resident, cut = ResidentAverage(pair), thirds(pair.names)
    rows = tuple(proxies.Example((1, 5), (7, 9 + i, 2)[: 2 + i % 2]) for i in range(20))
    whole = proxies.ProxySet(rows, batch_size=2)
    value, gradient = resident.loss_and_gradient(cut, [0.4] * 3, whole.terms)
    at_once, of_all = resident.loss_and_gradient(cut, [0.4] * 3, whole.backward)
    assert value == pytest.approx(at_once, rel=1e-14)
    np.testing.assert_allclose(gradient, of_all, rtol=1e-12)
    losses, gradients = resident.losses_and_gradients(cut, [0.4] * 3, whole.terms)
    assert losses.shape == (proxies.PARTS,)
    assert gradients.shape == (proxies.PARTS, 3)
    short = replace(whole, examples=rows[:3])  # fewer batches than parts
    assert resident.loss_and_gradient(cut, [0.4] * 3, short.terms)[0] == pytest.approx(
        short.nll(resident.model), rel=1e-14
    )


def test_works_that_are_done_as_one_are_kept_once(tmp_path: Path) -> None:
    store, done = Store(tmp_path), []
    for _ in range(2):
        assert store.together({"what": "w"}, lambda: done.append(1) or 7) == 7  # type: ignore[func-returns-value]
    assert done == [1]
