"""After the real run: averaging one third at a time, and a second classifier's view of the reward.

    python experiments/hma/partwise.py WORK

WORK as real_run.sh left it. Measures on validation data, with the same panel and the same store of finished pieces:
  HMA against MA at equal means, items paired (nothing new is run for it);
  part-wise MA (Lin et al. 2024, section 4): one third of the layers at a ratio below 1, all else at POST;
  check: PRE, POST and the pick under the classifier fitted to the other half of the reviews, held-out prompts.
Writes results/real_run.json (restore.json with the commit) and results/partwise.json beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from counterpoise.averaging.partition import thirds
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.preflight import preflight, scan
from counterpoise.evaluation.measurement import difference, interval_of, retention, tax_table, units
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.rewards import fingerprint, load_reward
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.sampling import Drawing
from counterpoise.records import Store, versions, write_json

HERE = Path(__file__).resolve().parent
PARTS = {"input": 0, "middle": 1, "output": 2}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4])
    options = parser.parse_args()
    os.chdir(options.work)
    place = Path("restored") if Path("restored").exists() else Path("restored.work")
    run = json.loads((place / "restore.json").read_text(encoding="utf-8"))
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    about = {"commit": commit(), "versions": versions(), "seed": run["seed"]}
    aligned = json.loads(Path("rsf.json").read_text(encoding="utf-8"))
    aligned["command"] = "python experiments/hma/make_post.py DATA WORK"
    write_json(results / "real_run.json", {"commit": about["commit"], **run, "rsf": aligned})

    settings = run["settings"]
    panel = Panel.load(
        run["prompts"],
        run["reward"],
        run["abilities"],
        drawing=Drawing(
            max_new_tokens=settings["max_new_tokens"],
            temperature=settings["temperature"],
            batch_size=settings["batch_size"],
            chat=settings["chat"],
            seed=settings["seed"],
        ),
        limit=settings["limit"],
        prompt_limit=settings["prompt_limit"],
    )
    pair = preflight("pre", "post")
    scan(pair)
    bench = Workbench(pair, panel, Store("restored.work"), dtype=torch.float32, progress=shown)
    found = {
        "command": f"python experiments/hma/partwise.py WORK --ratios {' '.join(map(str, options.ratios))}",
        **about,
        "hma_minus_ma": against_ma(bench, run),
        "partwise": partwise(bench, options.ratios, [r["name"] for r in run["tax"] if r["at_floor"]]),
        "check": check(bench, run["pick"]),
    }
    write_json(results / "partwise.json", found)


def against_ma(bench: Workbench, run: dict[str, Any]) -> list[dict[str, Any]]:
    """HMA minus MA at each mean, from the store."""
    cut = thirds(bench.pair.names)
    pre, post = (bench.point(n, bench.whole, [r], "validation", name=n) for n, r in (("PRE", 0.0), ("POST", 1.0)))
    counted = [a for a in pre.scores.abilities if a not in {r["name"] for r in run["tax"] if r["at_floor"]}]
    unit = units(pre.scores, post.scores, counted)
    rows = []
    for search in run["search"]:
        hma, ma = (
            bench.point(m, c, r, "validation")
            for m, c, r in (("HMA", cut, search["ratios"]), ("MA", bench.whole, [search["mean"]]))
        )
        kept = [retention(pre.scores, p.scores, unit) for p in (hma, ma)]
        rows.append(
            {
                "mean": search["mean"],
                "ratios": search["ratios"],
                "retention": {
                    "hma": kept[0],
                    "ma": kept[1],
                    "difference": retention(ma.scores, hma.scores, unit),
                },
                "rows": [{k: r[k] for k in ("name", "metric", "tax")} for r in tax_table(hma.scores, ma.scores)],
            }
        )
    return rows


def partwise(bench: Workbench, ratios: list[float], floored: list[str]) -> list[dict[str, Any]]:
    """One third at a time, against POST, items paired."""
    cut = thirds(bench.pair.names)
    pre, post = (bench.point(n, bench.whole, [r], "validation", name=n) for n, r in (("PRE", 0.0), ("POST", 1.0)))
    unit = units(pre.scores, post.scores, [a for a in pre.scores.abilities if a not in floored])
    rows = []
    for name, index in PARTS.items():
        for ratio in ratios:
            shares = [1.0] * 3
            shares[index] = ratio
            point = bench.point("part-wise", cut, shares, "validation", name=f"{name} third at {ratio:g}")
            rows.append(
                {
                    "part": name,
                    "ratio": ratio,
                    **point.scores.summary(),
                    "retention": retention(pre.scores, point.scores, unit),
                    "reward_minus_post": difference(point.scores.reward, post.scores.reward),
                    "gain_over_post": [
                        {k: row[k] for k in ("name", "metric", "tax")} for row in tax_table(point.scores, post.scores)
                    ],
                }
            )
    return rows


def check(bench: Workbench, pick: str | None) -> dict[str, Any]:
    """The reward of the second classifier on held-out prompts."""
    spec = "sentiment:check.csv"
    panel = dataclasses.replace(bench.panel, reward=load_reward(spec), reward_id=fingerprint(spec), abilities=[])
    bench = Workbench(bench.pair, panel, bench.store, dtype=torch.float32, progress=shown)
    points = {n: bench.point(n, bench.whole, [r], "held-out", name=n) for n, r in (("PRE", 0.0), ("POST", 1.0))}
    if pick is not None:
        recipe = Recipe.read("restored/recipe.json")
        points[pick] = bench.point("pick", recipe.partition, recipe.ratios, "held-out", name=pick)
    pre = points["PRE"].scores.reward
    return {
        "reward": spec,
        **{n: interval_of(p.scores.reward) for n, p in points.items()},
        "gain": {n: difference(p.scores.reward, pre) for n, p in points.items() if n != "PRE"},
    }


def commit() -> str:
    """The commit that ran."""
    command = shlex.split("git describe --always --dirty")
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def shown(stage: str, done: int, total: int) -> None:
    """One line a finished piece."""
    print(f"{stage}: {done}/{total}", flush=True)


if __name__ == "__main__":
    main()
