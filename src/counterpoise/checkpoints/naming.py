"""How transformers reads a checkpoint: its classes' own renamings, ties and fusions, asked of a model without numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoise.checkpoints.files import CheckpointError


class Spot(NamedTuple):
    """Where a model keeps a tensor of the disk: its parameter, and which of the tensors that become it (pattern, number)."""

    parameter: str
    part: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Fusion:
    """Tensors of the disk that transformers converts together: experts that become one parameter, one that becomes several.

    Attributes:
        converter: a `WeightConverter` of transformers.
        parameter: the first that it makes.
        names: pattern of the converter -> the tensors that it collects, in order.
    """

    converter: Any
    parameter: str
    names: dict[str, list[str]]
    model: Any

    def convert(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter -> what the tensors on disk become."""
        made = deepcopy(self.converter)
        for pattern, names in self.names.items():
            made.collected_tensors[pattern] = [values[n] for n in names]
        found = made.convert(self.parameter, model=self.model, config=self.model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in found.items()}

    @property
    def tensors(self) -> list[str]:
        """The tensors on disk."""
        return [name for names in self.names.values() for name in names]

    def made(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, given those on disk; none where some of the tensors (a few experts) are not there."""
        try:
            found = self.convert({n: torch.empty(shapes[n], device="meta") for n in self.tensors})
        except (RuntimeError, ValueError, KeyError, IndexError):
            return {}
        return {name: tuple(values.shape) for name, values in found.items()}

    def revert(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on disk as views of the parameters; left out is what would be a copy, which each caller must see to."""
        back = self.converter.reverse_transform()
        held: Any = dict(zip(back.source_patterns, ([p] for p in parameters.values()), strict=False))
        with _WithoutCopies():
            for step in back.operations:
                told = {"source_patterns": back.source_patterns, "target_patterns": back.target_patterns}
                held = step.convert(
                    held, **told, full_layer_name=self.parameter, model=self.model, config=self.model.config
                )
        storages = {p.untyped_storage().data_ptr() for p in parameters.values()}
        views: dict[str, Tensor] = {}
        for pattern, target in zip(self.converter.source_patterns, back.target_patterns, strict=True):
            for i, name in enumerate(self.names.get(pattern, ())):
                found = held.get(target.replace("*", str(i)), held.get(target))
                found = found[0] if isinstance(found, list) else found
                if found is not None and found.untyped_storage().data_ptr() in storages:
                    views[name] = found
        return views


class _WithoutCopies(torch.overrides.TorchFunctionMode):
    """`contiguous` gives the tensor itself, so that chunks and transposes stay views."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Reading:
    """A checkpoint's tensors as a model reads them: those that it knows, and those that it converts together."""

    spots: dict[str, Spot]
    fused: tuple[Fusion, ...]


class Naming:
    """What a transformers model calls the tensors of checkpoints.

    Args:
        model: of a class of transformers; on the meta device unless it is in use anyway.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.held: dict[str, Tensor] = model.state_dict(keep_vars=True)

    @classmethod
    def of(cls, folder: Path, *, tied: bool | None = None) -> Naming | None:
        """That of the class that a folder's config names; None for code of one's own, and for what cannot be built, with a
        warning.

        Args:
            tied: as if the config said so of the head.
        """
        config = config_of(folder)
        if config is None or getattr(config, "auto_map", None) or (kind := class_of(config)) is None:
            return None
        if tied is not None:
            config.tie_word_embeddings = tied
        try:
            with torch.device("meta"):
                return cls(kind(config))
        except Exception as error:  # whatever a class makes of a config that its own loader would refuse as well
            said = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            warnings.warn(
                f"{folder / 'config.json'}: {kind.__name__} cannot be built ({said}), so it is not known what it would read",
                stacklevel=2,
            )
            return None

    @property
    def ties(self) -> list[list[str]]:
        """Parameters that are one, the source first."""
        groups: dict[str, list[str]] = {}
        for target, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            groups.setdefault(source, [source]).append(target)
        return list(groups.values())

    def read(self, names: Iterable[str]) -> Reading:
        """As `from_pretrained` does: each name renamed, then given to at most one converter."""
        from transformers import conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules = conversion_mapping.get_model_conversion_mapping(self.model)
        renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        converters = [r for r in rules if isinstance(r, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        held: Any = self.held
        base = {"base_model_prefix": self.model.base_model_prefix, "meta_state_dict": held}
        spots: dict[str, Spot] = {}
        fused: dict[str, Fusion] = {}
        for name in sorted(names, key=dot_natural_key):
            found, pattern = rename_source_key(name, renamings, converters, **base)
            if found not in held and name in held:
                found, pattern = rename_source_key(name, [], [], **base)
            if found not in held:
                continue
            if pattern is None:
                spots[name] = Spot(found)
                continue
            fusion = fused.setdefault(found, Fusion(by_pattern[pattern], found, {}, self.model))
            collected = fusion.names.setdefault(pattern, [])
            spots[name] = Spot(found, (fusion.converter.source_patterns.index(pattern) + 1, len(collected)))
            collected.append(name)
        return Reading(spots, tuple(fused.values()))

    def lacking(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What the class would not find in a checkpoint of these tensors (name -> shape), or find of another shape.

        A warning names what it would pass over.
        """
        reading = self.read(shapes)
        together = {n for fusion in reading.fused for n in fusion.tensors}
        found = {s.parameter: shapes[n] for n, s in reading.spots.items() if n not in together}
        for fusion in reading.fused:
            found |= fusion.made(shapes)
        for group in self.ties:
            if there := [n for n in group if n in found]:
                found |= dict.fromkeys((n for n in group if n not in found), found[there[0]])
        missing = self.not_ignored(missing=(n for n in self.held if n not in found))
        if unread := self.not_ignored(unexpected=(n for n in shapes if n not in reading.spots)):
            kind = type(self.model).__name__
            warnings.warn(
                f"{kind}, which config.json names, passes over {len(unread)} tensors, first {unread[0]}", stacklevel=2
            )
        return missing + [n for n, shape in found.items() if n in self.held and shape != tuple(self.held[n].shape)]

    def not_ignored(self, *, missing: Iterable[str] = (), unexpected: Iterable[str] = ()) -> list[str]:
        """Of the parameters without a tensor, and the tensors without a parameter, those that the class does not allow for."""
        info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
        self.model._adjust_missing_and_unexpected_keys(info)
        return sorted(info.missing_keys | info.unexpected_keys)


def config_of(folder: Path) -> Any | None:
    """A folder's config as transformers reads it; None where there is none, or of code of one's own."""
    if not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # a kind that transformers does not know, or values of the wrong kind
        return None


def class_of(config: Any) -> Any | None:
    """The class of transformers that a config names, else the one that writes text; None where there is none."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kinds = [getattr(transformers, name, None) for name in config.architectures or ()]
    found = next((kind for kind in kinds if hasattr(kind, "base_model_prefix")), None)
    maps = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, auto.MODEL_MAPPING)
    return found or next((m[type(config)] for m in maps if type(config) in m), None)


def writer_of(config: Any, source: str) -> Any:
    """The class of transformers that writes text with a config; of a model saved without its head, the one with a head.

    Raises:
        CheckpointError: there is none, or it is an encoder-decoder.
    """
    from transformers.models.auto import modeling_auto as auto

    named = ", ".join(config.architectures or [config.model_type])
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"{source}: expected a model that goes on with its prompt, found {named}, an encoder-decoder; such models can be "
            "averaged, merged and diffed, not measured, searched or aligned"
        )
    found = class_of(config)
    if found is not None and found is auto.MODEL_MAPPING.get(type(config), None):
        maps = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        found = next((m[type(config)] for m in maps if type(config) in m), found)
    if found is None or not found.can_generate():
        raise CheckpointError(
            f"{source}: expected a causal language model, which goes on with its prompt, found {named}"
        )
    return found
