"""What a search step and a change of ratios cost, against the model's own forward and backward and a plain copy.

    python benchmarks/resident.py PRE POST [--rounds 5] [--threads 2]

PRE and POST are checkpoint folders (the real run's SmolLM2, for instance). Prints medians and ratios taken round by round
and writes benchmarks/results/resident.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from counterpoise.averaging import versions
from counterpoise.language import Example
from counterpoise.partition import thirds
from counterpoise.preflight import preflight
from counterpoise.resident import ResidentAverage
from counterpoise.search.proxies import ProxySet


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def anonymous_mb() -> float:
    """Anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pre")
    parser.add_argument("post")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    start = anonymous_mb()
    pair = preflight(options.pre, options.post)
    resident = ResidentAverage(pair)
    partition = thirds(pair.names)
    loaded = anonymous_mb()
    ids = torch.randint(1, 30000, (8, 80)).tolist()
    proxies = ProxySet(tuple(Example(tuple(row[:40]), tuple(row[40:])) for row in ids), batch_size=8)
    parameters = list(resident.model.parameters())
    sources = [torch.clone(p.data) for p in parameters]

    def plain() -> None:
        proxies.backward(resident.model)
        for p in parameters:
            p.grad = None

    def copy() -> None:
        for p, source in zip(parameters, sources, strict=True):  # noqa: F821
            p.data.copy_(source)

    rows = []
    for number in range(-1, options.rounds):
        low, high = [0.4, 0.5, 0.6], [0.5, 0.6, 0.7]
        row = {
            "forward_backward_s": seconds(plain),
            "search_step_s": seconds(lambda low=low: resident.loss_and_gradient(partition, low, proxies.backward)),
            "copy_s": seconds(copy),
        }
        resident._ratios.clear()  # the copy went behind its back
        resident.set(partition, low)
        row["set_s"] = seconds(lambda high=high: resident.set(partition, high))
        if number >= 0:
            rows.append(row)
    del sources
    peak = anonymous_mb()
    medians = {name: statistics.median(r[name] for r in rows) for name in rows[0]}
    ratios = {
        "search_step/forward_backward": statistics.median(r["search_step_s"] / r["forward_backward_s"] for r in rows),
        "set/copy": statistics.median(r["set_s"] / r["copy_s"] for r in rows),
    }
    for name, value in {**medians, **ratios}.items():
        print(f"{name:32} {value:.3f}")
    size = sum(p.numel() * p.element_size() for p in parameters) / 1e6
    memory = {"parameters_mb": size, "anonymous_after_loading_mb": loaded - start, "anonymous_at_end_mb": peak - start}
    print(memory)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "command": f"python benchmarks/resident.py PRE POST --rounds {options.rounds} --threads {options.threads}",
        "commit": commit, "seed": 0, "versions": versions(), "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "rounds": rows, "medians": medians, "ratios": ratios, "memory": memory,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / "resident.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
