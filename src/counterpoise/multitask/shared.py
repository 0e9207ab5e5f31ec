"""The parameters that all tasks share, for the methods that look at each task's gradient on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def shared_parameters(shared: Iterable[Tensor]) -> list[Tensor]:
    """The list of parameters, refusing an empty, repeating or frozen one.

    Example:
        >>> len(shared_parameters(torch.nn.Linear(2, 2).parameters()))
        2
    """
    if isinstance(shared, Tensor):
        raise TypeError("shared must be an iterable of parameters, found one tensor: write [parameter].")
    parameters = list(shared)
    if not parameters:
        raise ValueError("shared must hold at least one parameter, found none. A used-up generator? Pass a list.")
    if wrong := [type(p).__name__ for p in parameters if not isinstance(p, Tensor)]:
        raise TypeError(f"shared must hold parameters, found {wrong[0]}: pass module.parameters().")
    if len({id(p) for p in parameters}) != len(parameters):
        raise ValueError("shared holds the same parameter more than once.")
    if frozen := sum(not p.requires_grad for p in parameters):
        raise ValueError(f"shared holds {frozen} parameter(s) with requires_grad=False: leave the frozen ones out.")
    return parameters


def jacobian(losses: Sequence[Tensor], parameters: list[Tensor]) -> Tensor:
    """d losses / d parameters, flattened and joined, (k, n): one backward pass per loss; the graph is kept."""
    rows = []
    for value in losses:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        rows.append(torch.cat([g.detach().reshape(-1) for g in flat]))
    return torch.stack(rows)
