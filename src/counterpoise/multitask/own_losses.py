"""The loss that a model of transformers computes from its labels, taken apart: one value per example, or per token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Labels = Tensor | Mapping[str, Tensor]
"""The label column of a batch, or the columns by name where the model takes several (or none)."""

SPAN = ("start_positions", "end_positions")
IGNORED = -100
_POOLED = re.compile("For(Sequence|Image|Video|Audio)Classification")


def problem(model: Any, labels: Tensor) -> str | None:
    """What a head with one row of logits per example is trained for, by transformers' own rule; None: another head.

    The config says it, else `num_labels` does, and only then the labels' type (ForSequenceClassificationLoss): whole
    numbers in the labels of a model with one output are still a regression's.
    """
    config = getattr(model, "config", None)
    said: str | None = getattr(config, "problem_type", None)
    if not any(_POOLED.search(c.__name__) for c in type(model).__mro__):
        return said or "regression" if labels.is_floating_point() else None
    if said:
        return said
    if getattr(config, "num_labels", 2) == 1:
        return "regression"
    whole = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if whole else "multi_label_classification"


def counted(model: Any, labels: Labels, *, shifts: bool, length: int) -> Tensor:
    """How much each label counts, (B, T): 1, or 0 where it is masked; one per example where the loss is one.

    Args:
        shifts: labels are those of the next token.
        length: tokens of an input; a span's position from there on is masked.
    """
    if not isinstance(labels, Tensor):
        ends_B2 = torch.stack([labels[name].reshape(-1) for name in SPAN], dim=1)
        return 0.5 * (ends_B2 < length).float()
    labels_BT = labels.reshape(len(labels), -1)
    kind = problem(model, labels)
    if kind in ("regression", "multi_label_classification"):
        return torch.ones(len(labels), 1, device=labels.device)
    return (labels_BT[:, 1:] if shifts and kind is None else labels_BT).ne(IGNORED).float()


def own_losses(model: Any, outputs: Any, labels: Labels, *, shifts: bool) -> Tensor:
    """Losses with one row per example, (B, T), 0 where a label is masked: their sum over that of `counted` is the
    model's own loss, of any one example or of the batch.

    Raises:
        ValueError: logits and labels that belong to none of the heads known here.
    """
    if getattr(outputs, "log_probs", None) is not None:  # TRL's fused head: per token, 0 on ignored positions
        return -outputs.log_probs  # type: ignore[no-any-return]
    if not isinstance(labels, Tensor):
        both = [(_part(outputs, n.replace("positions", "logits")), labels[n].reshape(-1)) for n in SPAN]
        ends = [
            F.cross_entropy(x, y.to(x.device).clamp(0, x.shape[1]), ignore_index=x.shape[1], reduction="none")
            for x, y in both
        ]
        return 0.5 * torch.stack(ends, dim=1)
    logits = _part(outputs, "logits")
    kind, rows = problem(model, labels), len(labels)
    if kind is not None:
        logits, labels = logits.reshape(rows, -1), labels.reshape(rows, -1)
        if kind == "single_label_classification" and labels.shape[1] == 1:
            return F.cross_entropy(logits, labels[:, 0], ignore_index=IGNORED, reduction="none").unsqueeze(-1)
        if logits.shape == labels.shape:
            several = kind == "multi_label_classification"
            loss = F.binary_cross_entropy_with_logits if several else F.mse_loss
            return loss(logits, labels.float(), reduction="none").mean(-1, keepdim=True)
    elif shifts:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if kind is not None or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} are neither those of a language model nor "
            f"of token or sequence classification{f' ({kind})' if kind else ''}: pass example_losses=... (outputs and "
            f"labels to (B,) losses)."
        )
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    return losses.reshape(rows, -1)


def refuse_another_loss(model: Any, own: Any, ours: Tensor) -> None:
    """Raise when the model's own loss of a batch is not the mean that `own_losses` gives: it would train another one."""
    if own is None or not bool(own.isfinite().all()):
        return
    tolerance, own = (1e-3 if own.dtype in (torch.float32, torch.float64) else 3e-2), own.detach()
    if abs(float(own) - float(ours)) > tolerance * max(1.0, abs(float(own))):
        config = getattr(model, "config", None)
        raise ValueError(
            f"{type(model).__name__}: its own loss of the first batch is {float(own):.5g}, and {float(ours):.5g} as the "
            f"mean over examples that its head suggests (problem_type={getattr(config, 'problem_type', None)!r}): "
            f"correct problem_type in its config, or pass example_losses=... (outputs and labels to (B,) losses)."
        )


def _part(outputs: Any, name: str) -> Tensor:
    found = outputs.get(name) if isinstance(outputs, Mapping) else outputs[1] if name == "logits" else None
    if not isinstance(found, Tensor):
        raise ValueError(f"expected {name} in the model's outputs, found none: pass example_losses=...")
    return found.float()
