"""Per-token log-probabilities of responses, differentiable. Shape suffixes: B rows, C response tokens, H hidden, V words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from counterpoise.language.scoring import Example, device_of, left_pad, position_ids_of


class Scored(NamedTuple):
    """One batch of responses as a model sees them; rows end together, so a short response has its padding in front.

    Attributes:
        logits_BCV: before each response token, float32 or wider.
        targets_BC: the response tokens.
        mask_BC: where a response token stands.
        hidden_BCH: the last hidden states before each response token.
    """

    logits_BCV: Tensor
    targets_BC: Tensor
    mask_BC: Tensor
    hidden_BCH: Tensor | None

    def logprobs(self, temperature: float = 1.0) -> Tensor:
        """log p(token) in nats, (B, C); 0 on padding. The distribution is the one sampled from at `temperature`."""
        logp_BC = torch.log_softmax(self.logits_BCV / temperature, dim=-1).gather(2, self.targets_BC[..., None])[..., 0]
        return logp_BC.masked_fill(~self.mask_BC, 0.0)


def score_responses(model: nn.Module, examples: Sequence[Example], *, hidden: bool = False) -> Scored:
    """Run `model` over prompts and responses; only the responses' positions go through the vocabulary-sized head."""
    device = device_of(model)
    ids_BT, mask_BT = left_pad([e.prompt + e.response for e in examples], 0, device)
    longest = max(len(e.response) for e in examples)
    out = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=position_ids_of(mask_BT),
        use_cache=False,
        logits_to_keep=longest + 1,
        output_hidden_states=hidden,
    )
    logits_BCV = out.logits[:, -(longest + 1) : -1]
    lengths_B = torch.tensor([len(e.response) for e in examples], device=device)
    mask_BC = torch.arange(longest, device=device) >= longest - lengths_B[:, None]
    return Scored(
        logits_BCV if logits_BCV.dtype == torch.float64 else logits_BCV.float(),
        ids_BT[:, -longest:],
        mask_BC,
        out.hidden_states[-1][:, -(longest + 1) : -1] if hidden else None,
    )
