"""Averaging two checkpoints from disk to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from counterpoise.averaging.mix import LARGEST, Donor, mix, refuse_donor
from counterpoise.averaging.partition import partition, whole
from counterpoise.averaging.recipe import Recipe
from counterpoise.averaging.streaming import other_inputs, write
from counterpoise.checkpoints.about import described, inherited
from counterpoise.checkpoints.bits import Array
from counterpoise.checkpoints.files import refuse_occupied, staged
from counterpoise.checkpoints.preflight import CHUNK, Pair, Scan, preflight
from counterpoise.records import Progress, public, versions, write_json

FAR = 3.0
"""A ratio above is warned of: papers extrapolate to 1.5 or 2, and 60 may be meant in percent."""


def average(
    pre: str | Path,
    post: str | Path,
    out: str | Path,
    ratios: float | Sequence[float] | Recipe,
    *,
    blocks: int | str = 3,
    donor: Donor = "post",
    drop: Sequence[str] = (),
    allow_unrelated: bool = False,
    also: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> Recipe:
    """Average two checkpoints into a third, streaming: a few MiB of memory, whatever the model's size, and without torch.

    Args:
        pre, post: folders or hub ids; POST may be a LoRA adapter on PRE.
        out: a new folder; it appears whole or not at all. Same shards and tensor names as POST,
            without the prefixes of wrappers.
        ratios: one share of the update for all tensors, one per block, or a recipe (whose partition is then used).
        blocks: how the model is cut when `ratios` is a sequence: a number of equal blocks, "layerwise" or "module".
        donor: whose config, tokenizer and chat template are copied.
        drop: patterns of tensors to leave out when one side alone has them.
        also: writes further files into the folder before it appears under its name.
        progress: called with (done, total) bytes.

    Raises:
        CheckpointError: the two do not fit (see `preflight`), NaN or Inf, unrelated models, an occupied `out`, an
            input that changes meanwhile, a checkpoint that its class could not load whole (see `check_written`).
    """
    from counterpoise.tables.card import model_card

    refuse_donor(donor)
    refuse_occupied(Path(out).absolute())
    pair = preflight(pre, post, drop=drop, out=out)
    plan = _plan(pair, ratios, blocks)
    shares = plan.partition.ratios(pair.names, plan.ratios)
    buffer = np.empty(CHUNK * 8, np.uint8)  # allocated once

    def mixed(scans: Sequence[Scan], name: str, key: int, start: int, pre: Array, posts: list[Array]) -> Array:
        (scan,), (post,), ratio = scans, posts, shares[name]
        written = buffer[: post.nbytes].view(post.dtype)
        if ratio in (0, 1):  # `mix` computes nothing
            scan.add(name, pre, post)
        return mix(pre, post, ratio, key=key, start=start, out=written, seen=partial(scan.count, name))

    with staged(out) as folder:
        sizes = {n: pair.post.size(n) for n in pair.names}
        how: Any = {"donor": donor, "allow_unrelated": allow_unrelated, "kept": _kept(pair, shares)}
        warned = write([pair], folder, mixed, sizes, progress, **how)
        inputs = describe_inputs(pair)
        settings = {**plan.settings, "donor": donor, "dropped": list(pair.dropped)}
        _, licences = inherited({side.upper(): found.get("card", {}) for side, found in inputs.items()})
        far = [f"ratio {r:g} goes {r:g} times as far as POST; 60 % is 0.6" for r in plan.ratios if r > FAR][:1]
        warnings = (*warned, *far, *other_inputs(plan.inputs, inputs), *licences)
        recipe = Recipe(plan.partition, plan.ratios, inputs, settings, versions(), warnings)
        told = public(recipe.to_json())
        write_json(folder / "recipe.json", told)
        cut, command = plan.partition.summary(pair.shapes), told["settings"].get("command")
        content = {**told, "ratios": list(plan.ratios), "partition": cut, "command": command}
        (folder / "README.md").write_text(model_card(content), encoding="utf-8")
        if also is not None:
            also(folder)
        pair.refuse_changed()
    return recipe


def describe_inputs(pair: Pair) -> dict[str, Any]:
    """Source, hashes and, of what came from the hub, the commit of both checkpoints."""
    return {side: public({"source": c.source}) | described(c) for side, c in (("pre", pair.pre), ("post", pair.post))}


def _kept(pair: Pair, shares: Mapping[str, float]) -> dict[str, str]:
    """The side, "pre" or "post", whose bytes a tensor keeps; those that carry no update are POST's."""
    moved = {n: share for n, share in shares.items() if pair.post.entries[n].kind in ("F64", "F32", "F16", "BF16")}
    sides = {0.0: "pre", 1.0: "post"}
    return {n: sides[share] for n in shares if (share := moved.get(n, 1.0)) in sides}


def _plan(pair: Pair, ratios: float | Sequence[float] | Recipe, blocks: int | str) -> Recipe:
    if isinstance(ratios, Recipe):
        plan = ratios
        named = [*(n for b in plan.partition.blocks for n in b.tensors), *plan.partition.rest]
        if absent := set(named) - set(pair.names):
            raise ValueError(
                f"recipe: it names {len(absent)} tensors that PRE and POST lack, first {min(absent)}; expected the recipe of a "
                "pair that is saved alike (heads tied in both or in neither)"
            )
    elif isinstance(ratios, (int, float)):
        plan = Recipe(whole(pair.names), (float(ratios),))
    else:
        cut = partition(pair.shapes, blocks)
        if len(ratios) != len(cut):
            raise ValueError(f"ratios: expected {len(cut)}, one per block ({cut.name}), found {len(ratios)}")
        plan = Recipe(cut, tuple(float(r) for r in ratios))
    if wrong := [r for r in plan.ratios if not 0 <= r <= LARGEST]:
        raise ValueError(
            f"ratios: expected numbers of at least 0 (1 keeps the whole update) and at most {LARGEST:g}, found {wrong[0]}"
        )
    return plan
