"""Every mitigation of the alignment tax at its grid, in the paper's distillation style, on one front with MA.

    python experiments/hma/mitigations.py WORK [--only "l2,kd 0.1"]

WORK as make_post.py left it. The best of 8 responses of POST are collected once; PRE is then fine-tuned on them as it is
("distilled", the POST of this front) and with each mitigation (Lin et al. 2024, section 3), all with `counterpoise align`.
Beside them stands what can be done afterwards with PRE and "distilled" alone: MA, ExPO, HMA, LiNeS, part-wise MA,
AdaMerging, TIES and DARE. Every model is measured on the held-out part with the same prompts, items and random numbers.
Finished models and scores are kept in WORK/mitigations.work, so a killed run goes on; after every model
results/mitigations-rsf-SEED.json is written anew, with what was not run. `counterpoise front` draws the files.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from averages import AFTER, averages

from counterpoise.alignment.training.models import Machine, load
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.checkpoints.preflight import preflight, scan
from counterpoise.evaluation.measurement import Scores
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.parts import part_of
from counterpoise.evaluation.results import Measured, results, write_results
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.prompts import read_prompts
from counterpoise.language.sampling import Drawing
from counterpoise.records import Store, versions

HERE = Path(__file__).resolve().parent
PLAIN = "distilled"


class Plan(NamedTuple):
    """One model to train: its name, what it shares a colour with, and what `counterpoise align` is given for it."""

    name: str
    method: str
    options: str


GRID = (
    Plan("L1 0.04", "L1", "--l1 0.04"),
    Plan("L1 1", "L1", "--l1 1"),
    Plan("L2 0.01", "L2", "--l2 0.01"),
    Plan("L2 0.1", "L2", "--l2 0.1"),
    Plan("KD 0.1", "KD", "--kd 0.1"),
    Plan("KD 1", "KD", "--kd 1"),
    Plan("LoRA 16", "LoRA", "--lora 16"),
    Plan("LoRA 64", "LoRA", "--lora 64"),
    Plan("replay 0.25", "replay", "--replay self --replay-ratio 0.25"),
    Plan("replay 1", "replay", "--replay self --replay-ratio 1"),
    Plan("SMA 0.97", "SMA", "--sma 0.97"),
    Plan("SMA 0.99", "SMA", "--sma 0.99"),
    Plan("freeze 10", "freezing", "--freeze 10"),
    Plan("freeze 20", "freezing", "--freeze 20"),
    Plan("online merging 0.01", "online merging", "--merge 0.01 --merge-keep 0.5"),
)
MERGES = (
    Plan("TIES 0.2", "TIES", "--density 0.2"),
    Plan("TIES 0.6", "TIES", "--density 0.6"),
    Plan("DARE 0.2", "DARE", "--density 0.2 --ratio 0.6"),
)


def main() -> None:
    """Collect, train what is missing, measure, write."""
    options = parse()
    os.chdir(options.work)
    trained = json.loads(Path("rsf.json").read_text(encoding="utf-8"))["settings"]
    seed = int(trained["seed"])
    begun = time.time()
    work = Path("mitigations.work")
    work.mkdir(exist_ok=True)
    used = write_prompts(options.prompts or trained["prompts"])
    longest, drawing = ["--max-new-tokens", trained["max_new_tokens"]], ["--seed", seed, "--quiet"]
    samples = work / "samples.jsonl"
    if not samples.exists():
        call("align", "collect", "post", "-o", samples, "--prompts", used, "--reward", options.reward, *longest, *drawing,
             "--n", trained["n"], "--work", work / "collect")  # fmt: skip
    chosen = [p for p in GRID if not options.only or {p.method.split()[0].lower(), p.name.lower()} & set(options.only)]
    judge = Judge(options, work)
    points = [Measured("PRE", "PRE", judge.measure("pre"))]
    epochs = int(options.epochs or trained["epochs"])
    training = ["--samples", samples, "--epochs", epochs, "--batch-size", trained["batch_size"]]
    training += ["--learning-rate", trained["learning_rate"], *drawing, *(["--bf16"] if options.bf16 else [])]
    plain = judge.aligned(Plan(PLAIN, "POST", ""), training, keep=True)
    points.append(Measured("POST", "POST", plain, settings={"what": "PRE fine-tuned on POST's best responses"}))
    points.append(Measured("RSF, online", "RSF, online", judge.measure("post")))
    for epoch in range(1, epochs):
        stopped = judge.measure(str(work / f"{PLAIN}.work" / f"iteration-{epoch:04d}"))
        points.append(Measured(f"early stopping {epoch}", "early stopping", stopped))
    points += judge.averages(work / PLAIN, options)
    merged = [m for m in MERGES if not options.after or m.method.lower() in options.after]
    for number, plan in enumerate([*merged, *chosen]):
        responding = [*training, *longest] if "--replay self" in plan.options else training  # PRE responds once
        scores = judge.merged(plan, work / PLAIN) if plan in merged else judge.aligned(plan, responding)
        points.append(Measured(plan.name, plan.method, scores, settings={"options": plan.options}))
        about = {
            "command": shlex.join(["python", "experiments/hma/mitigations.py", "WORK", *sys.argv[2:]]),
            "commit": commit(),
            "versions": versions(),
            "dtype": f"trained in float32{', computed in bfloat16' * options.bf16}, measured in bfloat16",
            "rsf": trained,
            "seconds": round(time.time() - begun),
            "not_run": [p.name for p in (*MERGES, *GRID) if p not in [*merged, *chosen][: number + 1]],
        }
        found = results(points, run="rsf-mitigations", seed=seed, reward=options.reward, about=about)
        folder = options.results or HERE / "results"
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / f"mitigations-rsf-{seed}.json", found)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--only", type=lambda text: text.lower().split(","), help="methods or points: l1,kd,lora 16,..."
    )
    parser.add_argument("--after", type=lambda text: text.lower().split(","), help="likewise: ma,hma,lines,ties,...")
    parser.add_argument("--proxy-size", type=int, default=64, help="of HMA and AdaMerging")
    parser.add_argument(
        "--prompts", type=int, help="so many responses are collected (default: as many as an RSF round's)"
    )
    parser.add_argument("--epochs", type=int, help="on them (default: those of the RSF run)")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    parser.add_argument("--reward", default="sentiment:reward.csv")
    parser.add_argument("--means", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8])
    parser.add_argument(
        "--abilities",
        nargs="+",
        default=[
            "choices:arc_easy.jsonl?limit=150",
            "choices:piqa.jsonl?limit=150",
            "continue:lambada_openai.jsonl?limit=150",
            "generate:multi30k.jsonl?metric=bleu&limit=40",
        ],
    )
    parser.add_argument("--prompt-limit", type=int, default=240)
    parser.add_argument("--replies", type=int, default=1, help="responses a prompt that its reward is averaged over")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--results", type=lambda text: Path(text).resolve(), help="folder of the results file")
    return parser.parse_args()


class Judge:
    """Trains and measures, each model once."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.work, self.store = work, Store(work / "scores")
        self.panel = Panel.load(
            "prompts.jsonl",
            options.reward,
            options.abilities,
            drawing=Drawing(n=options.replies, max_new_tokens=options.max_new_tokens, batch_size=16),
            prompt_limit=options.prompt_limit,
        )

    def aligned(self, plan: Plan, training: list[Any], *, keep: bool = False) -> Scores:
        """The scores of PRE fine-tuned with a mitigation; the model is removed once it is measured."""
        name = plan.name.replace(" ", "-")
        record = self.work / f"{name}.json"
        folder = self.work / name
        if record.exists() and not keep:
            sha256 = json.loads(record.read_text(encoding="utf-8"))
        else:
            begun = time.time()
            call("align", "pre", "-o", folder, "--method", "rsf", *training, *plan.options.split(),
                 *([] if keep else ["--last-checkpoint-only"]))  # fmt: skip
            sha256 = open_checkpoint(folder).sha256
            print(f"{plan.name}: trained in {time.time() - begun:.0f} s", flush=True)
        scores = self.measure(str(folder), sha256)
        record.write_text(json.dumps(sha256), encoding="utf-8")
        if not keep:
            for left in (folder, folder.with_name(f"{name}.work")):
                shutil.rmtree(left, ignore_errors=True)
        return scores

    def measure(self, folder: str, sha256: Any = None) -> Scores:
        """The scores of one checkpoint on the held-out part, in bfloat16."""
        model_id = {"sha256": sha256 or open_checkpoint(folder).sha256, "dtype": "bfloat16"}
        model = tokenizer = None
        if Path(folder).exists():
            model, tokenizer = load(Path(folder), Machine(torch.bfloat16))
        begun = time.time()
        scores = self.panel.measure(model, tokenizer, "held-out", store=self.store, model_id=model_id)
        print(f"{folder}: reward {scores.reward.value:.4f}, measured in {time.time() - begun:.0f} s", flush=True)
        return scores

    def averages(self, post: Path, options: argparse.Namespace) -> list[Measured]:
        """What PRE and `post` give without training, in place on one model."""
        pair = preflight("pre", post)
        scan(pair)
        bench = Workbench(pair, self.panel, self.store, dtype=torch.bfloat16)
        methods = [m for m in AFTER if not options.after or m.lower() in options.after or m == "MA"]
        points = []
        for a in averages(bench, methods, options.means, size=options.proxy_size):
            scores = bench.point(a.method, a.cut, a.ratios, "held-out", name=a.name).scores
            print(f"{a.name}: reward {scores.reward.value:.4f}", flush=True)
            points.append(Measured(a.name, a.method, scores, a.ratios, a.cut.mean(a.ratios), a.settings))
        return points

    def merged(self, plan: Plan, post: Path) -> Scores:
        """The scores of a merge, which is removed once it is measured."""
        name = plan.name.replace(" ", "-")
        record, folder = self.work / f"{name}.json", self.work / name
        if record.exists():
            sha256 = json.loads(record.read_text(encoding="utf-8"))
        else:
            call("merge", "pre", post, "-o", folder, "--method", plan.method.lower(), *plan.options.split(), "--quiet")
            sha256 = open_checkpoint(folder).sha256
        scores = self.measure(str(folder), sha256)
        record.write_text(json.dumps(sha256), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        return scores


def write_prompts(count: int) -> Path:
    """The prompts that responses are collected for: the first of the proxy part, by content hash."""
    proxy = [p for p in read_prompts("prompts.jsonl") if part_of(p.group or p.key) == "proxy" and len(p.text) < 400]
    with Path("collect.jsonl").open("w", encoding="utf-8") as file:
        for p in sorted(proxy, key=lambda p: p.key)[:count]:
            print(json.dumps({"messages": [{"role": r, "content": c} for r, c in p.messages]}), file=file)
    return Path("collect.jsonl")


def call(*words: Any) -> None:
    """`counterpoise ...` in a process of its own."""
    subprocess.run([sys.executable, "-m", "counterpoise", *map(str, words)], check=True)


def commit() -> str:
    """The commit that runs."""
    told = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(told, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
