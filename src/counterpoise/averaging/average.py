"""Averaging two checkpoints from disk to disk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterpoise.averaging.mix import Donor, mix, refuse_donor
from counterpoise.averaging.partition import partition, whole
from counterpoise.averaging.recipe import Recipe
from counterpoise.averaging.streaming import other_inputs, write_tensors
from counterpoise.checkpoints.checkpoint import copy_companions, hash_in_background
from counterpoise.checkpoints.files import refuse_occupied, staged
from counterpoise.checkpoints.preflight import CHUNK, Pair, Scan, preflight, stretches
from counterpoise.checkpoints.rounding import key_of
from counterpoise.records import Progress, versions, write_json


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
    """Average two checkpoints into a third, streaming: a few MiB of memory, whatever the model's size.

    Args:
        pre, post: folders or hub ids; POST may be a LoRA adapter on PRE.
        out: a new folder; it appears whole or not at all. Same shards and tensor names as POST.
        ratios: one share of the update for all tensors, one per block, or a recipe (whose partition is then used).
        blocks: how the model is cut when `ratios` is a sequence: a number of equal blocks, "layerwise" or "module".
        donor: whose config, tokenizer and chat template are copied.
        drop: patterns of tensors to leave out when one side alone has them.
        also: writes further files into the folder before it appears under its name.
        progress: called with (done, total) bytes.

    Raises:
        CheckpointError: the two do not fit (see `preflight`), NaN or Inf, unrelated models, an occupied `out`.
    """
    refuse_donor(donor)
    refuse_occupied(Path(out).absolute())
    pair = preflight(pre, post, drop=drop, out=out)
    hashes = hash_in_background([pair.pre, pair.post])
    plan = _plan(pair, ratios, blocks)
    with staged(out) as folder:
        with _one_thread():
            scanned = _stream(pair, plan.partition.ratios(pair.names, plan.ratios), folder, progress)
        warnings = (*pair.warnings, *scanned.verdict(allow_unrelated=allow_unrelated))
        hashes.result()
        inputs = describe_inputs(pair)
        # An adapter brings no config of its own, but may bring a tokenizer.
        copy_companions(pair.giver(donor), folder)
        settings = {**plan.settings, "donor": donor, "dropped": list(pair.dropped)}
        warnings += tuple(other_inputs(plan.inputs, inputs))
        recipe = Recipe(plan.partition, plan.ratios, inputs, settings, versions(), warnings)
        write_json(folder / "recipe.json", recipe.to_json())
        (folder / "README.md").write_text(_card(recipe, pair.shapes), encoding="utf-8")
        if also is not None:
            also(folder)
    return recipe


def describe_inputs(pair: Pair) -> dict[str, Any]:
    """Source, hashes and, of what came from the hub, the commit of both checkpoints."""
    return {
        side: {"source": c.source, **({"revision": c.revision} if c.revision else {}), "sha256": c.sha256}
        for side, c in (("pre", pair.pre), ("post", pair.post))
    }


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
    if wrong := [r for r in plan.ratios if not (math.isfinite(r) and r >= 0)]:
        raise ValueError(f"ratios: expected numbers of at least 0 (1 keeps the whole update), found {wrong[0]}")
    return plan


def _stream(pair: Pair, ratios: Mapping[str, float], folder: Path, progress: Progress | None) -> Scan:
    """Write the averaged tensors in POST's shards; scan both inputs in the same pass."""
    scanned, done, total = Scan(pair), 0, sum(map(pair.post.size, ratios))

    def averaged(name: str) -> Iterator[tuple[int, Tensor]]:
        nonlocal done
        pre, post = pair.tensors(name)
        buffer, key = torch.empty(min(CHUNK, post.numel()), dtype=post.dtype), key_of(pre, post)
        for start, (a, b) in stretches(pre, post):
            scanned.add(name, a, b)
            yield start, mix(a, b, ratios[name], key=key, start=start, out=buffer[: len(b)])
        done += pair.post.size(name)
        if progress is not None:
            progress(done, total)

    write_tensors(pair.post, ratios, folder, averaged)
    return scanned


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread computes, one hashes: more threads on chunks of 2 MiB cost processor time and save none."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _card(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> str:
    from counterpoise.tables.card import model_card

    ratios = {"ratios": list(recipe.ratios), "partition": recipe.partition.summary(shapes)}
    return model_card({**recipe.to_json(), **ratios, "command": recipe.settings.get("command")})
