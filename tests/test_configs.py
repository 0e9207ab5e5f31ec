"""Two configs compared as transformers understands them, and values of a wrong type in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from counterpoise.averaging.average import average
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.configs import same_architecture, understood
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.checkpoints.preflight import preflight
from tiny import save_pair

BASE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 8}


def compared(folder: Path, pre: dict[str, Any], post: dict[str, Any]) -> list[str]:
    sides = []
    for name, config in (("pre", pre), ("post", post)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
        sides.append(Checkpoint(folder / name))
    return same_architecture(*sides)


V5 = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("post", [
    {}, {"rope_theta": 10000.0}, {"rope_theta": 10000, "rope_scaling": None}, V5,
    {"rms_norm_eps": 1e-6, "attention_bias": False}, {"num_key_value_heads": 4, "head_dim": None},
    {"torch_dtype": "bfloat16", "use_cache": False, "attention_dropout": 0.1, "initializer_range": 1.0, "eos_token_id": 7,
     "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}, "output_attentions": True,
     "transformers_version": "4.30.0", "unsloth_version": "1", "made_by": "somebody", "pretraining_tp": 2},
])  # fmt: skip
def test_another_spelling_of_the_same_model_is_no_difference(tmp_path: Path, post: dict[str, Any]) -> None:
    assert compared(tmp_path, {"model_type": "llama", **BASE}, {"model_type": "llama", **BASE, **post}) == []
    assert compared(tmp_path, {"model_type": "llama", **BASE, **post}, {"model_type": "llama", **BASE}) == []


def test_old_and_new_spellings_of_scaled_positions_are_one_thing(tmp_path: Path) -> None:
    one = {"model_type": "llama", **BASE, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert compared(tmp_path, one, {"model_type": "llama", **BASE, "rope_parameters": LINEAR}) == []


@pytest.mark.parametrize(("kind", "post", "told"), [
    ("llama", {"rope_theta": 1e6}, "rope_parameters.rope_theta is 10000.0 in PRE and 1000000.0 in POST; an average keeps"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters.rope_type is default in PRE and linear in"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is silu in PRE and gelu in POST"),
    ("llama", {"max_position_embeddings": 4096}, "max_position_embeddings is 2048 in PRE and 4096 in POST"),
    ("gemma2", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 50.0 in PRE and 30.0 in POST"),
    ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 256 in PRE and 100 in POST"),
    ("granite", {"logits_scaling": 8.0}, "logits_scaling is 1.0 in PRE and 8.0 in POST"),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}, "use_sliding_window is False"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 2}, "layer_types[0] is sliding_attention in PRE and full_attention"),
    ("deepseek_v3", {"routed_scaling_factor": 1.0}, "routed_scaling_factor is 2.5 in PRE and 1.0 in POST"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok is 2 in PRE and 1 in POST"),
    ("nobody_knows", {"scoring_func": "sigmoid"}, "scoring_func is softmax in PRE and sigmoid in POST"),
])  # fmt: skip
def test_whatever_changes_the_function_is_told(tmp_path: Path, kind: str, post: dict[str, Any], told: str) -> None:
    base = {"model_type": kind, **BASE, **({"scoring_func": "softmax"} if kind == "nobody_knows" else {})}
    lines = compared(tmp_path, base, base | post)
    assert [told in line for line in lines].count(True) == 1


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_the_configs_inside_a_config_are_compared(tmp_path: Path, part: str) -> None:
    base = {"model_type": "gemma3", "text_config": {"hidden_size": 16}, "vision_config": {"hidden_size": 16}}
    (line,) = compared(
        tmp_path, base, base | {part: {"hidden_size": 16, "attention_bias": True, "layer_norm_eps": 0.5}}
    )[:1]
    assert line.startswith(f"{part}.")
    with pytest.raises(
        CheckpointError, match=rf"{part}\.num_attention_heads is \d+ in PRE and 2 in POST; expected one model"
    ):
        compared(tmp_path, base, base | {part: {"hidden_size": 16, "num_attention_heads": 2}})


@pytest.mark.parametrize("change", [
    {"hidden_size": None}, {"hidden_size": "16"}, {"vocab_size": [1]}, {"architectures": 5}, {"architectures": [None]},
    {"num_attention_heads": 0}, {"rms_norm_eps": "small"}, {"rope_parameters": 3}, {"id2label": 3}, {"dtype": "none"},
    {"quantization_config": "4bit"}, {"layer_types": 3}, {"tie_word_embeddings": "no"}, {"model_type": 3}, {"to_dict": 3},
    {"auto_map": "code"}, {"num_labels": 10**12}, {"eos_token_id": "end"},
])  # fmt: skip
def test_a_value_of_a_wrong_type_is_one_clear_error(tmp_path: Path, change: dict[str, Any]) -> None:
    pre, post = save_pair(tmp_path)
    path = post / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"post/config\.json: expected ") as raised:
        open_checkpoint(post)
    assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match=r"PRE is a llama model|config\.json: expected "):
        preflight(pre, post)


@pytest.mark.parametrize("text", ["text", 3, [], {"hidden_size": None}])
def test_a_wrong_config_inside_a_config_is_one_clear_error(tmp_path: Path, text: object) -> None:
    path, config = tmp_path / "config.json", {"model_type": "gemma3", "text_config": text}
    path.write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"config\.json: expected the config of a gemma3 model .*(text_config|hidden_size)"
    ):
        understood(config, path)


def test_what_transformers_writes_of_a_config_is_read_back_as_the_same(tmp_path: Path) -> None:
    """Infinity in json, numbers as keys, settings that are only written where they differ from the default."""
    from transformers import CONFIG_MAPPING

    for kind in ("mamba2", "bamba", "gemma3", "gpt2", "t5", "lfm2", "deepseek_v3", "qwen2_vl", "phi3", "bert"):
        config = CONFIG_MAPPING[kind]()
        whole, short = (
            json.loads(config.to_json_string(use_diff=diff)) | {"model_type": kind} for diff in (False, True)
        )
        assert compared(tmp_path, whole, short) == []


def test_a_model_that_transformers_does_not_know_is_averaged_in_silence(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    for side in (pre, post):
        path = side / "config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "model_type": "own", "hidden_size": [1], "deep": {"a": 1}})
        )
    assert average(pre, post, tmp_path / "own", 0.5).warnings == ()
    for side in (pre, post):
        (side / "config.json").unlink()
    assert average(pre, post, tmp_path / "none", 0.5).warnings == ()
