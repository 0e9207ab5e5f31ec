"""mix and average: bits, layout, atomicity."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from counterpoise.averaging.average import average
from counterpoise.averaging.merge import MergeRecipe
from counterpoise.averaging.mix import mix
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.rounding import key_of, narrow
from tiny import CAUSAL, FAMILIES, apart, save_pair


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
    assert abs(((mix(pre, post, ratio).double() - exact) / one_ulp).mean()) < 0.01  # ten thousand errors cancel
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
    assert torch.equal(
        mix(pre, post, 0.3), narrow(apart(pre, post.float(), 0.3), torch.bfloat16, key=key_of(pre, post))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.6, 0.9])
def test_updates_of_one_unit_in_the_last_place_are_kept_by_their_share(
    tmp_path: Path, dtype: torch.dtype, ratio: float
) -> None:
    pre, post = save_pair(tmp_path, dtype=dtype)
    before = load_file(pre / "model.safetensors")
    after = {n: (t.view(torch.int16) + (t != 0)).view(dtype) for n, t in before.items()}
    save_file(after, post / "model.safetensors", {"format": "pt"})
    average(pre, post, tmp_path / "out", ratio)
    made = load_file(tmp_path / "out" / "model.safetensors")
    asked, kept = (
        torch.cat([((t[n].float() - before[n].float()) * (after[n] != before[n])).flatten() for n in made])
        for t in (after, made)
    )
    changed = int((asked != 0).sum())
    share = float((kept != 0).sum()) / changed
    assert abs(share - ratio) < 5 * (ratio * (1 - ratio) / changed) ** 0.5  # rounded to the nearest: 0 or 1
    assert torch.equal(kept[kept != 0], asked[kept != 0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_equals_the_formula_and_loads(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    pre, post = save_pair(tmp_path, family, dtype=dtype)
    recipe = average(pre, post, tmp_path / "out", [0.1, 0.5, 0.9], blocks=3)
    a, b, made = (load_file(p / "model.safetensors") for p in (pre, post, tmp_path / "out"))
    assert list(Checkpoint(tmp_path / "out")) == list(Checkpoint(post))
    ratios = recipe.partition.ratios(made, recipe.ratios)
    assert len(set(ratios.values())) == 3  # 0.1, 0.9, and 0.5 of both the middle and the rest
    for name, tensor in made.items():
        wide = apart(a[name].float(), b[name].float(), ratios[name])
        assert torch.equal(tensor, narrow(wide, dtype, key=key_of(a[name], b[name]))), name
    if family in CAUSAL:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=2).shape == (1, 5)


def test_a_tied_head_that_is_stored_stays_tied(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, dtype=torch.bfloat16, tied=True)
    for folder in (pre, post):
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    average(pre, post, tmp_path / "out", 0.4)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])


def test_an_average_of_an_average_is_rounded_anew(tmp_path: Path) -> None:
    pre = torch.rand(200_000).add(1).bfloat16()
    post = (pre.view(torch.int16) + 1).view(torch.bfloat16)
    half = mix(pre, post, 0.5)
    quarter, more = mix(pre, half, 0.5), mix(half, post, 0.5)
    shares = [float((t != pre).double().mean()) for t in (half, quarter, more)]
    assert shares == pytest.approx([0.5, 0.25, 0.75], abs=0.01)


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
        assert torch.equal(out[name], apart(Checkpoint(pre)[name], source[name], 0.6))


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


@pytest.mark.parametrize(
    "wrong",
    [
        lambda r: r["blocks"][0].update(name=0.5),
        lambda r: r["blocks"][0]["tensors"].append(None),
        lambda r: r["rest"]["tensors"].append(3),
        lambda r: r.update(partition=7),
        lambda r: r["settings"].update(command=1.5),
        lambda r: r["inputs"]["pre"].update(source=2.0),
    ],
)
def test_a_recipe_whose_words_are_no_words_is_refused(tmp_path: Path, wrong: Callable[[Any], None]) -> None:
    pre, post = save_pair(tmp_path)
    average(pre, post, tmp_path / "a", [0, 0.44, 0.76])
    content = json.loads((tmp_path / "a" / "recipe.json").read_text())
    wrong(content)
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"r\.json: not a recipe .*expected texts, found"):
        Recipe.read(tmp_path / "r.json")


def test_a_ratio_far_beyond_post_is_warned_of(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    assert "ratio 60 goes 60 times as far as POST; 60 % is 0.6" in average(pre, post, tmp_path / "far", 60).warnings
    assert not average(pre, post, tmp_path / "near", 1.5).warnings


@pytest.mark.parametrize("read", [Recipe.read, MergeRecipe.read])
def test_what_is_no_recipe_is_named_once_beside_what_would_do(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    for content, said in (("{}\n{}", r"\(expected json, found"), ('{"format": "other"}', "found (format )?'other'")):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(
            ValueError, match=rf"^\S*r\.json: not (?!.*r\.json).*{said}.*recipe\.json .*\.yml of mergekit$"
        ):
            read(tmp_path / "r.json")


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
        "import sys, time; from counterpoise.averaging.average import average\n"
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
    from counterpoise.averaging.partition import layerwise

    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]
    ratios = layerwise(names).ratios(names, [float(i == 1) for i in range(12)])
    assert [n for n, r in ratios.items() if r == 1] == ["model.layers.1.mlp.up_proj.weight"]


def write(folder: Path, shards: list[dict[str, torch.Tensor]], config: dict[str, object] | None = None) -> Path:
    """A checkpoint of any tensors whatever."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_forty_shards_and_what_else_a_checkpoint_may_hold(tmp_path: Path) -> None:
    """A tensor larger than a chunk, empty and scalar ones, integers, both half precisions, names with odd characters."""
    torch.manual_seed(0)
    layers = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(3, 4, dtype=torch.bfloat16) for i in range(37)}
    odd = {
        "model.embed tokens/ä\U0001f642.weight": torch.randn(1500, 999),
        "model.empty": torch.empty(0, 7, dtype=torch.float16),
        "model.scalar": torch.tensor(0.25),
        "model.steps": torch.arange(5),
        "model.mask": torch.tensor([True, False]),
        "model.half": torch.randn(33, dtype=torch.float16),
        "model.wide": torch.randn(9, dtype=torch.float64),
    }
    names = [*layers, *odd]
    pre = {**layers, **odd}
    post = {n: t + 0.01 * torch.randn(t.shape).to(t.dtype) if t.is_floating_point() else t for n, t in pre.items()}
    post["model.steps"] = torch.arange(5) + 1
    shards = [names[i::40] for i in range(40)]
    write(tmp_path / "pre", [pre])
    write(tmp_path / "post", [{n: post[n] for n in shard} for shard in shards])
    average(tmp_path / "pre", tmp_path / "post", tmp_path / "out", 0.3)
    made = Checkpoint(tmp_path / "out")
    assert made.layout == Checkpoint(tmp_path / "post").layout
    assert len(made.files) == 40
    assert set(made) == set(names)
    for name in names:
        wanted = mix(pre[name], post[name], 0.3)
        assert torch.equal(made[name], wanted), name


@pytest.mark.parametrize(
    ("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_pre_and_post_of_two_precisions(tmp_path: Path, before: str, after: str, ratio: float) -> None:
    torch.manual_seed(0)
    first, second = (getattr(torch, name) for name in (before, after))
    pre = {f"layers.{i}.w": torch.randn(5, 6).to(first) for i in range(3)}
    post = {n: (t.float() + 0.01).to(second) for n, t in pre.items()}
    recipe = average(write(tmp_path / "pre", [pre]), write(tmp_path / "post", [post]), tmp_path / "out", ratio)
    assert f"PRE is stored in {before}, POST in {after}" in recipe.warnings[0]
    made = load_file(tmp_path / "out" / "model.safetensors")
    for name in post:
        wide = apart(pre[name].double(), post[name].double(), ratio)
        assert made[name].dtype == second
        torch.testing.assert_close(made[name].double(), wide, rtol=2**-7, atol=1e-6)
        if ratio == 1:
            assert torch.equal(made[name], post[name])


def test_one_ratio_needs_no_layers(tmp_path: Path) -> None:
    stacks = [f"{side}.block.{i}.w" for side in ("left", "right") for i in range(2)]
    pre = {n: torch.randn(4) for n in [*stacks, "shared.weight"]}
    post = {n: t + 0.1 for n, t in pre.items()}
    folders = [write(tmp_path / n, [t]) for n, t in (("pre", pre), ("post", post))]
    recipe = average(*folders, tmp_path / "out", 0.5)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(made[n], apart(pre[n], post[n], 0.5)) for n in pre)
    assert Recipe.read(tmp_path / "out" / "recipe.json") == recipe
    with pytest.raises(
        ValueError, match=r"expected one stack of layers, or an encoder and a decoder, found left\.block, right\.block"
    ):
        average(*folders, tmp_path / "more", [0.1, 0.2])


@pytest.mark.parametrize("ratios", [float("nan"), -0.1, float("inf"), [0.1, float("nan"), 0.2]])
def test_a_ratio_that_is_none_is_refused(tmp_path: Path, ratios: float | list[float]) -> None:
    with pytest.raises(ValueError, match="ratios: expected numbers of at least 0"):
        average(*save_pair(tmp_path), tmp_path / "out", ratios)
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_another_pair_is_told(tmp_path: Path) -> None:
    pair, other = (save_pair(tmp_path / n, scale=s) for n, s in (("a", 0.02), ("b", 0.03)))
    average(*pair, tmp_path / "out", 0.5)
    recipe = Recipe.read(tmp_path / "out" / "recipe.json")
    assert average(*pair, tmp_path / "again", recipe).warnings == ()
    (warning,) = average(*other, tmp_path / "more", recipe).warnings
    assert "the recipe was made for another POST" in warning


def test_averaging_leaves_torchs_threads_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        average(*save_pair(tmp_path), tmp_path / "out", 0.5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_recipe_with_other_tensors_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pair = save_pair(tmp_path)
    recipe = average(*pair, tmp_path / "out", 0.5)
    (block,) = recipe.partition.blocks
    more = replace(block, tensors=(*block.tensors, "lm_head.other"))
    wrong = replace(recipe, partition=replace(recipe.partition, blocks=(more,)))
    with pytest.raises(ValueError, match=r"names 1 tensors that PRE and POST lack, first lm_head\.other"):
        average(*pair, tmp_path / "more", wrong)
    assert not (tmp_path / "more").exists()
