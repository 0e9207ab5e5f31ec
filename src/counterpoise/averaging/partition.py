"""Partitions: which tensors share a ratio."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OUTSIDE = "outside the layers"
"""The block of embeddings, final norm and head, where they have a ratio of their own."""

NO_TEXT = re.compile(
    r"vision|visual|image|img|audio|speech|video|protein|cross_attn|vq|codec|qformer|perceiver|resampler|projector|connector|mtp|talker|token2wav"
)
"""In the names of stacks that read or make no text, beside one that does."""


@dataclass(frozen=True)
class Block:
    """Tensors that share a ratio.

    Attributes:
        weight: its share in the mean ratio: the number of its layers, or of its parameters where the partition cuts
            across layers.
        layers: the layers it touches, from input to output.
    """

    name: str
    weight: float
    tensors: tuple[str, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Partition:
    """Every tensor in exactly one block, or in `rest`, whose tensors take the weighted mean of the blocks' ratios.

    `rest` holds what stands outside the layers: embeddings, final norm, head. The paper keeps the head at the global
    ratio and is silent on the others, and its code averages different tensors in MA and in HMA (papers/hma.md, fault 8);
    here one policy serves both, so that MA is the partition with all ratios equal. `with_rest_block` gives them a ratio
    of their own instead.

    >>> p = equal(["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w"], 2)
    >>> [b.name for b in p.blocks], p.rest
    (['layers 0-1', 'layer 2'], ('embed.weight',))
    >>> p.ratios({"embed.weight"}, (0.3, 0.9))
    {'embed.weight': 0.5}
    """

    name: str
    blocks: tuple[Block, ...]
    rest: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError(f"partition {self.name}: expected at least one block, found none")
        seen: set[str] = set()
        for name in (*(t for b in self.blocks for t in b.tensors), *self.rest):
            if name in seen:
                raise ValueError(f"partition {self.name}: the tensor {name} stands in two blocks; expected exactly one")
            seen.add(name)
        found = [b.weight for b in self.blocks]
        if any(not w > 0 for w in found) or not math.isfinite(sum(found)):
            raise ValueError(f"partition {self.name}: expected positive, finite block weights, found {found}")

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def weights(self) -> np.ndarray:
        """Block weights, float64 of shape (K,)."""
        return np.array([b.weight for b in self.blocks], dtype=np.float64)

    def mean(self, ratios: Sequence[float] | np.ndarray) -> float:
        """Weighted mean of the ratios; exactly r when all of them are r, so that MA is one special case of HMA."""
        if all(r == ratios[0] for r in ratios):
            return float(ratios[0])
        weighted = [b.weight * float(r) for b, r in zip(self.blocks, ratios, strict=True)]
        return math.fsum(weighted) / math.fsum(b.weight for b in self.blocks)

    def ratios(self, names: Iterable[str], ratios: Sequence[float] | np.ndarray) -> dict[str, float]:
        """The ratio of each tensor of `names`, given one ratio per block."""
        if len(ratios) != len(self.blocks):
            raise ValueError(f"partition {self.name}: expected {len(self.blocks)} ratios, found {len(ratios)}")
        of = {t: float(r) for b, r in zip(self.blocks, ratios, strict=True) for t in b.tensors}
        of.update(dict.fromkeys(self.rest, self.mean(ratios)))
        wanted = list(names)
        if lost := [n for n in wanted if n not in of]:
            said = f"{len(lost)} tensors are in no block, first {lost[0]}; it was made for another model"
            raise ValueError(f"partition {self.name}: {said}")
        return {n: of[n] for n in wanted}

    def with_rest_block(self, *, weight: float = 1.0) -> Partition:
        """The same blocks, and what stands outside the layers as one block more, with a ratio of its own.

        Args:
            weight: of that block in the mean: it counts as one layer unless told otherwise. Where blocks are weighted by
                parameters, give its parameters.

        >>> p = equal(["embed.weight", "layers.0.w", "layers.1.w"], 2).with_rest_block()
        >>> p.name, p.ratios(["embed.weight", "layers.1.w"], (0.1, 0.2, 0.9))
        ('layerwise + outside', {'embed.weight': 0.9, 'layers.1.w': 0.2})
        """
        if not self.rest:
            return self
        outside = Block(OUTSIDE, float(weight), self.rest, ())
        return Partition(f"{self.name} + outside", (*self.blocks, outside))

    def summary(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Names, weights, layers and sizes, as plain json for reports.

        Args:
            shapes: tensor name -> shape.
        """

        def size(names: Sequence[str]) -> dict[str, int]:
            return {"tensors": len(names), "parameters": sum(math.prod(shapes[n]) for n in names)}

        blocks = [
            {"name": b.name, "weight": b.weight, "layers": list(b.layers), **size(b.tensors)} for b in self.blocks
        ]
        return {"name": self.name, "blocks": blocks, "rest": {**size(self.rest), "policy": "layer-weighted mean"}}


def partition(shapes: Mapping[str, Sequence[int]], blocks: int | str) -> Partition:
    """The partition that `--blocks` names: a number of equal blocks, `layerwise` or `module`.

    Args:
        shapes: tensor name -> shape.
    """
    if blocks in ("layerwise", "module"):
        return layerwise(shapes) if blocks == "layerwise" else by_module(shapes)
    try:
        return equal(shapes, int(blocks))
    except ValueError as error:
        if isinstance(blocks, str) and not blocks.isdecimal():
            raise ValueError(f"blocks: expected a number, layerwise or module, found {blocks!r}") from None
        raise error


def whole(names: Iterable[str]) -> Partition:
    """One block: plain averaging, also for models without a single stack of layers (encoder-decoders, vision towers)."""
    names = list(names)
    try:
        return equal(names, 1)
    except ValueError:
        return Partition("one block", (Block("all", 1.0, tuple(names), ()),))


def thirds(names: Iterable[str]) -> Partition:
    """Input, middle and output third of the layers: the paper's default, K = 3."""
    return equal(names, 3)


def layerwise(names: Iterable[str]) -> Partition:
    """One block a layer."""
    names = list(names)
    return equal(names, max(map(len, _stacks(names)[0].values())))


def equal(names: Iterable[str], k: int) -> Partition:
    """`k` blocks of consecutive layers, as equal as can be (26 layers in 9 blocks: eight of 3 and one of 2).

    Of an encoder-decoder, block i holds part i of the encoder's layers and part i of the decoder's. Of a model with eyes or
    ears the layers of the text stack count, and the rest stands outside.

    Raises:
        ValueError: no layers to be found in the names, or fewer than `k`.
    """
    stacks, rest = _stacks(names)
    most = max(map(len, stacks.values()))
    if not 1 <= k <= most:
        raise ValueError(f"blocks: expected between 1 and {most} (the number of layers), found {k}")
    blocks = []
    for i in range(k):
        labels, tensors, inside = [], [], []
        for side, layers in stacks.items():
            found = list(layers)[round(i * len(layers) / k) : round((i + 1) * len(layers) / k)]
            if found:
                label = f"layer {found[0]}" if len(found) == 1 else f"layers {found[0]}-{found[-1]}"
                labels.append(f"{side} {label}".strip())
            inside += found
            tensors += [t for n in found for t in layers[n]]
        numbers = tuple(sorted(set(inside)))
        blocks.append(Block(", ".join(labels), float(len(inside)), tuple(tensors), numbers))
    title = {1: "one block", 3: "thirds", most: "layerwise"}.get(k, f"{k} equal blocks")
    return Partition(title, tuple(blocks), tuple(rest))


def by_module(shapes: Mapping[str, Sequence[int]]) -> Partition:
    """One block a kind of module (`self_attn.q_proj`, `mlp.up_proj`, ...), across all layers, weighted by parameters.

    Of a mixture of experts three blocks are `experts`, `router` and `shared`, whatever the family calls them.
    """
    stacks, rest = _stacks(shapes)
    kinds: dict[str, list[str]] = {}
    numbers = sorted({n for layers in stacks.values() for n in layers})
    for tensors in (tensors for layers in stacks.values() for tensors in layers.values()):
        inside = {t: re.split(r"(?:^|\.)\d+\.", t, maxsplit=1)[1] for t in tensors}
        paths = {t: re.sub(r"\.\d+(?=\.|$)", "", p.rsplit(".", 1)[0]) for t, p in inside.items()}
        mixtures = {m[1] for p in paths.values() if (m := re.match(r"(.*?)\.?\b(?:experts|router)(?:\.|$)", p))}
        for tensor, path in paths.items():
            kind = _kind_of_expert(path, mixtures, len(shapes[tensor])) or path
            kinds.setdefault(kind, []).append(tensor)
    sizes = {kind: float(sum(math.prod(shapes[t]) for t in tensors)) for kind, tensors in kinds.items()}
    blocks = [Block(kind, sizes[kind], tuple(tensors), tuple(numbers)) for kind, tensors in kinds.items()]
    return Partition("by module", tuple(blocks), tuple(rest))


def _kind_of_expert(path: str, mixtures: Collection[str], dimensions: int) -> str | None:
    """`experts`, `router` or `shared` for a module of a mixture (`mlp.gate` beside `mlp.experts`), None for any other."""
    if mixtures and "shared" in path:
        return "shared"
    parts = path.split(".")
    inside = any(path == m or path.startswith(f"{m}.") for m in mixtures if m)
    if not inside and not (
        "" in mixtures and parts[0] in ("experts", "router")
    ):  # Gemma 4's stand beside the attention
        return None
    return "experts" if "router" not in parts and ("experts" in parts or dimensions == 3) else "router"


def _stacks(names: Iterable[str]) -> tuple[dict[str, dict[int, list[str]]], list[str]]:
    """Tensors of each layer of the stacks that are cut, by a word for the stack, and the tensors outside.

    A layer is the first number between dots, as in `model.layers.11.mlp`. One stack is cut, called ""; of an
    encoder-decoder two.
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    names = list(names)
    for name in names:
        if found := re.match(r"(?:(.*?)\.)?(\d+)\.", name):
            stacks.setdefault(found[1] or "", {}).setdefault(int(found[2]), []).append(name)
    if not stacks:
        raise ValueError("partition: no layers found; expected tensor names such as model.layers.0.mlp.up_proj.weight")
    deep = {prefix: layers for prefix, layers in stacks.items() if len(layers) > 1} or stacks
    deep = {prefix: layers for prefix, layers in deep.items() if not NO_TEXT.search(prefix)} or deep
    deep = {prefix: layers for prefix, layers in deep.items() if "language_model" in prefix} or deep
    by_size = sorted(deep, key=lambda prefix: sum(map(len, deep[prefix].values())))
    sides = {
        next((s for s in p.split(".") if s in ("encoder", "decoder")), ""): p for p in by_size
    }  # the largest of each
    chosen = {s: deep[sides[s]] for s in ("encoder", "decoder")} if sides.keys() >= {"encoder", "decoder"} else {}
    chosen = chosen or {"": deep[by_size[-1]]}
    others = [p for p in by_size if all(deep[p] is not layers for layers in chosen.values())]
    if any(3 * sum(map(len, deep[p].values())) > sum(map(len, deep[by_size[-1]].values())) for p in others):
        raise ValueError(
            f"partition: expected one stack of layers, or an encoder and a decoder, found {', '.join(sorted(deep))}; "
            "give a Partition of your own (Python) for models with several"
        )
    chosen = {side: dict(sorted(layers.items())) for side, layers in chosen.items()}
    cut = {t for layers in chosen.values() for tensors in layers.values() for t in tensors}
    return chosen, [n for n in names if n not in cut]
