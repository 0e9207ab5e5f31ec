"""LoRA: only a low-rank update is trained. The only file that imports peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.alignment.training.sharding import part_like
from counterpoise.alignment.training.stepping import Mitigation
from counterpoise.language.sharded import own_part


@dataclass
class LowRank(Mitigation):
    """Train theta = pre + scale * B A on every linear layer of the blocks, A and B of rank `rank` (Hu et al. 2021).

    The paper (Lin et al. 2024) compares ranks 16 to 512. The adapter lives inside the model while it trains;
    checkpoints and the result are whole models, the update added in, so that they can be averaged like any other.

    Args:
        rank: at least 1.
        scale: of the update.
        seed: of A's random start; B starts at 0.

    Raises:
        ValueError: a rank below 1.
        ModuleNotFoundError: peft is not installed.

    >>> LowRank(16).describe()
    {'name': 'LowRank', 'rank': 16, 'scale': 2.0, 'seed': 0}
    """

    rank: int
    scale: float = 2.0
    seed: int = 0
    prepares = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora: expected a rank of at least 1, found {self.rank}")

    def start(self, model: nn.Module, tokenizer: object) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("lora needs peft; pip install 'counterpoise[align]'") from error
        from transformers.pytorch_utils import Conv1D

        alpha: Any = self.scale * self.rank
        transposed = any(isinstance(m, Conv1D) for m in model.modules())
        config = LoraConfig(r=self.rank, lora_alpha=alpha, target_modules="all-linear", fan_in_fan_out=transposed)
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            inject_adapter_in_model(config, model)
        model.to(device)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        adapters: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
        for name, module in adapters:
            base = module.get_base_layer()
            own_part(base.weight).add_(part_like(module.get_delta_weight("default"), base.weight))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, base)
        model.requires_grad_(True)


def is_low_rank(model: nn.Module) -> bool:
    """Whether an adapter is inside."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


@torch.no_grad()
def merged(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `model` with its LoRA updates added in, under the plain names; its tensors are whole."""
    from peft.tuners.lora import LoraLayer

    plain = {n.replace(".base_layer.", "."): t for n, t in state.items() if ".lora_" not in n}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight, update = plain[f"{name}.weight"], module.get_delta_weight("default")  # type: ignore[attr-defined]
            plain[f"{name}.weight"] = weight + update.to(weight.device)
    return plain
