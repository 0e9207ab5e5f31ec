"""A pair of checkpoints under one panel: measure any average of them, search ratios, never do anything twice."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from counterpoise.averaging.mix import Donor
from counterpoise.averaging.partition import Partition, whole
from counterpoise.averaging.places import refuse_unmeasured
from counterpoise.averaging.resident import ResidentAverage, compute_dtype, main_dtype
from counterpoise.checkpoints.checkpoint import companions_sha256
from counterpoise.checkpoints.preflight import Pair, preflight, scan
from counterpoise.evaluation.measurement import Scores
from counterpoise.evaluation.panel import Given, Panel
from counterpoise.evaluation.parts import Part
from counterpoise.language import dtypes
from counterpoise.language.engine import TRANSFORMERS, Engine, EngineSettings, LanguageModel
from counterpoise.language.scoring import continuation_logprobs
from counterpoise.language.ways import CLOSE, NARROW, context_of, probes
from counterpoise.ranks import from_first
from counterpoise.records import NUMERICS, Progress, Stages, Store, digest, named
from counterpoise.statistics.bootstrap import Array

ENDS = (0.0, 1.0)
"""PRE and POST."""


class Model(NamedTuple):
    """An average to be measured, or a healed model, whose checkpoint `instead` stands in PRE's place."""

    name: str
    method: str
    partition: Partition
    ratios: tuple[float, ...]
    instead: Path | None = None

    @property
    def mean(self) -> float:
        """The weighted mean ratio."""
        return self.partition.mean(self.ratios)


class Piece(NamedTuple):
    """What is measured of a model on its own: its reward (0), up to so many looks, or one of the panel's abilities."""

    model: Model
    part: Part
    number: int = 0
    looks: int | None = None


@dataclass(frozen=True)
class Point:
    """One model and what it scores on one part."""

    model: Model
    part: Part
    scores: Scores

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    @property
    def method(self) -> str:
        """The model's."""
        return self.model.method

    @property
    def mean(self) -> float:
        """The weighted mean ratio."""
        return self.model.mean


class Workbench:
    """One resident model, its tokenizer, a panel and a store of finished work.

    Where another engine measures, the resident model is there for gradients and whole distributions, and the two take turns.

    Args:
        pair: checked by `preflight`.
        store: pieces of work are kept in it, keyed by the hashes of the inputs and all that decides the piece.
        dtype: of the computation; by default `resident.compute_dtype`. `warnings` tells where that is not POST's own.
        engine: draws and scores.
        shard: among how many processes, all there are, the model is cut up; the store is then `in_step`.

    Attributes:
        elsewhere: has pieces measured by others before they are read from the store; see `restoration.cluster`.
    """

    def __init__(
        self,
        pair: Pair,
        panel: Panel,
        store: Store,
        *,
        donor: Donor = "post",
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        engine: EngineSettings = TRANSFORMERS,
        shard: int = 1,
        progress: Stages | None = None,
    ) -> None:
        self.asked_engine = engine
        self.cut_up: dict[str, Any] = (
            {"shard": shard} if shard > 1 else {}
        )  # in keys and records, as before there were shards
        self.pair, self.panel, self.store, self.donor = pair, panel, store, donor
        self.device = device
        self.dtype = dtype or from_first(lambda: compute_dtype(pair, device))  # it is timed, and keys must be one
        told = dtypes.warning(main_dtype(pair), dtype, device)
        self.warnings: tuple[str, ...] = () if told is None else (told,)
        self.whole = whole(pair.names)
        self.giver = pair.giver(donor)
        self.inputs = {
            "numerics": NUMERICS,
            "pre": pair.pre.sha256,
            "post": pair.post.sha256,
            "donor": companions_sha256(self.giver),
            "dropped": list(pair.dropped),
            "dtype": str(self.dtype),
            "device": device,
            **engine.told,
            **self.cut_up,
        }
        self.stages = progress
        self.elsewhere: Callable[[Sequence[Piece]], None] | None = None
        self._healed: tuple[Path, Workbench] | None = None

    @classmethod
    def scanned(
        cls, pair: Pair, panel: Panel, store: Store, *, allow_unrelated: bool, progress: Stages | None, **on: Any
    ) -> Workbench:
        """A workbench once every tensor was read: `warnings` are those of `preflight` and `scan`, too."""
        refuse_unmeasured(pair, on.get("donor", "post"), shard=on.get("shard", 1))
        bench = cls(pair, panel, store, **on, progress=progress)
        panel.refuse_long(bench.tokenizer, bench.context)
        _, told = scan(pair, allow_unrelated=allow_unrelated, progress=named(progress, "reading both checkpoints"))
        bench.warnings = (*pair.warnings, *told, *bench.warnings)
        return bench

    @cached_property
    def resident(self) -> ResidentAverage:
        """The model, loaded when it is first needed."""
        self._rest()
        if self.cut_up:
            from counterpoise.averaging.sharded import ShardedAverage

            return ShardedAverage(self.pair, donor=self.donor, dtype=self.dtype, device=self.device)
        return ResidentAverage(self.pair, donor=self.donor, dtype=self.dtype, device=self.device)

    def free(self) -> None:
        """Let go of the model; it is loaded again when it is needed."""
        vars(self).pop("resident", None)
        self._rest()
        if torch.device(self.device).type == "cuda":
            gc.collect()  # a model whose step was compiled refers to itself
            torch.cuda.empty_cache()

    @cached_property
    def engine(self) -> Engine:
        """What measures where it is not the resident model, started when it is first needed.

        Raises:
            ValueError: PRE or POST have other log-probabilities in it than in transformers.
        """
        from counterpoise.averaging.vllm import VLLM

        texts, wanted = probes(self.resident.model), []
        for end in ENDS:
            wanted.append(continuation_logprobs(self._placed(self._plain(end)), *texts))
        self.free()  # one model in memory
        engine = VLLM(self.giver.folder, self.dtype, self.device, tensor_parallel=self.asked_engine.tensor_parallel)
        close = max(CLOSE if self.device == "cpu" else 20 * CLOSE, NARROW * torch.finfo(self.dtype).eps)
        for end, sums in zip(ENDS, wanted, strict=True):
            engine.put(self.pair, self.whole.ratios(self.pair.names, [end]))
            found = np.concatenate(engine.score(*texts)) - np.concatenate(sums)
            if not (gap := float(np.abs(found).max())) <= close:
                raise ValueError(
                    f"engine vllm: expected the log-probabilities of transformers, within {close:.2g} nats over a few tokens, "
                    f"found {gap:.2g} apart with the weights of {'POST' if end else 'PRE'}; use --engine transformers"
                )
        return engine

    def _rest(self) -> None:
        if "engine" in vars(self):
            self.engine.rest()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the donor."""
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(self.giver.tokenizer_folder, trust_remote_code=False)
        self.giver.refuse_changed()
        return found

    @property
    def context(self) -> int | None:
        """Tokens that the donor's model has positions for."""
        from transformers import AutoConfig

        return context_of(AutoConfig.from_pretrained(self.giver.folder, trust_remote_code=False))

    def model_at(self, end: float) -> LanguageModel:
        """PRE (0), POST (1) or a plain average between them, to draw from."""
        return self._at_hand(self._plain(end))

    def rewards(self, model: Model, part: Part, looks: int) -> Array:
        """The rewards of a model on the prompts of a part up to so many looks of the panel; `points` read them again."""
        found = self.panel.rewards(*self._asked(model, part), looks=looks, **self._kept(model))
        if (progress := self.stage(f"{model.name}, {part}")) is not None:
            progress(1, 1 + len(self.panel.abilities))
        return found

    def ends(self, part: Part) -> list[Point]:
        """PRE and POST, measured on a part."""
        return self.points([self._plain(0.0, "PRE"), self._plain(1.0, "POST")], part)

    def points(self, models: Sequence[Model], part: Part) -> list[Point]:
        """Each of these measured on a part; processes with one work folder share them."""
        if self.elsewhere is not None:
            self.elsewhere([Piece(m, part, n) for m in models for n in range(1 + len(self.panel.abilities))])
        keys = [{"what": "point", "model": self._kept(m)["model_id"], "part": part} for m in models]
        return self.store.each([(k, partial(self._measured, m, part)) for k, m in zip(keys, models, strict=True)])

    def piece(self, piece: Piece, *, model: Given | None = None) -> None:
        """Have the store hold a piece; `model` stands in for the average, where that is not to be asked."""
        given, *on = self._asked(piece.model, piece.part)
        kept, panel = self._kept(piece.model), self.panel
        if piece.number == 0:
            panel.rewards(model or given, *on, looks=piece.looks, **kept)
        else:
            panel.score(panel.abilities[piece.number - 1], model or given, *on, **kept)

    def point(
        self,
        method: str,
        cut: Partition,
        ratios: Sequence[float] | Array,
        part: Part,
        *,
        name: str | None = None,
        instead: Path | None = None,
    ) -> Point:
        """Measure the average with these ratios on a part, or read it from the store; `instead` stands in PRE's place."""
        name = name or f"{method} {cut.mean(ratios):.2g}"
        return self._measured(Model(name, method, cut, tuple(map(float, ratios)), instead), part)

    def placed(self, point: Point) -> nn.Module:
        """The resident model as a point's average; a healed one stands in its place."""
        return self._placed(point.model)

    def identity(self, point: Point) -> dict[str, Any]:
        """Names a point's model in the keys of stored work."""
        found: dict[str, Any] = self._kept(point.model)["model_id"]
        return found

    def responses(self, point: Point) -> list[list[tuple[int, ...]]]:
        """The responses whose reward a point has; see `Panel.responses`."""
        return self.panel.responses(*self._asked(point.model, point.part), **self._kept(point.model))

    def _plain(self, ratio: float, name: str = "MA") -> Model:
        return Model(name, name, self.whole, (ratio,))

    def _measured(self, model: Model, part: Part) -> Point:
        progress = self.stage(f"{model.name}, {part}")
        scores = self.panel.measure(*self._asked(model, part), **self._kept(model), progress=progress)
        return Point(model, part, scores)

    def _asked(self, model: Model, part: Part) -> tuple[Given, Any, Part]:
        """What the panel asks: the model once it is needed, with its tokenizer, on a part."""
        return partial(self._at_hand, model), self._of(model.instead).tokenizer, part

    def _of(self, instead: Path | None) -> Workbench:
        """This workbench, or that of a healed model and POST."""
        if instead is None:
            return self
        if self._healed is None or self._healed[0] != instead:
            pair = preflight(instead, self.pair.post.source, drop=self.pair.dropped)
            on: dict[str, Any] = {"donor": self.donor, "device": self.device, "dtype": self.dtype}
            on["engine"] = self.asked_engine
            self._healed = instead, Workbench(pair, self.panel, self.store, **on, progress=self.stages)
        return self._healed[1]

    def _placed(self, model: Model) -> nn.Module:
        bench = self._of(model.instead)
        if bench is not self:
            self.free()  # one model in memory
        elif self._healed is not None:
            self._healed[1].free()
        bench.resident.set(model.partition, model.ratios)
        return bench.resident.model

    def _at_hand(self, model: Model) -> LanguageModel:
        """What measures, as an average."""
        if self.asked_engine.name == "transformers":
            return self._placed(model)
        bench = self._of(model.instead)
        for one in (self, *([self._healed[1]] if self._healed else [])):
            vars(one).pop("resident", None)
        self.engine.put(bench.pair, model.partition.ratios(bench.pair.names, model.ratios))
        return self.engine

    def _kept(self, model: Model) -> dict[str, Any]:
        """Where what a model scores is kept, and its name there."""
        bench = self._of(model.instead)
        ratios = digest(model.partition.ratios(bench.pair.names, model.ratios))
        return {"store": self.store, "model_id": {**bench.inputs, "ratios": ratios}}

    def stage(self, name: str) -> Progress | None:
        """A progress callback for one stage."""
        return named(self.stages, name)
