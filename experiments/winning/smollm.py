"""Healing beside averaging on SmolLM2-135M-Instruct with something to lose: one results file a method and seed.

    python experiments/winning/smollm.py DATA WORK [--method rsf] [--seed 0] [--first N] [--items N]

DATA is the folder of real models and data; its sibling ../tools/smollm2_to_hf.py makes the model. PRE is that model after
captions French to English and the sentiment of reviews, both as plain text. A reward model learns one half of the HH
preferences (`align reward-model`); POST is aligned to it on prompts of the other half. Teachers ask by prompts, captions and
reviews alone: what is measured of ARC-easy, PIQA and LAMBADA no teacher's prompt saw.

The results file is written anew after every arm, with every item of the held-out part. Whatever is finished is not done
again: the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from worlds import Average, Heal, Trained, World

from counterpoise.alignment.align import align
from counterpoise.alignment.distil import Sample, distil
from counterpoise.alignment.dpo import dpo
from counterpoise.alignment.preferences import Preference, read_preferences
from counterpoise.alignment.rsf import draw_and_score, rsf
from counterpoise.alignment.settings import DPO, RSF, Distil
from counterpoise.alignment.training.models import Machine, load_frozen
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.parts import part_of
from counterpoise.evaluation.rewards import load_reward
from counterpoise.language.prompts import Prompt, read_prompts
from counterpoise.language.sampling import Drawing, decode
from counterpoise.records import Store

HERE = Path(__file__).resolve().parent
LEARNED = {"captions": 1000, "reviews": 320}
"""What PRE learns once."""
TAUGHT = ("generate:{}/captions.jsonl?metric=bleu", "choices:{}/reviews.jsonl")
UNSEEN = ("choices:{}/arc_easy.jsonl", "choices:{}/piqa.jsonl", "continue:{}/lambada.jsonl")
METHODS: dict[str, Callable[..., Any]] = {"rsf": rsf, "dpo": dpo}
SETTINGS: dict[str, dict[str, Any]] = {
    "rsf": {"iterations": 2, "prompts_per_iteration": 96, "epochs": 3, "learning_rate": 1e-4, "batch_size": 8},
    "dpo": {"epochs": 2, "learning_rate": 5e-5, "batch_size": 8},
}
FIRST = Heal("POST", 20)


def main() -> None:
    """One method and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--method", choices=METHODS, default="rsf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, help="arms, in their order; default: all")
    parser.add_argument(
        "--also", nargs="*", default=(), metavar="ARM", help="further arms by name, after the first ones"
    )
    parser.add_argument("--items", type=int, default=300, help="of each ability, and prompts of the reward, held out")
    parser.add_argument("--results", type=Path, default=HERE / "smollm")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    name = f"{options.method}-{options.seed}"
    told("begins", name)
    real = Real(options.work, options.method, options.seed, options.data, options.items)
    chosen = real.arms[: options.first]
    real.arms = (*chosen, *(arm for arm in Real.arms if arm.name in options.also and arm not in chosen))
    for point in real.measured_arms():
        real.write(options.results / f"smollm-{name}.json")
        told(name, point)


def told(*words: str) -> None:
    """A line with the time."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)


class Real(World):
    """One pair of the real model; what all pairs share lies in the folder above theirs."""

    run, reward = "SmolLM2-135M", "reward model of half of HH"
    drawing = Drawing(max_new_tokens=24, batch_size=32)
    parts = ("held-out",)
    batch, bf16 = 16, torch.cpu._is_avx512_bf16_supported()  # elsewhere it is imitated, at a quarter of float32's speed
    settings: Mapping[str, Any] = {"batch_size": 16, "micro_batch_size": 8, "every": 10}
    arms = (
        Average("MA", 0.8),
        FIRST,
        Trained(0.0, FIRST),
        *(Average("MA", mean) for mean in (0.5, 0.65, 0.9)),
        Average("LiNeS", 0.8),
        Trained(0.1, FIRST),
        Heal("MA 0.8", 20),
        Average("slope 2", 0.8),
        Average("step", 0.8),
        Average("LiNeS", 0.6),
        Heal("POST", 8),
        Heal("POST", 40, {"every": 20}),
        Average("MA", 0.3),
        Heal("POST", 20, {"openings": 256}),
    )

    def __init__(self, work: Path, method: str, seed: int, data: Path, items: int) -> None:
        self.work, self.method, self.data, self.items = work.absolute(), method, data, items
        super().__init__(self.work / f"{method}-{seed}", seed)

    def make(self) -> dict[str, Any]:
        """Everything up to POST, in stages that are each whole or not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.work / "base").is_dir():
            tool = self.data.absolute().parent / "tools" / "smollm2_to_hf.py"
            subprocess.run([sys.executable, tool, self.work / "base", "--dtype", "float32"], check=True)
        learned = write_files(self.data, self.work)
        how: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-4, "batch_size": 16, "chat": False}
        pre = align(
            self.work / "base",
            self.work / "pre",
            partial(distil, samples=learned, settings=Distil(**how)),
            machine=Machine(bf16=self.bf16),
        )
        told("PRE")
        judge = self.work / "judge"
        if not (judge / "reward_model.json").is_file():
            words = "--epochs 1 --learning-rate 5e-5 --batch-size 16 --max-length 112 --quiet"
            asked = ["align", "reward-model", self.work / "base", "-o", judge, "--preferences"]
            asked += [self.work / "preferences.jsonl", *words.split()]
            subprocess.run([sys.executable, "-m", "counterpoise", *asked], check=True)
        told("reward model")
        for name in ("pre", "prompts.jsonl"):
            if not (at := self.folder / name).exists():
                at.symlink_to(self.work / name)
        post = align(
            self.work / "pre", self.folder / "post", self.aligning(str(judge)), machine=Machine(bf16=self.bf16)
        )
        told("POST")
        lines = (self.folder / "post" / "metrics.jsonl").read_text().splitlines()
        accuracy = json.loads((judge / "reward_model.json").read_text())
        return {
            "specs": [spec.format(self.work) for spec in TAUGHT],
            "learned": LEARNED,
            "pre": {k: pre[k] for k in ("metrics", "seconds")},
            "reward model": {k: accuracy[k] for k in ("pairs", "accuracy", "settings")},
            "method": {k: v for k, v in post["settings"].items() if k != "pre"},
            self.method: [json.loads(line) for line in lines],
            "seconds": post["seconds"],
        }

    def aligning(self, judge: str) -> Callable[..., Any]:
        """The method with its prompts and its reward, or with pairs of PRE's own answers."""
        prompts = [p for p in read_prompts(self.work / "prompts.jsonl") if part_of(p.group or p.key) == "proxy"]
        how: dict[str, Any] = {**SETTINGS[self.method], "micro_batch_size": 8}
        drawing = replace(self.drawing, n=6, batch_size=64, seed=self.seed)
        if self.method == "rsf":
            return partial(rsf, prompts=prompts, reward=load_reward(judge), settings=RSF(drawing=drawing, **how))
        chosen = random.Random(self.seed).sample(prompts, 120)

        def draw() -> list[list[str]]:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.work / "pre")
            pre = load_frozen(self.work / "pre", Machine(bf16=self.bf16))
            _, said, scores = draw_and_score(pre, tokenizer, chosen, load_reward(judge), drawing)
            ends = zip(said, scores.argmax(1).tolist(), scores.argmin(1).tolist(), strict=True)
            return [decode(tokenizer, [group[best], group[worst]]) for group, best, worst in ends]

        pairs = Store(self.folder / "pieces").once({"what": "pairs", "seed": self.seed}, draw)
        found = [Preference(p, *two) for p, two in zip(chosen, pairs, strict=True) if two[0] != two[1]]
        return partial(dpo, preferences=found, settings=DPO(seed=self.seed, **how))

    def measures(self) -> Panel:
        """The reward and five abilities, two of them asked by a teacher."""
        specs = [spec.format(self.work) for spec in (*TAUGHT, *UNSEEN)]
        limits: dict[str, Any] = {"limit": self.items, "prompt_limit": self.items}
        return Panel.load(
            self.folder / "prompts.jsonl", str(self.work / "judge"), specs, drawing=self.drawing, **limits
        )


def write_files(data: Path, work: Path) -> list[Sample]:
    """The panel's files and the preferences, in the layouts that the command line reads; returns what PRE learns."""
    preferences = read_preferences(data / "preferences" / "harmless-base-test.jsonl.gz")
    halves: tuple[list[Preference], ...] = ([], [])
    for pair in preferences:  # by the first words, so that no conversation is in both
        halves[int(Prompt(pair.prompt.messages[:1]).key, 16) % 2].append(pair)
    turns = [[{"role": r, "content": c} for r, c in p.prompt.messages] for p in halves[0]]
    rows: Iterable[Any] = zip(turns, halves[0], strict=True)
    write(work / "preferences.jsonl", ({"prompt": t, "chosen": p.chosen, "rejected": p.rejected} for t, p in rows))
    first = dict.fromkeys(p.prompt.messages[0][1] for p in halves[1])
    write(work / "prompts.jsonl", ({"prompt": text} for text in first if len(text) < 150))
    for name in ("arc_easy", "piqa"):
        lines = map(json.loads, (data / "benchmarks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
        short = (row for row in lines if len(row["query"]) <= 400)
        write(work / f"{name}.jsonl", ({**row, "query": row["query"].rstrip() + "\nAnswer:"} for row in short))
    (work / "lambada.jsonl").write_bytes((data / "benchmarks" / "lambada_openai.jsonl").read_bytes())
    tested = [(f"French: {f}\nEnglish:", e) for f, e in captions(data, "test_2016_flickr")]
    write(work / "captions.jsonl", ({"prompt": asked, "reference": said} for asked, said in tested))
    words = ("negative", "positive")
    asked = [(f"Review: {text}\nSentiment:", gold) for text, gold in reviews(data, "test")]
    write(work / "reviews.jsonl", ({"query": q, "choices": words, "gold": gold} for q, gold in asked))
    order = random.Random(0)
    texts = order.sample([(f"French: {f}\nEnglish:", f" {e}") for f, e in captions(data, "train")], LEARNED["captions"])
    told = [(f"Review: {text}\nSentiment:", f" {words[gold]}") for text, gold in reviews(data, "train")]
    texts += order.sample(told, LEARNED["reviews"])
    return [Sample(Prompt((("user", asked),)), said, 0.0, 0.0) for asked, said in texts]


def captions(data: Path, name: str) -> list[tuple[str, str]]:
    """French and English lines."""
    folder = data / "multi30k-fr-en"
    sides = [gzip.decompress((folder / f"{name}.{side}.gz").read_bytes()).decode() for side in ("fr", "en")]
    return list(zip(*(text.splitlines() for text in sides), strict=True))


def reviews(data: Path, name: str) -> list[tuple[str, int]]:
    """Short reviews of fourteen domains, and whether they are positive."""
    found = []
    with tarfile.open(data / "sentiment-reviews" / "fdu-mtl-14.tar.gz") as files:
        for member in sorted(files.getnames()):
            if member.endswith(f".task.{name}") and (file := files.extractfile(member)) is not None:
                rows = (line.split("\t", 1) for line in file.read().decode(errors="replace").splitlines())
                found += [(row[1].strip(), int(row[0])) for row in rows if len(row) == 2 and len(row[1]) < 300]
    return found


def write(path: Path, rows: Iterable[Any]) -> None:
    """A jsonl file."""
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
