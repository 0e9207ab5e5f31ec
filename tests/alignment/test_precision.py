"""Mixed precision: every forward pass in bfloat16, the weights as they were."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_align_commands import QUICK, asked, call, world  # noqa: F401  # a fixture
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from counterpoise.alignment.rsf import fine_tune
from counterpoise.alignment.settings import Settings
from counterpoise.alignment.training.precision import compute_in_bfloat16, weights_cast_once
from counterpoise.alignment.training.stepping import adam
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example, response_nll
from tiny import tiny, tokenizer

EXAMPLES = [Example((1, 5 + i), (7, 9, 11 + i)) for i in range(6)]


def test_weights_gradients_and_losses_stay_in_float32_and_near_those_of_float32() -> None:
    plain = tiny("llama")
    mixed = compute_in_bfloat16(copy.deepcopy(plain))
    losses = [response_nll(m, EXAMPLES) for m in (plain, mixed)]
    for loss in losses:
        loss.backward()
    assert losses[1].dtype == torch.float32
    assert losses[1].item() != losses[0].item()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-2)
    for one, two in zip(plain.parameters(), mixed.parameters(), strict=True):
        assert two.dtype == two.grad.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(one.grad.flatten(), two.grad.flatten(), dim=0) > 0.99


def test_a_copy_computes_alike_and_with_weights_of_its_own() -> None:
    mixed = compute_in_bfloat16(tiny("llama"))
    other = copy.deepcopy(mixed)
    before = response_nll(other, EXAMPLES).item()
    assert before == response_nll(mixed, EXAMPLES).item()
    with torch.no_grad():
        for p in mixed.parameters():
            p.zero_()
    assert response_nll(other, EXAMPLES).item() == before


def test_casts_are_kept_while_drawing_and_dropped_afterwards() -> None:
    model = compute_in_bfloat16(tiny("llama"))
    prompts = [e.prompt for e in EXAMPLES]
    drawn = sample(model, tokenizer(), prompts, Drawing(n=3, max_new_tokens=4))
    with weights_cast_once(model):
        assert sample(model, tokenizer(), prompts, Drawing(n=3, max_new_tokens=4)) == drawn
    before = response_nll(model, EXAMPLES).item()
    fine_tune(model, EXAMPLES, adam(model, 1e-2), Settings(batch_size=3, micro_batch_size=3), random.Random(0))
    assert response_nll(model, EXAMPLES).item() < 0.9 * before, "an update was not seen: stale copies of the weights"


class Casts(TorchDispatchMode):
    """Counts how often a tensor of one shape is cast."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do it."""
        self.count += function is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_is_cast_once_for_all_passes_frozen_or_not(frozen: bool) -> None:
    model = compute_in_bfloat16(nn.Linear(3, 5))
    model.weight.requires_grad_(not frozen)

    def casts() -> int:
        with torch.no_grad(), Casts(model.weight.shape) as seen:
            for _ in range(4):
                model(torch.ones(1, 3))
        return seen.count

    assert casts() == 4
    with weights_cast_once(model):
        assert casts() == 1
    assert model.weight.requires_grad is not frozen


def test_other_weights_than_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="bf16: expected float32 weights, found float64; give one of the two"):
        compute_in_bfloat16(nn.Linear(2, 2).double())


def test_a_pass_that_fails_leaves_no_autocast_behind() -> None:
    model = compute_in_bfloat16(nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 3))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("method", ["rsf", "ppo", "dpo"])
def test_the_command_trains_float32_weights_and_tells_of_it(world: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    drawn = {"rsf": [*asked(world), "--n", 2], "ppo": asked(world)}
    given = [*drawn[method], *QUICK] if method in drawn else ["--preferences", world / "pairs.jsonl", "--quiet"]
    made = call(world / "pre", "-o", tmp_path / "a", "--method", method, *given, "--kd", 0.1, "--bf16")
    assert made.exit_code == 0, made.output
    post, pre = open_checkpoint(tmp_path / "a"), open_checkpoint(world / "pre")
    moved = [not torch.equal(post[name], pre[name]) for name in pre]
    assert any(moved)
    assert {post.dtype(name) for name in post} == {torch.float32}
    assert '"bf16": true' in (tmp_path / "a" / "align.json").read_text()
    without = call(world / "pre", "-o", tmp_path / "b", "--method", method, *given, "--kd", 0.1)
    assert without.exit_code == 0, without.output
    other = open_checkpoint(tmp_path / "b")
    assert any(not torch.equal(post[name], other[name]) for name in post)
