"""The figures of tasks as lines of a terminal."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from counterpoise.classification import Score

SHOWN = {
    "macro-f1": "macro-F1", "micro-f1": "micro-F1", "mcc": "MCC", "pearson": "Pearson", "spearman": "Spearman",
    "pearson-spearman": "P+S / 2",
}  # fmt: skip


def show(scores: dict[str, Score]) -> None:
    """A row a task, then the mean and the worst of what all have."""
    from counterpoise.classification.targets import figure

    wide = max(len("worst"), *(len(name) for name in scores))
    names = list(dict.fromkeys(x for score in scores.values() for x in score.figures))
    heads = [f"{SHOWN.get(x, x):>8}" for x in names]
    print(f"{'task':<{wide}}  {'  '.join(heads)}    loss  examples")
    for name, score in scores.items():
        cells = [f"{shown(x, score.figures.get(x)):>{len(head)}}" for x, head in zip(names, heads, strict=True)]
        print(f"{name:<{wide}}  {'  '.join(cells)}  {score.loss:6.4f}  {score.examples:8d}")
    shared = [x for x in names if all(x in score.figures for score in scores.values())]
    for title, of, of_losses in (("mean", fmean, fmean), ("worst", min, max)) if len(scores) > 1 else ():
        values = {x: of([score.figures[x] for score in scores.values()]) for x in shared}
        # Tasks of several kinds have no figure in common: each counts with the one that it is judged by.
        values = values or {names[0]: of([figure(score.figures, "accuracy") for score in scores.values()])}
        cells = [
            f"{shown(x, values[x]) if x in values else '':>{len(head)}}" for x, head in zip(names, heads, strict=True)
        ]
        loss = f"{of_losses([score.loss for score in scores.values()]):6.4f}" if shared else ""
        print(f"{title:<{wide}}  {'  '.join(cells)}  {loss}".rstrip())


def shown(name: str, value: float | None) -> str:
    """A figure as a table has it; - where a task has none."""
    percent = name in ("accuracy", "exact", "macro-f1", "micro-f1")
    return "-" if value is None else f"{100 * value:.2f} %" if percent else f"{value:.3f}"
