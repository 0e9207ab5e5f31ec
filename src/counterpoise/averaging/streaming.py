"""Tensors written stretch by stretch, and what `average` and `merge` say of the files that they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from counterpoise.checkpoints.checkpoint import Checkpoint, TensorFile
from counterpoise.checkpoints.files import INDEX, WEIGHTS
from counterpoise.records import write_json


def write_tensors(
    like: Checkpoint, names: Iterable[str], folder: Path, values: Callable[[str], Iterable[tuple[int, Tensor]]]
) -> None:
    """Write tensors with the files, dtypes and shapes that they have in `like`, and the index if these are several.

    Args:
        values: gives a tensor's flat stretches, each with the element at which it begins.
    """
    wanted = set(names)
    layout = {file: [n for n in inside if n in wanted] for file, inside in like.layout.items()}
    layout = {file: inside for file, inside in layout.items() if inside}
    for file, inside in layout.items():
        sink = TensorFile(folder / file, {n: (like.dtype(n), like.shape(n)) for n in inside})
        for name in inside:
            for start, stretch in values(name):
                sink.write(name, start * stretch.element_size(), stretch)
        sink.close()
    if list(layout) != [WEIGHTS]:
        weight_map = {n: file for file, inside in layout.items() for n in inside}
        total = sum(map(like.size, weight_map))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def other_inputs(told: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """A warning for each checkpoint whose files are not those that a recipe tells of."""
    return [
        f"the recipe was made for another {side.upper()} ({told[side].get('source')}) than this one"
        for side, found in inputs.items()
        if side in told and told[side].get("sha256") != found["sha256"]
    ]
