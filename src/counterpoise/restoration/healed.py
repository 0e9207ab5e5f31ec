"""Points beyond the averages: a start between PRE and POST, healed with both as teachers, measured every few steps."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from counterpoise.alignment.heal import Healing
from counterpoise.alignment.teaching import DRAWN_BY
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.models import Machine
from counterpoise.averaging.average import average
from counterpoise.averaging.line import beside
from counterpoise.averaging.partition import layerwise
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.workbench import Model, Point, Workbench
from counterpoise.records import digest, read_lines
from counterpoise.restoration.request import Heal, Request
from counterpoise.search.hma import linear_ramp


def healed(bench: Workbench, request: Request, heal: Heal, pick: Point | None) -> tuple[list[Point], dict[str, Any]]:
    """The points of a healing on validation data, and what restore.json tells of it.

    Args:
        pick: the best average, from which "pick" heals; where there is none, POST.
    """
    panel, post = bench.panel, Recipe(bench.whole, (1.0,))
    if heal.ramp is None:
        start, name = (post, "POST") if pick is None else (Recipe(pick.model.partition, pick.model.ratios), pick.name)
    else:
        slope, mean = heal.ramp
        deep = layerwise(bench.pair.names)
        ramp = Recipe(deep, tuple(linear_ramp(deep, mean, slope)))
        start, name = (ramp if slope else Recipe(bench.whole, (mean,))), heal.start
    decided = [bench.inputs, panel.settings, panel.fingerprint, name, *start.ratios, heal.steps, heal.keep_by]
    decided += [DRAWN_BY] if heal.keep_by == "bandit" else []
    decided += [] if heal.openings is None else [{"openings": heal.openings}]
    folder = request.folder / f"heal-{digest(decided)[:12]}"
    fitted: dict[str, Any] = {"donor": request.donor, "drop": request.drop, "allow_unrelated": request.allow_unrelated}
    making = {"what": "healing", "in": folder.name}
    with bench.store.alone(making):
        for side, recipe in {
            "post": post,
            "post" if start == post else "start": start,
        }.items():  # POST may be an adapter
            if not (at := folder / side).is_dir():
                average(request.pre, request.post, at, recipe, **fitted)
    bench.free()
    healing = Healing(
        at, folder / "post", request.pre, folder / "healed", panel.prompts, panel.abilities, heal.openings,
        teaching=heal.teaching(panel.drawing.rows),
        drawing=panel.draws(n=1, temperature=1.0), work=folder / "run",
        machine=Machine(torch.promote_types(bench.dtype, torch.float32), device=request.device),
    )  # fmt: skip
    with contextlib.nullcontext() if processes.started() > 1 else bench.store.alone(making):  # torchrun's heal together
        record = healing.run(progress=bench.stages)
    models, told = [], []
    before, *points = read_lines(folder / "run" / "metrics.jsonl")
    for metrics in points:
        at = folder / "run" / f"iteration-{metrics['iteration']:04d}"
        title = f"{name} healed {metrics['step']}"
        models.append(Model(title, "healed", bench.whole, (0.0,), at))
        told.append({"name": title, **metrics, "line": beside(bench.pair, preflight(request.pre, at)).told()})
    costs = {k: sum(row[k] for row in (before, *points)) for k in ("drawn", "trained", "seconds")}
    taught = {k: record["healed"][k] for k in ("learning_rate", "ended", "warnings")}
    found = {"start": name, "settings": record["settings"], "points": told, **costs, **taught}
    return bench.points(models, "validation"), found
