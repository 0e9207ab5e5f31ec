"""Less alignment: the lowest layers keep their weights, training ends at a reward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from counterpoise.alignment.training.stepping import Mitigation, trainable
from counterpoise.averaging.partition import layerwise


@dataclass
class FreezeLowest(Mitigation):
    """The first `layers` layers and the input embeddings, where tasks share most of their features, keep their weights.

    No equation in the paper: its finding that averaging the input third costs no reward (Lin et al. 2024)
    suggests it. Where the head is tied to the embeddings it is frozen with them.

    Args:
        layers: from the input; 0 freezes the embeddings alone.

    Raises:
        ValueError: at start, fewer layers in the model.

    >>> FreezeLowest(2).describe()
    {'name': 'FreezeLowest', 'layers': 2}
    """

    layers: int
    prepares = True

    def start(self, model: nn.Module, tokenizer: object) -> None:
        parameters = trainable(model)
        blocks = layerwise(list(parameters)).blocks
        if not 0 <= self.layers < len(blocks):
            raise ValueError(
                f"freeze: expected 0 to {len(blocks) - 1} layers (the model has {len(blocks)}), found {self.layers}"
            )
        lowest = [parameters[name] for block in blocks[: self.layers] for name in block.tensors]
        self._frozen = [*lowest, *model.get_input_embeddings().parameters()]  # type: ignore[operator]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def finish(self, model: nn.Module) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)


@dataclass
class RewardBudget(Mitigation):
    """End training as soon as the mean reward of the model's own samples reaches `budget`: no more alignment than needed.

    The paper (Lin et al. 2024) stops RSF after 2, 4, 6 or 8 of 10 iterations, which the checkpoints of every
    iteration give without this. A budget is asked of the samples that an iteration draws anyway, before it learns from
    them: the model that is kept is the one that reached it.

    Args:
        budget: in units of the reward.

    >>> RewardBudget(0.5).stop(0.6)
    True
    """

    budget: float

    def stop(self, reward: float) -> bool:
        return reward >= self.budget
