"""What a task weighting costs, with 14 tasks on one CPU thread.

    python benchmarks/weighting_overhead.py              # the tables, and results/weighting_overhead.json beside this file
    python benchmarks/weighting_overhead.py --calls 200 --pairs 3 --rounds 1 --out /tmp/quick.json

1. Microseconds of a call on fresh losses plus `step()`, without the backward pass, beside what any loop pays: summing them.
2. What each weighting adds to a TextCNN training step that sums the losses: median of paired differences, the two
   alternating on the same batches, in wall and in CPU time (on a busy machine the CPU's is the one to read).
3. Memory that a weighting holds, by number of tasks.
4. Steps of the methods that look at each task's gradient, with a graph per task and with one graph for all, and the routes
   of torchjd and LibMTL; all take turns, and an epoch is 1,423 rows of the largest task (the 14 review domains).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gradient_methods
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise import multitask

TASKS = [f"task{i}" for i in range(14)]
LARGEST = 1423
"""Training rows of the largest task of the 14 review domains, which make an epoch."""
Losses = dict[str, Tensor]
Scalarize = Callable[[Losses], Tensor]
After = Callable[[], None]


class TextCNN(nn.Module):
    """Three parallel convolutions (kernels 3, 5, 7) over embeddings, and a binary head per task."""

    def __init__(self, vocabulary: int = 5000, width: int = 100, filters: int = 100) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, filters, k, padding=k // 2) for k in (3, 5, 7))
        self.heads = nn.ModuleList(nn.Linear(3 * filters, 2) for _ in TASKS)

    def features(self, tokens_BT: Tensor) -> Tensor:
        """What the heads read, (B, 3 * filters)."""
        x = self.embed(tokens_BT).transpose(1, 2)
        return torch.cat([F.relu(c(x)).amax(-1) for c in self.convolutions], dim=-1)

    def losses(self, tokens_MBT: Tensor, labels_MB: Tensor) -> Losses:
        """The mean cross-entropy of each task on its own rows."""
        m, b, t = tokens_MBT.shape
        features = self.features(tokens_MBT.reshape(m * b, t)).reshape(m, b, -1)
        return {
            task: F.cross_entropy(head(features[i]), labels_MB[i])
            for i, (task, head) in enumerate(zip(TASKS, self.heads, strict=True))
        }

    def shared(self) -> list[nn.Parameter]:
        """The convolutions and the embedding."""
        return [*self.convolutions.parameters(), *self.embed.parameters()]


def ours() -> dict[str, Callable[[], multitask.Weighting]]:
    """One builder per weighting of this package that looks at losses only."""
    return {
        "banditmtl": lambda: multitask.BanditMTL(TASKS, min_effective_tasks=7),
        "uniform": lambda: multitask.Uniform(TASKS),
        "uncertainty": lambda: multitask.UncertaintyWeighting(TASKS),
        "dwa": lambda: multitask.DWA(TASKS, steps_per_epoch=100),
        "tchebycheff": lambda: multitask.Tchebycheff(TASKS),
        "smooth tchebycheff": lambda: multitask.SmoothTchebycheff(TASKS),
        "famo": lambda: multitask.FAMO(TASKS),
        "group dro": lambda: multitask.GroupDRO(TASKS),
    }


def theirs() -> dict[str, Callable[[], Any]]:
    """torchjd's scalarizers with a counterpart here, or none when it is not installed."""
    try:
        from torchjd import scalarization
    except ImportError:
        return {}
    m = len(TASKS)
    return {
        "torchjd mean": scalarization.Mean,
        "torchjd uw": lambda: scalarization.UW(m),
        "torchjd dwa": scalarization.DWA,
        "torchjd stch": lambda: scalarization.STCH(0.1),
        "torchjd famo": lambda: scalarization.FAMO(m),
    }


def stack_and_sum(losses: Losses) -> Tensor:
    """The unweighted loss."""
    return torch.stack(list(losses.values())).sum()


def contenders() -> dict[str, tuple[Scalarize, After]]:
    """A scalarizer of the dict of losses and what follows the optimiser's step, per method that can be built here."""
    built = {name: build() for name, build in ours().items()}
    found: dict[str, tuple[Scalarize, After]] = {name: (w, w.step) for name, w in built.items()}
    for name, build_theirs in theirs().items():
        scalarizer = build_theirs()
        after = scalarizer.step if name.endswith("dwa") else (lambda: None)
        if name.endswith("famo"):
            # Its update wants the losses after the step; here those of the call stand in, as the cost is the same.
            after = partial(_update_famo, scalarizer)
        found[name] = (partial(_on_the_stack, scalarizer), after)
    return found


def _on_the_stack(scalarizer: Any, losses: Losses) -> Tensor:
    scalar: Tensor = scalarizer(torch.stack(list(losses.values())))
    return scalar


def _update_famo(scalarizer: Any) -> None:
    scalarizer.update(scalarizer._prev_losses)


def microseconds(scalarize: Callable[[Any], Tensor], after: After, batches: list[Any], calls: int) -> dict[str, float]:
    """Median and smallest time of a call and step."""
    wall, cpu = [], []
    for k in range(calls):
        losses = batches[k % len(batches)]
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        scalarize(losses)
        after()
        cpu.append(1e6 * (time.thread_time() - begin_cpu))
        wall.append(1e6 * (time.perf_counter() - begin))
    return {"median": statistics.median(wall), "cpu_median": statistics.median(cpu), "least": min(wall)}


def call_table(calls: int) -> dict[str, dict[str, float]]:
    """Microseconds per call and step, for the methods that look at losses only."""
    batches = [{t: torch.rand((), requires_grad=True) * 1.0 for t in TASKS} for _ in range(64)]
    rows = {
        "sum of the dict (floor)": microseconds(lambda x: sum(x.values()), lambda: None, batches, calls),
        "stack and sum (floor)": microseconds(stack_and_sum, lambda: None, batches, calls),
    }
    for name, (scalarize, after) in contenders().items():
        microseconds(scalarize, after, batches, min(calls, 50))
        rows[name] = microseconds(scalarize, after, batches, calls)
    balance = multitask.BanditMTL(TASKS, min_effective_tasks=7)
    stacked = [torch.rand(len(TASKS), requires_grad=True) * 1.0 for _ in range(64)]
    rows["banditmtl, losses in one tensor"] = microseconds(balance, balance.step, stacked, calls)
    return rows


def paired_table(pairs: int, batch: int, length: int, seed: int) -> dict[str, dict[str, float]]:
    """Seconds of a TextCNN step with the plain sum, and what each method adds to it, in percent."""
    torch.manual_seed(seed)
    model = TextCNN()
    draw = random.Random(seed)
    plain: tuple[Scalarize, After] = (stack_and_sum, lambda: None)
    rows = {}
    for name, method in contenders().items():
        taken: dict[str, list[tuple[float, float]]] = {"sum": [], "method": []}
        for k in range((pairs if name == "banditmtl" else max(pairs // 8, 2)) + 1):
            tokens, labels = batches_of(batch, length)
            for key in draw.sample(["sum", "method"], 2):
                seconds = train_step(model, plain if key == "sum" else method, tokens, labels)
                if k:  # the first pair warms up
                    taken[key].append(seconds)
        rows[name] = compared(taken)
        print(f"  {name:<26}{rows[name]['sum_seconds']:>9.4f} s", end="")
        print(
            "".join(f"{rows[name][k]:>+9.2f} % {k.split('_')[0]}" for k in ("cpu_percent", "wall_percent")), flush=True
        )
    return rows


def batches_of(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens, (tasks, batch, length), and labels."""
    return torch.randint(0, 5000, (len(TASKS), batch, length)), torch.randint(0, 2, (len(TASKS), batch))


def compared(taken: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Medians of the plain step and of the paired differences, with the standard error of their mean."""
    row = {"sum_seconds": statistics.median(wall for wall, _ in taken["sum"]), "pairs": float(len(taken["sum"]))}
    for which, name in enumerate(("wall", "cpu")):
        base = statistics.median(x[which] for x in taken["sum"])
        extra = [m[which] - s[which] for s, m in zip(taken["sum"], taken["method"], strict=True)]
        error = statistics.stdev(extra) / len(extra) ** 0.5 if len(extra) > 1 else float("nan")
        row[f"{name}_percent"] = 100 * statistics.median(extra) / base
        row[f"{name}_standard_error"] = 100 * error / base
    return row


def train_step(model: TextCNN, way: tuple[Scalarize, After], tokens: Tensor, labels: Tensor) -> tuple[float, float]:
    """Seconds, of the clock and of the CPU, of forward, weighting, backward and step; no parameter moves."""
    scalarize, after = way
    model.zero_grad()
    begin, begin_cpu = time.perf_counter(), time.thread_time()
    scalarize(model.losses(tokens, labels)).backward()  # type: ignore[no-untyped-call]
    after()
    return time.perf_counter() - begin, time.thread_time() - begin_cpu


def memory_table() -> dict[str, dict[str, float]]:
    """Bytes that BanditMTL holds after three steps, and the most during them, by number of tasks."""
    rows = {}
    for m in (14, 140, 1400, 14000):
        losses = torch.rand(m)
        tracemalloc.start()
        balance = multitask.BanditMTL(m, min_effective_tasks=m / 2)
        for _ in range(3):
            balance(losses)
            balance.step()
        held, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        rows[str(m)] = {"held_bytes_per_task": held / m, "most_bytes_per_task": most / m}
        print(f"  {m:>6} tasks{held / m:>10.0f} bytes a task held{most / m:>10.0f} at most")
    return rows


def gradient_table(rounds: int, batch: int, length: int, seed: int) -> dict[str, dict[str, float]]:
    """Seconds per step and epoch of the methods that look at gradients, all in turn, and of the plain sum."""
    torch.manual_seed(seed)
    model = TextCNN()
    steps = {"sum of the losses": lambda x, y: stack_and_sum(model.losses(x, y)).backward()}
    steps |= gradient_methods.contenders(model, TASKS)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for k in range(rounds + 1):
        tokens, labels = batches_of(batch, length)
        for name, step in steps.items():
            model.zero_grad()
            begin, begin_cpu = time.perf_counter(), time.thread_time()
            step(tokens, labels)
            if k:
                taken[name].append((time.perf_counter() - begin, time.thread_time() - begin_cpu))
    rows = {}
    for name, seconds in taken.items():
        wall, cpu = (statistics.median(x[i] for x in seconds) for i in (0, 1))
        epoch = -(-LARGEST // batch) * cpu
        rows[name] = {"wall_seconds": wall, "cpu_seconds": cpu, "epoch_cpu_seconds": epoch}
        rows[name]["times_the_sum"] = cpu / rows["sum of the losses"]["cpu_seconds"]
        print(
            f"  {name:<30}{cpu:>9.4f} s CPU{wall:>9.4f} s{epoch:>9.1f} s an epoch{rows[name]['times_the_sum']:>8.1f} times"
        )
    return rows


def provenance(seed: int) -> dict[str, Any]:
    """Commit, versions, machine and command."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "uncommitted_changes": bool(dirty),
        "seed": seed,
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in ("torch", "torchjd", "LibMTL")},
        "threads": torch.get_num_threads(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load_average": os.getloadavg()[0],
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Run both measurements, print them, write the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=3000, help="timed calls per method in the first table")
    parser.add_argument("--pairs", type=int, default=30, help="timed pairs of steps of BanditMTL; others an eighth")
    parser.add_argument("--batch", type=int, default=18, help="rows per task and step; 14 x 18 is near 256")
    parser.add_argument("--length", type=int, default=24, help="tokens per row; longer rows hide the weighting more")
    parser.add_argument("--rounds", type=int, default=2, help="timed steps per method in the last table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "weighting_overhead.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    results = provenance(given.seed)
    print("microseconds per call and step: median, of CPU time, least")
    calls = call_table(given.calls)
    for name, row in calls.items():
        print(f"  {name:<34}{row['median']:>10.1f}{row['cpu_median']:>10.1f}{row['least']:>10.1f}")
    results["call_and_step_microseconds"] = calls
    print("a TextCNN step with the plain sum, and what each method adds (median of paired differences)")
    results["textcnn_step"] = paired_table(given.pairs, given.batch, given.length, given.seed)
    print("memory of BanditMTL")
    results["memory"] = memory_table()
    print("steps of the methods on gradients")
    results["gradient_methods"] = gradient_table(given.rounds, given.batch, given.length, given.seed)
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
