"""A pair cut up among two gloo processes: the bits of the whole average, its gradient, half of the memory."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from counterpoise.alignment.training.processes import join
from counterpoise.averaging.partition import layerwise, thirds
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.averaging.sharded import ShardedAverage
from counterpoise.checkpoints.preflight import Pair, preflight
from counterpoise.language import memory
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example
from counterpoise.language.sharded import own_part
from counterpoise.restoration.request import Request
from counterpoise.restoration.restore import measure_tax, run
from counterpoise.search.candidates import HMA, TwoSided
from counterpoise.search.proxies import ProxySet
from counterpoise.search.recipes import Wanted, find_recipe
from tiny import save_pair
from world import make, panel, searches

PAIRS = {"llama": False, "gemma": True, "gpt2": True}
"""Families, and whether the head is tied."""
COMPUTED = {"float64": ("float64",), "bfloat16": ("bfloat16", "float32")}
"""What a pair is stored in, and what it is computed in."""
CASES = [(f"{family}-{stored}", dtype) for family in PAIRS for stored, some in COMPUTED.items() for dtype in some]
RATIOS = ([0.2, 0.5, 0.9], [0.2, 0.35, 1.0], [0.0, 0.35, 1.3])
ROWS = tuple(Example((1, 5 + i % 3, 9)[: 2 + i % 2], (7, 9 + i, 2, 11)[: 1 + i % 4]) for i in range(21))
PROXIES = ProxySet(ROWS, 4)
"""In batches of four, the last of which has one row: the second process then has none."""


def entry(rank: int, port: int, work: Callable[..., None], *inputs: Any) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in place.items()}
    join("cpu", 2)
    work(rank, *inputs)
    dist.destroy_process_group()


def in_two(work: Callable[..., None], *inputs: Any) -> None:
    multiprocessing.set_forkserver_preload(["transformers", __name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(entry, args=(port, work, *inputs), nprocs=2, start_method="forkserver")


def live(resident: ResidentAverage | None = None) -> int:
    """Bytes of all tensors of this process, but for the chunks that it works in, whose size is not the model's."""
    gc.collect()
    chunks = {t.untyped_storage().data_ptr() for t in (resident._buffers.values() if resident else ())}
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not issubclass(type(o), DTensor)]
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in stored.items() if place not in chunks)


def half(rank: int, folder: Path) -> None:
    """What this process holds and finds."""
    memory.free_memory = lambda device: 1000 * (1 + rank)
    found = {}
    for name, compute in json.loads((folder / "cases.json").read_text()):
        pair = preflight(folder / name / "pre", folder / name / "post")
        found[f"{name}-{compute}"] = found_of(pair, compute, folder / f"{name}-{compute}-{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(found))


def found_of(pair: Pair, compute: str, file: Path) -> dict[str, Any]:
    """Of one pair; the parts of its averages go to a file."""
    before, cut = live(), layerwise(pair.names)
    resident = ShardedAverage(pair, dtype=getattr(torch, compute))
    parameters = dict(resident.model.named_parameters(remove_duplicate=False))
    slopes = resident.losses_and_gradients(cut, [0.4] * len(cut), PROXIES.terms)
    share = (live(resident) - before) / sum(p.numel() * p.itemsize for p in resident.model.parameters())
    parts: dict[str, list[torch.Tensor]] = {n: [] for n in parameters}
    for ratios in RATIOS:
        resident.set(thirds(pair.names), ratios)
        for n, p in parameters.items():
            parts[n].append(own_part(p.detach()).clone())
    torch.save(parts, file)
    read = sum(len(resident._sides(n)[0]) for n in resident._places)
    resident.hold("cpu")
    held = resident.losses_and_gradients(cut, [0.4] * len(cut), PROXIES.terms)
    return {
        "slopes": [x.tolist() for x in slopes],
        "held": [x.tolist() for x in held],
        "nll": PROXIES.nll(resident.model),
        "free": memory.free_beside(resident.model),
        "left": all(p.grad is None for p in parameters.values()),
        "recomputes": resident.recomputes,
        "share": share,
        "read": read / sum(pair.post[n].numel() for n in pair.names),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for name in dict.fromkeys(name for name, _ in CASES):
        family, _, stored = name.partition("-")
        save_pair(folder / name, family, dtype=getattr(torch, stored), tied=PAIRS[family])
    (folder / "cases.json").write_text(json.dumps(CASES))
    in_two(half, folder)
    return folder


@pytest.mark.parametrize(("name", "compute"), CASES)
def test_the_parts_are_the_bits_of_the_whole_average(two: Path, name: str, compute: str) -> None:
    pair = preflight(two / name / "pre", two / name / "post")
    resident = ResidentAverage(pair, dtype=getattr(torch, compute))
    parts = [torch.load(two / f"{name}-{compute}-{rank}.pt") for rank in range(2)]
    for number, ratios in enumerate(RATIOS):
        resident.set(thirds(pair.names), ratios)
        for n, parameter in resident.model.named_parameters(remove_duplicate=False):
            both = torch.cat([part[n][number] for part in parts])
            assert both.dtype == parameter.dtype
            assert torch.equal(both, parameter), (n, ratios)


@pytest.mark.parametrize(("name", "compute"), CASES)
def test_losses_and_gradients_are_those_of_one_process(two: Path, name: str, compute: str) -> None:
    """Up to the order of sums, over rows in two processes and over halves of tensors.

    Of the largest slope these differ by 6e-16 in float64, by 1e-9 where norms are float32 inside (Gemma), by 2e-7 in float32.
    """
    pair = preflight(two / name / "pre", two / name / "post")
    resident, cut = ResidentAverage(pair, dtype=getattr(torch, compute)), layerwise(pair.names)
    found = [json.loads((two / f"{rank}.json").read_text())[f"{name}-{compute}"] for rank in range(2)]
    assert found[0]["slopes"] == found[1]["slopes"]
    close = {"float64": 1e-8 if "gemma" in name else 1e-13, "float32": 3e-6, "bfloat16": 0.03}[compute]
    wanted = resident.losses_and_gradients(cut, [0.4] * len(cut), PROXIES.terms)
    assert found[0]["nll"] == found[1]["nll"] == pytest.approx(sum(wanted[0]), rel=close)
    for losses, gradients in (found[0]["slopes"], found[0]["held"]):  # PRE and POST mapped, and held
        np.testing.assert_allclose(losses, wanted[0], rtol=close, atol=close * np.abs(wanted[0]).max())
        np.testing.assert_allclose(gradients, wanted[1], rtol=close, atol=close * np.abs(wanted[1]).max())


def test_as_many_rows_fit_in_every_process(two: Path) -> None:
    free = [{f["free"] for f in json.loads((two / f"{rank}.json").read_text()).values()} for rank in range(2)]
    assert free == [{1000}, {1000}]


def test_each_process_holds_and_reads_half(two: Path) -> None:
    for rank in range(2):
        for name, found in json.loads((two / f"{rank}.json").read_text()).items():
            assert found["left"], name
            assert found["recomputes"], name
            if name.endswith("float64"):  # where no noise is kept for later
                assert 0.45 < found["share"] < 0.55, name
            assert 0.45 < found["read"] < 0.55, name


SEARCHES = {
    "hma": (HMA(proxy_size=24), 0.6),
    "two-sided": (TwoSided(blocks=3, proxy_size=16), 1.0),
}


def searched(rank: int, world: Path, folder: Path, shard: int = 2) -> None:
    """Every search on its own and a whole restore; what this process was told lies in `folder`."""
    told: dict[str, Any] = {}
    files = panel(world, drawing=Drawing(max_new_tokens=6, batch_size=4), prompt_limit=12, limit=8)
    for name, (how, at) in SEARCHES.items():
        wanted = Wanted(
            world / "pre", world / "post", folder / f"{name}.json", how, at, folder / "work", 2, shard=shard
        )
        told[name] = list(find_recipe(wanted, files)[1].ratios)
    asked: dict[str, Any] = {"means": (0.9,), "keep_reward": 0.5, "confidence": 0.0, "anyway": True, "shard": shard}
    found = run(Request(world / "pre", world / "post", folder / "out", **asked, **searches(controls=False)), files)
    told["points"] = {f"{p['name']} {p['part']}": [p["ratios"], p["reward"]["value"]] for p in found["points"]}
    told["pick"] = found["pick"]
    taxed = measure_tax(world / "pre", world / "post", files, shard=shard)
    told["tax"] = [row["tax"]["value"] for row in taxed["tax"]]
    told["distance"] = [row["post"]["value"] for row in taxed["distance"]]
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


def test_searches_and_restore_find_what_one_process_finds(tmp_path: Path) -> None:
    world = make(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    searched(0, world, tmp_path / "one", 1)
    in_two(searched, world, tmp_path / "two")
    alone, *both = [
        json.loads((tmp_path / p).read_text()) for p in ("one/told-0.json", "two/told-0.json", "two/told-1.json")
    ]
    assert both[0] == both[1]
    for name in SEARCHES:
        np.testing.assert_allclose(both[0][name], alone[name], atol=1e-4)
    assert both[0]["pick"] == alone["pick"]
    for what in ("tax", "distance"):
        np.testing.assert_allclose(both[0][what], alone[what], atol=1e-4)
    assert both[0]["points"].keys() == alone["points"].keys()
    for name, (ratios, reward) in alone["points"].items():
        np.testing.assert_allclose(both[0]["points"][name][0], ratios, atol=1e-4)
        assert both[0]["points"][name][1] == pytest.approx(reward, abs=1e-6)
