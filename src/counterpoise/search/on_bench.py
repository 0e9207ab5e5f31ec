"""What a search takes from a workbench, made once and kept in its store: proxies, ratios, what PRE and POST say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from counterpoise.averaging.partition import Partition
from counterpoise.evaluation.items import FileAbility
from counterpoise.evaluation.rewards import draw_rated
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.scoring import Example
from counterpoise.records import digest
from counterpoise.search.descent import SearchResult
from counterpoise.search.hma import hma
from counterpoise.search.proxies import ProxySet, best_responses
from counterpoise.search.retention import OPENINGS, calibration, draw_retention

KEPT, REPLIES = 0.4, 2
"""The share of the responses that are proxies, and how many each proxy prompt is asked for."""


def proxies_of(size: int, prompts: float = math.inf) -> tuple[int, int]:
    """How many prompts are asked for so many proxies, where there are so many, and how many proxies come of it.

    >>> proxies_of(256), proxies_of(256, 100)
    ((320, 256), (100, 80))
    """
    asked = int(min(math.ceil(size / (REPLIES * KEPT)), prompts))
    return asked, min(size, max(1, round(KEPT * (REPLIES * asked))))


def proxies(bench: Workbench, size: int) -> list[Example]:
    """Good responses of POST, the best 40 % of two to each proxy prompt; see `best_responses`."""
    panel, keep, n = bench.panel, KEPT, REPLIES
    drawing = panel.draws(n=n, seed=panel.drawing.seed + 1)
    prompts = panel.prompts_of("proxy")[: proxies_of(size)[0]]

    def draw() -> list[Example]:
        model, progress = bench.model_at(1.0), bench.stage("drawing proxies from POST")
        rated = draw_rated(model, bench.tokenizer, prompts, panel.reward, drawing, progress=progress)
        return best_responses(rated, size, keep=keep, seed=drawing.seed)

    key = {"what": "proxies", "model": bench.inputs, "prompts": [p.key for p in prompts], "reward": panel.reward_id}
    return examples_of(bench.store.together({**key, "size": size, "keep": keep, **drawing.decides}, draw))


def hma_ratios(
    bench: Workbench, cut: Partition, proxies: list[Example], mean: float, *, max_passes: int = 12
) -> SearchResult:
    """HMA's ratios at a mean, searched once."""
    batch = max(1, bench.panel.drawing.batch_size // 2)

    def run() -> dict[str, Any]:
        progress, loss = bench.stage(f"searching ratios, mean {mean:g}"), ProxySet(tuple(proxies), batch).terms
        found = hma(bench.resident, cut, loss, mean, max_passes=max_passes, progress=progress)
        if progress is not None:  # it may converge before max_passes
            progress(found.passes, found.passes)
        return {"ratios": found.ratios, "value": found.value, "trace": found.trace, "converged": found.converged}

    key = {
        "what": "search",
        "model": bench.inputs,
        "proxies": digest(proxies),
        "mean": mean,
        "passes": max_passes,
        "batch": batch,
        "cut": [[b.weight, *b.tensors] for b in cut.blocks],
        "rest": cut.rest,
    }
    kept = bench.store.together(key, run)
    return SearchResult(tuple(kept["ratios"]), kept["value"], tuple(kept["trace"]), kept["converged"])


def words(
    bench: Workbench, size: int, *, openings: Sequence[str] = OPENINGS, with_prompts: bool = True, seed: int = 2
) -> dict[str, list[Example]]:
    """PRE's own continuations of openings and responses to proxy prompts; another `seed` gives other draws of them."""
    drawing = bench.panel.draws(temperature=1.0, seed=bench.panel.drawing.seed + seed)
    prompts = bench.panel.prompts_of("proxy")[:size] if with_prompts else []

    def draw() -> dict[str, list[Example]]:
        model, progress = bench.model_at(0.0), bench.stage("drawing from PRE")
        texts: dict[str, Any] = {"size": size, "openings": openings, "prompts": prompts}
        return draw_retention(model, bench.tokenizer, drawing, **texts, progress=progress)

    key = {"what": "retention", "model": bench.inputs, "openings": list(openings), "prompts": [p.key for p in prompts]}
    decides = {name: drawing.decides[name] for name in ("max_new_tokens", "chat", "seed")}
    kept = bench.store.together({**key, "size": size, **decides}, draw)
    return {t: examples_of(rows) for t, rows in kept.items()}


def answers(bench: Workbench, count: int) -> dict[str, list[Example]]:
    """Right answers of validation items of every ability that has a file; see `calibration`."""
    files = [a for a in bench.panel.abilities if isinstance(a, FileAbility)]
    return {a.name: calibration(a, bench.tokenizer, limit=count) for a in files}


def examples_of(stored: Iterable[Sequence[Sequence[int]]]) -> list[Example]:
    """Examples as they come out of a store."""
    return [Example(tuple(prompt), tuple(response)) for prompt, response in stored]
