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
    Details, Heal           what few runs of restore need to say
    Restored, Taxed, Aligned    results: typed, read back from their files, shown in notebooks
    Checkpoint, CheckpointError, open_checkpoint, mix, ResidentAverage, hma    what these are made of
    Partition, thirds, equal, layerwise, by_module    which tensors share a ratio

During training:
    BanditMTL               one scalar out of the losses of many tasks; more in counterpoise.multitask
    align, Machine          RSF, PPO or DPO with mitigations; in what precision, on what device
    TaxCallback             the tax while a Trainer trains

help(counterpoise.restore) tells more of one. The commands are in `counterpoise --help`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from counterpoise.alignment.align import Aligned, align
    from counterpoise.alignment.heal import heal
    from counterpoise.alignment.settings import Teaching
    from counterpoise.alignment.training.models import Machine
    from counterpoise.averaging.average import average
    from counterpoise.averaging.mix import mix
    from counterpoise.averaging.partition import Partition, by_module, equal, layerwise, thirds
    from counterpoise.averaging.recipe import Recipe
    from counterpoise.averaging.resident import ResidentAverage
    from counterpoise.checkpoints.checkpoint import Checkpoint
    from counterpoise.checkpoints.files import CheckpointError
    from counterpoise.checkpoints.opening import open_checkpoint
    from counterpoise.evaluation.callback import TaxCallback
    from counterpoise.evaluation.panel import Panel
    from counterpoise.language.sampling import Drawing
    from counterpoise.multitask import BanditMTL
    from counterpoise.restoration.found import Restored, Taxed
    from counterpoise.restoration.request import Details, Heal
    from counterpoise.restoration.restore import measure_tax, restore
    from counterpoise.search.candidates import HMA, Ramp, TwoSided
    from counterpoise.search.hma import hma

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
    "language.sampling": "Drawing",
    "multitask": "BanditMTL",
    "restoration.found": "Restored Taxed",
    "restoration.request": "Details Heal",
    "restoration.restore": "measure_tax restore",
    "search.candidates": "HMA Ramp TwoSided",
    "search.hma": "hma",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = [
    "HMA", "Aligned", "BanditMTL", "Checkpoint", "CheckpointError", "Details", "Drawing", "Heal", "Machine",
    "Panel", "Partition", "Ramp", "Recipe", "ResidentAverage", "Restored", "TaxCallback", "Taxed", "Teaching", "TwoSided",
    "align", "average", "by_module", "equal", "heal", "hma", "layerwise", "measure_tax", "mix", "open_checkpoint",
    "restore", "thirds",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("counterpoise")
    if name not in _HOMES:
        raise AttributeError(f"module 'counterpoise' has no attribute {name!r}")
    return getattr(import_module(f"counterpoise.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
