"""Online merging: every optimiser step is itself an average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.alignment.training.models import weights_before
from counterpoise.alignment.training.sharding import own_part, part_like
from counterpoise.alignment.training.stepping import Mitigation, Step, trainable, weights_sha256


@dataclass
class OnlineMerging(Mitigation):
    """Merge each update with the update that made PRE (Lu et al. 2024, arXiv 2405.17931: OnDARE).

    theta_t = theta_{t-1} + (1 - weight) D(u_t) + weight D(tau), where u_t is the optimiser's update, tau = pre - base the
    update of instruction tuning, and D keeps each element with probability `keep`, the rest becoming 0, not rescaled.
    Departs: without `base` (a checkpoint before instruction tuning is often not at hand) tau = pre - theta_{t-1}, the
    merge of the two models themselves; tau is not clamped and its mask is drawn anew each step, not once; OnTIES and
    merging every k-th step are not here.

    Args:
        weight: of tau, in [0, 1]; 0 is no merging. It acts at every step: with a base think of 1e-4, not of 0.1.
        keep: share of elements kept, in (0, 1].
        base, pre: weights before instruction tuning, and before alignment; best a `Checkpoint`. One more copy of the
            weights is held for the length of a step.

    Raises:
        ValueError: a number out of range; at start, a parameter that `pre` or `base` does not hold.

    >>> OnlineMerging(0.01).describe()
    {'name': 'OnlineMerging', 'weight': 0.01, 'keep': 1.0, 'seed': 0}
    """

    weight: float
    keep: float = 1.0
    seed: int = 0
    base: Mapping[str, Tensor] | None = field(default=None, repr=False)
    pre: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"merging: expected a weight in [0, 1], found {self.weight}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"merging: expected keep in (0, 1], found {self.keep}")

    def start(self, model: nn.Module, tokenizer: object) -> None:
        """Find PRE's and the base's tensors."""
        self._steps = 0
        self._pre = weights_before(model, self.pre, "merging")
        self._base = None if self.base is None else weights_before(model, self.base, "merging, base")

    def before_update(self, step: Step) -> None:
        """Remember the weights."""
        self._before = {name: own_part(p).detach().clone() for name, p in trainable(step.model).items()}

    @torch.no_grad()
    def after_update(self, step: Step) -> None:
        """Replace the update by the merged one."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self._steps)
        for name, parameter in trainable(step.model).items():
            before, own = self._before[name], own_part(parameter)
            tau = self._pre[name].to(own) - (before if self._base is None else self._base[name].to(own))
            kept = [self._thinned(values, parameter, random) for values in (own - before, tau)]
            own.copy_(before + (1 - self.weight) * kept[0] + self.weight * kept[1])
        del self._before
        self._steps += 1

    def _thinned(self, values: Tensor, parameter: Tensor, random: torch.Generator) -> Tensor:
        if self.keep == 1:
            return values
        mask = torch.rand(parameter.shape, generator=random) < self.keep
        return values * part_like(mask, parameter).to(values.device)

    def describe(self) -> dict[str, Any]:
        """With the fingerprint of a base."""
        return super().describe() | ({} if self.base is None else {"base": weights_sha256(self.base)})

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, which decides the masks."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._steps = state["steps"]
