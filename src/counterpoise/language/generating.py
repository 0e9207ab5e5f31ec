"""How a model's `generate` is asked without a change of its numbers, and how rows that have ended leave it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoise.language.footprints import held_tokens
from counterpoise.language.scoring import Example, by_length, device_of, left_pad, position_ids_of, scored_plainly
from counterpoise.language.ways import asking, probes, remembered, succeeds, warn_of


class Draw(Protocol):
    """Chooses the next token of each row."""

    def __call__(self, ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        """Scores for it: 0 for the chosen one, minus infinity for all others."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows alone."""


class Way(NamedTuple):
    """How responses may be drawn without changing a model's numbers.

    Attributes:
        pads_in_front: prompts of different length may be answered together.
        shares: the cache of a prompt may be repeated for its responses.
        caches: a cache may be kept from token to token; else all is computed again for each.
        leaves: rows may leave the cache, so that a response that has ended costs nothing more.
        fixed: the cache has its last length from the start, so that on a GPU transformers compiles the step.
    """

    pads_in_front: bool
    shares: bool
    caches: bool
    leaves: bool
    fixed: bool = False


WAYS = (
    Way(True, True, True, True), Way(True, False, True, True), Way(True, False, True, False),
    Way(False, False, True, True), Way(False, False, True, False), Way(False, False, False, True),
)  # fmt: skip
"""From the quickest to the one that is left: prompts of one length together, without a cache."""
COMPILED = Way(True, False, True, False, True)
"""Where it is asked for, before all others: a compiled step wants as many rows and as long a cache every time."""
ENDED = 0.5
"""The share of the rows that have ended at which these leave; see benchmarks/drawing.py."""


def way_of(model: nn.Module, *, compiled: bool = False) -> Way:
    """Measured once a model: the first of WAYS whose log-probabilities, token by token, are those of a plain forward.

    A warning names what cannot be done.

    Args:
        compiled: COMPILED is tried first, where transformers says that the architecture can be compiled.

    Raises:
        ValueError: see `scoring.way_of`.
    """
    if compiled and getattr(model, "_can_compile_fullgraph", False):
        return remembered(model, "drawing, compiled", partial(_measured, ways=(COMPILED, *WAYS)))
    return remembered(model, "drawing", _measured)


def _measured(model: nn.Module, ways: Sequence[Way] = WAYS) -> Way:
    prompts, _ = probes(model)

    def agrees(way: Way) -> bool:
        examples, sums = [], []
        for rows in batches(prompts, len(prompts), way):
            begun = begun_rows(model, *left_pad([prompts[i] for i in rows], 0, device_of(model)), 2, way)
            stay, logits = list(range(2 * len(rows))), list[Tensor]()
            if way.leaves:  # the first row, after one token
                out = _drawn(model, begun, way, 1, output_logits=True)
                begun = _left(out, begun, torch.tensor(stay[1:], device=begun.ids_BT.device), way)
                stay, logits = stay[1:], [out.logits[0][1:]]
            out = _drawn(model, begun, way, 3 - len(logits), output_logits=True)
            logp_BCV = torch.stack([*logits, *out.logits], 1).log_softmax(-1, dtype=torch.float32)
            new_BC = out.sequences[:, -3:]
            sums.append(logp_BCV.gather(2, new_BC[..., None]).double().sum((1, 2)))
            asked = [prompts[rows[k // 2]] for k in stay]
            examples += [Example(p, tuple(r)) for p, r in zip(asked, new_BC.tolist(), strict=True)]
        return scored_plainly(model, examples).agrees(lambda: torch.cat(sums))

    with asking(model), blank_generation_config(model):
        way = next((w for w in ways if succeeds(partial(agrees, w))), None)
    if way is None:
        raise ValueError(
            f"{type(model).__name__}: expected a model whose `generate` gives what a plain forward gives, found that it does "
            "not, with a cache or without; it can be averaged, but not drawn from"
        )
    if way[:3] != WAYS[0][:3] and not way.fixed:
        caches = (
            "keeps a cache of its own"
            if way.caches
            else "is computed anew for each token, as its cache changes its numbers"
        )
        together = "" if way.pads_in_front else "; only prompts of one length are answered together"
        warn_of(model, f"each response {caches}{together}")
    return way


def batches(prompts: Sequence[tuple[int, ...]], size: int, way: Way) -> Iterator[list[int]]:
    """Prompts answered together, longest first; of one length where padding would change the numbers."""
    for rows in by_length(prompts, size, key=len):
        if way.pads_in_front:
            yield rows
        else:
            yield from (list(same) for _, same in groupby(rows, key=lambda i: len(prompts[i])))


class _Rows(NamedTuple):
    """Responses that are being drawn: all tokens so far, where they stand, and what is kept of them; None at first."""

    ids_BT: Tensor
    mask_BT: Tensor
    cache: Any


def begun_rows(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, n: int, way: Way) -> _Rows:
    """n rows of each prompt."""
    cache = _prefilled(model, ids_BT, mask_BT, n) if way.shares else None
    return _Rows(ids_BT.repeat_interleave(n, dim=0), mask_BT.repeat_interleave(n, dim=0), cache)


def to_the_end(
    model: nn.Module, rows: _Rows, way: Way, stops: Sequence[int], most: int, draw: Draw | None
) -> list[list[int]]:
    """At most so many tokens for each row; what follows the first of `stops` counts nothing."""
    found: list[list[int]] = [[] for _ in rows.ids_BT]
    here, begin, ends = list(range(len(found))), rows.ids_BT.shape[1], torch.tensor(stops, device=rows.ids_BT.device)

    def many_ended(ids_BT: Tensor, scores: Any) -> Tensor:
        return (torch.isin(ids_BT[:, -1], ends).float().mean() >= ENDED).expand(len(ids_BT))

    while True:
        left = begin + most - rows.ids_BT.shape[1]
        out = _drawn(model, rows, way, left, draw, stops, [many_ended] if stops and way.leaves else [])
        for row, tokens in zip(here, out.sequences[:, begin:].tolist(), strict=True):
            found[row] = tokens
        on = [k for k, row in enumerate(here) if len(found[row]) < most and found[row][-1] not in stops]
        if not on:
            return found
        here, stay = [here[k] for k in on], torch.tensor(on, device=rows.ids_BT.device)
        rows = _left(out, rows, stay, way)
        if draw is not None:
            draw.keep(stay)


def _left(out: Any, rows: _Rows, stay: Tensor, way: Way) -> _Rows:
    """The rows that stay, after what `generate` gave for all."""
    new = out.sequences.shape[1] - rows.mask_BT.shape[1]
    if way.caches:  # one that is not given back would have to be computed again: such a way fails when it is measured
        out.past_key_values.batch_select_indices(stay)
    return _Rows(out.sequences[stay], F.pad(rows.mask_BT[stay], (0, new), value=1), out.past_key_values)


def _drawn(
    model: nn.Module, rows: _Rows, way: Way, most: int, draw: Draw | None = None, stops: Sequence[int] = (),
    until: Sequence[Any] = (), **more: Any,
) -> Any:  # fmt: skip
    """What `generate` gives: at most so many tokens more, until all rows have ended or `until` says so."""
    from transformers import GenerationConfig, StaticCache

    cache = rows.cache
    if way.fixed:
        held = int(held_tokens(rows.ids_BT.shape[1] + most, fixed=True))
        cache = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=held)  # type: ignore[operator,union-attr]
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=most, eos_token_id=list(stops) or None, pad_token_id=stops[0] if stops else 0, do_sample=False,
        use_cache=way.caches, return_dict_in_generate=True, **more,
    )  # fmt: skip
    return model.generate(  # type: ignore[operator]
        input_ids=rows.ids_BT,
        attention_mask=rows.mask_BT,
        past_key_values=cache,
        generation_config=config,
        logits_processor=[] if draw is None else [draw],
        stopping_criteria=list(until),
        synced_gpus=False,  # each process draws on its own, where weights are cut up among several
    )


def _prefilled(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, n: int) -> Any:
    """The cache of all prompt tokens but the last, run once per prompt and repeated for its n responses."""
    if n == 1 or ids_BT.shape[1] == 1:
        return None
    mask = mask_BT[:, :-1]
    seen = {"input_ids": ids_BT[:, :-1], "attention_mask": mask, "position_ids": position_ids_of(mask)}
    cache = model(**seen, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(n)
    return cache


@contextmanager
def blank_generation_config(model: nn.Module) -> Iterator[None]:
    """Inside, the model's generation config is blank: `generate` fills from it whatever it was not told.

    The object is emptied, not replaced, so that it works through whatever wraps the model.
    """
    from transformers import GenerationConfig

    config = vars(model.generation_config)
    own = dict(config)
    config.clear()
    config.update(vars(GenerationConfig()))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        config.clear()
        config.update(own)
