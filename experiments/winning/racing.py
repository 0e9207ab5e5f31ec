"""Racing of candidates, simulated from the items of committed runs: what it saves, and what it does to the pick.

    python experiments/winning/racing.py [--samples 40]

A world is a committed run, its items are the population: a validation sample is drawn from them with replacement, as many
as there were, PRE and POST are measured on all of it, candidates on growing shares of it. What a pick is worth is what it
scores on the population. Two kinds of races, after each look: *all at once* resamples the sample so far, the same items for all
candidates, lets each resample pick by the rule, and drops whom too few of them pick. *Reward first* measures rewards alone,
drops who is surely below the demanded share of the gain (paired t test), and then measures the abilities of those that keep
it on all prompts. Survivors go to `surest`. Writes results/racing.json after
every world (goes on from it) and racing.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from counterpoise.evaluation.results import loss_units, measurement
from counterpoise.records import versions, write_json, write_whole
from counterpoise.statistics.bootstrap import Array, bootstrap_weights, score
from counterpoise.statistics.demand import WITHIN, surest
from counterpoise.tables import reading

HERE = Path(__file__).resolve().parent
RUNS = {
    **{f"demo {n}": (HERE.parent / "demo/results" / f"seed-{n}.json", "validation") for n in range(10)},
    **{n: (HERE.parent / "two_sided/results" / f"{n}.json", "held-out") for n in ("rsf-0", "rsf-1", "rsf-2", "dpo-0")},
}
KEEP, CONFIDENCE = 0.95, 0.9
DEFAULT = ("MA", "LiNeS", "HMA", "HMA thirds")
"""What `restore` may pick from by default."""
DRAWS = 200
COLUMNS = ("prompts", "items", "same", "none", "missed", "share", "left")


class Rule(NamedTuple):
    """A race.

    Attributes:
        looks: the shares of the items after which candidates are dropped.
        level: of the test: the chance of being picked below which one is dropped, or the level of the paired test.
        reward_first: on rewards alone, by paired t tests against the demand; abilities are measured of those that keep it
            on all prompts, again raced where `abilities` has looks. Otherwise on everything at once, by chances.
        abilities: the shares of the abilities' items after which one is dropped that has surely more tax than another.
    """

    looks: tuple[float, ...]
    level: float
    reward_first: bool = True
    abilities: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """What the table calls it."""
        looks, of = (", ".join(f"{s:g}" for s in shares) for shares in (self.looks, self.abilities))
        if not self.reward_first:
            return f"all at once, by chances below {self.level:g}; looks {looks}"
        first = f"reward first, level {self.level:g}; looks {looks or 'none'}"
        return first + (f"; abilities {of}" if of else "")


RULES = (
    Rule((0.25, 0.5), 0.01, reward_first=False),
    Rule((0.125, 0.25, 0.5), 0.05, reward_first=False),
    Rule((), 0.0),
    *(Rule((0.125, 0.25, 0.5), level) for level in (0.01, 0.05, 0.1, 0.2)),
    Rule((0.25, 0.5), 0.05),
    Rule((0.125, 0.25, 0.5), 0.05, abilities=(0.25, 0.5)),
)


@dataclass(frozen=True)
class World:
    """Statistics of PRE, POST and the candidates.

    Attributes:
        names, methods: of the J candidates.
        reward: shape (2 + J, prompts).
        abilities: (statistics of shape (2 + J, items, d), aggregate) of each that counts.
    """

    names: tuple[str, ...]
    methods: tuple[str, ...]
    reward: Array
    abilities: tuple[tuple[Array, str], ...]

    def drawn(self, random: np.random.Generator) -> World:
        """As many items, drawn with replacement."""
        prompts = random.integers(self.reward.shape[1], size=self.reward.shape[1])
        of = [(s[:, random.integers(s.shape[1], size=s.shape[1])], a) for s, a in self.abilities]
        return World(self.names, self.methods, self.reward[:, prompts], tuple(of))

    def units(self) -> Array:
        """What each ability's loss is measured in: the loss, or two of its standard errors."""
        found = []
        for number, (s, aggregate) in enumerate(self.abilities):
            drawn = resampled(s[:2], aggregate, number)
            found.append(max(abs(scored(s[1], aggregate) - scored(s[0], aggregate)), 2 * (drawn[1] - drawn[0]).std()))
        return np.array(found)

    def worth(self, units: Array) -> tuple[Array, Array]:
        """Share of the reward gain kept and retention of each row, shape (2 + J,)."""
        mean = self.reward.mean(1)
        losses = [
            np.array([scored(row, a) - scored(s[0], a) for row in s]) / u
            for (s, a), u in zip(self.abilities, units, strict=True)
        ]
        return (mean - mean[0]) / (mean[1] - mean[0]), np.mean(losses, axis=0)


def scored(rows: Array, aggregate: str) -> float:
    """A score."""
    return score(rows, aggregate)


def resampled(rows: Array, aggregate: str, seed: int) -> Array:
    """Resampled scores of each row of statistics, the same items for all: shape (rows, DRAWS)."""
    weights = bootstrap_weights(rows.shape[1], DRAWS, seed)
    sums = np.einsum("ri,jid->jrd", weights, rows, optimize=True)
    if aggregate == "mean":
        return np.asarray(sums[..., 0] / rows.shape[1])
    assert aggregate == "ratio", aggregate
    return np.asarray(sums[..., 0] / sums[..., 1])


def world_of(path: Path, part: str) -> World:
    """A committed run."""
    content = json.loads(path.read_text(encoding="utf-8"))
    at = {p["name"]: p for p in content["points"] if p["part"] == part}
    rows = [at["PRE"], at["POST"], *(p for n, p in at.items() if n not in ("PRE", "POST"))]
    counted = {a: m for a, m in reading.primary(content).items() if a not in reading.floored(content)}
    assert loss_units(content, part, counted)

    def of(name: str, metric: str) -> tuple[Array, str]:
        found = [measurement(content, p, name, metric) for p in rows]
        assert all(m is not None for m in found)
        return np.stack([m.statistics for m in found if m]), found[0].aggregate if found[0] else ""

    abilities = tuple(of(a, m) for a, m in counted.items())
    return World(
        tuple(p["name"] for p in rows[2:]), tuple(p["method"] for p in rows[2:]), of("reward", "reward")[0][..., 0], abilities
    )  # fmt: skip


def chances(world: World, units: Array, share: float, alive: Array) -> Array:
    """How often each living candidate is the pick, over resamples of the first `share` of the items."""
    rows = np.array([0, 1, *(alive + 2)])
    reward = resampled(first(world.reward[rows][..., None], share), "mean", 99)
    kept = np.zeros_like(reward)
    for number, ((s, aggregate), unit) in enumerate(zip(world.abilities, units, strict=True)):
        scores = resampled(first(s[rows], share), aggregate, number)
        kept += (scores - scores[0]) / unit / len(units)
    able = (reward[2:] - reward[0] >= KEEP * (reward[1] - reward[0])) & (kept[2:] > kept[1])
    which = np.where(able, kept[2:], -np.inf).argmax(0)
    return np.bincount(which[able.any(0)], minlength=len(alive)) / DRAWS


def first(rows: Array, share: float) -> Array:
    """The first items, at least eight."""
    return rows[:, : max(8, round(share * rows.shape[1]))]


class Raced(NamedTuple):
    """Who is left to be picked from, and the mean shares of prompts and of abilities' items that were measured."""

    alive: Array
    prompts: float
    items: float


def race(world: World, units: Array, rule: Rule) -> Raced:
    """Run a race."""
    everyone = np.arange(len(world.names))
    alive, cost, before = everyone, 0.0, 0.0
    for share in (*rule.looks, 1.0):
        cost += len(alive) * (share - before) / len(everyone)
        before = share
        if share < 1 and not rule.reward_first:
            chance = chances(world, units, share, alive)
            stay = [i for i in range(len(alive)) if chance[i] >= rule.level]
            alive = alive[np.sort(stay or np.argsort(-chance, kind="stable")[:2]).astype(int)]
        if share < 1 and rule.reward_first:
            alive = alive[stays(first(world.reward[[0, 1, *(alive + 2)]][..., None], share)[..., 0], rule.level)]
    if not rule.reward_first:
        return Raced(alive, cost, cost)
    steps, gain = world.reward[2 + alive] - world.reward[0], world.reward[1] - world.reward[0]
    alive = alive[steps.mean(1) >= KEEP * gain.mean()]
    items, before = 0.0, 0.0
    for share in (*rule.abilities, 1.0):
        items += len(alive) * (share - before) / len(everyone)
        before = share
        if share < 1 and len(alive):
            sure = np.array([t_of(world, i) for i in alive]) >= stats.norm.ppf(CONFIDENCE)
            alive = alive[least_taxed(world, units, share, alive, rule.level, sure)]
    return Raced(alive, cost, items)


def t_of(world: World, i: int) -> float:
    """How surely a candidate keeps the demand to within five points, on all prompts."""
    slack = world.reward[2 + i] - world.reward[0] - (KEEP - WITHIN) * (world.reward[1] - world.reward[0])
    return float(slack.mean() / max(slack.std(ddof=1), 1e-12) * len(slack) ** 0.5)


def stays(reward: Array, level: float) -> Array:
    """Which candidates are not surely below the demanded share of the gain; reward of shape (2 + J, prompts)."""
    beyond = reward[2:] - reward[0] - KEEP * (reward[1] - reward[0])
    n = beyond.shape[1]
    error = np.maximum(beyond.std(1, ddof=1), 1e-12) / n**0.5
    return np.asarray(beyond.mean(1) / error >= stats.t.ppf(level, n - 1))


def least_taxed(world: World, units: Array, share: float, alive: Array, level: float, sure: Array) -> Array:
    """Which candidates have not surely less retention than the best of those that are `sure` of the demand."""
    rows = np.array([0, *(alive + 2)])
    drawn, value = 0.0, 0.0
    for number, ((s, aggregate), unit) in enumerate(zip(world.abilities, units, strict=True)):
        some = first(s[rows], share)
        drawn = drawn + resampled(some, aggregate, number)[1:] / unit
        value = value + np.array([scored(row, aggregate) for row in some])[1:] / unit
    if not sure.any():
        return np.ones(len(alive), bool)
    best = int(np.where(sure, value, -np.inf).argmax())
    error = np.maximum((drawn - drawn[best]).std(1), 1e-12)
    return np.asarray((value - value[best]) / error >= stats.norm.ppf(level))


def pick(world: World, units: Array, able: Array) -> int | None:
    """`restoration.pick.choose` among some candidates, measured on everything."""
    _, kept = world.worth(units)
    able = np.array([i for i in able if kept[2 + i] > kept[1]], dtype=int)
    steps = (world.reward[2 + able] - world.reward[0]).T
    gain = world.reward[1] - world.reward[0]
    found = surest(steps, gain, kept[2 + able], KEEP, CONFIDENCE, resamples=300)
    return None if found.which is None else int(able[found.which])


def simulate(world: World, samples: int, seed: int) -> dict[str, Any]:
    """Of each rule: cost, how often its pick is the one of full measuring, and what picks are truly worth."""
    random, truth = np.random.default_rng(seed), world.worth(world.units())
    told: dict[str, dict[str, float]] = {}
    everyone = np.arange(len(world.names))
    default = np.array([i for i in everyone if world.methods[i] in DEFAULT])

    def add(name: str, picked: int | None, full: int | None, prompts: float, items: float) -> None:
        row = told.setdefault(name, dict.fromkeys(COLUMNS, 0.0))
        at = 1 if picked is None else picked + 2  # without a pick POST stays
        row["prompts"] += prompts / samples
        row["items"] += items / samples
        row["same"] += (picked == full) / samples
        row["none"] += (picked is None) / samples
        row["missed"] += float(truth[0][at] < KEEP - WITHIN) / samples
        row["share"] += float(truth[0][at]) / samples
        row["left"] -= float(truth[1][at]) / samples

    for _ in range(samples):
        sample = world.drawn(random)
        units = sample.units()
        full = pick(sample, units, everyone)
        add("all in full", full, full, 1.0, 1.0)
        part = len(default) / len(everyone)
        add("the default's in full", pick(sample, units, default), full, part, part)
        for rule in RULES:
            raced = race(sample, units, rule)
            add(rule.name, pick(sample, units, raced.alive), full, raced.prompts, raced.items)
    return {"candidates": len(everyone), "default": len(default), "samples": samples, "rules": told}


def main() -> None:
    """Simulate what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--time", type=Path, metavar="WORLD", help="a demo's folder: time its reward and its abilities")
    asked, place = parser.parse_args(), HERE / "results" / "racing.json"
    samples = asked.samples
    place.parent.mkdir(exist_ok=True)
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"worlds": {}}
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    about = {"command": " ".join(sys.argv), "commit": commit, "versions": versions(), "date": time.strftime("%Y-%m-%d")}
    about["seconds"] = found.get("seconds")
    if asked.time:
        about["seconds"] = timed(asked.time)
    for seed, (name, run) in enumerate(RUNS.items()):
        if (found["worlds"].get(name) or {}).get("samples") != samples:
            found["worlds"][name] = simulate(world_of(*run), samples, seed)
            write_json(place, {**about, "worlds": found["worlds"]})
            print(time.strftime("%H:%M:%S"), name, flush=True)
    write_json(place, {**about, "worlds": found["worlds"]})
    write_whole(HERE / "racing.md", page(json.loads(place.read_text(encoding="utf-8"))))


def timed(at: Path) -> dict[str, float]:
    """Seconds of one core that the reward and the abilities of one average take on validation data, median of three."""
    from closed_form import bench_of

    bench = bench_of(at, int(at.name.removeprefix("demo-")))
    panel, model = bench.panel, bench.model_at(0.5)
    found: dict[str, list[float]] = {"reward": [], "abilities": []}
    for _ in range(3):
        begun = time.process_time()
        panel.rewards(model, bench.tokenizer, "validation")
        then = time.process_time()
        for ability in panel.abilities:
            ability.measure(model, bench.tokenizer, "validation", panel.drawing)
        found["reward"].append(then - begun)
        found["abilities"].append(time.process_time() - then)
    return {name: round(float(np.median(seconds)), 3) for name, seconds in found.items()}


def page(content: dict[str, Any]) -> str:
    """The table over worlds of each kind."""
    seconds = content.get("seconds") or {"reward": 1.0, "abilities": 1.0}
    whole = sum(seconds.values())
    lines = [
        "# Racing, simulated",
        "",
        f"`{content['command']}`, commit {content['commit']}. Means over worlds ± their standard error. *Prompts*,",
        "*items*: how many were measured of the reward's and of the abilities', as a share of all candidates in full. *Same*:",
        "how often the pick is that of full measuring. *Missed*: how often a pick truly keeps more than",
        f"{100 * WITHIN:g} points less than {100 * KEEP:g} % of the gain. *Reward* and *tax left*: what it truly keeps of the",
        "gain, and of each ability's own loss (likelihood), minus the same of full measuring, paired; without a pick POST stays.",
        "*Time*: measuring, as a share of all candidates in full, where the reward of an average takes "
        f"{seconds['reward']:g} s and its abilities {seconds['abilities']:g} s (a demo world).",
        "",
    ]
    for title, begins in (("Demo worlds", "demo"), ("SmolLM2-135M-Instruct", ("rsf", "dpo"))):
        worlds = [w for name, w in content["worlds"].items() if name.startswith(begins)]
        if not worlds:
            continue
        sizes = sorted({w["candidates"] for w in worlds})
        lines += [
            f"## {title}: {len(worlds)} worlds, {' or '.join(map(str, sizes))} candidates",
            "",
            "| rule | prompts | items | time | same | no pick | missed | reward | tax left |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for rule in worlds[0]["rules"]:
            rows = [w["rules"][rule] for w in worlds]
            means = [f"{np.mean([r[k] for r in rows]):.2f}" for k in ("prompts", "items", "same", "none", "missed")]
            used = seconds["reward"] * np.mean([r["prompts"] for r in rows])
            used += seconds["abilities"] * np.mean([r["items"] for r in rows])
            means.insert(2, f"{used / whole:.2f}")
            gaps = [
                np.array([w["rules"][rule][k] - w["rules"]["all in full"][k] for w in worlds])
                for k in ("share", "left")
            ]
            said = [f"{g.mean():+.4f} ± {g.std(ddof=1) / len(g) ** 0.5:.4f}" if len(g) > 1 else "–" for g in gaps]
            lines.append(f"| {rule} | {' | '.join(means)} | {' | '.join(said)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
