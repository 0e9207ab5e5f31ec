"""A richer grid of ramps on the ten demo worlds, measured in full and raced: what racing saves and what its picks are worth.

    python experiments/winning/grid.py WORK [--seeds 10]

WORK/demo-N holds a world as `experiments/demo/seeds.py --keep WORK` leaves it. Forty candidates, twice those of `restore`
when it had no slopes: ten mean ratios, slopes 0 (MA), 1 (LiNeS), 2 and the step. Every candidate is measured on the
validation part; the picks of full measuring, of today's grid and of every race of `racing.py` are measured on the held-out
part. Writes results/grid-N.json, every item in it, and grid.md; finished pieces stay in WORK, so that it goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from closed_form import about, bench_of
from racing import RULES, World, pick, race, world_of

from counterpoise.averaging.partition import layerwise
from counterpoise.evaluation.measurement import above_floor, retention, reward_kept, units
from counterpoise.evaluation.results import Measured, results, write_results
from counterpoise.records import write_whole
from counterpoise.search.hma import linear_ramp

HERE = Path(__file__).resolve().parent
MEANS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
SLOPES = {"MA": 0.0, "LiNeS": 1.0, "slope 2": 2.0, "step": math.inf}
TODAY = [f"{method} {mean:g}" for method in ("MA", "LiNeS") for mean in (0.2, 0.4, 0.6, 0.8)]
FULL, OF_TODAY, PLAIN = "all in full", "today's grid in full", "MA in full"


def main() -> None:
    """Every world that is missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    asked = parser.parse_args()
    (HERE / "results").mkdir(exist_ok=True)
    for seed in range(asked.seeds):
        place = HERE / "results" / f"grid-{seed}.json"
        if not place.is_file():
            write_results(place, world(asked.work / f"demo-{seed}", seed, place))
            print(time.strftime("%H:%M:%S"), "world", seed, flush=True)
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((HERE / "results").glob("grid-*.json"))]
    write_whole(HERE / "grid.md", page(found))


def world(at: Path, seed: int, place: Path) -> dict[str, Any]:
    """One world, measured and raced."""
    bench = bench_of(at, seed)
    deep = layerwise(bench.pair.names)
    at_mean = {f"{method} {mean:g}": (method, mean) for mean in MEANS for method in SLOPES}
    ratios = {name: linear_ramp(deep, mean, SLOPES[method]) for name, (method, mean) in at_mean.items()}
    begun = time.process_time()
    points = [Measured(p.name, p.method, p.scores) for p in bench.ends("validation")]
    for name, (method, mean) in at_mean.items():
        scores = bench.point(method, deep, ratios[name], "validation", name=name).scores
        points.append(Measured(name, method, scores, tuple(ratios[name]), mean))
    seconds = round(time.process_time() - begun, 1)
    content = results(points, run="demo", seed=seed, reward="cheer", part="validation", about=about())
    write_results(place.with_suffix(".part"), content)
    whole = world_of(place.with_suffix(".part"), "validation")
    place.with_suffix(".part").unlink()
    pre, post = (p.scores for p in bench.ends("held-out"))
    unit = units(pre, post, above_floor(pre))
    raced = {}
    for name, (which, prompts, items, alive) in picks(whole).items():
        at_pick = whole.names[which] if which is not None else None
        row: dict[str, Any] = {"pick": at_pick, "prompts": prompts, "items": items, "alive": alive}
        if at_pick:
            scores = bench.point(at_mean[at_pick][0], deep, ratios[at_pick], "held-out", name=at_pick).scores
            row |= {"reward": reward_kept(pre, post, scores), "retention": retention(pre, scores, unit)}
        raced[name] = row
    return {**content, "seconds": seconds, "raced": raced}


def picks(whole: World) -> dict[str, tuple[int | None, float, float, int]]:
    """Who is picked, the shares of all prompts and items that were measured for it, and how many candidates were left."""
    units, everyone = whole.units(), np.arange(len(whole.names))
    found = {}
    for name, some in ((FULL, None), (OF_TODAY, TODAY), (PLAIN, [f"MA {m:g}" for m in MEANS])):
        able = everyone if some is None else np.array([whole.names.index(n) for n in some])
        part = len(able) / len(everyone)
        found[name] = (pick(whole, units, able), part, part, len(able))
    for rule in RULES:
        alive, prompts, items = race(whole, units, rule)
        found[rule.name] = (pick(whole, units, alive), prompts, items, len(alive))
    return found


def page(contents: list[dict[str, Any]]) -> str:
    """The table over worlds."""
    about = contents[0]
    lines = [
        "# A richer grid of ramps, raced",
        "",
        f"`{about['command']}`, commit {about['commit']}; {len(contents)} demo worlds, 40 candidates each. *Prompts*,",
        "*items*: how many were measured of the reward's and of the abilities', as a share of all candidates in full (today:",
        "0.5). *Same*: in how many worlds the pick is that of full measuring. *Reward*, *tax left*: of the pick, on held-out",
        "data, mean over worlds; *minus full*: the same minus full measuring's, paired over worlds, ± standard error. A world",
        "without a pick keeps POST.",
        "",
        "| rule | prompts | items | survivors | same | no pick | reward | tax left | reward minus full | tax left minus full |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def of(content: dict[str, Any], rule: str) -> tuple[float, float]:
        row = content["raced"][rule]
        return (1.0, 1.0) if row["pick"] is None else (row["reward"]["value"], -row["retention"]["value"])

    for rule in contents[0]["raced"]:
        rows = [c["raced"][rule] for c in contents]
        got, full = (np.array([of(c, r) for c in contents]) for r in (rule, FULL))
        gaps = got - full
        errors = gaps.std(0, ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else np.full(2, np.nan)
        cells = [
            *(f"{np.mean([r[k] for r in rows]):.2f}" for k in ("prompts", "items")),
            f"{np.mean([r['alive'] for r in rows]):.1f}",
            str(sum(r["pick"] == c["raced"][FULL]["pick"] for r, c in zip(rows, contents, strict=True))),
            str(sum(r["pick"] is None for r in rows)),
            *(f"{x:.3f}" for x in got.mean(0)),
            *(f"{g:+.4f} ± {e:.4f}" for g, e in zip(gaps.mean(0), errors, strict=True)),
        ]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
