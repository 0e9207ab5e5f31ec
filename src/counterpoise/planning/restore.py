"""A dry run of `restore`: everything that can be checked is checked, what it would take is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch

from counterpoise.averaging.partition import partition
from counterpoise.checkpoints.checkpoint import short
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.abilities import is_file
from counterpoise.evaluation.panel import Panel, PanelFiles
from counterpoise.evaluation.parts import Part
from counterpoise.language.costs import Lengths, Plan, Stage
from counterpoise.language.dtypes import computed_in
from counterpoise.language.prompts import Prompt, read_prompts
from counterpoise.language.sampling import Drawing
from counterpoise.planning.looking import (
    CHARACTERS,
    Source,
    Words,
    folder_of,
    look,
    look_at_abilities,
    look_at_reward,
    refuse_longer_than_context,
    room_for,
    same_shapes,
)
from counterpoise.planning.stages import restore_stages
from counterpoise.restoration.request import Request
from counterpoise.search.candidates import HMA, Scale, TwoSided

BOUNDS = "every response as long as --max-new-tokens, no early end of a search or of training: upper bounds"
ASSUMED = (
    "a stage's memory comes on top of the weights and of all else that is resident",
    "time is operations / speed, or bytes read / bandwidth where that is longer; nothing for kernel launches, Python, "
    "loading or the disk: small models and small batches take several times as long",
)


def plan_restore(request: Request, panel: PanelFiles, *, present: bool = True) -> Plan:
    """What `restore` with this request and panel would do.

    Args:
        present: whether its device is here.

    Raises:
        ValueError, CheckpointError: whatever `restore` would refuse before it loads a model.
    """
    drawing, means = panel.drawing, request.grid
    drawing.check()
    request.check(sum(map(is_file, panel.abilities)))
    first = look(str(request.pre))
    second = look(str(request.post), base=first)
    told, mapped = _fit(first, second, request)
    cut = partition({n: tuple(p.shape) for n, p in second.model.named_parameters()}, request.blocks)
    hma = any(isinstance(s, HMA) for s in request.searches)
    told.append(f"HMA: {len(cut)} blocks" if hma else "two-sided search alone")
    unloaded = Panel(read_prompts(panel.prompts), lambda *_: [], (), prompt_limit=panel.prompt_limit)
    parts: dict[Part, list[Prompt]] = {p: unloaded.prompts_of(p) for p in get_args(Part)}
    told.append("prompts: " + ", ".join(f"{len(chosen):,} {part}" for part, chosen in parts.items()))
    judge = look_at_reward(panel.reward)
    told.append(said_of(panel.reward, judge))
    dtype = request.dtype
    if dtype is None:
        device = request.device if present else None
        dtype = torch.float32 if second.dtype == torch.float16 else computed_in(second.dtype, device)
    shape, itemsize = second.shape, dtype.itemsize
    two_sided = [s for s in request.searches if isinstance(s, TwoSided)]
    size = request.settings["proxy_size"]
    needed = size if two_sided else math.ceil(size / 0.8)
    asked = parts["validation"] + parts["held-out"] + parts["proxy"][:needed]
    at, assumed = lengths(second, asked, drawing, itemsize, drawing.batch_size // 2)
    items, unseen = look_at_abilities(
        panel.abilities, Words.of(second.folder), limit=panel.limit, new=drawing.max_new_tokens
    )
    told += [f"{i.name}: {i.count:,} validation items" for i in items["validation"]]
    scale = Scale(shape, judge.shape if judge else None, at, len(parts["proxy"]), means)
    counts = {part: len(chosen) for part, chosen in parts.items()}
    stages = restore_stages(scale, counts, items, request.searches, drawing.n)
    resident = {"weights": shape.parameters * itemsize, **judged(judge)}
    written = second.resident
    reading = Stage("reading both, hashing", f"{(mapped or 2 * written) / 1e9:.2f} GB")
    writing = Stage("writing OUT", f"{written / 1e9:.2f} GB")
    if any(s.calibrate for s in two_sided):
        unseen.append("the right answers of --calibrate are not counted")
    assumed = [*unseen, *assumed, BOUNDS, *ASSUMED]
    stages = (reading, *stages, writing)
    return Plan(stages, resident, short(dtype), mapped, written, tuple(told), tuple(assumed))


def _fit(first: Source, second: Source, request: Request) -> tuple[list[str], int]:
    """Whether PRE and POST fit, and the bytes that are mapped."""
    if first.weights is None or second.weights is None:
        same_shapes(first, second)
        warnings = room_for(request.out, second.resident)
        lacking = ", ".join(s.name for s in (first, second) if s.weights is None)
        return [f"no weights: preflight on shapes only ({lacking})", *warnings], 0
    folders = [folder_of(str(source))[0] for source in (request.pre, request.post)]  # a hub id is not fetched again
    pair = preflight(*folders, drop=request.drop, out=request.out)
    mapped = sum(f.stat().st_size for c in (pair.pre, pair.post) for f in c.files)
    return [f"preflight: {len(pair.names)} tensors fit", *(f"warning: {w}" for w in pair.warnings)], mapped


def lengths(
    source: Source,
    prompts: Sequence[Prompt],
    drawing: Drawing,
    itemsize: int,
    batch: int,
    *,
    longest_refused: bool = True,
) -> tuple[Lengths, list[str]]:
    """How long these prompts and responses are, `batch` at once in training, and what is said of them.

    Raises:
        ValueError: a prompt that does not fit the context with its response, unless not `longest_refused`.
    """
    words, new = Words.of(source.folder), drawing.max_new_tokens
    found = words.prompts(prompts, chat=drawing.chat)
    if longest_refused:
        refuse_longer_than_context(source, found, new)
    assumed = [] if words.tokenizer else [f"no tokenizer: {CHARACTERS} characters a token, no chat template"]
    mean = sum(found) / len(found)
    told = [f"prompts of {mean:.0f} tokens in the mean, the longest {max(found)}", *assumed]
    return Lengths(mean, max(found), new, max(1, batch), itemsize), told


def judged(judge: Source | None) -> dict[str, int]:
    """What lies in memory for a reward or preference that is a model."""
    return {} if judge is None else {"reward model": judge.resident}


def said_of(reward: str, judge: Source | None) -> str:
    """What a dry run says of a reward; `judge` of one that is a model."""
    if judge is None:
        return f"reward {reward}: found; its time is not counted"
    return f"reward {reward}: {judge.shape.parameters / 1e9:.3g} billion parameters in {short(judge.dtype)}"
