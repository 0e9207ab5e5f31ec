"""From two checkpoints to the averaged one: the tax, the search, the front, the pick, the checkpoint and its report."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from counterpoise.averaging import Donor, Recipe, average, describe_inputs, versions, write_json
from counterpoise.checkpoint import CheckpointError, refuse_occupied
from counterpoise.evaluation.sweep import Store, digest
from counterpoise.evaluation.tax import Panel, at_floor, difference, tax_table
from counterpoise.pareto import front, hypervolume
from counterpoise.partition import layerwise, partition
from counterpoise.preflight import preflight, scan
from counterpoise.search.hma import SearchResult
from counterpoise.search.ramps import linear_ramp, random_ratios, reversed_ramp
from counterpoise.workbench import Point, Stages, Workbench, steps_from_pre

PICKABLE = ("MA", "HMA", "LiNeS")  # the controls are there to be compared with, not to be chosen


def restore(
    pre: str | Path,
    post: str | Path,
    out: str | Path,
    panel: Panel,
    *,
    blocks: int | str = 3,
    means: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    mean: float | None = None,
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

    Lin et al. 2024: MA and HMA over a grid of mean ratios, with LiNeS, a reversed ramp and random ratios beside them.
    Ratios are searched on the proxy part of the prompts, the pick is made on the validation part, and what is reported
    of the pick was measured on the held-out part.

    Args:
        pre, post: checkpoints before and after alignment: folders or hub ids; POST may be a LoRA adapter on PRE.
        out: a new folder for the averaged checkpoint; it appears whole or not at all.
        panel: prompts, reward and abilities; see `Panel.load`.
        blocks: a number of equal blocks, "layerwise" or "module".
        means: the grid of mean ratios.
        mean: write HMA at this mean instead of picking.
        keep_reward: the share of the reward gain that the pick must keep.
        proxy_size: responses of POST that the search sees (the paper: 2000).
        controls: also measure LiNeS, the reversed ramp and random ratios at every mean.
        work: where finished pieces are kept; by default OUT.work. A killed run goes on from there.

    Returns:
        The content of restore.json. Its `out` is None when there is nothing worth writing; `verdict` says why.
    """
    out, begun = Path(out), time.time()
    pair = preflight(pre, post, drop=drop, out=out)
    settings = {
        "blocks": blocks,
        "means": list(means),
        "mean": mean,
        "keep_reward": keep_reward,
        "proxy_size": proxy_size,
        "controls": controls,
        "donor": donor,
        "device": device,
        "dtype": str(dtype),
        "limit": panel.limit,
        "prompt_limit": panel.prompt_limit,
        "max_new_tokens": panel.max_new_tokens,
        "temperature": panel.temperature,
        "batch_size": panel.batch_size,
        "chat": panel.chat,
        "seed": panel.seed,
    }
    _, warnings = scan(pair, allow_unrelated=allow_unrelated, progress=_named(progress, "reading both checkpoints"))
    key = digest(
        [
            describe_inputs(pair),
            settings,
            panel.reward_id,
            [a.fingerprint for a in panel.abilities],
            sorted(p.key for p in panel.prompts),
        ]
    )
    if (finished := _finished(out, key)) is not None:
        return finished
    refuse_occupied(out.absolute())

    work = Path(work) if work is not None else out.with_name(out.name + ".work")
    bench = Workbench(pair, panel, Store(work), donor=donor, device=device, dtype=dtype, progress=progress)
    cut = partition({n: pair.post.shape(n) for n in pair.names}, blocks)
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
        "warnings": [*pair.warnings, *warnings],
        "partition": cut.summary({n: pair.post.shape(n) for n in pair.names}),
    }
    recipe = _compare(
        bench, cut, result, [mean] if mean is not None else means, mean, keep_reward, proxy_size, controls
    )
    result["seconds"] = round(time.time() - begun, 1)
    result["out"] = None if recipe is None else str(out)
    if recipe is None:
        _write_report(Path(work), result)
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


def _compare(
    bench: Workbench,
    cut: Any,
    result: dict[str, Any],
    means: Sequence[float],
    fixed: float | None,
    keep: float,
    proxy_size: int,
    controls: bool,
) -> Recipe | None:
    """Fill `result` with points, pick, tax and verdict; return the recipe to write, or None."""
    whole = bench.whole
    pre, post = (bench.point(n, whole, [r], "validation", name=n) for n, r in (("PRE", 0.0), ("POST", 1.0)))
    counted = [name for name, ms in pre.scores.abilities.items() if not at_floor(ms)]
    gain = difference(post.scores.reward, pre.scores.reward)
    points = [pre, post]
    searches: list[tuple[float, SearchResult]] = []
    if gain["value"] <= 0 or gain["p"] >= 0.05:
        _finish(bench, result, points, searches, counted, None)
        result["verdict"] = (
            f"POST's reward is not significantly above PRE's on the validation prompts ({gain['value']:+.3g}, 95 % interval "
            f"{gain['low']:.3g} to {gain['high']:.3g}): there is no alignment gain to keep, so nothing was searched or written."
        )
        return None
    proxies = bench.proxies(proxy_size)
    for mean in means:
        found = bench.search(cut, proxies, mean)
        searches.append((mean, found))
        points.append(bench.point("MA", whole, [mean], "validation", name=f"MA {mean:g}"))
        points.append(bench.point("HMA", cut, found.ratios, "validation", name=f"HMA {mean:g}"))
        if controls:
            deep = layerwise(bench.pair.names)
            points.append(bench.point("LiNeS", deep, linear_ramp(deep, mean), "validation", name=f"LiNeS {mean:g}"))
            points.append(
                bench.point("reversed", deep, reversed_ramp(deep, mean), "validation", name=f"reversed {mean:g}")
            )
            ratios = random_ratios(cut, mean, seed=bench.panel.seed)
            points.append(bench.point("random", cut, ratios, "validation", name=f"random {mean:g}"))
    if fixed is not None:
        pick: Point | None = next(p for p in points if p.method == "HMA")
    else:
        pick = choose(points, counted, keep)
    _finish(bench, result, points, searches, counted, pick)
    result["verdict"] = _verdict(result, pick, keep)
    return None if pick is None else Recipe(pick.partition, pick.ratios)


def choose(points: Sequence[Point], counted: Sequence[str], keep: float) -> Point | None:
    """Among averages that keep the share `keep` of the reward gain, the one with the smallest mean tax.

    Args:
        points: PRE first, POST second, measured on validation data.
        counted: the abilities that are not at floor.

    Returns:
        None when no average has both more reward than PRE and less tax than POST at the reward asked for.
    """
    pre, post = points[0], points[1]
    gain = post.scores.reward.value - pre.scores.reward.value
    needed = pre.scores.reward.value + keep * gain

    def kept(point: Point) -> float:
        return float(steps_from_pre(pre.scores, point.scores, counted)["value"])

    able = [
        p
        for p in points
        if p.method in PICKABLE and p.scores.reward.value >= needed and counted and kept(p) > kept(post)
    ]
    return max(able, key=kept) if able else None


def _finish(
    bench: Workbench,
    result: dict[str, Any],
    points: list[Point],
    searches: list[tuple[float, SearchResult]],
    counted: list[str],
    pick: Point | None,
) -> None:
    """The points as json, their front, and the held-out numbers of PRE, POST, the pick and MA at the pick's mean."""
    result["points"] = _rows(points, counted)
    result["hypervolume"] = _hypervolumes(result["points"])
    result["search"] = [
        {"mean": m, "ratios": list(s.ratios), "passes": s.passes, "trace": list(s.trace), "converged": s.converged}
        for m, s in searches
    ]
    result["pick"] = pick.name if pick else None
    final = [bench.point(n, bench.whole, [r], "held-out", name=n) for n, r in (("PRE", 0.0), ("POST", 1.0))]
    if pick is not None:
        final.append(bench.point(pick.method, pick.partition, pick.ratios, "held-out", name=pick.name))
        if pick.method != "MA":
            final.append(bench.point("MA", bench.whole, [pick.mean], "held-out", name=f"MA {pick.mean:.2g}"))
    result["tax"] = tax_table(final[0].scores, final[1].scores, final[2].scores if pick else None)
    result["points"] += _rows(final, [n for n in counted if n in final[0].scores.abilities])
    if len(final) > 3:
        result["pick_against_ma"] = [
            {"name": row["name"], "metric": row["metric"], "difference": row["tax"]}
            for row in tax_table(final[2].scores, final[3].scores)
        ]


def _rows(points: list[Point], counted: list[str]) -> list[dict[str, Any]]:
    rows = []
    for p in points:
        retention = steps_from_pre(points[0].scores, p.scores, counted) if counted else None
        rows.append(
            {
                "name": p.name,
                "method": p.method,
                "part": p.part,
                "mean": p.mean,
                "blocks": p.partition.name,
                "ratios": list(p.ratios),
                **p.scores.summary(),
                "retention": retention,
                "on_front": False,
            }
        )
    if counted:
        for index in front([[r["reward"]["value"], r["retention"]["value"]] for r in rows]):
            rows[int(index)]["on_front"] = True
    return rows


def _hypervolumes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Area between each method's front (with PRE and POST) and the corner (PRE's reward, POST's retention), scaled so that
    the rectangle spanned by PRE and POST is 1; points beyond it count."""
    if any(r["retention"] is None for r in rows):
        return {}
    pre, post = rows[0], rows[1]
    origin = (pre["reward"]["value"], post["retention"]["value"])
    span = (post["reward"]["value"] - origin[0], pre["retention"]["value"] - origin[1])
    if min(span) <= 0:
        return {}
    volumes = {}
    for method in dict.fromkeys(r["method"] for r in rows[2:]):
        of = [r for r in rows if r["method"] in (method, "PRE", "POST")]
        scaled = [
            [(r["reward"]["value"] - origin[0]) / span[0], (r["retention"]["value"] - origin[1]) / span[1]] for r in of
        ]
        volumes[method] = float(hypervolume(scaled, [0.0, 0.0]))
    return volumes


def _verdict(result: dict[str, Any], pick: Point | None, keep: float) -> str:
    rows = {r["name"]: r for r in result["points"] if r["part"] == "held-out"}
    pre, post = rows["PRE"], rows["POST"]
    taxed = [
        r["name"]
        for r in result["tax"]
        if r["name"] != "reward" and not r["at_floor"] and r["tax"]["value"] > 0 and r["tax"]["p"] < 0.05
    ]
    cost = (
        f"Alignment significantly lowered {', '.join(dict.fromkeys(taxed))}"
        if taxed
        else "No ability fell significantly"
    )
    if pick is None:
        return (
            f"{cost} (held-out). No average keeps {keep:.0%} of the reward gain with less tax than POST: no point beats both "
            f"ends, so no checkpoint was written.{_next_best(result)}"
        )
    chosen = rows[pick.name]
    gain = post["reward"]["value"] - pre["reward"]["value"]
    kept = (chosen["reward"]["value"] - pre["reward"]["value"]) / gain if gain > 0 else float("nan")
    lost, left = post["retention"]["value"], chosen["retention"]["value"]
    back = f"gives back {1 - left / lost:.0%} of the mean tax" if lost < 0 else "POST has no mean tax to give back"
    return f"{cost} (held-out). {pick.name} keeps {kept:.0%} of the reward gain and {back}, on held-out data."


def _next_best(result: dict[str, Any]) -> str:
    """What a lower demand on the reward would have picked."""
    rows = [r for r in result["points"] if r["part"] == "validation"]
    pre, post = rows[0], rows[1]
    better = [r for r in rows if r["method"] in PICKABLE and r["retention"]["value"] > post["retention"]["value"]]
    if not better:
        return ""
    best = max(better, key=lambda r: r["reward"]["value"])
    gain = post["reward"]["value"] - pre["reward"]["value"]
    kept = math.floor(100 * (best["reward"]["value"] - pre["reward"]["value"]) / gain) / 100
    return f" {best['name']} comes closest: --keep-reward {kept:.2f} would accept it." if kept > 0 else ""


def _finished(out: Path, key: str) -> dict[str, Any] | None:
    """The result of an earlier run of the same thing, when OUT holds it."""
    path = out / "restore.json"
    if not path.is_file():
        return None
    earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if earlier.get("key") != key:
        raise CheckpointError(f"{out}: holds the result of other inputs or settings; choose another name or remove it")
    return {**earlier, "already_finished": True}


def _write_report(folder: Path, result: dict[str, Any], *, card: bool = False) -> None:
    from counterpoise.report.card import model_card
    from counterpoise.report.html import write_report

    write_json(folder / "restore.json", result)
    write_report(result, folder / "report.html")
    if card:
        (folder / "README.md").write_text(model_card(result), encoding="utf-8")


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
) -> list[dict[str, Any]]:
    """Reward and abilities of PRE and POST on the held-out part: the rows of `tax_table`."""
    pair = preflight(pre, post, drop=drop)
    scan(pair, allow_unrelated=allow_unrelated, progress=_named(progress, "reading both checkpoints"))
    with contextlib.ExitStack() as stack:
        folder = work if work is not None else stack.enter_context(tempfile.TemporaryDirectory())
        bench = Workbench(pair, panel, Store(folder), device=device, dtype=dtype, progress=progress)
        before, after = (bench.point(n, bench.whole, [r], "held-out", name=n) for n, r in (("PRE", 0.0), ("POST", 1.0)))
    return tax_table(before.scores, after.scores)


def search_recipe(
    pre: str | Path,
    post: str | Path,
    out: str | Path,
    panel: Panel,
    *,
    mean: float,
    work: str | Path,
    blocks: int | str = 3,
    proxy_size: int = 256,
    max_passes: int = 12,
    drop: Sequence[str] = (),
    allow_unrelated: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Stages | None = None,
) -> tuple[SearchResult, Recipe]:
    """Find HMA's ratios at a mean and write them to `out` as a recipe.json, which `average` takes."""
    if Path(out).exists():
        raise CheckpointError(f"{out}: expected a new file, found one; choose another name or remove it")
    pair = preflight(pre, post, drop=drop)
    _, warnings = scan(pair, allow_unrelated=allow_unrelated, progress=_named(progress, "reading both checkpoints"))
    bench = Workbench(pair, panel, Store(work), device=device, dtype=dtype, progress=progress)
    cut = partition({n: pair.post.shape(n) for n in pair.names}, blocks)
    found = bench.search(cut, bench.proxies(proxy_size), mean, max_passes=max_passes)
    settings = {**panel.source, "mean": mean, "proxy_size": proxy_size, "trace": list(found.trace), "seed": panel.seed}
    recipe = Recipe(cut, found.ratios, describe_inputs(pair), settings, versions(), (*pair.warnings, *warnings))
    write_json(Path(out), recipe.to_json())
    return found, recipe
