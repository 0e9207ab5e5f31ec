"""How often 95 % intervals hold the truth: percentile, BCa and studentised bootstrap, few items, skewed and not.

    python experiments/statistics/coverage.py [--samples 4000]

Writes coverage.json and README.md beside itself; a minute or two on one core.
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
from counterpoise.statistics.bootstrap import bootstrap_weights, interval

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
    """Simulate all, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4000)
    samples = parser.parse_args().samples
    rows = [cover(world, n, samples) for n in SIZES for world in WORLDS]
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    about = {"command": " ".join(sys.argv), "commit": commit, "samples": samples, "versions": versions()}
    write_json(HERE / "coverage.json", {**about, "rows": rows})
    readme = HERE / "README.md"
    _, mark, picks = readme.read_text(encoding="utf-8").partition("\n# Does the pick")  # picks.py writes that part
    table = page(json.loads((HERE / "coverage.json").read_text(encoding="utf-8")))
    write_whole(readme, table + mark + picks)


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
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
