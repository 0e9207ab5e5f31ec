"""How often a pick misses what was demanded of it, and what it costs to be sure: rules compared on simulated prompts.

    python experiments/statistics/picks.py [--samples 100]

A world is a committed run: how its candidates' rewards vary and vary together from prompt to prompt, and how their measured
retention does, are its items'; what they truly keep is its fronts, each smoothed between PRE and POST by a cubic, so that
noise of the run itself does not pass for truth. The crossed worlds have the demo's fronts and the noise of a real model.
Samples of prompts are drawn, each rule picks from them, and its pick is compared with the truth. Writes picks.json (goes on
from it) and its part of README.md; some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from counterpoise.evaluation.results import loss_units, measurement
from counterpoise.records import versions, write_json, write_whole
from counterpoise.statistics.bootstrap import paired_replicates
from counterpoise.statistics.demand import WITHIN, surest, would_do
from counterpoise.tables import reading

HERE = Path(__file__).parent
RUNS = {
    **{name: (HERE.parent / "two_sided/results" / f"{name}.json", "held-out") for name in
       ("rsf-0", "rsf-1", "rsf-2", "dpo-0", "ppo-0")},
    **{f"demo {n}": (HERE.parent / "demo/results" / f"seed-{n}.json", "validation") for n in (0, 1, 2)},
}  # fmt: skip
CROSSED = (("demo 0", "rsf-0"), ("demo 1", "dpo-0"), ("demo 2", "rsf-2"))
"""Whose fronts, whose noise."""
METHODS = {"MA": "MA", "HMA": "HMA", "HMA thirds": "HMA", "LiNeS": "LiNeS", "reversed": "reversed", "random": "random",
           "random thirds": "random"}  # fmt: skip
DEMANDS, SIZES = (0.95, 0.8), (50, 100, 200, 400, 1000)
TITLE = "# Does the pick keep what was demanded?"
Choice = tuple[int | None, bool]
"""Which candidate, and whether the rule is sure of it."""


@dataclass(frozen=True)
class World:
    """What is true, and how it varies.

    Attributes:
        names: (method, mean ratio) of each candidate.
        share: of the gain that each truly keeps, shape (J,).
        kept: the retention that each truly has; `post` POST's.
        gain: the true gain in reward.
        noise: what each prompt's reward differs by from the mean, shape (prompts, 2 + J): PRE, POST, candidates.
        seen: what measured retention differs by from the truth, shape (resamples, 1 + J): POST, candidates.
    """

    names: tuple[tuple[str, float], ...]
    share: np.ndarray
    kept: np.ndarray
    post: float
    gain: float
    noise: np.ndarray
    seen: np.ndarray

    @property
    def rewards(self) -> np.ndarray:
        """Every prompt's reward, shape (prompts, 2 + J)."""
        return self.noise + self.gain * np.array([0.0, 1.0, *self.share])


def smooth(names: tuple[tuple[str, float], ...], values: np.ndarray, end: float) -> np.ndarray:
    """A cubic along the mean ratio for each method, 0 at PRE and `end` at POST."""
    found = np.empty_like(values)
    for method in {m for m, _ in names}:
        at = [i for i, (m, _) in enumerate(names) if m == method]
        x = np.array([names[i][1] for i in at])
        form = np.stack([x * (1 - x), x * (1 - x) * (1 - 2 * x)], axis=1)
        found[at] = end * x + form @ np.linalg.lstsq(form, values[at] - end * x, rcond=None)[0]
    return found


def world_of(path: Path, part: str) -> World:
    """A committed run as a world."""
    content = json.loads(path.read_text(encoding="utf-8"))
    at = {p["name"]: p for p in content["points"] if p["part"] == part}
    told = {n: (METHODS[p["method"]], round(p["mean"], 2)) for n, p in at.items() if p["method"] in METHODS}
    chosen = [at["PRE"], at["POST"], *(at[n] for n in told)]
    counted = {a: m for a, m in reading.primary(content).items() if a not in reading.floored(content)}
    units = loss_units(content, part, counted)
    assert units is not None
    rewards, seen, kept = [], [], []
    for point in chosen:
        reward = measurement(content, point, "reward", "reward")
        assert reward is not None
        rewards.append(reward.statistics[:, 0])
        drawn, value = np.zeros(2000), 0.0
        for number, (ability, metric) in enumerate(counted.items()):
            now, before = (measurement(content, p, ability, metric) for p in (point, at["PRE"]))
            assert now is not None
            assert before is not None
            steps = paired_replicates(now.statistics, before.statistics, now.aggregate, seed=number)
            drawn += steps / units[ability] / len(units)
            value += (now.value - before.value) / units[ability] / len(units)
        seen.append(drawn - drawn.mean())
        kept.append(value)
    x = np.array(rewards).T
    mean, names = x.mean(0), tuple(told.values())
    gain = float(mean[1] - mean[0])
    share = smooth(names, (mean[2:] - mean[0]) / gain, 1.0)
    true = smooth(names, np.array(kept[2:]), kept[1])
    return World(names, share, true, kept[1], gain, x - mean, np.array(seen[1:]).T)


def crossed(fronts: World, noise: World) -> World:
    """The truth of one world with the prompts of another, as far as both have a candidate."""
    both = [n for n in fronts.names if n in noise.names]
    a, b = ([w.names.index(n) for n in both] for w in (fronts, noise))
    return replace(
        fronts, names=tuple(both), share=fronts.share[a], kept=fronts.kept[a], seen=fronts.seen[:, [0, *(i + 1 for i in a)]],
        gain=noise.gain, noise=noise.noise[:, [0, 1, *(i + 2 for i in b)]],
    )  # fmt: skip


def beyond(x: np.ndarray, share: float) -> np.ndarray:
    """What candidates are above a share of the gain, prompt by prompt."""
    return np.asarray(x[:, 2:] - x[:, [0]] - share * (x[:, [1]] - x[:, [0]]))


def t_of(d: np.ndarray) -> np.ndarray:
    """Mean over its standard error, of each column."""
    return np.asarray(d.mean(0) / np.maximum(d.std(0, ddof=1) / len(d) ** 0.5, 1e-12))


def best(allowed: np.ndarray, kept: np.ndarray) -> Choice:
    """Of what is allowed that of most retention."""
    return (int(np.where(allowed, kept, -np.inf).argmax()), True) if allowed.any() else (None, False)


def rules(world: World, x: np.ndarray, kept: np.ndarray, less: np.ndarray, share: float) -> dict[str, Choice]:
    """What each rule picks from a sample of prompts x (as `World.rewards`) and the measured retention.

    Args:
        less: which candidates have less tax than POST, as measured.
    """
    n = len(x)
    level = float(stats.t.ppf(0.9, n - 1))
    d, slack = beyond(x, share), beyond(x, share - WITHIN)
    word = less & (d.mean(0) >= 0)
    found = {
        "the sample's word": best(word, kept),
        "own bound 0.9 at the demand": best(less & (t_of(d) >= level), kept),
        "own bound 0.9, to 5 points": best(word & (t_of(slack) >= level), kept),
        "own bound 0.95, to 5 points": best(word & (t_of(slack) >= float(stats.t.ppf(0.95, n - 1))), kept),
    }
    # A smoothed candidate is a sum of candidates, so its bound is that of the same sum of each prompt's rewards.
    gain = x[:, [1]] - x[:, [0]]
    means = np.array([mean for _, mean in world.names])
    turn = np.stack([smooth(world.names, e, 0.0) for e in np.eye(len(means))], axis=1)
    fixed = means - turn @ means
    smoothed = (x[:, 2:] - x[:, [0]]) @ turn.T + gain * fixed
    fits = less & ((smoothed - share * gain).mean(0) >= 0)
    found["smoothed fronts"] = best(fits, kept)
    found["smoothed, own bound 0.9, to 5 points"] = best(
        fits & (t_of(smoothed - (share - WITHIN) * gain) >= level), kept
    )
    halves, confirmed = (slice(0, n // 2), slice(n // 2, n)), np.zeros(len(kept), bool)
    for one, other in (halves, halves[::-1]):
        i, _ = best(less & (d[one].mean(0) >= 0), kept)
        if i is not None:
            confirmed[i] |= bool(t_of(slack[other][:, [i]])[0] >= stats.t.ppf(0.9, n // 2 - 1))
    found["cross-fitted, bound 0.9, to 5 points"] = best(confirmed, kept)
    able = np.flatnonzero(less)
    for confidence in (0.8, 0.9):
        index, sure, _ = surest(x[:, 2:][:, able] - x[:, [0]], gain[:, 0], kept[able], share, confidence, resamples=300)
        where = None if index is None else int(able[index])
        name = f"joint bound {confidence:g}, to 5 points"
        found[name] = (where, True) if sure else (None, False)
        found[f"{name}, else the surest at twice the risk"] = (where, sure)
        anyhow = int(np.where(word, t_of(slack), -np.inf).argmax()) if word.any() else None
        found[f"{name}, else the surest whatever its risk"] = (where, True) if sure else (anyhow, False)
    return found


def simulate(world: World, share: float, n: int, samples: int, seed: int) -> dict[str, Any]:
    """Of each rule: in how many of the samples it picks, misses by more than 5 and 10 points, and what its picks are."""
    random = np.random.default_rng([seed, n, round(100 * share)])
    fine = (world.share >= share) & (world.kept > world.post)
    most = float(world.kept[fine].max()) if fine.any() else None
    told: dict[str, dict[str, float]] = {}
    gained = 0
    for _ in range(samples):
        x = world.rewards[random.integers(len(world.noise), size=n)]
        if t_of(x[:, [1]] - x[:, [0]])[0] < 1.96:
            continue  # restore stops there
        gained += 1
        noise = world.seen[random.integers(len(world.seen))]
        kept, post = world.kept + noise[1:], world.post + noise[0]
        for rule, (i, _) in rules(world, x, kept, kept > post, share).items():
            row = told.setdefault(rule, dict.fromkeys(("picks", "miss5", "miss10", "share", "given_up"), 0.0))
            if i is None:
                continue
            row["picks"] += 1
            row["miss5"] += bool(world.share[i] < share - WITHIN)
            row["miss10"] += bool(world.share[i] < share - 2 * WITHIN)
            row["share"] += float(world.share[i])
            row["given_up"] += 0.0 if most is None else (most - float(world.kept[i])) / abs(world.post)
    return {"samples": samples, "gained": gained, "possible": most is not None, "rules": told}


def spreads(world: World) -> dict[str, float]:
    """The spread of `would_do` over candidates that keep more than half, and what part of POST's own it is."""
    x = world.rewards
    own = float((x[:, 1] - x[:, 0]).std() / world.gain)
    of = [float(beyond(x, s - WITHIN)[:, i].std() / world.gain) for i, s in enumerate(world.share) if s > 0.5]
    return {"post": own, "candidates": float(np.median(of)), "ratio": float(np.median(of)) / own}


def main() -> None:
    """Simulate what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100)
    samples, place = parser.parse_args().samples, HERE / "picks.json"
    content: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"rows": {}}
    worlds = {name: world_of(*run) for name, run in RUNS.items()}
    worlds |= {f"{a}, noise of {b}": crossed(worlds[a], worlds[b]) for a, b in CROSSED}
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    about = {"command": " ".join(sys.argv), "commit": commit, "versions": versions()}
    about["spreads"] = {name: spreads(w) for name, w in worlds.items() if "noise of" not in name}
    for n in SIZES:
        for number, (name, world) in enumerate(worlds.items()):
            for share in DEMANDS:
                key = f"{n} | {share} | {name}"
                if (content["rows"].get(key) or {}).get("samples") != samples:
                    content["rows"][key] = simulate(world, share, n, samples, number)
                    write_json(place, {**about, "rows": content["rows"]})
    write_json(place, {**about, "rows": content["rows"]})
    readme = HERE / "README.md"
    before = readme.read_text(encoding="utf-8").partition(TITLE)[0]
    write_whole(readme, before.rstrip() + "\n\n" + page(json.loads(place.read_text(encoding="utf-8"))))


def page(content: dict[str, Any]) -> str:
    """The tables."""
    rows = {tuple(key.split(" | ")): row for key, row in content["rows"].items()}
    samples = next(iter(rows.values()))["samples"]
    worlds = len({name for _, _, name in rows})
    lines = [
        TITLE,
        "",
        f"`{content['command']}`, commit {content['commit']}, {samples} samples for each of {worlds} worlds, demands of "
        f"{' and '.join(f'{100 * d:g} %' for d in DEMANDS)}, and numbers of validation prompts. The worlds are the fronts and "
        "items of committed runs (see `picks.py`); in some of them no average keeps what is demanded.",
        "",
        "*Picks*: share of samples with a pick. *Missed*: share of picks that truly keep more than 5 (10) points less than was "
        "demanded; *worst*: the largest share of a world's samples with a pick that missed by more than 5. *Given up*: how much "
        "retention less than the best average that truly keeps the demand, in % of what POST lost, over worlds that have one; "
        "below 0 is bought by missing.",
        "",
        "| prompts | rule | picks | missed by 5 | by 10 | worst | given up |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for n in SIZES:
        some = [row for key, row in rows.items() if key[0] == str(n)]
        for rule in some[0]["rules"]:
            told = [
                (row, row["rules"].get(rule) or dict.fromkeys(("picks", "miss5", "miss10", "given_up"), 0.0))
                for row in some
            ]
            picks, gained = sum(t["picks"] for _, t in told), sum(row["gained"] for row in some)
            worst = max(t["miss5"] / max(row["gained"], 1) for row, t in told)
            able = [t for row, t in told if row["possible"]]
            up = sum(t["given_up"] for t in able) / max(sum(t["picks"] for t in able), 1)
            cells = [
                f"{picks / gained:.2f}",
                *(f"{sum(t[m] for _, t in told) / max(picks, 1):.3f}" for m in ("miss5", "miss10")),
            ]
            lines.append(f"| {n} | {rule} | {' | '.join(cells)} | {worst:.2f} | {100 * up:+.0f} % |")
    lines += [
        "",
        "How many prompts would do hangs on how much a candidate's reward, less the demanded share of the gain, varies from "
        "prompt to prompt, in units of the gain. Candidates that keep more than half, their median:",
        "",
        "| run | POST's own gain | candidates | ratio | prompts at 0.9 |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, s in content["spreads"].items():
        cells = [*(f"{s[k]:.2f}" for k in ("post", "candidates", "ratio")), f"{would_do(s['candidates'], 0.9):,}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    real = [s for name, s in content["spreads"].items() if not name.startswith("demo")]
    usual, part = (float(np.median([s[key] for s in real])) for key in ("candidates", "ratio"))
    lines += [
        "",
        f"`--dry-run` takes {usual:.2f} where nothing is measured, the median of the runs of SmolLM2-135M-Instruct, and "
        f"{part:.2f} of POST's own spread where PRE and POST are.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
