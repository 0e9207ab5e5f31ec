"""mergekit itself, in an environment of its own (benchmarks/mergekit_env.sh); MERGEKIT names its python.

Run by that python: `python theirs.py YAML OUT [YAML OUT ...]`, for mergekit takes some seconds to import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PYTHON = os.environ.get("MERGEKIT", "")
ABSENT = "no mergekit: make its environment with benchmarks/mergekit_env.sh, and name its python in MERGEKIT"

HALVES: list[dict[str, Any]] = [
    {"filter": "mlp", "value": [0.0, 0.5, 1.0]},
    {"filter": "layers.1.", "value": 0.9},
    {"value": 0.3},
]
CASES: dict[str, dict[str, Any]] = {
    "linear by gradient and filter": {
        "merge_method": "linear",
        "models": [
            {"model": "pre", "parameters": {"weight": 0.4}},
            {"model": "post1", "parameters": {"weight": HALVES}},
        ],
    },
    "linear of three, not normalised": {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("pre", 0.2), ("post1", 0.5), ("post2", 0.4))],
        "parameters": {"normalize": False},
    },
    "task arithmetic with a negative weight": {
        "merge_method": "task_arithmetic",
        "base_model": "pre",
        "models": [
            {"model": "post1", "parameters": {"weight": [1, 0.2]}},
            {"model": "post2", "parameters": {"weight": -0.3}},
        ],
        "parameters": {"lambda": 0.8},
    },
    "ties by layer and filter": {
        "merge_method": "ties",
        "base_model": "pre",
        "models": [
            {"model": "post1", "parameters": {"weight": HALVES, "density": [0.2, 0.9]}},
            {"model": "post2", "parameters": {"weight": 0.7, "density": 0.5}},
            {"model": "pre"},
        ],
        "parameters": {"lambda": 0.9},
    },
    "ties, not normalised, rescaled": {
        "merge_method": "ties",
        "base_model": "pre",
        "models": [{"model": m, "parameters": {"weight": 0.6, "density": 0.3}} for m in ("post1", "post2")],
        "parameters": {"normalize": False, "rescale": True},
    },
    "dare_ties of density 1": {
        "merge_method": "dare_ties",
        "base_model": "pre",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("post1", 0.6), ("post2", 1.1))],
        "parameters": {"int8_mask": True},
    },
    "slices with gradients of their own": {
        "merge_method": "task_arithmetic",
        "base_model": "pre",
        "slices": [
            {"sources": [{"model": m, "layer_range": [0, 2]} for m in ("pre", "post1")], "parameters": {"weight": 0.5}},
            {
                "sources": [
                    {"model": "pre", "layer_range": [2, 6]},
                    {"model": "post1", "layer_range": [2, 6], "parameters": {"weight": [{"filter": "layers", "value": [0, 1]}]}},
                ],
            },
        ],
        "parameters": {"weight": 0.5},
    },
}  # fmt: skip
"""Recipes of every method, of models named pre, post1 and post2 of six layers."""


def run(folder: Path, recipes: Mapping[str, Mapping[str, Any]], *, stable: bool = False) -> dict[str, Path]:
    """What mergekit makes of each recipe, whose models lie in `folder`.

    Args:
        stable: sort stably, so that of equal magnitudes the first are kept. mergekit's own `argsort` keeps any of them.
    """
    made, words = {}, []
    for i, (name, recipe) in enumerate(recipes.items()):
        (folder / f"theirs{i}.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        made[name] = folder / f"theirs{i}"
        words += [f"theirs{i}.yml", f"theirs{i}"]
    done = subprocess.run(
        [PYTHON, str(Path(__file__).absolute()), *words], cwd=folder, capture_output=True, text=True,
        env={n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | ({"STABLE": "1"} if stable else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return made


if __name__ == "__main__":
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    if os.environ.get("STABLE"):
        import functools

        import torch

        torch.argsort = functools.partial(torch.argsort, stable=True)
    for recipe, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        read = MergeConfiguration.model_validate(yaml.safe_load(Path(recipe).read_text(encoding="utf-8")))
        run_merge(read, out, MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
