"""How far a student's next-token distribution q is from a teacher's p, and the gradient of that by the student's logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from counterpoise.language.chunks import spans, widened
from counterpoise.language.scoring import Scored


def reverse(own_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) of each row, (N,) in nats, and its gradient q (log q / p - KL): it seeks the teacher's modes."""
    q_NV, gap_NV = _ratio(own_NV.log_softmax(-1), teacher_NV.log_softmax(-1))
    value_N = (q_NV * gap_NV).sum(-1)
    return value_N, q_NV * (gap_NV - value_N[:, None])


def forward(own_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and its gradient q - p: it covers all that the teacher says."""
    p_NV, gap_NV = _ratio(teacher_NV.log_softmax(-1), own_NV.log_softmax(-1))
    return (p_NV * gap_NV).sum(-1), own_NV.softmax(-1) - teacher_NV.softmax(-1)


def jensen_shannon(own_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, at most log 2; its gradient q (log q / m - KL(q || m)) / 2."""
    own_NV, teacher_NV = own_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    middle_NV = torch.logaddexp(own_NV, teacher_NV) - math.log(2.0)
    (q_NV, gap_NV), (p_NV, other_NV) = _ratio(own_NV, middle_NV), _ratio(teacher_NV, middle_NV)
    value_N = (q_NV * gap_NV).sum(-1)
    return (value_N + (p_NV * other_NV).sum(-1)) / 2, q_NV * (gap_NV - value_N[:, None]) / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "reverse": reverse,
    "forward": forward,
    "jensen-shannon": jensen_shannon,
}
"""What `--divergence` calls them."""


def diverge(scored: Scored, teacher_BCV: Tensor, kind: str, *, scale: float | None = None) -> list[float]:
    """The divergence of each response, in nats summed over its tokens; with `scale` its gradient, times it, goes back.

    The gradient by the logits is written down, in the place of the teacher's logits: beside the two models' logits of a
    micro-batch nothing of the vocabulary's size is held but some numbers at a time (`chunks.CHUNK`).
    """
    sums = [0.0] * len(scored.mask_BC)
    with torch.no_grad():
        gradient_BCV = teacher_BCV.to(scored.logits_BCV)
        for at in spans(scored.mask_BC, gradient_BCV.shape[-1]):
            value_N, slope_NV = DIVERGENCES[kind](widened(scored.logits_BCV[at]), widened(gradient_BCV[at]))
            sums[at[0]] += float(value_N.double().sum())
            if scale is not None:
                gradient_BCV[at] = slope_NV * scale
        gradient_BCV[~scored.mask_BC] = 0.0
    if scale is not None:
        scored.logits_BCV.backward(gradient_BCV)  # type: ignore[no-untyped-call]
    return sums


def _ratio(one_NV: Tensor, other_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the first log-distribution, and its log-ratio to the other; what has none counts nothing."""
    some_NV = one_NV.exp()
    return some_NV, (one_NV - other_NV).masked_fill_(some_NV == 0, 0.0)
