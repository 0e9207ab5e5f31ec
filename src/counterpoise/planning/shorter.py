"""Options that would make a long run short or a large one fit, each by the same plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from counterpoise.evaluation.specs import fewest
from counterpoise.language.costs import Plan
from counterpoise.language.engine import TRANSFORMERS
from counterpoise.language.sampling import Drawing
from counterpoise.language.work import Speed
from counterpoise.search.candidates import Ramp

if TYPE_CHECKING:  # a dry run of restore need not import alignment
    from counterpoise.alignment.from_options import Alignment
    from counterpoise.alignment.heal import Healing
    from counterpoise.alignment.training.models import Machine
    from counterpoise.evaluation.panel import PanelFiles
    from counterpoise.language.prompts import Prompt
    from counterpoise.restoration.request import Request

    Restoring = tuple[Request, PanelFiles]
    Responding = tuple[list[Prompt], Drawing]

T = TypeVar("T")
Ways = Mapping[str, Callable[[T], T]]
"""What is typed -> the request with it."""
Fits = Iterable[tuple[str, T]]
"""What is typed, and the request with it: ever fewer rows at a time, or fewer bytes a number."""
HOUR, DAY, MOST = 3600, 86400, 3
FEW = 100
SHARES = (2, 4, 8)
"""Processes that --shard is tried with: the devices of a machine."""


def shorter(asked: T, plan: Plan, ways: Ways[T], planned: Callable[[T], Plan], speed: Speed) -> list[tuple[str, float]]:
    """Of a run of hours or days up to three options that make it minutes or hours, with seconds, the shortest first.

    Where no single one does, those that save most go together, as few as do, three at most.
    """

    def seconds(*options: str) -> float:
        changed = asked
        for option in options:
            changed = ways[option](changed)
        return planned(changed).seconds(speed)

    if not _unit(whole := plan.seconds(speed)):
        return []
    alone = {option: seconds(option) for option in ways}
    ranked = sorted((o for o in ways if alone[o] < 0.95 * whole), key=alone.__getitem__)
    if enough := [o for o in ranked if _unit(alone[o]) < _unit(whole)]:
        return [(o, alone[o]) for o in enough[:MOST]]
    found: list[tuple[str, float]] = []
    for count in range(2, min(MOST, len(ranked)) + 1):
        found = [(" ".join(ranked[:count]), seconds(*ranked[:count]))]
        if _unit(found[0][1]) < _unit(whole):
            break
    return found or [(o, alone[o]) for o in ranked]


def smaller(plan: Plan, fits: Fits[T], planned: Callable[[T], Plan], memory: float) -> str:
    """What would let a run that is too large for a device fit into its memory: the first of `fits` whose plan does.

    Returns:
        an end of a sentence; where nothing would, it says how many devices hold the weights.
    """
    for option, changed in fits:
        with suppress(ValueError):  # a setting that the run refuses
            if planned(changed).peak <= memory:
                return f"with {option} it fits"
    held = sum(plan.resident.values())
    if held <= memory:
        return "what is resident fits, and no batch beside it: take a smaller model or a larger device"
    return (
        f"what is resident alone takes {held / 1e9:,.3g} GB, {math.ceil(held / memory)} such devices: "
        "take a smaller model or a larger device"
    )


def _halves(rows: int) -> Iterator[int]:
    """Half as many, half of that, ... down to one."""
    while (rows := rows // 2) >= 1:
        yield rows


def _unit(seconds: float) -> int:
    """0 for minutes, 1 for hours, 2 for days."""
    return (seconds >= HOUR) + (seconds >= DAY)


def restore_fits(asked: Restoring, devices: int = max(SHARES)) -> Fits[Restoring]:
    """What makes a restore smaller: fewer rows, fewer bytes a number, more processes where there are so many devices."""
    request, files = asked
    yield from _in_one(request, files)
    first = "" if request.engine == TRANSFORMERS else "--engine transformers "  # which alone takes what is cut up
    for count in SHARES:
        if request.shard < count <= devices:
            cut = replace(request, shard=count, engine=TRANSFORMERS)
            typed = f"{first}{'' if request.shard > 1 else '--shard under '}torchrun --nproc-per-node {count}"
            yield typed, (cut, files)
            yield from ((f"{more} {typed}", changed) for more, changed in _in_one(cut, files))


def _in_one(request: Request, files: PanelFiles) -> Fits[Restoring]:
    """With as many processes."""
    for typed, start in (("", request), ("--dtype bfloat16", replace(request, dtype=torch.bfloat16))):
        if typed and (request.dtype is None or request.dtype.itemsize > 2):
            yield typed, (start, files)
        for rows in _halves(files.drawing.rows):  # of a search's gradient: what is drawn and scored halves by itself
            fewer = replace(files, drawing=replace(files.drawing, batch_size=rows))
            yield f"{typed} --batch-size {rows}".strip(), (start, fewer)


def align_fits(wanted: Alignment) -> Fits[Alignment]:
    """What makes an alignment smaller: what is drawn halves by itself."""
    for typed, rows, machine in _trained_by_less(wanted.bound.micro_batch_size, wanted.machine):
        yield typed, replace(wanted, settings={**wanted.settings, "micro_batch_size": rows}, machine=machine)


def heal_fits(wanted: Healing) -> Fits[Healing]:
    """What makes a healing smaller: what is drawn halves by itself."""
    for typed, rows, machine in _trained_by_less(wanted.teaching.micro_batch_size, wanted.machine):
        yield typed, replace(wanted, teaching=replace(wanted.teaching, micro_batch_size=rows), machine=machine)


def _trained_by_less(rows: int, machine: Machine) -> Iterator[tuple[str, int, Machine]]:
    """Fewer rows at once, which costs no time; then layers computed again, and both."""
    again, option = replace(machine, recompute=True), "--gradient-checkpointing"
    yield from ((f"--micro-batch-size {fewer}", fewer, machine) for fewer in _halves(rows))
    yield option, rows, again
    yield from ((f"{option} --micro-batch-size {fewer}", fewer, again) for fewer in _halves(rows))


def restore_ways(asked: Restoring) -> Ways[Restoring]:
    """What makes a restore shorter."""
    new, long = max(16, asked[1].drawing.max_new_tokens // 4), asked[1].drawing.max_new_tokens
    found: dict[str, Callable[[Restoring], Restoring]] = {
        f"--limit {FEW}": lambda a: (a[0], replace(a[1], limit=fewest(a[1].limit, FEW))),
        f"--prompt-limit {FEW}": lambda a: (a[0], replace(a[1], prompt_limit=fewest(a[1].prompt_limit, FEW))),
        "--no-controls": lambda a: (_without_ramps(a[0]), a[1]),
    }
    if asked[0].heal is None:
        found = {"--fast": lambda a: (a[0].rough(), a[1].rough()), **found}
    if new < long:
        short = replace(asked[1].drawing, max_new_tokens=new)
        found[f"--max-new-tokens {new}"] = lambda a: (a[0], replace(a[1], drawing=short))
    return found


def _without_ramps(request: Request) -> Request:
    return (
        request if request.fast else replace(request, searches=[s for s in request.searches if not isinstance(s, Ramp)])
    )


def align_ways(wanted: Alignment) -> Ways[Alignment]:
    """A quarter of each setting that time is proportional to."""
    told = wanted.bound.told
    held = {n: told.get(n) for n in ("iterations", "prompts_per_iteration", "epochs", "n", "max_new_tokens")}

    def with_setting(name: str, value: int, a: Alignment) -> Alignment:
        return replace(a, settings={**a.settings, name: value})

    return _quarters(held, with_setting)


def heal_ways(wanted: Healing) -> Ways[Healing]:
    """A quarter of each setting that time is proportional to."""
    held = {"steps": wanted.teaching.steps, "prompts_per_step": wanted.teaching.batch_size}

    def with_setting(name: str, value: int, a: Healing) -> Healing:
        if name == "max_new_tokens":
            return replace(a, drawing=replace(a.drawing, max_new_tokens=value))
        changed: dict[str, Any] = {"batch_size" if name == "prompts_per_step" else name: value}
        return replace(a, teaching=replace(a.teaching, **changed))

    return _quarters({**held, "max_new_tokens": wanted.drawing.max_new_tokens}, with_setting)


def first_ways(items: list[T]) -> Ways[list[T]]:
    """The first few of many."""
    return {f"--limit {FEW}": lambda some: some[:FEW]} if len(items) > FEW else {}


def respond_ways(prompts: list[Prompt]) -> Ways[Responding]:
    """The first few of many prompts."""

    def fewer(asked: Responding) -> Responding:
        return asked[0][:FEW], asked[1]

    return {f"--limit {FEW}": fewer} if len(prompts) > FEW else {}


def _quarters(held: Mapping[str, Any], with_setting: Callable[[str, int, T], T]) -> Ways[T]:
    few = {n: max(1, v // 4) for n, v in held.items() if isinstance(v, int) and v > 1}
    return {f"--{n.replace('_', '-')} {v}": partial(with_setting, n, v) for n, v in few.items()}
