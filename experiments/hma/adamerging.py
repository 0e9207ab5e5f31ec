"""AdaMerging-style ratios: per block, free of any mean, found on validation data of what the model should do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoise.averaging.partition import Partition
from counterpoise.averaging.resident import Objective, ResidentAverage
from counterpoise.language.scoring import Example, by_length, response_tokens
from counterpoise.search.descent import SearchResult, spectral_descent


def adamerging(
    resident: ResidentAverage,
    partition: Partition,
    objective: Objective,
    *,
    start: float | NDArray[np.float64] = 0.5,
    upper: float = 1.0,
    max_passes: int = 20,
    tolerance: float = 3e-4,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Minimise a loss on validation data over r subject to 0 <= r_k <= upper.

    Yang et al. 2024 (AdaMerging, arXiv 2310.02575), equation 6: layer-wise coefficients that minimise the entropy of the
    merged model's predictions on unlabelled test data. It departs from the paper: one update instead of one a task; the
    objective is any loss, so that labelled data can be used (`ProxySet.backward` over prompts with the answers wanted)
    as well as entropy (`EntropySet.backward`); a box and projected spectral gradient steps in place of Adam over sampled
    batches. Unlike HMA nothing holds the mean: an objective that sees the alignment alone ends near `upper`, so mix what
    must be kept into it. What it is given must be validation data, not what is reported on.

    Args:
        objective: a deterministic loss over fixed data.
        start: first point, one ratio for all blocks or one each.
        upper: the largest ratio; above 1 extrapolates.
        tolerance: stop when the next step promises less than this.

    Raises:
        ValueError: a start outside the box.

    >>> adamerging(resident, thirds(resident.pair.names), labelled.backward).ratios  # doctest: +SKIP
    """
    begin = np.broadcast_to(np.asarray(start, dtype=np.float64), len(partition)).copy()
    if not ((begin >= 0) & (begin <= upper)).all():
        raise ValueError(f"start: expected ratios in [0, {upper:g}], found {begin.tolist()}")
    return spectral_descent(
        lambda ratios: resident.loss_and_gradient(partition, ratios, objective),
        begin,
        lambda y: np.clip(y, 0.0, upper),
        partition.weights,
        max_passes=max_passes,
        tolerance=tolerance,
        progress=progress,
    )


@dataclass(frozen=True)
class EntropySet:
    """A fixed set of texts without labels: the mean entropy of the next-token distribution over their tokens, in nats.

    Attributes:
        examples: the entropy is taken where `response` is predicted; `prompt` must not be empty.
        batch_size: examples run at once; the value does not depend on it.
    """

    examples: tuple[Example, ...]
    batch_size: int = 8

    def backward(self, model: nn.Module) -> float:
        """The objective at the model's weights, its gradient accumulated in the parameters: an `Objective`."""
        tokens, total = response_tokens(self.examples), 0.0
        for rows in by_length(self.examples, self.batch_size, key=lambda e: len(e.prompt) + len(e.response)):
            entropy = token_entropy(model, [self.examples[i] for i in rows])
            (entropy / tokens).backward()  # type: ignore[no-untyped-call]
            total += entropy.item()
        return total / tokens


def token_entropy(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """-sum_v p(v) log p(v) summed over the response tokens of one batch, in nats: a differentiable scalar."""
    rows = [e.prompt + e.response for e in examples]
    longest, device = max(map(len, rows)), next(model.parameters()).device
    # Padded on the right: a causal model's real tokens never see what comes after them.
    ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    place_T = torch.arange(longest, device=device)
    first = torch.tensor([len(e.prompt) - 1 for e in examples], device=device)[:, None]
    stop = torch.tensor([len(row) - 1 for row in rows], device=device)[:, None]
    chosen_NV = logits_BTV[(place_T >= first) & (place_T < stop)]
    logp_NV = (chosen_NV if chosen_NV.dtype == torch.float64 else chosen_NV.float()).log_softmax(-1)
    entropy: Tensor = -(logp_NV.exp() * logp_NV).sum()
    return entropy
