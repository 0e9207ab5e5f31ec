"""What `average` and `merge` have in common: tensors written stretch by stretch, and warnings of other inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from counterpoise.checkpoints.checkpoint import TensorFile
from counterpoise.checkpoints.files import INDEX, WEIGHTS
from counterpoise.checkpoints.preflight import Pair, Scan, stretches
from counterpoise.checkpoints.rounding import key_of
from counterpoise.records import Progress, write_json

Mixed = Callable[[str, int, int, Tensor, list[Tensor]], Tensor]
"""(name, key, start, PRE's stretch, each POST's) -> what is written; `key` and `start` as `mix` takes them."""


def stream(
    pairs: Sequence[Pair], folder: Path, mixed: Mixed, told: Mapping[str, int], progress: Progress | None
) -> list[Scan]:
    """Write what becomes of each stretch, in the first POST's shards; scan all inputs in the same pass.

    Args:
        told: what each tensor counts in `progress`.
    """
    first, scans, done = pairs[0], [Scan(p) for p in pairs], 0
    wanted = set(first.names)
    layout = {file: [n for n in names if n in wanted] for file, names in first.post.layout.items()}
    layout = {file: names for file, names in layout.items() if names}
    for file, names in layout.items():
        sink = TensorFile(folder / file, {n: (first.post.dtype(n), first.post.shape(n)) for n in names})
        for name in names:
            pre, posts = first.tensors(name)[0], [p.tensors(name)[1] for p in pairs]
            key = key_of(pre, *posts)
            for start, (before, *afters) in stretches(pre, *posts):
                for scan, after in zip(scans, afters, strict=True):
                    scan.add(name, before, after)
                result = mixed(name, key, start, before, afters)
                sink.write(name, start * result.element_size(), result)
            done += told[name]
            if progress is not None:
                progress(done, sum(told.values()))
        sink.close()
    if list(layout) != [WEIGHTS]:
        weight_map = {n: file for file, names in layout.items() for n in names}
        total = sum(map(first.post.size, weight_map))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return scans


def other_inputs(told: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """A warning for each checkpoint whose files are not those that a recipe tells of."""
    return [
        f"the recipe was made for another {side.upper()} ({told[side].get('source')}) than this one"
        for side, found in inputs.items()
        if side in told and told[side].get("sha256") != found["sha256"]
    ]
