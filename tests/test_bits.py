"""`mix` gives the same bits for arrays, for tensors, and on a GPU where there is one; what `average` does not import."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from counterpoise.averaging.average import average
from counterpoise.averaging.mix import mix
from counterpoise.checkpoints import bits, rounding, writing
from counterpoise.checkpoints.rounding import as_array, as_tensor
from tiny import save_pair

KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def numbers(kind: torch.dtype, seed: int) -> torch.Tensor:
    """Of all sizes, subnormal ones, zeros of both signs and the largest among them."""
    random = torch.Generator().manual_seed(seed)
    count = 2 * bits.PIECE + 7
    wide = torch.randn(count, generator=random, dtype=torch.float64) * 2.0 ** torch.randint(
        -26, 9, (count,), generator=random
    )
    info = torch.finfo(kind)
    wide[:6] = torch.tensor([0.0, -0.0, info.tiny, -info.tiny * info.eps, info.max, -info.max])
    return wide.to(kind)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 1.7])
def test_mix_gives_the_same_bits_for_arrays_and_tensors(
    device: str, before: torch.dtype, after: torch.dtype, ratio: float
) -> None:
    pre, post = numbers(before, 1), numbers(after, 2)
    arrays = as_array(pre), as_array(post)
    key = bits.key_of(*arrays)
    with np.errstate(all="ignore"):
        made = mix(*arrays, ratio)
        cut = [mix(*(a[at] for a in arrays), ratio, key=key, start=at.start) for at in (slice(0, 99), slice(99, None))]
    wanted = mix(pre.to(device), post.to(device), ratio).cpu()
    assert as_tensor(made).dtype == wanted.dtype == after
    assert key == rounding.key_of(pre, post)
    number = ~wanted.isnan().numpy()  # of numbers too large for the dtype; which of the NaNs it is is not said
    assert number.sum() > len(number) - 3
    assert bits.not_finite(made) == int((~wanted.isfinite()).sum())
    for found in (made, np.concatenate(cut)):
        assert found[number].tobytes() == as_array(wanted)[number].tobytes()


def test_average_and_diff_of_a_known_class_import_neither_torch_nor_transformers(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, dtype=torch.bfloat16)
    script = """
import sys
from counterpoise.cli.app import app
pre, post, out = sys.argv[1:]
for command in (["average", pre, post, "-o", out, "--ratio", "0.4"], ["diff", pre, post]):
    app(command, standalone_mode=False)
heavy = {"torch", "transformers", "scipy", "huggingface_hub.repocard_data"} & sys.modules.keys()
assert not heavy, heavy
"""
    command = [sys.executable, "-c", script, str(pre), str(post), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("refused", ["open", "write", "never"])
def test_a_file_is_the_same_where_the_page_cache_cannot_be_passed(
    tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems refuse O_DIRECT when a file is opened, others when it is written to."""
    opened, written = os.open, writing.FileIO.write
    monkeypatch.setattr(writing, "SPAN", 8192)

    class Strict(writing.FileIO):
        def write(self, content: memoryview) -> int:  # type: ignore[override]
            import fcntl

            direct = fcntl.fcntl(self, fcntl.F_GETFL) & writing.DIRECT
            if refused == "write" and direct:
                raise OSError(errno.EINVAL, "no")
            return written(self, content)

    def strict(name: str, flags: int, mode: int = 0o777) -> int:
        if refused == "open" and flags & writing.DIRECT:
            raise OSError(errno.EINVAL, "no")
        return opened(name, flags, mode)

    monkeypatch.setattr(writing, "FileIO", Strict)
    monkeypatch.setattr(os, "open", strict)
    values = np.arange(10_000, dtype=np.float32)
    file = writing.TensorFile(tmp_path / "x", {"a": ("F32", (10_000,))})
    for begin in range(0, 10_000, 300):
        file.write(values[begin : begin + 300])
    file.close()
    content = (tmp_path / "x").read_bytes()
    assert content.endswith(values.tobytes())
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + values.nbytes


def test_a_file_that_is_not_filled_is_no_file(tmp_path: Path) -> None:
    file = writing.TensorFile(tmp_path / "x", {"a": ("F32", (4,))})
    file.write(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="expected 112 bytes to be written, found 108"):
        file.close()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_file_of_which_nothing_changes_is_copied_whole(
    tmp_path: Path, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pre, post = save_pair(tmp_path, dtype=torch.bfloat16, shard=("20KB", "20KB"))
    for folder in (pre, post):  # an integer, which has no ratio, beside one file's numbers
        file = sorted(folder.glob("*.safetensors"))[0]
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["steps"] = file.name
        index.write_text(json.dumps(content))
        save_file(load_file(file) | {"steps": torch.tensor([len(folder.name)])}, file, {"format": "pt"})
    copies: list[bool] = []
    take = writing.TensorFile.take
    monkeypatch.setattr(
        writing.TensorFile, "take", lambda self, source: copies.append(take(self, source)) or copies[-1]
    )
    average(pre, post, tmp_path / "out", ratio)
    kept = (pre, post)[int(ratio)]
    count = len(sorted(post.glob("*.safetensors")))
    assert copies.count(True) == {0.0: count - 1, 0.5: 0, 1.0: count}[ratio]
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        made, wanted = load_file(file), load_file(kept / file.name)
        if "steps" in made:
            assert int(made.pop("steps")) == 4
            del wanted["steps"]
        assert made.keys() == wanted.keys()
        assert ratio == 0.5 or all(torch.equal(made[n], wanted[n]) for n in made)
