"""How far POST and the pick have gone from PRE: in what they say, in what PRE says, and how varied that is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from counterpoise.evaluation.workbench import Point, Workbench
from counterpoise.language.divergence import distinct, divergences
from counterpoise.language.prompts import encode_prompt
from counterpoise.language.scoring import Example
from counterpoise.records import digest
from counterpoise.search.on_bench import words
from counterpoise.search.retention import OPENINGS
from counterpoise.statistics.bootstrap import Array, Interval, interval, paired_difference

OWN, ANSWERS, TEXT, ENTROPY, DISTINCT = "kl_own_answers", "kl_pre_answers", "kl_pre_text", "entropy", "distinct_2"
NORMAL = 1.959964


def distances(bench: Workbench, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Rows of a measure each: what it is of PRE ("pre"), POST ("post") and the pick, and how far these two are from PRE's.

    KL(x || PRE) on x's own responses to the prompts; KL(PRE || x) on PRE's responses, which predicts forgetting (Shenfeld et
    al. 2025, arXiv 2509.04259), and on PRE's continuations of `retention.OPENINGS`; the entropy of x's next token in its
    responses, all per token; and the share of distinct pairs of tokens among all pairs, responses to a prompt cut to the
    shortest. Responses are those that the reward was measured on. 95 % intervals over prompts, or openings.

    Args:
        points: PRE, POST and perhaps the pick, of one part.
    """
    pre, *others = points
    panel, part = bench.panel, pre.part
    asked = [encode_prompt(bench.tokenizer, p, chat=panel.drawing.chat) for p in panel.prompts_of(part)]
    said = [_responses(bench, p) for p in points]
    sets = [[Example(a, y) for a, group in zip(asked, s, strict=True) for y in group] for s in said]
    text = words(bench, len(OPENINGS), with_prompts=False)["text"]
    wanted = [(x, pre, own) for x, own in zip(others, sets[1:], strict=True)]
    wanted += [(pre, x, some) for x in others for some in (sets[0], text)]
    found = []
    for number, (p, q, examples) in enumerate(wanted, start=1):
        found.append(_divergence(bench, p, q, examples))
        if (told := bench.stage("distance from PRE")) is not None:
            told(number, len(wanted))
    n, names = panel.drawing.n, ("post", "pick")[: len(others)]
    own = [f.reshape(len(asked), n, 3).sum(1) for f in found[: len(others)]]
    there = [f.reshape(len(asked), n, 3).sum(1) for f in found[len(others) :: 2]]
    kinds = ((OWN, own), (ANSWERS, there), (TEXT, found[len(others) + 1 :: 2]))
    rows: list[dict[str, Any]] = [
        {"measure": measure, "unit": "nats/token", "pre": None}
        | {k: _positive(interval(f[:, [0, 2]], "ratio")) for k, f in zip(names, columns, strict=True)}
        for measure, columns in kinds
    ]
    entropies = [there[0], *own]
    row = {k: _positive(interval(f[:, 1:], "ratio")) for k, f in zip(("pre", *names), entropies, strict=True)}
    changes = {
        f"{k}_change": paired_difference(f[:, 1:], there[0][:, 1:], "ratio")._asdict()
        for k, f in zip(names, own, strict=True)
    }
    return [*rows, {"measure": ENTROPY, "unit": "nats/token", **row, **changes}, _distinct(said, names)]


def _responses(bench: Workbench, point: Point) -> list[list[tuple[int, ...]]]:
    bench.resident.set(point.partition, point.ratios)
    kept: dict[str, Any] = {"store": bench.store, "model_id": bench.identity(point.partition, point.ratios)}
    return bench.panel.responses(bench.resident.model, bench.tokenizer, point.part, **kept)


def _divergence(bench: Workbench, p: Point, q: Point, examples: Sequence[Example]) -> Array:
    """KL(p || q), the entropy of p and tokens of each example, once."""

    def place(point: Point) -> Any:
        bench.resident.set(point.partition, point.ratios)
        return bench.resident.model

    def run() -> Any:
        words = bench.resident.model.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
        batch = bench.panel.drawing.batch_size
        return divergences(partial(place, p), partial(place, q), examples, vocabulary=words, batch_size=batch).tolist()

    ends = [bench.identity(x.partition, x.ratios) for x in (p, q)]
    return np.array(bench.store.once({"what": "divergence", "ends": ends, "examples": digest(examples)}, run))


def _distinct(said: Sequence[Sequence[Sequence[tuple[int, ...]]]], names: Sequence[str]) -> dict[str, Any]:
    """Distinct pairs in percent, of responses cut to the shortest to that prompt, by the jackknife over prompts."""
    shortest = [[min(map(len, same)) for same in zip(*groups, strict=True)] for groups in zip(*said, strict=True)]
    cut = [
        [[y[:most] for y, most in zip(group, sizes, strict=True)] for group, sizes in zip(s, shortest, strict=True)]
        for s in said
    ]
    shares = [100 * distinct(c) for c in cut]
    row: dict[str, Any] = {"measure": DISTINCT, "unit": "%"}
    row |= {k: _jackknife(s) for k, s in zip(("pre", *names), shares, strict=True)}
    return row | {f"{k}_change": _jackknife(s - shares[0]) for k, s in zip(names, shares[1:], strict=True)}


def _jackknife(values: Array) -> dict[str, float] | None:
    value, without = float(values[0]), values[1:]
    if not np.isfinite(values).all():
        return None
    half = NORMAL * float(np.sqrt((len(without) - 1) * without.var()))
    return {"value": value, "low": value - half, "high": value + half}


def _positive(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": max(0.0, found.low), "high": found.high}
