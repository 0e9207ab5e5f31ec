"""Dry runs of `judge`: outputs and models read as a run would read them, what it would take told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from counterpoise.checkpoints.checkpoint import short
from counterpoise.judging.alpaca import OutputPair
from counterpoise.judging.pairrm import read, refuse_no_pairrm
from counterpoise.language.costs import Plan, Stage, at_once, drawing, forward
from counterpoise.language.dtypes import computed_in
from counterpoise.language.footprints import cache_bytes, drawing_bytes
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.language.ways import context_of
from counterpoise.planning.looking import judged, look, look_at_reward, room, said_of
from counterpoise.planning.restore import ASSUMED
from counterpoise.planning.texts import Words, lengths

BATCH = 16
"""Pairs or responses that a reward or preference model sees at once."""


def plan_respond(
    source: str, prompts: Sequence[Prompt], how: Drawing, *, device: str | None = "cpu", memory: float = math.inf
) -> Plan:
    """What `judge respond` with these arguments would do; `device` is None for one of so much `memory` that is not here.

    Raises:
        ValueError: a prompt that does not fit the context with its response.
        CheckpointError: no such checkpoint.
    """
    how.check()
    model = look(source)
    dtype = computed_in(model.dtype, device)
    itemsize = dtype.itemsize
    at, assumed = lengths(model, prompts, how, itemsize, how.rows)
    weights = {"weights": model.shape.parameters * itemsize}
    at = replace(at, room=room(device or "cpu", device is not None, memory, sum(weights.values())))
    together = at.drawn_at_once(model.shape, asked=how.batch_size)
    work = drawing(model.shape, at.prompt, at.response, prompts=len(prompts), batch=together, itemsize=itemsize)
    needed = drawing_bytes(model.shape, together, at.longest, at.response, itemsize)
    stage = Stage("answering", f"{len(prompts):,} responses{at_once(how.batch_size, together)}", work, needed)
    assumed += ["every response as long as --max-new-tokens: an upper bound", *ASSUMED]
    return Plan((stage,), weights, short(dtype), assumed=tuple(assumed), model=model.model, at=at)


def plan_compare(pairs: Sequence[OutputPair], *, reward: str | None, preference: str | None) -> Plan:
    """What `judge compare` by a model would do.

    Args:
        reward, preference: neither stands for a function, whose time is not counted.

    Raises:
        ValueError: a reward or preference that is none.
        CheckpointError: no such checkpoint.
    """
    judge = None
    if preference is not None:
        judge = look(preference, classifier=True)
        refuse_no_pairrm(preference, judge.model.config.to_dict())  # type: ignore[operator,union-attr]
    elif reward is not None:
        judge = look_at_reward(reward)
    told = (f"{len(pairs):,} prompts that both have answered", said_of(preference or reward or "a function", judge))
    if judge is None:
        return Plan((), {}, "float32", told=told)
    words, itemsize = Words.of(judge.folder), judge.dtype.itemsize
    texts = ([p.instruction for p in pairs], [p.ours.output for p in pairs], [p.theirs.output for p in pairs])
    sizes = [words.lengths(column) for column in texts]
    if preference is None:
        rows = [p + r for of in sizes[1:] for p, r in zip(sizes[0], of, strict=True)]
        what = f"{len(rows):,} responses"
    else:
        rows = [read(*row) for row in zip(*sizes, strict=True)] * 2
        what = f"{len(pairs):,} pairs in both orders"
    config: Any = judge.model.config
    limit = context_of(config)
    if preference is None and limit is not None:
        rows = [min(row, limit) for row in rows]
    work = forward(judge.shape, sum(rows) / len(rows), sequences=len(rows))
    maps = 3 * BATCH * config.num_attention_heads * max(rows) ** 2 * itemsize  # DeBERTa adds three up
    memory = cache_bytes(judge.shape, BATCH, max(rows), itemsize) + maps
    assumed = [] if words.tokenizer else ["no tokenizer: 4 characters a token"]
    stage = Stage("judging", what, work, memory)
    return Plan((stage,), judged(judge), short(judge.dtype), told=told, assumed=(*assumed, *ASSUMED))
