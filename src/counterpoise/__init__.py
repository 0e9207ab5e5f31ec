"""counterpoise: keep a model good at everything at once.

>>> from counterpoise import Panel, restore
>>> panel = Panel.load("prompts.jsonl", "sentiment:reviews.csv", ["choices:arc_easy.jsonl"])  # doctest: +SKIP
>>> restore("pre", "post", "restored", panel)["verdict"]  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from counterpoise.alignment.align import align
    from counterpoise.averaging.average import average
    from counterpoise.averaging.mix import mix
    from counterpoise.averaging.partition import Partition, by_module, equal, layerwise, thirds
    from counterpoise.averaging.recipe import Recipe
    from counterpoise.averaging.resident import ResidentAverage
    from counterpoise.checkpoints.checkpoint import Checkpoint
    from counterpoise.checkpoints.files import CheckpointError
    from counterpoise.checkpoints.opening import open_checkpoint
    from counterpoise.evaluation.panel import Panel
    from counterpoise.multitask import BanditMTL
    from counterpoise.restoration.restore import measure_tax, restore
    from counterpoise.search.hma import hma

# Names are resolved on first use, so that `counterpoise --help` does not import torch.
_HOMES = {
    "BanditMTL": "multitask",
    "Checkpoint": "checkpoints.checkpoint",
    "CheckpointError": "checkpoints.files",
    "Panel": "evaluation.panel",
    "Partition": "averaging.partition",
    "Recipe": "averaging.recipe",
    "ResidentAverage": "averaging.resident",
    "align": "alignment.align",
    "average": "averaging.average",
    "by_module": "averaging.partition",
    "equal": "averaging.partition",
    "hma": "search.hma",
    "layerwise": "averaging.partition",
    "measure_tax": "restoration.restore",
    "mix": "averaging.mix",
    "open_checkpoint": "checkpoints.opening",
    "restore": "restoration.restore",
    "thirds": "averaging.partition",
}

__all__ = [
    "BanditMTL",
    "Checkpoint",
    "CheckpointError",
    "Panel",
    "Partition",
    "Recipe",
    "ResidentAverage",
    "align",
    "average",
    "by_module",
    "equal",
    "hma",
    "layerwise",
    "measure_tax",
    "mix",
    "open_checkpoint",
    "restore",
    "thirds",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'counterpoise' has no attribute {name!r}")
    return getattr(import_module(f"counterpoise.{_HOMES[name]}"), name)
