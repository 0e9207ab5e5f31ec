"""Does BanditMTL's adversary cycle, and what calms it: a smaller step, averaged losses, optimistic ascent, averaged weights.

    python experiments/banditmtl/cycling.py DATA            # 4 topic tasks, whole and with two cut to 5 %, 5 seeds
    python experiments/banditmtl/cycling.py DATA --table    # the tables of CYCLING.md from results/cycling.jsonl

A small averaging network (trained embeddings, one head a task), ten epochs, every variant from the same start and
batches. A run that is in results/ already is not done again. One run takes seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import run as common
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.classification.data import Split, TaskData
from counterpoise.classification.vectors import tokenize
from counterpoise.multitask import BanditMTL, Uniform, Weighting
from counterpoise.multitask.losses import WindowMeans

STORE = common.HERE / "results" / "cycling.jsonl"
PAGE = common.HERE / "CYCLING.md"
SETTINGS: dict[str, Any] = {
    "batch": 64, "epochs": 10, "lr": 5e-3, "width": 32, "words": 10_000, "tokens": 100, "dropout": 0.3, "rho": 1.2,
}  # fmt: skip
KINDS = ("full", "cut")


class AverageOfLosses(BanditMTL):
    """Ascends on a running average of the losses, whose weight halves in `half` windows."""

    def __init__(self, tasks: Sequence[str], half: float, **settings: Any) -> None:
        super().__init__(tasks, **settings)
        self.fresh, self.mean = 1.0 - 0.5 ** (1.0 / half), None

    def update(self, means: WindowMeans) -> None:
        """The mirror step on the averages."""
        before = means.means if self.mean is None else self.mean
        self.mean = [a + self.fresh * (x - a) for a, x in zip(before, means.means, strict=True)]
        super().update(WindowMeans(self.mean, means.counts))


class Optimistic(BanditMTL):
    """Ascends on 2 l_t - l_(t-1), the guess that the losses go on as they went (Rakhlin, Sridharan 2013)."""

    before: list[float] | None = None

    def update(self, means: WindowMeans) -> None:
        """The mirror step on the extrapolated losses."""
        ahead = [2.0 * x - b for x, b in zip(means.means, self.before or means.means, strict=True)]
        self.before = means.means
        super().update(WindowMeans(ahead, means.counts))


VARIANTS: dict[str, Callable[[list[str]], Weighting]] = {
    "uniform": lambda tasks: Uniform(tasks),
    "eta 0.5": lambda tasks: BanditMTL(tasks, rho=SETTINGS["rho"], eta=0.5),
    "eta 0.1": lambda tasks: BanditMTL(tasks, rho=SETTINGS["rho"], eta=0.1),
    "eta 0.02": lambda tasks: BanditMTL(tasks, rho=SETTINGS["rho"], eta=0.02),
    "averaged losses, half-life 32": lambda tasks: AverageOfLosses(tasks, 32.0, rho=SETTINGS["rho"], eta=0.5),
    "optimistic": lambda tasks: Optimistic(tasks, rho=SETTINGS["rho"], eta=0.5),
}


class Averaging(nn.Module):
    """The mean of trained word vectors, one hidden layer, one head a task."""

    def __init__(self, words: int, classes: Sequence[int]) -> None:
        super().__init__()
        width = SETTINGS["width"]
        self.words = nn.EmbeddingBag(words, width, mode="mean")
        self.hidden = nn.Linear(width, width)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes)

    def forward(self, bags: list[list[Tensor]]) -> list[Tensor]:
        """Logits of each task's texts, from word indices by task and text."""
        flat = [text for texts in bags for text in texts]
        starts = torch.tensor([0, *[len(text) for text in flat[:-1]]]).cumsum(0)
        pooled = F.dropout(self.words(torch.cat(flat), starts), SETTINGS["dropout"], self.training)
        parts = torch.relu(self.hidden(pooled)).split([len(texts) for texts in bags])
        return [head(x) for head, x in zip(self.heads, parts, strict=True)]


def encode(
    tasks: Sequence[TaskData], words: Sequence[Mapping[str, list[list[str]]]], settings: Mapping[str, Any], first: int
) -> tuple[list[dict[str, tuple[list[Tensor], Tensor]]], int]:
    """Word indices and classes of every part, and the size of the vocabulary (of the training texts).

    `words` holds each task's texts by part. Indices begin at `first`; the one before stands for every other word.
    """
    counts = Counter(word for parts in words for text in parts["train"] for word in text)
    kept = sorted(counts, key=lambda w: (-counts[w], w))[: settings["words"] - first]
    index = {word: i for i, word in enumerate(kept, start=first)}
    found = []
    for t, parts in zip(tasks, words, strict=True):
        classes = {label: i for i, label in enumerate(t.labels)}
        encoded = {}
        for part, texts in parts.items():
            known = [[index.get(w, first - 1) for w in x[: settings["tokens"]]] or [first - 1] for x in texts]
            labels = torch.tensor([classes[y] for y in t.split(part).labels])
            encoded[part] = ([torch.tensor(x) for x in known], labels)
        found.append(encoded)
    return found, len(index) + first


def cut(tasks: Sequence[TaskData], seed: int) -> list[TaskData]:
    """Two tasks, in turn by seed, keep 5 % of their training data."""
    chosen = {seed % len(tasks), (seed + 1 + seed // len(tasks)) % len(tasks)}
    out = []
    for i, t in enumerate(tasks):
        keep = torch.randperm(len(t.train), generator=torch.Generator().manual_seed(seed)).tolist()
        keep = sorted(keep[: round(common.KEPT * len(keep))]) if i in chosen else sorted(keep)
        train = Split(tuple(t.train.texts[k] for k in keep), tuple(t.train.labels[k] for k in keep))
        out.append(TaskData(t.name, t.labels, train, t.validation, t.test))
    return out


def one(parts: list[Any], words: int, names: list[str], classes: list[int], variant: str, seed: int) -> dict[str, Any]:
    """One training; the swing of the weights is over the last half of the steps."""
    torch.manual_seed(seed)
    model = Averaging(words, classes)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    weighting, optimizer = VARIANTS[variant](names), torch.optim.Adam(model.parameters(), lr=SETTINGS["lr"])
    steps = max(len(p["train"][1]) for p in parts) // SETTINGS["batch"]
    path, effective, training = [], [], []
    for epoch in range(SETTINGS["epochs"]):
        orders = [shuffled(len(p["train"][1]), steps * SETTINGS["batch"]) for p in parts]
        sums = torch.zeros(len(parts), dtype=torch.float64)
        for step in range(steps):
            rows = [o[step * SETTINGS["batch"] : (step + 1) * SETTINGS["batch"]] for o in orders]
            logits = model([[p["train"][0][k] for k in r] for p, r in zip(parts, rows, strict=True)])
            labels = [p["train"][1][r] for p, r in zip(parts, rows, strict=True)]
            losses = [F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True)]
            optimizer.zero_grad()
            weighting(losses).backward()
            optimizer.step()
            weighting.step()
            if epoch >= SETTINGS["epochs"] // 2:
                averaged.update_parameters(model)
            path.append(weighting.weights())
            sums += torch.stack([x.detach() for x in losses]).double()
        training.append((sums / steps).tolist())
        effective.append(math.exp(-sum(p * math.log(p) for p in path[-1])))
    late = torch.tensor(path[len(path) // 2 :], dtype=torch.float64)
    return {
        "variant": variant,
        "seed": seed,
        "effective_tasks": common.rounded(effective),
        "movement": round(float((late[1:] - late[:-1]).abs().sum(1).mean() / 2), 6),
        "swing": round(float(late.std(0).mean()), 6),
        "mean_weights": common.rounded(late.mean(0)),
        "train_loss": common.rounded(training[-1]),
        **score(model, parts, "test"),
        **score(averaged.module, parts, "averaged"),
    }


def shuffled(rows: int, length: int) -> Tensor:
    """At least `length` indices: every row once, in random order, before any comes again."""
    return torch.cat([torch.randperm(rows) for _ in range(1 + length // rows)])


@torch.no_grad()
def score(model: nn.Module, parts: list[Any], prefix: str) -> dict[str, list[float]]:
    """Accuracy and loss of each task on its test data."""
    model = copy.deepcopy(model).eval()
    logits = model([p["test"][0] for p in parts])
    right = [(x.argmax(1) == p["test"][1]).float().mean() for x, p in zip(logits, parts, strict=True)]
    losses = [F.cross_entropy(x, p["test"][1]) for x, p in zip(logits, parts, strict=True)]
    return {f"{prefix}_accuracy": common.rounded(right), f"{prefix}_loss": common.rounded(losses)}


def interval(differences: Sequence[float]) -> str:
    """Mean and 95 % interval (Student's t), bold where it leaves out 0."""
    n, mean = len(differences), statistics.fmean(differences)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"**{text}**" if abs(mean) > half else text


def table(runs: list[dict[str, Any]], kind: str) -> str:
    """One row a variant, paired by seed with uniform weighting."""
    runs = [r for r in runs if r["kind"] == kind]
    by = {(r["variant"], r["seed"]): r for r in runs}
    seeds = [s for s in sorted({r["seed"] for r in runs}) if all((v, s) in by for v in VARIANTS)]
    head = ["variant", "effective tasks by epoch, seed 0", "swing of a weight", "movement a step",
            "training-loss variance ×1000", "mean accuracy − uniform", "worst task − uniform",
            "worst, averaged model − uniform's"]  # fmt: skip
    lines = [f"{len(seeds)} seeds.", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for variant in VARIANTS:
        mine = [by[variant, s] for s in seeds]
        base = [by["uniform", s] for s in seeds]
        variance = statistics.fmean(1000 * statistics.pvariance(r["train_loss"]) for r in mine)

        def points(name: str, reduce: Callable[[list[float]], float], mine=mine, base=base) -> str:
            pairs = zip(mine, base, strict=True)
            return interval([100 * (reduce(a[name]) - reduce(b[name])) for a, b in pairs])

        cells = [variant, ", ".join(f"{x:.1f}" for x in mine[0]["effective_tasks"]),
                 f"{statistics.fmean(r['swing'] for r in mine):.3f}", f"{statistics.fmean(r['movement'] for r in mine):.3f}",
                 f"{variance:.2f}"]  # fmt: skip
        if variant != "uniform":
            cells += [
                points("test_accuracy", statistics.fmean),
                points("test_accuracy", min),
                points("averaged_accuracy", min),
            ]
        else:
            first = [100 * statistics.fmean(r["test_accuracy"]) for r in mine]
            worst = [100 * min(r["test_accuracy"]) for r in mine]
            smooth = [100 * min(r["averaged_accuracy"]) for r in mine]
            cells += [f"{statistics.fmean(x):.2f}" for x in (first, worst, smooth)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = common.read_lines(STORE)
    if options.table:
        page = PAGE.read_text(encoding="utf-8")
        for kind in KINDS:
            before, rest = page.split(f"<!-- {kind} -->\n")
            page = before + f"<!-- {kind} -->\n{table(runs, kind)}\n<!-- end -->" + rest.split("<!-- end -->", 1)[1]
        PAGE.write_text(page, encoding="utf-8")
        return
    done = {(r["kind"], r["variant"], r["seed"]) for r in runs}
    whole = common.read(options.data, "topic")
    for seed in range(options.seeds):
        for kind in KINDS:
            missing = [v for v in VARIANTS if (kind, v, seed) not in done]
            if not missing:
                continue
            tasks = cut(whole, seed) if kind == "cut" else whole
            texts = [{part: [tokenize(x) for x in t.split(part).texts] for part in ("train", "test")} for t in tasks]
            parts, words = encode(tasks, texts, SETTINGS, first=1)
            for variant in missing:
                found = one(parts, words, [t.name for t in tasks], [len(t.labels) for t in tasks], variant, seed)
                told = common.provenance("python experiments/banditmtl/cycling.py DATA", SETTINGS)
                with STORE.open("a", encoding="utf-8") as file:
                    print(json.dumps({"kind": kind, **found, "provenance": told}), file=file)
                print(kind, seed, variant, found["effective_tasks"], found["test_accuracy"], flush=True)


if __name__ == "__main__":
    main()
