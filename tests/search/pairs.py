"""A tiny pair in float64 with what each side of it says: the smallest thing the two-sided search can work on."""

from __future__ import annotations

from pathlib import Path

import torch

from counterpoise.averaging.partition import Partition, layerwise
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.preflight import preflight
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example
from tiny import save_pair, tokenizer


def resident(folder: Path, *, scale: float = 0.06) -> tuple[ResidentAverage, Partition]:
    """The pair in memory, and one block a layer."""
    pair = preflight(*save_pair(folder, dtype=torch.float64, scale=scale))
    return ResidentAverage(pair), layerwise(pair.names)


def said(model: ResidentAverage, cut: Partition, ratio: float, *, count: int = 16, seed: int = 0) -> list[Example]:
    """What the average at one ratio says to short prompts."""
    model.set(cut, [ratio] * len(cut))
    prompts = [tuple(range(4 + i, 7 + i)) for i in range(count)]
    drawn = sample(model.model, tokenizer(), prompts, Drawing(max_new_tokens=6, seed=seed))
    return [Example(p, group[0]) for p, group in zip(prompts, drawn, strict=True)]
