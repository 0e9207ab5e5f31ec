"""A PEFT LoRA adapter read as the checkpoint it stands for: base + scaling * B A, in float32, rounded once."""

from __future__ import annotations

import math
import re
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterpoise.checkpoints.bits import PIECE, Array
from counterpoise.checkpoints.checkpoint import EMBEDDINGS, HEADS, Checkpoint, match_name, module_of
from counterpoise.checkpoints.files import CheckpointError, read_json
from counterpoise.checkpoints.hashing import Watch
from counterpoise.checkpoints.headers import read_header, refuse_unsaved
from counterpoise.checkpoints.rounding import as_array, key_of, narrow, wide_dtype

ADAPTER = "adapter_model.safetensors"
PEFTS_OWN = 8  # its rank and alpha where none are given
PATIENCE = 1.0  # seconds
LONGEST_PATTERN, MOST_REPEATS = 2000, 10_000
LOW_RANK = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?$")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")  # their layers that hold weights as (in, out); a head is (out, in)
REFUSED_SETTINGS = ("use_dora", "target_parameters", "layer_replication", "trainable_token_indices", "lora_bias", "use_qalora",
                    "alora_invocation_tokens", "arrow_config")  # fmt: skip


class LoraCheckpoint(Checkpoint):
    """`base` with a LoRA adapter applied, tensor by tensor, as it is read; nothing is written.

    rsLoRA, rank and scale patterns, Conv1D layers, adapted embeddings, trained biases and `modules_to_save` are
    supported. DoRA, PiSSA-like initialisations (which change the base), resized vocabularies, and an embedding trained
    without the head that is tied to it are refused by name. The tokenizer is the adapter's where it has one.
    """

    def __init__(self, base: Checkpoint, folder: Path, *, source: str) -> None:
        self.base, self.adapter_folder, self.source = base, folder, source
        self.folder, self.files, self.entries = base.folder, base.files, base.entries
        if not (folder / ADAPTER).is_file():
            raise CheckpointError(
                f"{source}: expected {ADAPTER} beside adapter_config.json, found none; save the adapter "
                "with safe_serialization (PEFT's default)"
            )
        self._watch = Watch([folder / ADAPTER, folder / "adapter_config.json"])
        self.settings: dict[str, Any] = read_json(folder / "adapter_config.json")
        self._refuse_wrong_types()
        self._refuse_unsupported()
        self._adapter = _Adapter(folder / ADAPTER, self._watch)
        refuse_unsaved(source, {key: entry.shape for key, entry in self._adapter.entries.items()})
        self._pairs: dict[str, dict[str, str]] = {}
        self._replaced: dict[str, str] = {}
        for key in self._adapter.entries:
            self._place(key)
        for name, pair in self._pairs.items():
            self._check_pair(name, pair)
        self._scalings = self._matched_scalings()

    def __getitem__(self, name: str) -> Tensor:
        weight = self.base[name]
        if name in self._replaced:  # PEFT saves an adapted embedding whole beside its low-rank update
            weight = self._adapter[self._replaced[name]].to(weight.dtype)
        if name not in self._pairs:
            return weight
        pair = self._pairs[name]
        low, high = self._adapter[pair["A"]], self._adapter[pair["B"]]
        update = product(high.float(), low.float())
        if update.shape != weight.shape or (len(set(weight.shape)) == 1 and self._transposed(name, pair["A"])):
            update = update.T  # what is not square says by its shape how it is held
        work = wide_dtype(weight)
        adapted = weight.to(work) + self._scalings[name] * update.to(work)
        return narrow(adapted, weight.dtype, key=key_of(weight, adapted))

    def flat(self, name: str) -> Array:
        """The tensor as a flat numpy array: see `Checkpoint.flat`."""
        return as_array(self[name]) if name in self._pairs or name in self._replaced else self.base.flat(name)

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's folder where a tokenizer was saved with it, else the base's."""
        own = (self.adapter_folder / "tokenizer_config.json").is_file()
        return self.adapter_folder if own else self.base.tokenizer_folder

    @cached_property
    def sha256(self) -> dict[str, str]:
        """sha256 of the adapter's two files."""
        return {name: self._watch.sha256(self.adapter_folder / name) for name in (ADAPTER, "adapter_config.json")}

    def refuse_changed(self) -> None:
        """Look once more at the files of the adapter and of its base."""
        self.base.refuse_changed()
        super().refuse_changed()

    def _transposed(self, name: str, key: str) -> bool:
        """Is a square weight held as (in, out)? PEFT's flag is that of the layer it met last, and no word on a Linear."""
        if ".lora_embedding_" in key:
            return True
        if self.base.config.get("model_type") in CONV1D_MODELS:
            return module_of(name) in CONV1D
        if not self.settings.get("fan_in_fan_out"):
            return False
        from transformers import CONFIG_MAPPING

        return self.base.config.get("model_type") not in CONFIG_MAPPING

    def _matched_scalings(self) -> dict[str, float]:
        """Base tensor -> alpha / rank, or alpha / sqrt(rank), with the first pattern that matches, as PEFT takes it.

        The patterns are others' and may never end: all of them together have a few seconds.
        """
        place, ends, found = self.adapter_folder / "adapter_config.json", time.monotonic() + PATIENCE, {}
        given = (self.settings.get("alpha_pattern") or {}).items()
        patterns = [(text, _compiled(text, place), float(alpha)) for text, alpha in given]
        for name, pair in self._pairs.items():
            module = LOW_RANK.match(pair["A"])[1].removeprefix("base_model.model.")  # type: ignore[index]
            rank = self._adapter.shape(pair["A"])[0]
            alpha = float(self.settings.get("lora_alpha", PEFTS_OWN))
            for text, pattern, value in patterns:
                try:
                    hit = pattern.match(module, timeout=max(1e-3, ends - time.monotonic()))
                except TimeoutError:
                    raise CheckpointError(
                        f"{place}: expected an alpha_pattern that is matched at once, found {text!r:.80} still at it after "
                        f"{PATIENCE:g} s; write it without nested repeats"
                    ) from None
                if hit:
                    alpha = value
                    break
            found[name] = alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
        return found

    def _refuse_wrong_types(self) -> None:
        for key, plain in (("lora_alpha", True), ("r", True), ("alpha_pattern", False), ("rank_pattern", False)):
            found = self.settings.get(key, PEFTS_OWN) if plain else self.settings.get(key) or {}
            if not (_number(found) if plain else isinstance(found, dict) and all(map(_number, found.values()))):
                raise CheckpointError(
                    f"{self.adapter_folder / 'adapter_config.json'}: expected {key} to be "
                    f"{'a number' if plain else 'an object of numbers'}, found {found!r:.80}; save the adapter again with PEFT"
                )

    def _refuse_unsupported(self) -> None:
        kind = self.settings.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"{self.source}: expected a LoRA adapter, found peft_type {kind!r}; merge it into its base "
                "with PEFT and give the merged checkpoint"
            )
        start = str(self.settings.get("init_lora_weights", True)).lower()
        named = [n for n in REFUSED_SETTINGS if self.settings.get(n)]
        if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            named.append(f"init_lora_weights={start}")
        if named:
            raise CheckpointError(
                f"{self.source}: {', '.join(named)} is not supported here (the update is not scaling * B A "
                "on the base); merge the adapter with PEFT and give the merged checkpoint"
            )

    def _place(self, key: str) -> None:
        """Find the base tensor that an adapter tensor belongs to."""
        plain = key.removeprefix("base_model.model.")
        if low_rank := LOW_RANK.match(plain):
            wanted, slot = f"{low_rank[1]}.weight", low_rank[2]
        else:
            wanted, slot = re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", plain), ""
        name = match_name(wanted, self.base)
        if name is None:
            trained = {part for other in self._adapter.entries for part in other.split(".")}
            if wanted in HEADS and self.settings.get("ensure_weight_tying") and trained & set(EMBEDDINGS):
                return  # the same numbers once more
            raise CheckpointError(
                f"{self.source}: the adapter holds {key}, but PRE has no tensor {wanted} (a tied head trained "
                "on its own, a new head, or another base model); merge it with PEFT first"
            )
        if module_of(name) in EMBEDDINGS and self._head_follows():
            raise CheckpointError(
                f"{self.source}: the adapter trains {name}, to which PRE's head is tied, and not the head (PEFT leaves it "
                "as it was), so no tied checkpoint stands for it; untie the head of PRE, or train with ensure_weight_tying"
            )
        if slot:
            self._pairs.setdefault(name, {})[slot] = key
        else:
            self._replaced[name] = key
            if (found := self._adapter.shape(key)) != self.base.shape(name):
                raise CheckpointError(
                    f"{self.source}: {key} has the shape {found}, PRE's {name} {self.base.shape(name)}: a "
                    "resized vocabulary; give both checkpoints the same tokens first"
                )

    def _head_follows(self) -> bool:
        """Would a change of the embedding change the head, against PEFT's way?"""
        config = self.base.config
        return (
            not any(head in self.base for head in HEADS)
            and bool(config.get("tie_word_embeddings", True))
            and "Classification" not in str(config.get("architectures"))
            and not self.settings.get("ensure_weight_tying")
        )

    def _check_pair(self, name: str, pair: dict[str, str]) -> None:
        if set(pair) != {"A", "B"}:
            found = next(iter(pair))
            raise CheckpointError(f"{self.source}: of {name} only lora_{found} is there; the adapter is incomplete")
        low, high = (self._adapter.shape(pair[side]) for side in "AB")
        if (
            len(low) != 2
            or len(high) != 2
            or not low[0]
            or low[0] != high[1]
            or self.base.shape(name) not in ((high[0], low[1]), (low[1], high[0]))
        ):
            raise CheckpointError(
                f"{self.source}: B {high} times A {low} does not fit PRE's {name} {self.base.shape(name)}: "
                "another base model or a resized vocabulary"
            )


def product(high: Tensor, low: Tensor) -> Tensor:
    """B A, the rank summed in order: a library's matrix product sums in an order that hangs on the processor.

    >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
    tensor([[11.]])
    """
    result = torch.zeros(high.shape[0], low.shape[1], dtype=high.dtype)
    rows = max(1, PIECE // low.shape[1])  # worked on at once: they stay in the cache
    buffer = torch.empty(rows, low.shape[1], dtype=high.dtype)
    for begin in range(0, len(result), rows):
        part = result[begin : begin + rows]
        for column, row in zip(high[begin : begin + rows].T, low, strict=True):
            part.add_(torch.mul(column[:, None], row, out=buffer[: len(part)]))
    return result


class _Adapter(Checkpoint):
    """The adapter's own file as a mapping."""

    def __init__(self, file: Path, watch: Watch) -> None:
        self.folder, self.source, self.files = file.parent, str(file), [file]
        self.entries = read_header(file)
        self._watch, self._maps = watch, {}


def _compiled(text: str, place: Path) -> Any:
    """A pattern of PEFT's, for the one engine that can be told when to stop; it unrolls counts, so these are bounded."""
    import regex  # transformers needs it, too

    try:
        counts = [max(1, int(n)) for n in re.findall(r"(?<=[{,])\d{1,9}", text[: LONGEST_PATTERN + 1])]
        if len(text) > LONGEST_PATTERN or math.prod(counts) > MOST_REPEATS:
            raise re.error("too long, or too many repeats")
        re.compile(whole := rf"(.*\.)?({text})$")
        return regex.compile(whole)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        raise CheckpointError(
            f"{place}: expected names or short regular expressions in alpha_pattern, found {text!r:.80} ({error})"
        ) from None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
