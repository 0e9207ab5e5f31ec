"""Make PRE and POST: SmolLM2-135M-Instruct before and after RSF, DPO or PPO towards positive sentiment.

    python experiments/hma/make_post.py DATA WORK [--method rsf]

DATA is the folder of real models and data (its sibling ../tools/smollm2_to_hf.py makes PRE); WORK receives
pre/, post/, prompts.jsonl, the ability files, reward.csv and check.csv (two halves of the reviews: one rewards, the
other checks), and what was done as METHOD.json.

All three methods see the same reward and the proxy part of the prompts only; validation and held-out prompts stay unseen.
RSF keeps the best of n responses and starts over from the model it made; DPO takes the best and the worst of n responses
of PRE as its pairs; PPO draws one response a prompt, round after round. Learning rates are ten times the paper's, or more:
the runs are that much shorter.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from counterpoise.alignment.dpo import dpo
from counterpoise.alignment.ppo import ppo
from counterpoise.alignment.preferences import Preference
from counterpoise.alignment.rsf import draw_and_score, rsf
from counterpoise.alignment.settings import DPO, PPO, RSF
from counterpoise.alignment.training.precision import compute_in_bfloat16
from counterpoise.alignment.training.rounds import next_prompts
from counterpoise.evaluation.parts import part_of
from counterpoise.evaluation.rewards import load_reward
from counterpoise.language.prompts import Prompt, read_prompts
from counterpoise.language.sampling import Drawing, decode


def write_inputs(data: Path, work: Path) -> None:
    """Prompts, the two halves of the reviews and the ability files, in the layouts that the command line reads."""
    prompts = json.loads((data / "instructions" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    with (work / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for row in prompts:
            print(json.dumps({"prompt": "\n".join(filter(None, (row["instruction"], row["input"])))}), file=file)
    with gzip.open(data / "imdb-reviews" / "imdb.csv.gz", "rt", encoding="utf-8", newline="") as file:
        reviews = list(csv.DictReader(file))
    for half, name in enumerate(("reward.csv", "check.csv")):
        with (work / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows({"text": r["text"], "label": r["label"]} for r in reviews[half::2])
    for name in ("arc_easy", "piqa", "boolq"):
        rows = map(json.loads, (data / "benchmarks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
        with (work / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                if len(row["query"]) <= 700:  # long passages cost more than they tell
                    print(json.dumps({**row, "query": row["query"].rstrip() + "\nAnswer:"}), file=file)
    (work / "lambada_openai.jsonl").write_bytes((data / "benchmarks" / "lambada_openai.jsonl").read_bytes())
    french, english = (
        gzip.decompress((data / "multi30k-fr-en" / f"test_2016_flickr.{lang}.gz").read_bytes()).decode().splitlines()
        for lang in ("fr", "en")
    )
    with (work / "multi30k.jsonl").open("w", encoding="utf-8") as file:
        for source, target in zip(french, english, strict=True):
            record = {"prompt": f"French: {source}\nEnglish:", "reference": target}
            print(json.dumps(record, ensure_ascii=False), file=file)


def main() -> None:
    """Parse, make PRE, align."""
    options = parse()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "pre").exists():
        tool = options.data.resolve().parent / "tools" / "smollm2_to_hf.py"
        subprocess.run([sys.executable, tool, work / "pre", "--dtype", "float32"], check=True)
    write_inputs(options.data, work)
    if (work / "post").exists():
        print(f"{work / 'post'} is there already: nothing to do")
        return

    tokenizer = AutoTokenizer.from_pretrained(work / "pre")
    model = AutoModelForCausalLM.from_pretrained(work / "pre", dtype=torch.float32)
    prompts = [
        p for p in read_prompts(work / "prompts.jsonl") if part_of(p.group or p.key) == "proxy" and len(p.text) < 400
    ]
    if options.bf16:
        compute_in_bfloat16(model)
    begun = time.time()
    iterations = METHODS[options.method](
        model, tokenizer, prompts, load_reward(f"sentiment:{work / 'reward.csv'}"), options
    )
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "work")}
    result = {
        "command": shlex.join(["python", "experiments/hma/make_post.py", "DATA", "WORK", *sys.argv[3:]]),
        "seconds": time.time() - begun,
        "prompts": len(prompts),
        "settings": settings,
        "iterations": iterations,
    }
    (work / f"{options.method}.json").write_text(json.dumps(result, indent=1))
    model.save_pretrained(work / "post.partial")
    tokenizer.save_pretrained(work / "post.partial")
    (work / "post.partial").rename(work / "post")


def parse() -> argparse.Namespace:
    """The command line; what is not given takes the method's own value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--method", choices=DEFAULTS, default="rsf")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--prompts", type=int, help="of an iteration; of all pairs for dpo")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.method].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def align_rsf(
    model: Any, tokenizer: Any, prompts: list[Prompt], reward: Any, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Best of n, fine-tune, again."""
    history = rsf(
        model,
        tokenizer,
        prompts,
        reward,
        RSF(
            drawing=Drawing(n=options.n, max_new_tokens=options.max_new_tokens, seed=options.seed),
            iterations=options.iterations,
            prompts_per_iteration=options.prompts,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
        ),
        progress=progress("sampled"),
        after_iteration=lambda it: print(it.summary(), flush=True),
    )
    return [it.summary() for it in history]


def align_dpo(
    model: Any, tokenizer: Any, prompts: list[Prompt], reward: Any, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Pairs of PRE's own responses: the best and the worst of n."""
    chosen = next_prompts([], random.Random(options.seed), prompts, options.prompts)
    _, drawn, scores = draw_and_score(
        model,
        tokenizer,
        chosen,
        reward,
        Drawing(
            n=options.n,
            max_new_tokens=options.max_new_tokens,
            temperature=1.0,
            chat=True,
            batch_size=64,
            seed=options.seed * 1000,
        ),
        progress=progress("sampled"),
    )
    ends = zip(scores.argmax(1).tolist(), scores.argmin(1).tolist(), strict=True)
    said = [decode(tokenizer, [group[best], group[worst]]) for group, (best, worst) in zip(drawn, ends, strict=True)]
    pairs = [Preference(p, *two) for p, two in zip(chosen, said, strict=True) if two[0] != two[1]]
    log = dpo(
        model,
        tokenizer,
        pairs,
        DPO(
            epochs=options.epochs, learning_rate=options.learning_rate, batch_size=options.batch_size, seed=options.seed
        ),
    )
    return [
        {"pairs": len(pairs), "reward": float(scores.mean()), "best_reward": float(scores.max(1).values.mean())},
        *log,
    ]


def align_ppo(
    model: Any, tokenizer: Any, prompts: list[Prompt], reward: Any, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One response a prompt, round after round."""
    history = ppo(
        model,
        tokenizer,
        prompts,
        reward,
        PPO(
            drawing=Drawing(max_new_tokens=options.max_new_tokens, seed=options.seed),
            iterations=options.iterations,
            prompts_per_iteration=options.prompts,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            kl=0.05,
        ),
    )
    return [asdict(r) for r in history]


METHODS = {"rsf": align_rsf, "dpo": align_dpo, "ppo": align_ppo}
DEFAULTS: dict[str, dict[str, Any]] = {
    "rsf": {"iterations": 2, "prompts": 160, "epochs": 3, "batch_size": 8, "learning_rate": 1e-4},
    "dpo": {"iterations": 1, "prompts": 160, "epochs": 2, "batch_size": 8, "learning_rate": 5e-5},
    "ppo": {"iterations": 16, "prompts": 48, "epochs": 2, "batch_size": 16, "learning_rate": 4e-5},
}


def progress(what: str) -> Any:
    """Prints a line a batch."""
    begun = time.time()

    def shown(done: int, total: int) -> None:
        print(f"{time.time() - begun:7.0f} s  {what} {done}/{total} prompts", flush=True)

    return shown


if __name__ == "__main__":
    main()
