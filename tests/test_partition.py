"""Partitions: every tensor in exactly one block, or outside the layers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from counterpoise.averaging.partition import Block, Partition, by_module, equal, layerwise, partition, thirds
from tiny import FAMILIES, tiny


def names(layers: int) -> list[str]:
    return ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.w" for i in range(layers)), "lm_head.weight"]


@given(st.integers(1, 60), st.data())
def test_equal_blocks_differ_by_one_layer_at_most(layers: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, layers))
    cut = equal(names(layers), k)
    assert len(cut) == k
    assert [n for b in cut.blocks for n in b.layers] == list(range(layers))
    assert max(cut.weights) - min(cut.weights) <= 1
    assert cut.weights.sum() == layers
    assert cut.rest == ("model.embed_tokens.weight", "lm_head.weight")


def test_26_layers_in_nine_blocks_are_not_eight_of_two_and_one_of_ten() -> None:
    assert sorted(equal(names(26), 9).weights) == [2, *[3] * 8]
    assert list(thirds(names(26)).weights) == [9, 8, 9]


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_the_rest_takes_the_layer_weighted_mean(ratios: list[float]) -> None:
    cut = equal(names(10), 4)
    of = cut.ratios(names(10), ratios)
    layers = [r for n, r in of.items() if ".layers." in n]
    assert of["lm_head.weight"] == pytest.approx(sum(layers) / 10, abs=1e-12)


@given(st.floats(0, 2))
def test_equal_ratios_are_exactly_the_plain_average(ratio: float) -> None:
    assert set(thirds(names(26)).ratios(names(26), [ratio] * 3).values()) == {ratio}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family_has_one_place(family: str) -> None:
    shapes = {n: t.shape for n, t in tiny(family).state_dict().items()}
    for cut in (thirds(shapes), layerwise(shapes), by_module(shapes)):
        placed = [t for b in cut.blocks for t in b.tensors] + list(cut.rest)
        assert sorted(placed) == sorted(shapes)
        assert not any(".0." in n or ".5." in n for n in cut.rest)
    assert len(layerwise(shapes)) == 6
    norms = [b.name for b in thirds(shapes).blocks for t in b.tensors if "norm" in t.lower() or "ln_" in t]
    assert len(set(norms)) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_outside_the_layers_can_be_a_block(family: str) -> None:
    shapes = {n: t.shape for n, t in tiny(family).state_dict().items()}
    for cut in (thirds(shapes), layerwise(shapes), by_module(shapes)):
        wider = cut.with_rest_block()
        assert wider.blocks[:-1] == cut.blocks
        assert wider.blocks[-1].tensors == cut.rest
        assert wider.rest == ()
        assert wider.with_rest_block() is wider
        ratios = np.linspace(0, 1, len(wider))
        of = wider.ratios(shapes, ratios)
        assert {of[n] for n in cut.rest} == {1.0}
        assert all(of[t] == r for b, r in zip(cut.blocks, ratios, strict=False) for t in b.tensors)
    counted = layerwise(shapes).with_rest_block(weight=6.0)
    assert counted.mean([*[0.0] * 6, 1.0]) == pytest.approx(0.5)


def test_by_module_cuts_across_layers_and_weighs_parameters() -> None:
    shapes = {n: t.shape for n, t in tiny("llama").state_dict().items()}
    cut = {b.name: b for b in by_module(shapes).blocks}
    assert cut["self_attn.q_proj"].weight == 6 * 16 * 16
    assert cut["mlp.up_proj"].weight == 6 * 16 * 24


def test_experts_are_one_kind_and_belong_to_their_layer() -> None:
    moe = {f"model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight": (4, 4) for i in range(3) for e in range(8)}
    assert [len(b.tensors) for b in thirds(moe).blocks] == [8, 8, 8]
    assert [b.name for b in by_module(moe).blocks] == ["experts"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no layers found"):
        thirds(["weight"])
    with pytest.raises(ValueError, match=r"expected between 1 and 2 .*found 3"):
        thirds(names(2))
    with pytest.raises(
        ValueError, match=r"one stack of layers, or an encoder and a decoder, found left.block, right.block"
    ):
        thirds([f"{s}.block.{i}.w" for s in ("left", "right") for i in range(3)])
    with pytest.raises(ValueError, match=r"in no block, first other.weight"):
        thirds(names(3)).ratios(["other.weight"], [0, 0, 0])
    with pytest.raises(ValueError, match=r"expected 3 ratios, found 2"):
        thirds(names(3)).ratios(names(3), [0, 0])
    with pytest.raises(ValueError, match=r"stands in two blocks"):
        Partition("mine", (Block("a", 1, ("x",), (0,)), Block("b", 1, ("x",), (1,))))
    with pytest.raises(ValueError, match=r"a number, layerwise or module, found 'quarters'"):
        partition(dict.fromkeys(names(3), (1,)), "quarters")


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("model.language_model.layers", ["model.encoder.layers"]),  # ears that are called encoder
        ("model.layers", ["model.protein_encoder.model.encoder.layer", "model.gated_cross_attn_layers"]),
        ("language_model.model.layers", ["vision_tower.vision_model.encoder.layers", "audio_tower.layers"]),
        ("model.text_model.layers", ["model.vision_model.encoder.layers", "model.connector.blocks"]),
        ("model.layers", ["visual.blocks", "mtp.layers", "model.altup_projections"]),
    ],
)
def test_the_stack_that_reads_text_is_cut(text: str, others: list[str]) -> None:
    held = [f"{text}.{i}.{m}.weight" for i in range(6) for m in ("q", "k", "v", "o", "up")]
    rest = [f"{p}.{i}.w" for p in others for i in range(6)]
    cut = thirds([*rest, *held])
    assert {t for b in cut.blocks for t in b.tensors} == set(held)
    assert set(cut.rest) == set(rest)


@pytest.mark.parametrize(
    "sides", [("encoder.encoder.layer", "decoder.bert.encoder.layer"), ("model.encoder.layers", "model.decoder.layers")]
)
def test_an_encoder_and_a_decoder_of_other_depths_are_both_cut(sides: tuple[str, str]) -> None:
    held = [f"{p}.{i}.w" for p, n in zip(sides, (24, 2), strict=True) for i in range(n)]
    cut = equal(held, 2)
    assert [b.name for b in cut.blocks] == [
        "encoder layers 0-11, decoder layer 0",
        "encoder layers 12-23, decoder layer 1",
    ]
    assert len(layerwise(held)) == 24
    assert cut.rest == ()


def test_experts_beside_the_attention_leave_it_a_block_of_its_own() -> None:
    """Gemma 4's layers hold experts and router themselves, without a module around the two."""
    inside = {
        "experts.gate_up_proj": (4, 8, 8),
        "router.proj.weight": (4, 8),
        "self_attn.q_proj.weight": (8, 8),
        "norm.weight": (8,),
    }
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in inside.items()}
    cut = {b.name: len(b.tensors) for b in by_module(shapes).blocks}
    assert cut == {"experts": 2, "router": 2, "self_attn.q_proj": 2, "norm": 2}
