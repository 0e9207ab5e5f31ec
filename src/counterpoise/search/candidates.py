"""The searches that `restore` compares with plain averaging: frozen values that find averages and say what that costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

from counterpoise.averaging.partition import Partition, layerwise, partition
from counterpoise.evaluation.workbench import Model, Workbench
from counterpoise.language.costs import AGAIN, Lengths, Stage, drawn, training
from counterpoise.language.shapes import Shape
from counterpoise.language.work import PROJECTED, Work
from counterpoise.search.both_sides import BothSides
from counterpoise.search.hma import linear_ramp, random_ratios
from counterpoise.search.on_bench import REPLIES, hma_ratios, proxies, proxies_of
from counterpoise.search.two_sided import Found

PASSES = 12
"""Most passes of a search for one mean, and most points of an exact search for one lambda."""


class Candidate(NamedTuple):
    """An average to be measured.

    Attributes:
        at: the place of its mean in the grid, by which candidates are ordered; None comes last.
        pickable: whether it may be written; a control is there to be compared with.
    """

    method: str
    name: str
    partition: Partition
    ratios: tuple[float, ...]
    at: int | None = None
    pickable: bool = True

    @property
    def model(self) -> Model:
        """What is measured."""
        return Model(self.name, self.method, self.partition, self.ratios)


@dataclass(frozen=True)
class Findings:
    """What a search found, and what restore.json tells of it, by the key that it stands under."""

    candidates: Sequence[Candidate]
    told: Mapping[str, Any] = field(default_factory=dict)


class Search(Protocol):
    """What `restore` and its dry run ask of a search; a new one is a class of these and a line of `SEARCHES`."""

    @property
    def title(self) -> str:
        """What results and `--search` call it."""

    def check(self, files: int) -> None:
        """Raise a ValueError for settings out of range; so many abilities are `files`, which can be calibrated on."""

    def find(self, bench: Workbench, means: Sequence[float]) -> Findings:
        """The averages to be measured, found on the proxy part of the prompts; `means` is for a search that has one."""

    def averages(self, means: Sequence[float]) -> int:
        """How many candidates `find` gives at most."""

    def cost(self, work: Extent) -> list[Stage]:
        """The stages of `find` with their operations and memory, at most; equal ones of two searches run once."""


class Extent(NamedTuple):
    """What decides the cost of a search.

    Attributes:
        reward: of a reward that is a model.
        prompts: of the proxy part.
    """

    shape: Shape
    reward: Shape | None
    at: Lengths
    prompts: int
    means: Sequence[float]


@dataclass(frozen=True)
class HMA:
    """Lin et al. 2024: at every mean of the grid the ratios of the blocks that keep most alignment.

    Attributes:
        blocks: a number of equal blocks of layers, "layerwise" or "module".
        proxy_size: responses of POST that the search sees (the paper: 2000).
    """

    blocks: int | str = 3
    proxy_size: int = 256
    title: ClassVar[str] = "hma"

    def check(self, files: int = 0) -> None:
        refuse_blocks(self.blocks)
        if self.proxy_size < 1:
            raise ValueError(f"proxy_size: expected at least 1 response, found {self.proxy_size}")

    def find(self, bench: Workbench, means: Sequence[float]) -> Findings:
        cut, inside = partition(bench.pair.shapes, self.blocks), _inside(means)
        good = proxies(bench, self.proxy_size) if inside else []
        searches = [partial(hma_ratios, bench, cut, good, mean, max_passes=PASSES) for _, mean in inside]
        names = [{"what": "searching", "blocks": [b.name for b in cut.blocks], "mean": mean} for _, mean in inside]
        ratios = bench.store.each([*zip(names, searches, strict=True)], together=True)
        found = [(*of, r) for of, r in zip(inside, ratios, strict=True)]
        rows = [
            {"mean": m, "ratios": list(s.ratios), "passes": s.passes, "trace": list(s.trace), "converged": s.converged}
            for _, m, s in found
        ]
        return Findings([Candidate("HMA", f"HMA {m:g}", cut, s.ratios, i) for i, m, s in found], {"search": rows})

    def averages(self, means: Sequence[float]) -> int:
        return len(_inside(means))

    def cost(self, work: Extent) -> list[Stage]:
        drawing, size = _drawing_proxies(work, self.proxy_size)
        if not (count := self.averages(work.means)):
            return [drawing]
        blocks = str(self.blocks)  # "3" where it was typed
        passes = min(PASSES, int(blocks) + 1) if blocks.isdecimal() else PASSES
        what = f"{count} means, some {passes} passes (at most {PASSES}) over {size:,} responses each"
        what += _computed_again(work)
        one = _pass(work, size) * (passes * count)
        return [drawing, Stage("search: HMA", what, one, work.at.training_memory(work.shape))]


WORDS = {"linear": 1.0, "step": math.inf, "reversed": -1.0, "random": None}
"""Ramps by a word: the slope that each is of; random ratios have none."""
Outside = Literal["mean", "first"]


@dataclass(frozen=True)
class Ramp:
    """Ratios that need no search, at every mean of the grid: LiNeS, flatter or steeper, and two controls of the same mean.

    Attributes:
        slope: 0 is plain averaging, 1 or "linear" LiNeS, "step" the limit (see `linear_ramp`); "reversed" is LiNeS upside
            down, "random" no ramp at all: those two are controls and never picked.
        blocks: of the random ratios.
        outside: the tensors outside the layers have the "mean" ratio, or that of the "first" layer, as LiNeS's authors
            have it: they are then one more layer at the input, and count as one in the mean.
    """

    slope: float | str = 1.0
    blocks: int | str = 3
    outside: Outside = "mean"

    @property
    def title(self) -> str:
        told = {1.0: "LiNeS", math.inf: "step", -1.0: "reversed", None: "random"}
        name = told.get(self._slope) or f"slope {self._slope:g}"
        return name if self.outside == "mean" else f"{name}, outside {self.outside}"

    @property
    def control(self) -> bool:
        """Whether it is there to be compared with, and never picked."""
        return self._slope is None or self._slope < 0

    @property
    def _slope(self) -> float | None:
        return WORDS[self.slope] if isinstance(self.slope, str) else float(self.slope)

    def check(self, files: int = 0) -> None:
        refuse_blocks(self.blocks)
        if self.slope not in WORDS and not (isinstance(self.slope, (int, float)) and self.slope >= 0):
            raise ValueError(f"slope: expected a number of at least 0, {', '.join(WORDS)}, found {self.slope!r}")
        if self.outside not in get_args(Outside):
            raise ValueError(f"outside: expected {', '.join(get_args(Outside))}, found {self.outside!r}")

    def find(self, bench: Workbench, means: Sequence[float]) -> Findings:
        cut = partition(bench.pair.shapes, self.blocks) if self._slope is None else layerwise(bench.pair.names)
        cut = cut if self.outside == "mean" else cut.with_rest_block()
        found = []
        for i, mean in _inside(means):
            if self._slope is None:
                ratios = random_ratios(cut, mean, seed=bench.panel.drawing.seed)
            else:
                ratios = linear_ramp(cut, mean, self._slope)
            found.append(
                Candidate(self.title, f"{self.title} {mean:g}", cut, tuple(ratios.tolist()), i, not self.control)
            )
        return Findings(found)

    def averages(self, means: Sequence[float]) -> int:
        return len(_inside(means))

    def cost(self, work: Extent) -> list[Stage]:
        return []  # nothing is searched


SLOPES: tuple[float | str, ...] = (1.0, 2.0, "step")
"""Beside plain averaging, whose slope is 0."""
CONTROLS = (*map(Ramp, SLOPES), Ramp("reversed"), Ramp("random"))


@dataclass(frozen=True)
class TwoSided:
    """Ratios that weigh alignment against what PRE could do, for every price lambda; see docs/explanation/two-sided.md.

    Attributes:
        lambdas: prices of what PRE could do, in units of alignment.
        blocks: as of `HMA`; the tensors outside them are one more block.
        calibrate: also retain the right answers of so many validation items an ability.
        min_effective_sets: guard the worst retention set, with at least so many of them always counting.
        proxy_size: sequences on each side.
    """

    lambdas: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0)
    blocks: int | str = "layerwise"
    calibrate: int = 0
    min_effective_sets: float | None = None
    proxy_size: int = 256
    title: ClassVar[str] = "two-sided"

    def check(self, files: int = 0) -> None:
        refuse_blocks(self.blocks)
        if not self.lambdas or not all(math.isfinite(x) and x >= 0 for x in self.lambdas):
            raise ValueError(f"lambdas: expected numbers of at least 0, found {list(self.lambdas)}")
        if self.calibrate < 0:
            raise ValueError(f"calibrate: expected at least 0 items, found {self.calibrate}")
        if self.calibrate and not files:
            raise ValueError("calibrate: expected an ability that is a file, found none; leave it out")
        if self.proxy_size < 8:  # two of each of four
            raise ValueError(f"proxy_size: expected at least 8 sequences, found {self.proxy_size}")
        most = 2 + (files if self.calibrate else 0)  # PRE's text, its responses, and the answers of each ability
        if self.min_effective_sets is not None and not 1 <= self.min_effective_sets <= most:
            raise ValueError(
                f"min_effective_sets: expected a number from 1 to {most}, the number of retention sets, found "
                f"{self.min_effective_sets:g}; calibrate on abilities to have more"
            )

    def find(self, bench: Workbench, means: Sequence[float]) -> Findings:
        cut = partition(bench.pair.shapes, self.blocks).with_rest_block()
        kept: dict[str, Any] = {"calibrated": self.calibrate, "min_effective_sets": self.min_effective_sets}
        both = BothSides(bench, cut, size=self.proxy_size, **kept)
        drawn, searched = both.path(self.lambdas), both.exact(self.lambdas, max_passes=PASSES)
        rows = [row(f, "path", t) for f, t in zip(drawn, both.truth(drawn), strict=True)] + [
            row(f, "exact") for f in searched
        ]
        told = {
            "alignment": both.form,
            "rho": both.radius,
            "sets": list(both.diagonal.retention),
            "left_out": list(both.left_out),
            "passes": both.diagonal.passes,
            "misfit": both.diagonal.misfit,
            "partition": cut.summary(bench.pair.shapes),
            "rows": rows,
        }
        named = [(f"two-sided {r['how']}", r) for r in rows]
        found = [Candidate(method, f"{method} {r['lambda']:g}", cut, tuple(r["ratios"])) for method, r in named]
        return Findings(found, {"two_sided": told})

    def averages(self, means: Sequence[float]) -> int:
        return 2 * len(self.lambdas)

    def cost(self, work: Extent) -> list[Stage]:
        shape, at, size = work.shape, work.at, self.proxy_size
        proxies, good = _drawing_proxies(work, size)
        words = drawn(shape, None, at, prompts=size)
        said = Stage(
            "words of PRE", f"{size:,} sequences{at.said(shape)}", words, at.drawing_memory(shape, work.reward)
        )
        passes = two_sided_passes(len(self.lambdas))
        total = (_pass(work, good) + _pass(work, size)) * (passes / 2)
        what = f"{len(self.lambdas)} lambdas, at most {passes} passes over {size:,} sequences{_computed_again(work)}"
        return [proxies, said, Stage("search: both sides", what, total, at.training_memory(shape))]


SEARCHES: dict[str, type[HMA] | type[TwoSided]] = {"hma": HMA, "two-sided": TwoSided}
"""What `--search` calls them."""


def two_sided_passes(lambdas: int) -> int:
    """Most passes of a two-sided search, each over one side's sequences with its gradient.

    Five points of each side on the diagonal, `PASSES` points and two starts a lambda of each, and the check of the path.
    """
    return 10 + 2 * lambdas * (PASSES + 2 + 1)


def row(found: Found, how: str, truth: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One lambda of "path" or "exact" as plain json for restore.json; `truth` is both sides as measured there."""
    told = {**asdict(found), "ratios": list(found.ratios)}
    return {"how": how, "lambda": told.pop("weight"), **told, "measured": None if truth is None else dict(truth)}


def refuse_blocks(blocks: int | str) -> None:
    """Raise a ValueError for what is no way of cutting a model: a number below 1, or a word that names none."""
    number = str(blocks).removeprefix("-")
    if not (int(blocks) >= 1 if number.isdecimal() else blocks in ("layerwise", "module")):
        raise ValueError(f"blocks: expected a number of at least 1, 'layerwise' or 'module', found {blocks!r}")


def refuse_means(means: Sequence[float], mean: float | None = None) -> None:
    """Raise a ValueError for a grid of mean ratios with one below 0 or not finite, or a fixed one outside [0, 1]."""
    if not means or not all(math.isfinite(m) and m >= 0 for m in means):
        raise ValueError(f"means: expected numbers of at least 0, found {list(means)}")
    if mean is not None and not 0 <= mean <= 1:  # NaN as well
        raise ValueError(f"mean: expected a number from 0 to 1, found {mean}")


def _inside(means: Sequence[float]) -> list[tuple[int, float]]:
    """The means up to 1, with their places: beyond (ExPO) one ratio for all leaves nothing to search."""
    return [(i, mean) for i, mean in enumerate(means) if mean <= 1]


def _pass(work: Extent, size: int) -> Work:
    """A pass over so many responses with its gradient, which each batch of them projects on the update."""
    projections = PROJECTED * work.shape.parameters * math.ceil(size / work.at.batch)
    found = training(work.shape, work.at.prompt, work.at.response, sequences=size)
    found *= AGAIN if work.at.computes_again(work.shape) else 1
    return found + Work(update=projections + work.shape.parameters)


def _computed_again(work: Extent) -> str:
    return "; no memory for all that a gradient needs: layers would be computed again" * (
        work.at.shares == 1 and work.at.is_scarce(work.shape)
    )


def _drawing_proxies(work: Extent, size: int) -> tuple[Stage, int]:
    """The stage, and how many responses the search then has."""
    asked, found = proxies_of(size, work.prompts)
    drawing = drawn(work.shape, work.reward, work.at, prompts=asked, n=REPLIES) + Work(update=work.shape.parameters)
    memory = work.at.drawing_memory(work.shape, work.reward)
    what = f"{REPLIES * asked:,} responses{work.at.said(work.shape, REPLIES)}"
    return Stage("proxies of POST", what, drawing, memory), found
