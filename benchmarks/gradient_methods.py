"""Contenders of weighting_overhead.py that look at each task's gradient: ours, torchjd's and LibMTL's routes.

A contender takes tokens and labels, (tasks, rows, length) and (tasks, rows), and leaves gradients on the model. LibMTL
(pip install --no-deps LibMTL) is left out when it is not there. Its weightings are used as its own trainer uses them,
with one forward pass per task and the losses written into one tensor; the trainer itself wants `cuda:0`.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise import multitask

Step = Callable[[Tensor, Tensor], None]


def one_graph(model: Any, tokens_MBT: Tensor, labels_MB: Tensor) -> list[Tensor]:
    """The losses from one forward pass of all rows."""
    return list(model.losses(tokens_MBT, labels_MB).values())


def graph_per_task(model: Any, tokens_MBT: Tensor, labels_MB: Tensor) -> list[Tensor]:
    """The losses from one forward pass per task."""
    rows = zip(tokens_MBT, labels_MB, model.heads, strict=True)
    return [F.cross_entropy(head(model.features(tokens_BT)), labels_B) for tokens_BT, labels_B, head in rows]


def ours(model: Any, weighting: multitask.Weighting, losses: Callable[[Any, Tensor, Tensor], list[Tensor]]) -> Step:
    """One of this package's weightings, on these graphs."""

    def step(tokens_MBT: Tensor, labels_MB: Tensor) -> None:
        weighting(losses(model, tokens_MBT, labels_MB)).backward()
        weighting.step()

    return step


def torchjds(model: Any, aggregator: Any) -> Step:
    """torchjd's own route for hard sharing: Jacobians through the shared features, all rows at once."""
    from torchjd.autojac import jac_to_grad, mtl_backward

    def step(tokens_MBT: Tensor, labels_MB: Tensor) -> None:
        m, b, t = tokens_MBT.shape
        features = model.features(tokens_MBT.reshape(m * b, t))
        parts = zip(features.split(b), labels_MB, model.heads, strict=True)
        losses = [F.cross_entropy(head(x_BF), labels_B) for x_BF, labels_B, head in parts]
        mtl_backward(
            losses,
            features=features,
            tasks_params=[list(head.parameters()) for head in model.heads],
            shared_params=model.shared(),
        )
        jac_to_grad(model.shared(), aggregator)

    return step


def libmtls(model: Any, name: str, **settings: object) -> Step | None:
    """A weighting of LibMTL on the model's shared parameters, or None without LibMTL."""
    if "LibMTL" not in sys.modules:
        spec = importlib.util.find_spec("LibMTL")
        if spec is None or spec.submodule_search_locations is None:
            return None
        # Its __init__ imports image models and with them torchvision; the weightings need neither.
        package = types.ModuleType("LibMTL")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["LibMTL"] = package
    from LibMTL import weighting as methods

    tasks = len(model.heads)

    class Theirs(getattr(methods, name)):  # type: ignore[misc]
        """What its trainer's model gives a weighting."""

        def get_share_params(self) -> Sequence[nn.Parameter]:
            return model.shared()

        def zero_grad_share_params(self) -> None:
            # To zeros, as the torch of its time did; with torch 2's None its next line fails.
            for parameter in model.shared():
                parameter.grad = torch.zeros_like(parameter)

    method = Theirs()
    method.task_num, method.rep_grad, method.device = tasks, False, torch.device("cpu")
    method.init_param()
    # GradNorm sums the losses in its first epoch: this is the second, after losses of 1.
    method.epoch, method.train_loss_buffer = 1, torch.ones(tasks, 2).numpy()

    def step(tokens_MBT: Tensor, labels_MB: Tensor) -> None:
        losses = torch.zeros(tasks)
        for i, loss in enumerate(graph_per_task(model, tokens_MBT, labels_MB)):
            losses[i] = loss
        method.backward(losses, **settings)

    return step


def contenders(model: Any, tasks: Sequence[str]) -> dict[str, Step]:
    """All that can be built here, by name."""
    import torchjd.aggregation

    shared = model.shared()
    last = shared[:-1]  # the convolutions, without the embedding
    found: dict[str, Step | None] = {
        "mgda, a graph per task": ours(model, multitask.MGDA(tasks, shared=shared), graph_per_task),
        "mgda, one graph": ours(model, multitask.MGDA(tasks, shared=shared), one_graph),
        "torchjd mgda (mtl_backward)": torchjds(model, torchjd.aggregation.MGDA()),
        "libmtl mgda": libmtls(model, "MGDA", mgda_gn="none"),
        "gradnorm, a graph per task": ours(model, multitask.GradNorm(tasks, shared=last), graph_per_task),
        "gradnorm, one graph": ours(model, multitask.GradNorm(tasks, shared=last), one_graph),
        "libmtl gradnorm": libmtls(model, "GradNorm", alpha=1.5),
    }
    return {name: step for name, step in found.items() if step is not None}
