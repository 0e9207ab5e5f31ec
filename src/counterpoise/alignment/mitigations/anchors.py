"""Anchors to the model before alignment: L1, L2 and online merging on its weights, KD on its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.alignment.divergences import diverge
from counterpoise.alignment.training.models import frozen_copy, weights_before
from counterpoise.alignment.training.sharding import part_like
from counterpoise.alignment.training.stepping import Mitigation, Step, trainable, weights_sha256
from counterpoise.language.scoring import response_tokens, score_responses
from counterpoise.language.sharded import own_part


@dataclass
class _Anchor(Mitigation):
    """What is pulled towards PRE by a strength."""

    strength: float

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            who = type(self).__name__.lower()
            raise ValueError(f"{who}: expected a strength of at least 0, found {self.strength}")


@dataclass
class _OnWeights(_Anchor):
    """With PRE's tensor of each trained parameter.

    Args:
        strength: at least 0.
        pre: weights before alignment, best a `Checkpoint` (memory-mapped); None copies the model's when it starts.

    Raises:
        ValueError: a negative strength; at start, a parameter that `pre` does not hold.
    """

    pre: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def start(self, model: nn.Module, tokenizer: object) -> None:
        self._pre = weights_before(model, self.pre, type(self).__name__.lower())

    def _held(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        """Each trained parameter, this process's part of it, and the same part of PRE's."""
        for name, parameter in trainable(model).items():
            own = own_part(parameter)
            yield parameter, own, self._pre[name].to(own)


@dataclass
class L1(_OnWeights):
    """Pull the weights towards those before alignment by strength * |theta - pre|_1 (Lin et al. 2024).

    Departs from a term in the loss: the proximal form. After the optimiser's update, theta moves to
    pre + sign(d) max(|d| - learning_rate * strength, 0) with d = theta - pre, so that weights return to PRE exactly,
    where a subgradient makes them swing around it. Adam moves a weight by about the learning rate, so a strength of 1
    undoes a whole step and the paper's grid 0.04 .. 1 spans its range.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
    tensor([-2.,  0.,  1.])
    """

    @torch.no_grad()
    def after_update(self, step: Step) -> None:
        for _, own, pre in self._held(step.model):
            own.copy_(pre + soft_threshold(own - pre, step.learning_rate * self.strength))


@dataclass
class L2(_OnWeights):
    """Pull the weights towards those before alignment by strength * |theta - pre|_2^2 (Lin et al. 2024).

    The gradient form: 2 strength (theta - pre) is added to the gradient once per optimiser step, after clipping. The
    penalty is smooth, so this is the paper's loss as written, and its grid 0.01 .. 0.1 keeps its meaning; a decoupled
    form would shrink the distance by 2 learning_rate strength a step, which at the paper's learning rate is nothing.
    Departs in that clipping does not touch the penalty.

    >>> L2(0.1).describe()
    {'name': 'L2', 'strength': 0.1}
    """

    @torch.no_grad()
    def before_update(self, step: Step) -> None:
        for parameter, own, pre in self._held(step.model):
            if parameter.grad is not None:
                own_part(parameter.grad).add_(own - pre, alpha=2 * self.strength)


@dataclass
class KD(_Anchor):
    """Distil the model before alignment: strength * mean over response tokens of KL(pre || theta), in nats.

    The paper (Lin et al. 2024) keeps the outputs close to PRE's on the training data; here on the prompts and
    responses of the same step, the prompts' own tokens left out. Costs one pass of PRE and one more of the model.

    Args:
        strength: at least 0; the paper's grid is 1e-5, 1e-3, 1e-1.
        reference: PRE, best from `load_frozen` (memory-mapped); None copies the model when it starts.

    Raises:
        ValueError: a negative strength.

    >>> KD(0.1).describe()
    {'name': 'KD', 'strength': 0.1}
    """

    reference: nn.Module | None = field(default=None, repr=False)

    def start(self, model: nn.Module, tokenizer: object) -> None:
        self._reference = frozen_copy(model) if self.reference is None else self.reference

    def add_gradients(self, step: Step) -> None:
        tokens = response_tokens(step.examples)
        for rows in step.batches(step.examples):
            batch = [step.examples[i] for i in rows]
            with torch.no_grad():  # first, while nothing of the trained model's pass is kept
                pre_BCV = score_responses(self._reference, batch).logits_BCV
            diverge(score_responses(step.model, batch), pre_BCV, "forward", scale=rows.weight * self.strength / tokens)


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
        self._steps = 0
        self._pre = weights_before(model, self.pre, "merging")
        self._base = None if self.base is None else weights_before(model, self.base, "merging, base")

    def before_update(self, step: Step) -> None:
        self._before = {name: own_part(p).detach().clone() for name, p in trainable(step.model).items()}

    @torch.no_grad()
    def after_update(self, step: Step) -> None:
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
        return super().describe() | ({} if self.base is None else {"base": weights_sha256(self.base)})

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}  # they decide the masks

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """The proximal map of threshold * |.|_1: sign(v) max(|v| - threshold, 0)."""
    return values - values.clamp(-threshold, threshold)
