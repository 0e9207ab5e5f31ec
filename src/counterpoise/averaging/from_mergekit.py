"""A recipe of mergekit, run: as ratios of `average` where it is that, else as a merge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterpoise.averaging.average import average
from counterpoise.averaging.merge import MergeRecipe, merge, pairs_of
from counterpoise.averaging.mergekit import Mergekit
from counterpoise.averaging.mix import Donor
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.files import refuse_occupied
from counterpoise.records import Stages, named


def average_mergekit(
    path: str | Path,
    out: str | Path,
    *,
    donor: Donor | None = None,
    drop: Sequence[str] = (),
    allow_unrelated: bool = False,
    progress: Stages | None = None,
) -> Recipe | MergeRecipe:
    """Make what a YAML of mergekit says, of the models that it names.

    Arithmetic is float32 and rounded once, as in `average`, whatever `dtype` says. One POST of which no element is left out is
    an average, whose recipe.json has the ratio of each tensor; anything else is a merge.

    Args:
        donor: PRE (the base model) or the first POST; None takes the YAML's.
        progress: called with (stage, done, total).

    Raises:
        ValueError: what is not honoured, by its name; see `Mergekit`.
        CheckpointError: see `average` and `merge`.
    """
    plan = Mergekit.read(path)
    pre, *posts = (m.partition("+") for m in plan.models)
    if pre[2] or any(adapter and base != pre[0] for base, _, adapter in posts):
        raise ValueError(f"{path}: expected adapters of {pre[0]} alone, found others among {', '.join(plan.models)}")
    models = [adapter or base for base, _, adapter in posts]
    fitted: Any = {"donor": donor or plan.donor, "allow_unrelated": allow_unrelated}
    refuse_occupied(Path(out).absolute())
    pairs = pairs_of(pre[0], models, drop, out)
    plan.check(pairs)
    if (recipe := plan.recipe(pairs[0].shapes)) is None:
        return merge(pre[0], models, out, plan, drop=drop, **fitted, progress=progress)
    return average(pre[0], models[0], out, recipe, drop=drop, **fitted, progress=named(progress, "averaging"))
