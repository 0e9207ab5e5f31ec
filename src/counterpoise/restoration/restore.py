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

from counterpoise.averaging.average import average, describe_inputs
from counterpoise.averaging.mix import Donor
from counterpoise.averaging.partition import partition
from counterpoise.checkpoints.files import CheckpointError, refuse_occupied
from counterpoise.checkpoints.preflight import preflight, scan
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.results import write_results
from counterpoise.evaluation.tax import tax_table
from counterpoise.evaluation.workbench import Workbench
from counterpoise.records import Stages, Store, digest, versions
from counterpoise.restoration.compare import compare
from counterpoise.search.searching import TwoSided
from counterpoise.search.settings import Search, refuse_search, refuse_settings

RESULT = "restore.json"
LAMBDAS = (0.25, 0.5, 1.0, 2.0, 4.0)


def restore(
    pre: str | Path,
    post: str | Path,
    out: str | Path,
    panel: Panel,
    *,
    search: Search = "hma",
    blocks: int | str | None = None,
    means: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    mean: float | None = None,
    lambdas: Sequence[float] = LAMBDAS,
    alignment: str = "imitation",
    calibrate: int = 0,
    min_effective_sets: float | None = None,
    keep_reward: float = 0.95,
    proxy_size: int = 256,
    controls: bool = True,
    donor: Donor = "post",
    drop: Sequence[str] = (),
    allow_unrelated: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    work: str | Path | None = None,
    command: str | None = None,
    progress: Stages | None = None,
) -> dict[str, Any]:
    """Measure what alignment cost, find the average that gives it back, and write that checkpoint with its report.

    Lin et al. 2024: MA and HMA over a grid of mean ratios, with LiNeS, a reversed ramp and random ratios beside them; the
    two-sided search for every lambda, where asked for. Ratios are searched on the proxy part of the prompts, the pick is
    made on the validation part, and what is reported of the pick was measured on the held-out part.

    Args:
        pre, post: checkpoints before and after alignment: folders or hub ids; POST may be a LoRA adapter on PRE.
        out: a new folder for the averaged checkpoint; it appears whole or not at all.
        panel: prompts, reward and abilities; see `Panel.load`.
        search: "hma", "two-sided" in its place, or "both". The other four are of the two-sided search alone; see `TwoSided`.
        blocks: a number of equal blocks, "layerwise" or "module"; by default 3 for HMA, layerwise for the two-sided search.
        means: the grid of mean ratios; above 1 (ExPO, extrapolation) MA alone is measured.
        mean: write HMA at this mean instead of picking.
        lambdas: prices of what PRE could do, in units of alignment.
        alignment: what alignment means: "imitation" of POST, "contrast" of good with bad responses, the "reward" itself.
        calibrate: also retain the right answers of so many validation items an ability.
        min_effective_sets: guard the worst retention set, with at least so many of them always counting.
        keep_reward: the share of the reward gain that the pick must keep.
        proxy_size: responses of POST that the search sees (the paper: 2000).
        controls: also measure LiNeS, the reversed ramp and random ratios at every mean.
        work: where finished pieces are kept; by default OUT.work. A killed run goes on from there.

    Returns:
        The content of restore.json. Its `out` is None when there is nothing worth writing; `verdict` says why.
    """
    out, begun = Path(out), time.time()
    work = Path(work) if work is not None else out.with_name(out.name + ".work")
    refuse_settings(means, mean, keep_reward, proxy_size)
    refuse_search(search, mean, lambdas)
    if not (out / RESULT).is_file():
        refuse_occupied(out.absolute())
    pair = preflight(pre, post, drop=drop, out=out)
    shapes = {n: pair.post.shape(n) for n in pair.names}
    cut = partition(shapes, 3 if blocks is None else blocks)
    settings = {
        "blocks": 3 if blocks is None else blocks,
        "means": list(means),
        "mean": mean,
        "keep_reward": keep_reward,
        "proxy_size": proxy_size,
        "controls": controls,
        "donor": donor,
        "device": device,
        **panel.settings,
    }
    if search != "hma":
        settings |= {"search": search, "lambdas": list(lambdas), "alignment": alignment, "calibrate": calibrate}
        settings |= {"min_effective_sets": min_effective_sets, "two_sided_blocks": blocks or "layerwise"}
    _, warnings = scan(pair, allow_unrelated=allow_unrelated, progress=_named(progress, "reading both checkpoints"))
    bench = Workbench(pair, panel, Store(work), donor=donor, device=device, dtype=dtype, progress=progress)
    settings["dtype"] = str(bench.dtype)
    decided = {k: v for k, v in settings.items() if (k, v) != ("replies", 1)}  # as before there were replies
    key = digest([bench.inputs, decided, panel.fingerprint])
    if (finished := _finished(out, work, key)) is not None:
        return finished
    result: dict[str, Any] = {
        "counterpoise": versions().get("counterpoise"),
        "key": key,
        "command": command or " ".join(sys.argv),
        "seed": panel.seed,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "inputs": describe_inputs(pair),
        **panel.source,
        "settings": settings,
        "warnings": [*pair.warnings, *warnings, *bench.warnings],
        "partition": cut.summary(shapes),
    }
    recipe = compare(
        bench,
        cut,
        result,
        means if mean is None else [mean],
        fixed=mean,
        keep=keep_reward,
        proxy_size=proxy_size,
        controls=controls,
        hma=search != "two-sided",
        two_sided=None
        if search == "hma"
        else TwoSided(
            bench,
            partition(shapes, blocks or "layerwise").with_rest_block(),
            form=alignment,
            size=proxy_size,
            calibrated=calibrate,
            min_effective_sets=min_effective_sets,
        ),
        weights=lambdas,
    )
    result["seconds"] = round(time.time() - begun, 1)
    result["out"] = None if recipe is None else str(out)
    if recipe is None:
        _write_report(work, result)
        return result
    average(
        pre,
        post,
        out,
        replace(recipe, settings={**settings, "command": result["command"]}),
        donor=donor,
        drop=drop,
        allow_unrelated=allow_unrelated,
        also=lambda folder: _write_report(folder, result, card=True),
        progress=_named(progress, "writing the checkpoint"),
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
    from counterpoise.report.html import write_report
    from counterpoise.tables.card import model_card

    write_report(result, folder / "report.html")
    if card:
        (folder / "README.md").write_text(model_card(result), encoding="utf-8")
    write_results(folder / RESULT, result)  # last: it marks the run as finished


def _named(progress: Stages | None, stage: str) -> Any:
    return None if progress is None else lambda done, total: progress(stage, done, total)


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
    progress: Stages | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Reward and abilities of PRE and POST on the held-out part: the rows of `tax_table`, and the preflight's warnings."""
    pair = preflight(pre, post, drop=drop)
    _, warnings = scan(pair, allow_unrelated=allow_unrelated, progress=_named(progress, "reading both checkpoints"))
    with contextlib.ExitStack() as stack:
        folder = work if work is not None else stack.enter_context(tempfile.TemporaryDirectory())
        bench = Workbench(pair, panel, Store(folder), device=device, dtype=dtype, progress=progress)
        before, after = (bench.point(n, bench.whole, [r], "held-out", name=n) for n, r in (("PRE", 0.0), ("POST", 1.0)))
    return tax_table(before.scores, after.scores), [*pair.warnings, *warnings, *bench.warnings]
