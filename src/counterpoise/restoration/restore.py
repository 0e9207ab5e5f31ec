"""From two checkpoints to the averaged one: the tax, the search, the front, the pick, the checkpoint and its report."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from counterpoise.alignment.training import processes
from counterpoise.averaging.average import average, describe_inputs
from counterpoise.averaging.partition import partition
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.checkpoint import left_behind
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.preflight import Pair, preflight
from counterpoise.evaluation.items import FileAbility
from counterpoise.evaluation.panel import ROUGH, Panel
from counterpoise.evaluation.results import write_results
from counterpoise.evaluation.workbench import Point, Workbench
from counterpoise.language.engine import TRANSFORMERS, EngineSettings
from counterpoise.language.loading import refuse_unmeasurable
from counterpoise.records import Stages, Store, digest, named, public, versions, write_whole
from counterpoise.restoration.cluster import Cluster
from counterpoise.restoration.compare import search_and_pick
from counterpoise.restoration.distance import measured
from counterpoise.restoration.found import Restored, Taxed
from counterpoise.restoration.pick import tax_verdict
from counterpoise.restoration.race import LOOKS
from counterpoise.restoration.request import KEEP, MEANS, RESULT, Details, Heal, Request
from counterpoise.search.candidates import CONTROLS, HMA, Search


def restore(
    pre: str | Path,
    post: str | Path,
    out: str | Path,
    panel: Panel,
    *,
    searches: Sequence[Search] = (HMA(), *CONTROLS),
    means: Sequence[float] = MEANS,
    keep_reward: float = KEEP,
    heal: Heal | int | None = None,
    details: Details = Details(),
    device: str = "cpu",
    work: str | Path | None = None,
    progress: Stages | None = None,
) -> Restored:
    """Measure what alignment cost, find the average that gives it back, and write that checkpoint with its report.

    Lin et al. 2024: MA and HMA over a grid of mean ratios, with ramps over depth (LiNeS), a reversed one and random ratios
    beside them, and whatever else is asked for. Ratios are searched on the proxy part of the prompts, the pick is made on
    the validation part, and what is reported of the pick was measured on the held-out part. A killed run goes on from its
    work folder.

    Args:
        pre, post, out, searches, means, keep_reward, device, work: see `Request`.
        heal: a healing beside the averages, or its steps.
        panel: prompts, reward and abilities; see `Panel.load`.
        details: what few runs need to say.

    Where `torch.distributed` is initialised, or torchrun has started several processes, all of them must call it alike.

    Returns:
        What restore.json holds; its `out` is None when there is nothing worth writing, and `verdict` says why.

    Raises:
        ValueError, CheckpointError: see `Request.check` and `preflight`.
    """
    folder = None if work is None else Path(work)
    healing = heal if heal is None or isinstance(heal, Heal) else Heal(heal)
    where = (pre, post, Path(out), tuple(searches), means, keep_reward, healing, device, folder)
    return Restored(run(Request(*where, **vars(details)), panel, progress=progress))


def run(
    request: Request,
    panel: Panel,
    *,
    cluster: Cluster | None = None,
    command: str | None = None,
    progress: Stages | None = None,
) -> dict[str, Any]:
    """`restore` as asked for, measured on a cluster where there is one; the commands give what was typed, for the record."""
    begun, out, work = time.time(), request.out, request.folder
    files = sum(isinstance(a, FileAbility) for a in panel.abilities)
    request.check(files, len(panel.abilities) - files)
    processes.join(request.device, request.shard)
    panel = replace(panel, looks=LOOKS) if request.race else panel
    pair = preflight(request.pre, request.post, drop=request.drop, out=out)
    request.check_words(pair.pre, pair.post)
    shapes = pair.shapes
    cut = partition(shapes, request.blocks)
    on: dict[str, Any] = {"donor": request.donor, "device": request.device, "dtype": request.dtype}
    on |= {"engine": request.engine, "shard": request.shard}
    unrelated, store = request.allow_unrelated, Store(work, in_step=request.shard > 1)
    bench = Workbench.scanned(pair, panel, store, allow_unrelated=unrelated, progress=progress, **on)
    settings = {**request.settings, **panel.settings, **request.more_settings, "dtype": str(bench.dtype)}
    decided = {k: v for k, v in settings.items() if (k, v) != ("replies", 1)}  # as before there were replies
    decided |= {"primary": panel.primary} if panel.primary else {}
    key = digest([bench.inputs, decided, panel.fingerprint])
    if (finished := _finished(out, work, key)) is not None:
        return finished
    result: dict[str, Any] = {
        "counterpoise": versions().get("counterpoise"),
        "key": key,
        "command": command or " ".join(sys.argv),
        "seed": panel.drawing.seed,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "inputs": describe_inputs(pair),
        **panel.source,
        "settings": settings,
        "warnings": [*bench.warnings, *left_behind(bench.giver)],
        "partition": cut.summary(shapes),
    }
    with contextlib.nullcontext() if cluster is None else cluster.measuring(bench, request):
        pick = search_and_pick(bench, request, result)
    with bench.store.alone({"what": "writing"}):  # of several processes with this work folder the first one
        return _finished(out, work, key) or _written(request, result, pick, pair, begun, progress)


def _written(
    request: Request, result: dict[str, Any], pick: Point | None, pair: Pair, begun: float, progress: Stages | None
) -> dict[str, Any]:
    """The result, with OUT where there is a pick and the report there or in the work folder."""
    out, work = request.out, request.folder
    if request.fast:
        result["verdict"] = f"{ROUGH}, {' and '.join(s.title for s in request.searches)} alone. {result['verdict']}"
    result["seconds"] = round(time.time() - begun, 1)
    result["out"] = None if pick is None else str(out)
    pair.refuse_changed()
    if pick is None:
        _write_report(work, result)
        return result

    def finish(folder: Path) -> None:
        _write_report(folder, result, card=True)
        pair.refuse_changed()  # what was measured is what was averaged

    model = pick.model
    how = {"healed": result["healed"]} if model.instead else {}
    average(
        model.instead or request.pre,  # a healed model stands in PRE's place, none of the update added
        request.post,
        out,
        Recipe(model.partition, model.ratios, settings={**result["settings"], **how, "command": result["command"]}),
        donor=request.donor,
        drop=request.drop,
        allow_unrelated=request.allow_unrelated,
        also=finish,
        progress=named(progress, "writing the checkpoint"),
    )
    return result


def _finished(out: Path, work: Path, key: str) -> dict[str, Any] | None:
    """The result of an earlier run of the same thing: in OUT, or in the work folder when no checkpoint was worth writing."""
    for folder in (out, work):
        if not (path := folder / RESULT).is_file():
            continue
        earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if earlier.get("key") == key:
            return {**earlier, "already_finished": True}
        if folder == out:
            raise CheckpointError(
                f"{out}: holds the result of other inputs or settings, or of another version of counterpoise; choose another "
                "name or remove it"
            )
    return None


def _write_report(folder: Path, result: dict[str, Any], *, card: bool = False) -> None:
    from counterpoise.report.html import report_page
    from counterpoise.tables.card import model_card

    result = public(result)
    write_whole(folder / "report.html", report_page(result))
    if card:
        (folder / "README.md").write_text(model_card(result), encoding="utf-8")
    write_results(folder / RESULT, result)  # last: it marks the run as finished


def measure_tax(
    pre: str | Path,
    post: str | Path,
    panel: Panel,
    *,
    work: str | Path | None = None,
    drop: Sequence[str] = (),
    allow_unrelated: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    engine: EngineSettings = TRANSFORMERS,
    shard: int = 1,
    progress: Stages | None = None,
) -> Taxed:
    """PRE and POST on the held-out part, in the form of restore.json.

    Where `torch.distributed` is initialised, all processes must call it alike.

    Args:
        shard: processes, all that were started, among which the model, PRE and POST are cut up.

    Returns:
        Beside its fields "distance" (see `restoration.distance.distances`), "calibration", and what was measured.
    """
    engine.check(sum(not isinstance(a, FileAbility) for a in panel.abilities), shard)
    refuse_unmeasurable(pre, post)
    if shard > 1:
        processes.join(device, shard)
    pair = preflight(pre, post, drop=drop)
    on: dict[str, Any] = {"device": device, "dtype": dtype, "allow_unrelated": allow_unrelated, "engine": engine}
    on["shard"] = shard
    with contextlib.ExitStack() as stack:
        folder = work if work is not None else stack.enter_context(tempfile.TemporaryDirectory())
        bench = Workbench.scanned(pair, panel, Store(folder, in_step=shard > 1), progress=progress, **on)
        ends = bench.ends("held-out")
        result = {
            "seed": panel.drawing.seed,
            "versions": versions(),
            "inputs": describe_inputs(pair),
            **panel.source,
            "settings": {**panel.settings, "dtype": str(bench.dtype), **engine.told, **bench.cut_up},
            "warnings": list(bench.warnings),
            **measured(bench, ends),
        }
        pair.refuse_changed()
    return Taxed({**result, "verdict": tax_verdict(result)})
