"""The model before alignment, as a mitigation sees it: its weights by parameter name, or a frozen model that runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.alignment.mitigations.lowrank import is_low_rank
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.precision import M, compute_in_bfloat16, refuse_bf16_of
from counterpoise.alignment.training.sharding import part_like, shard as cut_up
from counterpoise.alignment.training.stepping import trainable
from counterpoise.checkpoints.checkpoint import match_name
from counterpoise.checkpoints.files import CheckpointError, first_line
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.language.checkpointing import recompute_steps
from counterpoise.language.loading import refuse_damaged, without_bars
from counterpoise.language.sharded import own_part
from counterpoise.ranks import is_sharded


@dataclass(frozen=True)
class Machine:
    """Where and how precisely a model is trained.

    Attributes:
        dtype: of the weights while they are trained, and as they are written; updates at learning rates of 1e-6 need
            float32.
        bf16: mixed precision, see `compute_in_bfloat16`.
        shard: cut weights, gradients and moments up among the processes (FSDP2).
        recompute: a step keeps the inputs of layers alone, and computes them again in its backward pass.
    """

    dtype: torch.dtype = torch.float32
    bf16: bool = False
    shard: bool = False
    device: str = "cpu"
    recompute: bool = False

    def check(self) -> None:
        """Raise a ValueError for mixed precision of other weights than float32, and for float16 weights."""
        if self.dtype == torch.float16:
            raise ValueError(
                "dtype: expected float32 or bfloat16 weights to train, found float16, in which Adam's 1e-8 is 0"
            )
        if self.bf16:
            refuse_bf16_of(self.dtype)

    def readied(self, model: M) -> M:
        """The model on this process's device, in mixed precision with `bf16`, its weights cut up with `shard`."""
        own = processes.own_device(self.device)
        model = cut_up(model, own, bf16=self.bf16) if self.shard else model.to(own)
        return compute_in_bfloat16(model) if self.bf16 else model


WITH_LORA = "with LoRA, whose factors are no part of PRE, use kd, replay or sma"


def weights_before(model: nn.Module, pre: Mapping[str, Tensor] | None, who: str) -> dict[str, Tensor]:
    """For each trained parameter of `model` its tensor before alignment; of one that is cut up, this process's rows.

    Args:
        pre: a `Checkpoint`, whose tensors stay memory-mapped, or any mapping of names to tensors; None copies the
            model's own weights, which takes as much memory again.
        who: names the mitigation in errors.

    Raises:
        ValueError: `pre` has no such tensor, or one of another shape; a factor of LoRA, which is no part of PRE.
    """
    parameters = trainable(model)
    if pre is None and not is_low_rank(model):
        return {name: own_part(p).detach().clone() for name, p in parameters.items()}
    held = {} if pre is None else pre
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        match = match_name(name, held)
        if match is None or held[match].shape != parameter.shape:
            other = "none of that name" if match is None else f"one of shape {tuple(held[match].shape)}"
            raise ValueError(
                f"{who}: expected the weights before alignment to hold {name} of shape {tuple(parameter.shape)}, "
                f"found {other}; {WITH_LORA}"
            )
        found[name] = part_like(held[match], parameter)
    return found


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` that is never trained; of one that is cut up among processes there is none (a ValueError)."""
    if is_sharded(model):
        raise ValueError(
            "reference: expected one beside a model that `shard` cut up, found none; give load_frozen(..., shard=True)"
        )
    return copy.deepcopy(model).requires_grad_(False).eval()


def load_frozen(source: str | Path, machine: Machine | None = None) -> nn.Module:
    """The model of a checkpoint, never trained, its weights memory-mapped where its dtype and device allow.

    On the CPU and in the checkpoint's own dtype, as without a `machine`, the weights are views of the file: they can be
    dropped from memory when it is short, and several processes share them.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(source)
    with without_bars():
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype="auto" if machine is None else machine.dtype, trust_remote_code=False
        )
    refuse_damaged(model, checkpoint.source)
    machine = machine or Machine()
    if torch.device(machine.device).type == "cpu":
        for name, parameter in model.named_parameters():
            match = match_name(name, checkpoint)
            if match and checkpoint.dtype(match) == parameter.dtype and checkpoint.shape(match) == parameter.shape:
                parameter.data = checkpoint[match]
    return machine.readied(model).requires_grad_(False).eval()


def load(folder: Path, machine: Machine = Machine()) -> tuple[Any, Any]:
    """The causal language model and the tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: no causal language model, one whose head is missing, damaged weights, or no tokenizer.
        ValueError: layers that cannot be computed again, where `machine` asks for that.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=machine.dtype, trust_remote_code=False, output_loading_info=True
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: expected a causal language model with its tokenizer, found: {first_line(error)}"
        ) from None
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder}: expected a causal language model, found a checkpoint without {missing[0]} (a classifier, or "
            "another head); give the model that writes text"
        )
    refuse_damaged(model, folder)
    model = machine.readied(model).eval()
    return recompute_steps(model) if machine.recompute else model, tokenizer
