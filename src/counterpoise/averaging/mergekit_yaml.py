"""What may stand in a recipe of mergekit, and what a setting of it says of one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from counterpoise.averaging.arithmetic import METHODS

TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "parameters",
)
SHARED = ("normalize", "rescale", "lambda", "int8_mask")
OF_A_MODEL = ("weight", "density")
Settings = Mapping[str, Any]
Read = Callable[[Any, str], Any]


def value_of(setting: Any, name: str, depth: float, option: str, read: Read) -> Any:
    """What a setting says of a tensor; None where no filter fits.

    >>> value_of([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}], "layers.1.mlp.up", 0.25, "weight", number)
    0.25
    """
    if not isinstance(setting, (list, dict)):
        return read(setting, option)
    listed = [setting] if isinstance(setting, dict) else setting
    if any(isinstance(e, dict) for e in listed):
        for condition in listed:
            if (part := condition.get("filter")) in (None, "*") or part in name:
                return value_of(condition["value"], name, depth, option, read)
        return None
    if not listed:
        return None
    values = [read(e, option) for e in listed]
    place = depth * (len(values) - 1)
    low = int(place)
    if isinstance(values[0], bool):
        return values[low]
    return (1 - (place - low)) * values[low] + (place - low) * values[min(low + 1, len(values) - 1)]


def number(value: Any, option: str) -> float:
    """A finite number, also as yaml gives 1e-3: a text."""
    try:
        found = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{option}: expected a finite number, found {value!r}")
    return found


def flag(value: Any, option: str) -> bool:
    """True or false, also as 1 or 0."""
    if value not in (True, False):
        raise ValueError(f"{option}: expected true or false, found {value!r}")
    return bool(value)


def model_of(value: Any, where: str) -> str:
    """A model's name; of `base+adapter` it is the adapter that is opened on PRE."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected a model as a text (a folder or a hub id), found {value!r}")
    return value


def graded(value: Any) -> bool:
    """Whether a gradient stands in it: a list of values that are no objects."""
    if isinstance(value, dict):
        return any(graded(v) for v in value.values())
    return isinstance(value, list) and (not any(isinstance(e, dict) for e in value) or any(map(graded, value)))


def check_document(document: Any) -> None:
    """Refuse keys and shapes that are not honoured."""
    if not isinstance(document, dict) or "merge_method" not in document:
        raise ValueError(f"expected a recipe of mergekit, with merge_method, found {str(document)[:60]!r}")
    if (method := str(document["merge_method"])) not in METHODS:
        raise ValueError(f"merge_method: expected {', '.join(METHODS)}, found {method!r}, which is not made here")
    _refuse_keys(document, TOP, "", {"modules": "write models or slices", "chat_template": "set it in OUT's tokenizer"})
    if (document.get("models") is None) == (document.get("slices") is None):
        raise ValueError("expected either models or slices, found both or neither")
    if method != "linear" and document.get("base_model") is None:
        raise ValueError(f"base_model: expected one for {method}, found none")
    held = document.get("tokenizer") or {}
    _refuse_keys(held, ("source",), "tokenizer.", {})
    _check_settings(document.get("parameters"), "", method, (*SHARED, *OF_A_MODEL))
    for piece in _objects(document.get("slices"), "slices", "sources"):
        _refuse_keys(piece, ("sources", "parameters"), "slices.", {})
        _check_settings(piece.get("parameters"), "slices.", method, (*SHARED, *OF_A_MODEL))
        for source in _objects(piece.get("sources"), "slices.sources", "model"):
            _refuse_keys(source, ("model", "layer_range", "parameters"), "slices.sources.", {})
            bounds = source.get("layer_range")
            if not (isinstance(bounds, list) and len(bounds) == 2 and all(type(b) is int for b in bounds)):
                raise ValueError(f"layer_range: expected two whole numbers, found {bounds!r}")
            _check_settings(source.get("parameters"), "slices.sources.", method, OF_A_MODEL)
    for source in _objects(document.get("models"), "models", "model"):
        _refuse_keys(source, ("model", "parameters"), "models.", {})
        _check_settings(source.get("parameters"), "models.", method, OF_A_MODEL)


def _objects(value: Any, where: str, needed: str) -> list[dict[str, Any]]:
    """A list of objects, or nothing where it is not there; each has what is `needed`."""
    if value is not None and not (isinstance(value, list) and value and all(isinstance(v, dict) for v in value)):
        raise ValueError(f"{where}: expected a list of objects, found {str(value)[:60]!r}")
    if lacking := [v for v in value or () if v.get(needed) is None]:
        raise ValueError(f"{where}: expected {needed} in each, found none in {str(lacking[0])[:60]}")
    return value or []


def _refuse_keys(held: Any, known: Sequence[str], where: str, instead: Mapping[str, str]) -> None:
    if not isinstance(held, dict):
        raise ValueError(f"{where.rstrip('.')}: expected an object, found {str(held)[:60]!r}")
    for key in held:
        if key not in known:
            raise ValueError(f"{where}{key}: not honoured here; {instead.get(key, 'leave it out')}")


def _check_settings(held: Any, where: str, method: str, known: Sequence[str]) -> None:
    """Settings, each a value, a list of values (a gradient) or values by filter."""
    if held is None:
        return
    linear = [n for n in known if n in ("weight", "normalize")]
    _refuse_keys(held, linear if method == "linear" else known, f"{where}parameters.", {
        "normalize": "it is of the whole merge: give it in parameters beside merge_method",
        "density": f"{method} leaves nothing out",
    })  # fmt: skip
    for option, setting in held.items():
        read: Read = flag if option in ("normalize", "rescale", "int8_mask") else number
        listed = setting if isinstance(setting, list) else [setting]
        conditions = [e for e in listed if isinstance(e, dict)]
        for condition in conditions:
            _refuse_keys(condition, ("filter", "value"), f"{where}{option}.", {})
            inner = condition.get("value")
            if not isinstance(condition.get("filter", ""), (str, type(None))) or isinstance(inner, dict):
                raise ValueError(f"{where}{option}: expected a filter as a text and a value, found {condition!r}")
        if conditions and len(conditions) < len(listed):
            raise ValueError(f"{where}{option}: expected values or filters, found both in one list")
        for value in conditions or [{"value": setting}]:
            for one in value["value"] if isinstance(value.get("value"), list) else [value.get("value")]:
                read(one, f"{where}{option}")
