"""A dry run's plan on the terminal: stages, memory, time, and what was taken for granted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

from counterpoise.cli.options import speed_of, usable_device
from counterpoise.cli.terminal import is_first, print_json
from counterpoise.language.costs import Plan
from counterpoise.language.memory import free_memory
from counterpoise.language.work import Speed
from counterpoise.planning.shorter import Fits, Ways, shorter, smaller
from counterpoise.planning.timing import speed_at

T = TypeVar("T")
GIVEN = "as given; launches and Python come on top: small models and batches take several times as long"


def show_plan(
    plan: Plan,
    speed: Speed,
    how: str,
    device: str,
    memory: float | None = None,
    less: Sequence[tuple[str, float]] = (),
    *,
    as_json: bool,
) -> None:
    """Print a plan; `how` says where the speed comes from, `less` which options take how many seconds."""
    if as_json:
        listed = [{**asdict(stage), "seconds": stage.work.seconds(speed)} for stage in plan.stages]
        rates = {name: x if x is not None and math.isfinite(x) else None for name, x in speed._asdict().items()}
        told: dict[str, object] = {"seconds": plan.seconds(speed), "speed": rates, "how": how}
        told |= {"peak": plan.peak, "memory": memory}
        told["shorter"] = [{"options": typed, "seconds": seconds} for typed, seconds in less]
        print_json({**asdict(replace(plan, model=None)), "stages": listed, **told, "device": device})
        return
    from rich.console import Console
    from rich.table import Table

    for line in plan.told:
        print(line)
    stages = Table("stage", "what", "operations", "memory", "time", box=None, pad_edge=False)
    for stage in plan.stages:
        work = stage.work
        stages.add_row(
            stage.name,
            stage.what,
            f"{work.flops:.2g}" if work.flops else "",
            size(stage.memory) if stage.memory else "",
            duration(work.seconds(speed)) if work.flops else "not estimated",
        )
    Console().print(stages)
    print(f"on {device}: " + ", ".join(f"{name} {size(count)}" for name, count in plan.resident.items()))
    peak = f"about {size(plan.peak)}" + ("" if memory is None else f" of {size(memory)}")
    print(f"peak memory there: {peak}; mapped from disk, not counted in it: {size(plan.mapped)}")
    print(f"to be written: {size(plan.disk)}")
    print(f"time, an estimate: {duration(plan.seconds(speed))} at {said(speed)} ({how})")
    for typed, seconds in less:
        print(f"shorter: with {typed}, {duration(seconds)}")
    for line in plan.assumed:
        print(f"assumed: {line}")
    print("dry run: nothing was drawn, trained or written")


def said(speed: Speed) -> str:
    """A speed in words.

    >>> said(Speed(3e10, 5e9)), said(Speed(3e10, math.inf, 2e10, None, 0.03))
    ('3e+10 FLOP/s and 5e+09 bytes/s', '3e+10 FLOP/s, 2e+10 and 0.03 s a token while drawing')
    >>> said(Speed(3e10, math.inf, start=7.1))
    '3e+10 FLOP/s; 8 s of it to start'
    """
    if speed.bytes < math.inf:
        return f"{speed.flops:.2g} FLOP/s and {speed.bytes:.2g} bytes/s"
    found = [f"{speed.flops:.2g} FLOP/s"]
    found += [] if speed.drawn is None else [f"{speed.drawn:.2g} and {speed.step:.2g} s a token while drawing"]
    found += [] if speed.trained is None else [f"{speed.trained:.2g} with a gradient"]
    return ", ".join(found) + (f"; {duration(speed.start)} of it to start" if speed.start else "")


def size(count: float) -> str:
    """Bytes in the largest decimal unit.

    >>> size(14.48e9), size(512)
    ('14.5 GB', '512 B')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * unit:  # 999.7 MB would be rounded to 1000 MB
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(4321), duration(95), duration(0.2), duration(3 * 86400 + 7200)
    ('1 h 12 min', '1 min 35 s', 'under 1 s', '3 d 2 h')
    """
    if seconds < 1:
        return "under 1 s"
    whole = math.ceil(seconds)
    for long, short, unit in ((86400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s"))):
        if whole >= long:
            return f"{whole // long} {unit[0]} {whole % long // short} {unit[1]}"
    return f"{whole} s"


def tell(
    asked: T,
    planned: Callable[[T], Plan],
    ways: Ways[T],
    speed: str | None,
    device: str,
    as_json: bool,
    fits: Fits[T] = (),
) -> None:
    """Print what a request would take, and what would make it short; without a speed the device is timed, if it is here.

    Of several processes the first does it: all together would time each other, and hold a model each.

    Raises:
        ValueError: it does not fit into the device's memory; the message says what would.
    """
    if not is_first():
        return
    plan, given = planned(asked), speed_of(speed)
    if given is None:
        try:
            usable_device(device)
        except ValueError as error:
            raise ValueError(f"{error}; for a device elsewhere give its --speed") from None
        memory: float | None = free_memory(device)
    else:
        flops, read, *rest = given
        memory = rest[0] if rest else None
    if memory is not None and plan.peak > memory:
        what = f"{device}: expected {size(plan.peak)} of memory, found {size(memory)}"
        raise ValueError(f"{what}; {smaller(plan, fits, planned, memory)}")
    if given is None:
        start = time.process_time()  # of this process, which has imported what a run imports
        found, how = speed_at(plan, device)
        found = found._replace(start=start)
    else:
        found, how = Speed(flops, read, update=12 / read), GIVEN
    show_plan(plan, found, how, device, memory, shorter(asked, plan, ways, planned, found), as_json=as_json)
