"""Do two checkpoints fit together? Asked before any work, from metadata alone; what needs the bytes is in `Scan`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from counterpoise.checkpoints import bits
from counterpoise.checkpoints.bits import Array
from counterpoise.checkpoints.checkpoint import Checkpoint, hash_in_background
from counterpoise.checkpoints.configs import same_architecture
from counterpoise.checkpoints.files import CheckpointError, free_bytes, look
from counterpoise.checkpoints.headers import DTYPES, refuse_unsaved
from counterpoise.checkpoints.matching import is_computed, same_names, same_shape, same_vocabulary
from counterpoise.checkpoints.opening import open_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 1 << 20  # elements worked on at once: 2 to 4 MiB, which stay in the processor's cache
WARN_DISTANCE, REFUSE_DISTANCE = 0.5, 1.2
QUANTISED_SUFFIXES = ("qweight", "qzeros", "scales", "weight_scale", "weight_scale_inv", "absmax", "quant_state", "quant_map",
                      "SCB", "weight_packed")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two checkpoints that were checked to fit.

    Attributes:
        names: the tensors to average, in the order of POST's files.
        dropped: tensors left out: on the user's word (`--drop`), and what a model computes when it is built.
        warnings: what a user should know, in sentences.
        elsewhere: POST's name -> PRE's, where PRE has the tensor under another one: a head tied to its embedding, or all
            of them saved with a prefix more or less (`h.0.ln_1` and `transformer.h.0.ln_1`).
    """

    pre: Checkpoint
    post: Checkpoint
    names: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def tensors(self, name: str) -> tuple[Tensor, Tensor]:
        """PRE's and POST's tensor of a name."""
        return self.pre[self.elsewhere.get(name, name)], self.post[name]

    def flats(self, name: str) -> tuple[Array, Array]:
        """The same as flat numpy arrays (bfloat16 as uint16, see `bits`): without torch, but for an adapter."""
        return self.pre.flat(self.elsewhere.get(name, name)), self.post.flat(name)

    def refuse_changed(self) -> None:
        """Raise a CheckpointError when a file of either changed since it was opened; asked after the last reading."""
        self.pre.refuse_changed()
        self.post.refuse_changed()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {n: self.post.shape(n) for n in self.names}

    def giver(self, donor: str) -> Checkpoint:
        """The side that `donor`, "pre" or "post", names: whose config, tokenizer and chat template count."""
        return self.pre if donor == "pre" else self.post


def stretches(*tensors: Any, size: int = CHUNK) -> Iterator[tuple[int, list[Any]]]:
    """Tensors or arrays of one shape, flattened, `size` elements at a time: where a stretch begins, and each one's."""
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, len(flat[0]), size):
        yield start, [t[start : start + size] for t in flat]


def preflight(pre: str | Path, post: str | Path, *, drop: Sequence[str] = (), out: str | Path | None = None) -> Pair:
    """Open PRE and POST and check that they can be averaged.

    Args:
        drop: patterns (`v_head.*`) of tensors to leave out when one side alone has them.
        out: where a checkpoint will be written; its disk is checked for space.

    Raises:
        CheckpointError: quantised weights, another architecture, vocabulary or shape, tensors that one side lacks, a
            full disk. The message names the tensor or setting, both values and what to do.
    """
    look(pre, post)
    first = open_checkpoint(pre)
    second = open_checkpoint(post, base=first)
    for checkpoint in (first, second):
        _refuse_quantised(checkpoint)
        refuse_unsaved(checkpoint.source, {n: checkpoint.shape(n) for n in checkpoint})
    warnings = [*same_architecture(first, second), *same_vocabulary(first, second)]
    names, dropped, elsewhere = same_names(first, second, drop)
    for name in names:
        same_shape(first, second, name, elsewhere.get(name, name))
    if lighter := [n for n in names if n in first and first.entries[n].kind != second.entries[n].kind]:
        n = lighter[0]
        warnings.append(
            f"PRE is stored in {DTYPES[first.entries[n].kind]}, POST in {DTYPES[second.entries[n].kind]}; an average is "
            "computed in the wider of the two and written in POST's"
        )
    if out is not None:
        beside = max(sum(p.stat().st_size for p in c.companions.values()) for c in (first, second))
        needed, free = sum(map(second.size, names)) + beside, free_bytes(Path(out))
        if free < needed * 1.02 + (16 << 20):
            raise CheckpointError(
                f"{out}: {needed / 1e9:.2f} GB will be written, {free / 1e9:.2f} GB are free; make room"
            )
    return Pair(first, second, tuple(names), tuple(dropped), tuple(warnings), elsewhere)


class Buffers(dict["tuple[torch.dtype, int]", "Tensor"]):
    """Numbered chunks to work in, allocated once: fresh ones cost ten times the arithmetic in page faults."""

    def __init__(self, size: int = CHUNK, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.size, self.device = size, device

    def __missing__(self, key: tuple[torch.dtype, int]) -> Tensor:
        import torch

        return self.setdefault(key, torch.empty(self.size, dtype=key[0], device=self.device))


@dataclass
class Scan:
    """Sums over a pair's tensors, taken chunk by chunk: how far apart the two are, and the first NaN or Inf.

    Attributes:
        update, size: per tensor, the sum of squares of (post - pre) and of pre, float64.
        changed: per tensor, how many elements differ at all (`count_changed` only).
    """

    pair: Pair
    count_changed: bool = False
    update: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    size: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    changed: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, name: str, pre: Array, post: Array) -> None:
        """Count a stretch of `name`; flat arrays of equal length.

        Raises:
            CheckpointError: NaN or Inf in either.
        """
        if not bits.floating(pre):
            return
        wide, other = bits.wide(pre, post), bits.wide(pre, post)
        for begin in range(0, len(pre), len(wide)):
            a, b = pre[begin : begin + len(wide)], post[begin : begin + len(wide)]
            first, gap = bits.widen(a, wide), bits.widen(b, other)
            np.subtract(first, gap, out=gap)
            self.count(name, a, b, first, gap)

    def count(self, name: str, pre: Array, post: Array, first: Array, gap: Array) -> None:
        """`add` for a piece whose wide numbers and difference are there already, as `mix` shows them."""
        size, update = float(np.dot(first, first)), float(np.dot(gap, gap))
        if not math.isfinite(size + update):  # NaN or Inf, or finite values whose squares overflow
            self._refuse_non_finite(name, pre, post)
            size, update = (float(np.square(values, dtype=np.float64).sum()) for values in (first, gap))
        self.size[name] += size
        self.update[name] += update
        if self.count_changed:
            self.changed[name] += int(np.count_nonzero(gap))

    @property
    def distance(self) -> float:
        """|post - pre| / |pre| over all tensors."""
        return math.sqrt(math.fsum(self.update.values()) / (math.fsum(self.size.values()) or 1.0))

    def verdict(self, *, allow_unrelated: bool = False) -> list[str]:
        """Warnings on how far apart the two are.

        Raises:
            CheckpointError: further than two unrelated models would need to be, unless `allow_unrelated`.
        """
        d = self.distance
        if d > REFUSE_DISTANCE and not allow_unrelated:
            raise CheckpointError(
                f"PRE and POST look unrelated: |post - pre| is {d:.2f} times |pre|, expected well below {WARN_DISTANCE} for a "
                "fine-tuned model (unrelated ones have about 1.4). Averaging them gives noise. If you know better: "
                "--allow-unrelated"
            )
        if d > WARN_DISTANCE:
            return [
                f"PRE and POST are far apart: |post - pre| is {d:.2f} times |pre|; are they one model's before and after?"
            ]
        if d == 0:
            return ["PRE and POST hold the same numbers: there is nothing to average"]
        return []

    def _refuse_non_finite(self, name: str, pre: Array, post: Array) -> None:
        for label, values, source in (("PRE", pre, self.pair.pre.source), ("POST", post, self.pair.post.source)):
            if bad := bits.not_finite(values):
                raise CheckpointError(
                    f"{label} ({source}): expected finite numbers, found NaN or Inf in {name} ({bad} in one "
                    "stretch); the checkpoint is damaged or training diverged, take an earlier one"
                )


def scan(
    pair: Pair,
    *,
    allow_unrelated: bool = False,
    count_changed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Scan, list[str]]:
    """Read both checkpoints once: hash them, refuse NaN and Inf, measure their distance. Nothing is written."""
    hashes = hash_in_background([pair.pre, pair.post])
    result = Scan(pair, count_changed)
    for done, name in enumerate(pair.names, start=1):
        with np.errstate(all="ignore"):  # what is not finite is looked for
            result.add(name, *pair.flats(name))
        if progress is not None:
            progress(done, len(pair.names))
    hashes.result()
    pair.refuse_changed()
    return result, result.verdict(allow_unrelated=allow_unrelated)


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    settings = checkpoint.config.get("quantization_config")
    method = (settings.get("quant_method") or "of no method") if isinstance(settings, dict) and settings else None
    tensor = next((n for n, e in checkpoint.entries.items() if _quantised(n, e.kind, e.shape)), None)
    if tensor:
        found = f"quantization_config {method!r}, the tensor {tensor}" if method else f"the tensor {tensor}"
        raise CheckpointError(
            f"{checkpoint.source}: expected plain weights, found quantised ones ({found}); "
            "dequantise it, or use the checkpoint that it was made from"
        )
    if method:
        raise CheckpointError(
            f"{checkpoint.source}: expected plain weights, found a quantization_config {method!r} in config.json beside tensors "
            "of which none is quantised (left over from a merge?); delete that key from config.json"
        )


def _quantised(name: str, kind: str, shape: tuple[int, ...]) -> bool:
    """By its name or kind; masks that older versions stored are small integers, too."""
    last = name.rpartition(".")[2]
    if last in QUANTISED_SUFFIXES or last.startswith("bitsandbytes__") or kind.startswith("F8"):
        return True
    return last.startswith("weight") and kind in ("U8", "I8") and not is_computed(name, shape)
