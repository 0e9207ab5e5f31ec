"""The two-sided search on a workbench: its data drawn once, its slopes measured once, its ratios found once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np

from counterpoise.averaging.partition import Partition
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.scoring import Example
from counterpoise.multitask.mirror import ball_radius
from counterpoise.records import digest
from counterpoise.search.on_bench import answers, proxies, words
from counterpoise.search.proxies import ProxySet
from counterpoise.search.retention import OPENINGS
from counterpoise.search.sides import Likelihood, Side, Slopes
from counterpoise.search.two_sided import POINTS, Diagonal, Found, diagonal_of, exact, path
from counterpoise.statistics.bootstrap import Array


@dataclass(eq=False)
class BothSides:
    """Both sides of one pair on one partition, measured when first needed and kept in the workbench's store.

    Attributes:
        cut: usually `layerwise(names).with_rest_block()`.
        form: of the alignment side, imitation of POST's good responses; experiments/two_sided/forms.py has others.
        size: sequences on each side.
        openings: what PRE continues; empty for its responses to prompts alone.
        with_prompts: whether PRE's responses to the proxy prompts are retained too.
        calibrated: right answers of so many validation items an ability, as retention sets of their own.
        rho: radius of the adversary's KL ball over the retention sets; above 0 they stay apart, else they are one.
        min_effective_sets: the same in other words: rho = log(sets / n), so that at least n sets always count.
    """

    bench: Workbench
    cut: Partition
    size: int = 256
    openings: Sequence[str] = OPENINGS
    with_prompts: bool = True
    calibrated: int = 0
    rho: float = 0.0
    min_effective_sets: float | None = None
    form: ClassVar[str] = "imitation"

    def __post_init__(self) -> None:
        if not 0 <= self.rho < np.inf:
            raise ValueError(f"rho: expected a finite number >= 0, found {self.rho}")
        self.batch = max(1, self.bench.panel.drawing.batch_size // 2)

    @cached_property
    def radius(self) -> float:
        """`rho`, or what `min_effective_sets` makes of it."""
        if self.min_effective_sets is None:
            return self.rho
        names = list(self.diagonal.retention)
        if not 1 <= self.min_effective_sets <= len(names):
            raise ValueError(
                f"min_effective_sets: expected a number from 1 to {len(names)} (the retention sets are "
                f"{', '.join(names)}), found {self.min_effective_sets:g}"
            )
        return ball_radius(len(names), self.min_effective_sets)

    @property
    def apart(self) -> bool:
        """Whether the retention sets stay apart for an adversary."""
        return self.rho > 0 or self.min_effective_sets is not None

    @cached_property
    def diagonal(self) -> Diagonal:
        """Both sides at five points of the diagonal."""
        kept = {name: _slopes(s) for name, s in self.measured["retention"].items() if name not in self.left_out}
        return diagonal_of(_slopes(self.measured["alignment"]), kept)

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        """Calibrated abilities on which POST loses nothing: there is nothing to retain."""
        values = {name: s["values"] for name, s in self.measured["retention"].items()}
        return tuple(t for t, v in values.items() if t in self._answers and not v[-1] > v[0])

    @cached_property
    def measured(self) -> dict[str, Any]:
        """What `measure` gives, kept."""
        found: dict[str, Any] = self.bench.store.together({"what": "two-sided", **self.key}, self.measure)
        return found

    def measure(self) -> dict[str, Any]:
        """Slopes of both sides as plain json, with the seconds they took."""
        begun, total = time.monotonic(), 1 + len(self._retention)
        progress = self.bench.stage("measuring both sides") or (lambda done, total: None)
        found: dict[str, Any] = {"alignment": _plain(self.alignment.along(POINTS)), "retention": {}}
        for number, (name, kept) in enumerate(self._retention.items()):
            progress(number + 1, total)
            found["retention"][name] = _plain(kept.along(POINTS))
        progress(total, total)
        return {**found, "seconds": round(time.monotonic() - begun, 2)}

    def path(self, weights: Sequence[float]) -> list[Found]:
        """The ratios for every lambda from the diagonal alone."""
        return path(self.diagonal, weights, rho=self.radius)

    def exact(self, weights: Sequence[float], *, max_passes: int = 12) -> list[Found]:
        """The path, descended on the true sides."""

        def run() -> list[Any]:
            kept = {t: s for t, s in self._retention.items() if t not in self.left_out}
            stage = self.bench.stage("searching exactly")
            options: dict[str, Any] = {"rho": self.radius, "max_passes": max_passes, "progress": stage}
            return [asdict(f) for f in exact(self.diagonal, self.alignment, kept, weights, **options)]

        key = {"what": "exact", **self.key, "weights": list(weights), "rho": self.radius, "passes": max_passes}
        return [Found(**{**f, "ratios": tuple(f["ratios"])}) for f in self.bench.store.together(key, run)]

    def truth(self, found: Sequence[Found]) -> list[dict[str, Any]]:
        """Both sides as they really are at some ratios, scaled: what a model's values are to be compared with."""

        def run(ratios: Array) -> dict[str, Any]:
            value, _ = self.diagonal.alignment_scale.of(self.alignment.near(ratios))(ratios)
            scales = self.diagonal.retention_scales
            kept = {t: scales[t].of(s.near(ratios))(ratios)[0] for t, s in self._retention.items() if t in scales}
            return {"alignment": value, "retention": kept}

        key = {"what": "truth", **self.key}
        return [
            self.bench.store.together({**key, "ratios": list(f.ratios)}, partial(run, np.array(f.ratios)))
            for f in found
        ]

    @cached_property
    def alignment(self) -> Side:
        """The side of alignment."""
        return Likelihood(self.bench.resident, self.cut, ProxySet(tuple(self.good), self.batch).terms)

    @property
    def aligned(self) -> Any:
        """What decides that side."""
        return self.good

    @cached_property
    def _retention(self) -> dict[str, Side]:
        sets: dict[str, list[Example]] = {**self.words, **self._answers}
        if not self.apart and not self._answers:
            sets = {"pre": [e for rows in sets.values() for e in rows]}
        return {
            t: Likelihood(self.bench.resident, self.cut, ProxySet(tuple(rows), self.batch).terms)
            for t, rows in sets.items()
        }

    @cached_property
    def good(self) -> list[Example]:
        """Good responses of POST."""
        return proxies(self.bench, self.size)

    @cached_property
    def words(self) -> dict[str, list[Example]]:
        """What PRE says, a set of sequences a name."""
        return words(self.bench, self.size, openings=self.openings, with_prompts=self.with_prompts)

    @cached_property
    def _answers(self) -> dict[str, list[Example]]:
        return answers(self.bench, self.calibrated) if self.calibrated else {}

    @cached_property
    def key(self) -> dict[str, Any]:
        """All that decides the slopes."""
        return {
            "model": self.bench.inputs,
            "form": self.form,
            "cut": cut_key(self.cut),
            "alignment": digest(self.aligned),
            "retention": digest([self.words, self._answers, self.apart]),
            "batch": self.batch,
        }


def cut_key(cut: Partition) -> str:
    """sha256 over blocks, weights and the tensors outside."""
    return digest([[b.weight, *b.tensors] for b in cut.blocks] + [list(cut.rest)])


def _plain(slopes: Slopes) -> dict[str, Any]:
    return {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in slopes._asdict().items()}


def _slopes(stored: Mapping[str, Any]) -> Slopes:
    found: dict[str, Any] = {n: np.array(v) if isinstance(v, list) else v for n, v in stored.items()}
    return Slopes(**found)
