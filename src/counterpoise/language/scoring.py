"""Log-probabilities of given tokens: of continuations that share a context, and of responses, differentiably.

Rows are padded in front and a context's cache is shared where that changes nothing for the model at hand, which is
measured once (`ways.py`); else padding stands behind, where a causal model does not see it, and nothing is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoise.language.chunks import token_logprobs
from counterpoise.language.engine import Engine, LanguageModel
from counterpoise.language.footprints import scoring_bytes
from counterpoise.language.memory import Rows, as_fits, free_beside, rows_that_fit
from counterpoise.language.shapes import Items, shape_of
from counterpoise.language.ways import Plain, asking, context_of, probes, remembered, warn_of

T = TypeVar("T")


class Example(NamedTuple):
    """A prompt and a response as token ids; losses count the response alone."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@torch.no_grad()
def continuation_logprobs(
    model: LanguageModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: Rows = 16,
) -> list[list[float]]:
    """Summed log-probability, in nats, of each continuation of each context.

    The context of an item is run once and its cache shared by the item's continuations, so that four choices cost
    little more than one; where the model's cache cannot be shared, each pair is run. Attention is causal, so the numbers
    are those of scoring each pair on its own.

    Args:
        contexts: token ids, at least one each.
        continuations: for each context, one or more token sequences, at least one token each.
        batch_size: contexts run at once; "auto": as many as fit (`memory.rows_that_fit`); an engine chooses itself.
    """
    if any(not context for context in contexts) or any(not c for group in continuations for c in group):
        raise ValueError("continuation_logprobs: expected at least one token in every context and continuation")
    longest = [len(c) + max(map(len, group)) for c, group in zip(contexts, continuations, strict=True)]
    refuse_too_long(model, longest, 0)
    if isinstance(model, Engine):
        return model.score(contexts, continuations)
    shared = way_of(model).shares
    scores: list[list[float]] = [[] for _ in contexts]
    was_training = model.training
    model.eval()
    if batch_size == "auto":
        batch_size = _rows_that_fit(model, contexts, continuations, shared)
    # Items of one batch need equally many continuations, for the cache to be repeated row by row.
    for rows in by_length(range(len(contexts)), batch_size, key=lambda i: (len(continuations[i]), longest[i])):
        for _, group in groupby(rows, key=lambda i: len(continuations[i])):
            together = list(group)
            group_of = _score_group if shared else _score_pairs

            def scored(some: Sequence[int], of: Any = group_of) -> list[list[float]]:
                return of(model, [contexts[i] for i in some], [continuations[i] for i in some]).tolist()  # type: ignore[no-any-return]

            for i, values in zip(together, as_fits(model, "scoring", together, scored), strict=True):
                scores[i] = values
    model.train(was_training)
    return scores


def _rows_that_fit(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    shared: bool,
) -> int:
    """As many contexts as fit now, all of them as the longest."""
    choices = max(map(len, continuations), default=1)
    sizes = max(map(len, contexts), default=1), choices, max((len(c) for of in continuations for c in of), default=1)
    need = partial(scoring_bytes, remembered(model, "shape", shape_of), Items("", 1, *sizes, shared=shared))
    size = next(model.parameters()).dtype.itemsize
    return rows_that_fit("auto", lambda rows: need(batch=rows, itemsize=size), free_beside(model))


def _score_group(
    model: nn.Module, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    """Summed log-probabilities, shape (items, choices), of equally many choices per item."""
    device = device_of(model)
    choices = len(continuations[0])
    ids_BT, mask_BT = left_pad(contexts, 0, device)
    prefix = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=position_ids_of(mask_BT),
        use_cache=True,
        logits_to_keep=1,
    )
    flat = [c for group in continuations for c in group]
    targets_BC, target_mask_BC = _right_pad(flat, device)
    first_BV = F.log_softmax(prefix.logits[:, -1].float(), dim=-1)
    first_logp_B = first_BV.gather(1, targets_BC[:, 0].view(-1, choices)).flatten()
    if targets_BC.shape[1] == 1:
        return first_logp_B.view(-1, choices).double()
    cache = prefix.past_key_values
    cache.batch_repeat_interleave(choices)
    full_mask = torch.cat([mask_BT.repeat_interleave(choices, dim=0), target_mask_BC[:, :-1]], dim=1)
    positions = position_ids_of(full_mask)[:, mask_BT.shape[1] :]
    rest = model(
        input_ids=targets_BC[:, :-1],
        attention_mask=full_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    logits_BCV = rest.logits.float() if rest.logits.dtype == torch.float64 else rest.logits
    rest_logp_B = token_logprobs(logits_BCV, targets_BC[:, 1:], target_mask_BC[:, 1:].bool()).double().sum(1)
    return (first_logp_B.double() + rest_logp_B).view(-1, choices)


def _score_pairs(
    model: nn.Module, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    """What `_score_group` gives, every pair on its own: no more rows at once than there are contexts."""
    pairs = [Example(tuple(c), tuple(r)) for c, group in zip(contexts, continuations, strict=True) for r in group]
    sums = torch.zeros(len(pairs), dtype=torch.float64)
    for rows in by_length(pairs, len(contexts), key=lambda e: len(e.prompt) + len(e.response)):
        sums[rows] = _sums(score_responses(model, [pairs[i] for i in rows])).cpu()
    return sums.view(len(contexts), -1)


class Scored(NamedTuple):
    """One batch of responses as a model sees them; rows end together, so a short response has its padding in front.

    Shape suffixes: B rows, C response tokens, V words, H hidden.

    Attributes:
        logits_BCV: before each response token, as the model gives them.
        targets_BC: the response tokens.
        mask_BC: where a response token stands.
        hidden_BCH: the last hidden states before each response token.
    """

    logits_BCV: Tensor
    targets_BC: Tensor
    mask_BC: Tensor
    hidden_BCH: Tensor | None

    def logprobs(self, temperature: float = 1.0) -> Tensor:
        """log p(token) in nats, (B, C); 0 on padding. The distribution is the one sampled from at `temperature`."""
        return token_logprobs(self.logits_BCV, self.targets_BC, self.mask_BC, temperature)


def score_responses(model: nn.Module, examples: Sequence[Example], *, hidden: bool = False) -> Scored:
    """Run `model` over prompts and responses; only the responses' positions go through the vocabulary-sized head."""
    return _score_rows(model, examples, hidden=hidden, in_front=way_of(model).pads_in_front)


def _score_rows(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    hidden: bool = False,
    in_front: bool,
    pad: int = 0,
) -> Scored:
    device = device_of(model)
    rows = [e.prompt + e.response for e in examples]
    longest = max(len(e.response) for e in examples)
    lengths_B = torch.tensor([len(e.response) for e in examples], device=device)
    mask_BC = torch.arange(longest, device=device) >= longest - lengths_B[:, None]
    if in_front:
        ids_BT, mask_BT = left_pad(rows, pad, device)
        out = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=position_ids_of(mask_BT),
            use_cache=False,
            logits_to_keep=longest + 1,
            output_hidden_states=hidden,
        )
        logits_BCV = out.logits[:, -(longest + 1) : -1]
        hidden_BCH = out.hidden_states[-1][:, -(longest + 1) : -1] if hidden else None
        targets_BC = ids_BT[:, -longest:]
    else:  # neither mask nor positions: both are the model's own, and what stands behind a row is not seen
        ids_BT, mask_BT = _right_pad(rows, device)
        targets_at_BC = (mask_BT.sum(1, keepdim=True) - longest + torch.arange(longest, device=device)).clamp(min=1)
        kept = ids_BT.shape[1] + 1 - int(targets_at_BC.min())
        out = model(input_ids=ids_BT, use_cache=False, logits_to_keep=kept, output_hidden_states=hidden)

        def before_targets(values_BTX: Tensor) -> Tensor:  # some models keep the logits of all positions
            columns_BC = targets_at_BC - 1 - (ids_BT.shape[1] - values_BTX.shape[1])
            return values_BTX[torch.arange(len(rows), device=device)[:, None], columns_BC]

        logits_BCV = before_targets(out.logits)
        hidden_BCH = before_targets(out.hidden_states[-1]) if hidden else None
        targets_BC = ids_BT.gather(1, targets_at_BC)
    if hidden_BCH is not None and hidden_BCH.shape[:2] != targets_BC.shape:
        raise ValueError(f"{type(model).__name__}: expected one last hidden state a token, found {tuple(hidden_BCH.shape)}; "
                         "its value head cannot be trained: use rsf or dpo in the place of ppo")  # fmt: skip
    return Scored(logits_BCV, targets_BC, mask_BC, hidden_BCH)


class Way(NamedTuple):
    """How given tokens may be scored without changing a model's numbers.

    Attributes:
        pads_in_front: rows of different length may end together.
        shares: the cache of a context may be repeated and continued.
    """

    pads_in_front: bool
    shares: bool


def way_of(model: nn.Module) -> Way:
    """Measured once a model; a warning names what cannot be done.

    Raises:
        ValueError: what follows a token changes its probability: no causal language model.
    """
    return remembered(model, "scoring", _measured)


def _measured(model: nn.Module) -> Way:
    contexts, continuations = probes(model)
    pairs = [Example(c, r) for c, group in zip(contexts, continuations, strict=True) for r in group]

    def padded(pad: int) -> Tensor:
        return _sums(_score_rows(model, pairs, in_front=True, pad=pad))

    with asking(model):
        plain = scored_plainly(model, pairs)
        in_front = plain.agrees(lambda: padded(0), unseen=lambda: padded(contexts[0][0]))
        shares = in_front and plain.agrees(lambda: _score_group(model, contexts, continuations).flatten())
    if not shares:
        warn_of(model, "each continuation is scored on its own, as " + ("its cache cannot be shared" if in_front else
                "padding in front of a text changes its numbers: it is put behind"))  # fmt: skip
    return Way(in_front, shares)


def scored_plainly(model: nn.Module, examples: Sequence[Example]) -> Plain:
    """Summed log-probabilities of the responses, one at a time without padding or cache: what other ways must give.

    Raises:
        ValueError: see `Plain`.
    """
    alone = torch.cat([_sums(_score_rows(model, [e], in_front=False)) for e in examples])
    return Plain(model, alone, _sums(_score_rows(model, examples, in_front=False)))


def _sums(scored: Scored) -> Tensor:
    return scored.logprobs().double().sum(1)


def response_nll(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Summed negative log-likelihood, in nats, of the response tokens of one batch: a differentiable scalar.

    Prompts and padding carry no loss (the authors' code of HMA counts prompts and text packed across samples;
    papers/hma.md, fault 7). Divide by the number of response tokens of the whole set for a mean that does not depend on
    how the set was cut into batches.
    """
    scored = score_responses(model, examples)
    logp_N1 = scored.logprobs()[scored.mask_BC][:, None]
    return F.nll_loss(logp_N1, torch.zeros_like(logp_N1[:, 0], dtype=torch.long), reduction="sum")


def row_nlls(model: nn.Module, examples: Sequence[Example], *, temperature: float = 1.0) -> Tensor:
    """Negative log-likelihood of each response, in nats, summed over its tokens: shape (B,), differentiable.

    The logits are divided by the temperature of the policy that is scored.
    """
    scored = score_responses(model, examples)
    nll_N = -scored.logprobs(temperature)[scored.mask_BC]
    return nll_N.new_zeros(len(examples)).index_add(0, scored.mask_BC.nonzero()[:, 0], nll_N)


def response_tokens(examples: Sequence[Example]) -> int:
    """Number of response tokens: the divisor of a mean `response_nll`."""
    return sum(len(e.response) for e in examples)


def by_length(items: Sequence[T] | range, batch_size: int, *, key: Callable[[Any], Any]) -> Iterator[list[int]]:
    """Indices of `items` in batches of like length, longest first, so that a batch that does not fit fails at once."""
    order = sorted(range(len(items)), key=lambda i: key(items[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _right_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def position_ids_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def refuse_too_long(model: LanguageModel, rows: Sequence[Any], new_tokens: int) -> None:
    limit = context_of(getattr(model, "config", None))
    longest = max((row if isinstance(row, int) else len(row) for row in rows), default=0)
    if limit is not None and longest + new_tokens > limit:
        raise ValueError(
            f"expected sequences of at most {limit} tokens (the model's context), found one of {longest}"
            + (f" with {new_tokens} more to generate" if new_tokens else "")
            + "; drop or shorten the longest prompts"
        )
