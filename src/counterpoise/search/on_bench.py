"""What a search takes from a workbench, made once and kept in its store: proxies, ratios, what PRE and POST say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from counterpoise.averaging.partition import Partition
from counterpoise.evaluation.abilities import FileAbility
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.scoring import Example
from counterpoise.records import digest
from counterpoise.search.descent import SearchResult
from counterpoise.search.hma import hma
from counterpoise.search.proxies import ProxySet, Rated, draw_proxies, draw_rated
from counterpoise.search.retention import OPENINGS, calibration, draw_retention


def proxies(bench: Workbench, size: int, *, n: int = 2, keep: float = 0.4) -> list[Example]:
    """Good responses of POST to the proxy prompts; see `draw_proxies`."""
    prompts = bench.panel.prompts_of("proxy")[: math.ceil(size / (n * keep))]
    drawing: dict[str, Any] = {
        "n": n,
        "keep": keep,
        "size": size,
        "max_new_tokens": bench.panel.max_new_tokens,
        "temperature": bench.panel.temperature,
        "chat": bench.panel.chat,
        "seed": bench.panel.seed + 1,
    }

    def draw() -> list[Any]:
        bench.resident.set(bench.whole, [1.0])
        return [
            list(map(list, e))
            for e in draw_proxies(
                bench.resident.model,
                bench.tokenizer,
                prompts,
                bench.panel.reward,
                batch_size=4 * bench.panel.batch_size,
                progress=bench.stage("drawing proxies from POST"),
                **drawing,
            )
        ]

    key = {
        "what": "proxies",
        "model": bench.inputs,
        "prompts": [p.key for p in prompts],
        "reward": bench.panel.reward_id,
        **drawing,
    }
    return [Example(tuple(prompt), tuple(response)) for prompt, response in bench.store.once(key, draw)]


def hma_ratios(
    bench: Workbench, cut: Partition, proxies: list[Example], mean: float, *, max_passes: int = 12
) -> SearchResult:
    """HMA's ratios at a mean, searched once."""
    batch = max(1, bench.panel.batch_size // 2)

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
    panel = bench.panel
    prompts = panel.prompts_of("proxy")[:size] if with_prompts else []
    drawing: dict[str, Any] = {
        "size": size,
        "max_new_tokens": panel.max_new_tokens,
        "chat": panel.chat,
        "seed": panel.seed + seed,
    }

    def draw() -> dict[str, Any]:
        bench.resident.set(bench.whole, [0.0])
        return {
            name: [list(map(list, e)) for e in rows]
            for name, rows in draw_retention(
                bench.resident.model,
                bench.tokenizer,
                openings=openings,
                prompts=prompts,
                batch_size=4 * panel.batch_size,
                progress=bench.stage("drawing from PRE"),
                **drawing,
            ).items()
        }

    key = {
        "what": "retention",
        "model": bench.inputs,
        "openings": list(openings),
        "prompts": [p.key for p in prompts],
        **drawing,
    }
    return {name: list(map(_example, rows)) for name, rows in bench.store.once(key, draw).items()}


def ratings(bench: Workbench, size: int, n: int) -> list[Rated]:
    """Rated responses of POST and of PRE to the same proxy prompts, `size` in all: both ends of a contrast."""
    panel = bench.panel
    prompts = panel.prompts_of("proxy")[: max(1, size // (2 * n))]
    drawing: dict[str, Any] = {
        "n": n,
        "max_new_tokens": panel.max_new_tokens,
        "temperature": panel.temperature,
        "chat": panel.chat,
        "seed": panel.seed + 1,
    }

    def draw(end: float) -> dict[str, Any]:
        bench.resident.set(bench.whole, [end])
        rated = draw_rated(
            bench.resident.model,
            bench.tokenizer,
            prompts,
            panel.reward,
            batch_size=4 * panel.batch_size,
            progress=bench.stage(f"drawing responses of {'POST' if end else 'PRE'}"),
            **drawing,
        )
        return {"examples": [list(map(list, e)) for e in rated.examples], "rewards": rated.rewards.tolist()}

    key = {
        "what": "rated",
        "model": bench.inputs,
        "prompts": [p.key for p in prompts],
        "reward": panel.reward_id,
        **drawing,
    }
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
