"""The stages of `restore` and of `align` with their work and memory, from shapes and counts: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from counterpoise.evaluation.parts import Part
from counterpoise.language.costs import (
    HMA_PASSES,
    Items,
    Shape,
    Stage,
    Work,
    drawing,
    drawing_bytes,
    forward,
    measuring,
    points,
    scoring_bytes,
    training,
    training_bytes,
    two_sided_passes,
)

REPLAYED = "replay: PRE's responses"
DRAWING = "drawing and rewards"
TRAINING = "training"
"""Stages of `align`."""


@dataclass(frozen=True)
class Lengths:
    """How long sequences are and how many run at once.

    Attributes:
        prompt, longest: mean and longest prompt, tokens.
        response: taken for every response: the longest that is allowed.
        batch: sequences at once in training; `restore` draws 8 times as many.
        itemsize: bytes of a weight.
    """

    prompt: float
    longest: int
    response: float
    batch: int
    itemsize: int


def drawn(
    shape: Shape, reward: Shape | None, at: Lengths, *, prompts: int, n: int = 1, batch: int | None = None
) -> Work:
    """Drawing n responses to each of some prompts, `batch` at once, and asking the reward for them."""
    batch = batch or 8 * at.batch
    work = drawing(shape, at.prompt, at.response, prompts=prompts, n=n, batch=batch, itemsize=at.itemsize)
    if reward is not None:
        work += forward(reward, at.prompt + at.response, sequences=prompts * n)
    return work


def restore_stages(
    shape: Shape,
    reward: Shape | None,
    at: Lengths,
    parts: Mapping[Part, int],
    items: Mapping[Part, Sequence[Items]],
    *,
    means: Sequence[float],
    hma: bool,
    controls: bool,
    size: int,
    replies: int = 1,
    two_sided: str | None = None,
    lambdas: int = 0,
) -> tuple[Stage, ...]:
    """What `restore` runs at most, in its order.

    Args:
        parts: prompts of each part.
        size: responses that a search sees, on each side.
        replies: responses a prompt where reward is measured.
        two_sided: its form of alignment, if it is searched, for so many `lambdas`.
    """
    measured = points(means, hma=hma, controls=controls, lambdas=lambdas)
    inside = sum(mean <= 1 for mean in means)
    draws = drawing_bytes(shape, 8 * at.batch, at.longest + at.response, at.itemsize)
    trains = training_bytes(shape, at.batch, at.longest, at.response, at.itemsize) + shape.largest * at.itemsize
    judged = drawing_bytes(reward, 2 * at.batch, 0, at.itemsize) if reward is not None else 0
    stages = [_measured("validation", measured, "averages", shape, reward, at, parts, items, replies)]
    if hma or two_sided == "imitation":
        asked = min(math.ceil(size / 0.8), parts["proxy"])
        work = drawn(shape, reward, at, prompts=asked, n=2)
        stages.append(Stage("proxies of POST", f"{2 * asked:,} responses", work, draws + judged))
    one = training(shape, at.prompt, at.response, sequences=size)
    if hma and inside:
        what = f"{inside} means, at most {HMA_PASSES} passes over {size:,} responses each"
        stages.append(Stage("search: HMA", what, one * (HMA_PASSES * inside), trains))
    if two_sided is not None:
        stages += _two_sided(shape, reward, at, two_sided, size, lambdas, draws + judged, trains)
    stages.append(_measured("held-out", 4, "averages at most", shape, reward, at, parts, items, replies))
    return tuple(stages)


def _measured(
    part: Part,
    count: int,
    noun: str,
    shape: Shape,
    reward: Shape | None,
    at: Lengths,
    parts: Mapping[Part, int],
    items: Mapping[Part, Sequence[Items]],
    replies: int,
) -> Stage:
    work = drawn(shape, reward, at, prompts=parts[part], n=replies)
    memory = drawing_bytes(shape, 8 * at.batch, at.longest + at.response, at.itemsize)
    for ability in items[part]:
        work += measuring(shape, ability, batch=2 * at.batch, itemsize=at.itemsize)
        memory = max(memory, scoring_bytes(shape, ability, batch=2 * at.batch, itemsize=at.itemsize))
    total = sum(i.count for i in items[part])
    what = f"{count} {noun} x ({parts[part] * replies:,} responses, {total:,} items)"
    return Stage(f"{part} data", what, work * count, memory)


def _two_sided(
    shape: Shape,
    reward: Shape | None,
    at: Lengths,
    form: str,
    size: int,
    lambdas: int,
    draws: int,
    trains: int,
) -> list[Stage]:
    stages = [Stage("words of PRE", f"{size:,} sequences", drawn(shape, None, at, prompts=size), draws)]
    rounds = {"imitation": 0, "contrast": 1, "reward": 5 + lambdas}[form]
    if rounds:
        work = drawn(shape, reward, at, prompts=max(1, size // 4), n=4) * rounds
        stages.append(Stage("rated responses", f"{rounds * size:,} responses", work, draws))
    with_gradient, without = two_sided_passes(form, lambdas)
    work = training(shape, at.prompt, at.response, sequences=size) * with_gradient
    work += forward(shape, at.prompt + at.response, sequences=size, logits=at.response) * without
    what = f"{lambdas} lambdas, at most {with_gradient} passes over {size:,} sequences"
    if without:
        what += f" and {without} without a gradient"
    return [*stages, Stage("search: both sides", what, work, trains)]


@dataclass(frozen=True)
class Loop:
    """What decides how much an alignment does.

    Attributes:
        rounds: iterations of rsf and ppo; 1 for what reads its data from a file.
        prompts: of a round; pairs of dpo, samples of distil.
        n: responses a prompt.
        draw: responses drawn at once, or n where that is more.
        kd: whether PRE is distilled: a pass of PRE and one more of the model in training.
        replay: replayed tokens per response token.
        replayed: tokens of the longest prompt and response that are replayed.
    """

    method: str
    rounds: int
    prompts: int
    n: int
    epochs: int
    draw: int = 64
    kd: bool = False
    replay: float = 0.0
    replayed: tuple[int, int] = (0, 0)


def at_once(draw: int, n: int) -> int:
    """Responses that are drawn together: n to each of as many prompts as `draw` has room for, at least to one.

    >>> at_once(64, 24), at_once(8, 32)
    (48, 32)
    """
    return n * max(1, draw // n)


def replayed_stage(shape: Shape, at: Lengths, *, prompts: int, draw: int, free: int) -> Stage:
    """PRE's own responses, one to each prompt, before any training.

    Args:
        free: bytes of what is resident later and not yet.
    """
    work = drawn(shape, None, at, prompts=prompts, batch=draw)
    memory = drawing_bytes(shape, draw, at.longest + at.response, at.itemsize)
    return Stage(REPLAYED, f"{prompts:,} responses", work, max(0, memory - free))


def align_stages(shape: Shape, reward: Shape | None, at: Lengths, loop: Loop, *, step: int = 0) -> tuple[Stage, ...]:
    """What `align` runs, in its order; an early end makes it less.

    Args:
        step: bytes that a step of the optimiser takes for a moment, when the activations are gone.
    """
    times, sides = loop.rounds, 2 if loop.method == "dpo" else 1
    # KD keeps no more than the method's own loss does, and comes after it.
    trains = max(
        step,
        training_bytes(shape, sides * at.batch, at.longest, at.response, at.itemsize),
        training_bytes(shape, at.batch, *loop.replayed, at.itemsize) if loop.replay else 0,
    )
    stages: list[Stage] = []
    if loop.method in ("rsf", "ppo"):
        work = drawn(shape, reward, at, prompts=loop.prompts, n=loop.n, batch=loop.draw) * times
        memory = drawing_bytes(shape, at_once(loop.draw, loop.n), at.longest + at.response, at.itemsize)
        what = f"{times} iterations x {loop.prompts:,} prompts x {loop.n} responses"
        stages.append(Stage(DRAWING, what, work, memory))
    passed = forward(shape, at.prompt + at.response, sequences=sides * loop.prompts, logits=at.response)
    if loop.method == "ppo":
        logits = scoring_bytes(shape, Items("", 1, 0, 1, at.response), batch=at.batch, itemsize=at.itemsize)
        what = f"{times} iterations x {loop.prompts:,} responses, the policy's and PRE's"
        stages.append(Stage("log-probabilities", what, passed * (2 * times), logits))
    one = training(shape, at.prompt, at.response, sequences=sides * loop.prompts)
    if loop.method == "dpo":
        one += passed  # of the reference
    if loop.kd:
        one += training(shape, at.prompt, at.response, sequences=sides * loop.prompts) + passed
    if loop.replay:
        one += training(shape, 0, at.response * loop.replay, sequences=sides * loop.prompts)
    noun = {"dpo": "pairs", "distil": "samples"}.get(loop.method, "responses")
    what = f"{times} iterations x {loop.epochs} epochs x {loop.prompts:,} {noun}"
    if loop.method in ("dpo", "distil"):
        what = f"{loop.epochs} epochs x {loop.prompts:,} {noun}"
    stages.append(Stage(TRAINING, what, one * (times * loop.epochs), trains))
    return tuple(stages)
