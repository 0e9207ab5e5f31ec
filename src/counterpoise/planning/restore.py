"""A dry run of `restore`: everything that can be checked is checked, what it would take is told."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from counterpoise.alignment.heal import held_in, take_turns
from counterpoise.alignment.training.models import Machine
from counterpoise.alignment.training.processes import started
from counterpoise.averaging.partition import partition
from counterpoise.checkpoints.checkpoint import short
from counterpoise.checkpoints.files import read_json
from counterpoise.evaluation.abilities import is_file
from counterpoise.evaluation.panel import Panel, PanelFiles
from counterpoise.evaluation.parts import Part
from counterpoise.evaluation.results import measurement
from counterpoise.language.costs import Plan, Stage
from counterpoise.language.dtypes import computed_in
from counterpoise.language.footprints import gathered_bytes
from counterpoise.language.memory import Rows, free_memory
from counterpoise.language.prompts import Prompt, read_prompts
from counterpoise.planning.looking import fit, judged, look, look_at_reward, room, said_of
from counterpoise.planning.stages import heal_stages, restore_stages
from counterpoise.planning.texts import Words, lengths, look_at_abilities
from counterpoise.restoration.request import RESULT, Request
from counterpoise.search.candidates import HMA, Extent, Ramp, TwoSided
from counterpoise.search.retention import OPENINGS
from counterpoise.statistics.demand import WITHIN, would_do

BOUNDS = "every response as long as --max-new-tokens, no early end of a search or of training: upper bounds"
ASSUMED = (
    "a stage's memory comes on top of the weights and of all else that is resident",
    "nothing for loading, hashing and the disk, for a reward that is a function, or for starting where --speed is given",
)


SPREAD, OF_POST = 1.23, 0.67
"""From prompt to prompt, what an average has beyond the demanded reward: of the gain, and of the spread of POST's own gain;
medians of the committed runs of SmolLM2-135M-Instruct (experiments/statistics)."""


def plan_restore(request: Request, panel: PanelFiles, *, present: bool = True, memory: float = math.inf) -> Plan:
    """What `restore` with this request and panel would do.

    Args:
        present: whether its device is here; else it has so many bytes of memory.

    Raises:
        ValueError, CheckpointError: whatever `restore` would refuse before it loads a model.
    """
    drawing, means = panel.drawing, request.grid
    drawing.check()
    files = sum(map(is_file, panel.abilities))
    request.check(files, len(panel.abilities) - files)
    first = look(str(request.pre))
    second = look(str(request.post), base=first)
    told, mapped = fit(first, second, request.drop, request.out, request.donor, shard=request.shard)
    if first.weights is not None and second.weights is not None:
        request.check_words(first.weights, second.weights)
    giver = first if request.donor == "pre" else second  # whose tokenizer and context count
    cut = partition({n: tuple(p.shape) for n, p in second.model.named_parameters()}, request.blocks)
    searched = [s.title for s in request.searches if not isinstance(s, Ramp)]
    alone = f"{' and '.join(searched)} search alone" if searched else "no search: MA and ramps alone"
    told.append(f"HMA: {len(cut)} blocks" if HMA.title in searched else alone)
    unloaded = Panel(read_prompts(panel.prompts), lambda *_: [], (), prompt_limit=panel.prompt_limit)
    parts: dict[Part, list[Prompt]] = {p: unloaded.prompts_of(p) for p in get_args(Part)}
    told.append("prompts: " + ", ".join(f"{len(chosen):,} {part}" for part, chosen in parts.items()))
    if request.mean is None:
        told.append(_prompts_for(request))
    judge = look_at_reward(panel.reward)
    told.append(said_of(panel.reward, judge))
    dtype = request.dtype
    if dtype is None:
        device = request.device if present else None
        dtype = torch.float32 if second.dtype == torch.float16 else computed_in(second.dtype, device)
    shape, itemsize = second.shape, dtype.itemsize
    two_sided = [s for s in request.searches if isinstance(s, TwoSided)]
    at, assumed = lengths(giver, unloaded.asked, drawing, itemsize, drawing.rows // 2)
    items, unseen = look_at_abilities(
        panel.abilities, giver, limit=panel.limit, drawing=drawing, trust_tasks=panel.trust_tasks
    )
    told += [f"{i.name}: {i.count:,} validation items" for i in items["validation"]]
    resident = {"weights": math.ceil(shape.parameters / request.shard) * itemsize, **judged(judge)}
    auto, whole = drawing.batch_size == "auto", gathered_bytes(shape, itemsize) if request.shard > 1 else 0
    beside = room(request.device, present, memory, sum(resident.values()) + whole)
    if request.shard > 1 and not auto:
        beside = None  # processes in step halve no batch
    at = replace(at, auto=auto, fixed=drawing.compiled, room=beside, shares=request.shard)
    scale = Extent(shape, judge.shape if judge else None, at, len(parts["proxy"]), means)
    counts = {part: len(chosen) for part, chosen in parts.items()}
    opening = Words.of(giver.folder).mean(OPENINGS)
    stages = restore_stages(scale, counts, items, request.searches, drawing.n, len(request.plain), opening)
    if request.shard > 1:
        stages = tuple(replace(s, memory=s.memory + whole) for s in stages)
        told.append(
            f"--shard: memory is that of one of {request.shard} processes, which draw and score in step, not faster"
        )
        assumed.append(
            "nothing for what processes send each other; where PRE and POST do not fit beside, they are mapped"
        )
        if started() != request.shard:
            assumed.append(f"{request.shard} processes, as torchrun has not said how many")
    disk = second.resident
    if request.heal is not None:
        how = request.heal.teaching(drawing.rows)
        told.append(f"healing from {request.heal.start}, its points measured as the averages are: {how.points}")
        machine = Machine(torch.promote_types(dtype, torch.float32), device=request.device)
        size, teachers = shape.parameters * machine.dtype.itemsize, held_in(machine, first.dtype, second.dtype)
        if take_turns(teachers, size, free_memory(request.device) if present else memory):
            teachers = 1
            told.append("teachers: memory is too small for both, they take turns from disk")
        # The model that was measured has left: there is a student with its gradients and two moments.
        held = (4 + teachers) * size - resident["weights"]
        beside = None if at.room is None else at.room - held
        draw: Rows = "auto" if at.auto else 4 * drawing.rows
        taught = heal_stages(shape, replace(at, batch=drawing.rows, room=beside), how, draw=draw)
        # POST and the start, OUT of the healing, its points, and the state (weights and two moments) up to twice.
        disk += (1 if request.heal.start == "POST" else 2) * second.resident + (7 + how.points) * size
        stages = (*stages, *(replace(s, memory=s.memory + held) for s in taught))
    written = second.resident
    reading = Stage("reading both, hashing", f"{(mapped or 2 * written) / 1e9:.2f} GB")
    writing = Stage("writing OUT", f"{written / 1e9:.2f} GB")
    if any(s.calibrate for s in two_sided):
        unseen.append("the right answers of --calibrate are not counted")
    assumed = [*unseen, *assumed, BOUNDS, *ASSUMED]
    stages = (reading, *stages, writing)
    return Plan(stages, resident, short(dtype), mapped, disk, tuple(told), tuple(assumed), second.model, at)


def _prompts_for(request: Request) -> str:
    """How many prompts make the pick sure: by PRE and POST where an earlier run measured them, else by other models."""
    spread, why = SPREAD, "assumed"
    for path in filter(Path.is_file, (request.out / RESULT, request.folder / RESULT)):
        content = read_json(path)
        found = [measurement(content, p, "reward", "reward") for p in content["points"][:2]]  # PRE and POST, validation
        if (pre := found[0]) and (post := found[1]) and post.value > pre.value:
            spread = OF_POST * float((post.statistics - pre.statistics).std()) / (post.value - pre.value)
            why = f"from PRE and POST in {path}"
    return (
        f"--keep-reward {request.keep_reward:g} at --confidence {request.confidence:g}, to within {100 * WITHIN:g} points: about "
        f"{would_do(spread, request.confidence):,} validation prompts, for an average that keeps just that ({why}: its reward "
        f"beyond the demand varies by {spread:.2f} of the gain from prompt to prompt)"
    )
