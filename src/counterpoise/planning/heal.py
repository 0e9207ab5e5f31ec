"""A dry run of `heal`: teachers, student and prompts checked, what it would take told."""

from __future__ import annotations

from counterpoise.alignment.heal import CHECKED, Healing, off_line, too_large
from counterpoise.checkpoints.checkpoint import short
from counterpoise.language.costs import (
    Lengths,
    Plan,
    Stage,
    drawing_bytes,
    drawn,
    forward,
    optimiser_bytes,
    training,
    training_bytes,
)
from counterpoise.language.scoring import context_of
from counterpoise.planning.looking import Words, fit, look
from counterpoise.planning.restore import ASSUMED, BOUNDS


def plan_heal(wanted: Healing, *, present: bool = True) -> Plan:
    """What `heal` with this request would do; `present` says whether its device is here.

    Raises:
        ValueError, CheckpointError: whatever `heal` would refuse before it loads a model.
    """
    wanted.check()
    pre = look(str(wanted.pre))
    post, start = look(str(wanted.post), base=pre), look(str(wanted.start), base=pre)
    told, mapped = fit(pre, post, (), wanted.out, "post")
    more, also = fit(pre, start, (), wanted.out, "post")
    shape, itemsize, how = start.shape, wanted.dtype.itemsize, wanted.drawing
    weights, turns = shape.parameters * itemsize, False
    if None not in (pre.weights, post.weights, start.weights):
        pair, own = wanted.pairs()
        more += [f"warning: {line}" for line in off_line(pair, own)]
        turns = present and too_large(pair, wanted)
    words = Words.of(start.folder)
    if words.tokenizer is None:
        raise ValueError(f"{start.name}: expected a tokenizer beside the student's config, found none")
    sources = wanted.sources(words.tokenizer, context_of(start.model.config))
    told += [*more, *(f"{s.name}: {len(s.taught):,} taught, {len(s.checked):,} looked at" for s in sources)]
    if len(sources) == 1:
        told.append(f"no questions: {wanted.openings:,} openings that PRE draws from its start token")
    told.append(
        "teachers: they take turns from disk, as memory is too small for both" if turns else "teachers: both at once"
    )
    lengths = [len(ids) for s in sources for ids in (*s.taught, *s.checked)]
    settings = {"steps": 15, "every": 5, "batch_size": 32, "micro_batch_size": 8, **wanted.settings}
    steps, micro = settings["steps"], settings["micro_batch_size"]
    at = Lengths(sum(lengths) / len(lengths), max(lengths), how.max_new_tokens, micro, itemsize)
    asked, looks = 2 * settings["batch_size"] * steps, 2 * CHECKED * (1 + -(-steps // settings["every"]))
    passed = forward(shape, at.prompt + at.response, sequences=asked + 2 * looks, logits=at.response)
    logits = micro * (at.response + 1) * shape.vocabulary * itemsize  # the teacher's, beside what a training step holds
    stages = (
        Stage("answers of the student", f"{asked + looks:,} responses at most",
              drawn(shape, None, at, prompts=asked + looks, batch=how.batch_size),
              drawing_bytes(shape, how.batch_size, at.longest + at.response, itemsize)),
        Stage("teachers and student", f"{steps} steps of {asked // steps} answers",
              passed + training(shape, at.prompt, at.response, sequences=asked),
              int(training_bytes(shape, micro, at.longest, at.response, itemsize) + logits)),
        Stage("writing OUT", f"{weights / 1e9:.2f} GB"),
    )  # fmt: skip
    teachers = (
        {} if wanted.device == "cpu" and pre.dtype == wanted.dtype else {"teachers": (1 if turns else 2) * weights}
    )
    resident = {"weights": weights, **optimiser_bytes(shape.parameters, itemsize), **teachers}
    points = -(-steps // settings["every"])
    told.append(f"on the way: {points} checkpoints, and the state (weights and Adam's moments) up to twice")
    written = (1 + points) * weights + 6 * weights
    return Plan(
        stages,
        resident,
        "bfloat16" if wanted.bf16 else short(wanted.dtype),
        mapped + also,
        written,
        tuple(told),
        (BOUNDS, *ASSUMED),
    )
