"""Keep a model good at everything at once: averages after alignment, balance while many tasks train.

>>> from counterpoise import Panel, restore
>>> panel = Panel.load("prompts.jsonl", "sentiment:reviews.csv", ["choices:arc_easy.jsonl"])  # doctest: +SKIP
>>> result = restore("pre", "post", "restored", panel)  # doctest: +SKIP
>>> result.verdict, result.pick  # doctest: +SKIP
>>> pandas.DataFrame(result.points)  # doctest: +SKIP

After training, on checkpoints:
    restore, measure_tax    the average that gives abilities back, with its report; what alignment cost
    average, Recipe         an average of given ratios, and the file that says how it was made
    heal, Teaching          teach a model what PRE and POST knew
    Panel, Drawing          what models are measured by: prompts, a reward, abilities; how responses are drawn
    HMA, Ramp, TwoSided     what looks for ratios
    Details, Heal, EngineSettings    what few runs of restore need to say
    Restored, Taxed, Aligned    results: typed, read back from files, shown in notebooks
    Checkpoint, CheckpointError, open_checkpoint, mix, ResidentAverage, hma    what averages are made of
    Partition, thirds, equal, layerwise, by_module    which tensors share a ratio

During training:
    BanditMTL               one scalar out of the losses of many tasks; more in counterpoise.multitask
    align, Machine          RSF, PPO or DPO with mitigations; in what precision, on what device
    TaxCallback             the tax while a Trainer trains

help(counterpoise.Panel) tells of one of them. The commands are in `counterpoise --help`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from counterpoise.alignment.align import Aligned as Aligned, align as align
    from counterpoise.alignment.heal import heal as heal
    from counterpoise.alignment.settings import Teaching as Teaching
    from counterpoise.alignment.training.models import Machine as Machine
    from counterpoise.averaging.average import average as average
    from counterpoise.averaging.mix import mix as mix
    from counterpoise.averaging.partition import (
        Partition as Partition,
        by_module as by_module,
        equal as equal,
        layerwise as layerwise,
        thirds as thirds,
    )
    from counterpoise.averaging.recipe import Recipe as Recipe
    from counterpoise.averaging.resident import ResidentAverage as ResidentAverage
    from counterpoise.checkpoints.checkpoint import Checkpoint as Checkpoint
    from counterpoise.checkpoints.files import CheckpointError as CheckpointError
    from counterpoise.checkpoints.opening import open_checkpoint as open_checkpoint
    from counterpoise.evaluation.callback import TaxCallback as TaxCallback
    from counterpoise.evaluation.panel import Panel as Panel
    from counterpoise.language.engine import EngineSettings as EngineSettings
    from counterpoise.language.sampling import Drawing as Drawing
    from counterpoise.multitask import BanditMTL as BanditMTL
    from counterpoise.restoration.found import Restored as Restored, Taxed as Taxed
    from counterpoise.restoration.request import Details as Details, Heal as Heal
    from counterpoise.restoration.restore import measure_tax as measure_tax, restore as restore
    from counterpoise.search.candidates import HMA as HMA, Ramp as Ramp, TwoSided as TwoSided
    from counterpoise.search.hma import hma as hma

    __version__: str

# Names are resolved on first use, so that `counterpoise --help` does not import torch.
_ROOMS = {
    "alignment.align": "Aligned align",
    "alignment.heal": "heal",
    "alignment.settings": "Teaching",
    "alignment.training.models": "Machine",
    "averaging.average": "average",
    "averaging.mix": "mix",
    "averaging.partition": "Partition by_module equal layerwise thirds",
    "averaging.recipe": "Recipe",
    "averaging.resident": "ResidentAverage",
    "checkpoints.checkpoint": "Checkpoint",
    "checkpoints.files": "CheckpointError",
    "checkpoints.opening": "open_checkpoint",
    "evaluation.callback": "TaxCallback",
    "evaluation.panel": "Panel",
    "language.engine": "EngineSettings",
    "language.sampling": "Drawing",
    "multitask": "BanditMTL",
    "restoration.found": "Restored Taxed",
    "restoration.request": "Details Heal",
    "restoration.restore": "measure_tax restore",
    "search.candidates": "HMA Ramp TwoSided",
    "search.hma": "hma",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}

# What `import *` takes, and help() shows whole: the verbs. Types are told of one by one, as help(counterpoise.Panel).
__all__ = ["align", "average", "heal", "measure_tax", "restore"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("counterpoise")
    if name not in _HOMES:
        raise AttributeError(f"module 'counterpoise' has no attribute {name!r}")
    return getattr(import_module(f"counterpoise.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
