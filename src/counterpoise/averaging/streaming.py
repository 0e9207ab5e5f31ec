"""What `average` and `merge` have in common: tensors written stretch by stretch, OUT checked, warnings of other inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from counterpoise.checkpoints import bits
from counterpoise.checkpoints.bits import Array
from counterpoise.checkpoints.checkpoint import Checkpoint, copy_companions, hash_in_background
from counterpoise.checkpoints.files import INDEX, WEIGHTS, CheckpointError, read_json
from counterpoise.checkpoints.hashing import in_background
from counterpoise.checkpoints.headers import DTYPES
from counterpoise.checkpoints.known import complete
from counterpoise.checkpoints.preflight import Pair, Scan, stretches
from counterpoise.checkpoints.writing import TensorFile
from counterpoise.records import Progress, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from counterpoise.checkpoints.naming import Naming

Mixed = Callable[[Sequence[Scan], str, int, int, Array, list[Array]], Array]
"""(scans of PRE with each POST, name, key, start, PRE's stretch, each POST's) -> what is written; the scans have been told of
the stretch. `key` and `start` as `mix` takes them."""
MixedTensors = Callable[[str, int, int, "Tensor", "list[Tensor]"], "Tensor"]
"""The same for tensors, and without scans."""


def write(
    pairs: Sequence[Pair],
    folder: Path,
    mixed: Mixed,
    told: Mapping[str, int],
    progress: Progress | None,
    *,
    donor: str,
    allow_unrelated: bool,
    kept: Mapping[str, str] | None = None,
) -> list[str]:
    """Write weights and companions of OUT, hashing and scanning all inputs in the same pass; warnings of what was found.

    Args:
        told: what each tensor counts in `progress`.
        donor: "pre" or "post" (the first): whose config, tokenizer and chat template are copied.
        kept: tensors whose bytes are those of "pre" or "post": a file of such alone is copied.

    Raises:
        CheckpointError: NaN or Inf, in an input or in what is written; unrelated models; see `check_written`.
    """
    giver = pairs[0].giver(donor)
    hashes = hash_in_background([pairs[0].pre, *(p.post for p in pairs)])
    naming = in_background(lambda: _naming(giver, pairs[0]))
    scans = _stream(pairs, folder, mixed, told, progress, kept or {})
    verdicts = [warning for scan in scans for warning in scan.verdict(allow_unrelated=allow_unrelated)]
    hashes.result()
    left = copy_companions(giver, folder)  # an adapter brings no config of its own, but may bring a tokenizer
    check_written(folder, pairs[0], naming.result())
    return [*(w for pair in pairs for w in pair.warnings), *verdicts, *left]


def _stream(
    pairs: Sequence[Pair],
    folder: Path,
    mixed: Mixed,
    told: Mapping[str, int],
    progress: Progress | None,
    kept: Mapping[str, str],
) -> list[Scan]:
    """What becomes of each stretch, in the first POST's shards."""
    first, scans, done = pairs[0], [Scan(p) for p in pairs], 0
    wanted = set(first.names)
    layout = {file: [n for n in names if n in wanted] for file, names in first.post.layout.items()}
    layout = {file: names for file, names in layout.items() if names}
    for file, names in layout.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        sink = TensorFile(folder / file, {n: (first.post.entries[n].kind, first.post.shape(n)) for n in names})
        sides = {kept.get(n) for n in names}
        whole = (
            first.giver(sides.pop() or "") if len(sides) == 1 and None not in sides and not first.elsewhere else None
        )
        copied = type(whole) is Checkpoint and sink.take(whole.folder / file)  # an adapter is no file of its own
        for name in names:
            pre, posts = first.flats(name)[0], [p.flats(name)[1] for p in pairs]
            key = bits.key_of(pre, *posts)
            for start, (before, *afters) in stretches(pre, *posts):
                with np.errstate(all="ignore"):  # what is not finite is looked for
                    result = mixed(scans, name, key, start, before, afters)
                    _refuse_non_finite(name, first.post.entries[name].kind, result)
                if not copied:
                    sink.write(result)
            done += told[name]
            if progress is not None:
                progress(done, sum(told.values()))
        sink.close()
    if list(layout) != [WEIGHTS]:
        weight_map = {n: file for file, names in layout.items() for n in names}
        total = sum(map(first.post.size, weight_map))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return scans


def _refuse_non_finite(name: str, kind: str, written: Array) -> None:
    if bad := bits.not_finite(written):
        raise CheckpointError(
            f"{name}: expected finite numbers to write, found NaN or Inf ({bad} in one stretch), though PRE and POST are finite: "
            f"the ratio or the weights are too large for {DTYPES[kind]}; take smaller ones"
        )


def of_tensors(mixed: MixedTensors) -> Mixed:
    """What computes with tensors, as `write` takes it."""
    from counterpoise.checkpoints.rounding import as_array, as_tensor

    def run(scans: Sequence[Scan], name: str, key: int, start: int, pre: Array, posts: list[Array]) -> Array:
        for scan, post in zip(scans, posts, strict=True):
            scan.add(name, pre, post)
        return as_array(mixed(name, key, start, as_tensor(pre), [as_tensor(post) for post in posts]))

    return run


def _naming(giver: Checkpoint, pair: Pair) -> Naming | None:
    """What the class of OUT calls its tensors; None where there is none, or where it is known to find all of them."""
    if complete(giver.config, pair.shapes):
        return None
    from counterpoise.checkpoints.naming import Naming

    return Naming.of(giver.folder)


def check_written(folder: Path, pair: Pair, naming: Naming | None) -> None:
    """Refuse a checkpoint that is not what was to be written, or that its class would fill up with random numbers.

    Where it stores what the config ties, and the two differ, the config is made to say that they are not tied: transformers
    would untie them with a warning, others would tie them.

    Args:
        folder: with weights and config, before it appears under its name.
        pair: its names, dtypes and shapes.
        naming: what the class of its config calls its tensors; None where it is not to be asked. One that the config does
            not name (`architectures`) is not asked.

    Raises:
        CheckpointError: a tensor of the pair is not there, or the class would miss a parameter.
    """
    written = Checkpoint(folder, source="OUT")
    found = {n: (e.kind, e.shape) for n, e in written.entries.items()}
    wanted = {n: (pair.post.entries[n].kind, pair.post.shape(n)) for n in pair.names}
    if lost := [n for n in wanted if found.get(n) != wanted[n]] or sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"OUT: {len(lost)} of {len(wanted)} tensors are not as they were to be written, first {lost[0]}; are two files of "
            "POST written to one place? Save it again (save_pretrained)"
        )
    if naming is None or not naming.model.config.architectures:
        return
    shapes = pair.shapes
    if missing := naming.lacking(shapes):
        raise CheckpointError(
            f"OUT: {type(naming.model).__name__}, which config.json names, would not find {len(missing)} of its parameters in "
            f"what was written, or find them of another shape, first {missing[0]}, and fill them with random numbers; expected "
            "a config.json that fits the weights of PRE and POST"
        )
    stored = {s.parameter: n for n, s in naming.read(shapes).spots.items()}
    groups = [[written[stored[p]] for p in group if p in stored] for group in naming.ties]
    if any(not first.equal(other) for first, *more in filter(None, groups) for other in more):
        _say_untied(folder, shapes)


def _say_untied(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`tie_word_embeddings: false`, where that is all it means: T5's kind scales its output by it."""
    from counterpoise.checkpoints.naming import Naming

    config, naming = read_json(folder / "config.json"), Naming.of(folder, tied=False)
    if naming is not None and not naming.model.config.is_encoder_decoder and not naming.lacking(shapes):
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
