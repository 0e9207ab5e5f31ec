"""MA and its rivals over a grid of means: measured, the best one picked, its held-out numbers taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from counterpoise.evaluation.measurement import above_floor, difference, fallen, retentions, tax_table
from counterpoise.evaluation.results import items_of, statistics_of
from counterpoise.evaluation.workbench import Model, Point, Workbench
from counterpoise.restoration.distance import measured
from counterpoise.restoration.healed import healed
from counterpoise.restoration.pick import choose, no_gain, nothing_fell, shares, verdict
from counterpoise.restoration.race import raced
from counterpoise.restoration.request import Request
from counterpoise.search.candidates import Candidate
from counterpoise.statistics.front import front
from counterpoise.tables.reading import OWN_LOSS, method_volumes


def search_and_pick(bench: Workbench, request: Request, result: dict[str, Any]) -> Point | None:
    """Fill `result` with points, pick, tax and verdict; return the point to write, or None."""
    whole = bench.whole
    pre, post = bench.ends("validation")
    counted = above_floor(pre.scores)
    gain = difference(post.scores.reward, pre.scores.reward)
    result["search"] = []
    if gain["value"] <= 0 or gain["p"] >= 0.05:
        _finish(bench, result, [pre, post], counted, None, None)
        result["verdict"] = no_gain(gain)
        return None
    told_to = request.anyway or request.mean is not None
    if not told_to and not fallen(tax_table(pre.scores, post.scores)):
        _finish(bench, result, [pre, post], counted, None, None)
        result["verdict"] = nothing_fell(len(counted), fallen(result["tax"]))
        return None
    candidates = [Candidate("MA", f"MA {mean:g}", whole, (mean,), i) for i, mean in enumerate(request.plain)]
    for search in request.searches:
        found = search.find(bench, request.grid)
        candidates += found.candidates
        result |= found.told
    candidates.sort(key=lambda c: len(request.grid) if c.at is None else c.at)
    if request.race:
        candidates, result["race"] = raced(bench, candidates, pre, post, request.keep_reward)
    done = bench.points([c.model for c in candidates], "validation")
    points = [pre, post, *done]
    pick: Point | None
    best: Point | None = None
    if request.mean is not None:
        pick = next(p for p in done if p.method == "HMA")
    else:
        able = [p for p, c in zip(done, candidates, strict=True) if c.pickable]
        pick, result["choice"] = choose(pre, post, able, counted, request.keep_reward, request.confidence)
        if request.heal is not None:
            best, (more, result["healed"]) = pick, healed(bench, request, request.heal, pick)
            result["warnings"] += [f"healing: {w}" for w in result["healed"]["warnings"] if w not in result["warnings"]]
            points, able = [*points, *more], [*able, *more]
            pick, result["choice"] = choose(pre, post, able, counted, request.keep_reward, request.confidence)
    asked = request.keep_reward if request.mean is None else None
    _finish(bench, result, points, counted, pick, asked, best)
    pickable = {c.name for c in candidates if c.pickable} | {p.name for p in points if p.model.instead}
    result["verdict"] = verdict(result, pick, request.keep_reward, pickable)
    return pick


def _finish(
    bench: Workbench,
    result: dict[str, Any],
    points: Sequence[Point],
    counted: list[str],
    pick: Point | None,
    asked: float | None,
    best: Point | None = None,
) -> None:
    """The points as json, their front, and the held-out numbers of PRE, POST, the pick and MA at the pick's mean.

    A healed pick has no mean: beside it stands the `best` average, where there is one.
    """
    result["retention_unit"] = OWN_LOSS
    result["points"] = _rows(points, counted)
    result["hypervolume"] = {m: v.value for m, v in (method_volumes(result) or {}).items()}
    result["pick"] = pick.name if pick else None
    models = [p.model for p in points[:2]]
    if pick is not None:
        models.append(pick.model)
        if pick.model.instead is not None:
            models += [best.model] if best else []
        elif pick.method != "MA":
            models.append(Model(f"MA {pick.mean:.2g}", "MA", bench.whole, (pick.mean,)))
    final = bench.points(models, "held-out")
    result |= measured(bench, final[: 2 if pick is None else 3])
    result["floored"] = [name for name in points[0].scores.abilities if name not in counted]
    result["items"] = {p.part: items_of(p.scores) for p in (points[0], final[0])}
    result["points"] += _rows(final, [n for n in counted if n in final[0].scores.abilities])
    if pick is not None:
        result["shares"] = {"asked": asked, **shares(final[0].scores, final[1].scores, final[2].scores, counted)}
    if len(final) > 3:
        result["against"] = final[3].name
        result["pick_against_ma"] = [
            {"name": row["name"], "metric": row["metric"], "difference": row["tax"]}
            for row in tax_table(final[2].scores, final[3].scores)
        ]


def _rows(points: Sequence[Point], counted: list[str]) -> list[dict[str, Any]]:
    rows, kept = [], retentions(points[0].scores, points[1].scores, [p.scores for p in points], counted)
    for p, of in zip(points, kept, strict=True):
        rows.append(
            {
                "name": p.name,
                "method": p.method,
                "part": p.part,
                "mean": p.mean if p.model.instead is None else None,
                "blocks": p.model.partition.name,
                "ratios": list(p.model.ratios) if p.model.instead is None else [],
                **p.scores.summary(),
                **of,
                "on_front": False,
                "statistics": statistics_of(p.scores),
            }
        )
    if counted:
        for index in front([[r["reward"]["value"], r["retention"]["value"]] for r in rows]):
            rows[int(index)]["on_front"] = True
    return rows
