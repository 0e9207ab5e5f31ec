"""Averaging two checkpoints: `mix`, the one place where two tensors become one, and `average`, from disk to disk."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoise.checkpoints.checkpoint import Checkpoint, TensorFile, copy_companions, hash_in_background
from counterpoise.checkpoints.files import INDEX, refuse_occupied, staged
from counterpoise.checkpoints.preflight import CHUNK, Pair, Scan, preflight
from counterpoise.checkpoints.rounding import NARROW, PIECE, key_of, narrow_piece
from counterpoise.partition import Block, Partition, partition, whole
from counterpoise.records import versions, write_json

Donor = Literal["pre", "post"]


def mix(
    pre: Tensor, post: Tensor, ratio: float, *, key: int | None = None, start: int = 0, out: Tensor | None = None
) -> Tensor:
    """theta(r) = pre + r (post - pre), in POST's dtype: Lin et al. 2024, section 5 (their weight is 1 - r).

    Computed in at least float32 and rounded once, to bfloat16 and float16 stochastically: rounding to the nearest would
    turn an update of one unit in the last place into none or all of it (`rounding.narrow`). A ratio of 0 or 1 gives that
    side's very bytes, and so do elements that are equal in both; above 1 it extrapolates (ExPO). Integer tensors, which
    carry no update, are POST's.

    Args:
        pre, post: contiguous tensors of one shape.
        key, start: for stretches, `key_of` the whole tensors and where in them (flattened) the stretch begins.
        out: written to and returned when given; contiguous, its dtype is POST's.

    >>> mix(torch.zeros(2), torch.ones(2), 0.25)
    tensor([0.2500, 0.2500])
    """
    if ratio == 1 or not post.is_floating_point():
        result = post
    elif ratio == 0:
        result = pre.to(post.dtype)
    else:
        wide = torch.promote_types(torch.promote_types(pre.dtype, post.dtype), torch.float32)
        if wide == pre.dtype == post.dtype:
            return torch.lerp(pre, post, ratio) if out is None else torch.lerp(pre, post, ratio, out=out)
        result = torch.empty(post.shape, dtype=post.dtype) if out is None else out
        if post.dtype not in NARROW:
            return result.copy_(torch.lerp(pre.to(wide), post.to(wide), ratio))
        key = key_of(pre, post) if key is None else key
        _mix_narrow(pre.reshape(-1), post.reshape(-1), ratio, wide, key, start, result.view(-1))
        return result
    return result if out is None else out.copy_(result)


def _mix_narrow(pre: Tensor, post: Tensor, ratio: float, wide: torch.dtype, key: int, start: int, out: Tensor) -> None:
    """Piece by piece in buffers that are allocated once: in fresh ones, page faults cost several times the arithmetic."""
    before, after = (torch.empty(min(PIECE, post.numel()), dtype=wide) for _ in range(2))
    for begin in range(0, post.numel(), PIECE):
        a, b, part = (t[begin : begin + PIECE] for t in (pre, post, out))
        mixed = before[: len(part)].copy_(a).lerp_(after[: len(part)].copy_(b), ratio)
        narrow_piece(mixed.to(torch.float32), part, key=key, start=start + begin)


@dataclass(frozen=True)
class Recipe:
    """Which ratios made a checkpoint, of what, how: everything needed to make it again.

    Attributes:
        ratios: one per block of the partition.
        inputs: for PRE and POST the source and the sha256 of each file.
        settings: what else decided the result (donor, dropped tensors, a search's own settings).
    """

    partition: Partition
    ratios: tuple[float, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """The weighted mean ratio, which the tensors outside the blocks take."""
        return self.partition.mean(self.ratios)

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `Recipe.from_json` reads it back."""
        blocks = [
            {"name": b.name, "ratio": r, "weight": b.weight, "layers": list(b.layers), "tensors": list(b.tensors)}
            for b, r in zip(self.partition.blocks, self.ratios, strict=True)
        ]
        return {
            "format": "counterpoise recipe 1",
            "formula": "pre + ratio * (post - pre)",
            "mean": self.mean,
            "partition": self.partition.name,
            "blocks": blocks,
            "rest": {"ratio": self.mean, "tensors": list(self.partition.rest)},
            "inputs": dict(self.inputs),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not a recipe.
        """
        if content.get("format") != "counterpoise recipe 1":
            raise ValueError(
                f"expected a recipe (format: counterpoise recipe 1), found format {content.get('format')!r}"
            )
        blocks = tuple(
            Block(b["name"], float(b["weight"]), tuple(b["tensors"]), tuple(b["layers"])) for b in content["blocks"]
        )
        return cls(
            Partition(content["partition"], blocks, tuple(content["rest"]["tensors"])),
            tuple(float(b["ratio"]) for b in content["blocks"]),
            content["inputs"],
            content["settings"],
            content["versions"],
            tuple(content["warnings"]),
        )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe.json."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a recipe ({error}); expected the recipe.json of counterpoise") from None


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
    from counterpoise.report.card import model_card

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
