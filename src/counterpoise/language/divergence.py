"""How far two models' next-token distributions are apart on given responses, exactly, over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoise.language.scoring import Example, by_length, score_responses

HELD = 1 << 30
"""Bytes of one model's logits that are held, at most and one batch more, while the other model's are computed."""
WIDE = 1 << 26
"""Numbers of logits that are float32 at once."""


@torch.no_grad()
def divergences(
    first: Callable[[], nn.Module],
    second: Callable[[], nn.Module],
    examples: Sequence[Example],
    *,
    vocabulary: int,
    batch_size: int = 16,
    held: int = HELD,
) -> NDArray[np.float64]:
    """KL(first || second) and the entropy of first in nats, summed over each response's tokens, and how many these are.

    KL = sum_t sum_v p(v | t) (log p(v | t) - log q(v | t)), at a temperature of 1: no sample of the next token, but all of
    the vocabulary. The contexts t are the responses as they are given. The logits of one model are held, in its own dtype,
    chunk by chunk; the next chunk begins with the model that is in place. The numbers do not depend on chunks or batches.

    Args:
        first, second: put a model's weights in place and give it; it may be one model whose weights change.
        vocabulary: words, for the size of a batch.

    Returns:
        shape (examples, 3): KL, entropy, tokens.
    """
    found = np.zeros((len(examples), 3))
    longest = max(len(e.response) for e in examples)
    together = max(1, min(batch_size, WIDE // (longest * vocabulary)))
    batches = list(by_length(examples, together, key=lambda e: len(e.prompt) + len(e.response)))
    ends = [(0, first), (1, second)]
    while batches:
        (number, begin), (_, end) = ends
        model, size, kept = begin(), 0, list[tuple[list[int], Tensor]]()
        while batches and size < held:
            rows = batches.pop(0)
            kept.append((rows, _logits(model, [examples[i] for i in rows])))
            size += kept[-1][1].nbytes
        model = end()
        for rows, logits_NV in kept:
            some = [examples[i] for i in rows]
            two = (logits_NV, _logits(model, some))
            lengths = [len(e.response) for e in some]
            sums = [part.sum(0).tolist() for part in torch.split(_apart(*(two if number == 0 else two[::-1])), lengths)]
            found[rows] = np.column_stack([sums, lengths])
        ends.reverse()
    return found


def _logits(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Before each response token, row by row: shape (tokens, vocabulary), as narrow as loses nothing."""
    scored = score_responses(model, examples)
    wide_NV = scored.logits_BCV[scored.mask_BC]
    own_NV = wide_NV.to(next(model.parameters()).dtype)
    return own_NV if torch.equal(own_NV.to(wide_NV.dtype), wide_NV) else wide_NV


def _apart(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) and the entropy of p from logits, token by token: shape (tokens, 2); words without probability add 0."""
    rows = []
    for p_nV, q_nV in zip(*(torch.split(x, max(1, WIDE // x.shape[1])) for x in (p_NV, q_NV)), strict=True):
        logp, logq = (torch.log_softmax(x if x.dtype == torch.float64 else x.float(), -1) for x in (p_nV, q_nV))
        p = logp.exp()
        terms = (torch.where(p > 0, p * x, 0.0).sum(-1, dtype=torch.float64) for x in (logp - logq, -logp))
        rows.append(torch.stack(list(terms), 1))
    return torch.cat(rows).cpu()


def distinct(responses: Sequence[Sequence[Sequence[int]]], n: int = 2) -> NDArray[np.float64]:
    """Distinct n-grams among all n-grams of some responses (Li et al. 2016), first of all and then without each prompt.

    Longer texts repeat more: compare models on responses cut to one length. What it is without each prompt is for the
    jackknife.

    Args:
        responses: token ids, some responses to each prompt.

    Returns:
        shape (1 + prompts,); NaN where there is no n-gram.

    >>> distinct([[[1, 2, 3]], [[1, 2, 4]]])
    array([0.75, 1.  , 1.  ])
    """
    owner: dict[tuple[int, ...], int] = {}
    totals, alone = np.zeros(len(responses)), np.zeros(len(responses))
    for i, group in enumerate(responses):
        grams = [tuple(r[k : k + n]) for r in group for k in range(len(r) - n + 1)]
        totals[i] = len(grams)
        owner |= {g: -1 if g in owner else i for g in set(grams)}
    for i in owner.values():
        alone[i] += i >= 0
    whole = np.append(0.0, totals)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((len(owner) - np.append(0.0, alone)) / (totals.sum() - whole))
