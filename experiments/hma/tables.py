"""Rewrite the tables and figures of README.md from committed results.

    python experiments/hma/tables.py              # the tables
    python experiments/hma/tables.py --figures    # and the figures, which need a Chromium

results/real_run.json and partwise.json: one pair, `counterpoise restore`. results/mitigations-*.json: every mitigation.
../two_sided/results/*.json: RSF, DPO and PPO, several seeds, with MA, HMA and the controls on the same items.
results/features-*.json: how far PRE's and POST's features have parted.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pooling import minus, of, rank_correlation, retention_minus, shared, told

from counterpoise.report.comparisons import Comparison, Group, pooled, read_comparisons
from counterpoise.report.fronts import front_figure, hypervolume_table, matched_table, points_table
from counterpoise.report.matched import matched, method_gains
from counterpoise.tables import reading, taxes
from counterpoise.tables.grid import as_markdown
from counterpoise.tables.numbers import p_value, spoken
from counterpoise.tables.reading import HELD_OUT, RETENTION

HERE = Path(__file__).resolve().parent
RESULTS, OTHERS = HERE / "results", HERE.parent / "two_sided" / "results"
AT_EQUAL_MEANS = ("HMA thirds", "HMA 6", "HMA 9", "HMA layerwise", "LiNeS", "reversed", "random thirds")


def main(figures: bool) -> None:
    """Fill in what stands between <!-- NAME --> and <!-- end -->; a table without numbers says so."""
    run, more = (json.loads((RESULTS / f"{n}.json").read_text(encoding="utf-8")) for n in ("real_run", "partwise"))
    every, methods = (panels(folder, pattern) for folder, pattern in ((RESULTS, "mitigations-*"), (OTHERS, "*")))
    groups = [g for panel in methods for g in panel.groups]
    made = {
        "tax": as_markdown(taxes.ability_taxes(run)),
        "tax-both": as_markdown(taxes.both_kinds(run)),
        "points": points(run),
        "hma": against_ma(more["hma_minus_ma"]),
        "parts": parts(more["partwise"]),
        "check": check(more["check"]),
        "mitigations": stacked(every, hypervolume_table),
        "mitigations-matched": stacked(every, at_equal_reward),
        "mitigations-points": stacked(every, every_point),
        "methods": methods_table(groups),
        "thirds": thirds_table(groups),
        "equal-means": equal_means_table(groups),
        "found": found_table(groups),
        "borrowed": borrowed_table(groups),
        "features": features_table(groups),
    }
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    for name, table in made.items():
        content = table or "Not measured yet."
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=content: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    page.write_text(text, encoding="utf-8")
    if figures and every:
        sys.path.append(str(HERE.parent))
        from drawing import save

        save({"mitigations": front_figure(pooled(every[0]), RETENTION, HELD_OUT)}, HERE / "figures", height=560)


def panels(folder: Path, pattern: str) -> list[Comparison]:
    """What can share a figure, of some results files."""
    paths = sorted(folder.glob(f"{pattern}.json"))
    return read_comparisons(paths) if paths else []


def stacked(found: Sequence[Comparison], table: Any) -> str:
    """One table a panel."""
    return "\n\n".join(as_markdown(t) for panel in found if (t := table(panel)))


def rows(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def points(run: dict[str, Any]) -> str:
    """Validation points with the share of the reward gain, the mean tax and the front."""
    found = [p for p in run["points"] if p["part"] == "validation"]
    low, high = (p["reward"]["value"] for p in found[:2])
    body = []
    for p in found:
        share = f"{(p['reward']['value'] - low) / (high - low):.0%}"
        ratios = " ".join(f"{r:.2f}" for r in p["ratios"]) if len(p["ratios"]) < 4 else "by layer"
        body.append(
            [p["name"], ratios, spoken(p["reward"]), share, spoken(p["retention"]), "yes" if p["on_front"] else ""]
        )
    volumes = ", ".join(f"{m} {v:.3f}" for m, v in run["hypervolume"].items())
    head = ["point", "ratios", "reward", "of the gain", "retention", "on the front"]
    return rows(head, body) + f"\n\nHypervolume of each method's front: {volumes}."


def against_ma(found: list[dict[str, Any]]) -> str:
    """HMA minus MA."""
    body = []
    for f in found:
        reward = next(r for r in f["rows"] if r["name"] == "reward")["tax"]
        worse = [r["name"] for r in f["rows"] if r["name"] != "reward" and r["tax"]["high"] < 0]
        better = [r["name"] for r in f["rows"] if r["name"] != "reward" and r["tax"]["low"] > 0]
        body.append(
            [
                f"{f['mean']:g}",
                " ".join(f"{r:.2f}" for r in f["ratios"]),
                f"{spoken(reward)}, p {p_value(reward['p'])}",
                spoken(f["retention"]["difference"]),
                ", ".join(dict.fromkeys(better)) or "none",
                ", ".join(dict.fromkeys(worse)) or "none",
            ]
        )
    head = ["mean", "HMA's ratios", "reward", "retention", "abilities better", "abilities worse"]
    return rows(head, body)


def parts(found: list[dict[str, Any]]) -> str:
    """One third averaged, against POST; abilities by their first metric."""
    body, names = [], []
    for f in found:
        gains: dict[str, Any] = {}
        for r in f["gain_over_post"]:
            gains.setdefault(r["name"], r["tax"])
        reward = gains.pop("reward")
        names = list(gains)
        body.append(
            [f["part"], f"{f['ratio']:g}", f"{spoken(reward)}, p {p_value(reward['p'])}", *map(spoken, gains.values())]
        )
    return rows(["third", "ratio", "reward", *names], body)


def check(found: dict[str, Any]) -> str:
    """The second classifier."""
    names = [n for n in found if n not in ("reward", "gain")]
    body = [
        [n, spoken(found[n]), "" if n == "PRE" else f"{spoken(found['gain'][n])}, p {p_value(found['gain'][n]['p'])}"]
        for n in names
    ]
    return rows(["", "log-odds of positive", "minus PRE's"], body)


def at_equal_reward(panel: Comparison) -> Any:
    """Point by point against MA."""
    return matched_table(panel, matched(panel))


def every_point(panel: Comparison) -> Any:
    """Every point and what beats it."""
    return points_table(panel, pooled(panel))


def filled(head: list[str], body: list[list[str]]) -> str:
    """`rows`, or nothing when there are none."""
    return rows(head, body) if body else ""


def methods_table(groups: Sequence[Group]) -> str:
    """What each method did: reward gained, and every ability's change by likelihood and by accuracy side by side."""
    body = []
    for g in groups:
        rows = g.runs[0].results["tax"]
        for name in dict.fromkeys(r["name"] for r in rows):
            found = {reading.kind_of(r["unit"]): r for r in rows if r["name"] == name}
            gains = {k: minus(g.runs, "POST", "PRE", name, r["metric"]) for k, r in found.items()}
            units = {k: f"{r['metric']}: {told(gains[k], 2 if k == 'likelihood' else 1)}" for k, r in found.items()}
            shown = [units.get(k, "–") for k in reading.KINDS]
            if name == "reward":
                shown = [told(minus(g.runs, "POST", "PRE", "reward", "reward")), ""]
            body.append([g.name, str(len(g.runs)), name, *shown])
        count = len(reading.counted(g.runs[0].results, "accuracy"))
        means = [told(retention_minus(g.runs, "POST", "PRE", kind)) for kind in reading.KINDS]
        body.append([g.name, str(len(g.runs)), f"retention, the {count} measured both ways", *means])
    head = ["aligned by", "seeds", "POST minus PRE", "by likelihood, nats", "by accuracy, points"]
    return filled(head, body)


def thirds_table(groups: Sequence[Group]) -> str:
    """One third given back, against POST and against MA at equal reward."""
    body, names = [], []
    for g in groups:
        names = list(reading.primary(g.runs[0].results).items())
        for point in [p for p in g.runs[0].results["points"] if p["method"] == "part-wise"]:
            runs = shared(g, [point["name"]])
            gains = [told(minus(runs, point["name"], "POST", a, m)) for a, m in [("reward", "reward"), *names]]
            row = next(r for r in matched(Comparison((Group(g.name, tuple(runs)),))) if r.name == point["name"])
            body.append([g.name, str(len(runs)), point["name"], *gains, told(row.gains.get(RETENTION))])
    return filled(
        ["aligned by", "seeds", "given back", "reward", *(a for a, _ in names), "retention minus MA's at equal reward"],
        body,
    )


def equal_means_table(groups: Sequence[Group]) -> str:
    """HMA and the controls minus MA: at the same mean, and at the same reward."""
    body = []
    for g in groups:
        for method in AT_EQUAL_MEANS:
            points = [p for p in g.runs[0].results["points"] if p["method"] == method]
            for p in points:
                reference = f"MA {p['settings']['mean']:g}"
                runs = shared(g, [p["name"], reference])
                if not runs:
                    continue
                reward = minus(runs, p["name"], reference, "reward", "reward")
                kept = retention_minus(runs, p["name"], reference)
                first = p is points[0]
                gains = [told(method_gains(g, method, HELD_OUT, a)) if first else "" for a in reading.MEANS]
                body.append([g.name, str(len(runs)), p["name"], told(reward), told(kept), *gains])
    head = ["aligned by", "seeds", "point", "reward minus MA's at its mean", "retention minus MA's at its mean"]
    return filled([*head, *(f"{a} at equal reward, all points of the method" for a in reading.MEANS)], body)


def found_table(groups: Sequence[Group]) -> str:
    """The thirds' ratios that HMA and the two-sided path chose, run by run."""
    body = []
    for g in groups:
        for run in g.runs:
            for p in run.results["points"]:
                if p["method"] == "HMA thirds":
                    body.append([g.name, str(run.seed), p["name"], *(f"{r:.2f}" for r in p["ratios"])])
    return filled(["aligned by", "seed", "point", "input third", "middle", "output"], body)


def borrowed_table(groups: Sequence[Group]) -> str:
    """Ratios found on another pair, against those found on this one."""
    body = []
    for g in groups:
        names = [p["name"] for run in g.runs for p in run.results["points"] if p["method"].endswith(", borrowed")]
        for name in dict.fromkeys(names):
            own = name.replace(", borrowed", "")
            runs = shared(g, [name, own])
            if not runs:
                continue
            lent = ", ".join(f"{p['settings']['of']} to {r.seed}" for r in runs if (p := of(r, name)))
            differences = (minus(runs, name, own, "reward", "reward"), retention_minus(runs, name, own))
            body.append([g.name, str(len(runs)), lent, own, *map(told, differences)])
    head = [
        "aligned by",
        "seeds",
        "ratios of",
        "point",
        "reward minus its own ratios'",
        "retention minus its own ratios'",
    ]
    return filled(head, body)


def features_table(groups: Sequence[Group]) -> str:
    """CKA and weight change by layer, and their rank correlation with the layerwise ratios."""
    body = []
    for path in sorted(RESULTS.glob("features-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        run = next((r for g in groups for r in g.runs if g.name == found["run"] and r.seed == found["seed"]), None)
        columns = {n: np.array([row[n] for row in found["layers"]]) for n in ("stream", "own", "moved")}
        means = [c[i : i + 10].mean() for c in columns.values() for i in (0, 10, 20)]
        links = []
        for name in ("HMA layerwise 0.6", "path 1"):
            point = of(run, name) if run else None
            ratios = np.array(point["ratios"][: len(found["layers"])]) if point else None
            links += [
                "–" if ratios is None else f"{rank_correlation(ratios, columns[n]):+.2f}" for n in ("own", "moved")
            ]
        body.append([found["run"], str(found["seed"]), *(f"{m:.3f}" for m in means), *links])
    head = [
        f"{n}, {t} third" for n in ("stream CKA", "own CKA", "weights moved") for t in ("input", "middle", "output")
    ]
    links = [f"{r} with {n}" for r in ("HMA 0.6's ratios", "path 1's ratios") for n in ("own CKA", "weights moved")]
    return filled(["aligned by", "seed", *head, *links], body)


if __name__ == "__main__":
    main("--figures" in sys.argv)
