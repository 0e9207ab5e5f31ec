"""The two-sided search on a workbench: its data drawn once, its slopes measured once, its ratios found once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from counterpoise.averaging.partition import Partition
from counterpoise.evaluation.rewards import Rated
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.prompts import Prompt
from counterpoise.language.scoring import Example
from counterpoise.multitask.mirror import ball_radius
from counterpoise.records import digest
from counterpoise.search.on_bench import answers, proxies, ratings, words
from counterpoise.search.on_policy import OnPolicy
from counterpoise.search.proxies import ProxySet, contrast
from counterpoise.search.retention import OPENINGS
from counterpoise.search.sides import Likelihood, Side, Slopes
from counterpoise.search.two_sided import POINTS, Diagonal, Found, diagonal_of, exact, path
from counterpoise.statistics.bootstrap import Array

FORMS = ("imitation", "contrast", "reward")


@dataclass(eq=False)
class BothSides:
    """Both sides of one pair on one partition, measured when first needed and kept in the workbench's store.

    Attributes:
        cut: usually `layerwise(names).with_rest_block()`.
        form: of the alignment side: "imitation" of POST's good responses, "contrast" of good against bad ones, or the
            "reward" itself, its gradient from responses drawn at each point.
        size: sequences on each side (for "reward", drawn anew at every point).
        n: responses a prompt where they are compared with one another ("contrast", "reward").
        openings: what PRE continues; empty for its responses to prompts alone.
        with_prompts: whether PRE's responses to the proxy prompts are retained too.
        calibrated: right answers of so many validation items an ability, as retention sets of their own.
        rho: radius of the adversary's KL ball over the retention sets; above 0 they stay apart, else they are one.
        min_effective_sets: the same in other words: rho = log(sets / n), so that at least n sets always count.
    """

    bench: Workbench
    cut: Partition
    form: str = "imitation"
    size: int = 256
    n: int = 4
    openings: Sequence[str] = OPENINGS
    with_prompts: bool = True
    calibrated: int = 0
    rho: float = 0.0
    min_effective_sets: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rho < np.inf:
            raise ValueError(f"rho: expected a finite number >= 0, found {self.rho}")
        self.batch = max(1, self.bench.panel.drawing.rows // 2)

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
        """Slopes of both sides as plain json, with the seconds they took and what the reward form reports of itself."""

        def run() -> dict[str, Any]:
            begun, side, total = time.monotonic(), self._alignment, 1 + len(self._retention)
            progress = self.bench.stage("measuring both sides") or (lambda done, total: None)
            found: dict[str, Any] = {"alignment": _plain(side.along(POINTS)), "retention": {}}
            for number, (name, kept) in enumerate(self._retention.items()):
                progress(number + 1, total)
                found["retention"][name] = _plain(kept.along(POINTS))
            progress(total, total)
            neighbours = [k._asdict() for k in side.kept] if isinstance(side, OnPolicy) else []
            return {**found, "neighbours": neighbours, "seconds": round(time.monotonic() - begun, 2)}

        found: dict[str, Any] = self.bench.store.together({"what": "two-sided", **self.key}, run)
        return found

    def path(self, weights: Sequence[float]) -> list[Found]:
        """The ratios for every lambda from the diagonal alone."""
        return path(self.diagonal, weights, rho=self.radius)

    def exact(self, weights: Sequence[float], *, max_passes: int = 12) -> list[Found]:
        """The path, descended on the true sides."""

        def run() -> list[Any]:
            kept = {t: s for t, s in self._retention.items() if t not in self.left_out}
            stage = self.bench.stage("searching exactly")
            options: dict[str, Any] = {"rho": self.radius, "max_passes": max_passes, "progress": stage}
            return [asdict(f) for f in exact(self.diagonal, self._alignment, kept, weights, **options)]

        key = {"what": "exact", **self.key, "weights": list(weights), "rho": self.radius, "passes": max_passes}
        return [Found(**{**f, "ratios": tuple(f["ratios"])}) for f in self.bench.store.together(key, run)]

    def truth(self, found: Sequence[Found]) -> list[dict[str, Any]]:
        """Both sides as they really are at some ratios, scaled: what a model's values are to be compared with."""

        def run(ratios: Array) -> dict[str, Any]:
            value, _ = self.diagonal.alignment_scale.of(self._alignment.near(ratios))(ratios)
            scales = self.diagonal.retention_scales
            kept = {t: scales[t].of(s.near(ratios))(ratios)[0] for t, s in self._retention.items() if t in scales}
            return {"alignment": value, "retention": kept}

        key = {"what": "truth", **self.key}
        return [
            self.bench.store.together({**key, "ratios": list(f.ratios)}, partial(run, np.array(f.ratios)))
            for f in found
        ]

    @cached_property
    def _alignment(self) -> Side:
        bench, panel = self.bench, self.bench.panel
        if self.form == "reward":
            drawing = panel.draws(n=self.n, seed=panel.drawing.seed + 1)
            how: dict[str, Any] = {"groups": min(8, max(2, self.size // self.n)), "batch_size": self.batch}
            how["progress"] = bench.stage("drawing along the diagonal")
            on = (bench.resident, self.cut, bench.tokenizer, self._asked, panel.reward, drawing)
            return OnPolicy(*on, **how)
        if self.form == "contrast":
            objective = contrast(self._rated, batch_size=self.batch, temperature=panel.drawing.temperature).terms
        else:
            objective = ProxySet(tuple(self.good), self.batch).terms
        return Likelihood(bench.resident, self.cut, objective)

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
    def _rated(self) -> list[Rated]:
        return ratings(self.bench, self.size, self.n)

    @property
    def _asked(self) -> list[Prompt]:
        """Prompts that the reward form draws responses to, at every point."""
        return self.bench.panel.prompts_of("proxy")[: max(2, self.size // self.n)]

    @cached_property
    def key(self) -> dict[str, Any]:
        """All that decides the slopes."""
        panel = self.bench.panel
        data: Any = self._rated if self.form == "contrast" else self.good
        if self.form == "reward":
            how = panel.drawing
            data = [panel.reward_id, [p.key for p in self._asked]]
            data += [how.max_new_tokens, how.temperature, how.chat, how.seed, self.n]
        elif self.form == "contrast":
            data = [panel.drawing.temperature, [[list(r.examples), r.rewards.tolist()] for r in self._rated]]
        return {
            "model": self.bench.inputs,
            "form": self.form,
            "cut": cut_key(self.cut),
            "alignment": digest(data),
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
