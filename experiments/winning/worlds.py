"""Healing beside every averaging, on demo worlds of twelve layers: one results file a world, every item in it.

    python experiments/winning/worlds.py WORK [--seeds 10] [--results FOLDER] [--averages | --drawing]

A world is invented, learned and aligned as in `counterpoise demo`, and lies in WORK/SEED with all that is made of it.
RESULTS/world-SEED.json is written anew after every arm: points of the validation and of the held-out part with the
statistics of every item, and what each arm cost. With --averages it is averages-SEED.json, of more averages and no
healing; with --drawing it is drawing-SEED.json, of healing with and without BanditMTL's drawing, held-out data alone.
Whatever is finished is not done again: the same command goes on after a kill. `python experiments/winning/tables.py` makes
the page from the files.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from counterpoise.alignment.heal import CHECKED, Healing
from counterpoise.alignment.mitigations.anchors import KD
from counterpoise.alignment.mitigations.replay import Replay
from counterpoise.alignment.settings import Teaching
from counterpoise.alignment.teaching import answers, height, in_turn, usual_rate
from counterpoise.alignment.training.models import Machine, load, load_frozen
from counterpoise.alignment.training.run import save_model
from counterpoise.alignment.training.stepping import adam, start_all, take_step
from counterpoise.averaging.average import average
from counterpoise.averaging.line import beside
from counterpoise.averaging.partition import layerwise
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.files import staged
from counterpoise.checkpoints.preflight import Pair, preflight
from counterpoise.demo import cheer, make_pair
from counterpoise.evaluation.measurement import Scores
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.parts import Part
from counterpoise.evaluation.results import Measured, items_of, results, write_results
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example, response_nll, response_tokens
from counterpoise.records import Store, public, versions, write_json
from counterpoise.search.candidates import HMA, TwoSided
from counterpoise.search.hma import linear_ramp

HERE = Path(__file__).resolve().parent
LAYERS = 12
DRAWN = Drawing(max_new_tokens=24, batch_size=64)
SLOPES = {"MA": 0.0, "LiNeS": 1.0, "slope 2": 2.0, "step": math.inf}


class Average(NamedTuple):
    """PRE, POST or what stands between them, by a ramp of SLOPES and its mean."""

    method: str
    mean: float | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.method if self.mean is None else f"{self.method} {self.mean:g}"

    @classmethod
    def named(cls, name: str) -> Average:
        """The average of a name."""
        method, _, mean = name.rpartition(" ")
        return cls(method, float(mean)) if method else cls(name)


class Heal(NamedTuple):
    """A healing: from where, how long, with what else."""

    start: str
    steps: int
    also: Mapping[str, Any] = MappingProxyType({})

    @property
    def name(self) -> str:
        """What tables call it."""
        more = [k if k == "openings" else str(v) for k, v in self.also.items() if k != "every"]
        return " ".join([f"{self.start} healed {self.steps}", *more])


class Searched(NamedTuple):
    """What a search finds at these means, of two-sided ones what its exact form does."""

    search: HMA | TwoSided
    means: tuple[float, ...] = ()


class Trained(NamedTuple):
    """POST, trained on its own answers with PRE's replayed, for as many tokens as a healing; strength of KD beside it."""

    strength: float
    like: Heal

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"POST trained on, KD {self.strength:g} and replay" if self.strength else "POST trained on, replay"


FIRST = Heal("POST", 15)
AVERAGES: tuple[Average | Searched, ...] = (
    *(Average("MA", mean) for mean in (0.2, 0.4, 0.6, 0.8, 0.9)),
    *(Average(method, mean) for method in ("LiNeS", "slope 2", "step") for mean in (0.6, 0.8, 0.9)),
    Searched(HMA(3), (0.6, 0.8, 0.9)),
    Searched(TwoSided((0.25, 0.5, 1.0))),
)
ARMS: tuple[Average | Heal | Searched | Trained, ...] = (
    *(a for a in AVERAGES if isinstance(a, Average) and a.method in ("MA", "LiNeS")),
    FIRST,
    Trained(0.0, FIRST),
    Trained(0.1, FIRST),
    *(Heal("POST", steps) for steps in (5, 10, 20, 30)),
    Heal("LiNeS 0.8", 15),
    Heal("POST", 15, {"keep_by": "bandit"}),
    Heal("PRE", 60),
    Heal("POST", 30, {"keep_by": "bandit"}),
    Heal("POST", 15, {"divergence": "forward"}),
    Heal("POST", 15, {"divergence": "jensen-shannon"}),
    Heal("MA 0.8", 15),
)
DRAWING: tuple[Average | Heal, ...] = (
    Average("MA", 0.8),
    *(Heal("POST", steps, also) for steps in (15, 30) for also in ({}, {"keep_by": "bandit"})),
)


def main() -> None:
    """One world after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=HERE / "worlds")
    parser.add_argument("--averages", action="store_true", help="averages and what searches find, no healing")
    parser.add_argument(
        "--drawing", action="store_true", help="healing whose questions BanditMTL draws, beside equal shares"
    )
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        world = World(options.work / str(seed), seed)
        name = "averages" if options.averages else "drawing" if options.drawing else "world"
        if options.averages:
            world.arms, world.run = AVERAGES, "demo world, averages"
        elif options.drawing:
            world.arms, world.run, world.points = DRAWING, "demo world, drawing", {"held-out": []}
        for point in world.measured_arms():
            world.write(options.results / f"{name}-{seed}.json")
            print(f"{time.strftime('%H:%M:%S')} world {seed}: {point}", flush=True)


class World:
    """One world, its pair, its panel, and the points measured so far.

    Attributes:
        settings: of every healing; `batch` prompts of each side in a step.
        bf16: mixed precision in training, bfloat16 in measuring.
        device: where models are trained and measured.
    """

    run, reward, drawing = "demo world", "cheer", DRAWN
    arms: Sequence[Average | Heal | Searched | Trained] = ARMS
    parts: Sequence[Part] = ("validation", "held-out")
    batch, bf16, device = 32, False, "cpu"
    settings: Mapping[str, Any] = {"batch_size": 32, "micro_batch_size": 32, "every": 5}

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.drawing = folder, seed, replace(self.drawing, seed=seed)
        self.made = self.make()
        self.panel = self.measures()
        self.pair = preflight(folder / "pre", folder / "post")
        self.points: dict[Part, list[Measured]] = {part: [] for part in self.parts}
        self.commit = git("describe", "--always", "--dirty")

    def make(self) -> dict[str, Any]:
        """PRE, POST and the files of the panel, made once; what is told of that, with the specs that a teacher asks by."""
        if not (made := self.folder / "made.json").is_file():
            with staged(self.folder) as new:
                begun = time.time()
                specs, rounds, _ = make_pair(new, seed=self.seed, layers=LAYERS)
                told = {
                    "specs": [s.replace(str(new), str(self.folder)) for s in specs],
                    "rsf": [r.summary() for r in rounds],
                }
                write_json(new / "made.json", {**told, "seconds": round(time.time() - begun, 1)})
        return {"layers": LAYERS, **json.loads(made.read_text())}

    def measures(self) -> Panel:
        """What every point is measured by."""
        drawing = replace(self.drawing, batch_size=64)
        return Panel.load(self.folder / "prompts.jsonl", cheer, self.made["specs"], drawing=drawing)

    def measured_arms(self) -> Iterator[str]:
        """Every arm, measured; its name."""
        self.measured("PRE", "PRE", self.folder / "pre")
        yield self.measured("POST", "POST", self.folder / "post")
        for arm in self.arms:
            if isinstance(arm, Heal):
                yield self.measured(arm.name, f"healed {arm.start}", self.healed(arm), **self.told(arm))
            elif isinstance(arm, Trained):
                out = self.trained(arm)
                yield self.measured(arm.name, "trained on", out, **json.loads((out / "trained.json").read_text()))
            elif isinstance(arm, Searched):
                yield from self.found(arm)
            else:
                yield self.measured(arm.name, arm.method, self.averaged(arm), mean=arm.mean)

    def found(self, arm: Searched) -> Iterator[str]:
        """What a search finds, measured."""
        bench = self.bench(self.pair)

        def seconds() -> float:
            begun = time.time()
            arm.search.find(bench, arm.means)
            return round(time.time() - begun, 1)

        cost = {"seconds": bench.store.once({"what": "seconds of a search", "search": repr(arm)}, seconds)}
        for c in arm.search.find(bench, arm.means).candidates:  # from what is kept
            if c.method == "two-sided path":
                continue
            mean = c.partition.mean(c.ratios)
            for part, points in self.points.items():
                scores = bench.point(c.name, c.partition, c.ratios, part, name=c.name).scores
                points.append(Measured(c.name, c.method, scores, c.ratios, mean, cost))
            yield c.name

    def bench(self, pair: Pair) -> Workbench:
        """What measures a pair's averages, and keeps what is measured."""
        dtype = torch.bfloat16 if self.bf16 else None
        return Workbench(pair, self.panel, Store(self.folder / "pieces"), dtype=dtype, device=self.device)

    @property
    def machine(self) -> Machine:
        """Where and how precisely is trained."""
        return Machine(bf16=self.bf16, device=self.device)

    def averaged(self, arm: Average) -> Path:
        """The folder of PRE, POST or an average."""
        if arm.mean is None:
            return self.folder / arm.method.lower()
        if not (out := self.folder / arm.name.replace(" ", "-")).is_dir():
            cut = layerwise(self.pair.shapes)
            ratios = tuple(linear_ramp(cut, arm.mean, SLOPES[arm.method]))
            recipe = arm.mean if arm.method == "MA" else Recipe(cut, ratios)
            average(self.folder / "pre", self.folder / "post", out, recipe)
        return out

    def healed(self, arm: Heal) -> Path:
        """The folder of a healed checkpoint."""
        out = self.folder / arm.name.replace(" ", "-")
        begin = self.averaged(Average.named(arm.start))
        also = dict(arm.also)
        more = {"openings": also.pop("openings")} if "openings" in also else {}
        self.healing(begin, out, Teaching(arm.steps, **{**self.settings, **also}), **more).run()
        return out

    def healing(self, start: Path, out: Path, teaching: Teaching, **more: Any) -> Healing:
        """From `start`, by both parents."""
        post, pre, asked = self.folder / "post", self.folder / "pre", self.folder / "prompts.jsonl"
        how: dict[str, Any] = {"teaching": teaching, "drawing": self.drawing, "machine": self.machine}
        return Healing(start, post, pre, out, asked, self.made["specs"], **how, **more)

    def told(self, arm: Heal) -> dict[str, Any]:
        """What a healing cost, its path, and where it led."""
        out = self.healed(arm)
        path = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        cost = {k: sum(line[k] for line in path) for k in ("drawn", "trained", "seconds")}
        line = beside(self.pair, preflight(self.folder / "pre", out))._asdict()
        return {"start": arm.start, "steps": arm.steps, "also": dict(arm.also), **cost, "line": line, "path": path}

    def trained(self, arm: Trained) -> Path:
        """The folder of POST, supervised until as many tokens are trained on as in the healing."""
        if (out := self.folder / arm.name.replace(" ", "-").replace(",", "")).is_dir():
            return out
        tokens, begun, size = self.told(arm.like)["trained"], time.time(), self.batch
        model, tokenizer = load(self.folder / "post", self.machine)
        _, (asked, *kept), _ = self.healing(self.folder / "post", out, Teaching()).sources(self.folder / "post")
        count = arm.like.steps * size
        said = [in_turn(asked.taught, f"{self.seed} 0", i) for i in range(count)]
        own = answers(model, tokenizer, said, replace(self.drawing, seed=self.seed + 1))
        pre = load_frozen(self.folder / "pre", self.machine)
        queries = [in_turn(k.taught, f"{self.seed} {k.name}", i) for i in range(count // len(kept)) for k in kept]
        old = answers(pre, tokenizer, queries, replace(self.drawing, seed=self.seed + 1))
        held = [Replay(1.0, old, seed=self.seed), *([KD(arm.strength, pre)] if arm.strength else [])]
        start_all(held, model, tokenizer)
        rate = usual_rate(sum(p.numel() for p in model.parameters()))
        optimizer, done = adam(model, rate), 0
        for number in range(count):
            batch = [own[(number * size + i) % count] for i in range(size)]
            learned = response_tokens(batch)
            for group in optimizer.param_groups:
                group["lr"] = rate * height(min(number, arm.like.steps - 1), arm.like.steps)

            def backward(rows: Any, batch: list[Example] = batch, learned: int = learned) -> None:
                (response_nll(model, [batch[i] for i in rows]) / learned).backward()

            take_step(model, optimizer, batch, backward, self.settings["micro_batch_size"], held)
            done += 2 * learned  # as many replayed
            if done >= tokens:
                break
        drawn = response_tokens(own[: (number + 1) * size]) * 2
        with staged(out) as new:
            save_model(model, None, tokenizer, new)
            told = {"drawn": drawn, "trained": done, "seconds": round(time.time() - begun, 1), "steps": number + 1}
            write_json(new / "trained.json", told)
        return out

    def measured(self, name: str, method: str, folder: Path, *, mean: float | None = None, **settings: Any) -> str:
        """Measure a checkpoint on both parts; returns its name."""
        bench = self.bench(preflight(self.folder / "pre", folder))
        for part, points in self.points.items():
            scores: Scores = bench.point(name, bench.whole, [1.0], part, name=name).scores
            points.append(Measured(name, method, scores, () if mean is None else (mean,), mean, settings))
        return name

    def write(self, path: Path) -> None:
        """All parts in one results file."""
        about = {"command": public(" ".join(sys.argv)), "commit": self.commit, "versions": versions()}
        about |= {
            "made": {k: v for k, v in self.made.items() if k != "specs"},
            "checked": CHECKED,
            "settings": dict(self.settings),
            "date": time.strftime("%Y-%m-%d"),
        }
        told: dict[str, Any] = {"run": self.run, "seed": self.seed, "reward": self.reward, "about": about}
        found = [results(points, part=part, **told) for part, points in self.points.items()]
        items = {part: items_of(points[0].scores) for part, points in self.points.items()}
        write_results(path, {**found[-1], "points": [p for f in found for p in f["points"]], "items": items})


def git(*words: str) -> str:
    """What git says of this folder."""
    return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
