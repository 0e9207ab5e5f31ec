"""mix and average: bits, layout, atomicity."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from counterpoise.averaging import Recipe, average, mix
from counterpoise.checkpoint import Checkpoint, CheckpointError
from tiny import CAUSAL, FAMILIES, save_pair


def folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0, 1.4])
def test_mix_is_the_formula_rounded_once(dtype: torch.dtype, ratio: float) -> None:
    random = torch.Generator().manual_seed(0)
    pre = torch.randn(10_001, generator=random).to(dtype)
    post = (pre + 0.01 * torch.randn(10_001, generator=random)).to(dtype)
    exact = pre.double() + ratio * (post.double() - pre.double())
    one_ulp = 2 * torch.finfo(dtype).eps * torch.maximum(pre.abs(), post.abs()).double()
    assert ((mix(pre, post, ratio).double() - exact).abs() <= one_ulp).all()
    if dtype in (torch.bfloat16, torch.float16):
        assert (mix(pre, post, ratio) != exact.to(dtype)).double().mean() < 2e-3
    buffer = torch.empty_like(post)
    assert mix(pre, post, ratio, out=buffer) is buffer
    assert torch.equal(buffer, mix(pre, post, ratio))


def test_mix_keeps_the_sign_of_zero_and_integers() -> None:
    zeros = torch.tensor([0.0, -0.0])
    assert raw(mix(zeros, -zeros, 0.0)) == raw(zeros)
    assert raw(mix(zeros, -zeros, 1.0)) == raw(-zeros)
    assert mix(torch.tensor([1]), torch.tensor([5]), 0.5).item() == 5


def test_mix_of_two_dtypes_is_computed_in_the_wider() -> None:
    pre, post = torch.randn(1000), torch.randn(1000).bfloat16()
    assert torch.equal(mix(pre, post, 0.3), torch.lerp(pre, post.float(), 0.3).bfloat16())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_equals_lerp_and_loads(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    pre, post = save_pair(tmp_path, family, dtype=dtype)
    recipe = average(pre, post, tmp_path / "out", [0.1, 0.5, 0.9], blocks=3)
    a, b, made = (load_file(p / "model.safetensors") for p in (pre, post, tmp_path / "out"))
    assert list(Checkpoint(tmp_path / "out")) == list(Checkpoint(post))
    ratios = recipe.partition.ratios(made, recipe.ratios)
    assert len(set(ratios.values())) == 3  # 0.1, 0.9, and 0.5 of both the middle and the rest
    for name, tensor in made.items():
        assert torch.equal(tensor, torch.lerp(a[name], b[name], ratios[name])), name
    if family in CAUSAL:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=2).shape == (1, 5)


def test_average_keeps_posts_shards_whatever_pres_are(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, shard=("20KB", "8KB"))
    average(pre, post, tmp_path / "out", 0.6)
    out, source = Checkpoint(tmp_path / "out"), Checkpoint(post)
    assert len(source.files) > len(Checkpoint(pre).files) > 1
    assert out.layout == source.layout
    assert (
        json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
        == json.loads((post / "model.safetensors.index.json").read_text())["weight_map"]
    )
    for name in source:
        assert torch.equal(out[name], torch.lerp(Checkpoint(pre)[name], source[name], 0.6))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_ends_reproduce_every_byte(tmp_path: Path, ratio: float) -> None:
    pre, post = save_pair(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(post / "model.safetensors")
    tensors["model.norm.weight"][:2] = torch.tensor([0.0, -0.0])
    save_file(tensors, post / "model.safetensors", {"format": "pt"})
    average(pre, post, tmp_path / "out", ratio)
    wanted, made = Checkpoint((pre, post)[int(ratio)]), Checkpoint(tmp_path / "out")
    assert all(raw(made[n]) == raw(wanted[n]) for n in wanted)


def test_the_same_bytes_on_every_run_and_from_the_recipe(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    average(pre, post, tmp_path / "a", [0.0, 0.44, 0.76])
    average(pre, post, tmp_path / "b", [0.0, 0.44, 0.76])
    assert folder_hash(tmp_path / "a") == folder_hash(tmp_path / "b")
    recipe = Recipe.read(tmp_path / "a" / "recipe.json")
    assert recipe.ratios == (0.0, 0.44, 0.76)
    average(pre, post, tmp_path / "c", recipe)
    assert raw_weights(tmp_path / "a") == raw_weights(tmp_path / "c")
    assert (
        recipe.inputs["pre"]["sha256"]["model.safetensors"]
        == hashlib.sha256((pre / "model.safetensors").read_bytes()).hexdigest()
    )


def raw_weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_donor_gives_config_tokenizer_and_template(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    (pre / "chat_template.jinja").write_text("PRE")
    (post / "chat_template.jinja").write_text("POST")
    (post / "modeling_evil.py").write_text("raise SystemExit")
    average(pre, post, tmp_path / "a", 0.5)
    average(pre, post, tmp_path / "b", 0.5, donor="pre")
    assert (tmp_path / "a/chat_template.jinja").read_text() == "POST"
    assert (tmp_path / "b/chat_template.jinja").read_text() == "PRE"
    assert (tmp_path / "a/tokenizer.json").is_file()
    assert not (tmp_path / "a/modeling_evil.py").exists()


def test_an_occupied_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"out: expected a new or empty folder.*choose another name"):
        average(pre, post, tmp_path / "out", 0.5)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_failure_in_the_last_tensor_leaves_nothing(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    tensors = load_file(post / "model.safetensors")
    tensors[list(Checkpoint(post))[-1]].view(-1)[-1] = float("nan")
    save_file(tensors, post / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"POST .*expected finite numbers, found NaN or Inf in model\."):
        average(pre, post, tmp_path / "out", 0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["post", "pre"]


def test_interrupted_by_the_user_leaves_nothing(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        average(pre, post, tmp_path / "out", 0.5, progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["post", "pre"]


def test_a_killed_run_leaves_no_out_and_the_next_one_sweeps_up(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    script = (
        "import sys, time; from counterpoise.averaging import average\n"
        "average(*sys.argv[1:4], 0.5, progress=lambda d, t: (print('go', flush=True), time.sleep(60)))"
    )
    command = [sys.executable, "-c", script, str(pre), str(post), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    average(pre, post, tmp_path / "out", 0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "post", "pre"]


def test_layer_1_is_not_layer_10(tmp_path: Path) -> None:
    from counterpoise.partition import layerwise

    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]
    ratios = layerwise(names).ratios(names, [float(i == 1) for i in range(12)])
    assert [n for n, r in ratios.items() if r == 1] == ["model.layers.1.mlp.up_proj.weight"]
