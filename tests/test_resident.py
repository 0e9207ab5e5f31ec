"""The resident average: bits after any sequence of settings, gradients against finite differences."""

from __future__ import annotations

import contextlib
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from counterpoise.averaging import resident as averaging_resident
from counterpoise.averaging.mix import mix
from counterpoise.averaging.partition import by_module, layerwise, thirds, whole
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.preflight import preflight
from counterpoise.language import dtypes
from counterpoise.language.checkpointing import can_recompute, recomputed
from counterpoise.language.scoring import Example
from counterpoise.search.proxies import ProxySet
from families import build
from tiny import CAUSAL, save_pair, tiny


def proxies(batch: int = 4, seed: int = 0) -> ProxySet:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 60, (10, 12), generator=random).tolist()
    return ProxySet(tuple(Example(tuple(r[: 3 + i % 3]), tuple(r[6 : 8 + i % 4])) for i, r in enumerate(rows)), batch)


def check_bits(resident: ResidentAverage, cut, ratios) -> None:  # type: ignore[no-untyped-def]
    of = cut.ratios(resident.pair.names, ratios)
    state = resident.model.state_dict()
    for name in resident.pair.names:
        wanted = mix(*resident.pair.tensors(name), of[name])
        found = state.get(name, state.get(f"transformer.{name}"))
        assert torch.equal(found, wanted.to(found.dtype)), name


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gpt2", True), ("llama", False)])
@pytest.mark.parametrize("compute", [None, torch.float32])
def test_bits_after_any_sequence_of_settings(
    tmp_path: Path, family: str, tied: bool, compute: torch.dtype | None
) -> None:
    pair = preflight(*save_pair(tmp_path, family, dtype=torch.bfloat16, tied=tied))
    resident = ResidentAverage(pair, dtype=compute)
    cuts = [thirds(pair.names), layerwise(pair.names), by_module({n: pair.post.shape(n) for n in pair.names})]
    ratio = st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.2])
    step = st.sampled_from(cuts).flatmap(
        lambda c: st.tuples(st.just(c), st.lists(ratio, min_size=len(c), max_size=len(c)))
    )

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(step, min_size=1, max_size=4))
    def run(steps) -> None:  # type: ignore[no-untyped-def]
        for cut, ratios in steps:
            resident.set(cut, ratios)
        check_bits(resident, cut, ratios)

    run()


@pytest.mark.parametrize("compute", [None, torch.float32])
def test_held_in_memory_the_sides_give_the_same_bits_and_gradient(tmp_path: Path, compute: torch.dtype | None) -> None:
    pair = preflight(*save_pair(tmp_path, dtype=torch.bfloat16, scale=0.05))
    cut, ratios = thirds(pair.names), [0.2, 0.5, 0.9]
    streamed, held = ResidentAverage(pair, dtype=compute), ResidentAverage(pair, dtype=compute)
    held.hold("cpu")
    wanted, found = (r.loss_and_gradient(cut, ratios, proxies().backward) for r in (streamed, held))
    check_bits(held, cut, ratios)
    assert found[0] == wanted[0]
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)  # summed in longer spans


@pytest.mark.parametrize("family", CAUSAL)
def test_gradient_equals_finite_differences(tmp_path: Path, family: str) -> None:
    pair = preflight(*save_pair(tmp_path, family, dtype=torch.float64, scale=0.05))
    resident, cut = ResidentAverage(pair), thirds(pair.names)
    ratios = np.array([0.2, 0.5, 0.9])
    value, gradient = resident.loss_and_gradient(cut, ratios, proxies().backward)
    assert value == pytest.approx(proxies().nll(resident.model), rel=1e-9)
    # The norms of Llama-like models compute in float32 inside: the difference quotient is that much less exact.
    exact = family in ("gpt2", "gpt_neox")
    h = 1e-4 if exact else 3e-2
    for k in range(3):
        ends = []
        for sign in (1, -1):
            moved = ratios.copy()
            moved[k] += sign * h
            resident.set(cut, moved)
            ends.append(proxies().nll(resident.model))
        assert gradient[k] == pytest.approx(
            (ends[0] - ends[1]) / (2 * h), rel=1e-6 if exact else 2e-2, abs=1e-8 if exact else 1e-4
        )


def test_the_padding_token_has_its_gradient_where_it_stands_in_the_text(tmp_path: Path) -> None:
    folders = save_pair(tmp_path, "llama", dtype=torch.float64, scale=0.05, tied=True)
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 5}))
    pair = preflight(*folders)
    resident, cut = ResidentAverage(pair), thirds(pair.names)
    text = ProxySet(tuple(Example((1, 5, 5, 9 + i), (5, 20 + i, 5, 7)) for i in range(4)), 4)
    ratios, h = np.array([0.2, 0.5, 0.9]), 1e-2
    gradient = resident.loss_and_gradient(cut, ratios, text.backward)[1]
    numeric = []
    for step in h * np.eye(3):
        ends = []
        for moved in (ratios + step, ratios - step):
            resident.set(cut, moved)
            ends.append(text.nll(resident.model))
        numeric.append((ends[0] - ends[1]) / (2 * h))
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-5)


def test_gradient_does_not_depend_on_batches_and_leaves_nothing_behind(tmp_path: Path) -> None:
    pair = preflight(*save_pair(tmp_path, "gpt2", dtype=torch.float64))
    resident, cut = ResidentAverage(pair), layerwise(pair.names)
    for parameter in list(resident.model.parameters())[::2]:
        parameter.requires_grad_(False)
    before = [p.requires_grad for p in resident.model.parameters()]
    results = [resident.loss_and_gradient(cut, [0.5] * 6, proxies(batch).backward) for batch in (1, 4, 10)]
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-12)
        np.testing.assert_allclose(gradient, results[0][1], rtol=1e-9)
    assert all(p.grad is None for p in resident.model.parameters())
    assert [p.requires_grad for p in resident.model.parameters()] == before

    def fails(model: torch.nn.Module) -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        resident.loss_and_gradient(cut, [0.5] * 6, fails)
    assert all(not p._post_accumulate_grad_hooks for p in resident.model.parameters())


def test_a_splitting_of_blocks_splits_the_gradient(tmp_path: Path) -> None:
    pair = preflight(*save_pair(tmp_path, "gpt2", dtype=torch.float64))
    resident = ResidentAverage(pair)
    whole = resident.loss_and_gradient(thirds(pair.names), [0.4] * 3, proxies().backward)[1]
    parts = resident.loss_and_gradient(layerwise(pair.names), [0.4] * 6, proxies().backward)[1]
    np.testing.assert_allclose(whole, parts.reshape(3, 2).sum(1), rtol=1e-9)


def test_saved_from_the_base_class_without_prefix(tmp_path: Path) -> None:
    import transformers

    pre, post = save_pair(tmp_path, "gpt2")
    for folder in (pre, post):
        transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
    pair = preflight(pre, post)
    assert "h.0.attn.c_attn.weight" in pair.names
    resident = ResidentAverage(pair)
    resident.set(thirds(pair.names), [0.2, 0.4, 0.6])
    check_bits(resident, thirds(pair.names), [0.2, 0.4, 0.6])


def test_a_model_that_does_not_match_is_refused(tmp_path: Path) -> None:
    from tiny import tiny

    pair = preflight(*save_pair(tmp_path, "llama"))
    with pytest.raises(CheckpointError, match="not one to one"):
        ResidentAverage(pair, model=tiny("gpt2"))


def test_the_model_is_built_as_the_donor_says(tmp_path: Path) -> None:
    """What is measured is what the averaged checkpoint will be: PRE's weights may come with another config."""
    pre, post = save_pair(tmp_path)
    config = json.loads((post / "config.json").read_text())
    (post / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    pair = preflight(pre, post)
    assert [ResidentAverage(pair, donor=d).model.config.rms_norm_eps for d in ("pre", "post")] == [1e-6, 0.5]


def test_the_dtype_is_that_of_most_elements_and_wide_enough_for_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "slowdown", lambda dtype: 1.0)  # a device with bfloat16 arithmetic
    pre, post = save_pair(tmp_path, "llama", dtype=torch.bfloat16)
    tensors = load_file(post / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()  # safetensors puts it first in the file
    save_file(tensors, post / "model.safetensors", {"format": "pt"})
    model = ResidentAverage(preflight(pre, post)).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    halves = ResidentAverage(preflight(*save_pair(tmp_path / "half", "llama", dtype=torch.float16)))
    assert {p.dtype for p in halves.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_where_memory_is_short_layers_are_computed_again_and_the_gradient_is_the_same(
    tmp_path: Path, family: str
) -> None:
    pair = preflight(*save_pair(tmp_path, family))
    cut, ratios = layerwise(pair.names), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    wanted = ResidentAverage(pair).loss_and_gradient(cut, ratios, proxies().backward)
    resident, runs = ResidentAverage(pair), []

    def objective(model: torch.nn.Module) -> float:
        runs.append(resident.recomputes)
        loss = proxies().backward(model)
        if not resident.recomputes:  # gradients were consumed: they must not count twice
            torch.empty(1 << 50)
        return loss

    with pytest.warns(UserWarning, match="no memory for all that a gradient needs: layers are computed again"):
        found = resident.loss_and_gradient(cut, ratios, objective)
    assert runs == [False, True]
    assert found[0] == wanted[0]
    assert found[1].tolist() == wanted[1].tolist()
    assert not any(m.training for m in resident.model.modules())
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        resident.loss_and_gradient(cut, ratios, lambda model: float(torch.empty(1 << 50).sum()))


def test_what_found_no_memory_is_let_go_before_the_model_is_asked_what_else_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = preflight(*save_pair(tmp_path, "llama"))
    held, alive = list[weakref.ref[torch.Tensor]](), list[bool]()

    def objective(model: torch.nn.Module) -> float:
        logits = model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits
        held.append(weakref.ref(logits))
        return float(torch.empty(1 << 50).sum() + logits.sum())

    def asked(model: torch.nn.Module) -> bool:
        alive.append(held[0]() is not None)
        return False

    monkeypatch.setattr(averaging_resident, "can_recompute", asked)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        ResidentAverage(pair).loss_and_gradient(whole(pair.names), [0.5], objective)
    assert alive == [False]


def test_layers_that_are_computed_again_keep_less_for_the_backward_pass() -> None:
    model, kept = tiny("llama"), []
    assert can_recompute(model)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1] += tensor.nbytes
        return tensor

    for how in (contextlib.nullcontext(), recomputed(model)):
        kept.append(0)
        with how, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=torch.ones(4, 30, dtype=torch.long), use_cache=False)
    assert kept[1] < kept[0] / 2


def test_a_model_that_drops_values_in_its_layers_is_not_computed_again() -> None:
    model = build("opt", dropout=0.5)
    assert not can_recompute(model)
    assert can_recompute(build("opt", dropout=0.0))
