"""Preflight: each thing that cannot be averaged is refused with what was expected, what was found and what to do."""

from __future__ import annotations

import json
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from counterpoise.averaging.average import average
from counterpoise.averaging.diff import diff
from counterpoise.averaging.partition import whole
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.checkpoints.preflight import preflight, scan
from tiny import nudge, save_pair, tiny


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save_pair(tmp_path)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refused(pre: Path, post: Path, match: str, **options: object) -> None:
    with pytest.raises(CheckpointError, match=match):
        preflight(pre, post, **options)  # type: ignore[arg-type]


def test_a_good_pair_passes_without_a_word(pair: tuple[Path, Path]) -> None:
    checked = preflight(*pair)
    assert checked.warnings == ()
    scanned, warnings = scan(checked)
    assert warnings == []
    a, b = (load_file(p / "model.safetensors") for p in pair)
    gap = sum((b[n].double() - a[n].double()).square().sum() for n in a)
    assert scanned.distance == pytest.approx(
        float((gap / sum(t.double().square().sum() for t in a.values())).sqrt()), rel=1e-6
    )


def test_architecture_vocabulary_and_tied_weights(pair: tuple[Path, Path]) -> None:
    pre, post = pair
    for change, match in (
        ({"model_type": "qwen2"}, "PRE is a llama model, POST a qwen2 one"),
        ({"vocab_size": 65}, "vocabulary of 64, POST of 65; resize"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config 'gptq' .*none is quantised.*delete that key",
        ),
    ):
        before = (post / "config.json").read_text()
        edit_config(post, **change)
        refused(pre, post, match)
        (post / "config.json").write_text(before)


def test_a_size_left_out_in_one_config_is_no_other_model(tmp_path: Path) -> None:
    """`head_dim: null` is what the shapes say."""
    pre, post = save_pair(tmp_path, "mistral")
    edit_config(pre, head_dim=None)
    edit_config(post, head_dim=4)
    preflight(pre, post)
    preflight(post, pre)
    edit_config(pre, head_dim=8)
    refused(pre, post, "head_dim is 8 in PRE and 4 in POST")


def test_shapes_are_named(pair: tuple[Path, Path]) -> None:
    def longer(t: dict[str, torch.Tensor]) -> None:
        t["model.embed_tokens.weight"] = torch.zeros(70, 16)

    edit_weights(pair[1], longer)
    refused(
        *pair, r"model.embed_tokens.weight has the shape \(64, 16\) in PRE and \(70, 16\) in POST .*resized vocabulary"
    )


def test_an_extra_head_is_refused_unless_dropped(pair: tuple[Path, Path], tmp_path: Path) -> None:
    edit_weights(pair[1], lambda t: t.update({"v_head.summary.weight": torch.ones(1, 16)}))
    refused(*pair, r"POST has 1 tensors that PRE lacks, first v_head.summary.weight.*--drop 'v_head\.\*'")
    average(*pair, tmp_path / "out", 0.5, drop=["v_head.*"])
    assert "v_head.summary.weight" not in open_checkpoint(tmp_path / "out")
    refused(*pair, r"--drop 'value.*' matches no tensor", drop=["v_head.*", "value.*"])
    edit_weights(pair[0], lambda t: t.update({"score.weight": torch.ones(1, 16)}))
    refused(*pair, "PRE has 1 tensors that POST lacks, first score.weight", drop=["v_head.*"])


def test_quantised_tensors_are_refused(pair: tuple[Path, Path]) -> None:
    edit_weights(pair[1], lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(4, dtype=torch.int32)}))
    refused(*pair, "quantised ones .*up_proj.qweight")


@pytest.mark.parametrize("side", [0, 1])
def test_placeholders_of_zero_3_are_named(pair: tuple[Path, Path], side: int) -> None:
    edit_weights(pair[side], lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.empty(0)}))
    refused(*pair, r"1 empty tensors of the shape \[0\], first model\.layers\.0\.mlp\.up_proj\.weight: DeepSpeed ZeRO-3 saved "
                   "its placeholders. Gather .* zero_to_fp32.py.*stage3_gather_16bit_weights_on_model_save")  # fmt: skip


@pytest.mark.parametrize("name", ["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"])
def test_a_quantization_config_is_only_left_over_where_nothing_is_quantised(pair: tuple[Path, Path], name: str) -> None:
    edit_config(pair[1], quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(*pair, "none is quantised .*delete that key from config.json")
    small = torch.ones(4, 1, dtype=torch.uint8)
    edit_weights(pair[1], lambda t: t.update({f"model.layers.0.mlp.up_proj.{name}": small}))
    refused(*pair, f"found quantised ones .*bitsandbytes.*up_proj.{name}.*dequantise")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_numbers_are_named(pair: tuple[Path, Path], bad: float, side: int) -> None:
    edit_weights(pair[side], lambda t: t["model.layers.3.mlp.up_proj.weight"].view(-1)[7:8].fill_(bad))
    with pytest.raises(
        CheckpointError, match=rf"{('PRE', 'POST')[side]} .*NaN or Inf in model.layers.3.mlp.up_proj.weight"
    ):
        scan(preflight(*pair))


def test_large_finite_numbers_are_not_taken_for_inf(pair: tuple[Path, Path]) -> None:
    for side in pair:
        edit_weights(side, lambda t: t["model.layers.3.mlp.up_proj.weight"].fill_(3e30))
    assert scan(preflight(*pair))[0].distance < 1e-6


def test_unrelated_models_warn_then_are_refused(tmp_path: Path) -> None:
    pre, _ = save_pair(tmp_path)
    nudge(tiny("llama"), scale=0.1).save_pretrained(tmp_path / "far")
    d = scan(preflight(pre, tmp_path / "far"), allow_unrelated=True)[0].distance
    assert 0.5 < d < 1.2
    assert "far apart" in scan(preflight(pre, tmp_path / "far"))[1][0]
    nudge(tiny("llama"), scale=2.0).save_pretrained(tmp_path / "alien")
    with pytest.raises(CheckpointError, match=r"look unrelated.*--allow-unrelated"):
        average(pre, tmp_path / "alien", tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()
    average(pre, tmp_path / "alien", tmp_path / "out", 0.5, allow_unrelated=True)


def test_tokenizers_that_disagree(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    assert "give 2 tokens another id, first 'a'" in preflight(*pair).warnings[0]


@pytest.mark.parametrize("content", [{"model": None}, {"model": {"vocab": [1]}}, {"added_tokens": [{}]}])
def test_a_tokenizer_of_another_shape_is_named(pair: tuple[Path, Path], content: dict[str, object]) -> None:
    (pair[1] / "tokenizer.json").write_text(json.dumps(content))
    refused(*pair, "post/tokenizer.json: expected a vocabulary as tokenizers writes it")


def test_too_little_disk(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(CheckpointError, match=r"GB will be written, 0\.00 GB are free; make room"):
        average(*pair, tmp_path / "out", 0.5)


def test_local_folders_need_no_network(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    average("pre", "post", "out", 0.5)
    with pytest.raises(CheckpointError, match="nowhere: no such folder, and not a hub id"):
        average("nowhere", "post", "out2", 0.5)


def test_a_tied_head_written_by_one_side_only(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, tied=True)
    edit_weights(post, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    average(pre, post, tmp_path / "out", 0.5)
    made = open_checkpoint(tmp_path / "out")
    assert torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])


def test_what_is_not_a_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pre, post = pair
    (tmp_path / "empty").mkdir()
    refused(pre, tmp_path / "empty", "expected model.safetensors or model.safetensors.index.json, found neither")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    refused(pre, tmp_path / "empty", "found the pickle pytorch_model.bin, which can run code.*save_pretrained")
    refused(pre, post / "config.json", "expected a checkpoint folder, found a file")
    (post / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused(pre, post, "remove the stale one")
    (post / "model.safetensors.index.json").unlink()
    whole = (post / "model.safetensors").read_bytes()
    (post / "model.safetensors").write_bytes(whole[:-100])
    refused(pre, post, "cut short.*fetch it again")
    (post / "model.safetensors").write_bytes(b"\x00")
    refused(pre, post, "not a whole safetensors file")


def test_missing_shard(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, shard=("1GB", "10KB"))
    victim = sorted(post.glob("*.safetensors"))[1]
    victim.unlink()
    refused(pre, post, f"the shard {victim.name} is missing")


def test_diff_tells_where_the_change_is(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, scale=0.0)

    def only_layer_five(t: dict[str, torch.Tensor]) -> None:
        t["model.layers.5.mlp.up_proj.weight"] *= 1.5

    edit_weights(post, only_layer_five)
    rows, _ = diff(pre, post)
    by_name = {r.name: r for r in rows}
    assert by_name["layers 0-1"].change == 0.0
    assert by_name["mlp.up_proj"].changed == pytest.approx(1 / 6)
    assert by_name["layers 4-5"].change > by_name["the whole model"].change > 0


def test_another_depth_or_number_of_heads_is_another_model(pair: tuple[Path, Path]) -> None:
    pre, post = pair
    edit_config(post, num_hidden_layers=5)
    refused(pre, post, "num_hidden_layers is 6 in PRE and 5 in POST")
    edit_config(post, num_hidden_layers=6, num_attention_heads=2)  # the same shapes, another function
    refused(pre, post, "num_attention_heads is 4 in PRE and 2 in POST")


def test_settings_that_change_what_the_tensors_compute_are_told(pair: tuple[Path, Path]) -> None:
    edit_config(pair[1], rms_norm_eps=1e-3, transformers_version="0")
    assert preflight(*pair).warnings == (
        "rms_norm_eps is 1e-06 in PRE and 0.001 in POST; an average keeps the donor's",
    )


def test_what_to_drop_is_named(pair: tuple[Path, Path]) -> None:
    pre, post = pair
    edit_weights(pre, lambda t: t.update({"model.layers.0.self_attn.gate.scale": torch.ones(2)}))
    refused(pre, post, r"--drop '\*.gate.scale'")
    assert preflight(pre, post, drop=["*.gate.scale"]).dropped == ("model.layers.0.self_attn.gate.scale",)


@pytest.mark.parametrize("sides", ["pre", "post", "both"])
def test_what_older_versions_stored_of_a_built_model_is_left_out(tmp_path: Path, sides: str) -> None:
    """The hub's gpt2 and pythia hold masks and frequencies that today's transformers neither writes nor reads."""
    pair = save_pair(tmp_path, "gpt_neox")
    before = scan(preflight(*pair))[0].distance
    stored = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    }
    for folder in pair if sides == "both" else [pair[sides == "post"]]:
        edit_weights(folder, lambda t: t.update({n: v.clone() for n, v in stored.items()}))
    found = preflight(*pair)
    assert found.dropped == tuple(sorted(stored))
    assert scan(found)[0].distance == before
    assert preflight(*pair, drop=["*.masked_bias"]).dropped == found.dropped  # said by hand, as it once had to be
    resident = ResidentAverage(found)
    resident.set(whole(found.names), [0.5])
    average(*pair, tmp_path / "out", 0.5)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert not stored.keys() & written.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in resident.model.state_dict().items())


@pytest.mark.parametrize("bare", ["pre", "post"])
def test_a_prefix_more_or_less_is_no_other_model(tmp_path: Path, bare: str) -> None:
    """gpt2 on the hub has h.0.ln_1, its fine-tuned children transformer.h.0.ln_1."""
    pre, post = save_pair(tmp_path, "gpt2")
    wanted = average(pre, post, tmp_path / "wanted", 0.4)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    edit_weights(tmp_path / bare, strip)
    made = average(pre, post, tmp_path / "out", 0.4)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("wanted", "out"))
    assert list(load_file(post / "model.safetensors")) == list(b)
    assert all(torch.equal(a[n], b[n if n in b else n.removeprefix("transformer.")]) for n in a)
    assert made.mean == wanted.mean
