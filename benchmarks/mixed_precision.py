"""What `align --bf16` saves on a CPU: a training step, and drawing responses, in float32 and in mixed precision.

    python benchmarks/mixed_precision.py PRE [--rounds 5] [--threads 1]

PRE is a checkpoint folder (SmolLM2-135M-Instruct, for instance). One step on 8 rows of 60 + 30 tokens, and 4 responses of 16
tokens to 8 prompts of 60. The two take turns; writes medians and the ratios within rounds to
benchmarks/results/mixed_precision.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from counterpoise.alignment.training.models import load
from counterpoise.alignment.training.precision import compute_in_bfloat16, weights_cast_once
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example, response_nll
from counterpoise.records import versions


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pre", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plain, tokenizer = load(options.pre)
    mixed = compute_in_bfloat16(copy.deepcopy(plain))
    ids = random.Random(0)
    examples = [
        Example(tuple(ids.choices(range(5, 40_000), k=60)), tuple(ids.choices(range(5, 40_000), k=30)))
        for _ in range(8)
    ]

    def step(model: torch.nn.Module) -> None:
        response_nll(model, examples).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    def draw(model: torch.nn.Module) -> None:
        with weights_cast_once(model):
            sample(model, tokenizer, [e.prompt for e in examples], Drawing(n=4, max_new_tokens=16, batch_size=32))

    found: dict[str, list[tuple[float, float]]] = {"training step": [], "drawing": []}
    for number in range(options.rounds + 1):
        for name, work in {"training step": step, "drawing": draw}.items():
            pair = (seconds(lambda w=work: w(plain)), seconds(lambda w=work: w(mixed)))
            if number:  # the first round warms up
                found[name].append(pair)
    rows = {
        name: {
            "float32_s": statistics.median(a for a, _ in pairs),
            "bf16_s": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(a / b for a, b in pairs),
            "ratios": [a / b for a, b in pairs],
        }
        for name, pairs in found.items()
    }
    told = ["git", "describe", "--always", "--dirty"]
    result = {
        "command": " ".join(["python", "benchmarks/mixed_precision.py", "PRE", *sys.argv[2:]]),
        "commit": subprocess.run(
            told, capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {options.threads} threads",
        "versions": versions(),
        "rows": rows,
    }
    (Path(__file__).parent / "results" / "mixed_precision.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name}: float32 {row['float32_s']:.2f} s, bf16 {row['bf16_s']:.2f} s, {row['ratio']:.2f} times as fast")


if __name__ == "__main__":
    main()
