"""The demo over seeds: every one of them, whatever it shows.

    python experiments/demo/seeds.py [--seeds 10] [--keep FOLDER]

Runs `counterpoise demo --seed N` for each seed that has no results/seed-N.json yet, in a temporary folder or as
FOLDER/demo-N, keeps its demo.json there with the commit and what every item scored, and rewrites README.md from all of
them. A demo that FOLDER holds already is only restored again: nothing that was measured is measured twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from counterpoise import demo
from counterpoise.evaluation.results import write_results
from counterpoise.restoration.restore import run as restore
from counterpoise.statistics.bootstrap import over_runs
from counterpoise.tables.numbers import p_value, spoken
from counterpoise.tables.reading import KINDS, kind_of

HERE = Path(__file__).parent
METHODS = ("MA", "HMA", "LiNeS", "reversed", "random")
ITEMS = ("floored", "items", "points")
"""Of restore.json."""


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--keep", type=Path, help="where the demos stay")
    asked = parser.parse_args()
    seeds = range(asked.seeds)
    (HERE / "results").mkdir(exist_ok=True)
    for seed in seeds:
        kept = HERE / "results" / f"seed-{seed}.json"
        if kept.exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            at = (asked.keep or Path(folder)) / f"demo-{seed}"
            if not (at / "demo.json").is_file():
                command = [sys.executable, "-m", "counterpoise", "demo", "--seed", str(seed), "-o", str(at)]
                subprocess.run([*command, "--quiet"], check=True)
            found = json.loads((at / "demo.json").read_text(encoding="utf-8"))
            found |= restored(at, seed, Path(folder) / "restored")
            write_results(kept, {"commit": commit(), **found})
    (HERE / "README.md").write_text(page([read(seed) for seed in seeds]), encoding="utf-8")


def restored(at: Path, seed: int, out: Path) -> dict[str, Any]:
    """What restore finds in a demo, from its finished pieces."""
    abilities = demo.write_world(demo.World.invent(seed), at, seed)
    request, panel = demo.asked(at, abilities, seed)
    result = restore(
        replace(request, out=out, work=at / "restored.work"), panel, command=f"counterpoise demo --seed {seed}"
    )
    return {name: result.get(name) for name in (*demo.RESULTS, *ITEMS)}


def commit() -> str:
    """The commit that ran, "-dirty" where its sources were changed (results are not sources)."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/experiments/demo/*.py")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def read(seed: int) -> dict[str, Any]:
    """One seed's results."""
    found: dict[str, Any] = json.loads((HERE / "results" / f"seed-{seed}.json").read_text(encoding="utf-8"))
    return found


def row(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the table; shares are of the gain and of the tax on held-out data, by either kind of metric."""
    reward = next(r for r in found["tax"] if r["name"] == "reward")
    shares = found["shares"] or {}
    made: dict[str, Any] = {"reward": reward, "kept": shares.get("reward_kept"), "back": shares.get("tax_given_back")}
    for kind in KINDS:
        rows = [r for r in found["tax"] if r is not reward and not r["at_floor"] and kind_of(r["unit"]) == kind]
        made[kind] = f"{sum(r['tax']['low'] > 0 for r in rows)} of {len(rows)}"
    return made


def page(results: list[dict[str, Any]]) -> str:
    """README.md: the table over all seeds."""
    lines = [
        "# The demo over ten seeds",
        "",
        "`python experiments/demo/seeds.py` runs `counterpoise demo` for seeds 0 to 9 and writes this page from",
        "[results](results). No seed was left out or picked. A miniature world: each seed invents its own language,",
        "countries and tales, trains its own model of 0.7 M parameters and aligns it with RSF.",
        "",
        "Held-out data. *Lost*: how many of the abilities fell significantly (95 % interval of the tax above 0), by the",
        "likelihood of the right answer, which counts for the pick, and by accuracy (exact match for the translation; the",
        "tales have a likelihood alone). *Sure*: whether the pick keeps 95 % of the gain, to within 5 points, at 90 %",
        "confidence on the validation prompts, or how many would do. *Reward kept* and *given back*: the pick's share of the",
        "reward gain, and of the mean tax by likelihood, with 95 % intervals. Hypervolume of each method's front is by",
        "likelihood on validation data (the rectangle spanned by PRE and POST is 1).",
        "",
        "| seed | reward PRE → POST | lost by likelihood | by accuracy | pick | sure | reward kept | given back | "
        + " | ".join(f"HV {m}" for m in METHODS)
        + " | seconds |",
        "|---:|---|---|---|---|---|---:|---:|" + "---:|" * (len(METHODS) + 1),
    ]
    rows = [row(found) for found in results]
    for found, r in zip(results, rows, strict=True):
        volumes = [f"{found['hypervolume'].get(m, float('nan')):.3f}" for m in METHODS]
        shares = [
            f"{s['value']:.0%} [{100 * s['low']:.0f}, {100 * s['high']:.0f}]" if s else "–"
            for s in (r["kept"], r["back"])
        ]
        choice = found["choice"] or {}
        sure = "yes" if choice.get("sure") else f"no, {choice['would_do']} prompts" if choice.get("would_do") else "–"
        lines.append(
            f"| {found['seed']} | {r['reward']['pre']['value']:.2f} → {r['reward']['post']['value']:.2f} "
            f"| {' | '.join(r[k] for k in KINDS)} | {found['pick'] or 'none'} | {sure} | {' | '.join(shares)} "
            f"| {' | '.join(volumes)} | {sum(found['seconds'].values()):.0f} |"
        )
    lines.append(
        "| mean ± s.e. | | | | | "
        + " | ".join(
            [spread([r[k]["value"] for r in rows if r[k]], "%") for k in ("kept", "back")]
            + [spread([f["hypervolume"][m] for f in results if m in f["hypervolume"]]) for m in METHODS]
        )
        + " | |"
    )
    lines += [
        "",
        "## The worlds as the sample",
        "",
        "Hypervolume against another method's in the same world, with Student's 95 % interval over the worlds. Every method has",
        "one point at each mean of the same grid. Bold leaves out 0.",
        "",
        "| | difference | p | worlds above |",
        "|---|---:|---:|---:|",
        *(versus(results, *pair) for pair in [*((m, "MA") for m in METHODS[1:]), ("LiNeS", "HMA")]),
        "",
        f"Commits {', '.join(sorted({found['commit'] for found in results}))}; versions "
        + ", ".join(f"{k} {v}" for k, v in results[0]["versions"].items())
        + ". Times are of a shared machine with two cores.",
    ]
    return "\n".join(lines) + "\n"


def versus(results: list[dict[str, Any]], method: str, other: str) -> str:
    """A row: one method's hypervolume minus another's, over worlds."""
    volumes = [f["hypervolume"] for f in results]
    gaps = [v[method] - v[other] for v in volumes if method in v and other in v]
    found = over_runs(gaps)
    if found is None:
        return f"| {method} minus {other} | – | – | – |"
    text = spoken(found._asdict(), signed=True, decimals=3)
    text = f"**{text}**" if found.low > 0 or found.high < 0 else text
    return f"| {method} minus {other} | {text} | {p_value(found.p)} | {sum(g > 0 for g in gaps)} of {len(gaps)} |"


def spread(values: list[float], unit: str = "") -> str:
    """Mean and standard error."""
    if len(values) < 2:
        return "–"
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.0%} ± {error:.0%}" if unit else f"{mean:.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
