"""The header of a safetensors file: where each tensor lies. What the safetensors library refuses is refused here, by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from counterpoise.checkpoints.bits import BFLOAT16
from counterpoise.checkpoints.files import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""What a header says, and what torch calls it."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, byte range, kind (a key of DTYPES) and shape."""

    file: Path
    start: int
    stop: int
    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Its torch dtype."""
        import torch

        found: torch.dtype = getattr(torch, DTYPES[self.kind])
        return found

    @property
    def held(self) -> np.dtype[Any]:
        """Its dtype as a numpy array, see `bits`."""
        return array_dtype(self.kind)


def array_dtype(kind: str) -> np.dtype[Any]:
    """What numpy holds tensors of a kind as: bfloat16 as `bits` has it, float8, with which nothing is computed, as bytes."""
    return BFLOAT16 if kind == "BF16" else np.dtype("uint8" if kind.startswith("F8") else DTYPES[kind])


def read_header(file: Path) -> dict[str, Entry]:
    """Where each tensor of a safetensors file lies, in the order of their bytes.

    Raises:
        CheckpointError: not a whole safetensors file, or a dtype that no plain checkpoint has.
    """
    size = file.stat().st_size
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        said = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{file}: not a whole safetensors file, but {size} bytes that are cut short or damaged ({said}); fetch it again"
        ) from None
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{file}: the tensor {name} has the dtype {dtype}, which is a quantised or unknown "
                f"one; expected one of {', '.join(DTYPES)}"
            )
    # The library has seen to it that tensors lie one after the other and fill the file to its last byte.
    sizes = {name: math.prod(shape) * array_dtype(dtype).itemsize for name, (dtype, shape) in found.items()}
    start = size - sum(sizes.values())
    entries = {}
    for name, (dtype, shape) in found.items():
        entries[name] = Entry(file, start, start + sizes[name], dtype, shape)
        start += sizes[name]
    return entries


def refuse_unsaved(source: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse what DeepSpeed leaves where its stage 3 was saved without being gathered: tensors of the shape [0]."""
    if empty := [name for name, shape in shapes.items() if tuple(shape) == (0,)]:
        raise CheckpointError(
            f"{source}: expected weights, found {len(empty)} empty tensors of the shape [0], first {empty[0]}: DeepSpeed ZeRO-3 "
            "saved its placeholders. Gather the weights with its zero_to_fp32.py, or train with "
            "stage3_gather_16bit_weights_on_model_save: true"
        )
