"""Every mitigation by its option: how it is built, checked and what it takes. A new one is its file and a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from counterpoise.alignment.mitigations.anchors import KD, L1, L2, OnlineMerging
from counterpoise.alignment.mitigations.balanced import BalancedReplay
from counterpoise.alignment.mitigations.ema import MovingAverage
from counterpoise.alignment.mitigations.less import FreezeLowest, RewardBudget
from counterpoise.alignment.mitigations.lowrank import LowRank
from counterpoise.alignment.mitigations.replay import Replay
from counterpoise.alignment.settings import typed
from counterpoise.alignment.training.models import WITH_LORA
from counterpoise.alignment.training.stepping import Mitigation
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.language.scoring import Example


@dataclass(frozen=True)
class Sources:
    """What mitigations are built from, each made when it is first asked for."""

    pre: Checkpoint | None = None  # PRE's weights, memory-mapped
    frozen: Callable[[], nn.Module | None] = lambda: None  # PRE as a model that runs and is never trained
    replayed: Callable[[str], Sequence[Example]] = lambda corpus: [Example((1,), (1,))]  # of a corpus, or of PRE itself
    seed: int = 0


class Taken(NamedTuple):
    """What a mitigation takes while training, in bytes."""

    resident: Mapping[str, int] = {}  # all the time, by its name in a plan
    moment: int = 0  # beside it, at a step of the optimiser
    frozen: int = 0  # models like PRE that are held


@dataclass(frozen=True)
class Row:
    """One mitigation.

    Attributes:
        option: the option that asks for it, without its dashes.
        build: from the option's value, all options that were given, and the sources.
        partners: options that do nothing without it.
        takes: from bytes of what is trained.
        on_weights: whether it needs PRE's weights beside those that are trained, which LoRA has not.
    """

    option: str
    build: Callable[[Any, Mapping[str, Any], Sources], Mitigation]
    partners: Sequence[str] = ()
    takes: Callable[[int], Taken] = lambda trained: Taken()
    on_weights: bool = False


def _merging(weight: float, given: Mapping[str, Any], sources: Sources) -> Mitigation:
    base = given.get("merge_base") if sources.pre is not None else None
    opened = None if base is None else open_checkpoint(base)
    return OnlineMerging(weight, given.get("merge_keep", 1.0), sources.seed, base=opened, pre=sources.pre)


def _average(decay: float, given: Mapping[str, Any], sources: Sources) -> Mitigation:
    return MovingAverage(decay, given.get("reset_every"), sources.pre)


def corpora(replay: str | Sequence[str]) -> list[str]:
    """The corpora that --replay names, one or several."""
    return [replay] if isinstance(replay, str) else list(replay)


def _replay(asked: str | Sequence[str], given: Mapping[str, Any], sources: Sources) -> Mitigation:
    ratio, found = given.get("replay_ratio", 1.0), [sources.replayed(c) for c in corpora(asked)]
    examples = [example for corpus in found for example in corpus]
    if "balance" not in given:
        return Replay(ratio, examples, sources.seed)
    return BalancedReplay(ratio, examples, sources.seed, [len(corpus) for corpus in found])


TABLE = (
    Row("lora", lambda v, _, s: LowRank(v, seed=s.seed), takes=lambda n: Taken({"LoRA": n})),
    Row("freeze", lambda v, _, s: FreezeLowest(v)),
    Row("replay", _replay, ("replay_ratio", "balance")),
    Row("kd", lambda v, _, s: KD(v, s.frozen()), takes=lambda n: Taken(frozen=1)),
    Row("l2", lambda v, _, s: L2(v, s.pre), on_weights=True),
    Row("merge", _merging, ("merge_keep", "merge_base"), lambda n: Taken(moment=n), on_weights=True),
    Row("l1", lambda v, _, s: L1(v, s.pre), on_weights=True),
    Row("sma", _average, ("reset_every",), lambda n: Taken({"moving average": n})),
    Row("stop_at_reward", lambda v, _, s: RewardBudget(v)),
)
"""In the order in which they act."""


def chosen(given: Mapping[str, Any]) -> list[Row]:
    """The rows that the options ask for."""
    return [row for row in TABLE if row.option in given]


def build(given: Mapping[str, Any], sources: Sources) -> list[Mitigation]:
    """The mitigations that were asked for, in the order in which they act."""
    return [row.build(given[row.option], given, sources) for row in chosen(given)]


def check(given: Mapping[str, Any]) -> None:
    """Raise for options that do not go together or are out of range; no file but the corpus is looked for.

    Raises:
        ValueError: an option without its partner, an anchor on weights beside LoRA, a number out of range, no such corpus.
    """
    asked = {row.option for row in chosen(given)}
    for row in TABLE:
        for partner in row.partners:
            if partner in given and row.option not in asked:
                raise ValueError(f"{typed(partner)}: does nothing here; add {typed(row.option)}, or leave it out")
    if "lora" in asked and (anchors := [row.option for row in chosen(given) if row.on_weights]):
        raise ValueError(f"{typed(anchors[0])}: expected no --lora beside it, found one; {WITH_LORA}")
    asked_for = corpora(given.get("replay", "self"))
    if len(asked_for) > 1 and "self" in asked_for:
        raise ValueError("--replay self: expected it alone, found other corpora beside it; leave one or the other out")
    if "balance" in given and len(asked_for) < 2:
        raise ValueError("--balance: expected several --replay to balance, found one; add another, or leave it out")
    build(given, Sources())
    for corpus in asked_for:
        if corpus != "self" and not Path(corpus).is_file():
            found = (
                "a folder; name one of its files" if Path(corpus).is_dir() else "nothing of that name; check the path"
            )
            raise ValueError(f"--replay {corpus}: expected a jsonl file, found {found}")
    files = [Path(corpus).resolve() for corpus in asked_for]
    if "balance" in given and (twice := [c for c, file in zip(asked_for, files, strict=True) if files.count(file) > 1]):
        raise ValueError(f"--balance: expected corpora that differ, found {twice[0]} twice; leave one out")


def check_layers(given: Mapping[str, Any], layers: int) -> None:
    """Raise a ValueError where more layers are to keep their weights than there are."""
    if "freeze" in given and not 0 <= given["freeze"] < layers:
        raise ValueError(f"--freeze: expected 0 to {layers - 1} of the {layers} layers, found {given['freeze']}")
