"""What is measured of PRE, POST and the pick in the end: how far they are from PRE, the tax, and what its means hide."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from counterpoise.evaluation.measurement import calibrations, tax_table
from counterpoise.evaluation.workbench import Point, Workbench
from counterpoise.language.divergence import distinct, divergences
from counterpoise.language.prompts import encode_prompt
from counterpoise.language.scoring import Example
from counterpoise.records import digest
from counterpoise.search.on_bench import words
from counterpoise.search.retention import OPENINGS
from counterpoise.statistics.bootstrap import NORMAL, Array, clustered, interval, paired_difference

OWN, ANSWERS, TEXT, ENTROPY, DISTINCT = "kl_own_answers", "kl_pre_answers", "kl_pre_text", "entropy", "distinct_2"


def measured(bench: Workbench, points: Sequence[Point]) -> dict[str, Any]:
    """Distance, tax and calibration of PRE, POST and perhaps the pick, measured on one part, as plain json."""
    scores = [p.scores for p in points]
    return {
        "distance": distances(bench, points),
        "tax": tax_table(*scores),
        "calibration": calibrations(*scores),
    }


def distances(bench: Workbench, points: Sequence[Point]) -> list[dict[str, Any]]:
    """A row a measure: of PRE, POST and perhaps the pick, with 95 % intervals over prompts, and what changed from PRE.

    KL(x || PRE) on x's own responses to the prompts; KL(PRE || x) on PRE's responses, which is said to predict forgetting
    (Shenfeld et al. 2025, arXiv 2509.04259), and on PRE's continuations of `retention.OPENINGS`; the entropy of x in its
    responses; all per token. And the share of distinct pairs of tokens, responses to a prompt cut to the shortest of them.
    Responses are those that the reward was measured on; what was drawn or computed before is read from the store.
    """
    pre, *others = points
    how = bench.panel.drawing
    asked = [encode_prompt(bench.tokenizer, p, chat=how.chat) for p in bench.panel.prompts_of(pre.part)]
    said = [bench.responses(p) for p in points]
    sets = [[Example(a, y) for a, group in zip(asked, s, strict=True) for y in group] for s in said]
    text = words(bench, len(OPENINGS), with_prompts=False)["text"]
    rows: dict[str, dict[str, Any]] = {
        m: {"measure": m, "unit": "%" if m == DISTINCT else "nats/token", "pre": None}
        for m in (OWN, ANSWERS, TEXT, ENTROPY, DISTINCT)
    }
    together = pre.scores.reward.groups or range(len(asked))  # prompts that are resampled whole
    first, *shares = _distinct_pairs(said, together)
    rows[DISTINCT]["pre"] = _jackknife(first)
    for name, x, own, share in zip(("post", "pick"), others, sets[1:], shares, strict=False):
        wanted = ((x, pre, own), (pre, x, sets[0]), (pre, x, text))
        keys = [_key(bench, *at) for at in wanted]
        works = [
            ({**key, "what": "distance"}, partial(_divergence, bench, key, *at))
            for key, at in zip(keys, wanted, strict=True)
        ]
        forth, back, alone = bench.store.each(works)
        forth, back = (clustered(found.reshape(-1, how.n, 3).sum(1), together) for found in (forth, back))
        for measure, found in ((OWN, forth), (ANSWERS, back), (TEXT, alone)):
            rows[measure][name] = _per_token(found[:, [0, 2]])
        rows[ENTROPY] |= {"pre": _per_token(back[:, 1:]), name: _per_token(forth[:, 1:])}
        rows[ENTROPY][f"{name}_change"] = paired_difference(forth[:, 1:], back[:, 1:], "ratio")._asdict()
        rows[DISTINCT] |= {name: _jackknife(share), f"{name}_change": _jackknife(share - first)}
    return list(rows.values())


def _key(bench: Workbench, p: Point, q: Point, examples: Sequence[Example]) -> dict[str, Any]:
    return {"what": "divergence", "ends": [bench.identity(x) for x in (p, q)], "examples": digest(examples)}


def _divergence(bench: Workbench, key: dict[str, Any], p: Point, q: Point, examples: Sequence[Example]) -> Array:
    """KL(p || q), the entropy of p and tokens of each example, once."""

    def run() -> Any:
        told = bench.stage(f"distance of {p.name} to {q.name}")
        at, batch = [partial(bench.placed, x) for x in (p, q)], bench.panel.drawing.rows
        return divergences(at[0], at[1], examples, batch_size=batch, progress=told).tolist()

    return np.array(bench.store.once(key, run))


def _distinct_pairs(said: Sequence[Sequence[Sequence[tuple[int, ...]]]], together: Sequence[Any]) -> list[Array]:
    """Distinct pairs of tokens of each model in percent, in all and without each prompt, or prompts that go together."""
    shortest = [[min(map(len, same)) for same in zip(*groups, strict=True)] for groups in zip(*said, strict=True)]
    found = []
    for s in said:
        of: dict[Any, list[tuple[int, ...]]] = {}
        for whose, group, most in zip(together, s, shortest, strict=True):
            of.setdefault(whose, []).extend(y[:n] for y, n in zip(group, most, strict=True))
        found.append(100 * distinct(list(of.values())))
    return found


def _jackknife(values: Array) -> dict[str, float] | None:
    value, without = float(values[0]), values[1:]
    half = NORMAL * float(np.sqrt((len(without) - 1) * without.var()))
    return {"value": value, "low": value - half, "high": value + half} if np.isfinite(values).all() else None


def _per_token(sums: Array) -> dict[str, float]:
    found = interval(sums, "ratio")
    return {"value": found.value, "low": max(0.0, found.low), "high": found.high}
