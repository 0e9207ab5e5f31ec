"""What the commands share: errors as one message, progress bars on stderr. Nothing heavy is imported here."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals after which a command cleans up, says what is kept, and ends with status 128 + their number."""
CLEANING = 10.0
"""Seconds after such a signal in which another one changes nothing."""
DAMAGED = "a file is damaged or cut short ({}); make or fetch it again"
FULL = "out of memory ({}); give a smaller --batch-size or --micro-batch-size, a shorter --max-new-tokens or another --device"
FAILED = "the device failed ({}); try --device cpu, or start the command again"
TEMPLATE = "the chat template cannot say this conversation ({}); mend it, or give --no-chat-template"
UNREADABLE = "transformers cannot read {} ({}); fetch it again, or mend its config.json or tokenizer"
READERS = ("from_pretrained", "from_config", "for_model", "from_dict", "__init__")
KINDS = {
    "builtins.EOFError": DAMAGED, "zlib.error": DAMAGED, "_lzma.LZMAError": DAMAGED, "_csv.Error": DAMAGED,
    "tarfile.TarError": DAMAGED, "safetensors._safetensors_rust.SafetensorError": DAMAGED,
    "builtins.MemoryError": FULL, "torch.OutOfMemoryError": FULL,
    "torch.AcceleratorError": FAILED, "torch.distributed.DistError": FAILED,
    "jinja2.exceptions.TemplateError": TEMPLATE,
    "huggingface_hub.errors.StrictDataclassError": "config.json does not describe a model that transformers builds ({})",
    "httpx.HTTPError": "the network failed ({}); try again, or give a local folder",
    "httpx2.HTTPError": "the network failed ({}); try again, or give a local folder",
}  # fmt: skip
"""What is said of errors of other libraries that a user can act on, by the full name of a class: nothing is imported."""
ROOM = "make room, or choose a place with more"
RIGHTS = "choose a place that you may write to, or have its rights changed"
ADVICE = {
    errno.ENOSPC: ROOM, errno.EDQUOT: ROOM, errno.EFBIG: "choose a file system (or a limit, see ulimit -f) for larger files",
    errno.EROFS: RIGHTS, errno.EACCES: RIGHTS, errno.EPERM: RIGHTS, errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "name a file in it",
    errno.EIO: "the disk or the network behind it failed; look at it, then start again",
}  # fmt: skip


aloud = True
"""Whether `say` speaks: each command sets it as it begins."""


def is_first() -> bool:
    """Whether this process speaks: of those that torchrun or accelerate started, the first."""
    return os.environ.get("RANK", "0") == "0"


def refuse_several(command: str, more: str = "") -> None:
    """Raise for a command that several processes would all do whole."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{command}: expected one process, found {os.environ['WORLD_SIZE']} (WORLD_SIZE){more}")


class Stopped(KeyboardInterrupt):
    """A signal that ends the command; its number is the argument."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` at SIGINT, SIGTERM and SIGHUP, once: what is being cleaned up is not interrupted.

    A signal that was ignored before (nohup) stays ignored. One that comes CLEANING seconds later is heeded again, in case
    some library swallowed the first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -math.inf

    def stop(number: int, frame: object) -> None:
        nonlocal last
        if time.monotonic() - last > CLEANING:
            last = time.monotonic()
            raise Stopped(number)

    before = {s: signal.getsignal(s) for s in STOPS}
    before = {s: had for s, had in before.items() if had in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        for number in before:  # the process is about to end
            signal.signal(number, signal.SIG_IGN)
        raise
    finally:
        if last == -math.inf:
            for number, had in before.items():
                signal.signal(number, had)


@contextmanager
def plain_errors(kept: str, *more: type[Exception]) -> Iterator[None]:
    """Errors that a user can act on become one line; anything else keeps its traceback, and is called a bug.

    Args:
        kept: what is left when the command is stopped, for the message.
        more: further kinds of error that this command's users can act on.
    """
    try:
        with stoppable():
            yield
    except KeyboardInterrupt as stop:
        if is_first():  # torchrun stops all: one speaks
            with suppress(OSError):  # the terminal may be gone
                print(f"stopped; {kept}", file=sys.stderr, flush=True)
        raise SystemExit(128 + next(iter(stop.args), signal.SIGINT)) from None
    except Exception as error:
        if (said := _said(error, more)) is None:
            error.add_note("This is a bug in counterpoise, not in what was typed: report it with these lines.")
            raise
        print(f"error: {' '.join(said.split())}", file=sys.stderr)
        raise SystemExit(1) from None


@contextmanager
def until_enough_is_read() -> Iterator[None]:
    """Answers that come one by one end quietly where their reader ends, as `head` does, with the status of SIGPIPE."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end
        raise SystemExit(128 + signal.SIGPIPE) from None


def _said(error: Exception, more: tuple[type[Exception], ...]) -> str | None:
    """What a user is told; None of a bug. What Python itself says of a lost file or key tells no stranger what to do."""
    if (
        isinstance(error, FileNotFoundError)
        and error.filename is not None
        and error.strerror == os.strerror(errno.ENOENT)
    ):
        return f"{error.filename}: expected a file or folder, found nothing of that name; check the path"
    if isinstance(error, OSError) and error.errno in ADVICE:
        place = error.filename2 or error.filename or "what is written or read"
        return f"{place}: {error.strerror}; {ADVICE[error.errno]}"
    if isinstance(error, KeyError) and isinstance(error, more):
        return str(error.args[0])
    first = (str(error).strip() or type(error).__name__).split("\n")[0]
    for kind in type(error).__mro__:
        if told := KINDS.get(f"{kind.__module__}.{kind.__qualname__}"):
            return told.format(first)
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError, *more)):
        return str(error)
    if isinstance(error, ImportError) and error.name is None:  # raised by hand: a library asks for another one
        return str(error)
    if isinstance(error, RuntimeError):  # torch has no classes for these
        if "DefaultCPUAllocator" in first or "out of memory" in first:
            return FULL.format(first)
        if "not implemented for '" in first:
            return f"{first}; give another --dtype or --device"
        if first.startswith(("CUDA error", "cuDNN error", "NCCL error", "HIP error", "MPS backend")):
            return FAILED.format(first)
    if (read := _read_by_transformers(error)) is not None:
        first = f"{type(error).__name__}: {first}"
        return TEMPLATE.format(first) if read == "template" else UNREADABLE.format(read, first)
    return first if type(error) is Exception else None  # tokenizers and other Rust say what is wrong so


def _read_by_transformers(error: Exception) -> str | None:
    """What transformers was given to read when it failed: a folder, or a "template"; None where it was not reading.

    A wrong type in a config or tokenizer, or a template that divides by zero, ends in any kind of error, deep in there.
    """
    found = None
    inside = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        room, name = str(frame.f_globals.get("__name__")).partition(".")[0], frame.f_code.co_name
        if room == "counterpoise":
            found, inside = None, False
        elif room == "transformers" and not inside:
            inside = True
            if name in READERS:
                found = str(frame.f_locals.get("pretrained_model_name_or_path", "the model's config.json"))
            elif name == "apply_chat_template":
                found = "template"
            elif str(frame.f_globals.get("__name__")).startswith("transformers.tokenization"):
                found = str(getattr(frame.f_locals.get("self"), "name_or_path", "the tokenizer"))
    return found


@contextmanager
def bars(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """What is being done, as one live line on stderr, and a line at the end on where the time went.

    A stderr that is no terminal gets the last line alone, and of several processes the first one alone tells.
    """
    if quiet or not is_first():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    spent: dict[str, float] = {}
    begun = last = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        line = progress.add_task("starting", total=None)

        def advance(stage: str, done: int, total: int) -> None:
            nonlocal last
            if stage not in spent:
                progress.reset(line, description=stage, total=total)
            spent[stage] = spent.get(stage, 0.0) - last + (last := time.monotonic())
            progress.update(line, description=stage, completed=done, total=total)

        yield advance
    if len(spent) > 1:
        longest = sorted(spent, key=lambda stage: -spent[stage])[:3]
        told = ", ".join(f"{stage} {spent[stage]:.0f} s" for stage in longest)
        print(f"{len(spent)} stages in {time.monotonic() - begun:.0f} s; the longest: {told}", file=sys.stderr)


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python's collector rests, which looks through all that is imported, again and again: a sixth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def say(text: str) -> None:
    """A line on stderr about what is being done, unless -q was given."""
    if aloud and is_first():
        print(text, file=sys.stderr)


def warn(warnings: Sequence[str]) -> None:
    """Warnings on stderr, a line each."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def print_json(value: object) -> None:
    """The value on stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False, default=dict))


def show_result(result: dict[str, Any], out: Path, work: Path | None, *, as_json: bool = False) -> None:
    """What a finished restore found and where it lies."""
    warn(result["warnings"])
    if as_json:
        print_json(result)
        return
    show_tax(result, brief=True)
    if result.get("already_finished"):
        print(f"{out} holds the result of this very run already; nothing was done again.")
    print(result["verdict"])
    place = out if result.get("out") else work or out.with_name(out.name + ".work")
    print(f"report: {place / 'report.html'}")
    if result.get("out"):
        print(f"checkpoint: {out}")


def show_tax(result: dict[str, Any], *, brief: bool = False) -> None:
    """How far POST has gone, the tax, and what its means hide; in brief the tax alone."""
    from rich.console import Console

    from counterpoise.tables.grid import as_rich
    from counterpoise.tables.logs import calibrations
    from counterpoise.tables.shifts import distances, flips
    from counterpoise.tables.taxes import tax_rich

    console = Console()
    around = [None if brief else table(result) for table in (distances, flips, calibrations)]
    tables = (around[0] and as_rich(around[0]), tax_rich(result), *(t and as_rich(t) for t in around[1:]))
    for table in filter(None, tables):
        console.print(table)


def command_line() -> str:
    """What was typed, as a shell takes it."""
    return shlex.join(["counterpoise", *sys.argv[1:]])
