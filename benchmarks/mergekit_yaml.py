"""Recipes of mergekit run by both programs, and recipes of counterpoise exported and run by mergekit.

    MERGEKIT=ENV/bin/python python benchmarks/mergekit_yaml.py WORK

Writes benchmarks/results/mergekit_yaml.json: for each recipe of tests/merging/theirs.py, and each export, the elements, how
many differ, and the largest distance in steps (eps times the largest of inputs and outputs there). In float32; in bfloat16 as
mergekit computes by default; in bfloat16 with its dtype: float32; and so again with a mergekit that sorts stably, which
keeps the first of equal magnitudes as we do. Ours is rounded to bfloat16 stochastically, so half of the elements may differ
by a step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from counterpoise.averaging.average import average
from counterpoise.averaging.export import exported
from counterpoise.averaging.from_mergekit import average_mergekit
from counterpoise.averaging.merge import Merge, merge
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.records import versions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from merging import theirs  # noqa: E402
from tiny import nudge, tiny, tokenizer  # noqa: E402

MODELS = ("pre", "post1", "post2")
WIDE = {"dtype": "float32", "out_dtype": "bfloat16"}
WAYS = (("float32", {}, False), ("bfloat16", {}, False), ("bfloat16", WIDE, False), ("bfloat16", WIDE, True))
"""The dtype of the weights, what the YAML says of mergekit's, and whether mergekit is made to sort stably."""


def main() -> None:
    """Every way, every recipe."""
    work = Path(sys.argv[1]).absolute()
    rows = []
    for dtype, more, stable in WAYS:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        os.chdir(work)
        model = tiny("llama", dtype=getattr(torch, dtype))
        for seed, name in enumerate(MODELS):
            nudge(model, seed=seed, scale=0.0 if name == "pre" else 0.02).save_pretrained(name)
            tokenizer().save_pretrained(name)
        recipes = {name: recipe | more for name, recipe in theirs.CASES.items()}
        ours = {name: work / f"ours{i}" for i, name in enumerate(recipes)}
        exports = ours_exported(work, dtype if more else None)
        made = theirs.run(work, recipes | {name: document for name, (document, _) in exports.items()}, stable=stable)
        for i, name in enumerate(recipes):
            average_mergekit(f"theirs{i}.yml", ours[name])
        ours |= {name: folder for name, (_, folder) in exports.items()}
        for name, folder in ours.items():
            told = {"recipe": name, "direction": "exported" if name in exports else "read", "weights": dtype}
            told |= {"mergekit_dtype": more.get("dtype", dtype), "stable": stable}
            rows.append({**told, **compare(folder, made[name])})
            print(rows[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True).stdout
    result = {
        "command": "MERGEKIT=ENV/bin/python python benchmarks/mergekit_yaml.py WORK",
        "commit": commit.strip(),
        "seed": "0, 1 and 2 of the models",
        "versions": {**versions(), "mergekit": "0.1.5"},
        "rows": rows,
    }
    (HERE / "results" / "mergekit_yaml.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def ours_exported(work: Path, dtype: str | None) -> dict[str, tuple[dict[str, Any], Path]]:
    """Averages and a merge, and their recipes as YAML."""
    average("pre", "post1", work / "layers", [0.1, 0.9, 0.3, 1.2, 0.0, 1.0], blocks="layerwise")
    average("pre", "post1", work / "modules", [0.1, 0.9, 0.3, 0.2, 0.5, 1.0, 0.7, 0.4, 0.6], blocks="module")
    merge("pre", ["post1", "post2"], work / "ties", Merge(density=0.3, ratio=0.8, weights=(1.0, 0.5), scope="tensor"))
    models = {"layers": MODELS[:2], "modules": MODELS[:2], "ties": MODELS}
    return {
        f"export: {name}": (exported(work / name / "recipe.json", on, dtype)[0], work / name)
        for name, on in models.items()
    }


def compare(ours: Path, other: Path) -> dict[str, Any]:
    """Elements, how many differ, and how far."""
    inputs, mine, found = [Checkpoint(Path(m)) for m in MODELS], Checkpoint(ours), Checkpoint(other)
    assert set(mine) == set(found)
    count = differ = 0
    largest, beyond = 0.0, 0
    for name in mine:
        a, b = mine[name].double(), found[name].double()
        size = torch.stack([m[name].double().abs() for m in (*inputs, mine, found)]).amax(0)
        steps = (a - b).abs() / (torch.finfo(mine.dtype(name)).eps * size)
        count, differ = count + a.numel(), differ + int((a != b).sum())
        largest, beyond = max(largest, float(steps.nan_to_num(0).max())), beyond + int((steps > 2).sum())
    return {"elements": count, "differ": differ, "largest_steps": round(largest, 3), "beyond_two_steps": beyond}


if __name__ == "__main__":
    main()
