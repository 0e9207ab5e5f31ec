"""Which tensor is which, asked of transformers: wrappers, spellings, ties, and OUT checked before it appears."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from counterpoise.averaging.average import average
from counterpoise.averaging.merge import Merge, merge
from counterpoise.averaging.partition import Block, Partition, partition, whole
from counterpoise.averaging.recipe import Recipe
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.checkpoint import Checkpoint, unwrapped
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.preflight import preflight
from tiny import LLAMA_LIKE, nudge, save_pair

IDS = torch.arange(4, 20)[None]
EYES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28, "patch_size": 14}


def gemma3() -> Any:
    import transformers as t

    text = t.Gemma3TextConfig(**LLAMA_LIKE, head_dim=4).to_dict()
    eyes = t.SiglipVisionConfig(**EYES, num_hidden_layers=6).to_dict()  # as many layers as the text has
    return t.Gemma3ForConditionalGeneration(t.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4))


def qwen2_vl() -> Any:
    import transformers as t

    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    eyes = {"depth": 6, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    text = {**LLAMA_LIKE, "rope_parameters": rope}
    return t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(text_config=text, vision_config=eyes))


def t5() -> Any:
    import transformers as t

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 3, "num_heads": 4, "vocab_size": 64}
    return t.T5ForConditionalGeneration(t.T5Config(**sizes, num_decoder_layers=5, decoder_start_token_id=0))


def pair_of(folder: Path, build: Callable[[], Any]) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model = build()
    for name in ("pre", "post"):
        model.save_pretrained(folder / name)
        nudge(model, scale=0.005)
    return folder / "pre", folder / "post"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def set_config(folder: Path, **change: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def loaded(folder: Path, kind: Any = None) -> Any:
    """The model of a folder, of which nothing may be missing."""
    import transformers

    made, info = (kind or transformers.AutoModelForCausalLM).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return made.eval()


def gap(resident: ResidentAverage, folder: Path) -> float:
    """The largest difference between what is measured and what is written."""
    with torch.no_grad():
        written = loaded(folder, type(resident.model))(input_ids=IDS).logits
        return float((resident.model(input_ids=IDS).logits - written).abs().max())


# Wrappers

WRAPPED = {
    "compiled": lambda n: "_orig_mod." + n,
    "DDP": lambda n: "module." + n,
    "PEFT": lambda n: "base_model.model." + n,
    "base_model": lambda n: "base_model." + n,
    "TRL": lambda n: "pretrained_model." + n,
    "compiled in DDP": lambda n: "module._orig_mod." + n,
    "DDP in PEFT": lambda n: "base_model.model.module." + n,
    "DDP twice": lambda n: "module.module." + n,
    "a part compiled": lambda n: n.replace("model.layers", "model._orig_mod.layers"),
    "each layer compiled": lambda n: n.replace(".mlp.", "._orig_mod.mlp."),
    "a part in DDP": lambda n: n.replace("model.", "model.module.", 1),
    "FSDP": lambda n: "_fsdp_wrapped_module." + n.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
}


@pytest.mark.parametrize("side", ["pre", "post", "both"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_a_wrapper_puts_before_a_name_is_not_in_out(tmp_path: Path, wrapper: str, side: str) -> None:
    pre, post = save_pair(tmp_path)
    average(pre, post, tmp_path / "plain", 0.5)
    for folder in (pre, post):
        if side in (folder.name, "both"):
            rewrite(folder, lambda t: {WRAPPED[wrapper](n): v for n, v in t.items()})
    average(pre, post, tmp_path / "out", 0.5)
    plain, made = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "out"))
    assert plain.keys() == made.keys()
    assert all(torch.equal(plain[n], made[n]) for n in plain)
    loaded(tmp_path / "out")


def test_a_wrapped_value_head_is_dropped_and_the_rest_is_kept(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    rewrite(
        post, lambda t: {f"pretrained_model.{n}": v for n, v in t.items()} | {"v_head.summary.weight": torch.ones(1)}
    )
    average(pre, post, tmp_path / "out", 0.5, drop=["v_head.*"])
    loaded(tmp_path / "out")


@pytest.mark.parametrize("prefix", ["_forward_module.", "policy.module.", "model.model."])
@pytest.mark.parametrize("side", ["pre", "post"])
def test_what_one_side_alone_puts_before_every_name_is_not_in_out(tmp_path: Path, prefix: str, side: str) -> None:
    """A part of its own beside the model is named by what `--drop` takes."""
    pre, post = save_pair(tmp_path)
    other = {"value_model.score.weight": torch.ones(1)} if side == "post" else {}
    rewrite(tmp_path / side, lambda t: {prefix + n: v for n, v in t.items()} | other)
    with nullcontext() if side == "pre" else pytest.raises(CheckpointError, match=r"1 tensors .* --drop 'value_model"):
        average(pre, post, tmp_path / "out", 0.5)
    if side == "post":
        average(pre, post, tmp_path / "out", 0.5, drop=["value_model.*"])
    loaded(tmp_path / "out")


def test_a_part_of_the_model_that_is_called_module_keeps_its_name() -> None:
    assert unwrapped(["module.a.module.w"], own_module=True) == {"module.a.module.w": "a.module.w"}
    assert unwrapped(["module", "_orig_mod.module"]) == {"module": "module", "_orig_mod.module": "module"}


def test_two_names_that_are_one_without_the_wrapper_are_refused(tmp_path: Path) -> None:
    _, post = save_pair(tmp_path)
    rewrite(post, lambda t: {**t, "module.lm_head.weight": t["lm_head.weight"].clone()})
    with pytest.raises(CheckpointError, match=r"lm_head.weight stands in both .*\(there as module.lm_head.weight\)"):
        Checkpoint(post)


# Spellings


@pytest.mark.parametrize("side", ["pre", "post"])
@pytest.mark.parametrize("build", [gemma3, qwen2_vl])
def test_the_old_and_the_new_spelling_of_a_wrapper_of_vision_are_one(
    tmp_path: Path, build: Callable[[], Any], side: str
) -> None:
    pre, post = pair_of(tmp_path, build)
    average(pre, post, tmp_path / "plain", 0.3)
    kind = type(build())
    tied = {"lm_head.weight"} if build is gemma3 else set()
    in_memory = {n: t.clone() for n, t in loaded(tmp_path / side, kind).state_dict().items() if n not in tied}
    assert in_memory.keys() != load_file(tmp_path / side / "model.safetensors").keys()
    rewrite(tmp_path / side, lambda t: in_memory)
    average(pre, post, tmp_path / "out", 0.3)
    plain, made = (loaded(tmp_path / n, kind).state_dict() for n in ("plain", "out"))
    assert all(torch.equal(plain[n], made[n]) for n in plain)


def test_names_of_an_unknown_class_are_compared_as_they_are(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    for folder in (pre, post):
        set_config(folder, model_type="not_in_transformers", auto_map={"AutoModel": "mine.Model"})
    average(pre, post, tmp_path / "out", 0.5)
    rewrite(post, lambda t: {n.replace("model.layers", "layers"): v for n, v in t.items()})
    with pytest.raises(CheckpointError, match=r"tensors that PRE lacks, first layers\.0"):
        preflight(pre, post)


# Ties


@pytest.mark.parametrize("side", ["pre", "post"])
def test_copies_of_t5s_embedding_on_one_side_are_no_other_model(tmp_path: Path, side: str) -> None:
    pre, post = pair_of(tmp_path, t5)
    average(pre, post, tmp_path / "plain", 0.5)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    rewrite(tmp_path / side, lambda t: {**t, **{n: t["shared.weight"].clone() for n in copies}})
    average(pre, post, tmp_path / "out", 0.5)
    plain, made = (loaded(tmp_path / n, type(t5())).state_dict() for n in ("plain", "out"))
    assert all(torch.equal(plain[n], made[n]) for n in plain)


@pytest.mark.parametrize("donor", ["pre", "post"])
@pytest.mark.parametrize("untied", ["pre", "post", "both"])
@pytest.mark.parametrize("said", [True, False])
def test_a_head_is_tied_or_not_by_its_numbers(tmp_path: Path, untied: str, donor: str, said: bool) -> None:
    """A head that differs from the embedding is its own, whatever the config says, in what is measured and written."""
    pre, post = save_pair(tmp_path, tied=True)
    for folder in (pre, post):
        if untied in (folder.name, "both"):
            rewrite(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].flip(1) * 1.1})
            if not said:
                set_config(folder, tie_word_embeddings=False)
    pair = preflight(pre, post)
    assert "lm_head.weight" in pair.names
    resident = ResidentAverage(pair, donor=donor)  # type: ignore[arg-type]
    for i, ratio in enumerate((0.0, 0.4, 1.0)):
        resident.set(whole(pair.names), [ratio])
        average(pre, post, tmp_path / f"out{i}", ratio, donor=donor)  # type: ignore[arg-type]
        assert gap(resident, tmp_path / f"out{i}") == 0
        for end, folder in ((0.0, pre), (1.0, post)):
            if ratio == end:
                assert gap(resident, folder) == 0
    assert json.loads((tmp_path / "out1/config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_head_stored_by_pre_alone_is_left_out_when_it_is_a_copy(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, tied=True)
    rewrite(pre, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    average(pre, post, tmp_path / "out", 0.5)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded(tmp_path / "out")


# What is written


def test_shards_of_one_name_in_two_folders_are_all_written(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    tensors = load_file(post / "model.safetensors")
    (post / "model.safetensors").unlink()
    place = {}
    for i, name in enumerate(sorted(tensors)):
        place[name] = f"{'abc'[i % 3]}/part.safetensors"
    for file in set(place.values()):
        (post / file).parent.mkdir()
        save_file({n: t for n, t in tensors.items() if place[n] == file}, post / file, {"format": "pt"})
    (post / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    recipe = average(pre, post, tmp_path / "out", 1.0)
    assert len(recipe.inputs["post"]["sha256"]) == 4
    made = loaded(tmp_path / "out").state_dict()
    assert all(torch.equal(made[n], t) for n, t in tensors.items())


def test_a_weight_that_is_infinite_is_refused(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    recipe = average(pre, post, tmp_path / "out", [0.2, 0.5, 0.8])
    content = recipe.to_json()
    content["blocks"][0]["weight"] = float("inf")
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected positive, finite block weights"):
        Recipe.read(tmp_path / "recipe.json")
    with pytest.raises(ValueError, match="expected positive, finite block weights"):
        Partition("mine", (Block("a", 1e308, ("x",), (0,)), Block("b", 1e308, ("y",), (1,))))
    with pytest.raises(ValueError, match="positive numbers with a finite sum"):
        Merge(weights=(1e308, 1e308))


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 1e7)])
def test_what_would_be_written_is_finite(tmp_path: Path, dtype: torch.dtype, ratio: float) -> None:
    pre, post = save_pair(tmp_path, dtype=dtype, scale=0.5)
    with pytest.raises(
        CheckpointError, match=r"expected finite numbers to write, found NaN or Inf .*take smaller ones"
    ):
        average(pre, post, tmp_path / "out", ratio, allow_unrelated=True)
    with pytest.raises(CheckpointError, match="expected finite numbers to write"):
        merge(pre, [post], tmp_path / "out", Merge(ratio=ratio), allow_unrelated=True)
    assert not (tmp_path / "out").exists()


def test_a_ratio_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    with pytest.raises(ValueError, match=r"ratios: expected numbers of at least 0 .*found 1e\+39"):
        average(pre, post, tmp_path / "out", 1e39)
    with pytest.raises(ValueError, match="ratio: expected a finite number"):
        Merge("dare", density=1e-9, ratio=1e35)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"num_hidden_layers": 7}, "model.layers.6.input_layernorm.weight"),
        ({"intermediate_size": 20}, "model.layers.0.mlp"),
    ],
)
def test_out_that_its_class_would_fill_with_random_numbers_does_not_appear(
    tmp_path: Path, change: dict[str, int], first: str
) -> None:
    pre, post = save_pair(tmp_path)
    for folder in (pre, post):
        set_config(folder, **change)
    with pytest.raises(CheckpointError, match=rf"LlamaForCausalLM, .* would not find .*, first {first}"):
        average(pre, post, tmp_path / "out", 0.5)
    with pytest.raises(CheckpointError, match="would not find"):
        merge(pre, [post], tmp_path / "out", Merge())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 5}, r"LlamaForCausalLM, .* passes over 9 tensors, first model\.layers\.5\."),
        ({"hidden_act": "nosuch"}, r"config\.json: LlamaForCausalLM cannot be built \(KeyError: 'nosuch'\)"),
    ],
)
def test_what_the_class_of_out_would_not_read_is_said(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    pre, post = save_pair(tmp_path)
    for folder in (pre, post):
        set_config(folder, **change)
    with pytest.warns(UserWarning, match=told):
        average(pre, post, tmp_path / "out", 0.5)


def test_out_that_lacks_an_expert_does_not_appear(tmp_path: Path) -> None:
    import transformers as t

    pre, post = pair_of(tmp_path, lambda: t.MixtralForCausalLM(t.MixtralConfig(**LLAMA_LIKE, num_local_experts=4)))
    for folder in (pre, post):
        rewrite(
            folder, lambda held: {n: v for n, v in held.items() if "layers.2.block_sparse_moe.experts.3.w1" not in n}
        )
    with pytest.raises(CheckpointError, match=r"would not find .*, first model\.layers\.2\.mlp\.experts\.gate_up_proj"):
        average(pre, post, tmp_path / "out", 0.5)


# Stacks


def test_the_text_of_a_wrapper_of_vision_is_cut_and_the_rest_takes_the_mean(tmp_path: Path) -> None:
    for build, text in ((gemma3, "language_model.model.layers."), (qwen2_vl, "model.layers.")):
        pre, post = pair_of(tmp_path / text, build)
        cut = partition(preflight(pre, post).shapes, 3)
        assert [b.layers for b in cut.blocks] == [(0, 1), (2, 3), (4, 5)]
        assert all(t.startswith(text) for b in cut.blocks for t in b.tensors)
        assert any("vis" in t for t in cut.rest)


def test_a_third_of_an_encoder_and_of_a_decoder_are_one_block(tmp_path: Path) -> None:
    from counterpoise.averaging.diff import diff

    pre, post = pair_of(tmp_path, t5)
    shapes = preflight(pre, post).shapes
    cut = partition(shapes, 3)
    assert [b.name for b in cut.blocks] == [
        "encoder layer 0, decoder layers 0-1",
        "encoder layer 1, decoder layer 2",
        "encoder layer 2, decoder layers 3-4",
    ]
    assert list(cut.weights) == [3, 2, 3]
    assert set(cut.rest) == {"shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}
    assert len(partition(shapes, "layerwise")) == 5
    rows, _ = diff(pre, post)
    assert [r.name for r in rows if r.kind == "block"][:3] == [b.name for b in cut.blocks]
    average(pre, post, tmp_path / "out", [0.2, 0.5, 0.8])
    loaded(tmp_path / "out", type(t5()))
