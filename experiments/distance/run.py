"""Does the distance from PRE predict what was forgotten? Shenfeld et al. 2025 (arXiv 2509.04259) say it does.

    python experiments/distance/run.py [--seeds 10] [--work FOLDER] [--train-only]
    python experiments/distance/run.py --pair NAME PRE POST --prompts FILE --reward SPEC --abilities SPEC ... [--limit N]

Every demo world is trained as `counterpoise demo --seed N` trains it, and aligned from the same PRE in six ways: RSF as the
demo does it and at smaller steps, and training on texts that PRE would not say (SFT). `measure_tax` then gives the distance
and the tax of every pair on held-out data: results/NAME.json, one a pair, and README.md from all of them. --pair takes any
other two checkpoints into the same table. What is there is not done again; checkpoints stay in the work folder.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STEPS = {"1e-3": 1e-3, "3e-4": 3e-4, "1e-4": 1e-4, "3e-5": 3e-5}
WAYS = ["RSF 1e-3", "SFT 1e-3", "RSF 3e-4", "RSF 1e-4", "SFT 1e-4", "RSF 3e-5"]


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
    """PRE after RSF or SFT at a step size; everything else is the demo's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from counterpoise.alignment.rsf import fine_tune, rsf
    from counterpoise.alignment.settings import RSF
    from counterpoise.demo import GLAD, cheer
    from counterpoise.evaluation.parts import part_of
    from counterpoise.language.prompts import encode_prompt, read_prompts
    from counterpoise.language.sampling import Drawing
    from counterpoise.language.scoring import Example

    model = AutoModelForCausalLM.from_pretrained(folder / "pre")
    tokenizer = AutoTokenizer.from_pretrained(folder / "pre")
    prompts = [p for p in read_prompts(folder / "prompts.jsonl") if part_of(p.key) == "proxy"]
    kind, step = way.split()
    if kind == "RSF":
        how = RSF(
            drawing=Drawing(n=8, batch_size=128, max_new_tokens=24, seed=seed), iterations=2, prompts_per_iteration=128,
            epochs=4, learning_rate=STEPS[step], batch_size=16, micro_batch_size=16,
        )  # fmt: skip
        rsf(model, tokenizer, prompts, cheer, how)
    else:  # as much reward, but nothing that PRE would say
        draw = random.Random(seed)
        said = [" ".join(draw.choice(GLAD) for _ in range(4)) for _ in range(256)]
        rows = [encode_prompt(tokenizer, p, chat=True) for p in (prompts * 4)[:256]]
        answers = [(*tokenizer(text, add_special_tokens=False)["input_ids"], 2) for text in said]
        examples = [Example(p, y) for p, y in zip(rows, answers, strict=True)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=STEPS[step], weight_decay=0.0)
        fine_tune(model, examples, optimizer, RSF(epochs=4, batch_size=16, micro_batch_size=16), draw)
    save(model, tokenizer, out)


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
