"""Healing beside every averaging, on demo worlds of twelve layers: one results file a world, every item in it.

    python experiments/winning/worlds.py WORK [--seeds 10] [--results FOLDER]

A world is invented, learned and aligned as in `counterpoise demo`, and lies in WORK/SEED with all that is made of it.
RESULTS/world-SEED.json is written anew after every arm: points of the validation and of the held-out part with the
statistics of every item, and what each arm cost. Whatever is finished is not done again: the same command goes on after a
kill. `python experiments/winning/tables.py` makes the page from the files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from counterpoise.alignment.heal import CHECKED, Healing, heal
from counterpoise.alignment.mitigations.anchors import KD
from counterpoise.alignment.mitigations.replay import Replay
from counterpoise.alignment.settings import Teaching
from counterpoise.alignment.teaching import answers, height, in_turn, usual_rate
from counterpoise.alignment.training.models import load, load_frozen
from counterpoise.alignment.training.run import save_model
from counterpoise.alignment.training.stepping import adam, start_all, take_step
from counterpoise.averaging.average import average
from counterpoise.averaging.line import beside
from counterpoise.averaging.partition import layerwise
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.files import staged
from counterpoise.checkpoints.preflight import preflight
from counterpoise.demo import cheer, make_pair
from counterpoise.evaluation.measurement import Scores
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.results import Measured, items_of, results, write_results
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example, response_nll, response_tokens
from counterpoise.records import Store, versions, write_json
from counterpoise.search.hma import linear_ramp

HERE = Path(__file__).resolve().parent
LAYERS = 12
DRAWN = Drawing(max_new_tokens=24, batch_size=64)
MEANS = (0.2, 0.4, 0.6, 0.8, 0.9)
RAMPS = (0.6, 0.8, 0.9)
BATCH = 32
SETTINGS: dict[str, Any] = {"batch_size": BATCH, "micro_batch_size": BATCH, "every": 5}


class Heal(NamedTuple):
    """A healing: from where, how long, with what else."""

    start: str
    steps: int
    also: Mapping[str, Any] = MappingProxyType({})

    @property
    def name(self) -> str:
        """What tables call it."""
        return " ".join([f"{self.start} healed {self.steps}", *(str(v) for v in self.also.values())])


HEALED = (
    *(Heal("POST", steps) for steps in (15, 5, 10, 20, 30)),
    Heal("LiNeS 0.8", 15),
    Heal("POST", 15, {"keep_by": "bandit"}),
    Heal("PRE", 60),
    Heal("POST", 30, {"keep_by": "bandit"}),
    Heal("POST", 15, {"divergence": "forward"}),
    Heal("POST", 15, {"divergence": "jensen-shannon"}),
    Heal("MA 0.8", 15),
)
TRAINED = {"POST trained on, replay": 0.0, "POST trained on, KD 0.1 and replay": 0.1}
"""At the compute of the first healing: supervised on POST's own answers, PRE's replayed; strength of KD."""


def main() -> None:
    """One world after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        world = World(options.work / str(seed), seed)
        world.measured("PRE", "PRE", world.folder / "pre")
        world.measured("POST", "POST", world.folder / "post")
        for point in world.arms():
            world.write(options.results / f"world-{seed}.json")
            print(f"{time.strftime('%H:%M:%S')} world {seed}: {point}", flush=True)


class World:
    """One world, its pair, its panel, and the points measured so far."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        if not (made := folder / "made.json").is_file():
            with staged(folder) as new:
                begun = time.time()
                specs, rounds, _ = make_pair(new, seed=seed, layers=LAYERS)
                told = {
                    "specs": [s.replace(str(new), str(folder)) for s in specs],
                    "rsf": [r.summary() for r in rounds],
                }
                write_json(new / "made.json", {**told, "seconds": round(time.time() - begun, 1)})
        self.made = json.loads(made.read_text())
        self.drawing = replace(DRAWN, seed=seed)
        self.panel = Panel.load(
            folder / "prompts.jsonl", cheer, self.made["specs"], drawing=replace(self.drawing, batch_size=64)
        )
        self.pair = preflight(folder / "pre", folder / "post")
        self.points: dict[str, list[Measured]] = {"validation": [], "held-out": []}
        self.commit = git("describe", "--always", "--dirty")

    def arms(self) -> Iterator[str]:
        """Every arm, measured."""
        for method, means in (("MA", MEANS), ("LiNeS", RAMPS)):
            for mean in means:
                yield self.measured(f"{method} {mean:g}", method, self.averaged(method, mean), mean=mean)
        first = None
        for arm in HEALED:
            out = self.healed(arm)
            told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            cost = {k: sum(line[k] for line in told) for k in ("drawn", "trained", "seconds")}
            first = first or cost
            line = beside(self.pair, preflight(self.folder / "pre", out))._asdict()
            yield self.measured(
                arm.name,
                f"healed {arm.start}",
                out,
                start=arm.start,
                steps=arm.steps,
                also=dict(arm.also),
                **cost,
                line=line,
                path=told,
            )
            if arm is HEALED[0]:
                for name, strength in TRAINED.items():
                    out = self.trained(name, strength, first["trained"])
                    yield self.measured(name, "trained on", out, **json.loads((out / "trained.json").read_text()))

    def averaged(self, method: str, mean: float) -> Path:
        """The folder of PRE, POST or an average."""
        if method in ("PRE", "POST"):
            return self.folder / method.lower()
        if not (out := self.folder / f"{method}-{mean:g}").is_dir():
            cut = layerwise(self.pair.shapes)
            recipe = Recipe(cut, tuple(linear_ramp(cut, mean))) if method == "LiNeS" else mean
            average(self.folder / "pre", self.folder / "post", out, recipe)
        return out

    def healed(self, arm: Heal) -> Path:
        """The folder of a healed checkpoint."""
        method, _, mean = arm.start.partition(" ")
        out = self.folder / arm.name.replace(" ", "-")
        heal(
            self.averaged(method, float(mean or 0)), out, self.folder / "post", self.folder / "pre",
            self.folder / "prompts.jsonl", abilities=self.made["specs"], drawing=self.drawing,
            teaching=Teaching(arm.steps, **SETTINGS, **arm.also),
        )  # fmt: skip
        return out

    def trained(self, name: str, strength: float, tokens: int) -> Path:
        """POST, supervised on its own answers with PRE's replayed beside them, until so many tokens are trained on."""
        if (out := self.folder / name.replace(" ", "-").replace(",", "")).is_dir():
            return out
        begun = time.time()
        model, tokenizer = load(self.folder / "post")
        wanted = Healing("", "", "", out, self.folder / "prompts.jsonl", self.made["specs"], drawing=self.drawing)
        asked, *kept = wanted.sources(AutoTokenizer.from_pretrained(self.folder / "post"), None)
        count = 15 * BATCH
        said = [in_turn(asked.taught, f"{self.seed} 0", i) for i in range(count)]
        own = answers(model, tokenizer, said, replace(self.drawing, seed=self.seed + 1))
        pre = load_frozen(self.folder / "pre")
        queries = [in_turn(k.taught, f"{self.seed} {k.name}", i) for i in range(count // len(kept)) for k in kept]
        old = answers(pre, tokenizer, queries, replace(self.drawing, seed=self.seed + 1))
        held = [Replay(1.0, old, seed=self.seed), *([KD(strength, pre)] if strength else [])]
        start_all(held, model, tokenizer)
        rate = usual_rate(sum(p.numel() for p in model.parameters()))
        optimizer, done = adam(model, rate), 0
        for number in range(count):
            batch = [own[(number * BATCH + i) % count] for i in range(BATCH)]
            size = response_tokens(batch)
            for group in optimizer.param_groups:
                group["lr"] = rate * height(min(number, 14), 15)

            def backward(rows: Any, batch: list[Example] = batch, size: int = size) -> None:
                (response_nll(model, [batch[i] for i in rows]) / size).backward()

            take_step(model, optimizer, batch, backward, BATCH, held)
            done += 2 * size  # as many replayed
            if done >= tokens:
                break
        drawn = response_tokens(own[: (number + 1) * BATCH]) * 2
        with staged(out) as new:
            save_model(model, None, tokenizer, new)
            told = {"drawn": drawn, "trained": done, "seconds": round(time.time() - begun, 1), "steps": number + 1}
            write_json(new / "trained.json", told)
        return out

    def measured(self, name: str, method: str, folder: Path, *, mean: float | None = None, **settings: Any) -> str:
        """Measure a checkpoint on both parts; returns its name."""
        bench = Workbench(preflight(self.folder / "pre", folder), self.panel, Store(self.folder / "pieces"))
        for part, points in self.points.items():
            scores: Scores = bench.point(name, bench.whole, [1.0], part, name=name).scores  # type: ignore[arg-type]
            points.append(Measured(name, method, scores, () if mean is None else (mean,), mean, settings))
        return name

    def write(self, path: Path) -> None:
        """Both parts in one results file."""
        about = {"command": " ".join(sys.argv), "commit": self.commit, "versions": versions(), "layers": LAYERS}
        about |= {"checked": CHECKED, "settings": SETTINGS, "rsf": self.made["rsf"], "date": time.strftime("%Y-%m-%d")}
        told = {"run": "demo world", "seed": self.seed, "reward": "cheer"}
        first, second = (results(points, part=part, about=about, **told) for part, points in self.points.items())  # type: ignore[arg-type]
        items = {part: items_of(points[0].scores) for part, points in self.points.items()}
        write_results(path, {**second, "points": [*first["points"], *second["points"]], "items": items})


def git(*words: str) -> str:
    """What git says of this folder."""
    return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
