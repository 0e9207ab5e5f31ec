"""A search on its own: ratios found once and written as a recipe, which `average` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from counterpoise.averaging.average import describe_inputs
from counterpoise.averaging.partition import Partition, partition
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.preflight import preflight, scan
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.workbench import Workbench
from counterpoise.records import Stages, Store, versions, write_json
from counterpoise.search.descent import SearchResult
from counterpoise.search.on_bench import hma_ratios, proxies
from counterpoise.search.searching import TwoSided
from counterpoise.search.settings import refuse_settings
from counterpoise.search.two_sided import Found


def hma_recipe(
    pre: str | Path,
    post: str | Path,
    out: str | Path,
    panel: Panel,
    *,
    mean: float,
    work: str | Path,
    blocks: int | str = 3,
    proxy_size: int = 256,
    max_passes: int = 12,
    drop: Sequence[str] = (),
    allow_unrelated: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Stages | None = None,
) -> tuple[SearchResult, Recipe]:
    """Find HMA's ratios at a mean and write them to `out` as a recipe.json; a second run finds the same and says so.

    Raises:
        CheckpointError: `out` holds something else.
        ValueError: `mean` or `proxy_size` out of range.
    """
    refuse_settings([mean], mean, 1.0, proxy_size)
    pair = preflight(pre, post, drop=drop)
    _, warnings = scan(pair, allow_unrelated=allow_unrelated, progress=_reading(progress))
    cut = partition({n: pair.post.shape(n) for n in pair.names}, blocks)
    settings: dict[str, Any] = {"mean": mean, "proxy_size": proxy_size, "max_passes": max_passes, "seed": panel.seed}
    settings = {**panel.source, **settings}
    _refuse_another(Path(out), cut, describe_inputs(pair), settings)
    bench = Workbench(pair, panel, Store(work), device=device, dtype=dtype, progress=progress)
    found = hma_ratios(bench, cut, proxies(bench, proxy_size), mean, max_passes=max_passes)
    settings["trace"] = list(found.trace)
    told = (*pair.warnings, *warnings, *bench.warnings)
    recipe = Recipe(cut, found.ratios, describe_inputs(pair), settings, versions(), told)
    write_json(Path(out), recipe.to_json())
    return found, recipe


def two_sided_recipe(
    pre: str | Path,
    post: str | Path,
    out: str | Path,
    panel: Panel,
    *,
    weight: float,
    work: str | Path,
    alignment: str = "imitation",
    blocks: int | str = "layerwise",
    proxy_size: int = 256,
    max_passes: int = 12,
    drop: Sequence[str] = (),
    allow_unrelated: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Stages | None = None,
) -> tuple[Found, Recipe]:
    """Find the two-sided search's ratios for one lambda and write them to `out` as a recipe.json.

    Args:
        weight: lambda, the price of what PRE could do in units of alignment.
        max_passes: points that the exact search may evaluate; 0 writes the path.
    """
    pair = preflight(pre, post, drop=drop)
    _, warnings = scan(pair, allow_unrelated=allow_unrelated, progress=_reading(progress))
    bench = Workbench(pair, panel, Store(work), device=device, dtype=dtype, progress=progress)
    cut = partition({n: pair.post.shape(n) for n in pair.names}, blocks).with_rest_block()
    settings = {"lambda": weight, "alignment": alignment, "proxy_size": proxy_size, "max_passes": max_passes}
    settings = {**panel.source, **settings, "seed": panel.seed}
    _refuse_another(Path(out), cut, describe_inputs(pair), settings)
    search = TwoSided(bench, cut, form=alignment, size=proxy_size)
    [found] = search.exact([weight], max_passes=max_passes) if max_passes else search.path([weight])
    told = (*pair.warnings, *warnings, *bench.warnings)
    recipe = Recipe(cut, found.ratios, describe_inputs(pair), settings, versions(), told)
    write_json(Path(out), recipe.to_json())
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


def _reading(progress: Stages | None) -> Any:
    return None if progress is None else lambda done, total: progress("reading both checkpoints", done, total)
