"""A LoRA adapter read as a checkpoint equals PEFT's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from counterpoise.averaging import average
from counterpoise.checkpoint import CheckpointError, open_checkpoint
from counterpoise.preflight import preflight
from counterpoise.resident import ResidentAverage
from tiny import tiny, tokenizer

peft = pytest.importorskip("peft")

LLAMA = ["q_proj", "v_proj", "up_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": LLAMA}),
    "rslora": ("llama", {"target_modules": LLAMA, "use_rslora": True}),
    "patterns": (
        "llama",
        {"target_modules": LLAMA, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
    ),
    "whole head": ("llama", {"target_modules": LLAMA, "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "biases": ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "all"}),
}


def adapter(tmp_path: Path, family: str, settings: dict[str, Any]) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    model = tiny(family)
    model.save_pretrained(tmp_path / "pre")
    tokenizer().save_pretrained(tmp_path / "pre")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    return tmp_path / "pre", tmp_path / "adapter", dict(open_checkpoint(tmp_path / "merged"))


@pytest.mark.parametrize("case", CASES)
def test_reading_an_adapter_equals_pefts_merge(tmp_path: Path, case: str) -> None:
    pre, folder, merged = adapter(tmp_path, *CASES[case])
    base = open_checkpoint(pre)
    read = open_checkpoint(folder, base=base)
    assert list(read) == list(base)
    changed = 0
    for name, tensor in read.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(tensor, base[name])
    assert changed >= 6


def test_averaging_with_an_adapter_needs_no_merged_copy(tmp_path: Path) -> None:
    pre, folder, merged = adapter(tmp_path, *CASES["plain"])
    recipe = average(pre, folder, tmp_path / "out", 0.5)
    made, base = open_checkpoint(tmp_path / "out"), open_checkpoint(pre)
    for name in base:
        torch.testing.assert_close(made[name], torch.lerp(base[name], merged[name], 0.5), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert set(recipe.inputs["post"]["sha256"]) == {"adapter_model.safetensors", "adapter_config.json"}


def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path) -> None:
    pre, folder, _ = adapter(tmp_path, *CASES["plain"])
    base = open_checkpoint(pre)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change, match in (
        ({"use_dora": True}, "use_dora is not supported.*merge the adapter with PEFT"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"peft_type": "IA3"}, "expected a LoRA adapter, found peft_type 'IA3'"),
    ):
        path.write_text(json.dumps({**settings, **change}))
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(folder, base=base)
    with pytest.raises(CheckpointError, match="only POST may be an adapter"):
        open_checkpoint(folder)


def test_another_base_and_a_resized_vocabulary_are_refused(tmp_path: Path) -> None:
    _, folder, _ = adapter(tmp_path, "llama", {"target_modules": LLAMA, "modules_to_save": ["embed_tokens", "lm_head"]})
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=4,
                        num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="resized vocabulary"):
        open_checkpoint(folder, base=open_checkpoint(tmp_path / "small"))
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="PRE has no tensor"):
        open_checkpoint(folder, base=open_checkpoint(tmp_path / "gpt2"))


def test_a_resident_average_of_a_base_and_its_adapter(tmp_path: Path) -> None:
    """Searched and measured without a merged copy: the bits are those that averaging would write."""
    pre, folder, _ = adapter(tmp_path, *CASES["rslora"])
    recipe = average(pre, folder, tmp_path / "out", [0.2, 0.7, 1.0])
    pair = preflight(pre, folder)
    resident = ResidentAverage(pair)
    resident.set(recipe.partition, recipe.ratios)
    written, state = open_checkpoint(tmp_path / "out"), resident.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())
