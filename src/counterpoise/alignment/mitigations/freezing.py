"""Freezing the lowest layers, where the tasks share most of their features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from counterpoise.alignment.training.stepping import Mitigation, trainable
from counterpoise.averaging.partition import layerwise


@dataclass
class FreezeLowest(Mitigation):
    """The first `layers` layers and the input embeddings keep their weights.

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
        """Stop the gradients of what is frozen."""
        parameters = trainable(model)
        blocks = layerwise(list(parameters)).blocks
        if not 0 <= self.layers < len(blocks):
            raise ValueError(f"freeze: expected 0 to {len(blocks) - 1} layers (the model has {len(blocks)}), "
                             f"found {self.layers}")  # fmt: skip
        frozen = [parameters[name] for block in blocks[: self.layers] for name in block.tensors]
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        self._frozen = [*frozen, *embeddings.parameters()]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def finish(self, model: nn.Module) -> None:
        """Give the gradients back."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
