"""The two-sided search for one lambda, written as a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from counterpoise.averaging import Recipe, describe_inputs, versions, write_json
from counterpoise.evaluation.sweep import Store
from counterpoise.evaluation.tax import Panel
from counterpoise.files import CheckpointError
from counterpoise.partition import partition
from counterpoise.preflight import preflight, scan
from counterpoise.search.two_sided import Found
from counterpoise.searching import TwoSided
from counterpoise.workbench import Stages, Workbench


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
    """Find the two-sided search's ratios for one lambda and write them to `out` as a recipe.json, which `average` takes.

    Args:
        weight: lambda, the price of what PRE could do in units of alignment.
        max_passes: points that the exact search may evaluate; 0 writes the path.
    """
    if Path(out).exists():
        raise CheckpointError(f"{out}: expected a new file, found one; choose another name or remove it")
    pair = preflight(pre, post, drop=drop)
    _, warnings = scan(pair, allow_unrelated=allow_unrelated, progress=_reading(progress))
    bench = Workbench(pair, panel, Store(work), device=device, dtype=dtype, progress=progress)
    cut = partition({n: pair.post.shape(n) for n in pair.names}, blocks).with_rest_block()
    search = TwoSided(bench, cut, form=alignment, size=proxy_size)
    [found] = search.exact([weight], max_passes=max_passes) if max_passes else search.path([weight])
    settings = {**panel.source, "lambda": weight, "alignment": alignment, "proxy_size": proxy_size, "seed": panel.seed}
    recipe = Recipe(cut, found.ratios, describe_inputs(pair), settings, versions(), (*pair.warnings, *warnings))
    write_json(Path(out), recipe.to_json())
    return found, recipe


def _reading(progress: Stages | None) -> Any:
    return None if progress is None else lambda done, total: progress("reading both checkpoints", done, total)
