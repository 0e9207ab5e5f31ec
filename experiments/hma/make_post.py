"""Make the PRE and POST of the real run: SmolLM2-135M-Instruct before and after RSF towards positive sentiment.

    python experiments/hma/make_post.py DATA WORK

DATA is the folder of real models and data (its sibling ../tools/smollm2_to_hf.py makes PRE); WORK receives
pre/, post/, prompts.jsonl, the ability files, reward.csv and check.csv (two halves of the reviews: one rewards, the
other checks), and rsf.json.

RSF sees the proxy part of the prompts only; validation and held-out prompts stay unseen.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from counterpoise.alignment.rsf import rsf
from counterpoise.evaluation.parts import part_of
from counterpoise.evaluation.rewards import load_reward
from counterpoise.language import read_prompts


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
    """Parse, make PRE, run RSF."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
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
    prompts = [p for p in read_prompts(work / "prompts.jsonl") if part_of(p.key) == "proxy" and len(p.text) < 400]
    reward = load_reward(f"sentiment:{work / 'reward.csv'}")
    begun = time.time()

    def shown(done: int, total: int) -> None:
        print(f"{time.time() - begun:7.0f} s  sampled {done}/{total} prompts", flush=True)

    history = rsf(
        model,
        tokenizer,
        prompts,
        reward,
        iterations=options.iterations,
        prompts_per_iteration=options.prompts,
        n=options.n,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        progress=shown,
        after_iteration=lambda it: print(it.summary(), flush=True),
    )
    result = {
        "command": "python experiments/hma/make_post.py DATA WORK",
        "seconds": time.time() - begun,
        "prompts": len(prompts),
        "settings": {k: v for k, v in vars(options).items() if k not in ("data", "work")},
        "iterations": [it.summary() for it in history],
    }
    (work / "rsf.json").write_text(json.dumps(result, indent=1))
    model.save_pretrained(work / "post.partial")
    tokenizer.save_pretrained(work / "post.partial")
    (work / "post.partial").rename(work / "post")


if __name__ == "__main__":
    main()
