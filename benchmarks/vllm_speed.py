"""Tokens a second that vLLM draws and scores, and seconds a change of ratios, beside transformers in one process.

    OMP_NUM_THREADS=1 FOLDER/bin/python benchmarks/vllm_speed.py MODEL [--rounds 3] [--threads 1]

FOLDER is what benchmarks/vllm_env.sh made, MODEL a checkpoint folder (stories15m, for instance), which is PRE; POST is the
same with noise. The two work in turns. Prints medians, and ratios taken round by round, and writes
benchmarks/results/vllm.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from counterpoise.averaging.partition import thirds
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.averaging.vllm import VLLM
from counterpoise.checkpoints.preflight import preflight
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import continuation_logprobs
from counterpoise.records import versions

PROMPTS, CONTEXT, CHOICES, CHOICE, NEW = 32, 60, 4, 8, 64


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of a call, and what it gave."""
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def moved(source: str, folder: Path) -> Path:
    """The checkpoint with noise of a hundredth of each tensor's spread, in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * p.std() * torch.randn(p.shape, generator=random)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measured(options, Path(folder))
    path = Path(__file__).parent / "results" / "vllm.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rounds, medians and ratios."""
    pair = preflight(options.model, moved(options.model, folder / "post"))
    cut, words = thirds(pair.names), AutoTokenizer.from_pretrained(options.model)
    resident = ResidentAverage(pair, dtype=torch.float32)
    started, engine = seconds(lambda: VLLM(pair.post.folder, torch.float32))
    random = torch.Generator().manual_seed(0)

    def texts(count: int, length: int) -> list[tuple[int, ...]]:
        return [tuple(torch.randint(300, len(words), (length,), generator=random).tolist()) for _ in range(count)]

    rows: list[dict[str, float]] = []
    for number in range(-1, options.rounds):  # the first one warms up
        ratios = cut.ratios(pair.names, [r := 0.3 + 0.1 * number] * 3)
        drawing = Drawing(max_new_tokens=NEW, seed=number + 1)
        prompts, contexts = texts(PROMPTS, 16), texts(PROMPTS, CONTEXT)
        choices = [texts(CHOICES, CHOICE) for _ in contexts]
        row: dict[str, float] = {}
        row["vllm_set_s"], _ = seconds(lambda: engine.put(pair, ratios))  # noqa: B023
        row["transformers_set_s"], _ = seconds(lambda: resident.set(cut, [r] * 3))
        scores = []
        for name, model in (("vllm", engine), ("transformers", resident.model)):
            took, drawn = seconds(lambda: sample(model, words, prompts, drawing))  # noqa: B023
            row[f"{name}_drawn_tokens_per_s"] = sum(len(y) for group in drawn for y in group) / took
            took, found = seconds(lambda: continuation_logprobs(model, contexts, choices, batch_size=16))  # noqa: B023
            row[f"{name}_scored_tokens_per_s"] = PROMPTS * (CONTEXT + CHOICES * CHOICE) / took
            scores.append(torch.tensor(found))
        row["largest_difference_nats"] = float((scores[0] - scores[1]).abs().max())
        if number >= 0:
            rows.append(row)
        print(number, {k: round(v, 4) for k, v in row.items()}, flush=True)
    medians = {name: statistics.median(r[name] for r in rows) for name in rows[0]}
    ratios_of = {
        what: statistics.median(r[f"vllm_{what}"] / r[f"transformers_{what}"] for r in rows)
        for what in ("drawn_tokens_per_s", "scored_tokens_per_s", "set_s")
    }
    for name, value in {**medians, **{f"vllm / transformers, {k}": v for k, v in ratios_of.items()}}.items():
        print(f"{name:44} {value:.4g}")
    bound = f"OMP_NUM_THREADS={n} " if (n := os.environ.get("OMP_NUM_THREADS")) else ""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": f"{bound}python benchmarks/vllm_speed.py MODEL --rounds {options.rounds} --threads {options.threads}",
        "model": Path(options.model).name, "commit": commit, "seed": 0,
        "versions": versions(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "sizes": {"prompts": PROMPTS, "new tokens": NEW, "context": CONTEXT, "choices": CHOICES, "tokens a choice": CHOICE},
        "seconds_to_start_vllm": started, "rounds": rows, "medians": medians, "ratios": ratios_of,
    }  # fmt: skip


if __name__ == "__main__":
    main()
