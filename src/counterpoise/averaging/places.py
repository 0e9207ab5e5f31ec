"""Where the tensors on disk lie in a model in memory: whole parameters, or parts of fused ones, both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.averaging.mix import Donor
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.naming import Fusion, Naming, config_of, writer_of
from counterpoise.checkpoints.preflight import Pair

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """A tensor of the disk in memory.

    Attributes:
        parameters: those that it is a part of, by name; one, where `view` is given.
        view: the tensor as a view of its parameter, of the shape that it has on disk.
        fusion, shapes: how it and others become the parameters where no view can (rotary halves that are interleaved on
            disk, one tensor that becomes three), and the shapes of all of them.
    """

    name: str
    parameters: dict[str, Tensor]
    view: Tensor | None
    fusion: Fusion | None = None
    shapes: Shapes | None = None

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        """Write `values`, of the shape on disk, into the model."""
        if self.view is not None:
            self.view.copy_(values)
            return
        made, marks = self.moved(values), self.moved(torch.ones(values.shape))
        for name, parameter in self.parameters.items():
            held = parameter.data
            held.copy_(torch.where(marks[name].to(held.device) != 0, made[name].to(held), held))

    @property
    def start(self) -> int:
        """Where in its parameter, both flattened, it begins.

        Raises:
            CheckpointError: it is no single stretch of it.
        """
        parameter = next(iter(self.parameters.values()))
        if self.view is None or not (self.view.is_contiguous() and parameter.is_contiguous()):
            raise CheckpointError(
                f"{self.name}: expected a tensor that is one stretch of a parameter in memory, as --shard needs it, found one "
                "that is rearranged; leave out --shard and take a device that holds the model"
            )
        return int(self.view.storage_offset() - parameter.storage_offset())

    def own(self, gradient: Tensor) -> Tensor:
        """The part of its parameter's gradient that is this tensor's, of the shape on disk."""
        assert self.view is not None
        (parameter,) = self.parameters.values()
        offset = self.view.storage_offset() - parameter.storage_offset()
        return gradient.contiguous().as_strided(self.view.shape, self.view.stride(), offset)

    def moved(self, values: Tensor) -> dict[str, Tensor]:
        """What `values`, of the shape on disk, adds to each parameter: the conversions of transformers are linear."""
        assert self.fusion is not None
        assert self.shapes is not None
        zero = torch.zeros((), dtype=values.dtype, device=values.device)
        zeros = {n: zero.expand(shape) for n, shape in self.shapes.items()}
        return self.fusion.convert(zeros | {self.name: values})


def places(model: Any, shapes: Shapes, source: str) -> dict[str, Place]:
    """Name on disk -> its place in the model.

    Tensors that are stored apart get a memory of their own, as transformers gives them where their numbers differ, whatever
    the config says of ties. What the class passes over when it loads (layers that predict several tokens) has no place.

    Args:
        model: of a class of transformers.
        shapes: name on disk -> shape.
        source: names the checkpoint in errors.

    Raises:
        CheckpointError: the model's parameters and the tensors on disk are not one to one.
    """
    naming = Naming(model)
    reading = naming.read(shapes)
    _untie(model, (spot.parameter for spot in reading.spots.values()))
    held: dict[str, Tensor] = model.state_dict(keep_vars=True)
    found = {n: Place(n, {s.parameter: held[s.parameter]}, held[s.parameter].data) for n, s in reading.spots.items()}
    for fusion in reading.fused:
        found |= _within(fusion, {n: shapes[n] for n in fusion.tensors}, held)
    owned = {id(p) for place in found.values() for p in place.parameters.values()}
    missing = naming.not_ignored(missing=(n for n, t in held.items() if id(t) not in owned))
    unused = naming.not_ignored(unexpected=(n for n in shapes if n not in found))
    other = [n for n, p in found.items() if p.view is not None and p.view.shape != shapes[n]]
    if wrong := [*missing, *unused, *other]:
        raise CheckpointError(
            f"{source}: the model in memory and the tensors on disk are not one to one, first {wrong[0]}; expected weights and "
            f"config of one {type(model).__name__}"
        )
    return found


def refuse_unmeasured(pair: Pair, donor: Donor, *, shard: int = 1) -> None:
    """Raise, from the headers alone, for a pair whose tensors have no place in the model that would be measured.

    Args:
        shard: above 1 also for tensors that cannot be cut up, see `Place.start`.
    """
    giver = pair.giver(donor)
    if (config := config_of(giver.folder)) is None:
        return
    kind = writer_of(config, giver.source)
    with torch.device("meta"):
        model = kind(config)
    found = places(model, pair.shapes, pair.post.source)
    if shard > 1:
        for place in found.values():
            _ = place.start


def _within(fusion: Fusion, shapes: Shapes, held: Mapping[str, Tensor]) -> dict[str, Place]:
    """The places of tensors that are converted together."""
    made = fusion.made(shapes)
    if not made or any(held[n].shape != shape for n, shape in made.items()):
        return {}
    parameters = {n: held[n] for n in made}
    views = fusion.revert({n: p.data for n, p in parameters.items()})
    found: dict[str, Place] = {}
    for name, shape in shapes.items():
        if (view := views.get(name)) is not None and view.shape == shape:
            storage = view.untyped_storage().data_ptr()
            own = {n: p for n, p in parameters.items() if p.untyped_storage().data_ptr() == storage}
            found[name] = Place(name, own, view)
        else:
            found[name] = Place(name, parameters, None, fusion, shapes)
    return found


def _untie(model: Any, parameters: Iterable[str]) -> None:
    """Give each of these parameters, all of them on disk, a memory of its own."""
    held: dict[str, Tensor] = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name in dict.fromkeys(parameters):
        tensor = held[name]
        if id(tensor) in seen:
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
        seen.add(id(tensor))
