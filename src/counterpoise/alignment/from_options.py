"""From what was typed to a bound method and its mitigations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch

from counterpoise.alignment.distil import Sample, collect, distil, read_samples, write_samples
from counterpoise.alignment.mitigations.anchors import KD, L1, L2
from counterpoise.alignment.mitigations.ema import MovingAverage
from counterpoise.alignment.mitigations.freezing import FreezeLowest
from counterpoise.alignment.mitigations.lowrank import LowRank
from counterpoise.alignment.mitigations.merging import OnlineMerging
from counterpoise.alignment.mitigations.replay import Replay, read_corpus
from counterpoise.alignment.mitigations.stopping import RewardBudget
from counterpoise.alignment.rsf import rsf
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.models import WITH_LORA, load, load_frozen
from counterpoise.alignment.training.precision import weights_cast_once
from counterpoise.alignment.training.stepping import Mitigation
from counterpoise.averaging.partition import layerwise
from counterpoise.checkpoints.files import replacing
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.evaluation.rewards import fingerprint, load_reward
from counterpoise.language.prompts import Prompt, encode_prompt, read_prompts
from counterpoise.language.sampling import sample
from counterpoise.language.scoring import Example
from counterpoise.records import Progress, Store, digest

METHODS = ("rsf", "ppo", "dpo")
LONGEST_TEXT = 512
"""Tokens of a piece of a replayed text, or the model's context where that is shorter."""


class How(TypedDict):
    """How models are loaded, as `load` and `load_frozen` take it."""

    dtype: torch.dtype
    bf16: bool
    shard: bool
    device: str


class Method(NamedTuple):
    """A method with its data and settings bound, and what its record tells beside them."""

    run: Callable[..., Any]
    told: dict[str, Any]


def method(
    name: str,
    source: str,
    settings: Mapping[str, Any],
    drawing: Mapping[str, Any],
    *,
    prompts: Path | None,
    reward: str | None,
    preferences: Path | None,
    samples: Path | None,
    how: How,
) -> Method:
    """The method `name` over the data that was given.

    Args:
        settings, drawing: of the method, and of its sampling.

    Raises:
        ValueError: an unknown method, a setting that it does not have, missing or superfluous data, shard with dpo.
    """
    if name not in METHODS:
        raise ValueError(f"--method: expected {', '.join(METHODS)}, found {name!r}")
    given = {"--prompts": prompts, "--reward": reward, "--preferences": preferences, "--samples": samples}
    told: dict[str, Any] = {}
    if name == "rsf" and samples is not None:
        expect_alone(given, ("--samples",), "rsf with --samples")
        return Method(bind(distil, settings, "rsf with --samples", samples=read_samples(samples)), told)
    if name == "dpo":
        from counterpoise.alignment.dpo import dpo
        from counterpoise.alignment.preferences import read_preferences

        expect_alone(given, ("--preferences",), name)
        refuse_shard(name, how["shard"])
        pairs = read_preferences(preferences)  # type: ignore[arg-type]
        reference = load_frozen(source, dtype=how["dtype"], bf16=how["bf16"])
        return Method(bind(dpo, settings, name, preferences=pairs, reference=reference), told)
    expect_alone(given, ("--prompts", "--reward"), name)
    data: dict[str, Any] = {"prompts": read_prompts(prompts), "reward": load_reward(reward, device=how["device"])}  # type: ignore[arg-type]
    told = {"reward": fingerprint(reward)}  # type: ignore[arg-type]  # of a module, once it is imported
    if name == "rsf":
        return Method(bind(rsf, {**settings, **drawing}, name, **data), told)
    from counterpoise.alignment.ppo import ppo

    data["reference"] = load_frozen(source, **how)
    return Method(bind(ppo, {**settings, **drawing}, name, **data), told)


def refuse_shard(name: str, shard: bool) -> None:
    """Raise for dpo.

    Raises:
        ValueError: its weights are to be cut up.
    """
    if shard and name == "dpo":
        raise ValueError(
            "dpo: expected whole weights, for TRL's loop, found --shard or accelerate's FSDP; leave it out, or train with --lora"
        )


def mitigations(
    source: str,
    strengths: Mapping[str, Any],
    *,
    replay: str | None,
    replay_ratio: float,
    reset_every: int | None,
    stop_at_reward: float | None,
    merge_keep: float,
    merge_base: str | None,
    files: Mapping[str, Path | None],
    drawing: Mapping[str, Any],
    work: Path,
    how: How,
) -> list[Mitigation]:
    """The mitigations that were asked for, in the order in which they act; PRE stays memory-mapped.

    Args:
        files: prompts, preferences or samples, to whose prompts PRE responds when it replays itself.

    Raises:
        ValueError: a number out of range, `reset_every` without sma, an anchor on weights beside LoRA.
    """
    given = {name: value for name, value in strengths.items() if value is not None}
    refuse_beside_lora(given)
    seed = drawing["seed"]
    pre = open_checkpoint(source)
    held: list[Mitigation] = []
    if "lora" in given:
        held.append(LowRank(given["lora"], seed=seed))
    if "freeze" in given:
        layers = len(layerwise(list(pre)))
        if not 0 <= given["freeze"] < layers:
            raise ValueError(f"--freeze: expected 0 to {layers - 1} of the {layers} layers, found {given['freeze']}")
        held.append(FreezeLowest(given["freeze"]))
    if replay is not None:
        held.append(Replay(replay_ratio, _replayed(source, replay, files, drawing, work, how), seed))
    if "kd" in given:
        held.append(KD(given["kd"], load_frozen(source, **how)))
    if "l2" in given:
        held.append(L2(given["l2"], pre))
    if "merge" in given:
        base = None if merge_base is None else open_checkpoint(merge_base)
        held.append(OnlineMerging(given["merge"], merge_keep, seed, base=base, pre=pre))
    if "l1" in given:
        held.append(L1(given["l1"], pre))
    if "sma" in given:
        held.append(MovingAverage(given["sma"], reset_every, pre))
    elif reset_every is not None:
        raise ValueError("--reset-every: expected --sma beside it: Elastic Reset resets to the moving average")
    if stop_at_reward is not None:
        held.append(RewardBudget(stop_at_reward))
    return held


def refuse_beside_lora(given: Collection[str]) -> None:
    """Raise where `--lora` is given beside an anchor on weights.

    Raises:
        ValueError: l1, l2 or merge among the mitigations that are given.
    """
    if "lora" in given and (anchors := [name for name in ("l1", "l2", "merge") if name in given]):
        raise ValueError(f"--{anchors[0]}: expected no --lora beside it, found one; {WITH_LORA}")


def collect_to(
    source: str,
    out: Path,
    prompts: Path,
    reward: str,
    *,
    work: Path,
    dtype: torch.dtype,
    device: str,
    n: int,
    max_new_tokens: int,
    temperature: float,
    chat: bool,
    batch_size: int,
    seed: int,
    progress: Progress | None,
) -> list[Sample]:
    """`collect` from files to a file; finished chunks are kept in `work`.

    Raises:
        ValueError: `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out}: expected a new file, found one with content; choose another name or remove it")
    checkpoint = open_checkpoint(source)
    asked, score = read_prompts(prompts), load_reward(reward, device=device)
    loaded, tokenizer = load(checkpoint.folder, dtype=dtype, device=device)
    found = collect(
        loaded,
        tokenizer,
        asked,
        score,
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat=chat,
        batch_size=batch_size,
        seed=seed,
        store=Store(work),
        key={"model": checkpoint.sha256, "reward": fingerprint(reward), "dtype": str(dtype), "device": device},
        progress=progress,
    )
    with replacing(out) as partial_file:
        write_samples(partial_file, found)
    return found


def bind(run: Callable[..., Any], settings: Mapping[str, Any], title: str, **data: Any) -> partial[Any]:
    known = inspect.signature(run).parameters
    if unknown := [name for name in settings if name not in known]:
        option = "--" + unknown[0].replace("_", "-")
        raise ValueError(f"{option}: not a setting of {title}; leave it out")
    return partial(run, **data, **settings)


def expect_alone(given: Mapping[str, Any], needed: Sequence[str], title: str) -> None:
    if missing := [option for option in needed if given[option] is None]:
        raise ValueError(f"{title}: expected {' and '.join(needed)}, found no {missing[0]}")
    if extra := [option for option, value in given.items() if value is not None and option not in needed]:
        raise ValueError(f"{title}: expected {' and '.join(needed)} alone, found {extra[0]}; leave it out")


def _replayed(
    source: str,
    replay: str,
    files: Mapping[str, Path | None],
    drawing: Mapping[str, Any],
    work: Path,
    how: How,
) -> list[Example]:
    """The texts of a corpus, or PRE's own responses to the prompts, drawn once."""
    checkpoint = open_checkpoint(source)
    if replay != "self":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
        limit = min(LONGEST_TEXT, checkpoint.config.get("max_position_embeddings", LONGEST_TEXT))
        return read_corpus(replay, tokenizer, max_tokens=limit, chat=drawing["chat"])
    asked = prompts_of(files)

    def draw() -> list[Any]:
        loaded, tokenizer = load(checkpoint.folder, dtype=how["dtype"], bf16=how["bf16"], device=how["device"])
        settings = {name: drawing[name] for name in ("max_new_tokens", "temperature", "seed")}
        settings["batch_size"] = drawing.get("draw_batch_size", 64)
        encoded = [encode_prompt(tokenizer, p, chat=drawing["chat"]) for p in asked]
        with weights_cast_once(loaded):
            drawn = sample(loaded, tokenizer, encoded, **settings)
        return [[list(prompt), list(group[0])] for prompt, group in zip(encoded, drawn, strict=True)]

    kind = f"{how['dtype']}{', bf16' * how['bf16']}"
    key = {"what": "replay", "model": checkpoint.sha256, "prompts": digest([p.key for p in asked]), **drawing}
    rows = processes.on_first(lambda: Store(work / "pieces").once({**key, "dtype": kind}, draw))
    return [Example(tuple(prompt), tuple(response)) for prompt, response in rows]


def prompts_of(files: Mapping[str, Path | None]) -> list[Prompt]:
    """The prompts that the method learns on, each once."""
    if (prompts := files["prompts"]) is not None:
        return read_prompts(prompts)
    if (samples := files["samples"]) is not None:
        asked = [s.prompt for s in read_samples(samples)]
    else:
        from counterpoise.alignment.preferences import read_preferences

        asked = [p.prompt for p in read_preferences(files["preferences"])]  # type: ignore[arg-type]
    return list({p.key: p for p in asked}.values())
