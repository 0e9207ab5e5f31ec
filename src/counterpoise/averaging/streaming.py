"""What `average` and `merge` have in common: tensors written stretch by stretch, OUT checked, warnings of other inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterpoise.checkpoints.checkpoint import Checkpoint, TensorFile, copy_companions, hash_in_background
from counterpoise.checkpoints.files import INDEX, WEIGHTS, CheckpointError, read_json
from counterpoise.checkpoints.hashing import in_background
from counterpoise.checkpoints.naming import Naming
from counterpoise.checkpoints.preflight import Pair, Scan, stretches
from counterpoise.checkpoints.rounding import key_of
from counterpoise.records import Progress, write_json

Mixed = Callable[[str, int, int, Tensor, list[Tensor]], Tensor]
"""(name, key, start, PRE's stretch, each POST's) -> what is written; `key` and `start` as `mix` takes them."""


def write(
    pairs: Sequence[Pair],
    folder: Path,
    mixed: Mixed,
    told: Mapping[str, int],
    progress: Progress | None,
    *,
    donor: str,
    allow_unrelated: bool,
) -> list[str]:
    """Write weights and companions of OUT, hashing and scanning all inputs in the same pass; warnings of what was found.

    Args:
        told: what each tensor counts in `progress`.
        donor: "pre" or "post" (the first): whose config, tokenizer and chat template are copied.

    Raises:
        CheckpointError: NaN or Inf, in an input or in what is written; unrelated models; see `check_written`.
    """
    giver = pairs[0].giver(donor)
    hashes = hash_in_background([pairs[0].pre, *(p.post for p in pairs)])
    naming = in_background(lambda: Naming.of(giver.folder))
    scans = _stream(pairs, folder, mixed, told, progress)
    verdicts = [warning for scan in scans for warning in scan.verdict(allow_unrelated=allow_unrelated)]
    hashes.result()
    left = copy_companions(giver, folder)  # an adapter brings no config of its own, but may bring a tokenizer
    check_written(folder, pairs[0], naming.result())
    return [*(w for pair in pairs for w in pair.warnings), *verdicts, *left]


def _stream(
    pairs: Sequence[Pair], folder: Path, mixed: Mixed, told: Mapping[str, int], progress: Progress | None
) -> list[Scan]:
    """What becomes of each stretch, in the first POST's shards."""
    first, scans, done = pairs[0], [Scan(p) for p in pairs], 0
    wanted = set(first.names)
    layout = {file: [n for n in names if n in wanted] for file, names in first.post.layout.items()}
    layout = {file: names for file, names in layout.items() if names}
    for file, names in layout.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        sink = TensorFile(folder / file, {n: (first.post.dtype(n), first.post.shape(n)) for n in names})
        for name in names:
            pre, posts = first.tensors(name)[0], [p.tensors(name)[1] for p in pairs]
            key = key_of(pre, *posts)
            for start, (before, *afters) in stretches(pre, *posts):
                for scan, after in zip(scans, afters, strict=True):
                    scan.add(name, before, after)
                result = mixed(name, key, start, before, afters)
                _refuse_non_finite(name, result)
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


def _refuse_non_finite(name: str, written: Tensor) -> None:
    if not written.is_floating_point() or math.isfinite(float(written.sum())):  # in its own dtype: forty times as fast
        return
    if bad := int((~written.isfinite()).sum()):  # finite values may have an infinite sum
        raise CheckpointError(
            f"{name}: expected finite numbers to write, found NaN or Inf ({bad} in one stretch), though PRE and POST are finite: "
            f"the ratio or the weights are too large for {str(written.dtype).removeprefix('torch.')}; take smaller ones"
        )


def check_written(folder: Path, pair: Pair, naming: Naming | None) -> None:
    """Refuse a checkpoint that is not what was to be written, or that its class would fill up with random numbers.

    Where it stores what the config ties, and the two differ, the config is made to say that they are not tied: transformers
    would untie them with a warning, others would tie them.

    Args:
        folder: with weights and config, before it appears under its name.
        pair: its names, dtypes and shapes.
        naming: what the class of its config calls its tensors; None where the class is not known. One that the config does
            not name (`architectures`) is not asked.

    Raises:
        CheckpointError: a tensor of the pair is not there, or the class would miss a parameter.
    """
    written = Checkpoint(folder, source="OUT")
    found = {n: (e.dtype, e.shape) for n, e in written.entries.items()}
    wanted = {n: (pair.post.dtype(n), pair.post.shape(n)) for n in pair.names}
    if lost := [n for n in wanted if found.get(n) != wanted[n]] or sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"OUT: {len(lost)} of {len(wanted)} tensors are not as they were to be written, first {lost[0]}; are two files of "
            "POST written to one place? Save it again (save_pretrained)"
        )
    if naming is None or not naming.model.config.architectures:
        return
    if missing := naming.lacking(found):
        raise CheckpointError(
            f"OUT: {type(naming.model).__name__}, which config.json names, would not find {len(missing)} of its parameters in "
            f"what was written, or find them of another shape, first {missing[0]}, and fill them with random numbers; expected "
            "a config.json that fits the weights of PRE and POST"
        )
    stored = {s.parameter: n for n, s in naming.read(found).spots.items()}
    groups = [[written[stored[p]] for p in group if p in stored] for group in naming.ties]
    if any(not torch.equal(first, other) for first, *more in filter(None, groups) for other in more):
        _say_untied(folder, found)


def _say_untied(folder: Path, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """`tie_word_embeddings: false`, where that is all it means: T5's kind scales its output by it."""
    config, naming = read_json(folder / "config.json"), Naming.of(folder, tied=False)
    if naming is not None and not naming.model.config.is_encoder_decoder and not naming.lacking(found):
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
        write_json(folder / "config.json", config)


def other_inputs(told: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """A warning for each checkpoint whose files are not those that a recipe tells of."""
    return [
        f"the recipe was made for another {side.upper()} ({told[side].get('source')}) than this one"
        for side, found in inputs.items()
        if side in told and told[side].get("sha256") != found["sha256"]
    ]
