"""The parameters that all tasks share, and the tasks' gradients on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from counterpoise.multitask.values import wide

_STEEP = (2.0**15, 2.0**8, 1.0)
"""How many times a loss a pass starts from, the next where that overflows."""


def shared_parameters(shared: Iterable[Tensor]) -> list[Tensor]:
    """The list of parameters, refusing an empty, repeating or frozen one."""
    if not isinstance(shared, Iterable):
        raise TypeError(f"shared must be parameters, found {type(shared).__name__}: pass module.parameters().")
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


def jacobian(losses: Sequence[Tensor], parameters: list[Tensor]) -> tuple[Tensor, bool]:
    """d losses / d parameters, flattened and joined, (k, n), in float32 at least, and whether all of it is finite.

    One backward pass per loss; the graph is kept. A loss without a gradient, and a parameter frozen since, give zeros.
    A pass starts from a power of two times the loss, taken off again: in float16 small gradients would end as 0.

    Raises:
        RuntimeError: no loss depends on the parameters.
    """
    trained = [p for p in parameters if p.requires_grad]
    able = [x.requires_grad and bool(trained) for x in losses]
    with torch.autocast(losses[0].device.type, enabled=False):
        for steep in _STEEP:
            rows, reached = [], False
            for value, can in zip(losses, able, strict=True):
                found = (
                    torch.autograd.grad(
                        value, trained, torch.full_like(value, steep), retain_graph=True, allow_unused=True
                    )
                    if can
                    else [None] * len(trained)
                )
                by_id = {id(p): g for p, g in zip(trained, found, strict=True) if g is not None}
                reached = reached or bool(by_id)
                flat = [
                    by_id.get(id(p), torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape))
                    for p in parameters
                ]
                rows.append(wide(torch.cat([g.detach().to_dense().reshape(-1) for g in flat])).div_(steep))
            if any(able) and not reached:
                raise RuntimeError(
                    "no task's loss depends on the shared parameters: were they replaced or copied? Build the "
                    "weighting on the model that is trained."
                )
            rows_KN = torch.stack(rows)
            if finite := bool(rows_KN.isfinite().all()):
                break
    return rows_KN, finite


def refuse_other_width(parameters: list[Tensor], stored: Iterable[Tensor | None]) -> None:
    """Raise where a state holds numbers of other shared parameters."""
    here = sum(p.numel() for p in parameters)
    if wrong := [x.shape[-1] for x in stored if x is not None and x.shape[-1] != here]:
        raise ValueError(
            f"expected the state of {here} shared numbers, found that of {wrong[0]}: build the weighting on the shared "
            f"parameters of the saved run, or start without its state."
        )
