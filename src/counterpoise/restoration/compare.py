"""MA, HMA and their rivals over a grid of means: measured, the best one picked, its held-out numbers taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from counterpoise.averaging.partition import Partition, layerwise
from counterpoise.averaging.recipe import Recipe
from counterpoise.evaluation.measurement import difference
from counterpoise.evaluation.results import items_of, statistics_of
from counterpoise.evaluation.tax import at_floor, steps_from_pre, tax_table
from counterpoise.evaluation.workbench import Point, Workbench
from counterpoise.restoration.pick import choose, no_gain, verdict
from counterpoise.search.descent import SearchResult
from counterpoise.search.on_bench import hma_ratios
from counterpoise.search.on_bench import proxies as proxies_of
from counterpoise.search.ramps import linear_ramp, random_ratios, reversed_ramp
from counterpoise.search.searching import TwoSided
from counterpoise.search.two_sided import Found
from counterpoise.statistics.front import front, hypervolume


def compare(
    bench: Workbench,
    cut: Partition,
    result: dict[str, Any],
    means: Sequence[float],
    *,
    fixed: float | None,
    keep: float,
    proxy_size: int,
    controls: bool,
    hma: bool = True,
    two_sided: TwoSided | None = None,
    weights: Sequence[float] = (),
) -> Recipe | None:
    """Fill `result` with points, pick, tax and verdict; return the recipe to write, or None.

    Args:
        hma: whether HMA is searched.
        two_sided: searched for every lambda of `weights` when given.
    """
    whole = bench.whole
    pre, post = (bench.point(n, whole, [r], "validation", name=n) for n, r in (("PRE", 0.0), ("POST", 1.0)))
    counted = [name for name, ms in pre.scores.abilities.items() if not at_floor(ms)]
    gain = difference(post.scores.reward, pre.scores.reward)
    points = [pre, post]
    searches: list[tuple[float, SearchResult]] = []
    if gain["value"] <= 0 or gain["p"] >= 0.05:
        _finish(bench, result, points, searches, counted, None)
        result["verdict"] = no_gain(gain)
        return None
    proxies = proxies_of(bench, proxy_size) if hma else []
    for mean in means:
        points.append(bench.point("MA", whole, [mean], "validation", name=f"MA {mean:g}"))
        if mean > 1:  # extrapolation (ExPO): with one ratio for all, there is nothing to search
            continue
        if hma:
            found = hma_ratios(bench, cut, proxies, mean)
            searches.append((mean, found))
            points.append(bench.point("HMA", cut, found.ratios, "validation", name=f"HMA {mean:g}"))
        if controls:
            points += _controls(bench, cut, mean)
    if two_sided is not None:
        points += _two_sided(two_sided, weights, result)
    if fixed is not None:
        pick: Point | None = next(p for p in points if p.method == "HMA")
    else:
        pick = choose(points, counted, keep)
    _finish(bench, result, points, searches, counted, pick)
    result["verdict"] = verdict(result, pick, keep)
    return None if pick is None else Recipe(pick.partition, pick.ratios)


def _controls(bench: Workbench, cut: Partition, mean: float) -> list[Point]:
    """What HMA is compared with: ramps that need no search, and chance."""
    deep = layerwise(bench.pair.names)
    rivals = (
        ("LiNeS", deep, linear_ramp(deep, mean)),
        ("reversed", deep, reversed_ramp(deep, mean)),
        ("random", cut, random_ratios(cut, mean, seed=bench.panel.seed)),
    )
    return [bench.point(name, part, ratios, "validation", name=f"{name} {mean:g}") for name, part, ratios in rivals]


def _two_sided(search: TwoSided, weights: Sequence[float], result: dict[str, Any]) -> list[Point]:
    """Path and exact search for every lambda, measured on validation data; what they found goes into `result`."""
    drawn, searched = search.path(weights), search.exact(weights)
    truths: list[Any] = search.truth(drawn) if search.form != "reward" else [None] * len(drawn)
    rows = [row(f, "path", t) for f, t in zip(drawn, truths, strict=True)] + [row(f, "exact") for f in searched]
    shapes = {n: search.bench.pair.post.shape(n) for n in search.bench.pair.names}
    result["two_sided"] = {
        "alignment": search.form,
        "rho": search.rho,
        "sets": list(search.diagonal.retention),
        "left_out": list(search.left_out),
        "passes": search.diagonal.passes,
        "misfit": search.diagonal.misfit,
        "neighbours": search.measured["neighbours"],
        "partition": search.cut.summary(shapes),
        "rows": rows,
    }
    points = []
    for r in rows:
        method, name = f"two-sided {r['how']}", f"two-sided {r['how']} {r['lambda']:g}"
        points.append(search.bench.point(method, search.cut, r["ratios"], "validation", name=name))
    return points


def row(found: Found, how: str, truth: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One lambda as plain json for restore.json.

    Args:
        how: "path" or "exact".
        truth: both sides as measured there; None where `found` holds measured values.
    """
    return {
        "how": how,
        "lambda": found.weight,
        "ratios": list(found.ratios),
        "alignment": found.alignment,
        "retention": dict(found.retention),
        "shares": dict(found.shares),
        "passes": found.passes,
        "converged": found.converged,
        "measured": None if truth is None else dict(truth),
    }


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
    result["floored"] = [name for name in points[0].scores.abilities if name not in counted]
    result["items"] = {p.part: items_of(p.scores) for p in (points[0], final[0])}
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
                "statistics": statistics_of(p.scores),
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
