"""What a task weighting costs: microseconds per call and step, and its share of a TextCNN step.

    python benchmarks/weighting_overhead.py                      # the table, and benchmarks/weighting_overhead.json
    python benchmarks/weighting_overhead.py --calls 200 --pairs 3 --out /tmp/quick.json

Two measurements with 14 tasks on one CPU thread. The first times the call on fresh losses plus `step()`, without the
backward pass, and beside it what any loop pays: summing the same losses. The second runs a TextCNN training step with
each weighting and with the plain sum, alternating on the same batches in one run, and reports the median of the paired
differences, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise import multitask

TASKS = [f"task{i}" for i in range(14)]
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

    def losses(self, tokens_MBT: Tensor, labels_MB: Tensor) -> Losses:
        """The mean cross-entropy of each task on its own rows."""
        m, b, t = tokens_MBT.shape
        x = self.embed(tokens_MBT.reshape(m * b, t)).transpose(1, 2)
        features = torch.cat([F.relu(c(x)).amax(-1) for c in self.convolutions], dim=-1).reshape(m, b, -1)
        return {
            task: F.cross_entropy(head(features[i]), labels_MB[i])
            for i, (task, head) in enumerate(zip(TASKS, self.heads, strict=True))
        }

    def shared(self) -> list[nn.Parameter]:
        """The convolutions and the embedding."""
        return [*self.convolutions.parameters(), *self.embed.parameters()]


def ours(shared: list[nn.Parameter]) -> dict[str, Callable[[], multitask.Weighting]]:
    """One builder per weighting of this package."""
    last = shared[:6]  # the convolutions: GradNorm takes the last shared layer
    return {
        "uniform": lambda: multitask.Uniform(TASKS),
        "uncertainty": lambda: multitask.UncertaintyWeighting(TASKS),
        "dwa": lambda: multitask.DWA(TASKS, steps_per_epoch=100),
        "tchebycheff": lambda: multitask.Tchebycheff(TASKS),
        "smooth tchebycheff": lambda: multitask.SmoothTchebycheff(TASKS),
        "famo": lambda: multitask.FAMO(TASKS),
        "group dro": lambda: multitask.GroupDRO(TASKS),
        "banditmtl": lambda: multitask.BanditMTL(TASKS, min_effective_tasks=7),
        "gradnorm": lambda: multitask.GradNorm(TASKS, shared=last),
        "mgda": lambda: multitask.MGDA(TASKS, shared=shared),
        "pcgrad": lambda: multitask.PCGrad(TASKS, shared=shared),
        "cagrad": lambda: multitask.CAGrad(TASKS, shared=shared),
        "upgrad": lambda: multitask.UPGrad(TASKS, shared=shared),
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


def contenders(shared: list[nn.Parameter]) -> dict[str, tuple[Scalarize, After]]:
    """A scalarizer of the dict of losses and what follows the optimiser's step, per method that can be built here."""
    found: dict[str, tuple[Scalarize, After]] = {}
    for name, build in ours(shared).items():
        try:
            weighting = build()
        except ImportError as error:
            print(f"left out {name}: {error}", file=sys.stderr)
            continue
        found[name] = (weighting, weighting.step)
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
    times = []
    for k in range(calls):
        losses = batches[k % len(batches)]
        begin = time.perf_counter()
        scalarize(losses)
        after()
        times.append(1e6 * (time.perf_counter() - begin))
    return {"median": statistics.median(times), "least": min(times)}


def call_table(calls: int) -> dict[str, dict[str, float]]:
    """Microseconds per call and step, for the methods that look at losses only."""
    batches = [{t: torch.rand((), requires_grad=True) * 1.0 for t in TASKS} for _ in range(64)]
    theta = nn.Parameter(torch.ones(3))
    on_gradients = {"gradnorm", "mgda", "pcgrad", "cagrad", "upgrad"}
    rows = {
        "sum of the dict (floor)": microseconds(lambda x: sum(x.values()), lambda: None, batches, calls),
        "stack and sum (floor)": microseconds(stack_and_sum, lambda: None, batches, calls),
    }
    for name, (scalarize, after) in contenders([theta]).items():
        if name not in on_gradients:
            microseconds(scalarize, after, batches, min(calls, 50))
            rows[name] = microseconds(scalarize, after, batches, calls)
    balance = multitask.BanditMTL(TASKS, min_effective_tasks=7)
    stacked = [torch.rand(len(TASKS), requires_grad=True) * 1.0 for _ in range(64)]
    rows["banditmtl, losses in one tensor"] = microseconds(balance, balance.step, stacked, calls)
    return rows


def paired_table(pairs: int, batch: int, length: int, seed: int) -> dict[str, dict[str, float]]:
    """Seconds of a TextCNN step with the plain sum, and what each method adds to it."""
    torch.manual_seed(seed)
    model = TextCNN()
    draw = random.Random(seed)
    plain: tuple[Scalarize, After] = (stack_and_sum, lambda: None)
    rows = {}
    for name, method in contenders(model.shared()).items():
        steps, extra = [], []
        for k in range(pairs + 1):
            tokens = torch.randint(0, 5000, (len(TASKS), batch, length))
            labels = torch.randint(0, 2, (len(TASKS), batch))
            order = [plain, method] if draw.random() < 0.5 else [method, plain]
            taken = {id(way): train_step(model, way, tokens, labels) for way in order}
            if k:  # the first pair warms up
                steps.append(taken[id(plain)])
                extra.append(taken[id(method)] - taken[id(plain)])
        base, more = statistics.median(steps), statistics.median(extra)
        error = statistics.stdev(extra) / len(extra) ** 0.5 if len(extra) > 1 else float("nan")
        rows[name] = {"sum_seconds": base, "extra_percent": 100 * more / base, "standard_error": 100 * error / base}
        added = f"{rows[name]['extra_percent']:>+10.2f} % ± {rows[name]['standard_error']:.2f}"
        print(f"  {name:<34}{base:>10.4f} s{added}", flush=True)
    return rows


def train_step(model: TextCNN, way: tuple[Scalarize, After], tokens: Tensor, labels: Tensor) -> float:
    """Seconds of forward, weighting, backward and step; the parameters stay, so both ways see the same model."""
    scalarize, after = way
    model.zero_grad()
    begin = time.perf_counter()
    scalarize(model.losses(tokens, labels)).backward()  # type: ignore[no-untyped-call]
    after()
    return time.perf_counter() - begin


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
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in ("torch", "torchjd", "cvxpy")},
        "threads": torch.get_num_threads(),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Run both measurements, print them, write the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=3000, help="timed calls per method in the first table")
    parser.add_argument("--pairs", type=int, default=30, help="timed pairs of steps per method in the second table")
    parser.add_argument("--batch", type=int, default=18, help="rows per task and step; 14 x 18 is near 256")
    parser.add_argument("--length", type=int, default=100, help="tokens per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    print("microseconds per call and step, 14 tasks, one CPU thread: median (least)")
    calls = call_table(given.calls)
    for name, row in calls.items():
        print(f"  {name:<34}{row['median']:>10.1f} ({row['least']:.1f})")
    print("a TextCNN step with the plain sum, and what each method adds (median of paired differences)")
    steps = paired_table(given.pairs, given.batch, given.length, given.seed)
    results = provenance(given.seed) | {"call_and_step_microseconds": calls, "textcnn_step": steps}
    given.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
