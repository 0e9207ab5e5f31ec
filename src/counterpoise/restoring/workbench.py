"""A pair of checkpoints under one panel: measure any average of them, search ratios, never do anything twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from counterpoise.averaging.mix import Donor
from counterpoise.averaging.partition import Partition, whole
from counterpoise.averaging.resident import ResidentAverage, compute_dtype, main_dtype
from counterpoise.checkpoints.checkpoint import companions_sha256
from counterpoise.checkpoints.preflight import Pair
from counterpoise.evaluation.parts import Part
from counterpoise.evaluation.tax import Panel, Scores
from counterpoise.language import dtypes
from counterpoise.language.scoring import Example
from counterpoise.records import NUMERICS, Progress, Stages, Store, digest
from counterpoise.search.hma import SearchResult, hma
from counterpoise.search.proxies import ProxySet, draw_proxies


@dataclass(frozen=True)
class Point:
    """One average and what it scores on one part."""

    name: str
    method: str
    partition: Partition
    ratios: tuple[float, ...]
    part: Part
    scores: Scores

    @property
    def mean(self) -> float:
        """The weighted mean ratio."""
        return self.partition.mean(self.ratios)


class Workbench:
    """One resident model, its tokenizer, a panel and a store of finished work.

    Args:
        pair: checked by `preflight`.
        store: pieces of work are kept in it, keyed by the hashes of the inputs and all that decides the piece.
        dtype: of the computation; by default `resident.compute_dtype`. `warnings` tells where that is not POST's own.
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
        progress: Stages | None = None,
    ) -> None:
        self.pair, self.panel, self.store, self.donor = pair, panel, store, donor
        self.device, self.dtype = device, dtype or compute_dtype(pair, device)
        told = dtypes.warning(main_dtype(pair), dtype, device)
        self.warnings = () if told is None else (told,)
        self.whole = whole(pair.names)
        giver = pair.pre if donor == "pre" else pair.post
        self.inputs = {
            "numerics": NUMERICS,
            "pre": pair.pre.sha256,
            "post": pair.post.sha256,
            "donor": companions_sha256(giver),
            "dropped": list(pair.dropped),
            "dtype": str(self.dtype),
            "device": device,
        }
        self._progress = progress

    @cached_property
    def resident(self) -> ResidentAverage:
        """The model, loaded when it is first needed."""
        return ResidentAverage(self.pair, donor=self.donor, dtype=self.dtype, device=self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The donor's."""
        from transformers import AutoTokenizer

        giver = self.pair.pre if self.donor == "pre" else self.pair.post
        return AutoTokenizer.from_pretrained(giver.tokenizer_folder, trust_remote_code=False)

    def point(
        self,
        method: str,
        cut: Partition,
        ratios: Sequence[float] | NDArray[np.float64],
        part: Part,
        *,
        name: str | None = None,
    ) -> Point:
        """Measure the average with these ratios on a part, or read it from the store."""
        name = name or f"{method} {cut.mean(ratios):.2g}"
        self.resident.set(cut, ratios)
        scores = self.panel.measure(
            self.resident.model,
            self.tokenizer,
            part,
            store=self.store,
            progress=self.stage(f"{name}, {part}"),
            model_id={**self.inputs, "ratios": digest(cut.ratios(self.pair.names, ratios))},
        )
        return Point(name, method, cut, tuple(map(float, ratios)), part, scores)

    def proxies(self, size: int, *, n: int = 2, keep: float = 0.4) -> list[Example]:
        """Good responses of POST to the proxy prompts; see `draw_proxies`."""
        prompts = self.panel.prompts_of("proxy")[: math.ceil(size / (n * keep))]
        drawing: dict[str, Any] = {
            "n": n,
            "keep": keep,
            "size": size,
            "max_new_tokens": self.panel.max_new_tokens,
            "temperature": self.panel.temperature,
            "chat": self.panel.chat,
            "seed": self.panel.seed + 1,
        }

        def draw() -> list[Any]:
            self.resident.set(self.whole, [1.0])
            return [
                list(map(list, e))
                for e in draw_proxies(
                    self.resident.model,
                    self.tokenizer,
                    prompts,
                    self.panel.reward,
                    batch_size=4 * self.panel.batch_size,
                    progress=self.stage("drawing proxies from POST"),
                    **drawing,
                )
            ]

        key = {
            "what": "proxies",
            "model": self.inputs,
            "prompts": [p.key for p in prompts],
            "reward": self.panel.reward_id,
            **drawing,
        }
        return [Example(tuple(prompt), tuple(response)) for prompt, response in self.store.once(key, draw)]

    def search(self, cut: Partition, proxies: list[Example], mean: float, *, max_passes: int = 12) -> SearchResult:
        """HMA's ratios at a mean, searched once."""
        batch = max(1, self.panel.batch_size // 2)

        def run() -> dict[str, Any]:
            progress = self.stage(f"searching ratios, mean {mean:g}")
            found = hma(
                self.resident,
                cut,
                ProxySet(tuple(proxies), batch).backward,
                mean,
                max_passes=max_passes,
                progress=progress,
            )
            if progress is not None:  # it may converge before max_passes
                progress(found.passes, found.passes)
            return {"ratios": found.ratios, "value": found.value, "trace": found.trace, "converged": found.converged}

        key = {
            "what": "search",
            "model": self.inputs,
            "proxies": digest(proxies),
            "mean": mean,
            "passes": max_passes,
            "batch": batch,
            "cut": [[b.weight, *b.tensors] for b in cut.blocks],
            "rest": cut.rest,
        }
        kept = self.store.once(key, run)
        return SearchResult(tuple(kept["ratios"]), kept["value"], tuple(kept["trace"]), kept["converged"])

    def stage(self, name: str) -> Progress | None:
        """A progress callback for one stage."""
        progress = self._progress
        return None if progress is None else lambda done, total: progress(name, done, total)
