"""What `restore` and `measure_tax` give back: typed, read-only, a verdict and a figure in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counterpoise.records import Result, flat
from counterpoise.report import plots
from counterpoise.report.comparisons import read_results
from counterpoise.tables import reading
from counterpoise.tables.grid import as_html
from counterpoise.tables.taxes import ability_taxes

Rows = list[dict[str, Any]]
"""What `pandas.DataFrame` takes; beside `NAME` stand `NAME_low` and `NAME_high`, its 95 % interval."""


@dataclass(frozen=True, eq=False)
class Taxed(Result):
    """What `measure_tax` found: PRE and POST on held-out data.

    Attributes:
        verdict: what fell, in two sentences.
        tax: a row a metric: `name`, `metric`, `pre`, `post`, `tax` and its interval, `tax_p`, `flips ...`.
        warnings: what was said on the way.
    """

    verdict: str = field(init=False)
    tax: Rows = field(init=False, repr=False)
    warnings: list[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        told: dict[str, Any] = {"verdict": self.verdict or "", "warnings": self.warnings or []}
        vars(self).update(told, tax=[*map(flat, self.get("tax") or ())])

    def _repr_html_(self) -> str:
        """Verdict, figure and the taxes; the script of the figure comes from plotly's server, the rest needs none."""
        figure = self._figure().to_html(full_html=False, include_plotlyjs="cdn", default_height=420)
        table = as_html(ability_taxes(self), "The tax, ability by ability")
        return f"<p><strong>{html.escape(self.verdict)}</strong></p>{figure}{table}"

    def _figure(self) -> Any:
        return plots.plot_taxes(self)


@dataclass(frozen=True, eq=False)
class Restored(Taxed):
    """What `restore` found.

    Attributes:
        pick: the name of the point that was written; None where none was worth it, as the verdict says.
        out: where the checkpoint is; None without a pick.
        points: a row a model and part: `name`, `method`, `part`, `mean`, `ratios`, `reward`, `retention`, a column for each
            ability and metric, `on_front`.
        seconds: how long it took.
    """

    pick: str | None = field(init=False)
    out: str | None = field(init=False)
    points: Rows = field(init=False, repr=False)
    seconds: float | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self).update(points=[*map(flat, self.get("points") or ())])

    @staticmethod
    def _read(path: str | Path) -> Mapping[str, Any]:
        return read_results(path)

    def _figure(self) -> Any:
        part = reading.parts(self)[-1:] if self.pick else reading.parts(self)[:1]
        axes = reading.axes(self)
        return plots.plot_front(self, axes[0], part[0]) if axes and part else plots.empty_figure("", "")
