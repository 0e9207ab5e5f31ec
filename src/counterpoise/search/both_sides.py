"""The two-sided search on a workbench: its data drawn once, its slopes measured once, its ratios found once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoise.averaging.partition import Partition
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.scoring import Example
from counterpoise.multitask.mirror import ball_radius
from counterpoise.records import digest
from counterpoise.search.contrast import contrast
from counterpoise.search.on_bench import answers, proxies, ratings, words
from counterpoise.search.on_policy import OnPolicy
from counterpoise.search.proxies import ProxySet, Rated
from counterpoise.search.retention import OPENINGS
from counterpoise.search.sides import Likelihood, Scale, Side, Slopes
from counterpoise.search.two_sided import POINTS, Diagonal, Found, diagonal_of, exact, path

FORMS = ("imitation", "contrast", "reward")
Array = NDArray[np.float64]


class BothSides:
    """Both sides of one pair on one partition, measured when first needed and kept in the workbench's store.

    Args:
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

    def __init__(
        self,
        bench: Workbench,
        cut: Partition,
        *,
        form: str = "imitation",
        size: int = 256,
        n: int = 4,
        openings: Sequence[str] = OPENINGS,
        with_prompts: bool = True,
        calibrated: int = 0,
        rho: float = 0.0,
        min_effective_sets: float | None = None,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"alignment: expected {', '.join(FORMS)}, found {form!r}")
        if size < 2 * n:
            raise ValueError(f"proxy_size: expected at least {2 * n} sequences, found {size}")
        if not 0 <= rho < np.inf:
            raise ValueError(f"rho: expected a finite number >= 0, found {rho}")
        self.bench, self.cut, self.form, self.size, self.n = bench, cut, form, size, n
        self._rho, self._effective = rho, min_effective_sets
        self.openings, self.with_prompts, self.calibrated = tuple(openings), with_prompts, calibrated
        self.batch = max(1, bench.panel.drawing.batch_size // 2)

    @cached_property
    def rho(self) -> float:
        """Radius of the adversary's KL ball."""
        if self._effective is None:
            return self._rho
        names = list(self.diagonal.retention)
        if not 1 <= self._effective <= len(names):
            raise ValueError(
                f"min_effective_sets: expected a number from 1 to {len(names)} (the retention sets are "
                f"{', '.join(names)}), found {self._effective:g}"
            )
        return ball_radius(len(names), self._effective)

    @property
    def apart(self) -> bool:
        """Whether the retention sets stay apart for an adversary."""
        return self._rho > 0 or self._effective is not None

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
            begun = time.monotonic()
            side = self._alignment
            found: dict[str, Any] = {"alignment": _plain(side.along(POINTS)), "retention": {}}
            for number, (name, kept) in enumerate(self._retention.items()):
                self._advance("measuring both sides", number + 1, 1 + len(self._retention))
                found["retention"][name] = _plain(kept.along(POINTS))
            self._advance("measuring both sides", 1 + len(self._retention), 1 + len(self._retention))
            neighbours = [k._asdict() for k in side.kept] if isinstance(side, OnPolicy) else []
            return {**found, "neighbours": neighbours, "seconds": round(time.monotonic() - begun, 2)}

        found: dict[str, Any] = self.bench.store.once({"what": "two-sided", **self.key}, run)
        return found

    def path(self, weights: Sequence[float]) -> list[Found]:
        """The ratios for every lambda from the diagonal alone."""
        return path(self.diagonal, weights, rho=self.rho)

    def exact(self, weights: Sequence[float], *, max_passes: int = 12) -> list[Found]:
        """The path, descended on the true sides."""

        def run() -> list[Any]:
            kept = {t: s for t, s in self._retention.items() if t not in self.left_out}
            stage = self.bench.stage("searching exactly")
            options: dict[str, Any] = {"rho": self.rho, "max_passes": max_passes, "progress": stage}
            return [asdict(f) for f in exact(self.diagonal, self._alignment, kept, weights, **options)]

        key = {"what": "exact", **self.key, "weights": list(weights), "rho": self.rho, "passes": max_passes}
        return [Found(**{**f, "ratios": tuple(f["ratios"])}) for f in self.bench.store.once(key, run)]

    def truth(self, found: Sequence[Found]) -> list[dict[str, Any]]:
        """Both sides as they really are at some ratios, scaled: what a model's values are to be compared with."""

        def run(ratios: Array) -> dict[str, Any]:
            value, _ = self.diagonal.alignment_scale.of(self._alignment.near(ratios))(ratios)
            scales = self.diagonal.retention_scales
            kept = {t: scales[t].of(s.near(ratios))(ratios)[0] for t, s in self._retention.items() if t in scales}
            return {"alignment": value, "retention": kept}

        key = {"what": "truth", **self.key}
        return [
            self.bench.store.once({**key, "ratios": list(f.ratios)}, partial(run, np.array(f.ratios))) for f in found
        ]

    def scaled_on(self, found: Found, alignment: Sequence[Example], retention: Sequence[Example]) -> dict[str, float]:
        """Imitation and retention on other examples, scaled by their own ends: what over-fitting is seen by."""

        def run() -> dict[str, float]:
            values = {}
            for name, examples, best in (("alignment", alignment, 1.0), ("retention", retention, 0.0)):
                objective = ProxySet(tuple(examples), self.batch)
                at = []
                for ratios in (np.full(len(self.cut), best), np.full(len(self.cut), 1 - best), np.array(found.ratios)):
                    self.bench.resident.set(self.cut, ratios)
                    at.append(objective.nll(self.bench.resident.model))
                scale = Scale.between(at[0], at[1], name)
                values[name] = (at[2] - scale.best) / scale.gap
            return values

        key = {"what": "elsewhere", "model": self.bench.inputs, "cut": cut_key(self.cut), "batch": self.batch}
        data = {"ratios": list(found.ratios), "examples": digest([list(alignment), list(retention)])}
        return dict(self.bench.store.once({**key, **data}, run))

    @cached_property
    def _alignment(self) -> Side:
        bench, panel = self.bench, self.bench.panel
        if self.form == "reward":
            return OnPolicy(
                bench.resident,
                self.cut,
                bench.tokenizer,
                panel.prompts_of("proxy")[: max(2, self.size // self.n)],
                panel.reward,
                replace(panel.drawing, n=self.n, batch_size=8 * self.batch, seed=panel.drawing.seed + 1),
                groups=min(8, max(2, self.size // self.n)),
                batch_size=self.batch,
                progress=bench.stage("drawing along the diagonal"),
            )
        if self.form == "contrast":
            objective = contrast(self._rated, batch_size=self.batch, temperature=panel.drawing.temperature).backward
        else:
            objective = ProxySet(tuple(self.good), self.batch).backward
        return Likelihood(bench.resident, self.cut, objective)

    @cached_property
    def _retention(self) -> dict[str, Side]:
        sets: dict[str, list[Example]] = {**self.words, **self._answers}
        if not self.apart and not self._answers:
            sets = {"pre": [e for rows in sets.values() for e in rows]}
        return {
            t: Likelihood(self.bench.resident, self.cut, ProxySet(tuple(rows), self.batch).backward)
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

    @cached_property
    def key(self) -> dict[str, Any]:
        """All that decides the slopes."""
        panel = self.bench.panel
        data: Any = self._rated if self.form == "contrast" else self.good
        if self.form == "reward":
            data = [panel.reward_id, [p.key for p in panel.prompts_of("proxy")[: max(2, self.size // self.n)]]]
            how = panel.drawing
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

    def _advance(self, stage: str, done: int, total: int) -> None:
        if (progress := self.bench.stage(stage)) is not None:
            progress(done, total)


def cut_key(cut: Partition) -> str:
    """sha256 over blocks, weights and the tensors outside."""
    return digest([[b.weight, *b.tensors] for b in cut.blocks] + [list(cut.rest)])


def _plain(slopes: Slopes) -> dict[str, Any]:
    return {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in slopes._asdict().items()}


def _slopes(stored: Mapping[str, Any]) -> Slopes:
    errors = stored["errors"]
    points, values, gradients = (np.array(stored[n]) for n in ("points", "values", "gradients"))
    return Slopes(points, values, gradients, stored["passes"], None if errors is None else np.array(errors))
