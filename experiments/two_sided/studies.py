"""Smaller questions: how few sequences a search needs, which openings, how noisy the reward's own gradient is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from curves import Curves

from counterpoise.averaging.partition import thirds
from counterpoise.evaluation.rewards import draw_rated
from counterpoise.language.scoring import Example
from counterpoise.records import digest
from counterpoise.search.both_sides import BothSides, cut_key
from counterpoise.search.on_bench import examples_of, words
from counterpoise.search.proxies import ProxySet, best_responses
from counterpoise.search.retention import OPENINGS
from counterpoise.search.sides import Scale
from counterpoise.search.two_sided import Found

SIZES = (8, 16, 32, 64, 128, 256)
CONTINUED = {
    "openings and prompts": (OPENINGS, True),
    "openings alone": (OPENINGS, False),
    "prompts alone": ((), True),
    "other openings": (tuple(f"{o} " for o in ("I", "You", "They", "This", "What", "Why", "No", "Yes")), True),
    "nothing": (("",), False),
}


def elsewhere(curves: Curves, size: int) -> tuple[list[Example], list[Example]]:
    """Good responses and PRE's words that no search saw: other random draws, other prompts where there are enough."""
    bench, panel = curves.bench, curves.bench.panel

    def draw() -> list[Example]:
        prompts = panel.prompts_of("proxy")[-max(1, round(size / 0.8)) :]
        drawing = panel.draws(n=2, temperature=1.0, seed=panel.drawing.seed + 77)
        rated = draw_rated(bench.model_at(1.0), bench.tokenizer, prompts, panel.reward, drawing)
        return best_responses(rated, size, keep=0.4, seed=drawing.seed)

    key = {"what": "other-proxies", "model": bench.inputs, "panel": panel.fingerprint, "size": size}
    return examples_of(bench.store.once(key, draw)), [e for rows in words(bench, size, seed=77).values() for e in rows]


def scaled_on(
    search: BothSides, found: Found, alignment: Sequence[Example], retention: Sequence[Example]
) -> dict[str, float]:
    """Imitation and retention on other examples, scaled by their own ends: what over-fitting is seen by."""
    bench, cut = search.bench, search.cut

    def run() -> dict[str, float]:
        values = {}
        for name, examples, best in (("alignment", alignment, 1.0), ("retention", retention, 0.0)):
            objective = ProxySet(tuple(examples), search.batch)
            at = []
            for ratios in (np.full(len(cut), best), np.full(len(cut), 1 - best), np.array(found.ratios)):
                bench.resident.set(cut, ratios)
                at.append(objective.nll(bench.resident.model))
            scale = Scale.between(at[0], at[1], name)
            values[name] = (at[2] - scale.best) / scale.gap
        return values

    key = {"what": "elsewhere", "model": bench.inputs, "cut": cut_key(cut), "batch": search.batch}
    data = {"ratios": list(found.ratios), "examples": digest([list(alignment), list(retention)])}
    return dict(bench.store.once({**key, **data}, run))


def sizes(
    curves: Curves, of: tuple[int, ...], test: int, searches: tuple[str, ...] = ("path", "exact"), weight: float = 1.0
) -> Iterator[dict[str, Any]]:
    """The objective of ratios found with few sequences, on the sequences they were found with and on others."""
    good, said = elsewhere(curves, test)
    for size in of:
        for cut in (thirds(curves.bench.pair.names).with_rest_block(), curves.wide):
            search = BothSides(curves.bench, cut, size=size)
            for how in searches:
                found = (
                    search.path([weight])
                    if how == "path"
                    else search.exact([weight], max_passes=curves.settings.max_passes)
                )[0]
                seen = search.truth([found])[0]
                values = scaled_on(search, found, good, said)
                yield {
                    "size": size,
                    "blocks": cut.name,
                    "how": how,
                    "lambda": weight,
                    "ratios": list(found.ratios),
                    "seen": seen["alignment"] + weight * sum(seen["retention"].values()),
                    "elsewhere": values["alignment"] + weight * values["retention"],
                    "sides": values,
                }


def openings(curves: Curves, test: int, weight: float = 1.0) -> Iterator[dict[str, Any]]:
    """The same for other words of PRE, with the default's ratios as the measure of distance."""
    good, said = elsewhere(curves, test)
    base = np.array(curves.search().path([weight])[0].ratios)
    for name, (texts, with_prompts) in CONTINUED.items():
        search = curves.search(openings=texts, with_prompts=with_prompts)
        found = search.path([weight])[0]
        values = scaled_on(search, found, good, said)
        yield {
            "continued": name,
            "lambda": weight,
            "ratios": list(found.ratios),
            "distance": float(np.abs(np.array(found.ratios) - base).mean()),
            "elsewhere": values["alignment"] + weight * values["retention"],
            "sides": values,
        }


def noise(curves: Curves) -> dict[str, Any]:
    """Standard errors of the reward's slopes along the diagonal, and what the neighbours were worth."""
    search = curves.search(form="reward")
    slopes = search.measured["alignment"]
    gap = search.diagonal.alignment_scale.gap
    gradients, errors = np.array(slopes["gradients"]) / gap, np.array(slopes["errors"]) / gap
    return {
        "responses_per_point": search.size // search.n * search.n,
        "slope": float(np.abs(gradients).mean()),
        "standard_error": float(errors.mean()),
        "clear": float((np.abs(gradients) > 1.96 * errors).mean()),
        "total_slope": gradients.sum(1).tolist(),
        "neighbours": search.measured["neighbours"],
    }
