"""A dry run of `align`: its data, settings and mitigations checked, what it would take told."""

from __future__ import annotations

import math
from dataclasses import replace

from counterpoise.alignment.distil import read_samples
from counterpoise.alignment.from_options import LONGEST_TEXT, Alignment
from counterpoise.alignment.heal import held_in
from counterpoise.alignment.mitigations import table
from counterpoise.alignment.mitigations.replay import read_corpus
from counterpoise.alignment.preferences import read_preferences
from counterpoise.alignment.settings import InRounds
from counterpoise.alignment.training.processes import ASSUMED_SHARES
from counterpoise.checkpoints.checkpoint import short
from counterpoise.language.costs import Plan, Stage, at_once, drawn
from counterpoise.language.footprints import drawing_bytes, gathered_bytes, optimiser_bytes, step_bytes, trained
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.language.shapes import Shape
from counterpoise.language.ways import context_of
from counterpoise.planning.looking import Source, judged, look, look_at_reward, room, room_for, said_of
from counterpoise.planning.restore import ASSUMED, BOUNDS
from counterpoise.planning.stages import DRAWING, REPLAYED, TRAINING, Loop, align_stages
from counterpoise.planning.texts import Words, lengths

CUT_UP = ("weights", "PRE, frozen")
"""What is cut up in any case; with LoRA the rest is of the adapter, which is not."""


def plan_align(
    wanted: Alignment, *, shared_by: int | None = 1, present: bool = False, memory: float = math.inf
) -> Plan:
    """What `align` with this request would do.

    Args:
        present: whether its device is here, so that frozen weights are known to be mapped where it is a CPU; else it has
            so many bytes of memory.
        shared_by: processes that the weights are cut up among; memory is that of one of them. None takes ASSUMED_SHARES.

    Raises:
        ValueError, CheckpointError: whatever `align` would refuse before it loads a model.
    """
    wanted.check()
    model = look(wanted.source)
    shape, held, machine, settings = model.shape, wanted.held, wanted.machine, wanted.bound
    itemsize, micro = machine.dtype.itemsize, settings.micro_batch_size
    weights = shape.parameters * itemsize
    table.check_layers(held, shape.layers)
    files = wanted.files
    if "merge_base" in held:
        look(held["merge_base"])
    loop, asked, responses = _loop(wanted)
    told = [f"no weights: preflight on shapes only ({model.name})"]
    if model.weights is not None:
        told = [f"{model.name}: {len(model.weights)} tensors in {short(model.dtype)}"]
    if given := [f"{row.option} {held[row.option]}" for row in table.chosen(held)]:
        told.append("mitigations: " + ", ".join(given))
    numbers = {n: v for n, v in settings.told.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    told.append(f"{wanted.method}: " + ", ".join(f"{n} {v:g}" for n, v in numbers.items()))
    judge = look_at_reward(files.reward) if files.reward is not None else None
    told += [said_of(files.reward, judge)] if files.reward is not None else []
    words = Words.of(model.folder)
    asks = settings.drawing or wanted.own_drawing
    at, assumed = lengths(model, asked, asks, itemsize, micro, longest_refused=not responses)
    bounds = BOUNDS
    if responses:  # of a file, not drawn: memory is that of the longest, time that of the mean
        sizes = words.lengths(responses)
        mean = sum(sizes) / len(sizes)
        at = replace(at, response=mean, longest=at.longest + math.ceil(max(sizes) - mean))
        bounds = f"responses of {mean:.0f} tokens in the mean, the longest {max(sizes)}; nothing cut or left out"
    count = trained(shape, held.get("lora"))
    taken = [row.takes(count * itemsize) for row in table.chosen(held)]
    references = (wanted.method in ("ppo", "dpo")) + sum(t.frozen for t in taken)
    resident = {"weights": weights, **optimiser_bytes(count, itemsize), **judged(judge)}
    mapped = present and shared_by == 1 and not held_in(machine, model.dtype)
    if references and not mapped:
        resident["PRE, frozen"] = references * weights
    for t in reversed(taken):
        resident |= t.resident
    kept = {"dpo": 5, "distil": loop.epochs}.get(loop.method, loop.rounds) if wanted.keep_checkpoints else 1
    written = (1 + kept) * weights + 2 * 3 * count * itemsize
    told += room_for(wanted.out, written)
    told.append(f"on the way: {kept} checkpoints, and the state (weights and Adam's moments) up to twice")
    cuda = not machine.device.startswith("cpu")
    moment = step_bytes(shape, count, itemsize, fused=wanted.method == "dpo", cuda=cuda)  # TRL's is fused
    moment += sum(t.moment for t in taken)  # the weights before the step
    shares = shared_by or ASSUMED_SHARES
    alike = "lora" not in held and shares > 1  # what is trained is cut up as the weights are
    if shares > 1:
        resident = {
            what: size // shares if what in CUT_UP or (alike and what != "reward model") else size
            for what, size in resident.items()
        }
    width = 2 if machine.bf16 else itemsize
    copies = 2 * (shape.body + shape.head) if machine.bf16 else 0  # of the matrices, as autocast casts them

    def more(stage: str) -> int:
        return copies if shares == 1 else _gathered(shape, width, stage)

    beside = room(machine.device, present, memory, sum(resident.values()) + more(DRAWING))
    at = replace(at, recompute=machine.recompute, room=beside)
    first: list[Stage] = []
    if held.get("replay") == "self":
        own, draw = files.asked, wanted.own_drawing.batch_size
        there, _ = lengths(model, own, wanted.own_drawing, itemsize, micro)
        loop = replace(loop, replayed=(there.longest, int(there.response)))
        later = 3 * count * itemsize // (shares if alike else 1)  # gradients and moments, which are not there yet
        there = replace(there, room=None if at.room is None else at.room + later)
        together = there.drawn_at_once(shape, asked=draw)
        needed = drawing_bytes(shape, together, there.longest, there.response, itemsize) - later
        work = drawn(shape, None, there, prompts=len(own), batch=together)
        first = [Stage(REPLAYED, f"{len(own):,} responses{at_once(draw, together)}", work, max(0, needed))]
    elif "replay" in held:
        chat = wanted.own_drawing.chat
        longest = [_longest_replayed(c, model, words, chat=chat) for c in table.corpora(held["replay"])]
        loop = replace(loop, replayed=max(longest, key=sum))
    ours = align_stages(shape, judge.shape if judge else None, at, loop, step=moment // shares if alike else moment)
    stages = tuple(replace(s, memory=s.memory + more(s.name)) for s in (*first, *ours))
    if shares > 1:
        told.append(f"--shard: memory is that of one of {shares} processes, which holds all weights while it draws")
        if shared_by is None:
            assumed = [*assumed, f"{shares} processes, as torchrun has not said how many"]
    dtype = "bfloat16" if machine.bf16 else short(machine.dtype)
    why = (*assumed, bounds, *ASSUMED)
    return Plan(stages, resident, dtype, model.mapped, written, tuple(told), why, model.model, at)


def _gathered(shape: Shape, itemsize: int, stage: str) -> int:
    """Whole weights beside those that a process holds: all while drawing, else see `gathered_bytes`."""
    if stage in (DRAWING, REPLAYED):
        return shape.parameters * itemsize
    return gathered_bytes(shape, itemsize, gradients=stage == TRAINING)


def _loop(wanted: Alignment) -> tuple[Loop, list[Prompt], list[str]]:
    """How much the method does, and the prompts and responses that were given."""
    files, settings, held = wanted.files, wanted.bound, wanted.held
    responses: list[str] = []
    if files.preferences is not None:
        pairs = read_preferences(files.preferences)
        asked = [p.prompt for p in pairs]
        responses = [text for p in pairs for text in (p.chosen, p.rejected)]
    elif files.samples is not None:
        found = read_samples(files.samples)
        asked, responses = [s.prompt for s in found], [s.response for s in found]
    else:
        asked = files.asked
    drawing = settings.drawing or Drawing()
    rounds, size = 1, len(asked)
    if isinstance(settings, InRounds):
        rounds, size = settings.iterations, min(settings.prompts_per_iteration, size)
    loop = Loop(
        "distil" if files.samples is not None else wanted.method,
        rounds,
        size,
        drawing.n,
        settings.epochs,
        drawing.batch_size,
        "kd" in held,
        float(held.get("replay_ratio", 1.0)) if "replay" in held else 0.0,
    )
    return loop, asked, responses


def _longest_replayed(corpus: str, model: Source, words: Words, *, chat: bool) -> tuple[int, int]:
    """Tokens of the longest prompt and response of a corpus."""
    limit = min(LONGEST_TEXT, context_of(model.model.config) or LONGEST_TEXT)
    if words.tokenizer is None:
        return 1, limit - 1
    examples = read_corpus(corpus, words.tokenizer, max_tokens=limit, chat=chat)
    response = max(len(e.response) for e in examples)
    return max(len(e.prompt) + len(e.response) for e in examples) - response, response
