"""What is measured is what is written, of models whose tensors lie elsewhere in memory than on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from counterpoise.averaging.average import average
from counterpoise.averaging.mix import mix
from counterpoise.averaging.partition import Block, Partition, by_module, thirds
from counterpoise.averaging.recipe import Recipe
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.preflight import preflight
from test_naming import IDS, gap, gemma3, pair_of, qwen2_vl, rewrite, t5
from tiny import LLAMA_LIKE, save_pair

SIZES = {**LLAMA_LIKE, "num_hidden_layers": 3}


def mixtral() -> Any:
    import transformers as t

    return t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> Any:
    import transformers as t

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SIZES, **experts, head_dim=4))


def deepseek_v3() -> Any:
    import transformers as t

    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "n_group": 2,
        "topk_group": 1,
    }
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    sizes = {**SIZES, **experts, **heads, "head_dim": 4, "num_key_value_heads": 4}
    return t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**sizes, first_k_dense_replace=1))


def granite_shared() -> Any:
    import transformers as t

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 8}
    return t.GraniteMoeSharedForCausalLM(t.GraniteMoeSharedConfig(**SIZES, **experts))


def qwen3_vl_moe() -> Any:
    """Its experts are transposed on disk."""
    import transformers as t

    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
    eyes = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 16,
    }
    eyes |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**SIZES, **experts, "rope_parameters": rope}
    return t.Qwen3VLMoeForConditionalGeneration(t.Qwen3VLMoeConfig(text_config=text, vision_config=eyes))


def hrm() -> Any:
    """One tensor on disk becomes four in memory."""
    import transformers as t

    return t.HrmTextForCausalLM(t.HrmTextConfig(**SIZES))


def halves(names: Any) -> Partition:
    """Two blocks without regard to layers, for models with two stacks of them."""
    a, b = (tuple(list(names)[i::2]) for i in range(2))
    return Partition("halves", (Block("a", 1, a, (0,)), Block("b", 1, b, (1,))))


def loss(model: Any) -> torch.Tensor:
    return cross_entropy(model(input_ids=IDS).logits[0, :-1].double(), IDS[0, 1:])


def backward(model: Any) -> float:
    found = loss(model)
    found.backward()
    return found.item()


MODELS = [mixtral, qwen3_moe, deepseek_v3, granite_shared, gemma3, qwen2_vl, qwen3_vl_moe, hrm]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", MODELS)
def test_what_is_measured_is_what_is_written(tmp_path: Path, build: Callable[[], Any], dtype: torch.dtype) -> None:
    pre, post = pair_of(tmp_path, lambda: build().to(dtype))
    pair = preflight(pre, post)
    resident = ResidentAverage(pair, dtype=torch.float32)
    cut = halves(pair.names) if build is hrm else thirds(pair.names)
    for i, ratios in enumerate(([0.2, 0.5, 0.9], [1.0, 0.0, 0.3], [0.5, 0.5, 0.5])):
        resident.set(cut, ratios[: len(cut)])
        out = tmp_path / f"out{i}"
        average(pre, post, out, Recipe(cut, tuple(ratios[: len(cut)])))
        with torch.no_grad():
            written = type(resident.model).from_pretrained(out, dtype=torch.float32).eval()(input_ids=IDS).logits
            assert torch.equal(resident.model(input_ids=IDS).logits, written)


@pytest.mark.parametrize("build", [mixtral, deepseek_v3, granite_shared, qwen3_vl_moe])
def test_the_gradient_of_fused_tensors_equals_finite_differences(tmp_path: Path, build: Callable[[], Any]) -> None:
    pair = preflight(*pair_of(tmp_path, lambda: build().double()))
    resident = ResidentAverage(pair)
    cut = by_module(pair.shapes)
    ratios = np.full(len(cut), 0.5)
    _, gradient = resident.loss_and_gradient(cut, ratios, backward)
    assert all(p.grad is None for p in resident.model.parameters())
    h, largest = 1e-2, np.abs(gradient).max()
    for k in range(len(cut)):
        ends = []
        for sign in (1, -1):
            resident.set(cut, ratios + sign * h * (np.arange(len(cut)) == k))
            with torch.no_grad():
                ends.append(float(loss(resident.model)))
        assert gradient[k] == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=2e-2, abs=2e-3 * largest), cut.blocks[
            k
        ].name


def test_the_gradient_of_what_becomes_several_parameters_is_theirs(tmp_path: Path) -> None:
    """Against autograd in memory: this model's own gradient leaves its first rounds out, so that no difference quotient fits."""
    pre, post = pair_of(tmp_path, lambda: hrm().double())
    pair = preflight(pre, post)
    resident = ResidentAverage(pair)
    _, gradient = resident.loss_and_gradient(halves(pair.names), [0.5, 0.5], backward)
    before, after = (type(resident.model).from_pretrained(folder).state_dict() for folder in (pre, post))
    model = resident.model.requires_grad_(True)
    backward(model)
    held = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradient.sum() == pytest.approx(
        sum(float(((after[n] - before[n]) * g).sum()) for n, g in held.items()), rel=1e-9
    )


def test_experts_router_and_shared_are_blocks_of_module(tmp_path: Path) -> None:
    for build, wanted in ((mixtral, {"experts", "router"}), (deepseek_v3, {"experts", "router", "shared", "mlp.up_proj"}),
                          (granite_shared, {"experts", "router", "shared"})):  # fmt: skip
        pair = preflight(*pair_of(tmp_path / build.__name__, build))
        cut = {b.name: b.tensors for b in by_module(pair.shapes).blocks}
        assert wanted <= cut.keys()
        assert not any("expert" in n or "gate" in n for n in cut if n not in ("experts", "mlp.gate_proj"))
    shared = [n for n in pair.names if "shared" in n]
    assert set(cut["shared"]) == set(shared)
    assert all("router" in n for n in cut["router"])


def test_each_expert_on_disk_is_its_part_of_the_parameter_in_memory(tmp_path: Path) -> None:
    pair = preflight(*pair_of(tmp_path, mixtral))
    resident = ResidentAverage(pair)
    resident.set(thirds(pair.names), [0.2, 0.5, 0.8])
    fused = resident.model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    for e in range(4):
        for name, part in (("w1", fused[e, :24]), ("w3", fused[e, 24:])):
            disk = f"model.layers.1.block_sparse_moe.experts.{e}.{name}.weight"
            assert torch.equal(part, mix(*pair.tensors(disk), 0.5))


def test_pre_is_not_written_to(tmp_path: Path) -> None:
    pre, post = pair_of(tmp_path, mixtral)
    pair = preflight(pre, post)
    before = {n: pair.pre[n].clone() for n in pair.names}
    resident = ResidentAverage(pair)
    resident.set(thirds(pair.names), [1.0, 1.0, 1.0])
    assert all(torch.equal(pair.pre[n], t) for n, t in before.items())
    resident.set(thirds(pair.names), [0.0, 0.0, 0.0])
    assert gap(resident, pre) == 0


def test_a_wrapped_pair_is_measured_as_it_is_written(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    for folder in (pre, post):
        rewrite(folder, lambda t: {f"module._orig_mod.{n}": v for n, v in t.items()})
    resident = ResidentAverage(preflight(pre, post))
    resident.set(thirds(resident.pair.names), [0.2, 0.5, 0.8])
    average(pre, post, tmp_path / "out", [0.2, 0.5, 0.8])
    assert gap(resident, tmp_path / "out") == 0


def test_an_encoder_decoder_is_not_put_in_memory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found T5ForConditionalGeneration, an encoder-decoder; .* not measured"):
        ResidentAverage(preflight(*pair_of(tmp_path, t5)))
