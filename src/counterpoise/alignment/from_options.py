"""What `align` is asked for: one frozen value, checked before anything is read, by the run and by its dry run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from counterpoise.alignment.distil import Sample, collect, distil, read_samples, write_samples
from counterpoise.alignment.mitigations import table
from counterpoise.alignment.mitigations.replay import read_corpus
from counterpoise.alignment.ppo import ppo, refuse_unlikely
from counterpoise.alignment.preferences import read_preferences
from counterpoise.alignment.rsf import refuse_equal, rsf
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.models import load, load_frozen
from counterpoise.alignment.training.precision import refuse_bf16_of, weights_cast_once
from counterpoise.alignment.training.stepping import Mitigation, refuse_settings
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

METHODS = ("rsf", "ppo", "dpo")
LONGEST_TEXT = 512
"""Tokens of a piece of a replayed text, or the model's context where that is shorter."""
DRAWN = {"n": "n", "max_new_tokens": "max_new_tokens", "temperature": "temperature", "draw_batch_size": "batch_size"}
"""Options of how responses are drawn -> fields of `Drawing`."""


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
        settings: of the method and of how it draws, by name; those that were not given take the method's defaults.
        held: options of mitigations that were given, by name; see `mitigations.table`.
        work: where checkpoints on the way and finished pieces are kept; by default OUT.work.
        micro_batch_size: sequences through the model at once in training.
    """

    source: str
    out: Path
    method: str
    files: Files
    settings: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Any] = field(default_factory=dict)
    work: Path | None = None
    micro_batch_size: int = 8
    chat: bool = True
    seed: int = 0
    dtype: torch.dtype = torch.float32
    bf16: bool = False
    shard: bool = False
    device: str = "cpu"
    keep_checkpoints: bool = True

    @property
    def how(self) -> dict[str, Any]:
        """How its models are loaded, as `load` and `load_frozen` take it."""
        return {"dtype": self.dtype, "bf16": self.bf16, "shard": self.shard, "device": self.device}

    @property
    def folder(self) -> Path:
        """Where finished pieces are kept."""
        return self.work or self.out.with_name(f"{self.out.name}.work")

    @property
    def run(self) -> Callable[..., Any]:
        """The method's function; an unknown one is a ValueError."""
        if self.method == "dpo":
            from counterpoise.alignment.dpo import dpo

            return dpo
        if self.method not in METHODS:
            raise ValueError(f"--method: expected {', '.join(METHODS)}, found {self.method!r}")
        if self.method == "ppo":
            return ppo
        return rsf if self.files.samples is None else distil

    @property
    def bound(self) -> dict[str, Any]:
        """All settings of the method by name, those that were not given with its defaults; `drawing` where it draws.

        A setting that the method does not have is a ValueError.
        """
        parameters = inspect.signature(self.run).parameters
        draws = "drawing" in parameters
        several = draws and parameters["drawing"].default.n > 1  # responses a prompt: PPO draws one
        drawable = [n for n in DRAWN if n != "n" or several] if draws or self.held.get("replay") == "self" else []
        if unknown := [n for n in self.settings if n not in parameters and n not in drawable]:
            raise ValueError(f"{table.typed(unknown[0])}: not a setting of {self.title}; leave it out")
        plain = {n: p.default for n, p in parameters.items() if isinstance(p.default, (int, float, type(None)))}
        plain = {n: v for n, v in plain.items() if n not in ("run", "reference")}
        own = {n: v for n, v in self.settings.items() if n not in DRAWN}
        common: dict[str, Any] = {"chat": self.chat, "seed": self.seed}
        if draws:
            drawn = {DRAWN[n]: v for n, v in self.settings.items() if n in DRAWN}
            common = {"drawing": replace(parameters["drawing"].default, **drawn, **common)}
        return {**plain, **own, "micro_batch_size": self.micro_batch_size, **common}

    @property
    def title(self) -> str:
        """The method in messages."""
        return "rsf with --samples" if self.run is distil else self.method

    def check(self) -> None:
        """Raise for what can be seen to be wrong before anything is read.

        Raises:
            ValueError: an unknown method, data or settings that are not its own, a number out of range, mitigations that
                do not go together, sharding with dpo, mixed precision of other weights than float32.
            CheckpointError: `out` is occupied, a model that cannot be sampled from.
        """
        needed = {distil: ("samples",), rsf: ("prompts", "reward"), ppo: ("prompts", "reward")}
        self.files.expect(self.title, *needed.get(self.run, ("preferences",)))
        settings = self.bound
        drawing = settings.pop("drawing", None)
        refuse_settings(**{n: v for n, v in settings.items() if isinstance(v, (int, float))})
        if drawing is not None:
            (refuse_equal if self.run is rsf else refuse_unlikely)(drawing)
        table.check(self.held)
        if self.held.get("replay") == "self":
            self.own_drawing.check()
        if self.method == "dpo":
            from counterpoise.alignment.dpo import refuse_in_dpo

            if self.shard:
                raise ValueError(
                    "dpo: expected whole weights, for TRL's loop, found --shard or accelerate's FSDP; leave it out, or "
                    "train with --lora"
                )
            mitigations = table.build(self.held, table.Sources())
            refuse_in_dpo(mitigations, settings["batch_size"], settings["micro_batch_size"])
        if self.bf16:
            refuse_bf16_of(self.dtype)
        if not (self.out / "align.json").is_file():
            refuse_occupied(self.out.absolute())
        refuse_unmeasurable(self.source)

    def bind(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The method with its data and settings bound, and what its record tells beside them; reads the data."""
        run, files = self.run, self.files
        named = (*self.settings, "micro_batch_size", "chat", "seed", "drawing")
        settings = {n: v for n, v in self.bound.items() if n in named}
        told = {}
        if files.samples is not None:
            settings["samples"] = read_samples(files.samples)
        if files.preferences is not None:
            settings["preferences"] = read_preferences(files.preferences)
            settings["reference"] = load_frozen(self.source, dtype=self.dtype, bf16=self.bf16)
        if files.prompts is not None:
            settings["prompts"] = read_prompts(files.prompts)
        if files.reward is not None:
            settings["reward"] = load_reward(files.reward, device=self.device)
            told["reward"] = fingerprint(files.reward)  # of a module, once it is imported
        if run is ppo:
            settings["reference"] = load_frozen(self.source, **self.how)
        return partial(run, **settings), told

    def mitigations(self) -> list[Mitigation]:
        """The mitigations that were asked for, in the order in which they act; PRE stays memory-mapped."""
        pre = open_checkpoint(self.source)
        table.check_layers(self.held, len(layerwise(list(pre))))
        sources = table.Sources(pre, lambda: load_frozen(self.source, **self.how), self._replayed, self.seed)
        return table.build(self.held, sources)

    def _replayed(self, corpus: str) -> list[Example]:
        """The texts of a corpus, or PRE's own responses to the prompts, drawn once."""
        checkpoint = open_checkpoint(self.source)
        if corpus != "self":
            from transformers import AutoConfig, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
            limit = min(LONGEST_TEXT, context_of(config) or LONGEST_TEXT)
            return read_corpus(corpus, tokenizer, max_tokens=limit, chat=self.chat)
        asked, drawing = self.files.asked, self.own_drawing

        def draw() -> list[Any]:
            model, tokenizer = load(checkpoint.folder, **{**self.how, "shard": False})
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
        key["dtype"] = f"{self.dtype}{', bf16' * self.bf16}"
        rows = processes.on_first(lambda: Store(self.folder / "pieces").once(key, draw))
        return [Example(tuple(prompt), tuple(response)) for prompt, response in rows]

    @property
    def own_drawing(self) -> Drawing:
        """How PRE draws what it replays: one response a prompt."""
        given = {DRAWN[n]: v for n, v in self.settings.items() if n in DRAWN and n != "n"}
        return Drawing(**given, chat=self.chat, seed=self.seed)


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
        model, tokenizer = load(checkpoint.folder, dtype=self.dtype, device=self.device)
        key = {"model": checkpoint.sha256, "reward": fingerprint(self.reward), "dtype": str(self.dtype)}
        kept: dict[str, Any] = {"store": Store(self.work), "key": {**key, "device": self.device}}
        found = collect(model, tokenizer, asked, score, self.drawing, **kept, progress=progress)
        with replacing(self.out) as partial_file:
            write_samples(partial_file, found)
        return found
