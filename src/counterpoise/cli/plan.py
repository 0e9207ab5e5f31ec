"""A dry run's plan on the terminal: stages, memory, time, and what was taken for granted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch

from counterpoise.cli.options import speed_of, usable_device
from counterpoise.cli.terminal import is_first, print_json
from counterpoise.language.costs import Plan, Speed
from counterpoise.planning.shorter import shorter

T = TypeVar("T")


def show_plan(
    plan: Plan, speed: Speed, how: str, device: str, less: Sequence[tuple[str, float]] = (), *, as_json: bool
) -> None:
    """Print a plan; `how` says where the speed comes from, `less` which options take how many seconds."""
    if as_json:
        listed = [{**asdict(stage), "seconds": stage.work.seconds(speed)} for stage in plan.stages]
        told = {"seconds": plan.seconds(speed), "peak": plan.peak, "speed": speed._asdict(), "how": how}
        told["shorter"] = [{"options": typed, "seconds": seconds} for typed, seconds in less]
        print_json({**asdict(plan), "stages": listed, **told, "device": device})
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
    print(f"peak memory there: about {size(plan.peak)}; mapped from disk, not counted in it: {size(plan.mapped)}")
    print(f"to be written: {size(plan.disk)}")
    print(
        f"time, an estimate: {duration(plan.seconds(speed))} at {speed.flops:.2g} FLOP/s and {speed.bytes:.2g} bytes/s "
        f"({how})"
    )
    for typed, seconds in less:
        print(f"shorter: with {typed}, {duration(seconds)}")
    for line in plan.assumed:
        print(f"assumed: {line}")
    print("dry run: nothing was drawn, trained or written")


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
    ways: Mapping[str, Callable[[T], T]],
    speed: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Print what a request would take, and what would make it short; without a speed the device is probed, if it is here."""
    plan, given = planned(asked), speed_of(speed)
    if given is None:
        try:
            usable_device(device)
        except ValueError as error:
            raise ValueError(f"{error}; for a device elsewhere give its --speed") from None
        found, how = probe(device, getattr(torch, plan.dtype)), f"a probe in {plan.dtype} just now"
    else:
        found, how = Speed(*given), "as given"
    if is_first():
        show_plan(plan, found, how, device, shorter(asked, ways, planned, found), as_json=as_json)


def probe(device: str, dtype: torch.dtype, *, seconds: float = 0.2) -> Speed:
    """How fast the device multiplies two square matrices and reads memory: the best of a few tries each."""
    size, mib = (512, 256) if torch.device(device).type == "cpu" else (8192, 1024)  # no cache holds so much
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.ones((mib << 20) // dtype.itemsize, device=device, dtype=dtype)
    into = torch.empty_like(b)
    multiplied, copied = _best(lambda: a @ a, seconds), _best(lambda: into.copy_(b), seconds)
    return Speed(2 * size**3 / multiplied, 2 * b.nbytes / copied)


def _best(work: Callable[[], object], seconds: float) -> float:
    from torch.utils.benchmark import Timer

    return float(min(Timer("work()", globals={"work": work}).blocked_autorange(min_run_time=seconds).times))
