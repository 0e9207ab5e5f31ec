"""The recipe of an averaged checkpoint: which ratios made it, of what, how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any, TypeVar

from counterpoise.averaging.partition import Block, Partition
from counterpoise.checkpoints.reading import parse_json, read_text

FORMAT = "counterpoise recipe 1"
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """Which ratios made a checkpoint, of what, how: everything needed to make it again.

    Attributes:
        ratios: one per block of the partition.
        inputs: for PRE and POST the source and the sha256 of each file.
        settings: what else decided the result (donor, dropped tensors, a search's own settings).
    """

    partition: Partition
    ratios: tuple[float, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """The weighted mean ratio, which the tensors outside the blocks take."""
        return self.partition.mean(self.ratios)

    @property
    def told(self) -> str:
        """Itself in a few words."""
        return f"{len(self.ratios)} {'ratio' if len(self.ratios) == 1 else 'ratios'}, mean {self.mean:g}"

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `Recipe.from_json` reads it back."""
        blocks = [
            {"name": b.name, "ratio": r, "weight": b.weight, "layers": list(b.layers), "tensors": list(b.tensors)}
            for b, r in zip(self.partition.blocks, self.ratios, strict=True)
        ]
        return {
            "format": FORMAT,
            "formula": "pre + ratio * (post - pre)",
            "mean": self.mean,
            "partition": self.partition.name,
            "blocks": blocks,
            "rest": {"ratio": self.mean, "tensors": list(self.partition.rest)},
            "inputs": dict(self.inputs),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not a recipe.
        """
        if (found := content.get("format") if isinstance(content, dict) else content) != FORMAT:
            raise ValueError(f"expected a recipe (format: {FORMAT}), found format {str(found)[:60]!r}")
        refuse_unlike(content)
        listed = content["blocks"]
        blocks = [
            Block(b["name"], float(b["weight"]), tuple(b["tensors"]), tuple(map(index, b["layers"]))) for b in listed
        ]
        cut = Partition(content["partition"], tuple(blocks), tuple(content["rest"]["tensors"]))
        rest = {name: content[name] for name in ("inputs", "settings", "versions")}
        return cls(cut, tuple(float(b["ratio"]) for b in listed), **rest, warnings=tuple(content["warnings"]))

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe.json, as `average` and `search` write it."""
        return read_with(cls.from_json, path, "a recipe")


def read_with(made: Callable[[Any], T], path: str | Path, what: str) -> T:
    """What `made` makes of a recipe.json; a ValueError says what of it is not `what`."""
    try:
        return made(parse_json(read_text(path), str(path)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error).removeprefix(f"{path}: ")
        raise ValueError(
            f"{path}: not {what} ({said[:200]}); expected a recipe.json of counterpoise, or a .yml of mergekit"
        ) from None


def refuse_unlike(content: Mapping[str, Any]) -> None:
    """Raise a ValueError where what is told beside the plan of a recipe, of average or merge, is of another kind."""
    for name in ("inputs", "settings", "versions"):
        if not isinstance(content[name], dict):
            raise ValueError(f"{name}: expected an object, found {str(content[name])[:60]!r}")
    if wrong := [side for side, told in content["inputs"].items() if not isinstance(told, dict)]:
        raise ValueError(f"inputs: expected an object for {wrong[0]}, found {str(content['inputs'][wrong[0]])[:60]!r}")
    told = {"warnings": content["warnings"], "dropped": content["settings"].get("dropped", ())}
    told |= {
        "command": [content["settings"].get("command") or ""],
        "sources": [i.get("source", "") for i in content["inputs"].values()],
    }
    blocks = content.get("blocks", ())
    told |= {
        "blocks": [b["name"] for b in blocks],
        "tensors": [n for b in (*blocks, content.get("rest", {"tensors": ()})) for n in b["tensors"]],
    }
    told |= {"partition": [content.get("partition", "")]}
    for name, texts in told.items():
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"{name}: expected texts, found {str(wrong[0])[:60]!r}")
