"""How often 95 % intervals hold the truth: percentile, BCa and studentised bootstrap, few items, skewed and not.

    python experiments/statistics/coverage.py [--samples 3000] [--together 400]

Writes coverage.json and README.md beside itself; some minutes on one core. Beside means of independent items: the mean of a
group of three tasks, and items of which one to three share half their variance (a passage).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from counterpoise.records import versions, write_json, write_whole
from counterpoise.statistics.bootstrap import bootstrap_weights, clustered, interval
from counterpoise.statistics.paired import resampled, stratified

HERE = Path(__file__).parent
Draw = Callable[[np.random.Generator, int], np.ndarray]
WORLDS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda r, n: r.normal(size=n), 0.0),
    "exponential": (lambda r, n: r.exponential(size=n), 1.0),
    "gamma 0.5": (lambda r, n: r.gamma(0.5, size=n), 0.5),
    "log-normal": (lambda r, n: r.lognormal(size=n), float(np.exp(0.5))),
    "Student's t, 3": (lambda r, n: r.standard_t(3, size=n), 0.0),
    "right or wrong, 0.5": (lambda r, n: (r.random(n) < 0.5) * 1.0, 0.5),
    "right or wrong, 0.85": (lambda r, n: (r.random(n) < 0.85) * 1.0, 0.85),
    "changed or not": (lambda r, n: r.choice([-1.0, 0.0, 1.0], size=n, p=[0.1, 0.7, 0.2]), 0.1),
}
SIZES = (16, 24, 40, 100)
ASKED = 0.93


def percentile(x: np.ndarray) -> tuple[float, float]:
    """What counterpoise gave before, by the same resamples."""
    low, high = np.quantile(bootstrap_weights(len(x), 2000, 0) @ x / len(x), [0.025, 0.975])
    return float(low), float(high)


def bca(x: np.ndarray) -> tuple[float, float]:
    """Bias-corrected and accelerated (Efron 1987), by the same resamples."""
    drawn = bootstrap_weights(len(x), 2000, 0) @ x / len(x)
    spread = x.std()
    skew = float(((x - x.mean()) ** 3).mean() / spread**3) if spread > 0 else 0.0
    below = ((drawn < x.mean()).mean() + (drawn <= x.mean()).mean()) / 2
    shift, a = stats.norm.ppf(np.clip(below, 1e-3, 1 - 1e-3)), skew / (6 * len(x) ** 0.5)
    z = shift + np.array([-1.96, 1.96])
    low, high = np.quantile(drawn, stats.norm.cdf(shift + z / (1 - a * z)))
    return float(low), float(high)


def studentised(x: np.ndarray) -> tuple[float, float]:
    """What counterpoise gives."""
    found = interval(x[:, None], "mean")
    return found.low, found.high


def of_groups(draw: Draw, truth: float, n: int, samples: int) -> dict[str, dict[str, Any]]:
    """Tasks of n, n and 2n items in a group, and n clusters: the intervals of today beside those that resample otherwise."""
    random = np.random.default_rng([n, samples, 1])
    found: dict[str, list[tuple[float, float]]] = {}
    weights = (0.25, 0.25, 0.5)
    for _ in range(samples):
        sides = [draw(random, k)[:, None] for k in (n, n, 2 * n)]
        tasks = [resampled(side, 0 * side, "mean", seed) for seed, side in enumerate(sides)]
        drawn = np.sum([w * t.scores[2].drawn for w, t in zip(weights, tasks, strict=True)], axis=0)
        of = np.repeat(np.arange(n), random.integers(1, 4, n))
        items = (draw(random, n)[of] + draw(random, len(of)))[:, None] - truth
        rows = {
            "a group, percentile": np.quantile(drawn, [0.025, 0.975]),
            "a group, studentised": stratified(tasks, weights)[2][1:3],
            "clusters, each item by itself": interval(items, "mean")[1:3],
            "clusters, resampled whole": interval(clustered(items, of), "mean")[1:3],
        }
        for name, (low, high) in rows.items():
            found.setdefault(name, []).append((float(low), float(high)))
    bounds = {name: np.array(rows) for name, rows in found.items()}
    return {
        name: {"covered": float(((b[:, 0] <= truth) & (truth <= b[:, 1])).mean()), "width": float(np.diff(b).mean())}
        for name, b in bounds.items()
    }


METHODS = {"percentile": percentile, "BCa": bca, "studentised": studentised}


def cover(world: str, n: int, samples: int) -> dict[str, Any]:
    """Shares of samples whose interval holds the truth, and mean widths over that of the percentile interval."""
    draw, truth = WORLDS[world]
    random = np.random.default_rng([n, samples])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for _ in range(samples):
        x = draw(random, n)
        for name, method in METHODS.items():
            found[name].append(method(x))
    bounds = {name: np.array(rows) for name, rows in found.items()}
    held = {k: float(((b[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= b[:, 1])).mean()) for k, b in bounds.items()}
    widths = {k: float((b[:, 1] - b[:, 0]).mean()) for k, b in bounds.items()}
    return {
        "world": world,
        "items": n,
        "covered": held,
        "width": {k: w / widths["percentile"] for k, w in widths.items()},
    }


def main() -> None:
    """Simulate what coverage.json does not hold yet, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--together", type=int, default=400, help="samples of groups and clusters")
    given, kept = parser.parse_args(), HERE / "coverage.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if found.get("samples") != given.samples:
        found = {**about(given.samples), "rows": [cover(w, n, given.samples) for n in SIZES for w in WORLDS]}
    now = about(given.together)
    rows = {(row["items"], row["world"]): row for row in found.get("together", {}).get("rows", ())}
    for n, world in ((n, w) for n in SIZES for w in ("normal", "exponential")):
        if rows.get((n, world), {}).get("samples") != given.together:
            said = {k: now[k] for k in ("commit", "samples")}
            rows[n, world] = {"world": world, "items": n, **said, **of_groups(*WORLDS[world], n, given.together)}
            found["together"] = {**now, "rows": [*rows.values()]}
            write_json(kept, found)
    readme = HERE / "README.md"
    _, mark, picks = readme.read_text(encoding="utf-8").partition("\n# Does the pick")  # picks.py writes that part
    write_whole(readme, page(json.loads(kept.read_text(encoding="utf-8"))) + mark + picks)


def about(samples: int) -> dict[str, Any]:
    """What was run."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    return {"command": " ".join(sys.argv), "commit": commit, "samples": samples, "versions": versions()}


def page(content: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Do 95 % intervals hold the truth in 95 of 100 cases?",
        "",
        f"`{content['command']}`, commit {content['commit']}, {content['samples']:,} samples a row. Share of samples whose "
        "interval of the mean holds the true mean; in brackets the mean width, the percentile interval's being 1.",
        "",
        "| items | distribution | " + " | ".join(METHODS) + " |",
        "|---:|---|" + "---:|" * len(METHODS),
    ]
    for row in content["rows"]:
        cells = [f"{row['covered'][m]:.3f} ({row['width'][m]:.2f})" for m in METHODS]
        lines.append(f"| {row['items']} | {row['world']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "A row of right and wrong answers that are all alike has no variance: its interval is one point, and misses.",
        "",
        "## Groups of tasks, and clusters of items",
        "",
        f"`{content['together']['command']}`. Three tasks of n, n and 2n items with the weights 0.25, 0.25 and 0.5; and n "
        "clusters of one to three items that share half their variance. In brackets the mean width.",
        "",
    ]
    names = [k for k in content["together"]["rows"][0] if k not in ("world", "items", "samples", "commit")]
    lines += ["| n | distribution | samples | " + " | ".join(names) + " |", "|---:|---|---:|" + "---:|" * len(names)]
    for row in content["together"]["rows"]:
        cells = [f"{row[k]['covered']:.3f} ({row[k]['width']:.2f})" for k in names]
        lines.append(f"| {row['items']} | {row['world']} | {row['samples']:,} | " + " | ".join(cells) + " |")
    lines += ["", *missed(content)]
    return "\n".join(lines) + "\n"


def missed(content: dict[str, Any]) -> list[str]:
    """Which cells of the intervals that counterpoise gives lie below what was asked of them."""
    cells = [(f"{r['items']} {r['world']}", r["covered"]["studentised"], content["samples"]) for r in content["rows"]]
    for name in ("a group, studentised", "clusters, resampled whole"):
        cells += [
            (f"{r['items']} {r['world']}, {name}", r[name]["covered"], r["samples"])
            for r in content["together"]["rows"]
        ]
    low = [(c, share, (share * (1 - share) / n) ** 0.5) for c, share, n in cells if share < ASKED]
    found = "; ".join(f"{c}: {share:.3f} ± {error:.3f}" for c, share, error in low) or "none"
    return [
        f"Asked for was {ASKED} in every cell. Of {len(cells)} cells of the studentised intervals, which counterpoise gives, "
        f"{len(low)} lie below it (± the simulation's standard error): {found}.",
    ]


if __name__ == "__main__":
    main()
