"""Which mixture of unequal tasks trains best: fine-tuning on four domains, and GRPO on four verifiable tasks.

    python experiments/mixtures/run.py sft DATA     # DATA: the folder with imdb-reviews, newsgroups, ...
    python experiments/mixtures/run.py grpo
    python experiments/mixtures/run.py table        # README.md's tables from results/

Small Llamas from scratch in TRL's trainers, through `with_mixture`: every mixture has the same rows, steps and start. A
run that is in results/ already is not done again, so a killed command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from domains import SIZES, domains, tokenizer_of
from puzzles import PUZZLES, characters, puzzles, reward
from scipy.stats import t as student
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from counterpoise.multitask import BanditMTL, with_mixture
from counterpoise.records import read_lines, versions

HERE = Path(__file__).parent
SFT: dict[str, Any] = {"steps": 600, "batch": 16, "tokens": 64, "lr": 2e-3, "words": 2000, "validation": 200}
GRPO: dict[str, Any] = {"steps": 160, "prompts": 8, "generations": 8, "lr": 1e-3, "warm_steps": 80, "held_out": 100}
COMMON: dict[str, Any] = {
    "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
    "save_strategy": "no", "logging_strategy": "no", "lr_scheduler_type": "cosine", "warmup_steps": 20,
}  # fmt: skip
RHO, ETA = "30%", 0.1
EXCESS = {"rho": "90%", "eta": 0.5}
"""Of the proxy run: DoReMi's own adversary is unconstrained (Group DRO)."""


def mixture(sizes: Mapping[str, float], **settings: Any) -> BanditMTL:
    """A bandit over the tasks that draws."""
    return BanditMTL(list(sizes), drawn_by="p", **settings)


def fixed(sizes: Mapping[str, float], power: float) -> BanditMTL:
    """Shares in proportion to size^power throughout."""
    return mixture(sizes, rho=0.0, prior=[n**power for n in sizes.values()])


SFT_MIXTURES: dict[str, Callable[[], BanditMTL]] = {
    "proportional": lambda: fixed(SIZES, 1.0),
    "sqrt": lambda: fixed(SIZES, 0.5),
    "uniform": lambda: fixed(SIZES, 0.0),
    "bandit, prior proportional": lambda: mixture(SIZES, rho=RHO, eta=ETA, prior=list(SIZES.values())),
    "bandit, prior uniform": lambda: mixture(SIZES, rho=RHO, eta=ETA),
}


class Curriculum(BanditMTL):
    """From the easy tasks to the hard ones: a bump of width 1 that moves along the tasks in their order."""

    def probabilities(self) -> torch.Tensor:
        """The shares after so many steps."""
        place = min(1.0, self.updates / GRPO["steps"]) * (len(self.tasks) - 1)
        raised = 0.05 + torch.exp(-((torch.arange(len(self.tasks), dtype=torch.float64) - place) ** 2))
        return raised / raised.sum()


COUNTS = {name: float(p.rows) for name, p in PUZZLES.items()}
GRPO_MIXTURES: dict[str, tuple[Callable[[], BanditMTL], dict[str, Any]]] = {
    "uniform": (lambda: fixed(COUNTS, 0.0), {"make_up": True}),
    "proportional": (lambda: fixed(COUNTS, 1.0), {"make_up": True}),
    "curriculum": (lambda: Curriculum(list(COUNTS), drawn_by="p", rho=0.0), {"make_up": True}),
    "bandit": (lambda: mixture(COUNTS, rho="50%", eta=0.5), {}),
    "bandit, mild": (lambda: mixture(COUNTS, rho="10%", eta=0.2), {}),
    "bandit, mild, improvement": (lambda: mixture(COUNTS, rho="10%", eta=0.2), {"improvement": 5.0}),
    "bandit, mild, oversample 2": (lambda: mixture(COUNTS, rho="10%", eta=0.2), {"oversample": 2}),
}


def model_of(words: int, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=128, **sizes, **heads))


def sft(train: Mapping[str, Dataset], held: Mapping[str, Dataset], words: PreTrainedTokenizerFast, drawn: BanditMTL,
        seed: int, reference: list[float] | None = None) -> dict[str, Any]:  # fmt: skip
    """Train, and give each domain's validation loss every sixth of the way, and the mean weights."""
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(
            out, per_device_train_batch_size=SFT["batch"], per_device_eval_batch_size=50, max_steps=SFT["steps"],
            learning_rate=SFT["lr"], max_length=SFT["tokens"], seed=seed, data_seed=seed, eval_strategy="steps",
            eval_steps=SFT["steps"] // 6, **COMMON,
        )  # fmt: skip
        trainer: Any = with_mixture(SFTTrainer)(
            model=model_of(len(words), 96, 3, seed), args=arguments, train_dataset=dict(train),
            eval_dataset=dict(held), processing_class=words, mixture=drawn, reference=reference,
        )  # fmt: skip
        trainer.train()
    curve = {t: [h[f"eval_{t}_loss"] for h in trainer.state.log_history if f"eval_{t}_loss" in h] for t in train}
    drawn_rows = trainer.schedule.drawn()
    return {"validation": curve, "shares": [n / sum(drawn_rows) for n in drawn_rows]}


def run_sft(data: Path, seeds: int) -> None:
    """Every mixture and seed that is missing; DoReMi's three runs need the proportional one's losses."""
    store, names = HERE / "results" / "sft.jsonl", [*SFT_MIXTURES, "excess (DoReMi's proxy)", "DoReMi-like"]
    for seed in range(seeds):
        train, held = domains(data, seed, SFT["validation"])
        words = tokenizer_of(train, SFT["words"])
        for name in names:
            lines = {(x["mixture"], x["seed"]): x for x in read_lines(store)}
            if (name, seed) in lines:
                continue
            start, reference = time.perf_counter(), None
            if name in SFT_MIXTURES:
                drawn = SFT_MIXTURES[name]()
            elif name == "DoReMi-like":
                drawn = mixture(SIZES, rho=0.0, prior=lines[names[-2], seed]["shares"])
            else:
                drawn = mixture(SIZES, **EXCESS)
                reference = [losses[-1] for losses in lines["proportional", seed]["validation"].values()]
            found = sft(train, held, words, drawn, seed, reference)
            write(store, {"mixture": name, "seed": seed, **found, "settings": SFT | {"sizes": SIZES}}, start)


def warm(words: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A model that has seen all puzzles a little, equally."""
    model = model_of(len(words), 64, 2, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    random = np.random.default_rng([seed, 7])
    for _ in range(GRPO["warm_steps"]):
        rows = [p.draw(random) for p in PUZZLES.values() for _ in range(8)]
        ids = [words(prompt + answer)["input_ids"] + [words.eos_token_id] for prompt, answer in rows]
        ids_BT = torch.tensor(ids)  # all are equally long
        asked = len(words(rows[0][0])["input_ids"])
        logits = model(ids_BT).logits[:, asked - 1 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids_BT[:, asked:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def score(model: Any, words: PreTrainedTokenizerFast, held: Mapping[str, list[dict[str, str]]]) -> dict[str, float]:
    """Each puzzle's mean reward of greedy answers."""
    model.eval()
    found = {}
    for name, rows in held.items():
        batch = words([r["prompt"] for r in rows], return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            ids = model.generate(**batch, max_new_tokens=6, do_sample=False)
        answers = words.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found[name] = statistics.fmean(reward(answers, [r["answer"] for r in rows]))
    return found


def grpo(rows: list[dict[str, str]], held: Mapping[str, list[dict[str, str]]], drawn: BanditMTL, seed: int,
         settings: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Train, and give each puzzle's held-out reward at the start and every fourth of the way, and the mean weights."""
    words = characters()
    model = warm(words, seed)
    curve = [score(model, words, held)]
    with tempfile.TemporaryDirectory() as out:
        arguments = GRPOConfig(
            out, per_device_train_batch_size=GRPO["prompts"] * GRPO["generations"], max_steps=GRPO["steps"],
            num_generations=GRPO["generations"], learning_rate=GRPO["lr"], max_completion_length=6, beta=0.0,
            seed=seed, data_seed=seed, **COMMON,
        )  # fmt: skip
        trainer: Any = with_mixture(GRPOTrainer)(
            model=model, reward_funcs=lambda completions, answer, **_: reward(completions, answer), args=arguments,
            train_dataset=Dataset.from_list(rows), processing_class=words, mixture=drawn, reward_bounds=(0.0, 1.0),
            callbacks=[Watch(lambda: curve.append(score(model, words, held)))], **settings,
        )  # fmt: skip
        trainer.train()
    seen = trainer.schedule.drawn()
    return {"reward": curve, "shares": [n / sum(seen) for n in seen]}


def run_grpo(seeds: int) -> None:
    """Every mixture and seed that is missing."""
    store = HERE / "results" / "grpo.jsonl"
    for seed in range(seeds):
        rows, held = puzzles(seed, GRPO["held_out"])
        for name, (drawn, settings) in GRPO_MIXTURES.items():
            if (name, seed) not in {(x["mixture"], x["seed"]) for x in read_lines(store)}:
                start = time.perf_counter()
                found = grpo(rows, held, drawn(), seed, settings)
                write(store, {"mixture": name, "seed": seed, **found, "settings": GRPO | {"rows": COUNTS}}, start)


class Watch(TrainerCallback):
    """Looks at the model four times on the way."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """`look` leaves the model in evaluation mode."""
        if state.global_step % (GRPO["steps"] // 4) == 0:
            self.look()
            given["model"].train()


def write(store: Path, line: dict[str, Any], start: float) -> None:
    """Append a run with where it came from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    )
    told = {"seconds": round(time.perf_counter() - start, 1), "commit": commit.stdout.strip(), "versions": versions()}
    store.parent.mkdir(exist_ok=True)
    with store.open("a") as lines:
        lines.write(json.dumps(line | told | {"command": shlex.join(["python", *sys.argv])}) + "\n")
    print(line["mixture"], line["seed"], told["seconds"], flush=True)


def interval(differences: list[float]) -> str:
    """The mean of paired differences with its 95 % interval (Student's t)."""
    mean, n = statistics.fmean(differences), len(differences)
    wide = student.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    text = f"{mean:+.3f} [{mean - wide:+.3f}, {mean + wide:+.3f}]"
    return f"**{text}**" if abs(mean) > wide else text


PAIRS = {"sft": [("bandit, prior uniform", other) for other in ("sqrt", "uniform", "DoReMi-like")]}
"""Further differences, paired by seed."""


def tables() -> str:
    """Worst and mean at the end, against proportional (sft) and uniform (grpo), paired by seed."""
    parts = []
    for what, key, base, worst in (("sft", "validation", "proportional", max), ("grpo", "reward", "uniform", min)):
        ends: dict[str, dict[int, list[float]]] = {}
        shares: dict[str, list[list[float]]] = {}
        for line in read_lines(HERE / "results" / f"{what}.jsonl"):
            last = line[key][-1] if what == "grpo" else {t: x[-1] for t, x in line[key].items()}
            ends.setdefault(line["mixture"], {})[line["seed"]] = list(last.values())
            shares.setdefault(line["mixture"], []).append(line["shares"])
            tasks = list(last)
        if base not in ends:
            continue
        rows = [
            f"| mixture | seeds | {' | '.join(tasks)} | worst - {base}'s | mean - {base}'s | rows drawn |",
            "|" + " --- |" * (len(tasks) + 5),
        ]
        for name, found in ends.items():
            both = [s for s in found if s in ends[base]]
            means = [f"{statistics.fmean(x[i] for x in found.values()):.3f}" for i in range(len(tasks))]
            gaps = [interval([f(found[s]) - f(ends[base][s]) for s in both]) for f in (worst, statistics.fmean)]
            drawn = ", ".join(f"{100 * statistics.fmean(x):.0f}" for x in zip(*shares[name], strict=True))
            own = [f"{statistics.fmean(map(f, found.values())):.3f}" for f in (worst, statistics.fmean)]
            shown = own if name == base else gaps
            rows.append(f"| {name} | {len(found)} | {' | '.join(means)} | {' | '.join(shown)} | {drawn} % |")
        for first, second in PAIRS.get(what, ()):
            both = [s for s in ends.get(first, {}) if s in ends.get(second, {})]
            gaps = [interval([f(ends[first][s]) - f(ends[second][s]) for s in both]) for f in (worst, statistics.fmean)]
            rows.append(f"| {first} - {second} | {len(both)} |{' |' * len(tasks)} {' | '.join(gaps)} | |")
        parts.append(f"<!-- {what} -->\n" + "\n".join(rows) + "\n<!-- end -->")
    return "\n\n".join(parts)


def main() -> None:
    """Parse, and run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sft", "grpo", "table"))
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "table":
        print(tables())
    elif options.what == "grpo":
        run_grpo(options.seeds)
    elif options.data is None:
        parser.error("sft: expected the folder with the data")
    else:
        run_sft(options.data, options.seeds)


if __name__ == "__main__":
    main()
