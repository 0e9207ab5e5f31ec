"""Where a model lies beside the line between PRE and POST."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from counterpoise.checkpoints.preflight import Buffers, Pair, stretches
from counterpoise.checkpoints.rounding import wide_dtype


class Beside(NamedTuple):
    """A model beside the segment from PRE to POST.

    Attributes:
        nearest: the ratio of the nearest plain average, from 0 to 1.
        distance: |model - that average| as a share of |POST - PRE|.
        spread: the same with a ratio of its own for every tensor, and without what rounding explains; 0 for an average.
    """

    nearest: float
    distance: float
    spread: float

    def told(self) -> dict[str, float | None]:
        """As json holds it: None where PRE and POST are one model, from which nothing has a share."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def beside(pair: Pair, model: Pair) -> Beside:
    """Read PRE, POST and a model once; the pairs are those of PRE with POST and of PRE with the model."""
    there = {model.elsewhere.get(name, name): name for name in model.names}
    buffers, along, update, moved, spread = Buffers(), 0.0, 0.0, 0.0, 0.0
    for name in pair.names:
        if (own := pair.elsewhere.get(name, name)) not in there or not pair.post.dtype(name).is_floating_point:
            continue
        pre, post = pair.tensors(name)
        wide, ulp = wide_dtype(pre, post), torch.finfo(post.dtype).eps
        a, u, m, rounding = 0.0, 0.0, 0.0, 0.0
        for _, (p, q, s) in stretches(pre, post, model.post[there[own]]):
            step, gap, size = (buffers[wide, i][: len(p)] for i in range(3))
            step.copy_(q).sub_(size.copy_(p))
            gap.copy_(s).sub_(size)
            a, u, m = a + float(torch.dot(gap, step)), u + float(torch.dot(step, step)), m + float(torch.dot(gap, gap))
            rounding += float(torch.dot(size, size)) * ulp**2
        along, update, moved = along + a, update + u, moved + m
        spread += max(0.0, m - (a * a / u if u else 0.0) - 2 * rounding)
    if not update:
        return Beside(0.0, math.inf if moved else 0.0, math.inf if moved else 0.0)
    nearest = min(1.0, max(0.0, along / update))
    off = max(0.0, moved - 2 * nearest * along + nearest**2 * update)
    return Beside(nearest, math.sqrt(off / update), math.sqrt(spread / update))
