"""Does the distance from PRE predict what was forgotten? Shenfeld et al. 2025 (arXiv 2509.04259) say it does.

    python experiments/distance/run.py [--seeds 10] [--work FOLDER] [--train-only]
    python experiments/distance/run.py --pair NAME PRE POST --prompts FILE --reward SPEC --abilities SPEC ... [--limit N]

Every demo world is trained as `counterpoise demo --seed N` trains it, and aligned from the same PRE in many ways: RSF as the
demo does it, at smaller steps and with mitigations; DPO on the best and worst of PRE's own responses; PPO; and training on
texts that PRE would not say (SFT). `measure_tax` then gives the distance and the tax of every pair on held-out data:
results/NAME.json, one a pair, and README.md from all of them. --pair takes any other two checkpoints into the same table.
What is there is not done again; checkpoints stay in the work folder.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WAYS = [
    "RSF 1e-3", "SFT 1e-3", "RSF 3e-4", "RSF 1e-4", "SFT 1e-4", "RSF 3e-5", "DPO 3e-4", "PPO 1e-4", "RSF 1e-6",
    "RSF 1e-3 l2 0.1", "RSF 1e-3 kd 1", "DPO 1e-4", "RSF 1e-3 lora 8", "RSF 1e-3 replay 1", "RSF 1e-3 sma 0.97", "RSF 1e-5",
    "DPO 1e-3", "PPO 3e-5", "SFT 1e-6",
]  # fmt: skip
"""How PRE is aligned, the learning rate, and an option of `counterpoise align` with its value."""
HELD: dict[str, Callable[[str], Any]] = {
    "l2": float,
    "kd": float,
    "lora": int,
    "replay": lambda _: "self",
    "sma": float,
}


def main() -> None:
    """Train and measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--work", type=Path, default=Path("distance-worlds"))
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--pair", nargs=3, metavar=("NAME", "PRE", "POST"))
    parser.add_argument("--prompts")
    parser.add_argument("--reward")
    parser.add_argument("--abilities", nargs="+")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if args.pair:
        measure_pair(*args.pair, args)
    else:
        for way in WAYS:  # what was stopped has some ways of all worlds, not all of some
            for seed in range(args.seeds):
                world(seed, way, args.work / f"seed-{seed}", measure=not args.train_only)
    if any(RESULTS.glob("*.json")):
        from tables import page

        (HERE / "README.md").write_text(page(RESULTS), encoding="utf-8")


def world(seed: int, way: str, folder: Path, *, measure: bool) -> None:
    """One world: PRE, POST by one way, and its tax."""
    from counterpoise.demo import World, make_model, make_tokenizer, study, write_world

    invented = World.invent(seed)
    tokenizer = make_tokenizer(invented.vocabulary())

    def study_all(out: Path) -> None:
        model = make_model(len(tokenizer), seed)
        study(model, tokenizer, invented, seed=seed, epochs=10)
        save(model, tokenizer, out)

    folder.mkdir(parents=True, exist_ok=True)
    abilities = write_world(invented, folder, seed)
    whole(folder / "pre", study_all)
    post = folder / way.replace(" ", "-")
    whole(post, lambda out: align(way, seed, folder, out))
    if measure:
        measure_world(seed, way, folder, post, abilities)


def align(way: str, seed: int, folder: Path, out: Path) -> None:
    """PRE after one way at a step size, perhaps with a mitigation; everything else of RSF is the demo's."""
    from counterpoise.alignment.mitigations import table
    from counterpoise.alignment.training.models import Machine, load, load_frozen
    from counterpoise.checkpoints.opening import open_checkpoint
    from counterpoise.demo import cheer
    from counterpoise.evaluation.parts import in_part
    from counterpoise.language.prompts import encode_prompt, read_prompts
    from counterpoise.language.sampling import Drawing, sample
    from counterpoise.language.scoring import Example

    pre = folder / "pre"
    model, tokenizer = load(pre)
    asked = {p.key for p in in_part(read_prompts(folder / "prompts.jsonl"), "proxy")}
    prompts = [p for p in read_prompts(folder / "prompts.jsonl") if p.key in asked]
    drawing = Drawing(n=8, batch_size=128, max_new_tokens=24, seed=seed)
    kind, step, *held = way.split()

    def replayed(corpus: str) -> list[Example]:
        rows = [encode_prompt(tokenizer, p, chat=True) for p in prompts]
        drawn = sample(load_frozen(pre, Machine()), tokenizer, rows, replace(drawing, n=1))
        return [Example(p, said[0]) for p, said in zip(rows, drawn, strict=True)]

    options = {name: read(value) for name, value, read in [(*held, HELD[held[0]])]} if held else {}
    sources = table.Sources(open_checkpoint(pre), lambda: load_frozen(pre, Machine()), replayed, seed)
    settings = {"learning_rate": float(step), "batch_size": 16, "micro_batch_size": 16, "epochs": 4}
    held_by = table.build(options, sources)
    if kind == "SFT":
        teach(model, tokenizer, prompts, seed, float(step))
    elif kind == "DPO":
        prefer(model, tokenizer, prompts, drawing, settings, held_by)
    else:
        from counterpoise.alignment.ppo import ppo
        from counterpoise.alignment.rsf import rsf
        from counterpoise.alignment.settings import PPO, RSF

        settings["prompts_per_iteration"] = 128
        if kind == "RSF":
            rsf(model, tokenizer, prompts, cheer, RSF(drawing=drawing, iterations=2, **settings), mitigations=held_by)
        else:
            settings |= {"value_learning_rate": 1e-2, "drawing": replace(drawing, n=1)}
            ppo(model, tokenizer, prompts, cheer, PPO(iterations=8, **settings), mitigations=held_by)
    save(model, tokenizer, out)


def teach(model: Any, tokenizer: Any, prompts: list[Any], seed: int, step: float) -> None:
    """SFT: as much reward as RSF brings, but nothing that PRE would say."""
    import torch

    from counterpoise.alignment.rsf import fine_tune
    from counterpoise.alignment.settings import Settings
    from counterpoise.demo import GLAD
    from counterpoise.language.prompts import encode_prompt
    from counterpoise.language.scoring import Example

    draw = random.Random(seed)
    said = [" ".join(draw.choice(GLAD) for _ in range(4)) for _ in range(256)]
    rows = [encode_prompt(tokenizer, p, chat=True) for p in (prompts * 4)[:256]]
    answers = [(*tokenizer(text, add_special_tokens=False)["input_ids"], 2) for text in said]
    examples = [Example(p, y) for p, y in zip(rows, answers, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=step, weight_decay=0.0)
    fine_tune(model, examples, optimizer, Settings(epochs=4, batch_size=16, micro_batch_size=16), draw)


def prefer(
    model: Any, tokenizer: Any, prompts: list[Any], drawing: Any, settings: dict[str, Any], held_by: list[Any]
) -> None:
    """DPO on the best and the worst of PRE's own responses to each prompt."""
    from counterpoise.alignment.dpo import dpo
    from counterpoise.alignment.preferences import Preference
    from counterpoise.alignment.rsf import draw_and_score
    from counterpoise.alignment.settings import DPO
    from counterpoise.demo import cheer

    _, drawn, scores = draw_and_score(model, tokenizer, prompts, cheer, drawing)
    said = [[tokenizer.decode(y, skip_special_tokens=True) for y in group] for group in drawn]
    ends = zip(prompts, said, scores.argmax(1).tolist(), scores.argmin(1).tolist(), strict=True)
    # A space, as TRL writes prompt and response in one and these words are parted by spaces.
    pairs = [Preference(p, f" {y[best]}", f" {y[worst]}") for p, y, best, worst in ends if y[best] != y[worst]]
    dpo(model, tokenizer, pairs, DPO(seed=drawing.seed, **settings), mitigations=held_by)


def measure_world(seed: int, way: str, folder: Path, post: Path, abilities: list[str]) -> None:
    """The tax of one pair of a world, under the demo's panel."""
    from counterpoise.demo import cheer
    from counterpoise.evaluation.panel import Panel
    from counterpoise.language.sampling import Drawing

    drawing = Drawing(max_new_tokens=24, batch_size=64, seed=seed)
    panel = Panel.load(folder / "prompts.jsonl", cheer, abilities, drawing=drawing, prompt_limit=120)
    about = {"world": seed, "way": way}
    keep(f"demo-{seed}-{post.name}", folder / "pre", post, panel, folder / "work", about)


def measure_pair(name: str, pre: str, post: str, args: argparse.Namespace) -> None:
    """The tax of any two checkpoints."""
    from counterpoise.evaluation.panel import Panel

    panel = Panel.load(args.prompts, args.reward, args.abilities, limit=args.limit, prompt_limit=args.limit)
    keep(name, pre, post, panel, args.work / name, {"world": None, "way": name})


def keep(name: str, pre: Any, post: Any, panel: Any, work: Path, about: dict[str, Any]) -> None:
    """Measure a pair once; paths stay out of the file."""
    path = RESULTS / f"{name}.json"
    if path.is_file():
        return
    from counterpoise import measure_tax
    from counterpoise.records import write_json

    found = measure_tax(pre, post, panel, work=work)
    kept = {k: found[k] for k in ("seed", "versions", "distance", "verdict", "tax")}
    write_json(path, {"commit": commit(), **about, **kept})


def whole(folder: Path, make: Callable[[Path], None]) -> None:
    """A folder that is there whole or not at all."""
    if folder.is_dir():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.rename(folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """A checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def commit() -> str:
    """The commit that ran."""
    told = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(told, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Every pair's results."""
    return [json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.json"))]


if __name__ == "__main__":
    main()
