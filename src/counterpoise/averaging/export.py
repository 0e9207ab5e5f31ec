"""Recipes of counterpoise as YAML that mergekit 0.1.x runs to the same tensors, within its rounding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from counterpoise.averaging.merge import MergeRecipe
from counterpoise.averaging.mergekit import Mergekit
from counterpoise.averaging.mergekit_yaml import number, value_of
from counterpoise.averaging.recipe import FORMAT, Recipe
from counterpoise.checkpoints.reading import parse_json, read_text

NAMES = {"ties": "ties", "dare": "dare_linear", "dare-ties": "dare_ties"}
DRAW = "mergekit draws other elements at random, and enlarges them by what restores each tensor's L1 norm"
EQUAL = "of equal magnitudes mergekit keeps any, this merge the first; where updates cancel, mergekit takes the positive ones"
DONOR = "mergekit takes config and tokenizer of the base model, PRE; the recipe took POST's"


def exported(path: str | Path, models: Sequence[str], dtype: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The YAML of a recipe.json as a plain dict, and what of it cannot be the same.

    Args:
        path: what `average`, `restore`, `search` or `merge` wrote.
        models: PRE and POSTs as mergekit finds them; none takes the recipe's own names.
        dtype: POST's, if it is known: then mergekit computes in float32, and rounds once.

    Raises:
        ValueError: no recipe, another number of models, a merge that mergekit has not.
    """
    content = parse_json(read_text(path), str(path))
    average = isinstance(content, dict) and content.get("format") == FORMAT
    recipe: Recipe | MergeRecipe = Recipe.read(path) if average else MergeRecipe.read(path)
    named = models or [str(told.get("source")) for told in recipe.inputs.values()]
    count = 2 if average or not recipe.inputs else len(recipe.inputs)
    if len(named) < 2 or (len(named) != count and (average or recipe.inputs)):
        raise ValueError(
            f"{path}: expected PRE and {count - 1} POST{'s' * (count > 2)}, found {' '.join(named) or 'none'}; "
            "name them behind the recipe"
        )
    if isinstance(recipe, Recipe):
        found, told = _average(recipe, named), list[str]()
    else:
        found, told = _merge(recipe, named)
    return found | ({} if dtype is None else {"dtype": "float32", "out_dtype": dtype}), told


def _average(recipe: Recipe, models: Sequence[str]) -> dict[str, Any]:
    """linear, which mergekit computes in float32: (1 - ratio) PRE + ratio POST."""
    names = [*(n for b in recipe.partition.blocks for n in b.tensors), *recipe.partition.rest]
    ratios = recipe.partition.ratios(names, recipe.ratios)
    weights = ({n: 1 - r for n, r in ratios.items()}, ratios)
    return {
        "merge_method": "linear",
        "base_model": models[recipe.settings.get("donor", "post") != "pre"],
        "models": [{"model": m, "parameters": {"weight": by_filter(w)}} for m, w in zip(models, weights, strict=True)],
        "parameters": {"normalize": False},
    }


def _merge(recipe: MergeRecipe, models: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    plan = recipe.plan
    if isinstance(plan, Mergekit):
        return dict(plan.document), []
    if plan.method == "ties" and plan.scope == "model" and plan.density < 1:
        raise ValueError(
            "scope: mergekit ranks the elements of each tensor, this merge those of the whole model; expected one that was "
            "made with --scope tensor"
        )
    weights = plan.weights or (1.0,) * (len(models) - 1)
    told = [DRAW] if plan.method != "ties" and plan.density < 1 else []
    told += [EQUAL] if plan.method == "ties" and plan.density < 1 else []
    told += [DONOR] if recipe.settings.get("donor", "post") != "pre" else []
    return {
        "merge_method": NAMES[plan.method],
        "base_model": models[0],
        "models": [
            {"model": m, "parameters": {"weight": w, "density": plan.density}}
            for m, w in zip(models[1:], weights, strict=True)
        ],
        "parameters": {"normalize": True, "lambda": plan.ratio},
    }, told


def by_filter(values: Mapping[str, float]) -> Any:
    """A number for each tensor as mergekit's filters: by layer or kind of tensor where that will do, else one by one.

    >>> by_filter({"embed": 0.5, "layers.1.w": 0.5, "layers.11.w": 0.25})
    [{'filter': 'layers.11.', 'value': 0.25}, {'value': 0.5}]
    """
    (common, count), *_ = Counter(values.values()).most_common(1)
    if count == len(values):
        return common
    for part in (r"^(?:.*?\.)?\d+\.", r"(?<=\d)\..*$", "^.*$"):
        keys = {n: found[0] if (found := re.search(part, n)) else n for n in values}
        wanted = {k: v for k, v in zip(keys.values(), values.values(), strict=True) if v != common}
        filters = [{"filter": k, "value": v} for k, v in sorted(wanted.items(), key=lambda kv: -len(kv[0]))]
        settings = [*filters, {"value": common}]
        if all(value_of(settings, n, 0.0, "weight", number) == v for n, v in values.items()):
            return settings
    settings = [{"filter": n, "value": v} for n, v in sorted(values.items(), key=lambda nv: -len(nv[0]))]
    return [*settings, {"value": common}]
