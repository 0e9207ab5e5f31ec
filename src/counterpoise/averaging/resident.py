"""One model in memory whose ratios are set in place, and the gradient of a loss with respect to those ratios."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from counterpoise.averaging.mix import Donor, mix
from counterpoise.averaging.partition import Partition
from counterpoise.checkpoints.checkpoint import match_name
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.preflight import Buffers, Pair, stretches
from counterpoise.checkpoints.rounding import key_of, wide_dtype
from counterpoise.language.dtypes import computed_in
from counterpoise.language.loading import without_bars

Objective = Callable[[nn.Module], float]
"""Runs forward and backward of a loss over all its data and returns the loss; gradients land in the parameters."""


class ResidentAverage:
    """A model that can be any average of a pair without a checkpoint being written.

    After any sequence of settings each of its tensors equals mix(pre, post, r) bit for bit, as it would lie on disk,
    cast to the compute dtype. PRE and POST stay memory-mapped: beside the model itself, no copy of it is held.

    Args:
        pair: what `preflight` returned.
        model: a causal language model to use; by default PRE's weights under the donor's config.
        donor: "post" or "pre": whose config the model is built from, as the averaged checkpoint will have it.
        dtype: the compute dtype; by default POST's own, float32 for float16 and where the device would imitate it.
        device: where the model runs. The mixing is done on the CPU on every device, so that the bits are the same.

    Raises:
        CheckpointError: the model's parameters and the tensors on disk are not one to one (fused experts).
    """

    def __init__(
        self,
        pair: Pair,
        *,
        model: nn.Module | None = None,
        donor: Donor = "post",
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.pair = pair
        model = _load(pair, donor, dtype or compute_dtype(pair, device)) if model is None else model
        self.model = model.to(device).eval()
        words = self.model.get_input_embeddings()  # type: ignore[operator]
        words.padding_idx = None  # or the gradient of that token is dropped where it stands in a text
        self._tensors = _match(pair, self.model)
        self._ratios: dict[str, float] = {}
        self._buffers = Buffers()

    def set(self, partition: Partition, ratios: Sequence[float] | np.ndarray) -> None:
        """Move the model to the average with one ratio per block; tensors whose ratio stays are not touched."""
        for name, ratio in partition.ratios(self._tensors, ratios).items():
            if self._ratios.get(name) != ratio:
                self._ratios.pop(name, None)  # an interrupted write must not pass for a finished one
                self._write(name, ratio)
                self._ratios[name] = ratio

    def loss_and_gradient(
        self, partition: Partition, ratios: Sequence[float] | np.ndarray, objective: Objective
    ) -> tuple[float, np.ndarray]:
        """The loss at these ratios and its gradient with respect to them: one forward and one backward.

        d loss / d r_k = sum over the block's tensors of <d loss / d theta, post - pre>; the tensors outside the blocks
        count towards each block by its share in the mean. A parameter's gradient is freed as soon as it is consumed,
        tied tensors are one parameter and count once, and the sums are taken in float32 or wider.

        Returns:
            The loss and a float64 array of shape (K,).
        """
        self.set(partition, ratios)
        per_tensor: dict[str, float] = dict.fromkeys(self._tensors, 0.0)
        with self._consuming_gradients(per_tensor):
            loss = objective(self.model)
        rest = math.fsum(per_tensor[n] for n in partition.rest if n in per_tensor) / partition.weights.sum()
        blocks = [math.fsum(per_tensor.get(n, 0.0) for n in b.tensors) + rest * b.weight for b in partition.blocks]
        return loss, np.array(blocks)

    def _write(self, name: str, ratio: float) -> None:
        target, (pre, post) = self._tensors[name].data, self.pair.tensors(name)
        key, direct = key_of(pre, post), target.dtype == post.dtype and target.device.type == "cpu"
        for start, (a, b, part) in stretches(pre, post, target.view(-1)):
            if direct:
                mix(a, b, ratio, key=key, start=start, out=part)
            else:
                part.copy_(mix(a, b, ratio, key=key, start=start, out=self._buffers[post.dtype, 0][: len(b)]))

    @contextlib.contextmanager
    def _consuming_gradients(self, sums: dict[str, float]) -> Iterator[None]:
        parameters = {n: t for n, t in self._tensors.items() if isinstance(t, nn.Parameter)}
        before = {n: t.requires_grad for n, t in parameters.items()}
        hooks = []
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            parameter.grad = None
            consume = partial(self._consume, name, sums)
            hooks.append(parameter.register_post_accumulate_grad_hook(consume))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, parameter in parameters.items():
                parameter.requires_grad_(before[name])
                parameter.grad = None

    def _consume(self, name: str, sums: dict[str, float], parameter: Tensor) -> None:
        """Add <gradient, post - pre>, chunk by chunk, and free the gradient."""
        assert parameter.grad is not None
        pre, post = self.pair.tensors(name)
        wide, total = wide_dtype(pre, post), 0.0
        for _, (before, after, gradient) in stretches(pre, post, parameter.grad):
            gap = self._buffers[wide, 0][: len(gradient)].copy_(after).sub_(before)
            total += float(torch.dot(gap, gradient.to(device="cpu", dtype=wide)))
        sums[name] += total
        parameter.grad = None


def _load(pair: Pair, donor: Donor, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with without_bars():
        config = AutoConfig.from_pretrained(pair.giver(donor).folder, trust_remote_code=False)
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            pair.pre.folder, config=config, dtype=dtype, trust_remote_code=False
        )
    return loaded


def compute_dtype(pair: Pair, device: str | torch.device) -> torch.dtype:
    """The dtype to compute in: `main_dtype`; float32 for float16, whose gradients underflow, and for what is imitated."""
    dtype = main_dtype(pair)
    return torch.float32 if dtype == torch.float16 else computed_in(dtype, device)


def main_dtype(pair: Pair) -> torch.dtype:
    """POST's dtype, by most elements."""
    elements: Counter[torch.dtype] = Counter()
    for name in pair.names:
        elements[pair.post.dtype(name)] += math.prod(pair.post.shape(name))
    return max((d for d in elements if d.is_floating_point), key=elements.__getitem__)


def _match(pair: Pair, model: nn.Module) -> dict[str, Tensor]:
    """The model's tensor for each name on disk; tied tensors once, under the name of the first."""
    on_disk = dict.fromkeys(pair.names)
    tensors: dict[str, Tensor] = {}
    owners: set[int] = set()
    unmatched: list[str] = []
    kept = {id(t) for t in model.state_dict(keep_vars=True).values()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in kept:  # a buffer computed when the model is built
            continue
        found = match_name(name, on_disk)
        if found is None:
            unmatched.append(name)
        else:
            tensors[found] = tensor
            owners.add(id(tensor))
    tied = dict.fromkeys(n for n, t in model.state_dict(keep_vars=True).items() if id(t) in owners)
    unused = [n for n in pair.names if n not in tensors and match_name(n, tied) is None]
    unmatched += [name for name, tensor in tensors.items() if tensor.shape != pair.post.shape(name)]
    if wrong := [*unmatched, *unused]:
        raise CheckpointError(
            f"{pair.post.source}: the model in memory and the tensors on disk are not one to one, first {wrong[0]}; expected a "
            "dense model (fused experts and encoder-decoder heads can be averaged on disk, but not searched)"
        )
    return tensors
