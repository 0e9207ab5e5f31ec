"""Log-probabilities in chunks: the same bits as in one piece, and nothing large in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from counterpoise.language import chunks
from counterpoise.language.chunks import token_logprobs
from counterpoise.language.scoring import Example, continuation_logprobs, response_nll, row_nlls, score_responses
from tiny import tiny

B, C, V = 3, 7, 50
MASK = torch.arange(C) >= torch.tensor([[0], [4], [2]])
EXAMPLES = [Example((1, 5, 9), (7, 8, 11, 12)), Example((1, 7), (20,)), Example((1,), (30, 31, 32, 33, 34, 35))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("mask_BC", [MASK, MASK.flip(1)])
def test_values_and_gradients_are_those_of_cross_entropy_to_the_bit(
    dtype: torch.dtype, temperature: float, mask_BC: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(B, C, V, generator=random)).to(dtype)
    targets = torch.randint(V, (B, C), generator=random)
    weights_BC = torch.rand(B, C, generator=random).to(torch.promote_types(dtype, torch.float32))
    plain = logits.clone().requires_grad_(True)
    wide = plain if dtype == torch.float64 else plain.float()
    nll_N = F.cross_entropy(wide[mask_BC] / temperature, targets[mask_BC], reduction="none")
    (nll_N * weights_BC[mask_BC]).sum().backward()
    for chunk in (1, 4 * V, 1 << 22):
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        own = logits.clone().requires_grad_(True)
        found = token_logprobs(own, targets, mask_BC, temperature)
        (-found * weights_BC)[mask_BC].sum().backward()
        assert torch.equal(-found[mask_BC], nll_N)
        assert not found[~mask_BC].any()
        assert own.grad is not None
        assert plain.grad is not None
        assert torch.equal(own.grad, plain.grad)


class Largest(TorchDispatchMode):
    """The most numbers in a float32 tensor that an operation gives."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.found = max(self.found, tensor.numel())
        return out


def test_no_float32_tensor_is_as_large_as_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 64)
    model = tiny("llama", dtype=torch.bfloat16)
    all_logits = len(EXAMPLES) * 6 * 64
    score_responses(model, EXAMPLES)  # how it pads is measured once, on other rows
    for loss in (lambda: response_nll(model, EXAMPLES), lambda: row_nlls(model, EXAMPLES, temperature=0.7).sum()):
        with Largest() as largest:
            loss().backward()
        assert 64 <= largest.found < all_logits
    with Largest() as largest:
        continuation_logprobs(model, [e.prompt for e in EXAMPLES], [[e.response] for e in EXAMPLES])
    assert 64 <= largest.found < all_logits


def test_a_derivative_along_a_direction_is_the_gradients() -> None:
    random = torch.Generator().manual_seed(1)
    logits, along = (torch.randn(B, C, V, generator=random, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(V, (B, C), generator=random)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, along)
        moved = torch.autograd.forward_ad.unpack_dual(token_logprobs(dual, targets, MASK, 0.7)).tangent
    own = logits.clone().requires_grad_(True)
    [gradient] = torch.autograd.grad(token_logprobs(own, targets, MASK, 0.7).sum(), own)
    assert moved.sum().item() == pytest.approx((gradient * along).sum().item(), rel=1e-12)
