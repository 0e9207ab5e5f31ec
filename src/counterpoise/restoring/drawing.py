"""What PRE and POST say, drawn once on a workbench: the data of a two-sided search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from counterpoise.evaluation.abilities import FileAbility
from counterpoise.language.scoring import Example
from counterpoise.restoring.workbench import Workbench
from counterpoise.search.proxies import Rated, draw_rated
from counterpoise.search.retention import OPENINGS, calibration, draw_retention


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
