"""A dry run of `align`: its data, settings and mitigations checked, what it would take told."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from counterpoise.alignment.distil import distil, read_samples
from counterpoise.alignment.from_options import (
    LONGEST_TEXT,
    METHODS,
    bind,
    expect_alone,
    prompts_of,
    refuse_beside_lora,
    refuse_shard,
)
from counterpoise.alignment.mitigations.anchors import KD, L1, L2
from counterpoise.alignment.mitigations.ema import MovingAverage
from counterpoise.alignment.mitigations.lowrank import LowRank
from counterpoise.alignment.mitigations.merging import OnlineMerging
from counterpoise.alignment.mitigations.replay import Replay, read_corpus
from counterpoise.alignment.mitigations.stopping import RewardBudget
from counterpoise.alignment.ppo import ppo
from counterpoise.alignment.preferences import read_preferences
from counterpoise.alignment.rsf import rsf
from counterpoise.alignment.training.precision import refuse_other
from counterpoise.alignment.training.stepping import Mitigation, rows_at_once
from counterpoise.checkpoints.files import refuse_occupied
from counterpoise.language.costs import Plan, Shape, Stage, optimiser_bytes, step_bytes, trained, weight_bytes
from counterpoise.language.prompts import Prompt, read_prompts
from counterpoise.language.scoring import Example
from counterpoise.planning.looking import Source, Words, look, look_at_reward, room_for
from counterpoise.planning.restore import ASSUMED, BOUNDS, judged, lengths, said_of, short
from counterpoise.planning.stages import DRAWING, REPLAYED, TRAINING, Loop, align_stages, replayed_stage

ASSUMED_SHARES = 8
"""Processes among which weights are cut up, where torchrun has not said."""
CUT_UP = ("weights", "PRE, frozen")
"""What is cut up in any case; with LoRA the rest is of the adapter, which is not."""


def plan_align(
    source: str,
    out: Path,
    method: str,
    chosen: Mapping[str, Any],
    common: Mapping[str, Any],
    drawing: Mapping[str, Any],
    held: Mapping[str, Any],
    *,
    prompts: Path | None,
    reward: str | None,
    preferences: Path | None,
    samples: Path | None,
    dtype: torch.dtype,
    bf16: bool = False,
    shared_by: int | None = 1,
    device: str = "cpu",
    keep_checkpoints: bool = True,
) -> Plan:
    """What `align` with these arguments would do.

    Args:
        chosen, common, drawing: settings of the method, of its loop and of its sampling.
        held: the options of the mitigations, None where not given.
        shared_by: processes that the weights are cut up among; memory is that of one of them. None takes ASSUMED_SHARES.

    Raises:
        ValueError, CheckpointError: whatever `align` would refuse before it loads a model.
    """
    refuse_shard(method, shared_by != 1)
    if bf16:
        refuse_other(dtype)
    if not (out / "align.json").is_file():
        refuse_occupied(out.absolute())
    model = look(source)
    shape, itemsize = model.shape, dtype.itemsize
    given = {"--prompts": prompts, "--reward": reward, "--preferences": preferences, "--samples": samples}
    loop, settings, texts = _loop(method, {**chosen, **common}, drawing, given, held)
    built = _mitigations(held, shape)
    if method == "dpo":
        _refuse_in_dpo(model, built, settings)
    told = [_said_of_weights(model), *_said_of_mitigations(held), f"{method}: " + _spoken(settings)]
    judge = look_at_reward(reward) if reward is not None else None
    if reward is not None:
        told.append(said_of(reward, judge))
    asked, responses = texts
    words = Words.of(model.folder)
    asks = {**drawing, "chat": common["chat"]}
    if responses:  # of a file, not drawn: memory is that of the longest, time that of the mean
        sizes = words.lengths(responses)
        mean = sum(sizes) / len(sizes)
        over = max(sizes) - mean
        asks["max_new_tokens"] = mean
        bounds = f"responses of {mean:.0f} tokens in the mean, the longest {max(sizes)}; nothing cut or left out"
    else:
        over, bounds = 0, BOUNDS
    micro = int(common["micro_batch_size"])
    at, assumed = lengths(model, asked, asks, itemsize, micro, longest_refused=not responses)
    at = replace(at, longest=at.longest + math.ceil(over))
    count = trained(shape, held["lora"])
    resident = {"weights": weight_bytes(shape, itemsize), **optimiser_bytes(count, itemsize), **judged(judge)}
    references = (method in ("ppo", "dpo")) + (held["kd"] is not None)
    if references:
        resident["PRE, frozen"] = references * weight_bytes(shape, itemsize)
    if held["sma"] is not None:
        resident["moving average"] = count * itemsize
    if held["lora"] is not None:
        resident["LoRA"] = count * itemsize
    kept = _checkpoints(loop) if keep_checkpoints else 1
    written = (1 + kept) * weight_bytes(shape, itemsize) + 2 * 3 * count * itemsize
    told += room_for(out, written)
    told.append(f"on the way: {kept} checkpoints, and the state (weights and Adam's moments) up to twice")
    moment = step_bytes(
        shape, count, itemsize, fused=method == "dpo", cuda=not device.startswith("cpu")
    )  # TRL's is fused
    if held["merge"] is not None:
        moment += count * itemsize  # the weights before the step
    shares = shared_by or ASSUMED_SHARES
    alike = held["lora"] is None and shares > 1  # what is trained is cut up as the weights are
    first: list[Stage] = []
    if held["replay"] == "self":
        own = prompts_of({"prompts": prompts, "preferences": preferences, "samples": samples})
        there, _ = lengths(model, own, {**drawing, "chat": common["chat"]}, itemsize, micro)
        loop = replace(loop, replayed=(there.longest, int(there.response)))
        later = 3 * count * itemsize // (shares if alike else 1)  # gradients and moments
        first = [
            replayed_stage(shape, there, prompts=len(own), draw=int(drawing.get("draw_batch_size", 64)), free=later)
        ]
    elif held["replay"] is not None:
        loop = replace(loop, replayed=_longest_replayed(held["replay"], model, words, chat=common["chat"]))
    ours = align_stages(shape, judge.shape if judge else None, at, loop, step=moment // shares if alike else moment)
    stages = (*first, *ours)
    if shares == 1:
        copies = 2 * (shape.body + shape.head) if bf16 else 0  # of the matrices, as autocast casts them
        stages = tuple(replace(s, memory=s.memory + copies) for s in stages)
    else:
        told.append(f"--shard: memory is that of one of {shares} processes, which holds all weights while it draws")
        if shared_by is None:
            assumed = [*assumed, f"{shares} processes, as torchrun has not said how many"]
        resident = {
            what: size // shares if what in CUT_UP or (alike and what != "reward model") else size
            for what, size in resident.items()
        }
        stages = tuple(replace(s, memory=s.memory + _gathered(shape, 2 if bf16 else itemsize, s.name)) for s in stages)
    mapped = 0 if model.weights is None else sum(f.stat().st_size for f in model.weights.files)
    return Plan(
        stages,
        resident,
        "bfloat16" if bf16 else short(dtype),
        mapped,
        written,
        tuple(told),
        (*assumed, bounds, *ASSUMED),
    )


def _gathered(shape: Shape, itemsize: int, stage: str) -> int:
    """Whole weights beside those that a process holds: all while drawing, else a block, the next, and what is in no block.

    In training their gradients are whole as well until they are shared out.
    """
    if stage in (DRAWING, REPLAYED):
        return shape.parameters * itemsize
    outside = shape.parameters - shape.body
    block = shape.body // shape.layers
    return (outside + 2 * block + (outside + block if stage == TRAINING else 0)) * itemsize


def _loop(
    name: str,
    settings: Mapping[str, Any],
    drawing: Mapping[str, Any],
    given: Mapping[str, Any],
    held: Mapping[str, Any],
) -> tuple[Loop, dict[str, Any], tuple[list[Prompt], list[str]]]:
    """How much the method does, its settings with their defaults, and the prompts and responses that were given."""
    if name not in METHODS:
        raise ValueError(f"--method: expected {', '.join(METHODS)}, found {name!r}")
    run: Any = rsf
    asked: list[Prompt] = []
    responses: list[str] = []
    if name == "dpo":
        from counterpoise.alignment.dpo import dpo as run

        expect_alone(given, ("--preferences",), name)
        pairs = read_preferences(given["--preferences"])
        asked = [p.prompt for p in pairs]
        responses = [text for p in pairs for text in (p.chosen, p.rejected)]
    elif name == "rsf" and given["--samples"] is not None:
        expect_alone(given, ("--samples",), "rsf with --samples")
        run, found = distil, read_samples(given["--samples"])
        asked, responses = [s.prompt for s in found], [s.response for s in found]
    else:
        if name == "ppo":
            run = ppo
        expect_alone(given, ("--prompts", "--reward"), name)
        settings, asked = {**settings, **drawing}, read_prompts(given["--prompts"])
    bound = bind(run, settings, name)
    plain = {n: p.default for n, p in inspect.signature(run).parameters.items() if p.default is not p.empty}
    full = {n: v for n, v in {**plain, **bound.keywords}.items() if isinstance(v, (int, float, type(None)))}
    count = min(int(full.get("prompts_per_iteration") or len(asked)), len(asked))
    replayed = float(held["replay_ratio"]) if held["replay"] is not None else 0.0
    kind = "distil" if run is distil else name
    loop = Loop(
        kind,
        int(full.get("iterations") or 1),
        count,
        int(full.get("n") or 1),
        int(full["epochs"] or 1),
        int(full.get("draw_batch_size") or 64),
        held["kd"] is not None,
        replayed,
    )
    return loop, full, (asked, responses)


def _longest_replayed(corpus: str, model: Source, words: Words, *, chat: bool) -> tuple[int, int]:
    """Tokens of the longest prompt and response of a corpus."""
    limit = min(LONGEST_TEXT, getattr(model.model.config, "max_position_embeddings", LONGEST_TEXT))
    if words.tokenizer is None:
        return 1, limit - 1
    examples = read_corpus(corpus, words.tokenizer, max_tokens=limit, chat=chat)
    response = max(len(e.response) for e in examples)
    return max(len(e.prompt) + len(e.response) for e in examples) - response, response


def _refuse_in_dpo(model: Source, built: list[Mitigation], settings: Mapping[str, Any]) -> None:
    """Raise what `dpo` raises before it trains."""
    from counterpoise.alignment.dpo import refuse_in_dpo

    world = int(os.environ.get("WORLD_SIZE", "1"))
    refuse_in_dpo(model.model, built, world)
    rows_at_once("dpo", int(settings["batch_size"]), int(settings["micro_batch_size"]), world)


def _mitigations(held: Mapping[str, Any], shape: Shape) -> list[Mitigation]:
    """Each built without its data, which checks its numbers."""
    refuse_beside_lora([name for name, value in held.items() if value is not None])
    makers: dict[str, Any] = {
        "l1": L1,
        "l2": L2,
        "kd": KD,
        "lora": LowRank,
        "sma": lambda decay: MovingAverage(decay, held["reset_every"]),
        "merge": lambda weight: OnlineMerging(weight, held["merge_keep"]),
        "replay": lambda _: Replay(held["replay_ratio"], [Example((1,), (1,))]),
        "stop_at_reward": RewardBudget,
    }
    built: list[Mitigation] = [make(held[name]) for name, make in makers.items() if held[name] is not None]
    if held["reset_every"] is not None and held["sma"] is None:
        raise ValueError("--reset-every: expected --sma beside it: Elastic Reset resets to the moving average")
    if held["freeze"] is not None and not 0 <= held["freeze"] < shape.layers:
        raise ValueError(
            f"--freeze: expected 0 to {shape.layers - 1} of the {shape.layers} layers, found {held['freeze']}"
        )
    if held["replay"] not in (None, "self") and not Path(held["replay"]).is_file():
        raise ValueError(f"{held['replay']}: expected a file or folder, found nothing of that name; check the path")
    if held["merge_base"] is not None:
        look(held["merge_base"])
    return built


def _said_of_mitigations(held: Mapping[str, Any]) -> list[str]:
    named = ("l1", "l2", "kd", "lora", "sma", "merge", "replay", "freeze", "stop_at_reward")
    given = [f"{name} {held[name]}" for name in named if held[name] is not None]
    return ["mitigations: " + ", ".join(given)] if given else []


def _checkpoints(loop: Loop) -> int:
    """Checkpoints on the way: one an iteration, one an epoch of distil, five of dpo."""
    return {"dpo": 5, "distil": loop.epochs}.get(loop.method, loop.rounds)


def _said_of_weights(model: Source) -> str:
    if model.weights is None:
        return f"no weights: preflight on shapes only ({model.name})"
    return f"{model.name}: {len(model.weights)} tensors in {short(model.dtype)}"


def _spoken(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{n} {v:g}" for n, v in settings.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    )
