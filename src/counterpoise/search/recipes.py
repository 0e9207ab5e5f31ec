"""A search on its own: ratios found once and written as a recipe, which `average` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from counterpoise.alignment.training import processes
from counterpoise.averaging.average import describe_inputs
from counterpoise.averaging.partition import Partition, partition
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.engine import TRANSFORMERS, EngineSettings
from counterpoise.language.loading import refuse_unmeasurable
from counterpoise.records import Stages, Store, versions, write_json
from counterpoise.search.both_sides import BothSides
from counterpoise.search.candidates import HMA, PASSES, TwoSided, refuse_means
from counterpoise.search.descent import SearchResult
from counterpoise.search.on_bench import hma_ratios, proxies
from counterpoise.search.two_sided import Found


@dataclass(frozen=True)
class Wanted:
    """A search on its own.

    Attributes:
        pre, post, out: the pair, and the recipe.json to write.
        search: how, on which blocks, with how many responses; its lambdas do not count.
        at: HMA's mean ratio, or the lambda of the two-sided search.
        work: where finished pieces are kept.
        max_passes: points that the search may evaluate; 0 writes the path of the two-sided search.
        engine: draws the responses; gradients and whole distributions are always transformers'.
        shard: processes, all that were started, among which the model, PRE and POST are cut up; 1: each holds all.
    """

    pre: str | Path
    post: str | Path
    out: Path
    search: HMA | TwoSided
    at: float
    work: Path
    max_passes: int = PASSES
    drop: Sequence[str] = ()
    allow_unrelated: bool = False
    device: str = "cpu"
    dtype: torch.dtype | None = None
    engine: EngineSettings = TRANSFORMERS
    shard: int = 1

    def check(self) -> None:
        """Raise a ValueError for settings out of range or a model that cannot be measured, before weights are read."""
        self.engine.check(shard=self.shard)
        self.search.check(0)
        if isinstance(self.search, HMA):
            refuse_means([self.at], self.at)
            least = 1
        else:
            replace(self.search, lambdas=(self.at,)).check(0)
            least = 0
        if self.max_passes < least:
            raise ValueError(f"max_passes: expected at least {least}, found {self.max_passes}")
        refuse_unmeasurable(self.pre, self.post)


def find_recipe(wanted: Wanted, panel: Panel, *, progress: Stages | None = None) -> tuple[SearchResult | Found, Recipe]:
    """Find ratios and write them as a recipe.json; a second run finds the same and says so.

    Raises:
        CheckpointError: `wanted.out` holds something else.
        ValueError: see `Wanted.check`.
    """
    wanted.check()
    processes.join(wanted.device, wanted.shard)
    search, out = wanted.search, wanted.out
    pair = preflight(wanted.pre, wanted.post, drop=wanted.drop)
    on: dict[str, Any] = {"device": wanted.device, "dtype": wanted.dtype, "allow_unrelated": wanted.allow_unrelated}
    on |= {"engine": wanted.engine, "shard": wanted.shard}
    store = Store(wanted.work, in_step=wanted.shard > 1)
    bench = Workbench.scanned(pair, panel, store, progress=progress, **on)
    cut, settings = partition(pair.shapes, search.blocks), dict(panel.source)
    if isinstance(search, HMA):
        settings["mean"] = wanted.at
    else:
        cut, settings = cut.with_rest_block(), {**settings, "lambda": wanted.at, "alignment": BothSides.form}
    settings |= {"proxy_size": search.proxy_size, "max_passes": wanted.max_passes, "seed": panel.drawing.seed}
    settings |= {**wanted.engine.told, **bench.cut_up}
    _refuse_another(out, cut, describe_inputs(pair), settings)
    found: SearchResult | Found
    if isinstance(search, HMA):
        found = hma_ratios(bench, cut, proxies(bench, search.proxy_size), wanted.at, max_passes=wanted.max_passes)
        settings["trace"] = list(found.trace)
    else:
        both = BothSides(bench, cut, size=search.proxy_size)
        passes = wanted.max_passes
        [found] = both.exact([wanted.at], max_passes=passes) if passes else both.path([wanted.at])
    pair.refuse_changed()
    recipe = Recipe(cut, found.ratios, describe_inputs(pair), settings, versions(), bench.warnings)
    processes.on_first(lambda: write_json(out, recipe.to_json()))
    return found, recipe


def _refuse_another(out: Path, cut: Partition, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise when `out` holds anything but the recipe of this very search, before the search is paid for."""
    if not out.exists():
        return
    earlier = Recipe.read(out)
    same = earlier.partition == cut and earlier.inputs == json.loads(json.dumps(inputs))
    if not same or any(earlier.settings.get(k) != v for k, v in json.loads(json.dumps(settings)).items()):
        raise CheckpointError(
            f"{out}: expected no file, or the recipe of these inputs and settings, found another's; choose another name "
            "or remove it"
        )
