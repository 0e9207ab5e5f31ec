"""TIES and DARE written anew in numpy, dense and float64, straight from the papers: what the streaming code must equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def largest(update: Array, density: float) -> NDArray[np.bool_]:
    """Mask of the k largest magnitudes, earlier ones first among equals."""
    flat = np.abs(update.ravel()).astype(np.float32)
    order = np.argsort(-flat, kind="stable")
    mask = np.zeros(flat.size, dtype=bool)
    mask[order[: max(1, int(density * flat.size))]] = True
    return mask.reshape(update.shape)


def disjoint(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    """Steps 2 and 3 of TIES, element by element."""
    result = np.zeros_like(updates[0])
    for place in np.ndindex(result.shape):
        values = [(w, u[place]) for w, u in zip(weights, updates, strict=True)]
        elected = np.sign(sum(w * u for w, u in values))
        agreeing = [(w, u) for w, u in values if u != 0 and np.sign(u) == elected]
        if agreeing:
            result[place] = sum(w * u for w, u in agreeing) / sum(w for w, _ in agreeing)
    return result


def elected_plus(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    """The same as mergekit has it: where the sum is exactly zero, plus is elected."""
    parts = [w * u for w, u in zip(weights, updates, strict=True)]
    sign = np.where(sum(parts) >= 0, 1.0, -1.0)
    agrees = [np.sign(part) == sign for part in parts]
    by = sum(mask * w for mask, w in zip(agrees, weights, strict=True))
    return sum(part * mask for part, mask in zip(parts, agrees, strict=True)) / np.where(by == 0, 1.0, by)


def ties(
    pre: dict[str, Array], posts: Sequence[dict[str, Array]], density: float, ratio: float, weights: Sequence[float],
    scope: str,
) -> dict[str, Array]:  # fmt: skip
    """The merged model; tensors are ranked in the order of `pre`."""
    updates = [{n: post[n] - pre[n] for n in pre} for post in posts]
    trimmed = []
    for update in updates:
        if scope == "tensor":
            masks = {n: largest(u, density) for n, u in update.items()}
        else:
            whole = largest(np.concatenate([u.ravel() for u in update.values()]), density)
            cuts = np.cumsum([u.size for u in update.values()])[:-1]
            masks = {n: m.reshape(pre[n].shape) for n, m in zip(update, np.split(whole, cuts), strict=True)}
        trimmed.append({n: u * masks[n] for n, u in update.items()})
    return {n: pre[n] + ratio * disjoint([t[n] for t in trimmed], weights) for n in pre}
