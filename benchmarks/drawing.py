"""What it saves that responses which have ended leave the batch, and at what share of them the cache is cut.

    python benchmarks/drawing.py MODEL [--rounds 3] [--threads 1]

MODEL is a checkpoint whose texts end (stories15m). 48 stories of at most 240 tokens, four from each of 12 openings, all at once:
no row leaves, or rows leave once a quarter, half or three quarters of them have ended. The four take turns; all must give the
same tokens. Writes medians of CPU time and the ratios within rounds to benchmarks/results/drawing.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from counterpoise.alignment.training.models import load
from counterpoise.language import generating
from counterpoise.language.sampling import Drawing, sample
from counterpoise.records import versions

NEVER = 2.0
SHARES = (NEVER, 0.25, 0.5, 0.75)
NAMES = "Tom Lily Ben Sue Max Mia Sam Amy Tim Anna Jack Lucy".split()
OPENINGS = [f"Once upon a time there was {name}" for name in NAMES]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in OPENINGS]
    how = Drawing(n=4, max_new_tokens=240)
    seconds: dict[float, list[float]] = {share: [] for share in SHARES}
    drawn = None
    for number in range(options.rounds + 1):
        for share in SHARES:
            generating.ENDED = share
            begun = time.process_time()
            found = sample(model, tokenizer, prompts, how)
            spent = time.process_time() - begun
            assert drawn in (None, found)
            drawn = found
            if number:  # the first round warms up
                seconds[share].append(spent)
    rows = {}
    for share in SHARES:
        ratios = [a / b for a, b in zip(seconds[share], seconds[NEVER], strict=True)]
        spent = statistics.median(seconds[share])
        rows["never" if share == NEVER else str(share)] = {
            "cpu_s": spent, "ratio": statistics.median(ratios), "ratios": ratios
        }  # fmt: skip
    print(json.dumps(rows, indent=1))
    lengths = sorted(len(r) for group in found for r in group)
    told = ["git", "describe", "--always", "--dirty"]
    result = {
        "command": "python " + " ".join(["benchmarks/drawing.py", "MODEL", *sys.argv[2:]]),
        "commit": subprocess.run(told, capture_output=True, text=True).stdout.strip(),
        "machine": f"{platform.machine()}, {options.threads} threads",
        "seed": how.seed,
        "lengths": lengths,
        "versions": versions(),
        "rows": rows,
    }
    (Path(__file__).parent / "results" / "drawing.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
