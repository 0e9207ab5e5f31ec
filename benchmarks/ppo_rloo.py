"""Our PPO against TRL's RLOO as a yardstick: reward against responses drawn, on a task whose optimum is known.

    python benchmarks/ppo_rloo.py [--seeds 3] [--rounds 40]

A small Llama, untrained, is rewarded for the share of one word in its responses (1 is the optimum; a response of other
words has 0). Both methods get the same model, prompts, responses per round, passes over a round, optimiser steps,
learning rates, clip range and KL weight; PPO draws one response for each of 64 prompts, RLOO four for each of 16. Two learning
rates, since the best one need not be the same. Prints the curves and writes benchmarks/results/ppo_rloo.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from counterpoise.alignment.ppo import ppo
from counterpoise.alignment.settings import PPO
from counterpoise.alignment.training.trainers import Bar, quiet_libraries, train_quietly
from counterpoise.demo import NOUNS, make_model, make_tokenizer
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.records import versions

RESPONSES, BATCH, EPOCHS, LENGTH, KL = 64, 32, 2, 8, 0.02
RATES = (1e-3, 3e-3)
TARGET = "owl"


def share(responses: Sequence[str]) -> list[float]:
    """The share of the target in `LENGTH` words."""
    return [r.split().count(TARGET) / LENGTH for r in responses]


def prompts(seed: int) -> list[str]:
    """Pairs of words."""
    draw = random.Random(seed)
    return [f"tell : {draw.choice(NOUNS)} and {draw.choice(NOUNS)} ." for _ in range(64)]


def run_ppo(model: Any, tokenizer: Any, seed: int, rate: float, rounds: int) -> list[float]:
    """Mean reward of each round."""
    history = ppo(
        model,
        tokenizer,
        [Prompt((("user", text),)) for text in prompts(seed)],
        lambda asked, said: share(said),
        PPO(
            drawing=Drawing(max_new_tokens=LENGTH, seed=seed),
            iterations=rounds,
            prompts_per_iteration=RESPONSES,
            epochs=EPOCHS,
            learning_rate=rate,
            value_learning_rate=1e-2,
            batch_size=BATCH,
            micro_batch_size=BATCH,
            kl=KL,
        ),
    )
    return [r.reward for r in history]


def run_rloo(model: Any, tokenizer: Any, seed: int, rate: float, rounds: int, folder: str) -> list[float]:
    """Mean reward of each round."""
    model.save_pretrained(f"{folder}/start")  # TRL loads its reference by name
    tokenizer.save_pretrained(f"{folder}/start")
    curve: list[float] = []

    def reward(prompts: list[str], completions: list[str], **others: Any) -> list[float]:
        values = share(completions)
        curve.append(statistics.mean(values))
        return values

    # steps_per_generation optimiser steps make one pass over a round, num_iterations the passes
    config = RLOOConfig(
        output_dir=f"{folder}/out",
        learning_rate=rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH,
        steps_per_generation=RESPONSES // BATCH,
        num_iterations=EPOCHS,
        num_generations=4,
        max_completion_length=LENGTH,
        max_steps=rounds * EPOCHS * RESPONSES // BATCH,
        beta=KL,
        epsilon=0.2,
        max_grad_norm=1.0,
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    trainer = RLOOTrainer(
        model=f"{folder}/start",
        args=config,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts(seed)]),
        processing_class=tokenizer,
    )
    train_quietly(trainer, Bar(None), "rloo")
    return curve[:rounds]


def main() -> None:
    """Run both for each learning rate and seed, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    words = [*NOUNS, "tell", ":", "and", ".", *map(str, range(30))]
    rows = []
    for rate in RATES:
        for method in ("ppo", "rloo"):
            curves, begun = [], time.time()
            for seed in range(options.seeds):
                tokenizer = make_tokenizer(words)
                model = make_model(len(tokenizer), seed)
                with tempfile.TemporaryDirectory() as folder, quiet_libraries():
                    if method == "ppo":
                        curves.append(run_ppo(model, tokenizer, seed, rate, options.rounds))
                    else:
                        curves.append(run_rloo(model, tokenizer, seed, rate, options.rounds, folder))
            seconds = (time.time() - begun) / options.seeds
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            last = [statistics.mean(c[-5:]) for c in curves]
            row = {"method": method, "learning_rate": rate, "last_5": last, "curves": curves, "seconds": seconds}
            rows.append(row)
            told = " ".join(f"{v:.2f}" for v in means[:: max(1, options.rounds // 8)])
            print(f"{method:5} lr {rate:g}: {told} | last 5 rounds {statistics.mean(last):.3f}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    result = {
        "command": f"python benchmarks/ppo_rloo.py --seeds {options.seeds} --rounds {options.rounds}",
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, 1 thread",
        "versions": {**versions(), "trl": __import__("trl").__version__},
        "settings": {"responses": RESPONSES, "batch": BATCH, "epochs": EPOCHS, "length": LENGTH, "kl": KL},
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "ppo_rloo.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
