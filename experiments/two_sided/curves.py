"""The curves that are compared: each is a few averages of one pair, found in one way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fisher import fisher
from forms import FORMS

from counterpoise.averaging.partition import Partition, equal, layerwise, thirds
from counterpoise.evaluation.measurement import Scores
from counterpoise.evaluation.workbench import Workbench
from counterpoise.records import digest
from counterpoise.search.both_sides import BothSides
from counterpoise.search.hma import linear_ramp, random_ratios
from counterpoise.search.on_bench import hma_ratios, proxies as proxies_of

MA_SWEEP = tuple(round(0.1 * i, 1) for i in range(1, 10))
PART = 0.4
"""The ratio of the third that part-wise averaging gives back."""
REQUIRED = ("MA", "HMA thirds", "HMA layerwise", "LiNeS", "path", "exact")
FORM_CURVES = tuple(f"{how}, {form}" for form in FORMS for how in ("path", "exact", "Fisher"))
CURVES = (
    *REQUIRED,
    "Fisher",
    *(c for c in FORM_CURVES if "imitation" not in c),
    "path, thirds",
    "exact, thirds",
    "path, no outside block",
    "sum of abilities",
    "worst ability",
    "HMA 6",
    "HMA 9",
    "reversed",
    "random thirds",
    "part-wise",
    "HMA thirds, borrowed",
    "path, borrowed",
)
"""In the order in which they are run; path, exact and Fisher without a form are imitation."""


@dataclass(frozen=True)
class Settings:
    """What decides every curve of a run.

    Attributes:
        means, weights: the points of a curve: mean ratios for HMA, LiNeS and the controls, lambda for the two-sided ones.
        sweep: the ratios of MA, the reference curve.
        size: sequences on each side of a search.
    """

    means: tuple[float, ...]
    weights: tuple[float, ...]
    sweep: tuple[float, ...]
    size: int
    max_passes: int
    calibrated: int


@dataclass(frozen=True)
class Average:
    """One point to be measured, not yet measured."""

    name: str
    curve: str
    cut: Partition
    ratios: tuple[float, ...]
    settings: dict[str, Any]


class Curves:
    """All curves of one pair; every search and measurement is kept in the workbenches' store.

    Args:
        bench: searches on it.
        judge: measures on it; it may compute in another precision.
        lender: the results file of another pair, whose ratios the borrowed curves try here.
    """

    def __init__(
        self, bench: Workbench, judge: Workbench, settings: Settings, lender: dict[str, Any] | None = None
    ) -> None:
        self.bench, self.judge, self.settings, self.lender = bench, judge, settings, lender
        self.deep = layerwise(bench.pair.names)
        self.wide = self.deep.with_rest_block()
        self.costs: dict[str, dict[str, float]] = {}

    def averages(self, curve: str) -> Iterator[Average]:
        """The points of a curve."""
        makers: dict[str, Callable[[], Iterator[Average]]] = {
            "MA": lambda: self._fixed(curve, self.bench.whole, self.settings.sweep, lambda m: [m]),
            "LiNeS": lambda: self._fixed(
                curve, self.deep, self.settings.means, lambda m: linear_ramp(self.deep, m).tolist()
            ),
            "HMA thirds": lambda: self._hma(curve, self._thirds()),
            "HMA 6": lambda: self._hma(curve, equal(self.bench.pair.names, 6)),
            "HMA 9": lambda: self._hma(curve, equal(self.bench.pair.names, 9)),
            "HMA layerwise": lambda: self._hma(curve, self.deep),
            "reversed": lambda: self._fixed(
                curve, self.deep, self.settings.means, lambda m: linear_ramp(self.deep, m, -1).tolist()
            ),
            "random thirds": lambda: self._fixed(
                curve,
                self._thirds(),
                self.settings.means,
                lambda m: random_ratios(self._thirds(), m, seed=round(100 * m)),
            ),
            "part-wise": lambda: self._part_wise(curve),
            "HMA thirds, borrowed": lambda: self._borrowed(curve, self._thirds()),
            "path, borrowed": lambda: self._borrowed(curve, self.wide),
            "path, thirds": lambda: self._two_sided(curve, "path", self.search(cut=self._wide_thirds())),
            "exact, thirds": lambda: self._two_sided(curve, "exact", self.search(cut=self._wide_thirds())),
            "path, no outside block": lambda: self._two_sided(curve, "path", self.search(cut=self.deep)),
            "sum of abilities": lambda: self._two_sided(curve, "path", self.guarded(0.0)),
            "worst ability": lambda: self._two_sided(curve, "path", self.guarded(None)),
        }
        if curve in makers:
            yield from makers[curve]()
            return
        how, _, form = curve.partition(", ")
        yield from self._two_sided(curve, how, self.search(form=form or "imitation"))

    def search(self, *, cut: Partition | None = None, form: str = "imitation", **settings: Any) -> BothSides:
        """A two-sided search of this pair."""
        return FORMS[form](self.bench, cut or self.wide, **{"size": self.settings.size, **settings})

    def guarded(self, rho: float | None) -> BothSides:
        """With the right answers of validation items as retention sets; rho None leaves half of the sets effective."""
        plain = self.search(calibrated=self.settings.calibrated)
        kept = len(plain.diagonal.retention)
        return self.search(calibrated=self.settings.calibrated, rho=math.log(2) if rho is None and kept > 1 else 0.0)

    def measured(self, average: Average) -> Scores:
        """Reward and abilities on the held-out part."""
        bench, panel = self.judge, self.judge.panel
        begun = time.monotonic()
        point = bench.point(average.curve, average.cut, average.ratios, "held-out", name=average.name)
        ratios = digest(average.cut.ratios(bench.pair.names, average.ratios))
        key = {"what": "seconds", "model": bench.inputs, "ratios": ratios, "panel": panel.fingerprint}
        key |= {"settings": panel.settings}
        elapsed = bench.store.once(key, lambda: time.monotonic() - begun)
        self.costs.setdefault(average.curve, {})[average.name] = round(float(elapsed), 2)
        return point.scores

    def timed(self, name: str, key: Any, work: Callable[[], Any]) -> Any:
        """`work()`, and the seconds it took the first time in `costs`."""
        begun = time.monotonic()
        value = work()
        elapsed = self.bench.store.once(
            {"what": "seconds", "model": self.bench.inputs, "search": name, "of": digest(key)},
            lambda: time.monotonic() - begun,
        )
        self.costs.setdefault("search", {})[name] = round(float(elapsed), 2)
        return value

    def _thirds(self) -> Partition:
        return thirds(self.bench.pair.names)

    def _wide_thirds(self) -> Partition:
        return self._thirds().with_rest_block()

    def _fixed(
        self, curve: str, cut: Partition, means: Sequence[float], ratios: Callable[[float], Sequence[float]]
    ) -> Iterator[Average]:
        for mean in means:
            yield Average(f"{curve} {mean:g}", curve, cut, tuple(ratios(mean)), {"mean": mean})

    def _part_wise(self, curve: str) -> Iterator[Average]:
        for index, name in enumerate(("input", "middle", "output")):
            ratios = tuple(PART if i == index else 1.0 for i in range(3))
            yield Average(f"{name} third {PART:g}", curve, self._thirds(), ratios, {"third": name})

    def _borrowed(self, curve: str, cut: Partition) -> Iterator[Average]:
        if self.lender is None:
            raise ValueError("no --borrow FILE: expected another pair's results")
        source = curve.partition(",")[0]
        for p in (p for p in self.lender["points"] if p["method"] == source):
            about = {"of": f"{self.lender['run']}-{self.lender['seed']}", **p["settings"]}
            yield Average(p["name"].replace(source, curve, 1), curve, cut, tuple(p["ratios"]), about)

    def _hma(self, curve: str, cut: Partition) -> Iterator[Average]:
        proxies = proxies_of(self.bench, self.settings.size)
        for mean in self.settings.means:
            passes = self.settings.max_passes
            found = self.timed(
                f"{curve} {mean:g}",
                [mean, self.settings.size, passes],
                lambda mean=mean: hma_ratios(self.bench, cut, proxies, mean, max_passes=self.settings.max_passes),
            )
            yield Average(f"{curve} {mean:g}", curve, cut, found.ratios, {"mean": mean, "passes": found.passes})

    def _two_sided(self, curve: str, how: str, search: BothSides) -> Iterator[Average]:
        weights, passes = self.settings.weights, self.settings.max_passes
        key = [search.key, list(weights), search.radius, passes]
        self.timed(f"both sides, {search.form}, {search.cut.name}", search.key, lambda: search.measured)
        if how == "exact":
            found = self.timed(curve, key, lambda: search.exact(weights, max_passes=passes))
        elif how == "Fisher":
            found = self.timed(curve, key, lambda: fisher(search, weights))
        else:
            found = search.path(weights)
        # The truth of a sampled side would be one more noisy draw: nothing a model could be judged by.
        truths = search.truth(found) if how != "exact" and search.form != "reward" else [None] * len(found)
        for f, truth in zip(found, truths, strict=True):
            about = {
                "lambda": f.weight,
                "alignment": f.alignment,
                "retention": dict(f.retention),
                "shares": dict(f.shares),
                "measured": truth,
                "passes": f.passes + (search.diagonal.passes if how == "path" else 0),
                "misfit": search.diagonal.misfit,
                "converged": f.converged,
            }
            yield Average(f"{curve} {f.weight:g}", curve, search.cut, f.ratios, about)
