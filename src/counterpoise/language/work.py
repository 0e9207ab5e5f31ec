"""What is to be done: operations, bytes and steps, and how long they take on a device."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import NamedTuple


class Speed(NamedTuple):
    """How fast a device is.

    Attributes:
        flops: floating-point operations a second.
        bytes: of its memory read in a second; infinite where that is part of `step`.
        drawn, trained: operations a second while tokens are drawn one by one, and with a gradient; None: as `flops`.
        step: seconds that drawing one token takes beside each row's operations: weights read, launches, Python.
        update: seconds an element of the update takes to be mixed in.
        start: seconds until a process has begun.
    """

    flops: float
    bytes: float
    drawn: float | None = None
    trained: float | None = None
    step: float = 0.0
    update: float = 0.0
    start: float = 0.0


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        flops: floating-point operations in all.
        traffic: bytes that must be read one step after another: while a response is drawn, all weights per token.
        drawn, trained: of the operations those of drawing token by token, and those of passes with a gradient.
        steps: tokens drawn one after another, rows of a batch together.
        update: elements of the update that are mixed in; a gradient's projection on one counts as `PROJECTED` of that.
    """

    flops: float = 0.0
    traffic: float = 0.0
    drawn: float = 0.0
    trained: float = 0.0
    steps: float = 0.0
    update: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(a * times for a in astuple(self)))

    def seconds(self, speed: Speed) -> float:
        """The larger of operations / speed and traffic / speed, each hiding behind the other at best; then steps and mixing.

        >>> Work(8e14, 1e12).seconds(Speed(4e14, 2e12))
        2.0
        >>> Work(8e14, steps=100, update=1e9).seconds(Speed(4e14, 2e12, step=0.03, update=2e-9))
        7.0
        """
        drawn, trained = self.drawn / (speed.drawn or speed.flops), self.trained / (speed.trained or speed.flops)
        busy = (self.flops - self.drawn - self.trained) / speed.flops + drawn + trained
        return max(busy, self.traffic / speed.bytes) + self.steps * speed.step + self.update * speed.update


PROJECTED = 0.35
"""A gradient's projection on an element of the update, in elements mixed: taken for granted, of one CPU."""
