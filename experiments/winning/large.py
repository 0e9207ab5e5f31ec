"""Healing beside averaging on worlds that models of 60 M parameters have learned, on one GPU, in ten minutes.

    python experiments/winning/large.py WORK [--worlds 20] [--minutes 9] [--together 8]
    python experiments/winning/large.py WORK --size tiny --device cpu --worlds 1 --results RESULTS  # the rehearsal

Each world of `counterpoise demo` is aligned by RSF and by PPO, and measured as `worlds.py` does it, with fewer arms. So many
pairs run at once, each in a process of its own: small models leave a GPU waiting for Python. After so many minutes no arm
begins; RESULTS/METHOD-SEED.json is written anew after every arm, and the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM
from worlds import LAYERS, Average, Heal, Searched, Trained, World

from counterpoise import demo
from counterpoise.alignment.ppo import ppo
from counterpoise.alignment.rsf import rsf
from counterpoise.alignment.settings import PPO, RSF
from counterpoise.alignment.teaching import usual_rate
from counterpoise.alignment.training.run import save_model
from counterpoise.checkpoints.files import staged
from counterpoise.evaluation.parts import in_part
from counterpoise.language.prompts import read_prompts
from counterpoise.records import write_json

HERE = Path(__file__).resolve().parent
HIDDEN = {"tiny": 96, "60m": 640}
"""0.7 M parameters with six layers; 59 M with twelve."""
METHODS = ("rsf", "ppo")
RATE = 2e-3
"""At which the demo's model learns its world; larger ones learn at less, by the root of their size. RSF takes half of it."""
FIRST = Heal("POST", 15)
ARMS: tuple[Average | Heal | Searched | Trained, ...] = (
    Average("MA", 0.8),
    FIRST,
    Trained(0.0, FIRST),
    Average("LiNeS", 0.8),
    *(Average("MA", mean) for mean in (0.9, 0.6, 0.4, 0.2)),
    Heal("LiNeS 0.8", 15),
    Heal("POST", 30),
)


def main() -> None:
    """The pairs, side by side, for as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--size", choices=HIDDEN, default="60m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--together", type=int, default=8)
    parser.add_argument("--results", type=Path, default=HERE / "large")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    options.until = time.time() + 60 * options.minutes
    pairs = [(method, seed) for seed in range(options.worlds) for method in METHODS]
    with ProcessPoolExecutor(options.together, get_context("spawn")) as pool:
        for told in pool.map(partial(one, options), pairs):
            print(told, flush=True)


def one(options: argparse.Namespace, pair: tuple[str, int]) -> str:
    """A pair's arms, until there is no time left; what was done."""
    method, seed = pair
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    name, done = f"{method}-{seed}", list[str]()
    if time.time() > options.until:
        return f"{name}: no time"
    world = Large(options.work.absolute(), method, seed, options.size, options.device)
    for point in world.measured_arms():
        world.write(options.results / f"{name}.json")
        done.append(point)
        if time.time() > options.until:
            break
    return f"{time.strftime('%H:%M:%S')} {name}: {', '.join(done)}"


class Large(World):
    """A world and its pair, of a larger model."""

    arms, parts = ARMS, ("held-out",)

    def __init__(self, work: Path, method: str, seed: int, size: str, device: str) -> None:
        self.method, self.hidden, self.device = method, HIDDEN[size], device
        self.run = f"demo world, {size}, {method}"
        super().__init__(work / f"{method}-{seed}", seed)

    def make(self) -> dict[str, Any]:
        """The world's files, PRE and POST, made once."""
        if not (made := self.folder / "made.json").is_file():
            with staged(self.folder) as new:
                begun, world = time.time(), demo.World.invent(self.seed)
                words = demo.make_tokenizer(world.vocabulary())
                specs = [s.replace(str(new), str(self.folder)) for s in demo.write_world(world, new, self.seed)]
                model = self.untaught(len(words)).to(self.device)
                size = model.num_parameters()
                rate = RATE * usual_rate(size) / usual_rate(1)
                demo.study(model, words, world, seed=self.seed, epochs=demo.EPOCHS, rate=rate)
                save_model(model, None, words, new / "pre")
                rounds = self.align(model, words, rate / 2, new)
                save_model(model, None, words, new / "post")
                told = {"parameters": size, "rate": rate, self.method: rounds, "specs": specs}
                write_json(new / made.name, {**told, "seconds": round(time.time() - begun, 1)})
        return {"layers": LAYERS, "hidden": self.hidden, "method": self.method, **json.loads(made.read_text())}

    def untaught(self, words: int) -> LlamaForCausalLM:
        """The demo's Llama with wider layers, of random weights."""
        config = demo.make_model(words, self.seed, layers=LAYERS).config
        narrow: int = config.hidden_size
        config.intermediate_size = config.intermediate_size * self.hidden // narrow
        config.initializer_range *= (narrow / self.hidden) ** 0.5
        config.hidden_size, config.head_dim = self.hidden, self.hidden // config.num_attention_heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return LlamaForCausalLM(config)

    def align(self, model: LlamaForCausalLM, words: Any, rate: float, folder: Path) -> list[dict[str, Any]]:
        """The model after the method, which it learns in place; a summary a round."""
        asked = in_part(read_prompts(folder / "prompts.jsonl"), "proxy")
        drawing = replace(self.drawing, batch_size=128)
        how: dict[str, Any] = {"prompts_per_iteration": 128, "epochs": 4, "learning_rate": rate}
        how |= {"batch_size": 16, "micro_batch_size": 16}
        if self.method == "rsf":
            rounds = rsf(model, words, asked, demo.cheer, RSF(drawing=replace(drawing, n=8), iterations=2, **how))
            return [r.summary() for r in rounds]
        how["learning_rate"] = rate / 5
        settings = PPO(drawing=drawing, iterations=8, value_learning_rate=1e-2, **how)
        return [asdict(r) for r in ppo(model, words, asked, demo.cheer, settings)]


if __name__ == "__main__":
    main()
