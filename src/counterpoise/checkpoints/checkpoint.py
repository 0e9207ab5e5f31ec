"""Checkpoints on disk: read-only mappings over memory-mapped safetensors files, and an atomic way to write a new one."""

from __future__ import annotations

import mmap
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from counterpoise.checkpoints.bits import Array
from counterpoise.checkpoints.companions import beside, lost_code, of_the_tokenizer, told
from counterpoise.checkpoints.files import INDEX, CheckpointError, read_json, weight_files, weight_map
from counterpoise.checkpoints.hashing import Watch, begin, changed, in_background
from counterpoise.checkpoints.headers import Entry, read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")  # one head: GPT-NeoX has another name for it on disk
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
OWN_MODULE = ("levit",)  # the one model of transformers with a part that is called `module`
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tokens_embed")


class Checkpoint(Mapping[str, "Tensor"]):
    """A Hugging Face checkpoint folder as a read-only mapping from tensor name to tensor.

    Tensors are views of the memory-mapped files: reading one allocates nothing, and the first one imports torch. Their names
    are those on disk.

    Attributes:
        source: what the user typed.
        folder: the local folder.
        entries: where each tensor lies, in the order of the files.
    """

    def __init__(self, folder: str | Path, *, source: str | None = None) -> None:
        self.folder = Path(folder)
        self.source = source or str(folder)
        self.files = weight_files(self.folder)
        self._hashed = [*self.files, *filter(Path.is_file, [self.folder / "config.json"])]
        self._watch = Watch(self._hashed)
        self.entries: dict[str, Entry] = {}
        stored = [(name, entry) for file in self.files for name, entry in read_header(file).items()]
        own_module = bool(self.config.get("auto_map")) or self.config.get("model_type") in OWN_MODULE
        clean = unwrapped([name for name, _ in stored], own_module=own_module)
        for raw, entry in stored:
            if (name := clean[raw]) in self.entries:
                raise CheckpointError(
                    f"{self.source}: the tensor {name} stands in both {self.entries[name].file.name} and "
                    f"{entry.file.name}{'' if raw == name else f' (there as {raw})'}; expected each once"
                )
            self.entries[name] = entry
        self._check_index(clean)
        self._maps: dict[Path, mmap.mmap] = {}

    def __getitem__(self, name: str) -> Tensor:
        import torch

        entry = self.entries[name]
        if (flat := self._flat(entry)).size == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(flat.data, dtype=entry.dtype).view(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def flat(self, name: str) -> Array:
        """A tensor as a flat numpy array (bfloat16 as uint16, see `bits`); as `[name]` else, and without torch."""
        return self._flat(self.entries[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header alone."""
        return self.entries[name].dtype

    def size(self, name: str) -> int:
        """Bytes of a tensor, from the header alone."""
        return self.entries[name].stop - self.entries[name].start

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json; empty where there is none."""
        path = self.folder / "config.json"
        return read_json(path) if path.is_file() else {}

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer and its chat template lie."""
        return self.folder

    @property
    def revision(self) -> str | None:
        """The commit that a hub id stood for; None for a folder of one's own."""
        return self.folder.name if re.search(r"/snapshots/[0-9a-f]{40}$", self.folder.as_posix()) else None

    @property
    def layout(self) -> dict[str, list[str]]:
        """Tensor names of each weight file, by its path within the folder, in the order they lie in it."""
        return {self._path(file): [n for n, e in self.entries.items() if e.file == file] for file in self.files}

    @cached_property
    def sha256(self) -> dict[str, str]:
        """sha256 of each weight file and of config.json, by path within the folder."""
        return {self._path(file): self._watch.sha256(file) for file in self._hashed}

    def hashed(self, file: Path) -> str:
        """sha256 of a file of this checkpoint, which `refuse_changed` looks at from now on."""
        return self._watch.sha256(file)

    def refuse_changed(self) -> None:
        """Look once more at every file that was read or hashed.

        Raises:
            CheckpointError: one changed since it was opened.
        """
        self._watch.check()

    @property
    def companions(self) -> dict[str, Path]:
        """What goes with the weights, by name inside the folder: config, tokenizer, chat templates, licence and so on."""
        return self.beside[0]

    @property
    def beside(self) -> tuple[dict[str, Path], list[str]]:
        """`companions`, and what lies there and is not copied: code, other weights, what training leaves."""
        kept, left = beside(self.folder, self.files)
        if self.tokenizer_folder != self.folder:
            own, _ = beside(self.tokenizer_folder)
            kept = {n: p for n, p in kept.items() if not of_the_tokenizer(n)}
            kept |= {n: p for n, p in own.items() if of_the_tokenizer(n)}
        return dict(sorted(kept.items())), left

    def store_again(self, name: str, other: str) -> None:
        """Read the tensor `other` under `name` as well: what is tied here and stored apart in the other checkpoint."""
        self.entries[name] = self.entries[other]

    def _path(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def _flat(self, entry: Entry) -> Array:
        if not (count := (entry.stop - entry.start) // entry.held.itemsize):
            return np.empty(0, entry.held)
        mapped = self._mapped(entry.file)
        if mapped.size() < entry.stop:  # to read past the end of a file kills the process
            raise changed(entry.file)
        return np.frombuffer(mapped, entry.held, count, entry.start)

    def _mapped(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            self._watch.check(file)  # the header that was read is this file's
            with file.open("rb") as opened:
                # A private map: torch wants a writable buffer, and nothing written to it would reach the file.
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def _check_index(self, stored: Mapping[str, str]) -> None:
        listed = weight_map(self.folder) if (self.folder / INDEX).is_file() else {}
        if missing := sorted(set(listed) - set(stored)):
            raise CheckpointError(
                f"{self.source}: {INDEX} lists {len(missing)} tensors that its files do not hold, first {missing[0]}; "
                "the copy is incomplete, fetch it again"
            )


def match_name(wanted: str, names: Mapping[str, Any]) -> str | None:
    """The tensor of a checkpoint that a model calls `wanted`: the same name, or the same with one prefix more or less.

    Base models are saved without the prefix that their task models give them (`h.0.attn` and `transformer.h.0.attn`).
    """
    if wanted in names:
        return wanted
    if wanted in HEADS and (head := next((name for name in HEADS if name in names), None)):
        return head
    shorter = wanted.partition(".")[2]
    if shorter in names:
        return shorter
    longer = [name for name in names if name.partition(".")[2] == wanted]
    return longer[0] if len(longer) == 1 else None


def unwrapped(names: Sequence[str], *, own_module: bool = False) -> dict[str, str]:
    """Stored name -> the name without what torch.compile, DDP, FSDP, PEFT and TRL put around a model, wherever it stands.

    Args:
        own_module: the model itself calls a part of it `module`: only a first one is a wrapper's.

    >>> unwrapped(["module.model._orig_mod.layers.0.w", "base_model.model.lm_head.weight"])
    {'module.model._orig_mod.layers.0.w': 'model.layers.0.w', 'base_model.model.lm_head.weight': 'lm_head.weight'}
    """
    within: dict[str, list[str]] = {}  # the modules around each tensor
    for name in names:
        parts = [p for p in name.split(".")[:-1] if p not in WRAPPERS]
        while parts[:1] == ["module"]:
            del parts[0]
        within[name] = parts if own_module else [p for p in parts if p != "module"]
    while based := [parts for parts in within.values() if parts[:1] in (["base_model"], ["pretrained_model"])]:
        # PEFT puts `base_model.model.` before all, others `base_model.` alone before `model.layers` and `lm_head`.
        count = 2 if all(parts[:2] == ["base_model", "model"] for parts in based) else 1
        for parts in based:
            del parts[:count]
    return {name: ".".join([*parts, name.rpartition(".")[2]]) for name, parts in within.items()}


def module_of(name: str) -> str:
    """The last module of a tensor's name.

    >>> module_of("model.embed_tokens.weight")
    'embed_tokens'
    """
    return name.rpartition(".")[0].rpartition(".")[2]


def short(dtype: torch.dtype) -> str:
    """A dtype's name without torch's: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def hash_in_background(checkpoints: Sequence[Checkpoint]) -> Future[list[dict[str, str]]]:
    """Start computing the `sha256` of the checkpoints beside other work; call `.result()` before reading them."""
    begin([checkpoint.files for checkpoint in checkpoints])
    return in_background(lambda: [checkpoint.sha256 for checkpoint in checkpoints])


def copy_companions(donor: Checkpoint, folder: Path) -> list[str]:
    """Copy what goes with the weights of `donor` into `folder`; warnings of what is left."""
    for name, path in donor.companions.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return left_behind(donor)


def left_behind(donor: Checkpoint) -> list[str]:
    """Warnings of what lies beside the weights of `donor` and is not copied, and of code that its configs name."""
    companions, left = donor.beside
    return told(donor.source, left) + lost_code(companions)


def companions_sha256(donor: Checkpoint) -> dict[str, str]:
    """sha256 of what `copy_companions` copies, by name; from now on `refuse_changed` looks at them, too."""
    return {name: donor.hashed(path) for name, path in donor.companions.items()}
