"""How far two models' next-token distributions are apart on given responses, exactly, and how varied responses are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoise.language.chunks import widened
from counterpoise.language.scoring import Example, by_length, score_responses
from counterpoise.records import Progress

HELD = 1 << 30
"""Bytes of one model's logits that are held, and one batch more, while the other model's are computed."""
WIDE = 1 << 26
"""Logits that are float32 at once."""


@torch.no_grad()
def divergences(
    first: Callable[[], nn.Module],
    second: Callable[[], nn.Module],
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    held: int = HELD,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """KL(first || second) and the entropy of first in nats, summed over each response's tokens, and how many these are.

    KL = sum_t sum_v p(v | t) (log p(v | t) - log q(v | t)) over the whole vocabulary, at a temperature of 1; the contexts t
    are the responses as they are given. The logits of one model are held in its own dtype, chunk by chunk, and the next chunk
    begins with the model that is in place. The numbers depend on neither chunks nor batches.

    Args:
        first, second: put a model's weights in place and give it; it may be one model whose weights change.

    Returns:
        shape (examples, 3): KL, entropy, tokens.
    """
    found, ends, done = np.zeros((len(examples), 3)), [(0, first), (1, second)], 0
    model = first()
    words: int = model.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
    together = max(1, min(batch_size, WIDE // (words * max(len(e.response) for e in examples))))
    batches = list(by_length(examples, together, key=lambda e: len(e.prompt) + len(e.response)))
    while done < len(batches):
        kept, (number, begin), (_, end) = list[Tensor](), *ends
        model = begin()
        while done + len(kept) < len(batches) and sum(x.nbytes for x in kept) < held:
            kept.append(_logits(model, [examples[i] for i in batches[done + len(kept)]]))
        del model  # where it is not one whose weights change, one is in memory
        model = end()
        for rows, logits_NV in zip(batches[done:], kept, strict=False):
            some = [examples[i] for i in rows]
            both = (logits_NV, _logits(model, some))
            lengths = [len(e.response) for e in some]
            each = torch.split(_apart(*both[:: -1 if number else 1]), lengths)
            found[rows] = [[*part.sum(0).tolist(), len(part)] for part in each]
        done += len(kept)
        ends.reverse()
        if progress is not None:
            progress(done, len(batches))
    return found


def _logits(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Before each response token, row by row: shape (tokens, vocabulary), as narrow as loses nothing."""
    scored = score_responses(model, examples)
    given_NV = scored.logits_BCV[scored.mask_BC]
    own_NV = given_NV.to(next(model.parameters()).dtype)
    return own_NV if torch.equal(own_NV.to(given_NV.dtype), given_NV) else given_NV


def _apart(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) and the entropy of p from logits, token by token: shape (tokens, 2); words without probability add 0."""
    rows = []
    for both in zip(*(torch.split(x, max(1, WIDE // x.shape[1])) for x in (p_NV, q_NV)), strict=True):
        logp, logq = (torch.log_softmax(widened(x), -1) for x in both)
        p = logp.exp()
        terms = [torch.where(p > 0, p * x, 0.0).sum(-1, dtype=torch.float64) for x in (logp - logq, -logp)]
        rows.append(torch.stack(terms, 1))
    return torch.cat(rows).cpu()


def distinct(responses: Sequence[Sequence[Sequence[int]]], n: int = 2) -> NDArray[np.float64]:
    """Distinct n-grams among all n-grams of some responses (Li et al. 2016): of all, and without each prompt.

    Longer texts repeat more: compare models on responses cut to one length. The rest is for the jackknife.

    Args:
        responses: token ids, some responses to each prompt.

    Returns:
        shape (1 + prompts,); NaN where there is no n-gram.

    >>> distinct([[[1, 2, 3]], [[1, 2, 4]]])
    array([0.75, 1.  , 1.  ])
    """
    owner: dict[tuple[int, ...], int] = {}
    totals, alone = np.zeros((2, 1 + len(responses)))
    for i, group in enumerate(responses, start=1):
        grams = [tuple(r[k : k + n]) for r in group for k in range(len(r) - n + 1)]
        totals[i] = len(grams)
        owner |= {g: -1 if g in owner else i for g in set(grams)}
    for i in owner.values():
        alone[i] += i > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((len(owner) - alone) / (totals.sum() - totals))
