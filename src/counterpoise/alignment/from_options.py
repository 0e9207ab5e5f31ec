"""What `align` is asked for: one frozen value, checked before anything is read, by the run and by its dry run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from counterpoise.alignment.distil import Sample, collect, distil, read_samples, write_samples
from counterpoise.alignment.mitigations import table
from counterpoise.alignment.mitigations.replay import read_corpus
from counterpoise.alignment.ppo import ppo
from counterpoise.alignment.preferences import read_preferences
from counterpoise.alignment.rsf import rsf
from counterpoise.alignment.settings import DPO, PPO, RSF, Distil, drawn_as, drawn_of, refuse_equal
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.models import Machine, load, load_frozen
from counterpoise.alignment.training.precision import weights_cast_once
from counterpoise.alignment.training.stepping import Mitigation
from counterpoise.averaging.partition import layerwise
from counterpoise.checkpoints.files import refuse_occupied, replacing
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.evaluation.rewards import fingerprint, load_reward
from counterpoise.language.loading import refuse_unmeasurable
from counterpoise.language.prompts import Prompt, encode_prompts, read_prompts
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example
from counterpoise.language.ways import context_of
from counterpoise.records import NUMERICS, Progress, Store, digest

METHODS: dict[str, type[RSF | PPO | DPO]] = {"rsf": RSF, "ppo": PPO, "dpo": DPO}
OPTIONS = {option for kind in (*METHODS.values(), Distil) for option in kind.options()}
"""All that a method can be told, by name; what mitigations are told is in their table."""
LONGEST_TEXT = 512
"""Tokens of a piece of a replayed text, or the model's context where that is shorter."""


class Files(NamedTuple):
    """The data of an alignment, as typed; a method takes some and refuses the others."""

    prompts: Path | None = None
    reward: str | None = None
    preferences: Path | None = None
    samples: Path | None = None

    def expect(self, title: str, *needed: str) -> None:
        """Raise a ValueError unless exactly those that are needed were given."""
        wanted = " and ".join(f"--{name}" for name in needed)
        given = {name: value for name, value in self._asdict().items() if value is not None}
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"{title}: expected {wanted}, found no --{missing[0]}")
        if extra := [name for name in given if name not in needed]:
            raise ValueError(f"{title}: expected {wanted} alone, found --{extra[0]}; leave it out")

    @property
    def asked(self) -> list[Prompt]:
        """The prompts that the method learns on, each once."""
        if self.prompts is not None:
            return read_prompts(self.prompts)
        read: Any = read_samples if self.samples else read_preferences
        asked = [record.prompt for record in read(self.samples or self.preferences)]
        return list({prompt.key: prompt for prompt in asked}.values())


@dataclass(frozen=True)
class Alignment:
    """A model, how it is aligned, on what, and where the result goes.

    Attributes:
        source: PRE, a folder or a hub id.
        method: one of METHODS; "rsf" on samples is its distillation style.
        settings: of the method and of how it draws, by the names of options; others have the method's defaults.
        held: options of mitigations that were given, by name; see `mitigations.table`.
        work: where checkpoints on the way and finished pieces are kept; by default OUT.work.
    """

    source: str
    out: Path
    method: str
    files: Files
    settings: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Any] = field(default_factory=dict)
    work: Path | None = None
    machine: Machine = Machine()
    keep_checkpoints: bool = True

    @property
    def folder(self) -> Path:
        """Where finished pieces are kept."""
        return self.work or self.out.with_name(f"{self.out.name}.work")

    @property
    def kind(self) -> type[RSF | PPO | DPO | Distil]:
        """The method's settings; an unknown one is a ValueError."""
        if self.method not in METHODS:
            raise ValueError(f"--method: expected {', '.join(METHODS)}, found {self.method!r}")
        return Distil if self.method == "rsf" and self.files.samples is not None else METHODS[self.method]

    @cached_property
    def bound(self) -> RSF | PPO | DPO | Distil:
        """All settings of the method, those that were not given with its defaults; one that it has not is a ValueError."""
        others = list(drawn_of(self.own_drawing)) if self.held.get("replay") == "self" else []
        return self.kind.of(self.settings, others=others)

    @property
    def run(self) -> Callable[..., Any]:
        """The method's function."""
        if self.kind is DPO:
            from counterpoise.alignment.dpo import dpo

            return dpo
        if self.kind is PPO:
            return ppo
        return rsf if self.kind is RSF else distil

    def check(self) -> None:
        """Raise for what can be seen to be wrong before anything is read.

        Raises:
            ValueError: an unknown method, data or settings that are not its own, a number out of range, mitigations that
                do not go together, sharding with dpo, mixed precision of other weights than float32.
            CheckpointError: `out` is occupied, a model that cannot be sampled from.
        """
        self.files.expect(self.kind.title, *self.kind.needs)
        settings = self.bound
        settings.check()
        table.check(self.held)
        if self.held.get("replay") == "self":
            self.own_drawing.check()
        if isinstance(settings, DPO):
            from counterpoise.alignment.dpo import refuse_in_dpo

            if self.machine.shard:
                raise ValueError(
                    "dpo: expected whole weights, for TRL's loop, found --shard or accelerate's FSDP; leave it out, or "
                    "train with --lora"
                )
            refuse_in_dpo(table.build(self.held, table.Sources()), settings)
        self.machine.check()
        if not (self.out / "align.json").is_file():
            refuse_occupied(self.out.absolute())
        refuse_unmeasurable(self.source)

    def bind(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The method with its data and settings bound, and what its record tells beside them; reads the data."""
        files, told = self.files, {}
        bound: dict[str, Any] = {"settings": self.bound}
        if files.samples is not None:
            bound["samples"] = read_samples(files.samples)
        if files.preferences is not None:
            bound["preferences"] = read_preferences(files.preferences)
            bound["reference"] = load_frozen(self.source, replace(self.machine, device="cpu"))
        if files.prompts is not None:
            bound["prompts"] = read_prompts(files.prompts)
        if files.reward is not None:
            bound["reward"] = load_reward(files.reward, device=self.machine.device)
            told["reward"] = fingerprint(files.reward)  # of a module, once it is imported
        if self.kind is PPO:
            bound["reference"] = load_frozen(self.source, self.machine)
        return partial(self.run, **bound), told

    def mitigations(self) -> list[Mitigation]:
        """The mitigations that were asked for, in the order in which they act; PRE stays memory-mapped."""
        pre = open_checkpoint(self.source)
        table.check_layers(self.held, len(layerwise(list(pre))))
        frozen, seed = (lambda: load_frozen(self.source, self.machine)), self.own_drawing.seed
        sources = table.Sources(pre, frozen, self._replayed, seed)
        return table.build(self.held, sources)

    def _replayed(self, corpus: str) -> list[Example]:
        """The texts of a corpus, or PRE's own responses to the prompts, drawn once."""
        checkpoint = open_checkpoint(self.source)
        if corpus != "self":
            from transformers import AutoConfig, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
            limit = min(LONGEST_TEXT, context_of(config) or LONGEST_TEXT)
            return read_corpus(corpus, tokenizer, max_tokens=limit, chat=self.own_drawing.chat)
        asked, drawing = self.files.asked, self.own_drawing

        def draw() -> list[Any]:
            model, tokenizer = load(checkpoint.folder, replace(self.machine, shard=False))
            room: dict[str, Any] = {"new": drawing.max_new_tokens, "limit": context_of(model.config)}
            encoded = encode_prompts(tokenizer, asked, chat=drawing.chat, **room)
            with weights_cast_once(model):
                drawn = sample(model, tokenizer, encoded, drawing)
            return [[list(prompt), list(group[0])] for prompt, group in zip(encoded, drawn, strict=True)]

        key = {
            "what": "replay",
            "numerics": NUMERICS,
            "model": checkpoint.sha256,
            "prompts": digest([p.key for p in asked]),
        }
        key |= {n: v for n, v in drawing.decides.items() if n != "n"}
        key["dtype"] = f"{self.machine.dtype}{', bf16' * self.machine.bf16}"
        rows = processes.on_first(lambda: Store(self.folder / "pieces").once(key, draw))
        return [Example(tuple(prompt), tuple(response)) for prompt, response in rows]

    @property
    def own_drawing(self) -> Drawing:
        """How PRE draws what it replays: one response a prompt."""
        return drawn_as(Drawing(), {n: v for n, v in self.settings.items() if n != "n"})


@dataclass(frozen=True)
class Collection:
    """What `align collect` asks: responses of a finished model, in a new jsonl file; `work` keeps finished chunks."""

    source: str
    out: Path
    prompts: Path
    reward: str
    drawing: Drawing
    work: Path
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def run(self, progress: Progress | None) -> Sequence[Sample]:
        """`collect` from files to a file, which must not exist."""
        refuse_equal(self.drawing)
        refuse_unmeasurable(self.source)
        if self.out.exists():
            raise ValueError(
                f"{self.out}: expected a new file, found one with content; choose another name or remove it"
            )
        checkpoint = open_checkpoint(self.source)
        asked, score = read_prompts(self.prompts), load_reward(self.reward, device=self.device)
        model, tokenizer = load(checkpoint.folder, Machine(self.dtype, device=self.device))
        key = {"model": checkpoint.sha256, "reward": fingerprint(self.reward), "dtype": str(self.dtype)}
        kept: dict[str, Any] = {"store": Store(self.work), "key": {**key, "device": self.device}}
        found = collect(model, tokenizer, asked, score, self.drawing, **kept, progress=progress)
        with replacing(self.out) as partial_file:
            write_samples(partial_file, found)
        return found
