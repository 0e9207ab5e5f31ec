"""A dry run of `heal`: teachers, student and prompts checked, what it would take told."""

from __future__ import annotations

import math
from dataclasses import replace

from counterpoise.alignment.heal import Healing, as_student, held_in, off_line, take_turns, too_large
from counterpoise.checkpoints.checkpoint import short
from counterpoise.language.costs import Lengths, Plan, Stage
from counterpoise.language.footprints import optimiser_bytes
from counterpoise.planning.looking import fit, look, room
from counterpoise.planning.restore import ASSUMED, BOUNDS
from counterpoise.planning.stages import heal_stages


def plan_heal(wanted: Healing, *, present: bool = True, memory: float = math.inf) -> Plan:
    """What `heal` with this request would do.

    Args:
        present: whether its device is here; else it has so many bytes of memory.

    Raises:
        ValueError, CheckpointError: whatever `heal` would refuse before it loads a model.
    """
    wanted.check()
    pre = look(str(wanted.pre))
    post, start = look(str(wanted.post), base=pre), look(str(wanted.start), base=pre)
    told, mapped = fit(pre, post, (), wanted.out, "post")
    with as_student(wanted.start):
        more, also = fit(pre, start, (), wanted.out, "post")
    shape, itemsize, how = start.shape, wanted.machine.dtype.itemsize, wanted.drawing
    weights, held = shape.parameters * itemsize, held_in(wanted.machine, pre.dtype, post.dtype)
    turns = not present and take_turns(held, weights, memory)
    if None not in (pre.weights, post.weights, start.weights):
        pair, own = wanted.pairs()
        more += [f"warning: {line}" for line in off_line(pair, own)]
        turns = turns or (present and too_large(pair, wanted))
    _, sources, warned = wanted.sources(start.folder)
    told += [line for line in [*more, *(f"warning: {w}" for w in warned)] if line not in told]
    told += [f"{s.name}: {len(s.taught):,} taught, {len(s.checked):,} looked at" for s in sources]
    if continued := wanted.asked_to_continue(len(sources)):
        told.append(
            f"{'' if sources[1:] else 'no questions: '}{continued:,} openings that PRE draws from its start token"
        )
    told.append(f"teachers: {'memory is too small for both, they take turns from disk' if turns else 'both at once'}")
    lengths = [len(ids) for s in sources for ids in (*s.taught, *s.checked)]
    taught = wanted.teaching
    at = Lengths(sum(lengths) / len(lengths), max(lengths), how.max_new_tokens, taught.micro_batch_size, itemsize)
    writing = Stage("writing OUT", f"{weights / 1e9:.2f} GB")
    resident = {"weights": weights, **optimiser_bytes(shape.parameters, itemsize)}
    if held:  # the others are mapped
        resident["teachers"] = (1 if turns else held) * weights
    at = replace(
        at,
        recompute=wanted.machine.recompute,
        room=room(wanted.machine.device, present, memory, sum(resident.values())),
    )
    stages = (*heal_stages(shape, at, taught, draw=how.batch_size), writing)
    points = taught.points
    told.append(f"on the way: {points} checkpoints, and the state (weights and Adam's moments) up to twice")
    dtype = "bfloat16" if wanted.machine.bf16 else short(wanted.machine.dtype)
    why, disk = (BOUNDS, *ASSUMED), (7 + points) * weights
    return Plan(stages, resident, dtype, mapped + also, disk, tuple(told), why, start.model, at)
