"""Averaging two checkpoints: `mix`, the one place where two tensors become one, and `average`, from disk to disk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from counterpoise.averaging.mix import Donor, mix, refuse_donor
from counterpoise.averaging.partition import partition, whole
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.checkpoint import Checkpoint, TensorFile, copy_companions, hash_in_background
from counterpoise.checkpoints.files import INDEX, refuse_occupied, staged
from counterpoise.checkpoints.preflight import CHUNK, Pair, Scan, preflight
from counterpoise.checkpoints.rounding import key_of
from counterpoise.records import versions, write_json


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
    progress: Callable[[int, int], None] | None = None,
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
        giver = pair.pre if donor == "pre" else pair.post
        copy_companions(giver, folder)
        recipe = Recipe(
            plan.partition,
            plan.ratios,
            inputs,
            {**plan.settings, "donor": donor, "dropped": list(pair.dropped)},
            versions(),
            (*warnings, *_other_inputs(plan, inputs)),
        )
        write_json(folder / "recipe.json", recipe.to_json())
        shapes = {n: pair.post.shape(n) for n in pair.names}
        _write_card(folder, recipe, shapes)
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
        cut = partition({n: pair.post.shape(n) for n in pair.names}, blocks)
        if len(ratios) != len(cut):
            raise ValueError(f"ratios: expected {len(cut)}, one per block ({cut.name}), found {len(ratios)}")
        plan = Recipe(cut, tuple(float(r) for r in ratios))
    if wrong := [r for r in plan.ratios if not (math.isfinite(r) and r >= 0)]:
        raise ValueError(f"ratios: expected numbers of at least 0 (1 keeps the whole update), found {wrong[0]}")
    return plan


def _other_inputs(recipe: Recipe, inputs: Mapping[str, Any]) -> list[str]:
    """A warning for each side whose files are not those that the recipe was made from."""
    return [
        f"the recipe was made for another {side.upper()} ({recipe.inputs[side].get('source')}) than this one"
        for side in inputs
        if side in recipe.inputs and recipe.inputs[side].get("sha256") != inputs[side]["sha256"]
    ]


def _stream(
    pair: Pair,
    ratios: Mapping[str, float],
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> Scan:
    """Write the averaged tensors in POST's shards; scan both inputs in the same pass."""
    scanned = Scan(pair)
    layout = {file: [n for n in names if n in ratios] for file, names in pair.post.layout.items()}
    layout = {file: names for file, names in layout.items() if names}
    total, done = sum(_size(pair.post, n) for n in ratios), 0
    for file, names in layout.items():
        sink = TensorFile(folder / file, {n: (pair.post.dtype(n), pair.post.shape(n)) for n in names})
        for name in names:
            pre, post = (t.flatten() for t in pair.tensors(name))
            buffer, key = torch.empty(min(CHUNK, post.numel()), dtype=post.dtype), key_of(pre, post)
            for start in range(0, post.numel(), CHUNK):
                a, b = pre[start : start + CHUNK], post[start : start + CHUNK]
                scanned.add(name, a, b)
                mixed = mix(a, b, ratios[name], key=key, start=start, out=buffer[: len(b)])
                sink.write(name, start * post.element_size(), mixed)
            done += _size(pair.post, name)
            if progress is not None:
                progress(done, total)
        sink.close()
    if list(layout) != ["model.safetensors"]:
        weight_map = {n: file for file, names in layout.items() for n in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
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


def _size(checkpoint: Checkpoint, name: str) -> int:
    return checkpoint.dtype(name).itemsize * torch.Size(checkpoint.shape(name)).numel()


def _write_card(folder: Path, recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> None:
    from counterpoise.tables.card import model_card

    content = {
        "ratios": list(recipe.ratios),
        "mean": recipe.mean,
        "partition": recipe.partition.summary(shapes),
        "inputs": recipe.inputs,
        "donor": recipe.settings["donor"],
        "versions": recipe.versions,
        "command": recipe.settings.get("command"),
        "warnings": list(recipe.warnings),
    }
    (folder / "README.md").write_text(model_card(content), encoding="utf-8")
