"""What a dry run looks at: checkpoints, a reward, the memory and the disk there are, with no model run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from counterpoise.averaging.mix import Donor
from counterpoise.averaging.places import refuse_unmeasured
from counterpoise.checkpoints.checkpoint import Checkpoint, left_behind, short
from counterpoise.checkpoints.configs import understood
from counterpoise.checkpoints.files import (
    CheckpointError,
    first_line,
    free_bytes,
    hub_id,
    pickles,
    read_json,
    resolve,
    weight_files,
)  # fmt: skip
from counterpoise.checkpoints.naming import writer_of
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.classifiers import adapter_of, refuse_labels
from counterpoise.evaluation.grader import Grader
from counterpoise.evaluation.rewards import python_reward, read_labelled
from counterpoise.evaluation.specs import RewardSpec
from counterpoise.language.loading import without_bars
from counterpoise.language.memory import free_memory
from counterpoise.language.shapes import Shape, shape_of


@dataclass(frozen=True)
class Source:
    """A checkpoint as far as it is at hand.

    Attributes:
        weights: None where there is a config.json alone, and of a reward model.
        model: its architecture on the meta device: shapes without numbers.
        dtype: in which it is stored, or its config says it is.
    """

    name: str
    folder: Path
    weights: Checkpoint | None
    model: nn.Module
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:
        """What decides its cost."""
        return shape_of(self.model)

    @property
    def resident(self) -> int:
        """Bytes of its weights in memory, in its own dtype."""
        return self.shape.parameters * self.dtype.itemsize

    @property
    def mapped(self) -> int:
        """Bytes of its weight files."""
        return 0 if self.weights is None else sum(f.stat().st_size for f in self.weights.files)


def look(source: str, *, base: Source | None = None, classifier: bool = False) -> Source:
    """A checkpoint's shapes from its files' headers, or from config.json where that is all there is.

    Of a hub id that is not in the local cache only the small files are fetched.

    Raises:
        CheckpointError: nothing there, pickled weights, a missing shard, a config that gives no language model.
    """
    folder, ours = folder_of(source)
    weights: Checkpoint | None = None
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and base is not None and (base.weights is None or not any(folder.glob("adapter_model*"))):
        return replace(base, name=source, weights=None)  # its shapes are the base's
    if not classifier and (adapter or _has_weights(folder, ours)):
        weights = open_checkpoint(folder, base=None if base is None else base.weights)
    if adapter and base is not None:
        folder = base.folder
    if (place := folder / "config.json").is_file():
        understood(read_json(place), place)
    model, config = _on_meta(folder, source, classifier)
    stored = getattr(config, "dtype", None)
    if weights is not None:
        stored = next((weights.dtype(n) for n in weights if weights.dtype(n).is_floating_point), stored)
    return Source(source, folder, weights, model, stored if isinstance(stored, torch.dtype) else torch.float32)


def folder_of(source: str) -> tuple[Path, bool]:
    """The folder, and whether it is the user's own: all that should be in it is."""
    from huggingface_hub import snapshot_download

    if (found := hub_id(source)) is None:
        return resolve(source), True
    with contextlib.suppress(Exception):
        return Path(snapshot_download(found[0], revision=found[1], local_files_only=True)), False
    return resolve(source, weights=False), False


def _has_weights(folder: Path, ours: bool) -> bool:
    try:
        weight_files(folder)
    except CheckpointError:
        if not (folder / "config.json").is_file() or (ours and (pickles(folder) or any(folder.glob("*.safetensors*")))):
            raise
        return False
    return True


def _on_meta(folder: Path, source: str, classifier: bool) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        with without_bars(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            build = AutoModelForSequenceClassification.from_config if classifier else writer_of(config, source)
            made: nn.Module = build(config)
    except CheckpointError:
        raise
    except (ValueError, KeyError, OSError) as error:
        wanted = "sequence-classification" if classifier else "causal language"
        said = first_line(error)
        raise CheckpointError(f"{source}: expected the config of a {wanted} model, found: {said}") from None
    return made, config


def fit(
    pre: Source, post: Source, drop: Sequence[str], out: Path, donor: Donor, *, shard: int = 1
) -> tuple[list[str], int]:
    """What `preflight` says of two checkpoints, as far as they are at hand, and the bytes that are mapped.

    Args:
        shard: among how many processes they are cut up.

    Raises:
        CheckpointError: see `preflight`; without weights two architectures, or a parameter of two shapes.
    """
    if pre.weights is not None and post.weights is not None:
        folders = [folder_of(source.name)[0] for source in (pre, post)]  # a hub id is not fetched again
        pair = preflight(*folders, drop=drop, out=out)
        refuse_unmeasured(pair, donor, shard=shard)
        told = [
            f"preflight: {len(pair.names)} tensors fit",
            *(f"warning: {w}" for w in (*pair.warnings, *left_behind(pair.giver(donor)))),
        ]
        return told, sum(f.stat().st_size for c in (pair.pre, pair.post) for f in c.files)
    kinds = [s.model.config.model_type for s in (pre, post)]  # type: ignore[union-attr]
    shapes = [{n: tuple(p.shape) for n, p in s.model.named_parameters()} for s in (pre, post)]
    if kinds[0] != kinds[1] or shapes[0].keys() != shapes[1].keys():
        raise CheckpointError(
            f"PRE is a {kinds[0]} model of {len(shapes[0])} tensors, POST a {kinds[1]} one of {len(shapes[1])}; expected "
            "one model before and after training"
        )
    for name, shape in shapes[0].items():
        if shape != (other := shapes[1][name]):
            raise CheckpointError(f"{name} has the shape {shape} in PRE and {other} in POST; expected one model")
    lacking = ", ".join(s.name for s in (pre, post) if s.weights is None)
    return [f"no weights: preflight on shapes only ({lacking})", *room_for(out, post.resident)], 0


def look_at_reward(spec: str) -> Source | None:
    """Check a reward without loading it; its architecture when it is a model.

    Raises:
        ValueError: an unreadable file, nothing to import, a model that is no sequence classifier of one or two labels.
        CheckpointError: no such model.
    """
    kind, head, tail = RewardSpec.read(spec)
    if kind == "sentiment":
        read_labelled(Path(tail))
        return None
    if kind == "function":
        python_reward(head, tail)
        return None
    if kind == "endpoint":
        Grader.read(spec)
        return None
    adapter = adapter_of(spec)
    found = look(adapter.base if adapter else spec, classifier=True)
    config: Any = found.model.config
    kinds, labels = config.architectures or [], adapter and adapter.labels
    if kinds and not labels and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ValueError(
            f"reward {spec}: expected a sequence-classification model, found {kinds[0]}, whose head transformers does not "
            "know; wrap it in a Python function (module:function)"
        )
    refuse_labels(spec, labels or config.num_labels)
    return found


def room_for(out: Path, needed: int) -> list[str]:
    """A warning where the disk cannot hold what would be written: an estimate refuses nothing, `preflight` does."""
    free = free_bytes(out)
    if free >= needed:
        return []
    return [f"warning: {out}: {needed / 1e9:.2f} GB would be written, {free / 1e9:.2f} GB are free here; make room"]


def room(device: str, present: bool, memory: float, taken: float) -> float | None:
    """Bytes that a device has beside those that are taken: it is here, or has so many; None where nobody knows."""
    free = free_memory(device) if present else memory
    return None if free is None or math.isinf(free) else free - taken


def judged(judge: Source | None) -> dict[str, int]:
    """What lies in memory for a reward or preference that is a model."""
    return {} if judge is None else {"reward model": judge.resident}


def said_of(reward: str, judge: Source | None) -> str:
    """What a dry run says of a reward; `judge` of one that is a model."""
    if judge is None:
        calls = "; one call a response, none was made" if RewardSpec.read(reward).kind == "endpoint" else ""
        return f"reward {reward}: found{calls}; its time is not counted"
    return f"reward {reward}: {judge.shape.parameters / 1e9:.3g} billion parameters in {short(judge.dtype)}"
