"""What a search takes from a workbench, made once and kept in its store: proxies, ratios, what PRE and POST say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from counterpoise.averaging.partition import Partition
from counterpoise.evaluation.items import FileAbility
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.scoring import Example
from counterpoise.records import digest
from counterpoise.search.descent import SearchResult
from counterpoise.search.hma import hma
from counterpoise.search.proxies import ProxySet, Rated, draw_proxies, draw_rated
from counterpoise.search.retention import OPENINGS, calibration, draw_retention


def proxies(bench: Workbench, size: int, *, n: int = 2, keep: float = 0.4) -> list[Example]:
    """Good responses of POST to the proxy prompts; see `draw_proxies`."""
    panel, drawing = bench.panel, bench.panel.draws(n=n, seed=bench.panel.drawing.seed + 1)
    prompts = panel.prompts_of("proxy")[: math.ceil(size / (n * keep))]
    kept: dict[str, Any] = {"size": size, "keep": keep}

    def draw() -> list[Any]:
        bench.resident.set(bench.whole, [1.0])
        model, progress = bench.resident.model, bench.stage("drawing proxies from POST")
        drawn = draw_proxies(model, bench.tokenizer, prompts, panel.reward, drawing, **kept, progress=progress)
        return [list(map(list, e)) for e in drawn]

    key = {"what": "proxies", "model": bench.inputs, "prompts": [p.key for p in prompts], "reward": panel.reward_id}
    return list(map(_example, bench.store.once({**key, **kept, **drawing.decides}, draw)))


def hma_ratios(
    bench: Workbench, cut: Partition, proxies: list[Example], mean: float, *, max_passes: int = 12
) -> SearchResult:
    """HMA's ratios at a mean, searched once."""
    batch = max(1, bench.panel.drawing.batch_size // 2)

    def run() -> dict[str, Any]:
        progress = bench.stage(f"searching ratios, mean {mean:g}")
        found = hma(
            bench.resident,
            cut,
            ProxySet(tuple(proxies), batch).backward,
            mean,
            max_passes=max_passes,
            progress=progress,
        )
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
    kept = bench.store.once(key, run)
    return SearchResult(tuple(kept["ratios"]), kept["value"], tuple(kept["trace"]), kept["converged"])


def words(
    bench: Workbench, size: int, *, openings: Sequence[str] = OPENINGS, with_prompts: bool = True, seed: int = 2
) -> dict[str, list[Example]]:
    """PRE's own continuations of openings and responses to proxy prompts; see `draw_retention`.

    Args:
        seed: added to the panel's: other draws of the same kind.
    """
    drawing = bench.panel.draws(temperature=1.0, seed=bench.panel.drawing.seed + seed)
    prompts = bench.panel.prompts_of("proxy")[:size] if with_prompts else []

    def draw() -> dict[str, Any]:
        bench.resident.set(bench.whole, [0.0])
        model, progress = bench.resident.model, bench.stage("drawing from PRE")
        texts: dict[str, Any] = {"size": size, "openings": openings, "prompts": prompts}
        drawn = draw_retention(model, bench.tokenizer, drawing, **texts, progress=progress)
        return {name: [list(map(list, e)) for e in rows] for name, rows in drawn.items()}

    key = {"what": "retention", "model": bench.inputs, "openings": list(openings), "prompts": [p.key for p in prompts]}
    decides = {name: drawing.decides[name] for name in ("max_new_tokens", "chat", "seed")}
    kept = bench.store.once({**key, "size": size, **decides}, draw)
    return {name: list(map(_example, rows)) for name, rows in kept.items()}


def ratings(bench: Workbench, size: int, n: int) -> list[Rated]:
    """Rated responses of POST and of PRE to the same proxy prompts, `size` in all: both ends of a contrast."""
    panel, drawing = bench.panel, bench.panel.draws(n=n, seed=bench.panel.drawing.seed + 1)
    prompts = panel.prompts_of("proxy")[: max(1, size // (2 * n))]

    def draw(end: float) -> dict[str, Any]:
        bench.resident.set(bench.whole, [end])
        model, progress = bench.resident.model, bench.stage(f"drawing responses of {'POST' if end else 'PRE'}")
        rated = draw_rated(model, bench.tokenizer, prompts, panel.reward, drawing, progress=progress)
        return {"examples": [list(map(list, e)) for e in rated.examples], "rewards": rated.rewards.tolist()}

    key = {"what": "rated", "model": bench.inputs, "prompts": [p.key for p in prompts], "reward": panel.reward_id}
    key |= drawing.decides
    kept = [bench.store.once({**key, "end": end}, lambda end=end: draw(end)) for end in (1.0, 0.0)]  # type: ignore[misc]
    return [Rated(tuple(map(_example, k["examples"])), np.array(k["rewards"])) for k in kept]


def answers(bench: Workbench, count: int) -> dict[str, list[Example]]:
    """Right answers of validation items of every ability that has a file; see `calibration`."""
    return {
        a.name: calibration(a, bench.tokenizer, limit=count)
        for a in bench.panel.abilities
        if isinstance(a, FileAbility)
    }


def _example(stored: Sequence[Sequence[int]]) -> Example:
    prompt, response = stored
    return Example(tuple(prompt), tuple(response))
