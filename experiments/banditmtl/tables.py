"""Rewrite the tables and figures of README.md from results/.

python experiments/banditmtl/tables.py              # the tables
python experiments/banditmtl/tables.py --figures    # and the figures, which need a Chromium
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run import read_lines

from counterpoise.report.palette import SERIES, light
from counterpoise.statistics.bootstrap import over_runs

HERE = Path(__file__).resolve().parent
Run = dict[str, Any]
Number = Callable[[Run], float]

NAMES = {
    "single": "single task",
    "uniform": "uniform",
    "uncertainty": "uncertainty",
    "gradnorm": "GradNorm",
    "mgda": "MGDA",
    "adversarial": "adversarial",
    "tchebycheff-adversarial": "Tchebycheff adversarial",
    "bandit": "**BanditMTL** (rho 1.2)",
    "bandit-half": "**BanditMTL** (m/2 effective)",
    "famo": "FAMO",
    "upgrad": "UPGrad",
}
LITERATURE = {
    "sentiment": {
        "single": 87.65, "uniform": 89.57, "uncertainty": 89.74, "gradnorm": 89.40, "mgda": 89.20,
        "tchebycheff-adversarial": 88.89, "bandit": 89.62,
    },
    "topic": {
        "single": 90.33, "uniform": 91.35, "uncertainty": 91.35, "gradnorm": 90.98, "mgda": 91.62,
        "tchebycheff-adversarial": 91.24, "bandit": 91.45,
    },
}  # fmt: skip
"""Means of the per-task columns that GetMTL (ACL 2023) prints; its printed averages do not match them."""
BUDGETS = (2, 4, 8)


def main() -> None:
    """Fill in what stands between <!-- NAME --> and <!-- end -->."""
    made: dict[str, str] = {}
    for data in LITERATURE:
        for kind in ("main", "imbalanced", "longer"):
            if runs := load(data, kind):
                made[f"{data}-{kind}"] = comparison(
                    runs, LITERATURE[data] if kind == "main" else None, cut=kind == "imbalanced"
                )
        if runs := load(data, "imbalanced"):
            made[f"{data}-cut"] = cut_tasks(runs)
        if runs := load(data, "main"):
            made[f"{data}-time"] = equal_time(runs, data)
        if runs := load(data, "sensitivity"):
            made[f"{data}-sensitivity"] = sensitivity(runs)
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    for name, table in made.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    page.write_text(text, encoding="utf-8")
    if "--figures" in sys.argv:
        draw()


def load(data: str, kind: str) -> list[Run]:
    """The runs kept of one experiment."""
    return read_lines(HERE / "results" / f"{data}-{kind}.jsonl")


def best(run: Run, epochs: float | None = None) -> dict[str, Any]:
    """The epoch of best mean validation accuracy, the first of equals, among the first `epochs`."""
    open_to = run["epochs"][: None if epochs is None else max(1, int(epochs))]
    return max(open_to, key=lambda e: sum(e["validation_accuracy"]))


def accuracy(run: Run) -> float:
    """Mean test accuracy over the tasks, in percent."""
    return 100 * statistics.mean(best(run)["test_accuracy"])


def worst(run: Run) -> float:
    """Test accuracy of the worst task, in percent."""
    return 100 * min(best(run)["test_accuracy"])


def loss_variance(run: Run) -> float:
    """Variance of the test loss over the tasks (1/m), times 1000."""
    return 1000 * statistics.pvariance(best(run)["test_loss"])


def train_variance(run: Run) -> float:
    """Variance over the tasks (1/m) of the training loss in the chosen epoch, times 1000."""
    return 1000 * statistics.pvariance(best(run)["train_loss"])


def accuracy_variance(run: Run) -> float:
    """Variance of the test accuracy over the tasks (1/m), in squared percentage points."""
    return 1e4 * statistics.pvariance(best(run)["test_accuracy"])


def cut_accuracy(run: Run) -> float:
    """Mean test accuracy of the two tasks whose training data was cut, in percent."""
    found = best(run)["test_accuracy"]
    small = sorted(range(len(found)), key=lambda i: run["examples"][i])[:2]
    return 100 * statistics.mean(found[i] for i in small)


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard error over seeds."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "–"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def against(runs: list[Run], base: list[Run], number: Number, digits: int = 2) -> str:
    """The mean difference from `base`, paired by seed, with its 95 % interval (Student's t); bold when 0 is outside."""
    of = {r["seed"]: number(r) for r in base}
    gaps = [number(r) - of[r["seed"]] for r in runs if r["seed"] in of]
    if (found := over_runs(gaps)) is None:
        return "–"
    mean, low, high, _ = found
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]".replace("-", "−")
    return f"**{text}**" if low > 0 or high < 0 else text


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of each method, in the order of `NAMES`."""
    return {m: found for m in NAMES if (found := [r for r in runs if r["method"] == m])}


def comparison(runs: list[Run], literature: dict[str, float] | None, *, cut: bool) -> str:
    """One row a method: accuracy, worst task, variances, and the differences from uniform weighting."""
    groups = by_method(runs)
    head = ["method", "seeds", "accuracy", "worst task"]
    head += ["two cut tasks"] if cut else []
    head += ["variance of test loss ×1000", "of training loss ×1000", "of accuracy, points²", "epochs"]
    head += ["accuracy − uniform", "worst − uniform"] + (["cut tasks − uniform"] if cut else [])
    head += ["test-loss variance − uniform"]
    head += ["follow-up's accuracy"] if literature is not None else []
    body = []
    for method, found in groups.items():
        row = [NAMES[method], str(len(found)), *(spread([f(r) for r in found]) for f in (accuracy, worst))]
        row += [spread([cut_accuracy(r) for r in found])] if cut else []
        row += [spread([f(r) for r in found]) for f in (loss_variance, train_variance, accuracy_variance)]
        row += ["–" if method == "single" else f"{statistics.mean(len(r['epochs']) for r in found):.1f}"]
        base = groups.get("uniform", [])
        same = method == "uniform"
        compared = (accuracy, worst, *([cut_accuracy] if cut else []), loss_variance)
        row += ["" if same else against(found, base, f) for f in compared]
        if literature is not None:
            row += [f"{literature[method]:.2f}" if method in literature else ""]
        body.append(row)
    return table(head, body)


def cut_tasks(runs: list[Run]) -> str:
    """The cut tasks against the others over training: losses of uniform weighting, and BanditMTL's weight on them."""
    groups = by_method(runs)
    body = []
    for epoch in range(max(len(r["epochs"]) for r in groups["uniform"])):
        row = [str(epoch + 1)]
        for name in ("train_loss", "test_loss"):
            for first, last in ((0, 2), (2, None)):
                row.append(spread([statistics.mean(v[first:last]) for v in by_size(groups["uniform"], epoch, name)]))
        row.append(str(len(by_size(groups["uniform"], epoch, "test_loss"))))
        shares = [100 * sum(v[:2]) / sum(v) for v in by_size(groups.get("bandit", []), epoch, "weights")]
        body.append([*row, spread(shares, 1), str(len(shares))])
    head = ["epoch", "training loss, cut tasks", "the others", "test loss, cut tasks", "the others"]
    return table([*head, "uniform's runs", "BanditMTL's weight on the cut tasks, %", "BanditMTL's runs"], body)


def by_size(runs: list[Run], epoch: int, name: str) -> list[list[float]]:
    """A number of each task, the smallest tasks first, of the runs that reached an epoch."""
    found = [(r["examples"], r["epochs"][epoch][name]) for r in runs if epoch < len(r["epochs"])]
    return [[values[i] for i in sorted(range(len(sizes)), key=sizes.__getitem__)] for sizes, values in found]


def equal_time(runs: list[Run], data: str) -> str:
    """Accuracy when every method has the time of so many epochs of uniform weighting."""
    path = HERE / "results" / "cost.json"
    if not path.exists():
        return "not measured"
    cost = json.loads(path.read_text(encoding="utf-8"))["steps"][data]
    head = ["method", "a step, times uniform's"]
    for b in BUDGETS:
        head += [f"epochs in {b}", "accuracy", "test-loss variance ×1000"]
    body = []
    for method, found in by_method(runs).items():
        times = cost.get("bandit" if method == "bandit-half" else method, {}).get("times_uniform")
        if times is None:
            continue
        row = [NAMES[method], f"{times:.2f}"]
        for b in BUDGETS:
            reached = int(b / times)
            if reached < 1:
                row += ["0", "–", "–"]
                continue
            at = [best(r, reached) for r in found]
            row += [str(reached), spread([100 * statistics.mean(e["test_accuracy"]) for e in at])]
            row += [spread([1000 * statistics.pvariance(e["test_loss"]) for e in at])]
        body.append(row)
    return table(head, body)


def sensitivity(runs: list[Run]) -> str:
    """One row a pair of effective tasks and eta, as differences from uniform weighting."""
    base = [r for r in runs if r["method"] == "uniform"]
    head = ["effective tasks, at least", "eta", "seeds", "accuracy", "worst task", "accuracy − uniform"]
    head += ["test-loss variance − uniform, ×1000", "training-loss variance − uniform, ×1000"]
    body = [
        ["all (uniform)", "", str(len(base)), *(spread([f(r) for r in base]) for f in (accuracy, worst)), "", "", ""]
    ]
    for pair in sorted({(r["min_effective_tasks"], r["eta"]) for r in runs if r["method"] == "bandit"}):
        found = [r for r in runs if (r.get("min_effective_tasks"), r.get("eta")) == pair]
        row = [
            f"{pair[0]:g}",
            f"{pair[1]:g}",
            str(len(found)),
            *(spread([f(r) for r in found]) for f in (accuracy, worst)),
        ]
        body.append([*row, *(against(found, base, f) for f in (accuracy, loss_variance, train_variance))])
    return table(head, body)


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def curves(data: str, part: str) -> Any:
    """The task variance of a loss over training, a line a method, mean over seeds with its standard error."""
    import plotly.graph_objects as go

    figure = go.Figure()
    shown = ("uniform", "bandit", "bandit-half", "mgda", "tchebycheff-adversarial", "famo")
    for colour, method in zip(SERIES, shown, strict=True):
        runs = [r for r in load(data, "main") if r["method"] == method]
        if not runs:
            continue
        length = min(len(r["epochs"]) for r in runs)
        values = [[1000 * statistics.pvariance(r["epochs"][e][part]) for r in runs] for e in range(length)]
        errors = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in values]
        figure.add_scatter(
            x=list(range(1, length + 1)),
            y=[statistics.mean(v) for v in values],
            error_y={"type": "data", "array": errors, "thickness": 1},
            name=NAMES[method].replace("**", ""),
            line={"color": light(colour)},
        )
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 14},
        xaxis={"title": "epoch", "dtick": 1},
        yaxis={"title": f"task variance of the {part.split('_')[0]} loss ×1000", "rangemode": "tozero"},
        title=f"{data}: task variance over training",
        margin={"t": 50, "r": 20},
    )
    return figure


def draw() -> None:
    """Write the figures as svg."""
    from plotly.offline import get_plotlyjs

    sys.path.insert(0, str(HERE.parent.parent / "tests"))
    from report.browser import find, running

    binary = find()
    if binary is None:
        raise SystemExit("expected a Chromium on the PATH or named by CHROMIUM, found none")
    figures = {f"{d}-{p}": curves(d, f"{p}_loss") for d in LITERATURE if load(d, "main") for p in ("train", "test")}
    (HERE / "figures").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place, running(binary) as browser:
        page = Path(place) / "page.html"
        page.write_text(f"<!doctype html><meta charset=utf-8><script>{get_plotlyjs()}</script>", encoding="utf-8")
        browser.open(page)
        for name, figure in figures.items():
            url = browser.value(f"Plotly.toImage({figure.to_json()}, {{format: 'svg', width: 860, height: 420}})")
            drawing = urllib.parse.unquote(url.split(",", 1)[1])
            (HERE / "figures" / f"{name}.svg").write_text(drawing + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
