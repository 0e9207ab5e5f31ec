"""Do two checkpoints fit together? Asked before any work, from metadata alone; what needs the bytes is in `Scan`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterpoise.checkpoint import HEADS, Checkpoint, hash_in_background, match_name, open_checkpoint
from counterpoise.files import CheckpointError, read_json

CHUNK = 1 << 20  # elements worked on at once: 2 to 4 MiB, which stay in the processor's cache
WARN_DISTANCE, REFUSE_DISTANCE = 0.5, 1.2
# Settings that make another model, and those that change what the same tensors compute.
SIZES = ("hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads",
         "head_dim", "num_local_experts", "num_experts")  # fmt: skip
FUNCTION = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window", "hidden_act",
            "activation_function", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "num_experts_per_tok")  # fmt: skip
QUANTISED_SUFFIXES = ("qweight", "qzeros", "scales", "weight_scale", "weight_scale_inv", "absmax", "quant_state", "SCB")


@dataclass(frozen=True)
class Pair:
    """Two checkpoints that were checked to fit.

    Attributes:
        names: the tensors to average, in the order of POST's files.
        dropped: tensors left out on the user's word (`--drop`).
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


def preflight(pre: str | Path, post: str | Path, *, drop: Sequence[str] = (), out: str | Path | None = None) -> Pair:
    """Open PRE and POST and check that they can be averaged.

    Args:
        drop: patterns (`v_head.*`) of tensors to leave out when one side alone has them.
        out: where a checkpoint will be written; its disk is checked for space.

    Raises:
        CheckpointError: quantised weights, another architecture, vocabulary or shape, tensors that one side lacks, a
            full disk. The message names the tensor or setting, both values and what to do.
    """
    first = open_checkpoint(pre)
    second = open_checkpoint(post, base=first)
    for checkpoint in (first, second):
        _refuse_quantised(checkpoint)
    warnings = [*_same_architecture(first, second), *_same_vocabulary(first, second)]
    names, dropped, elsewhere = _same_names(first, second, drop)
    for name in names:
        _same_shape(first, second, name, elsewhere.get(name, name))
    if lighter := [n for n in names if n in first and first.dtype(n) != second.dtype(n)]:
        n = lighter[0]
        warnings.append(
            f"PRE is stored in {_short(first.dtype(n))}, POST in {_short(second.dtype(n))}; they are averaged in "
            "the wider of the two and written in POST's"
        )
    if out is not None:
        _room_for(second, names, Path(out))
    return Pair(first, second, tuple(names), tuple(dropped), tuple(warnings), elsewhere)


@dataclass
class Scan:
    """Sums over a pair's tensors, taken chunk by chunk: how far apart the two are, and the first NaN or Inf.

    Attributes:
        update, size: per tensor, the sum of squares of (post - pre) and of pre, float64.
        changed, elements: per tensor, how many elements differ at all, of how many (`count_changed` only).
    """

    pair: Pair
    count_changed: bool = False
    update: dict[str, float] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    _buffers: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def add(self, name: str, pre: Tensor, post: Tensor) -> None:
        """Count a chunk of `name`; flat tensors of equal length, at most CHUNK.

        Raises:
            CheckpointError: NaN or Inf in either.
        """
        if not pre.is_floating_point():
            return
        work = torch.promote_types(torch.promote_types(pre.dtype, post.dtype), torch.float32)
        wide, gap = (buffer[: pre.numel()] for buffer in self._buffers_of(work))
        gap.copy_(post).sub_(wide.copy_(pre))
        size, update = float(torch.dot(wide, wide)), float(torch.dot(gap, gap))
        if not math.isfinite(size + update):  # NaN or Inf, or finite values whose squares overflow
            self._refuse_non_finite(name, pre, post)
            size, update = float(wide.double().square().sum()), float(gap.double().square().sum())
        self.size[name] = self.size.get(name, 0.0) + size
        self.update[name] = self.update.get(name, 0.0) + update
        if self.count_changed:
            self.changed[name] = self.changed.get(name, 0) + int((gap != 0).sum())
            self.elements[name] = self.elements.get(name, 0) + gap.numel()

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

    def _buffers_of(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two chunks to work in, allocated once: fresh ones cost ten times the arithmetic in page faults."""
        if dtype not in self._buffers:
            self._buffers[dtype] = (torch.empty(CHUNK, dtype=dtype), torch.empty(CHUNK, dtype=dtype))
        return self._buffers[dtype]

    def _refuse_non_finite(self, name: str, pre: Tensor, post: Tensor) -> None:
        for label, values, source in (("PRE", pre, self.pair.pre.source), ("POST", post, self.pair.post.source)):
            if bad := int((~values.isfinite()).sum()):
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
        pre, post = (t.flatten() for t in pair.tensors(name))
        for start in range(0, pre.numel(), CHUNK):
            result.add(name, pre[start : start + CHUNK], post[start : start + CHUNK])
        if progress is not None:
            progress(done, len(pair.names))
    hashes.result()
    return result, result.verdict(allow_unrelated=allow_unrelated)


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    method = checkpoint.config.get("quantization_config") or {}
    tensor = next((n for n in checkpoint if n.rpartition(".")[2] in QUANTISED_SUFFIXES), None)
    tensor = tensor or next((n for n, e in checkpoint.entries.items() if "float8" in str(e.dtype)), None)
    if method or tensor:
        found = f"quantization_config {method.get('quant_method', '')!r}" if method else f"the tensor {tensor}"
        raise CheckpointError(
            f"{checkpoint.source}: expected plain weights, found quantised ones ({found}); "
            "dequantise it, or use the checkpoint that it was made from"
        )


def _same_architecture(pre: Checkpoint, post: Checkpoint) -> list[str]:
    kinds = [c.config.get("model_type") for c in (pre, post)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"PRE is a {kinds[0]} model, POST a {kinds[1]} one; expected one model before and after training"
        )
    tied = [c.config.get("tie_word_embeddings") for c in (pre, post)]
    if None not in tied and tied[0] != tied[1]:
        raise CheckpointError(
            f"tie_word_embeddings is {tied[0]} in PRE and {tied[1]} in POST: the heads cannot be averaged; "
            "save both with tied or both with untied embeddings"
        )
    settings = [c.config | (c.config.get("text_config") or {}) for c in (pre, post)]
    differing = [k for k in settings[0] if k in settings[1] and settings[0][k] != settings[1][k]]
    if wrong := [k for k in differing if k in SIZES]:
        k = wrong[0]
        raise CheckpointError(
            f"{k} is {settings[0][k]} in PRE and {settings[1][k]} in POST; expected one model before and after training"
        )
    return [
        f"{k} is {settings[0][k]} in PRE and {settings[1][k]} in POST; the donor's is kept"
        for k in differing
        if k in FUNCTION
    ]


def _same_vocabulary(pre: Checkpoint, post: Checkpoint) -> list[str]:
    sizes = [c.config.get("vocab_size") for c in (pre, post)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"PRE has a vocabulary of {sizes[0]}, POST of {sizes[1]}; resize one to the other's tokens "
            "(resize_token_embeddings) so that each row means the same token"
        )
    words = [_vocabulary(c) for c in (pre, post)]
    if not all(words) or words[0] == words[1]:
        return []
    differing = sorted(k for k in words[0].keys() | words[1].keys() if words[0].get(k) != words[1].get(k))
    message = f"the tokenizers give {len(differing)} tokens another id, first {differing[0]!r}"
    if len(differing) > max(64, len(words[0]) // 100):
        raise CheckpointError(f"{message}: expected one vocabulary; rows of the embedding would mix different tokens")
    return [f"{message}; the donor's tokenizer is kept"]


def _vocabulary(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        return {}
    content = read_json(path)
    vocab = content.get("model", {}).get("vocab", {})
    table = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return table | {token["content"]: token["id"] for token in content.get("added_tokens", [])}


def _same_names(pre: Checkpoint, post: Checkpoint, drop: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """The tensors that both have, those dropped, and where PRE has a tensor under another name."""

    def spare(names: list[str]) -> list[str]:
        return [n for n in names if not any(fnmatchcase(n, pattern) for pattern in drop)]

    elsewhere = _elsewhere(pre, post)
    common = [n for n in post if n in pre or n in elsewhere]
    used = {elsewhere.get(n, n) for n in common}
    only_post = [n for n in post if n not in pre and n not in elsewhere]
    only_pre = [n for n in pre if n not in used and not _tied_source(post, n)]
    for here, there, names in (("POST", "PRE", spare(only_post)), ("PRE", "POST", spare(only_pre))):
        if names:
            pattern = _pattern(names[0], [*common, *used])
            raise CheckpointError(
                f"{here} has {len(names)} tensors that {there} lacks, first {names[0]}. If it is a head added for training "
                f"(a PPO value head) or a buffer of an older version, leave it out with --drop '{pattern}'; "
                "otherwise they are not one model's before and after"
            )
    dropped = [*only_post, *only_pre]
    unused = [p for p in drop if not any(fnmatchcase(n, p) for n in dropped)]
    if unused:
        raise CheckpointError(f"--drop {unused[0]!r} matches no tensor that one side alone has; it would do nothing")
    return common, dropped, elsewhere


def _elsewhere(pre: Checkpoint, post: Checkpoint) -> dict[str, str]:
    """POST's name -> PRE's, for tensors that PRE has under another name; no tensor of PRE serves twice but a tied one."""
    found: dict[str, str] = {}
    for name in post:
        if name in pre:
            continue
        if source := _tied_source(pre, name):
            found[name] = source
        elif (other := match_name(name, pre)) and other not in post and other not in found.values():
            found[name] = other
    return found


def _pattern(name: str, common: Sequence[str]) -> str:
    """What to give to --drop: a part of the model of its own (`v_head.*`), or a tensor of every layer (`*.attn.bias`)."""
    top, _, rest = name.partition(".")
    if rest and not any(n.startswith(top + ".") for n in common):
        return top + ".*"
    return "*." + ".".join(name.split(".")[-2:]) if rest else name


def _same_shape(pre: Checkpoint, post: Checkpoint, name: str, name_in_pre: str) -> None:
    shapes = [pre.shape(name_in_pre), post.shape(name)]
    if shapes[0] != shapes[1]:
        advice = (
            "another size of model, or a resized vocabulary"
            if shapes[0][1:] == shapes[1][1:]
            else "another size of model"
        )
        raise CheckpointError(
            f"{name} has the shape {shapes[0]} in PRE and {shapes[1]} in POST ({advice}); expected one model"
        )


def _tied_source(checkpoint: Checkpoint, name: str) -> str | None:
    """The embedding that an absent output head is tied to, for checkpoints that say so in their config."""
    if name in checkpoint or name not in HEADS or not checkpoint.config.get("tie_word_embeddings", True):
        return None
    sources = [n for n in checkpoint if n.rpartition(".")[0].rpartition(".")[2] in ("embed_tokens", "wte", "embed_in")]
    return sources[0] if len(sources) == 1 else None


def _room_for(post: Checkpoint, names: Sequence[str], out: Path) -> None:
    needed = sum(post.dtype(n).itemsize * math.prod(post.shape(n)) for n in names)
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + (16 << 20):
        raise CheckpointError(f"{out}: {needed / 1e9:.2f} GB will be written, {free / 1e9:.2f} GB are free; make room")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
