"""The stages of `restore` and of `align` with their work and memory, from shapes and counts: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from counterpoise.alignment.heal import CHECKED
from counterpoise.alignment.settings import Teaching
from counterpoise.evaluation.parts import Part
from counterpoise.language import costs
from counterpoise.language.costs import AGAIN, Lengths, Stage, at_once, drawn, training
from counterpoise.language.divergence import HELD, WIDE
from counterpoise.language.footprints import drawing_bytes, scoring_bytes, training_bytes
from counterpoise.language.memory import USUAL, Rows
from counterpoise.language.shapes import Items, Shape
from counterpoise.language.work import Work
from counterpoise.search.candidates import Extent, Search
from counterpoise.search.retention import OPENINGS

DISTANCE = "distance from PRE"
REPLAYED, DRAWING, TRAINING = "replay: PRE's responses", "drawing and rewards", "training"
"""Stages of `align`."""


def restore_stages(
    scale: Extent,
    parts: Mapping[Part, int],
    items: Mapping[Part, Sequence[Items]],
    searches: Sequence[Search],
    replies: int,
    plain: int,
    opening: float = 4.0,
) -> tuple[Stage, ...]:
    """What `restore` runs at most, in its order.

    Args:
        parts: prompts of each part.
        replies: responses a prompt where reward is measured.
        plain: how many plain averages are measured.
        opening: tokens of what PRE's own text goes on from.
    """
    shape, at = scale.shape, scale.at
    mixed = Work(update=shape.parameters)

    def measured(part: Part, noun: str, count: int) -> Stage:
        work = drawn(shape, scale.reward, at, prompts=parts[part], n=replies) + mixed
        memory = at.drawing_memory(shape, n=replies)
        for ability in items[part]:
            how = {"batch": at.scored_at_once(shape, ability), "itemsize": at.itemsize}
            work += costs.measuring(shape, ability, **how)
            memory = max(memory, scoring_bytes(shape, ability, **how))
        total = sum(i.count for i in items[part])
        fewest = min((at.scored_at_once(shape, i) for i in items[part]), default=0)
        scored = at_once(at.scores, fewest) if items[part] else ""
        what = f"{noun} x ({parts[part] * replies:,} responses{at.said(shape, replies)}, {total:,} items{scored})"
        return Stage(f"{part} data", what, work * count, memory)

    averages = 2 + plain + sum(search.averages(scale.means) for search in searches)
    found = dict.fromkeys(stage for search in searches for stage in search.cost(scale))
    validation = measured("validation", f"{averages} averages", averages)
    answers, texts = parts["held-out"] * replies, len(OPENINGS)
    read = costs.forward(shape, at.prompt + at.response, sequences=2 * answers, logits=at.response)
    read += costs.forward(shape, opening + at.response, sequences=texts, logits=at.response)
    made = costs.drawing(
        shape, opening, at.response, prompts=texts, batch=at.drawn_at_once(shape), itemsize=at.itemsize
    )
    logits = answers * at.response * shape.vocabulary
    memory = int(min(HELD, logits * at.itemsize) + 12 * min(WIDE, logits))
    what = f"POST and the pick: {2 * answers:,} answers, {texts} texts of PRE"
    distance = Stage(DISTANCE, what, made + (read + mixed) * 4, memory)  # 2 models, of 2 pairs
    return validation, *found, measured("held-out", "4 averages at most", 4), distance


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
    draw: Rows = USUAL
    kd: bool = False
    replay: float = 0.0
    replayed: tuple[int, int] = (0, 0)


def align_stages(shape: Shape, reward: Shape | None, at: Lengths, loop: Loop, *, step: int = 0) -> tuple[Stage, ...]:
    """What `align` runs, in its order; an early end makes it less.

    Args:
        step: bytes that a step of the optimiser takes for a moment, when the activations are gone.
    """
    times, sides, again = loop.rounds, 2 if loop.method == "dpo" else 1, AGAIN if at.recompute else 1
    sequences = sides * loop.prompts
    # KD keeps no more than the method's own loss does, and comes after it.
    trains = max(
        step,
        training_bytes(shape, sides * at.batch, at.longest, at.response, at.itemsize, recompute=at.recompute),
        training_bytes(shape, at.batch, *loop.replayed, at.itemsize, recompute=at.recompute) if loop.replay else 0,
    )
    stages: list[Stage] = []
    if loop.method in ("rsf", "ppo"):
        # n to each of as many prompts as there is room for
        asked: Rows = "auto" if loop.draw == "auto" else loop.n * max(1, loop.draw // loop.n)
        together = at.drawn_at_once(shape, loop.n, asked)
        work = drawn(shape, reward, at, prompts=loop.prompts, n=loop.n, batch=together) * times
        memory = drawing_bytes(shape, together, at.longest, at.response, at.itemsize)
        what = f"{times} iterations x {loop.prompts:,} prompts x {loop.n} responses{at_once(asked, together)}"
        stages.append(Stage(DRAWING, what, work, memory))
    passed = costs.forward(shape, at.prompt + at.response, sequences=sequences, logits=at.response)
    if loop.method == "ppo":
        logits = scoring_bytes(shape, Items("", 1, 0, 1, at.response), batch=at.batch, itemsize=at.itemsize)
        what = f"{times} iterations x {loop.prompts:,} responses, the policy's and PRE's"
        stages.append(Stage("log-probabilities", what, passed * (2 * times), logits))
    own = one = training(shape, at.prompt, at.response, sequences=sequences) * again
    if loop.method == "dpo":
        one += passed  # of the reference
    if loop.kd:
        one += own + passed
    if loop.replay:
        one += training(shape, 0, at.response * loop.replay, sequences=sequences) * again
    noun = {"dpo": "pairs", "distil": "samples"}.get(loop.method, "responses")
    what = f"{loop.epochs} epochs x {loop.prompts:,} {noun}"
    if loop.method in ("rsf", "ppo"):
        what = f"{times} iterations x {what}"
    stages.append(Stage(TRAINING, what, one * (times * loop.epochs), trains))
    return tuple(stages)


def heal_stages(shape: Shape, at: Lengths, taught: Teaching, *, draw: Rows) -> tuple[Stage, ...]:
    """What a healing runs at most; `draw` answers are drawn at once."""
    together = at.drawn_at_once(shape, asked=draw)
    steps, points, both = taught.steps, taught.points, 2 * taught.batch_size
    asked, looks = both * steps, 2 * CHECKED * (1 + points)
    passed = costs.forward(shape, at.prompt + at.response, sequences=asked + 2 * looks, logits=at.response)
    logits = math.ceil(
        at.batch * (at.response + 1) * shape.vocabulary * at.itemsize
    )  # the teacher's beside the student's
    drawing = drawn(shape, None, at, prompts=asked + looks, batch=together)
    memory = drawing_bytes(shape, together, at.longest, at.response, at.itemsize)
    trains = training_bytes(shape, at.batch, at.longest, at.response, at.itemsize, recompute=at.recompute) + logits
    work = passed + training(shape, at.prompt, at.response, sequences=asked) * (AGAIN if at.recompute else 1)
    return (
        Stage(
            "healing: answers",
            f"{asked + looks:,} responses of the student, {points} points{at_once(draw, together)}",
            drawing,
            memory,
        ),
        Stage("healing: lessons", f"{steps} steps x {both:,} answers, two teachers", work, trains),
    )
