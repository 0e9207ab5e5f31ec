"""What a run would take: operations, memory and time, computed from shapes before anything is drawn or trained.

Pure functions: shapes and counts in, numbers out. `counterpoise.planning` reads the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from counterpoise.language.footprints import (
    drawing_bytes,
    gathered_bytes,
    scoring_bytes,
    training_bytes,
)
from counterpoise.language.memory import Rows, rows_that_fit
from counterpoise.language.shapes import Items, Shape
from counterpoise.language.work import Speed, Work

AGAIN = 4 / 3
"""The operations of a gradient whose forward pass is done again, in those of one that is not."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        what: counts in words: passes, responses, items.
        memory: bytes at its peak beside what is resident all the time.
    """

    name: str
    what: str
    work: Work = Work()
    memory: int = 0


@dataclass(frozen=True)
class Plan:
    """A run, stage by stage.

    Attributes:
        resident: what lies in the device's memory all the time -> bytes.
        dtype: of the computation.
        mapped: bytes of files that are read through the page cache of the host; the system can drop them.
        disk: bytes that will be written.
        told: what was resolved, in sentences.
        assumed: what the numbers take for granted, in sentences.
        model, at: what a device's speed is measured with: the architecture on the meta device, and how long its sequences are.
    """

    stages: tuple[Stage, ...]
    resident: Mapping[str, int]
    dtype: str
    mapped: int = 0
    disk: int = 0
    told: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    model: nn.Module | None = None
    at: Lengths | None = None

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: all that is resident, and the largest need of a stage."""
        return sum(self.resident.values()) + max((s.memory for s in self.stages), default=0)

    def seconds(self, speed: Speed) -> float:
        """The start, and all stages one after the other."""
        return speed.start + sum(s.work.seconds(speed) for s in self.stages)


@dataclass(frozen=True)
class Lengths:
    """How long sequences are and how many run at once.

    Attributes:
        prompt, longest: mean and longest prompt, tokens.
        response: taken for every response: the longest that is allowed.
        batch: sequences at once in training; `restore` draws 8 times as many and scores twice as many.
        itemsize: bytes of a weight.
        shares: processes that share the sequences of a gradient, among which a model is cut up.
        auto: as many are drawn and scored as fit, whatever `batch` says.
        fixed: caches are of fixed length while responses are drawn.
        recompute: a training step computes layers again.
        room: bytes for a stage beside what is resident, so that a run would halve what takes more; None: nobody knows.
    """

    prompt: float
    longest: int
    response: float
    batch: int
    itemsize: int
    shares: int = 1
    auto: bool = False
    fixed: bool = False
    recompute: bool = False
    room: float | None = None

    @property
    def draws(self) -> Rows:
        """The responses that are asked for at once."""
        return "auto" if self.auto else 8 * self.batch

    @property
    def scores(self) -> Rows:
        """The items that are asked for at once."""
        return "auto" if self.auto else 2 * self.batch

    def drawn_at_once(self, shape: Shape, n: int = 1, asked: Rows | None = None) -> int:
        """Responses that a run draws at once, n or more; `asked` where it is for others than `draws`."""
        return rows_that_fit(asked or self.draws, partial(self._drawing, shape), self.room, n)

    def scored_at_once(self, shape: Shape, items: Items) -> int:
        """Items that a run scores at once."""
        need = partial(scoring_bytes, shape, items, itemsize=self.itemsize)
        return rows_that_fit(self.scores, lambda rows: need(batch=rows), self.room)

    def said(self, shape: Shape, n: int = 1) -> str:
        """How many responses a run draws at once; see `at_once`."""
        return at_once(self.draws, self.drawn_at_once(shape, n))

    def drawing_memory(self, shape: Shape, reward: Shape | None = None, n: int = 1) -> int:
        """Bytes while a search draws, and while a reward that is a model rates what was drawn."""
        drawing = self._drawing(shape, self.drawn_at_once(shape, n))
        return drawing + (0 if reward is None else drawing_bytes(reward, 2 * self.batch, 0, 0, self.itemsize))

    def _drawing(self, shape: Shape, rows: int) -> int:
        return drawing_bytes(shape, rows, self.longest, self.response, self.itemsize, fixed=self.fixed)

    def training_memory(self, shape: Shape) -> int:
        """Bytes while the gradient of a search is computed."""
        return self._training(shape, recompute=self.computes_again(shape))

    def computes_again(self, shape: Shape) -> bool:
        """Whether a search's gradient computes layers again: of a model that is cut up, and where there is no room."""
        return self.shares > 1 or self.is_scarce(shape)

    def is_scarce(self, shape: Shape) -> bool:
        """Whether there is no room for all that a search's gradient keeps."""
        return self.room is not None and self._training(shape, recompute=self.shares > 1) > self.room

    def _training(self, shape: Shape, *, recompute: bool) -> int:
        how = math.ceil(self.batch / self.shares), self.longest, self.response, self.itemsize
        kept = training_bytes(shape, *how, recompute=recompute)
        if self.shares == 1:
            return kept + shape.largest * self.itemsize
        gradients = gathered_bytes(shape, self.itemsize, gradients=True) - gathered_bytes(shape, self.itemsize)
        return kept + gradients + 4 * max(shape.outside, shape.block)  # added up in float32


def at_once(asked: Rows, taken: int) -> str:
    """What a stage says of its batch: nothing where it is as it was asked for.

    >>> at_once("auto", 32), at_once(64, 16), at_once(64, 64)
    (', 32 at once', ', 64 at once would be halved to 16', '')
    """
    if asked == "auto":
        return f", {taken} at once"
    return f", {asked} at once would be halved to {taken}" if taken < asked else ""


def forward(shape: Shape, tokens: float, *, sequences: float = 1, logits: float = 0, start: float = 0) -> Work:
    """A pass over sequences of `tokens` tokens: 2 operations per weight and token, and the attention.

    flops = sequences * (2 active tokens + 2 head logits + 4 layers queries (tokens start + tokens (tokens + 1) / 2))

    Kaplan et al. 2020 (arXiv 2001.08361), table 1, with the sum over the positions that causal attention sees in the place
    of the whole square. Norms, activations and the softmax are left out: some per cent.

    Args:
        logits: positions of a sequence whose logits are computed.
        start: tokens before these, already in the cache.
    """
    seen = tokens * start + tokens * (tokens + 1) / 2
    one = 2 * shape.active * tokens + 2 * shape.head * logits + 4 * shape.layers * shape.queries * seen
    return Work(one * sequences)


def training(shape: Shape, prompt: float, response: float, *, sequences: float) -> Work:
    """Forward and backward over prompt and response: three times the forward pass, logits of the response alone."""
    work = forward(shape, prompt + response, sequences=sequences, logits=response) * 3
    return replace(work, trained=work.flops)


def drawing(
    shape: Shape, prompt: float, response: float, *, prompts: float, n: int = 1, batch: int, itemsize: int
) -> Work:
    """n responses to each prompt, `batch` at once, every one as long as `response`: an upper bound.

    Each step reads all weights once, of a mixture all experts, and the cache of every response; the prompt is run once
    for its n responses.
    """
    first = forward(shape, prompt, sequences=prompts, logits=1)
    rest = forward(shape, response, sequences=prompts * n, logits=response, start=prompt)
    steps = math.ceil(prompts / max(1, batch // n)) * response
    read = 2 * shape.layers * shape.keys * (response * prompt + response * (response + 1) / 2) * prompts * n
    traffic = itemsize * (steps * (shape.body + shape.head) + read)
    return first + replace(rest, drawn=rest.flops) + Work(traffic=traffic, steps=steps)


def measuring(shape: Shape, items: Items, *, batch: int, itemsize: int) -> Work:
    """Scoring, and drawing where there is something to draw, of an ability's items on one part."""
    found, each = Work(), items.count * items.choices
    if items.continuation and items.shared:
        found += forward(shape, items.prompt, sequences=items.count, logits=1)
        found += forward(shape, items.continuation, sequences=each, logits=items.continuation, start=items.prompt)
    elif items.continuation:
        whole = items.prompt + items.continuation
        found += forward(shape, whole, sequences=each, logits=whole)
    if items.generated:
        found += drawing(shape, items.prompt, items.generated, prompts=items.count, batch=batch, itemsize=itemsize)
    return found


def drawn(
    shape: Shape, reward: Shape | None, at: Lengths, *, prompts: int, n: int = 1, batch: int | None = None
) -> Work:
    """Drawing n responses to each of some prompts, `batch` at once, and asking the reward for them."""
    batch = batch or at.drawn_at_once(shape, n)
    work = drawing(shape, at.prompt, at.response, prompts=prompts, n=n, batch=batch, itemsize=at.itemsize)
    if reward is not None:
        work += forward(reward, at.prompt + at.response, sequences=prompts * n)
    return work
