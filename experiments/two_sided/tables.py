"""Rewrite the tables and figures of README.md and docs/two-sided-findings.md from results/*.json.

    python experiments/two_sided/tables.py [RESULTS [PAGE ...]]              # the tables
    python experiments/two_sided/tables.py --figures [RESULTS [PAGE ...]]    # and the figures, which need a Chromium

Files of one --run are pooled over their training seeds; items are resampled as pairs, the same ones for every point.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from curves import CURVES, REQUIRED

from counterpoise.evaluation.results import loss_units, measurement
from counterpoise.report.comparisons import Comparison, Group, pooled, read_comparisons
from counterpoise.report.matched import method_gains
from counterpoise.statistics.bootstrap import interval
from counterpoise.statistics.equal_reward import Fronts, ModelStatistics, Statistics, hypervolume_gain
from counterpoise.tables import reading
from counterpoise.tables.numbers import number, p_value, spoken
from counterpoise.tables.reading import HELD_OUT

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
File = dict[str, Any]
LAYERS = 30
"""Of the model; a further ratio is that of what stands outside them."""


def main(results: Path, pages: Sequence[Path], figures: bool) -> None:
    """Fill in what stands between <!-- NAME --> and <!-- end -->; a table without numbers says so."""
    paths = sorted(results.glob("*.json"))
    files = [json.loads(p.read_text(encoding="utf-8")) for p in paths]
    panels = read_comparisons(paths) if paths else []
    groups = [g for panel in panels for g in panel.groups]
    made = {
        "curves": stacked(groups, curves_table),
        "kinds": stacked(groups, kinds_table),
        "precision": "\n\n".join(filter(None, map(precision, groups))),
        "matched": stacked(groups, matched_table),
        "worst": stacked(groups, worst_table),
        "points": stacked(groups, points_table),
        "descent": stacked(groups, descent_table),
        "agreement": stacked(groups, agreement_table),
        "models": models_table(files),
        "sizes": sizes_table(files),
        "openings": openings_table(files),
        "noise": noise_table(files),
        "cost": cost_table(files),
        "runs": runs_table(files),
    }
    for page in pages:
        fill(page, made)
    if figures and panels:
        draw(panels, files, HERE.parent.parent / "docs" / "figures")


def fill(page: Path, made: Mapping[str, str]) -> None:
    """Put the tables where a page has room for them."""
    text = page.read_text(encoding="utf-8")
    for name, table in made.items():
        filled = table or "Not measured yet."
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=filled: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    page.write_text(text, encoding="utf-8")


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or nothing when it has no rows."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if body else ""


def stacked(groups: Sequence[Group], table: Any) -> str:
    """One table a group of runs, under its name."""
    made = [(g, table(g)) for g in groups]
    return "\n\n".join(f"**{g.name}**, {len(g.runs)} training seed(s)\n\n{t}" for g, t in made if t)


def scored(group: Group, results: File, point: File) -> ModelStatistics | None:
    """A point's items: its reward and the primary metric of every ability that is not at floor."""
    wanted = [(a, m) for a, m in reading.primary(results).items() if a not in group.floored]
    found = [measurement(results, point, *key) for key in [("reward", "reward"), *wanted]]
    held = [Statistics(m.statistics, m.aggregate) for m in found if m is not None]
    return ModelStatistics(held[0], tuple(held[1:])) if len(held) == len(found) else None


def of_method(results: File, *methods: str) -> list[File]:
    """The points of some methods, in the order of their mean ratio."""
    found = [p for p in results["points"] if p["method"] in methods]
    return sorted(found, key=lambda p: {"PRE": 0.0, "POST": 1.0}.get(p["method"], p.get("mean") or 0.0))


def scales(group: Group) -> list[float]:
    """The unit of each ability's loss, averaged over seeds."""
    counted = {a: m for a, m in reading.primary(group.runs[0].results).items() if a not in group.floored}
    found = [[*u.values()] for run in group.runs if (u := loss_units(run.results, HELD_OUT, counted))]
    return [float(u) for u in np.mean(found, axis=0)]


def difference(found: Any, digits: int = 2) -> str:
    """Value, interval and p; bold when the interval leaves out 0."""
    if found is None:
        return "–"
    value, low, high = (number(v, digits, signed=True) for v in (found.value, found.low, found.high))
    text = f"{value} [{low}, {high}]"
    return (f"**{text}**" if found.low > 0 or found.high < 0 else text) + f", p {p_value(found.p)}"


def curves_table(group: Group) -> str:
    """Hypervolume minus MA's on grids of one size, and retention at equal reward, curve by curve."""
    means = set(group.runs[0].results["settings"]["means"])
    body = []
    for method in [m for m in CURVES if m != "MA"]:
        runs = []
        for run in group.runs:
            ends = [scored(group, run.results, p) for p in of_method(run.results, "PRE", "POST")]
            ours = [s for p in of_method(run.results, method) if (s := scored(group, run.results, p))]
            grid = [p for p in of_method(run.results, "MA") if p["mean"] in means]
            theirs = [s for p in grid if (s := scored(group, run.results, p))]
            if ends[0] and ends[1] and ours and theirs:
                runs.append(Fronts(ends[0], ends[1], ours, theirs))
        if not runs:
            continue
        matched = method_gains(group, method, HELD_OUT)
        seen = [v for v in matched.by_run if v is not None] if matched else []
        all_points = len(matched.by_run) if matched else sum(len(r.ours) for r in runs)
        above = f"{sum(v > 0 for v in seen)} of {len(seen)}"
        row = [method + ("" if method in REQUIRED else " †"), str(len(runs))]
        row += [difference(hypervolume_gain(runs, scales(group)), 3), difference(matched), above]
        row.append(f"{all_points - len(seen)} of {all_points}")
        row.append(" ".join(number(g.value, 2, signed=True) if g else "–" for g in by_seed(group, method)))
        ramp = None if method == "LiNeS" else method_gains(group, method, HELD_OUT, reference="LiNeS")
        body.append([*row, difference(ramp)])
    head = ["curve", "seeds", "hypervolume minus MA's", "retention minus MA's at equal reward", "points above MA"]
    return markdown([*head, "points beyond MA's reward", "by seed", "retention minus LiNeS's at equal reward"], body)


def kinds_table(group: Group) -> str:
    """Retention minus MA's at equal reward by likelihood and by accuracy, over the abilities measured both ways."""
    body = []
    for method in [m for m in CURVES if m != "MA" and of_method(group.runs[0].results, m)]:
        body.append([method, *(difference(method_gains(group, method, HELD_OUT, axis)) for axis in reading.MEANS)])
    both = {kind: reading.counted(group.runs[0].results, kind) for kind in reading.KINDS}
    head = [f"by {kind}: {', '.join(f'{a} {m}' for a, m in metrics.items())}" for kind, metrics in both.items()]
    return markdown(["curve", "all abilities, by likelihood", *head], body)


def by_seed(group: Group, method: str) -> list[Any]:
    """A method's retention beyond MA at equal reward in each run on its own."""
    return [method_gains(Group(group.name, (run,)), method, HELD_OUT) for run in group.runs]


def precision(group: Group) -> str:
    """How well a reward difference is known: the paired standard error between the averages, pooled over seeds."""
    rewards: dict[str, list[Any]] = {}
    for run in group.runs:
        for p in run.results["points"]:
            if (found := measurement(run.results, p, "reward", "reward")) is not None:
                rewards.setdefault(p["name"], []).append(found.statistics[:, 0])
    held = {n: np.mean(r, axis=0) for n, r in rewards.items() if len(r) == len(group.runs)}
    averages = [n for n in held if n not in ("PRE", "POST")]
    pairs = [held[a] - held[b] for i, a in enumerate(averages) for b in averages[:i]]
    if not pairs or not {"PRE", "POST"} <= set(held):
        return ""
    error = float(np.median([p.std(ddof=1) / len(p) ** 0.5 for p in pairs]))
    gap = float((held["POST"] - held["PRE"]).mean())
    drawn = len(pairs[0]) * group.runs[0].results["settings"]["replies"] * len(group.runs)
    return (
        f"{group.name}: paired standard error of the reward difference of two averages {error:.3f} (median), "
        f"{error / gap:.1%} of the {gap:.2f} between PRE and POST; {drawn:,} responses a point."
    )


def matched_table(group: Group) -> str:
    """The same ability by ability, in the metric's own unit."""
    results = group.runs[0].results
    names = [a for a in reading.primary(results) if a not in group.floored]
    body = []
    for method in [m for m in CURVES if m != "MA" and of_method(results, m)]:
        body.append([method, *(difference(method_gains(group, method, HELD_OUT, name), 3) for name in names)])
    return markdown(["curve", *names], body)


def worst_table(group: Group) -> str:
    """The largest share of its own loss that is left over abilities, of the sum and of the worst-ability search."""
    body = []
    for run in group.runs:
        pre = scored(group, run.results, of_method(run.results, "PRE")[0])
        assert pre is not None
        for method in ("sum of abilities", "worst ability"):
            for point in of_method(run.results, method):
                now = scored(group, run.results, point)
                assert now is not None
                taxes = [
                    (value(b) - value(n)) / s
                    for b, n, s in zip(pre.abilities, now.abilities, scales(group), strict=True)
                ]
                weights = point["settings"]["shares"]
                shown = ", ".join(f"{t} {w:.2f}" for t, w in weights.items())
                row = [
                    str(run.seed),
                    point["name"],
                    spoken(point["reward"]),
                    f"{max(taxes):.2f}",
                    f"{np.mean(taxes):.2f}",
                ]
                body.append([*row, shown])
    return markdown(["seed", "point", "reward", "worst tax", "mean tax", "weights of the sets"], body)


def value(s: Statistics) -> float:
    """A score."""
    return interval(s.items, s.aggregate, resamples=2).value


def points_table(group: Group) -> str:
    """Every point, pooled over seeds."""
    content = pooled(Comparison((group,)))
    post = next(p for p in content["points"] if p["name"] == "POST")
    taxed = post["retention"]["high"] < 0
    body = []
    for p in content["points"]:
        ratios = p["ratios"]
        text = " ".join(f"{r:.2f}" for r in ratios) if len(ratios) < 5 else f"{min(ratios):.2f} to {max(ratios):.2f}"
        mean = "" if p.get("mean") is None else f"{p['mean']:.2f}"
        sides = [spoken(p["retention_by"].get(kind)) or "–" for kind in reading.KINDS]
        row = [p["name"], str(p["runs"]), mean, text, spoken(p["reward"]), spoken(p["retention"]), *sides]
        gain, tax = shares(group, p["name"])
        body.append([*row, f"{gain:.0%}", f"{tax:.0%}" if taxed else "–"])
    head = ["point", "seeds", "mean ratio", "ratios (first seed)", "reward", *reading.MEANS]
    return markdown([*head, "of the reward gain", "of the tax"], body)


def shares(group: Group, name: str) -> tuple[float, float]:
    """Of POST's gain in reward and of its tax, what a point has: means over the runs that have it."""
    found = []
    for run in group.runs:
        at = {p["name"]: (p["reward"]["value"], p["retention"]["value"]) for p in run.results["points"]}
        if name in at:
            found.append([at[n] for n in ("PRE", "POST", name)])
    pre, post, here = np.mean(found, axis=0)
    gain, tax = (here - pre) / (post - pre)
    return float(gain), float(tax)


def descent_table(group: Group) -> str:
    """What the exact search gained on the path in its own objective, alignment lost + lambda x retention lost."""
    body = []
    for run in group.runs:
        at = {p["name"]: p["settings"] for p in run.results["points"]}
        for name in [n for n in at if n.startswith("exact ") and n.replace("exact", "path") in at]:
            path, exact = at[name.replace("exact", "path")]["measured"], at[name]
            if path is None:
                continue
            before, after = (
                s["alignment"] + exact["lambda"] * float(np.mean(list(s["retention"].values()))) for s in (path, exact)
            )
            ended = "minimum" if exact["converged"] else "limit of passes"
            numbers = [f"{before:.3f}", f"{after:.3f}", f"{before - after:.3f}"]
            body.append([str(run.seed), name.removeprefix("exact "), *numbers, ended])
    return markdown(["seed", "lambda", "path", "exact", "gained", "stopped at its"], body)


def agreement_table(group: Group) -> str:
    """Correlation between seeds of the ratios of the layers, for every pair of seeds."""
    body = []
    for name in ("HMA layerwise 0.6", "path 1", "exact 1"):
        found = [p["ratios"][:LAYERS] for run in group.runs for p in run.results["points"] if p["name"] == name]
        if len(found) > 1:
            links = np.corrcoef(found)[np.triu_indices(len(found), 1)]
            body.append([name, " ".join(number(v, 2, signed=True) for v in links)])
    return markdown(["point", "correlation of its layers' ratios between seeds"], body)


def models_table(files: Sequence[File]) -> str:
    """What the models of path and Fisher said of their own ratios, against what was measured there."""
    body = []
    for f in files:
        for p in f["points"]:
            true = p["settings"].get("measured")
            if not true:
                continue
            s = p["settings"]
            said, kept = np.mean(list(s["retention"].values())), np.mean(list(true["retention"].values()))
            numbers = [f"{v:.3f}" for v in (s["alignment"], true["alignment"], said, kept, s["misfit"])]
            body.append([f["run"], str(f["seed"]), p["name"], *numbers])
    head = ["run", "seed", "point", "alignment lost: model", "measured", "retention lost: model", "measured"]
    return markdown([*head, "misfit on the diagonal"], body)


def sizes_table(files: Sequence[File]) -> str:
    """The objective on the search's own sequences and on others, by size; mean over files."""
    rows: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for f in files:
        for r in f["studies"].get("sizes", []):
            rows.setdefault((r["blocks"], r["how"], r["size"]), []).append((r["seen"], r["elsewhere"]))
    body = []
    for (blocks, how, size), values in rows.items():
        seen, other = np.mean(values, axis=0)
        body.append([blocks, how, str(size), f"{seen:.3f}", f"{other:.3f}", f"{other - seen:+.3f}", str(len(values))])
    return markdown(["blocks", "search", "sequences a side", "objective, own", "others", "gap", "seeds"], body)


def openings_table(files: Sequence[File]) -> str:
    """Other words of PRE: the objective on the default's kind of sequences, and how far the ratios move."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for f in files:
        for r in f["studies"].get("openings", []):
            rows.setdefault(r["continued"], []).append((r["elsewhere"], r["distance"]))
    body = []
    for name, values in rows.items():
        other, distance = np.mean(values, axis=0)
        body.append([name, f"{other:.3f}", f"{distance:.3f}", str(len(values))])
    return markdown(["what PRE continues", "objective, other sequences", "mean change of a ratio", "seeds"], body)


def noise_table(files: Sequence[File]) -> str:
    """How well the reward's own slopes are known."""
    body = []
    for f in files:
        if n := f["studies"].get("noise"):
            shares = [k["effective"] for k in n["neighbours"]]
            used = f"{sum(k['used'] for k in n['neighbours'])} of {len(shares)}"
            numbers = [f"{n['slope']:.3f}", f"{n['standard_error']:.3f}", f"{n['clear']:.0%}"]
            enough = n["responses_per_point"] * (2 * n["standard_error"] / n["slope"]) ** 2
            row = [f["run"], str(f["seed"]), str(n["responses_per_point"]), *numbers, f"{enough:.0f}"]
            body.append([*row, f"{min(shares):.2f} to {max(shares):.2f}", used])
    head = ["run", "seed", "responses a point", "mean slope", "standard error", "slopes clear of 0"]
    return markdown([*head, "responses for half a slope's error", "effective share", "neighbours used"], body)


def cost_table(files: Sequence[File]) -> str:
    """Seconds to a front, against measuring an 11-point sweep of MA at this run's seconds a point."""
    body = []
    for f in files:
        seconds = f["seconds"]
        a_point = float(np.median([s for m in ("MA", "LiNeS") for s in seconds.get(m, {}).values()]))
        for name, spent in seconds.get("search", {}).items():
            body.append([f["run"], str(f["seed"]), name, f"{spent:.0f}", f"{spent / (11 * a_point):.2f}"])
    return markdown(["run", "seed", "search", "seconds", "of an 11-point MA sweep"], body)


def runs_table(files: Sequence[File]) -> str:
    """What made each file, and what it lacks."""
    body = []
    for f in files:
        missing = "; ".join(f["not_run"]) or "nothing"
        refused = "; ".join(f"{k}: {v}" for k, v in f["failed"].items()) or "none"
        size = f"{f['settings']['size']} sequences a side, {f['settings']['replies']} replies a prompt"
        made = [
            f["commit"],
            f["date"],
            f["device"],
            f"{f['settings']['dtype']}, measured in {f['settings'].get('measure_dtype', 'the same')}",
            size,
            missing,
            refused,
        ]
        body.append([f["run"], str(f["seed"]), *made, f"`{f['command']}`"])
    head = ["run", "seed", "commit", "date", "device", "dtype", "settings", "not run", "refused", "command"]
    return markdown(head, body)


def draw(panels: Sequence[Comparison], files: Sequence[File], folder: Path) -> None:
    """The front of each panel and the ratios of its paths, as svg."""
    from drawing import save

    from counterpoise.report.fronts import front_figure

    figures = {}
    for panel in panels:
        names = "-".join(g.name for g in panel.groups)
        drawn = {names: (panel, ("MA",)), **{g.name: (Comparison((g,)), REQUIRED) for g in panel.groups}}
        for name, (part, methods) in drawn.items():
            content = pooled(part)
            shown = {**content, "points": [p for p in content["points"] if p["kind"] in (*methods, "PRE", "POST")]}
            figures[f"front-{name}"] = front_figure(shown, reading.RETENTION, "held-out")
    for f in files:
        if any(p["method"] == "path" for p in f["points"]):
            figures[f"ratios-{f['run']}-{f['seed']}"] = ratios_figure(f)
    save(figures, folder)


def ratios_figure(content: File) -> Any:
    """Ratios layer by layer of path and exact search."""
    from counterpoise.report.palette import light
    from counterpoise.report.plots import empty_figure

    figure = empty_figure("Layer, from input to output", "Share of the update kept")
    for method, colour in (("path", "blue"), ("exact", "vermilion")):
        found = [p for p in content["points"] if p["method"] == method]
        for i, p in enumerate(found):
            ratios = p["ratios"][:-1]  # the last one is that of what stands outside the layers
            line = {"color": light(colour), "shape": "hvh", "width": 1 + 2 * (i + 1) / len(found)}
            figure.add_scatter(y=ratios, name=p["name"], mode="lines", line=line, opacity=0.4 + 0.6 * i / len(found))
    figure.update_yaxes(range=[-0.04, 1.04])
    return figure


if __name__ == "__main__":
    places = [Path(a) for a in sys.argv[1:] if not a.startswith("--")]
    main(
        places[0] if places else HERE / "results",
        places[1:] or (HERE / "README.md", HERE.parent.parent / "docs" / "two-sided-findings.md"),
        "--figures" in sys.argv,
    )
