"""One model in memory whose ratios are set in place, and the gradient of a loss with respect to those ratios."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from counterpoise.averaging.mix import Donor, mix
from counterpoise.averaging.partition import Partition
from counterpoise.averaging.places import Place, places
from counterpoise.checkpoints.naming import writer_of
from counterpoise.checkpoints.preflight import Buffers, Pair, stretches
from counterpoise.checkpoints.rounding import key_of, wide_dtype
from counterpoise.language.checkpointing import can_recompute, recomputed
from counterpoise.language.dtypes import computed_in
from counterpoise.language.loading import without_bars
from counterpoise.language.ways import out_of_memory, warn_of
from counterpoise.ranks import shared

SHARE = 2 / 3
"""Of a GPU's free memory, beside the model, PRE and POST may take so much: the rest is for activations."""
SPAN = 1 << 24
"""Elements worked on at once on a GPU: fewer leave it idle between calls."""
Objective = Callable[[nn.Module], float]
"""Runs forward and backward of a loss over its data and returns the loss; gradients land in the parameters."""
Objectives = Objective | Sequence[Objective]
"""A loss, or the terms of a sum, which ranks share among them."""


class ResidentAverage:
    """A model that can be any average of a pair without a checkpoint being written.

    After any sequence of settings each of its tensors equals mix(pre, post, r) bit for bit, as it would lie on disk,
    cast to the compute dtype. PRE and POST stay memory-mapped: beside the model itself, no copy of it is held, but on a GPU
    that has room for both. Experts that lie apart on disk and are one parameter in memory are written into it, and take
    their part of its gradient.

    Args:
        pair: what `preflight` returned.
        model: a causal language model to use; by default PRE's weights under the donor's config.
        donor: "post" or "pre": whose config the model is built from, as the averaged checkpoint will have it.
        dtype: the compute dtype; by default POST's own, float32 for float16 and where the device would imitate it.
        device: where the model runs. Mixing is done where PRE and POST lie, with the same bits on every device.

    Raises:
        CheckpointError: the model's parameters and the tensors on disk are not one to one; an encoder-decoder.
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
        if model is None:
            model = load(pair, donor, dtype or compute_dtype(pair, device))
            own_memory(model.state_dict(keep_vars=True).values(), torch.device(device))
        words = model.get_input_embeddings()  # type: ignore[operator]
        words.padding_idx = None  # or the gradient of that token is dropped where it stands in a text
        self.model, self._places = self._placed(model.eval(), torch.device(device))
        self._ratios: dict[str, float] = {}
        self._held: dict[str, tuple[Tensor, Tensor]] = {}
        self._buffers = Buffers()
        self.recomputes = False
        if self._is_room(torch.device(device)):
            self.hold(device)

    def _placed(self, model: nn.Module, device: torch.device) -> tuple[nn.Module, dict[str, Place]]:
        """The model on its device, and where the tensors on disk lie in it."""
        model = model.to(device)
        return model, places(model, self.pair.shapes, self.pair.post.source)

    def hold(self, device: str | torch.device) -> None:
        """Copy PRE and POST to a device once: a change of ratios or a gradient then moves nothing over the bus."""
        for name in self._places:
            pre, post = self._sides(name)
            self._held[name] = pre.to(device, copy=True), post.to(device, copy=True)
        self._buffers = Buffers(SPAN, device)
        self.pair.refuse_changed()

    def _is_room(self, device: torch.device, shares: int = 1) -> bool:
        """Whether a GPU has memory for a share of PRE and POST beside the model; on the CPU files are mapped, as good."""
        if device.type != "cuda":
            return False
        pair = self.pair
        each = ((n, pair.pre.dtype(pair.elsewhere.get(n, n)), pair.post.dtype(n)) for n in pair.names)
        size = sum(math.prod(pair.post.shape(n)) * (pre.itemsize + post.itemsize) for n, pre, post in each)
        return size / shares <= SHARE * torch.cuda.mem_get_info(device)[0]

    def _sides(self, name: str) -> tuple[Tensor, Tensor]:
        """PRE and POST, of the shape of the tensor's place."""
        return self._held.get(name) or self.pair.tensors(name)

    def _noise(self, name: str) -> tuple[int | None, int]:
        """The key of a whole tensor's pseudo-random numbers (None: of the sides), and where in it the place begins."""
        return None, 0

    def set(self, partition: Partition, ratios: Sequence[float] | np.ndarray) -> None:
        """Move the model to the average with one ratio per block; tensors whose ratio stays are not touched."""
        for name, ratio in partition.ratios(self._places, ratios).items():
            if self._ratios.get(name) != ratio:
                self._ratios.pop(name, None)  # an interrupted write must not pass for a finished one
                self._write(name, ratio)
                self._ratios[name] = ratio
        self.pair.refuse_changed()  # what is measured from here on is recorded under the hashes of the files

    def loss_and_gradient(
        self, partition: Partition, ratios: Sequence[float] | np.ndarray, objective: Objectives
    ) -> tuple[float, np.ndarray]:
        """The loss at these ratios and its gradient with respect to them: one forward and one backward.

        d loss / d r_k = sum over the block's tensors of <d loss / d theta, post - pre>; the tensors outside the blocks
        count towards each block by its share in the mean. A parameter's gradient is freed as soon as it is consumed,
        tied tensors are one parameter and count once, and the sums are taken in float32 or wider. Where there is no memory
        for that, it is done again with layers that are computed twice, from then on always; a warning says so.

        Returns:
            The loss and a float64 array of shape (K,).
        """
        losses, gradients = self.losses_and_gradients(partition, ratios, objective)
        return float(sum(losses)), sum(gradients, np.zeros(len(partition)))

    def losses_and_gradients(
        self, partition: Partition, ratios: Sequence[float] | np.ndarray, objective: Objectives
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of each term the loss and its gradient, float64 of shapes (n,) and (n, K); see `loss_and_gradient`.

        Where processes have met (`torch.distributed`), all must call this alike. Each does every world-th term, and they
        tell each other those n (K + 1) numbers: the bits do not depend on how many there are.
        """
        self.set(partition, ratios)
        terms = [objective] if callable(objective) else objective
        rows = np.array(self._shared(len(terms), lambda n: self._term(partition, terms[n])))
        self.pair.refuse_changed()
        return rows[:, 0], rows[:, 1:]

    def _shared(self, count: int, work: Callable[[int], list[float]]) -> list[list[float]]:
        """`work` of each number, known to all processes."""
        return shared(count, work)

    def _term(self, partition: Partition, objective: Objective) -> list[float]:
        """The loss and its gradient."""
        found = self._slopes(objective) or self._slopes(objective)
        assert found is not None
        loss, sums = found
        per_tensor = {name: float(found) for name, found in sums.items()}  # here alone a device is waited for
        rest = math.fsum(per_tensor[n] for n in partition.rest if n in per_tensor) / partition.weights.sum()
        blocks = (math.fsum(per_tensor.get(n, 0.0) for n in b.tensors) + rest * b.weight for b in partition.blocks)
        return [loss, *blocks]

    def _slopes(self, objective: Objective) -> tuple[float, dict[str, Tensor | float]] | None:
        """The loss, and d loss / d ratio of every tensor; None where it needs another try, with `recomputes`."""
        sums: dict[str, Tensor | float] = dict.fromkeys(self._places, 0.0)
        less = recomputed(self.model) if self.recomputes else contextlib.nullcontext()
        try:
            with less, self._consuming_gradients(sums):
                return objective(self.model), sums
        except (RuntimeError, MemoryError) as error:
            if self.recomputes or not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # what they hold is needed to ask the model
            if not can_recompute(self.model):
                raise
        self.recomputes = True
        warn_of(self.model, "no memory for all that a gradient needs: layers are computed again in the backward pass")
        return None

    def _write(self, name: str, ratio: float) -> None:
        place, (pre, post) = self._places[name], self._sides(name)
        target = place.view
        key, begin = self._noise(name)
        if target is None or not target.is_contiguous():
            place.put(mix(pre, post, ratio))
        elif (target.dtype, target.device) == (post.dtype, post.device):
            mix(pre, post, ratio, key=key, start=begin, out=target)
        else:  # a stretch at a time on its way to another dtype or device
            key = key_of(pre, post) if key is None else key
            for start, (a, b, part) in stretches(pre, post, target.view(-1), size=self._buffers.size):
                part.copy_(mix(a, b, ratio, key=key, start=begin + start, out=self._buffers[post.dtype, 0][: len(b)]))

    @contextlib.contextmanager
    def _consuming_gradients(self, sums: dict[str, Tensor | float]) -> Iterator[None]:
        parts: defaultdict[nn.Parameter, list[tuple[str, Place]]] = defaultdict(list)
        for place in self._places.values():
            for name, parameter in place.parameters.items():
                if isinstance(parameter, nn.Parameter):
                    parts[parameter].append((name, place))
        before = [(p, p.requires_grad) for p in parts]
        hooks = []
        for parameter, inside in parts.items():
            parameter.requires_grad_(True)
            parameter.grad = None
            consume = partial(self._consume, inside, sums)
            hooks.append(parameter.register_post_accumulate_grad_hook(consume))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, wanted in before:
                parameter.requires_grad_(wanted)
                parameter.grad = None

    def _consume(self, inside: Sequence[tuple[str, Place]], sums: dict[str, Tensor | float], parameter: Tensor) -> None:
        """Add <gradient, post - pre> of each tensor in a parameter, chunk by chunk, and free the gradient."""
        assert parameter.grad is not None
        for name, place in inside:
            pre, post = self._sides(place.name)
            wide, total = wide_dtype(pre, post), torch.zeros((), dtype=torch.float64, device=pre.device)
            if place.view is None:
                gap = place.moved(post.to(wide) - pre.to(wide))[name]
                total += torch.dot(gap.flatten(), parameter.grad.flatten().to(gap))
            else:
                all_three = pre, post, place.own(parameter.grad)
                for _, (before, after, gradient) in stretches(*all_three, size=self._buffers.size):
                    gap = self._buffers[wide, 0][: len(gradient)].copy_(after).sub_(before)
                    total += torch.dot(gap, gradient.to(gap))
            sums[place.name] = sums[place.name] + total
        parameter.grad = None


def load(pair: Pair, donor: Donor, dtype: torch.dtype) -> nn.Module:
    """PRE's weights, by the names that OUT will have, in the class that will load OUT; what keeps its dtype stays mapped."""
    from transformers import AutoConfig

    giver = pair.giver(donor)
    with without_bars():
        config = AutoConfig.from_pretrained(giver.folder, trust_remote_code=False)
        kind = writer_of(config, giver.source)
        weights = {n: pair.tensors(n)[0] for n in pair.names}
        # torch multiplies experts in groups up to float32 only
        how = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
        loaded: nn.Module = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **how)
    return loaded


def own_memory(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Copy tensors, each once, to a device: one that kept its dtype is PRE's own mapped memory until here."""
    for tensor in {id(t): t for t in tensors}.values():
        tensor.data = tensor.data.to(device, copy=True)


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
