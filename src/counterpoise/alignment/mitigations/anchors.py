"""Anchors to the model before alignment: L1 and L2 on its weights, KD on its predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from counterpoise.alignment.training.models import frozen_copy, weights_before
from counterpoise.alignment.training.sharding import own_part
from counterpoise.alignment.training.stepping import Mitigation, Step, trainable
from counterpoise.language.scoring import response_tokens, score_responses


@dataclass
class L1(Mitigation):
    """Pull the weights towards those before alignment by strength * |theta - pre|_1 (Lin et al. 2024).

    Departs from a term in the loss: the proximal form. After the optimiser's update, theta moves to
    pre + sign(d) max(|d| - learning_rate * strength, 0) with d = theta - pre, so that weights return to PRE exactly,
    where a subgradient makes them swing around it. Adam moves a weight by about the learning rate, so a strength of 1
    undoes a whole step and the paper's grid 0.04 .. 1 spans its range.

    Args:
        strength: at least 0.
        pre: weights before alignment, best a `Checkpoint` (memory-mapped); None copies the model's when it starts.

    Raises:
        ValueError: a negative strength; at start, a parameter that `pre` does not hold.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
    tensor([-2.,  0.,  1.])
    """

    strength: float
    pre: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _refuse_negative("l1", self.strength)

    def start(self, model: nn.Module, tokenizer: object) -> None:
        """Find PRE's tensor of each trained parameter."""
        self._pre = weights_before(model, self.pre, "l1")

    @torch.no_grad()
    def after_update(self, step: Step) -> None:
        """Soft-threshold the distance to PRE."""
        for name, parameter in trainable(step.model).items():
            own = own_part(parameter)
            pre = self._pre[name].to(own)
            own.copy_(pre + soft_threshold(own - pre, step.learning_rate * self.strength))


@dataclass
class L2(Mitigation):
    """Pull the weights towards those before alignment by strength * |theta - pre|_2^2 (Lin et al. 2024).

    The gradient form: 2 strength (theta - pre) is added to the gradient once per optimiser step, after clipping. The
    penalty is smooth, so this is the paper's loss as written, and its grid 0.01 .. 0.1 keeps its meaning; a decoupled
    form would shrink the distance by 2 learning_rate strength a step, which at the paper's learning rate is nothing.
    Departs in that clipping does not touch the penalty.

    Args:
        strength: at least 0.
        pre: weights before alignment, best a `Checkpoint` (memory-mapped); None copies the model's when it starts.

    Raises:
        ValueError: a negative strength; at start, a parameter that `pre` does not hold.

    >>> L2(0.1).describe()
    {'name': 'L2', 'strength': 0.1}
    """

    strength: float
    pre: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _refuse_negative("l2", self.strength)

    def start(self, model: nn.Module, tokenizer: object) -> None:
        """Find PRE's tensor of each trained parameter."""
        self._pre = weights_before(model, self.pre, "l2")

    @torch.no_grad()
    def before_update(self, step: Step) -> None:
        """Add the penalty's gradient."""
        for name, parameter in trainable(step.model).items():
            if parameter.grad is not None:
                own = own_part(parameter)
                own_part(parameter.grad).add_(own - self._pre[name].to(own), alpha=2 * self.strength)


@dataclass
class KD(Mitigation):
    """Distil the model before alignment: strength * mean over response tokens of KL(pre || theta), in nats.

    The paper (Lin et al. 2024) keeps the outputs close to PRE's on the training data; here on the prompts and
    responses of the same step, the prompts' own tokens left out. Costs one pass of PRE and one more of the model.
    The gradient by the logits is written down, softmax(theta's) - softmax(PRE's), in the place of PRE's: no further
    numbers of the vocabulary's size are kept.

    Args:
        strength: at least 0; the paper's grid is 1e-5, 1e-3, 1e-1.
        reference: PRE, best from `load_frozen` (memory-mapped); None copies the model when it starts.

    Raises:
        ValueError: a negative strength.

    >>> KD(0.1).describe()
    {'name': 'KD', 'strength': 0.1}
    """

    strength: float
    reference: nn.Module | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _refuse_negative("kd", self.strength)

    def start(self, model: nn.Module, tokenizer: object) -> None:
        """Copy the model unless a reference was given."""
        self._reference = frozen_copy(model) if self.reference is None else self.reference

    def add_gradients(self, step: Step) -> None:
        """Backpropagate the divergence over the step's examples."""
        tokens = response_tokens(step.examples)
        for rows in step.batches(step.examples):
            batch = [step.examples[i] for i in rows]
            with torch.no_grad():  # first, while nothing of the trained model's pass is kept
                pre_BCV = score_responses(self._reference, batch).logits_BCV
            scored = score_responses(step.model, batch)
            with torch.no_grad():
                gradient_BCV = pre_BCV.to(scored.logits_BCV)
                for own_CV, pre_CV, mask_C in zip(scored.logits_BCV, gradient_BCV, scored.mask_BC, strict=True):
                    pre_CV.copy_((own_CV.softmax(-1) - pre_CV.softmax(-1)) * mask_C[:, None])
                gradient_BCV *= rows.weight * self.strength / tokens
            scored.logits_BCV.backward(gradient_BCV)  # type: ignore[no-untyped-call]


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """The proximal map of threshold * |.|_1: sign(v) max(|v| - threshold, 0)."""
    return values - values.clamp(-threshold, threshold)


def _refuse_negative(name: str, strength: float) -> None:
    if not strength >= 0:
        raise ValueError(f"{name}: expected a strength of at least 0, found {strength}")
