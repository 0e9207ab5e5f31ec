"""Logits and log-likelihoods of single responses: what weighted objectives and curvatures need beyond a summed loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoise.language.scoring import Example


class Batch(NamedTuple):
    """Examples as one left-padded batch; N counts the response tokens of all rows together.

    Attributes:
        keep: positions of the output that the model has to compute.
        picked_BC: which of them predict a response token.
    """

    inputs: dict[str, Tensor]
    keep: int
    picked_BC: Tensor
    targets_N: Tensor
    rows_N: Tensor


def batch(examples: Sequence[Example], device: torch.device) -> Batch:
    """Token ids, mask, positions and targets of some examples."""
    texts = [e.prompt + e.response for e in examples]
    width, longest = max(map(len, texts)), max(len(e.response) for e in examples)
    ids_BT = torch.tensor([[0] * (width - len(t)) + list(t) for t in texts], device=device)
    mask_BT = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts], device=device)
    lengths_B = torch.tensor([len(e.response) for e in examples], device=device)
    picked_BC = torch.arange(longest, device=device) >= longest - lengths_B[:, None]
    inputs = {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0),
    }
    rows_N = torch.arange(len(examples), device=device)[:, None].expand_as(picked_BC)[picked_BC]
    return Batch(inputs, longest + 1, picked_BC, ids_BT[:, -longest:][picked_BC], rows_N)


def chosen_logits(logits_BCV: Tensor, made: Batch) -> Tensor:
    """Of a model's output, the logits that predict response tokens: shape (N, V), in float32 or wider."""
    logits_NV = logits_BCV[:, -made.keep : -1][made.picked_BC]
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def row_nlls(model: nn.Module, examples: Sequence[Example], *, temperature: float = 1.0) -> Tensor:
    """Negative log-likelihood of each response, in nats, summed over its tokens: shape (B,), differentiable.

    Args:
        temperature: of the policy that is scored; its logits are divided by it.
    """
    made = batch(examples, next(model.parameters()).device)
    out = model(**made.inputs, use_cache=False, logits_to_keep=made.keep)
    nll_N = F.cross_entropy(chosen_logits(out.logits, made) / temperature, made.targets_N, reduction="none")
    return nll_N.new_zeros(len(examples)).index_add(0, made.rows_N, nll_N)
