"""The pages of the evidence: healing beside every averaging, over demo worlds and over pairs of a real model.

    python experiments/winning/tables.py [--results FOLDER]

Reads FOLDER/KIND-*.json, which hold every item, and writes FOLDER/KIND.md for each KIND that is there; nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterpoise.evaluation.results import loss_units, measurement
from counterpoise.report.matched import reference_curve
from counterpoise.statistics.bootstrap import Array, over_runs, paired_replicates
from counterpoise.statistics.equal_reward import Matched, ModelStatistics, PointAndCurve, Statistics, reward_matched
from counterpoise.tables import reading

HERE = Path(__file__).resolve().parent
PART = reading.HELD_OUT
KINDS = {
    "world": "Healing beside averaging, over demo worlds of twelve layers",
    "averages": "More averages of the same worlds, and what searches find",
    "drawing": "Healing whose questions BanditMTL draws, over the same worlds",
    "smollm": "Healing beside averaging, SmolLM2-135M with something to lose; no teacher asked ARC-easy, PIQA or LAMBADA",
    "smollm-rsf": "Healing beside averaging, SmolLM2-135M aligned by RSF",
    "earlier-rsf": "Healing beside more averages, SmolLM2-135M aligned by RSF, earlier pairs of 100 items an ability",
    "smollm-dpo": "Healing beside averaging, SmolLM2-135M aligned by DPO",
    "rsf": "Healing beside averaging, larger worlds aligned by RSF",
    "ppo": "Healing beside averaging, larger worlds aligned by PPO",
}
PAIRS = (
    ("POST healed 15", "MA 0.8"), ("POST healed 15", "LiNeS 0.9"), ("POST healed 15", "POST trained on, replay"),
    ("POST healed 15", "POST trained on, KD 0.1 and replay"), ("LiNeS 0.8 healed 15", "LiNeS 0.6"),
    ("POST healed 15 bandit", "POST healed 15"), ("POST healed 30 bandit", "POST healed 30"),
    ("POST healed 15 forward", "POST healed 15"), ("POST healed 15 jensen-shannon", "POST healed 15"),
    ("POST healed 20 openings", "POST healed 20"), ("POST healed 20 openings", "MA 0.8"),
    ("POST healed 20", "MA 0.9"), ("POST healed 20", "MA 0.8"), ("POST healed 20", "MA 0.65"), ("POST healed 20", "LiNeS 0.8"),
    ("POST healed 20", "POST trained on, replay"), ("POST healed 20", "POST trained on, KD 0.1 and replay"),
    ("MA 0.8 healed 20", "MA 0.65"), ("MA 0.8 healed 20", "POST healed 20"), ("POST healed 40", "POST healed 20"),
    ("POST healed 20", "POST healed 8"), ("slope 2 0.8", "LiNeS 0.8"), ("step 0.8", "LiNeS 0.8"), ("LiNeS 0.8", "MA 0.8"),
    ("HMA 0.8", "MA 0.8"), ("HMA 0.8", "LiNeS 0.8"),
)  # fmt: skip
"""First minus second, where a page has both."""
Results = Mapping[str, Any]


def main() -> None:
    """Read, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "worlds")
    folder = parser.parse_args().results
    for kind, title in KINDS.items():
        if runs := [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{kind}-*.json"))]:
            (folder / f"{kind}.md").write_text(page(title, runs), encoding="utf-8")


def page(title: str, runs: Sequence[Results]) -> str:
    """Markdown."""
    names = [n for n in dict.fromkeys(p["name"] for r in runs for p in reading.measured_points(r, PART)) if n != "PRE"]
    kinds = list(reading.primary(runs[0]))
    gained = gains(runs), gains(runs, "accuracy")
    both = [f"{a} {m}" for a, m in reading.counted(runs[0], "accuracy").items()]
    arms = table(
        ["", "runs", "reward kept", "tax left", "worst ability left", *kinds, "tokens drawn", "trained", "seconds"],
        [row(name, runs, kinds) for name in names],
    )
    answers = table(["", *both], [[n, *answered(n, runs)] for n in ["PRE", *names]])
    lines = [
        f"# {title}",
        "",
        "Held-out data. Reward kept: share of POST's gain. Tax left: the share of each ability's own loss (likelihood) that is",
        "left, mean of the abilities that are above floor, then the worst of them and each. Brackets: 95 % t intervals over the",
        "runs, where there are two or more. Costs are means; times are of a shared machine.",
        "",
        *arms,
        "",
        "By answers: accuracy and exact match in %, BLEU; means over the runs.",
        "",
        *answers,
        "",
        "Retention beyond plain averaging at the arm's own reward, where that reaches it (in how many runs), in each run's own",
        "units: by likelihood, and by answers of the abilities that have both. First bracket: over items, for these runs;",
        "second: t over runs.",
        "",
        *table(
            ["", "by likelihood", "by answers"], [[n, *(over_all([*g[n].values()]) for g in gained)] for n in gained[0]]
        ),
        "",
        "First minus second. First bracket: over items (paired bootstrap), for these runs; second: t over runs. The last two",
        "columns have t intervals alone.",
        "",
        *table(
            ["", "runs", "reward kept", "tax left", "worst ability left", "beyond averaging (runs)"],
            pairs(runs, gained[0]),
        ),
        "",
        f"Commits {', '.join(dict.fromkeys(r['commit'] for r in runs))}; command `{runs[0]['command']}`; versions "
        f"{reading.version_list(runs[0])}; dates {', '.join(dict.fromkeys(r['date'] for r in runs))}.",
    ]
    return "\n".join(lines) + "\n"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    ruled = f"|---|{'---:|' * (len(titles) - 1)}"
    return [f"| {' | '.join(titles)} |", ruled, *(f"| {' | '.join(cells)} |" for cells in rows)]


def row(name: str, runs: Sequence[Results], abilities: Sequence[str]) -> list[str]:
    """The cells of one arm."""
    found = [r for r in runs if point(r, name) is not None]
    costs = [point(r, name)["settings"] for r in found]  # type: ignore[index]
    lost = [left(r, name) for r in found]
    return [
        name,
        str(len(found)),
        spread([kept(r, name) for r in found]),
        spread([mean_left(r, name) for r in found]),
        spread([max(of.values()) for of in lost]),
        *(number([of[a] for of in lost if a in of], 2) for a in abilities),
        *(number([c[k] for c in costs if k in c], 0) for k in ("drawn", "trained", "seconds")),
    ]


def answered(name: str, runs: Sequence[Results]) -> list[str]:
    """Of each ability with two kinds of metric the one of its answers."""
    found = [(p, reading.counted(r, "accuracy")) for r in runs if (p := point(r, name)) is not None]
    return [number([p["abilities"][a][m]["value"] for p, _ in found], 1) for a, m in found[0][1].items()]


def gains(runs: Sequence[Results], kind: str = "") -> dict[str, dict[int, Matched]]:
    """Arm -> number of a run -> its gain on plain averaging, in the runs where that reaches its reward."""
    found: dict[str, dict[int, Matched]] = {}
    for i, run in enumerate(runs):
        for p in reading.measured_points(run, PART):
            if p["method"] not in ("PRE", "POST", "MA"):
                gain = beyond(run, p["name"], kind)
                found.setdefault(p["name"], {}).update({} if gain is None else {i: gain})
    return found


def beyond(run: Results, name: str, kind: str) -> Matched | None:
    """Retention of an arm minus that of plain averaging at its reward; None where that does not reach it."""
    metrics = reading.counted(run, kind)
    units = loss_units(run, PART, metrics)
    asked = [("reward", "reward"), *metrics.items()]
    scored = []
    for p in (point(run, name), *reference_curve(run, PART, reading.RETENTION)):
        found = [measurement(run, p or {}, *of) for of in asked]
        held = [Statistics(m.sampled, m.sampled_as) for m in found if m is not None]
        scored.append(ModelStatistics(held[0], tuple(held[1:])))
    return reward_matched([PointAndCurve(scored[0], scored[1:])], [*(units or {}).values()])


def over_all(found: Sequence[Matched]) -> str:
    """The mean of runs that have items of their own: their half widths add up in squares."""
    if not found:
        return ""
    value, half = (
        float(np.mean([m.value for m in found])),
        math.hypot(*((m.high - m.low) / 2 for m in found)) / len(found),
    )
    return f"{twofold(value, (value - half, value + half), [m.value for m in found])} ({len(found)})"


def pairs(runs: Sequence[Results], gained: Mapping[str, Mapping[int, Matched]]) -> list[list[str]]:
    """Differences between two arms, paired by run."""
    rows = []
    for names in PAIRS:
        if both := [r for r in runs if all(point(r, n) for n in names)]:
            cells = []
            for value, drawn in ((kept, kept_drawn), (mean_left, left_drawn)):
                by_run = [value(r, names[0]) - value(r, names[1]) for r in both]
                ends = np.quantile(np.mean([drawn(r, *names) for r in both], axis=0), [0.025, 0.975])
                cells.append(twofold(float(np.mean(by_run)), ends, by_run))
            worst = [max(left(r, names[0]).values()) - max(left(r, names[1]).values()) for r in both]
            of = [gained.get(n, {}) for n in names]
            known = [of[0][i].value - of[1][i].value for i in of[0] if i in of[1]]
            told = f"{spread(known)} ({len(known)})" if known else ""
            rows.append([f"{names[0]} minus {names[1]}", str(len(both)), *cells, spread(worst), told])
    return rows


def point(run: Results, name: str) -> Results | None:
    """The held-out point of a name."""
    return next((p for p in reading.measured_points(run, PART) if p["name"] == name), None)


def three(run: Results, name: str) -> list[Results]:
    """PRE, POST and the point."""
    return [p for n in ("PRE", "POST", name) if (p := point(run, n)) is not None]


def kept(run: Results, name: str) -> float:
    """The share of POST's gain in reward."""
    pre, post, own = (p["reward"]["value"] for p in three(run, name))
    return float((own - pre) / (post - pre))


def kept_drawn(run: Results, first: str, second: str) -> Array:
    """Resampled differences of it, with the gain as it is."""
    pre, post, _ = (p["reward"]["value"] for p in three(run, first))
    return resampled(run, first, second, "reward", "reward") / (post - pre)


def counted(run: Results) -> dict[str, str]:
    """The abilities above floor with their first metric, a likelihood."""
    return {a: m for a, m in reading.primary(run).items() if a not in reading.floored(run)}


def left(run: Results, name: str) -> dict[str, float]:
    """Of each ability above floor the share of its own loss that is left, in its unit, by likelihood."""
    metrics, units = counted(run), loss_units(run, PART, counted(run)) or {}
    pre, _, own = three(run, name)
    return {
        a: (pre["abilities"][a][m]["value"] - own["abilities"][a][m]["value"]) / units[a] for a, m in metrics.items()
    }


def mean_left(run: Results, name: str) -> float:
    """Its mean."""
    return float(np.mean([*left(run, name).values()]))


def left_drawn(run: Results, first: str, second: str) -> Array:
    """Resampled differences of the mean, with the units as they are."""
    units = loss_units(run, PART, counted(run)) or {}
    drawn = [resampled(run, first, second, a, m) / units[a] for a, m in counted(run).items()]
    return -np.mean(drawn, axis=0)  # type: ignore[no-any-return]


def resampled(run: Results, first: str, second: str, name: str, metric: str) -> Array:
    """Resampled differences of a score; the abilities' items are drawn apart from each other."""
    found: list[Any] = [measurement(run, point(run, n) or {}, name, metric) for n in (first, second)]
    seed = [*reading.primary(run), "reward"].index(name)
    return paired_replicates(
        found[0].sampled, found[1].sampled, found[0].sampled_as, seed=seed + 100 * int(run["seed"])
    )


def twofold(value: float, items: Sequence[float] | Array, by_run: Sequence[float]) -> str:
    """A value with its interval over items, and with that over runs where there are two or more."""
    text = f"{value:+.3f} [{items[0]:+.3f}, {items[1]:+.3f}]"
    return text if (t := over_runs(by_run)) is None else f"{text} [{t.low:+.3f}, {t.high:+.3f}]"


def spread(values: Sequence[float]) -> str:
    """Mean and 95 % t interval over runs."""
    if (t := over_runs(values)) is None:
        return number(values, 3)
    return f"{t.value:.3f} [{t.low:.3f}, {t.high:.3f}]"


def number(values: Sequence[float], digits: int) -> str:
    """The mean of those that are known."""
    known = [v for v in values if math.isfinite(v)]
    return f"{np.mean(known):,.{digits}f}" if known else ""


if __name__ == "__main__":
    main()
