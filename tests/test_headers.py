"""What the safetensors library refuses is refused, and what it takes is read as it reads it."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.headers import DTYPES

GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "I64", "shape": [0, 2], "data_offsets": [32, 32]},
}
VALUES = [None, -1, 0, 1, 2, 24, 2.0, 1e9, 1 << 63, 1 << 64, 10**400, "F32", "F16", "I8", "Q4", "", [], [2], [2, 3],
          [0, 24], [24, 0], [-8, 16], [0, 24, 24], [1 << 62, 4, 0], {}, {"x": 1}, {"x": "y"}, True, float("inf")]  # fmt: skip


def mutated(random: random.Random) -> bytes:
    """The bytes of a file that differs from a good one in one to three places."""
    header: Any = json.loads(json.dumps(GOOD))
    body = bytes(range(32))
    for _ in range(random.randint(0, 3)):
        key = random.choice([*header, "new"])
        entry = header.get(key)
        match random.randrange(5):
            case 0:
                header[key] = random.choice([*VALUES, header["a"]] if "a" in header else VALUES)
            case 1:
                header.pop(key, None)
            case 2 if isinstance(entry, dict):
                entry[random.choice(["dtype", "shape", "data_offsets", "more"])] = random.choice(VALUES)
            case 3 if isinstance(entry, dict):
                entry.pop(random.choice(["dtype", "shape", "data_offsets"]), None)
            case 4:
                body = random.choice([body + b"\0", body[:-1], body[:8], b"", body + body])
    text = bytearray(json.dumps(header).encode())
    match random.randrange(8):
        case 0:
            text[random.randrange(len(text))] = random.randrange(256)
        case 1:
            text = bytearray(random.choice([b" ", b"\n", b"\xef\xbb\xbf", b"[", b"x"])) + text
        case 2:
            text += random.choice([b"   ", b"}", b"\0", b"{}"])
        case 3:
            text[-1:] = random.choice(
                [b',"a":' + json.dumps(GOOD["a"]).encode() + b"}", b',"\\ud800":1}', b',"__metadata__":null}']
            )
    length = random.choice([len(text)] * 12 + [0, 7, len(text) - 1, len(text) + 1, 100_000_001, (1 << 64) - 1])
    return (struct.pack("<Q", length) + text + body)[: random.choice([1 << 20] * 12 + [0, 3, 8, 40])]


def by_the_library(file: Path) -> dict[str, Any] | None:
    try:
        with safe_open(file, framework="pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.offset_keys()}
            return {n: opened.get_tensor(n) if kind in DTYPES else None for n, kind in kinds.items()}
    except SafetensorError:
        return None


def test_files_with_damaged_headers_are_refused_or_read_as_the_library_does(tmp_path: Path) -> None:
    chance, file = random.Random(13), tmp_path / "model.safetensors"
    counts = {"read": 0, "refused": 0}
    for _ in range(1500):
        content = mutated(chance)
        file.write_bytes(content)
        wanted = by_the_library(file)
        if wanted is None or None in wanted.values():
            with pytest.raises(CheckpointError, match=r"model\.safetensors: (not a whole|the tensor .* has the dtype)"):
                Checkpoint(tmp_path)
            counts["refused"] += 1
            continue
        found = Checkpoint(tmp_path)
        assert found.keys() == wanted.keys(), content
        for name, tensor in wanted.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
        counts["read"] += 1
    assert min(counts.values()) > 100, counts


def test_a_file_that_shrinks_ends_with_a_message_and_not_with_a_signal(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 16], "data_offsets": [0, 1 << 18]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(1 << 18))
    found = Checkpoint(tmp_path)
    assert found["a"].sum() == 0
    os.truncate(file, 4096)
    with pytest.raises(
        CheckpointError, match="found it changed while it was read; run again once nothing writes to it"
    ):
        found["a"]
