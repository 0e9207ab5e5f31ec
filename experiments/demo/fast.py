"""What --fast saves: restore, search and tax on a pair, whole and with --fast, in turn.

    python experiments/demo/fast.py DEMO [--rounds 3]
    COUNTERPOISE_DATA=DIR python experiments/demo/fast.py STORIES --stories [--rounds 1]

DEMO is a folder that `counterpoise demo` wrote. STORIES is made where it is absent: stories15m (15 M parameters), aligned by
RSF to the cheer of film reviews, where work dominates what a start costs. Writes experiments/demo/results/fast.json:
processor seconds (of the process and its children, which a busy machine changes little) and wall seconds of every run, the
picks, and the ratios of the medians, once more without what a dry run takes, which starts, imports and reads as much and
measures nothing; and the ratio of the operations that the dry runs of restore plan, in their seconds. Rounds that stand in
the file are not run again. --without leaves a command out.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from counterpoise.records import versions, write_json

RESULTS = Path(__file__).parent / "results" / "fast.json"
COMMON = ["--prompts", "prompts.jsonl", "--batch-size", "64", "--device", "cpu", "--json", "-q"]
REWARDS = {
    "demo": ["--reward", "counterpoise.demo:cheer", "--max-new-tokens", "24"],
    "stories": ["--reward", "sentiment:reviews.csv", "--max-new-tokens", "48"],
}
ABILITIES = {
    "demo": ("choices:capitals.jsonl", "choices:sums.jsonl", "generate:translation.jsonl", "continue:tales.jsonl"),
    "stories": ("continue:lambada.jsonl", "choices:piqa.jsonl"),
}
COMMANDS = ("dry run", "tax", "search", "restore")
NAMES = "Tom Lily Ben Anna Max Sue Tim Mia Sam Zoe Jack Amy".split()
DEEDS = "lost a toy,found a shell,saw a dog,went home,heard a noise,made a cake,fell down,had a dream".split(",")
TIMES = ("One day", "In the morning", "Last winter")


def main() -> None:
    """Rounds of seven runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stories", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without", default="")
    typed = parser.parse_args()
    pair, folder = "stories" if typed.stories else "demo", typed.folder.absolute()
    if typed.stories and not (folder / "post").is_dir():
        make_stories(folder, Path(os.environ["COUNTERPOISE_DATA"]))
    done: list[dict[str, Any]] = json.loads(RESULTS.read_text())["runs"] if RESULTS.is_file() else []
    for number, command, fast in product(range(typed.rounds), COMMANDS, (True, False)):
        named = {"pair": pair, "round": number, "command": command, "fast": fast}
        if command != typed.without and not any(named.items() <= r.items() for r in done):
            done.append({**named, **run(folder, pair, command, fast)})
            write(done)
            print(done[-1], flush=True)


def run(folder: Path, pair: str, command: str, fast: bool) -> dict[str, Any]:
    """One run in a process of its own, into a new folder."""
    with tempfile.TemporaryDirectory() as place:
        name = "restore" if command == "dry run" else command
        words = [sys.executable, "-m", "counterpoise", name, "pre", "post", *COMMON, *REWARDS[pair]]
        words += [] if name == "search" else [w for a in ABILITIES[pair] for w in ("--abilities", a)]
        words += ["--fast"] if fast else []
        words += ["--mean", "0.6"] if name == "search" else []
        words += ["--proxy-size", "64"] if name != "tax" and pair == "stories" else []  # half an hour less
        words += ["-o", f"{place}/out"] if name != "tax" else []
        words += ["--dry-run", "--speed", "1e10,1e10"] if command == "dry run" else []
        before, begun = os.times(), time.monotonic()
        found = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        wall, after = time.monotonic() - begun, os.times()
        assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    used = after.children_user + after.children_system - before.children_user - before.children_system
    kept = {
        "processor": round(used, 1),
        "wall": round(wall, 1),
        "pick": told.get("pick"),
        "verdict": told.get("verdict"),
    }
    kept |= {"planned": told["seconds"]} if command == "dry run" else {}
    return kept | ({"ratios": [block["ratio"] for block in told["blocks"]]} if name == "search" else {})


def write(runs: Sequence[dict[str, Any]]) -> None:
    """The runs, and fast over whole of each command of each pair."""

    def median(pair: str, command: str, fast: bool, of: str) -> float:
        asked = (pair, command, fast)
        return statistics.median(
            [r[of] for r in runs if (r["pair"], r["command"], r["fast"]) == asked] or [float("nan")]
        )

    ratios: dict[str, Any] = {}
    for pair, command in sorted({(r["pair"], r["command"]) for r in runs if r["fast"]}):
        if command == "dry run":
            fast, whole = (median(pair, command, f, "planned") for f in (True, False))
            ratios.setdefault(pair, {})["restore, operations as planned"] = round(fast / whole, 3)
            continue
        told = {of: [median(pair, command, fast, of) for fast in (True, False)] for of in ("processor", "wall")}
        start = median(pair, "dry run", False, "processor")
        told["processor, without start and loading"] = [seconds - start for seconds in told["processor"]]
        ratios.setdefault(pair, {})[command] = {of: round(fast / whole, 3) for of, (fast, whole) in told.items()}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=True
    )
    about = {
        "command": "python experiments/demo/fast.py FOLDER [--stories]",
        "commit": commit.stdout.strip(),
        "seed": 0,
    }
    write_json(RESULTS, {**about, "versions": versions(), "ratios": ratios, "runs": runs})


def make_stories(folder: Path, data: Path) -> None:
    """PRE, POST and the files of the panel."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from counterpoise.alignment.rsf import rsf
    from counterpoise.alignment.settings import RSF
    from counterpoise.evaluation.parts import part_of
    from counterpoise.evaluation.rewards import load_reward
    from counterpoise.language.prompts import read_prompts
    from counterpoise.language.sampling import Drawing

    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(data / "imdb-reviews" / "imdb.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[::8]
    with (folder / "reviews.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, ["text", "label"])
        writer.writeheader()
        writer.writerows({"text": r["text"], "label": r["label"]} for r in rows)
    openings = [f"{when}, {name} {deed}." for when, name, deed in product(TIMES, NAMES, DEEDS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in openings))
    for name, source in (("lambada", "lambada_openai"), ("piqa", "piqa")):
        lines = (data / "benchmarks" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if len(line) < 600][:600]  # 256 tokens go into the model
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(data / "stories15m")
    model = AutoModelForCausalLM.from_pretrained(data / "stories15m", dtype=torch.float32)
    for side in ("pre", "post"):
        if side == "post":
            prompts = [p for p in read_prompts(folder / "prompts.jsonl") if part_of(p.key) == "proxy"]
            how = RSF(
                drawing=Drawing(n=8, max_new_tokens=48), iterations=1, epochs=4, learning_rate=5e-4, batch_size=16
            )
            rsf(model, tokenizer, prompts, load_reward(f"sentiment:{folder / 'reviews.csv'}"), how)
        model.save_pretrained(folder / side)
        tokenizer.save_pretrained(folder / side)


if __name__ == "__main__":
    main()
