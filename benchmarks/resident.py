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
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from counterpoise.averaging.partition import thirds
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.preflight import preflight
from counterpoise.language.scoring import Example
from counterpoise.records import versions
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


def peak_mb(work: Callable[[], object]) -> float:
    """The most anonymous memory that this process had during a call, looked at every two milliseconds."""
    seen, done = [anonymous_mb()], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            seen.append(anonymous_mb())

    watcher = threading.Thread(target=look)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(seen)


def peaks(options: argparse.Namespace) -> dict[str, float]:
    """Peak anonymous memory of a forward and backward and of a search step, each in a process of its own."""
    found = {}
    for kind in ("forward_backward", "search_step"):
        command = [sys.executable, __file__, options.pre, options.post, "--peak", kind]
        command += ["--threads", str(options.threads)]
        found[kind] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pre")
    parser.add_argument("post")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=("forward_backward", "search_step"), help="print one peak of memory and end")
    options = parser.parse_args()
    peak = {} if options.peak else peaks(options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pair = preflight(options.pre, options.post)
    resident = ResidentAverage(pair)
    partition = thirds(pair.names)
    ids = torch.randint(1, 30000, (8, 80)).tolist()
    proxies = ProxySet(tuple(Example(tuple(row[:40]), tuple(row[40:])) for row in ids), batch_size=8)
    parameters = list(resident.model.parameters())

    def plain() -> None:
        proxies.backward(resident.model)
        for p in parameters:
            p.grad = None

    low, high = [0.4, 0.5, 0.6], [0.5, 0.6, 0.7]
    if options.peak:
        resident.set(partition, high)
        steps = {
            "forward_backward": plain,
            "search_step": lambda: resident.loss_and_gradient(partition, low, proxies.backward),
        }
        print(peak_mb(steps[options.peak]))
        return

    sources = [torch.clone(p.data) for p in parameters]

    def copy() -> None:
        for p, source in zip(parameters, sources, strict=True):
            p.data.copy_(source)

    rows = []
    for number in range(-1, options.rounds):
        row = {
            "forward_backward_s": seconds(plain),
            "search_step_s": seconds(lambda: resident.loss_and_gradient(partition, low, proxies.backward)),
            "copy_s": seconds(copy),
        }
        resident._ratios.clear()  # the copy went behind its back
        resident.set(partition, low)
        row["set_s"] = seconds(lambda: resident.set(partition, high))
        if number >= 0:
            rows.append(row)
    medians = {name: statistics.median(r[name] for r in rows) for name in rows[0]}
    ratios = {
        "search_step/forward_backward": statistics.median(r["search_step_s"] / r["forward_backward_s"] for r in rows),
        "set/copy": statistics.median(r["set_s"] / r["copy_s"] for r in rows),
    }
    for name, value in {**medians, **ratios}.items():
        print(f"{name:32} {value:.3f}")
    size = sum(p.numel() * p.element_size() for p in parameters) / 1e6
    memory = {
        "parameters_mb": size,
        **{f"peak_anonymous_mb_of_{kind}": value for kind, value in peak.items()},
        "copies_that_the_search_step_adds": (peak["search_step"] - peak["forward_backward"]) / size,
    }
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
