"""What runs inside vLLM's worker: PRE and POST mixed in place of its weights, and checksums of what was sent and is held.

vLLM fuses, packs and shards what it is sent, so its own tensors cannot be compared with those on disk one by one. What it
keeps under its name on disk is compared bit for bit (embedding, norms), and so are columns of what it packed beside a weight
that it kept. The rest is told apart by checksums, layer by layer: they must change where what was sent changes, and only there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoise.averaging.mix import mix
from counterpoise.checkpoints.preflight import Pair, preflight

COLUMNS = 8
"""Of what was packed beside a weight, so many are compared with that."""
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> integers of that size."""
Sums = dict[str, int]
"""Number of a layer, "" outside of them -> the sum of the bits, as integers, of its tensors."""


class Sides(NamedTuple):
    """A pair that another process opens: local folders, and what was dropped from it."""

    pre: str
    post: str
    dropped: tuple[str, ...]


class Put(NamedTuple):
    """What became of a change of weights.

    Attributes:
        sent: of the mixed tensors, in the model's dtype.
        held: of what the worker computes with.
        wrong: parameters under their names on disk whose bits are not those that were sent, modules whose packed weight is
            not the one they kept.
        compared: how many have such names.
    """

    sent: Sums
    held: Sums
    wrong: tuple[str, ...]
    compared: int


def put(worker: Any, sides: Sides, shares: Mapping[str, float]) -> Put:
    """Load mix(pre, post, share) of every tensor into a worker's model, the bits of an averaged checkpoint."""
    model = worker.model_runner.get_model()
    pair, dtype = _opened(worker, sides), worker.model_config.dtype
    sent: Sums = defaultdict(int)
    plain: dict[str, tuple[int, torch.Size]] = {}

    def mixed() -> Iterator[tuple[str, Tensor]]:
        for name, share in shares.items():
            pre, post = (side.to(worker.device) for side in pair.tensors(name))
            tensor = mix(pre, post, share)
            bits = bits_of(tensor.to(dtype) if tensor.is_floating_point() else tensor)
            sent[_layer(name)] += bits
            plain[name] = bits, tensor.shape
            yield name, tensor

    with torch.no_grad():
        worker.reload_weights(weights_iterator=mixed())
        own = dict(model.named_parameters(remove_duplicate=False))
        both = {n: own[n] for n, (_, shape) in plain.items() if n in own and _unpadded(own[n], shape) is not None}
        wrong = [n for n, p in both.items() if bits_of(_unpadded(p, plain[n][1])) != plain[n][0]]
        for name, module in _packed(model):
            if module.weight.numel() and not _is_fresh(module):
                # of a head that is tied to the embedding reload_weights keeps what was packed of the old one
                module.quant_method.process_weights_after_loading(module)
                wrong += [name] * (not _is_fresh(module))
        return Put(dict(sent), held(model), tuple(wrong), len(both))


def _packed(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules that multiply, on a CPU, by another form of their weight."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "cpu_linear"))


def _is_fresh(module: Any) -> bool:
    """Whether columns of what was packed are those of the weight that was kept beside it."""
    unit = torch.eye(COLUMNS, module.weight.shape[1], dtype=module.weight.dtype)
    return torch.equal(module.cpu_linear(unit, module.weight, None), module.weight[:, :COLUMNS].T)


def held(model: Any) -> Sums:
    """Checksums of a model of vLLM: of its parameters, and of what layers that packed theirs make of one input."""
    found: Sums = defaultdict(int)
    for name, parameter in model.named_parameters():
        found[_layer(name)] += bits_of(parameter.data)
    for name, module in _packed(model):
        if not module.weight.numel():
            width = getattr(module, "input_size_per_partition", None) or module.input_size
            noise = torch.randn(1, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
            answer = module.cpu_linear(noise.to(module.weight.dtype), module.weight, None)
            found[_layer(name)] += bits_of(answer)
    return dict(found)


def bits_of(tensor: Tensor) -> int:
    """The sum of a tensor's bits, read as integers: the same however its elements are ordered or padded with zeros."""
    return int(tensor.detach().contiguous().view(WHOLE[tensor.element_size()]).sum(dtype=torch.int64))


def _unpadded(parameter: Tensor, shape: torch.Size) -> Any:
    """The rows that are on disk, of a vocabulary that may be padded; None where it is another thing."""
    fits = parameter.ndim == len(shape) > 0 and parameter.shape[1:] == shape[1:] and len(parameter) >= shape[0]
    return parameter[: shape[0]] if fits else None


def _layer(name: str) -> str:
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return found[1] if found else ""


def _opened(worker: Any, sides: Sides) -> Pair:
    """The pair, opened once a worker: its files stay mapped."""
    kept = vars(worker).get("_counterpoise")
    if kept is None or kept[0] != sides:
        kept = vars(worker)["_counterpoise"] = sides, preflight(sides.pre, sides.post, drop=sides.dropped)
    pair: Pair = kept[1]
    pair.refuse_changed()
    return pair
