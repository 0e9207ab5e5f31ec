"""A dry run of `restore` and of `align`: everything that can be checked is checked, what it would take is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from counterpoise.averaging.partition import partition
from counterpoise.checkpoints.files import refuse_occupied
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.parts import Part
from counterpoise.language.costs import Plan, Stage, weight_bytes
from counterpoise.language.dtypes import computed_in
from counterpoise.language.prompts import Prompt, read_prompts
from counterpoise.planning.looking import (
    CHARACTERS,
    Source,
    Words,
    folder_of,
    look,
    look_at_abilities,
    look_at_reward,
    nothing_is_drawn,
    refuse_longer_than_context,
    room_for,
    same_shapes,
)
from counterpoise.planning.stages import Lengths, restore_stages
from counterpoise.restoration.restore import RESULT
from counterpoise.search.searching import FORMS
from counterpoise.search.settings import refuse_search, refuse_settings

BOUNDS = "every response as long as --max-new-tokens, no early end of a search or of training: upper bounds"
ASSUMED = (
    "a stage's memory comes on top of the weights and of all else that is resident",
    "time is operations / speed, or bytes read / bandwidth where that is longer; nothing for kernel launches, Python, "
    "loading or the disk: small models and small batches take several times as long",
)


def plan_restore(
    pre: str,
    post: str,
    out: Path,
    prompts: Path,
    reward: str,
    abilities: Sequence[str],
    settings: Mapping[str, Any],
    drawing: Mapping[str, Any],
    *,
    drop: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: str | None = "cpu",
) -> Plan:
    """What `restore` with these arguments would do.

    Args:
        settings: search, blocks, mean, means, lambdas, alignment, calibrate, min_effective_sets, keep_reward,
            proxy_size, controls of `restore`.
        drawing: limit, prompt_limit, max_new_tokens, batch_size, chat of `Panel`.
        device: None for one that is not here.

    Raises:
        ValueError, CheckpointError: whatever `restore` would refuse before it loads a model.
    """
    means = settings["means"] if settings["mean"] is None else [settings["mean"]]
    _refuse(settings)
    if not (out / RESULT).is_file():
        refuse_occupied(out.absolute())
    first = look(pre)
    second = look(post, base=first)
    told, mapped = _fit(first, second, pre, post, drop, out)
    names = {n: tuple(p.shape) for n, p in second.model.named_parameters()}
    cut = partition(names, settings["blocks"] or 3)
    told.append(f"HMA: {len(cut)} blocks" if settings["search"] != "two-sided" else "two-sided search alone")
    panel = Panel(read_prompts(prompts), nothing_is_drawn, (), prompt_limit=drawing["prompt_limit"])
    parts: dict[Part, list[Prompt]] = {p: panel.prompts_of(p) for p in get_args(Part)}
    told.append("prompts: " + ", ".join(f"{len(chosen):,} {part}" for part, chosen in parts.items()))
    judge = look_at_reward(reward)
    told.append(said_of(reward, judge))
    if dtype is None:
        dtype = torch.float32 if second.dtype == torch.float16 else computed_in(second.dtype, device)
    shape, itemsize = second.shape, dtype.itemsize
    words = Words.of(second.folder)
    needed = settings["proxy_size"] if settings["search"] != "hma" else math.ceil(settings["proxy_size"] / 0.8)
    asked = parts["validation"] + parts["held-out"] + parts["proxy"][:needed]
    new = drawing["max_new_tokens"]
    refuse_longer_than_context(second, words.prompts(asked, chat=drawing["chat"]), new)
    at, assumed = lengths(second, asked, drawing, itemsize, drawing["batch_size"] // 2, longest_refused=False)
    items, unseen = look_at_abilities(abilities, words, limit=drawing["limit"], new=new)
    told += [f"{i.name}: {i.count:,} validation items" for i in items["validation"]]
    two_sided = settings["alignment"] if settings["search"] != "hma" else None
    stages = restore_stages(
        shape,
        judge.shape if judge else None,
        at,
        {part: len(chosen) for part, chosen in parts.items()},
        items,
        means=means,
        hma=settings["search"] != "two-sided",
        controls=settings["controls"],
        size=settings["proxy_size"],
        replies=drawing["replies"],
        two_sided=two_sided,
        lambdas=len(settings["lambdas"]) if two_sided else 0,
    )
    resident = {"weights": weight_bytes(shape, itemsize), **judged(judge)}
    written = weight_bytes(shape, second.dtype.itemsize)
    ends = (
        Stage("reading both, hashing", f"{(mapped or 2 * written) / 1e9:.2f} GB"),
        Stage("writing OUT", f"{written / 1e9:.2f} GB"),
    )
    if settings["calibrate"] and two_sided:
        unseen.append("the right answers of --calibrate are not counted")
    kind = short(dtype)
    return Plan(
        (ends[0], *stages, ends[1]), resident, kind, mapped, written, tuple(told), (*unseen, *assumed, BOUNDS, *ASSUMED)
    )


def _refuse(settings: Mapping[str, Any]) -> None:
    refuse_settings(settings["means"], settings["mean"], settings["keep_reward"], settings["proxy_size"])
    refuse_search(settings["search"], settings["mean"], settings["lambdas"])
    if settings["search"] == "hma":
        return
    if settings["alignment"] not in FORMS:
        raise ValueError(f"alignment: expected {', '.join(FORMS)}, found {settings['alignment']!r}")
    if settings["proxy_size"] < 8:  # two of each of four
        raise ValueError(f"proxy_size: expected at least 8 sequences, found {settings['proxy_size']}")


def _fit(first: Source, second: Source, pre: str, post: str, drop: Sequence[str], out: Path) -> tuple[list[str], int]:
    """Whether PRE and POST fit, and the bytes that are mapped."""
    if first.weights is None or second.weights is None:
        same_shapes(first, second)
        warnings = room_for(out, weight_bytes(second.shape, second.dtype.itemsize))
        lacking = ", ".join(s.name for s in (first, second) if s.weights is None)
        return [f"no weights: preflight on shapes only ({lacking})", *warnings], 0
    pair = preflight(folder_of(pre)[0], folder_of(post)[0], drop=drop, out=out)  # a hub id is not fetched again
    mapped = sum(f.stat().st_size for c in (pair.pre, pair.post) for f in c.files)
    return [f"preflight: {len(pair.names)} tensors fit", *(f"warning: {w}" for w in pair.warnings)], mapped


def lengths(
    source: Source,
    prompts: Sequence[Prompt],
    drawing: Mapping[str, Any],
    itemsize: int,
    batch: int,
    *,
    longest_refused: bool = True,
) -> tuple[Lengths, list[str]]:
    words, new = Words.of(source.folder), drawing["max_new_tokens"]
    found = words.prompts(prompts, chat=drawing["chat"])
    if longest_refused:
        refuse_longer_than_context(source, found, new)
    assumed = [] if words.tokenizer else [f"no tokenizer: {CHARACTERS} characters a token, no chat template"]
    mean = sum(found) / len(found)
    return Lengths(mean, max(found), new, max(1, batch), itemsize), [
        f"prompts of {mean:.0f} tokens in the mean, the longest {max(found)}",
        *assumed,
    ]


def judged(judge: Source | None) -> dict[str, int]:
    return {} if judge is None else {"reward model": weight_bytes(judge.shape, judge.dtype.itemsize)}


def said_of(reward: str, judge: Source | None) -> str:
    if judge is None:
        return f"reward {reward}: found; its time is not counted"
    return f"reward {reward}: {judge.shape.parameters / 1e9:.3g} billion parameters in {short(judge.dtype)}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
