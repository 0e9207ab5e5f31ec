"""Metrics of a training told to TensorBoard, Weights & Biases, trackio and others, through accelerate's trackers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any

PROJECT = "counterpoise"
_told: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


class Reporter:
    """Trackers of accelerate, opened with the first line: a run that is refused leaves no trace of itself there.

    What they print goes to stderr: stdout is the command's.
    """

    def __init__(self, names: Sequence[str], folder: Path, *, cpu: bool) -> None:
        self._names, self._folder, self._cpu = list(names), folder, cpu
        self._accelerator: Any = None

    def tell(self, line: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl, at its step or iteration."""
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float))}
        with redirect_stdout(sys.stderr):
            if self._accelerator is None:
                from accelerate import Accelerator

                self._accelerator = Accelerator(cpu=self._cpu, log_with=self._names, project_dir=self._folder)
                plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in settings.items()}
                self._accelerator.init_trackers(PROJECT, config=plain)
            self._accelerator.log(numbers, step=line.get("step", line["iteration"]))

    def close(self) -> None:
        """Finish what was opened."""
        if self._accelerator is not None:
            with redirect_stdout(sys.stderr):
                self._accelerator.end_training()


@contextmanager
def reporting(names: Sequence[str], folder: Path, *, device: str = "cpu") -> Iterator[None]:
    """Inside, every line of metrics that a run writes is told to these trackers as well; the first process tells.

    Args:
        names: as accelerate calls them: tensorboard, wandb, trackio, mlflow, ...; or of a class that was given to its
            `register_tracker_class`.
        folder: where those write that write files: tensorboard's events lie in FOLDER/counterpoise.
    """
    if not names:
        yield
        return
    refuse_absent(names)
    reporter = Reporter(names, folder, cpu=device == "cpu")
    before = _told.set(reporter)
    try:
        yield
    finally:
        _told.reset(before)
        reporter.close()


def tell(line: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Tell a line to the trackers of `reporting`, if there are some."""
    if (reporter := _told.get()) is not None:
        reporter.tell(line, settings)


def refuse_absent(names: Sequence[str]) -> None:
    """Raise a ValueError for a tracker that accelerate does not know or that is not installed."""
    if not names:
        return
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import LoggerType
    except ModuleNotFoundError:
        raise ValueError("--report-to: expected accelerate, found none; pip install 'counterpoise[align]'") from None
    own = [n for n in LOGGER_TYPE_TO_CLASS if n not in LoggerType.list()]
    there = [*map(str, get_available_trackers()), *own]
    for name in names:
        if name in there:
            continue
        if name in LoggerType.list() and name != "all":
            raise ValueError(f"--report-to: expected {name} to be installed, found it missing; pip install {name}")
        known = ", ".join(n for n in [*LoggerType.list(), *own] if n != "all")
        raise ValueError(f"--report-to: expected {known}, found {name!r}")
