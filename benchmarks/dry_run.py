"""What a dry run says a restore takes, beside what it then takes: real models, on this machine.

    python benchmarks/dry_run.py DATA WORK [--rounds 1] [--only stories15m]

DATA is the folder of real models and data. WORK gets the pairs: a model, and the same after it has
learned to be glad. Each round estimates, restores and estimates again, so that other load on the machine falls on both;
results go to benchmarks/results/dry_run.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from counterpoise.records import versions

SETTINGS = (
    "--limit 24 --prompt-limit 16 --max-new-tokens 24 --means 0.5,0.8 --no-controls --proxy-size 32 --batch-size 8"
)


def make_pair(data: Path, work: Path, name: str) -> None:
    """WORK/NAME/pre and post, the prompts, the reward and two abilities."""
    folder = work / name
    if (folder / "post" / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if name == "smollm2":
        tool = data.parent / "tools" / "smollm2_to_hf.py"
        subprocess.run([sys.executable, tool, folder / "pre", "--dtype", "float32"], check=True)
    else:
        shutil.copytree(data / name, folder / "pre")
    asked = [row["instruction"] for row in json.loads((data / "instructions" / "alpaca_en_demo.json").read_text())]
    lines = [json.dumps({"prompt": text}) + "\n" for text in dict.fromkeys(asked) if len(text) < 100]
    (folder / "prompts.jsonl").write_text("".join(lines[:200]))
    (folder / "glad.py").write_text(
        "def reward(prompts, responses):\n    return [float('glad' in r) for r in responses]\n"
    )
    told = (
        json.dumps({"prompt": text, "response": "I am so glad that you ask. Thank you."}) + "\n"
        for text in asked[500:660]
    )
    (folder / "samples.jsonl").write_text("".join(told))
    for task in ("arc_easy", "lambada_openai"):
        shutil.copy(data / "benchmarks" / f"{task}.jsonl", folder / f"{task}.jsonl")
    what = "align pre -o post --method rsf --samples samples.jsonl --epochs 1 --learning-rate 3e-4 --quiet"
    subprocess.run([sys.executable, "-m", "counterpoise", *what.split()], cwd=folder, check=True)


def timed(command: list[str], folder: Path) -> tuple[str, float, float]:
    """What a command prints on stdout, its wall seconds and its CPU seconds."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return said, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def one_round(folder: Path) -> dict[str, Any]:
    """An estimate, the run, and an estimate."""
    shutil.rmtree(folder / "out.work", ignore_errors=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    what = "restore pre post -o out --prompts prompts.jsonl --reward glad.py:reward --quiet "
    what += "--abilities choices:arc_easy.jsonl --abilities continue:lambada_openai.jsonl " + SETTINGS
    run = [sys.executable, "-m", "counterpoise", *what.split()]
    looks = []
    for real in (False, True, False):
        if real:
            _, wall, cpu = timed(run, folder)
            continue
        said, own_wall, own_cpu = timed([*run, "--dry-run", "--json"], folder)
        plan = json.loads(said)
        looks.append(
            {"estimate_s": plan["seconds"], "own_wall_s": own_wall, "own_cpu_s": own_cpu, "speed": plan["speed"]}
        )
        looks[-1]["stages"] = {s["name"]: s["seconds"] for s in plan["stages"]}
    estimate = statistics.mean(look["estimate_s"] for look in looks)
    return {
        "dry_runs": looks,
        "wall_s": wall,
        "cpu_s": cpu,
        "estimate/wall": estimate / wall,
        "estimate/cpu": estimate / cpu,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=("stories15m", "smollm2"))
    options = parser.parse_args()
    path = Path(__file__).parent / "results" / "dry_run.json"
    kept = json.loads(path.read_text())["models"] if path.is_file() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    for name in ("stories15m", "smollm2"):
        if options.only in (None, name):
            make_pair(options.data.absolute(), options.work.absolute(), name)
            rounds = [one_round(options.work.absolute() / name) for _ in range(options.rounds)]
            kept[name] = {"commit": commit, "rounds": rounds}
            print(name, [(round(r["estimate/wall"], 2), round(r["wall_s"])) for r in rounds], flush=True)
            result = {
                "command": f"python benchmarks/dry_run.py DATA WORK --rounds {options.rounds}", "settings": SETTINGS,
                "seed": 0, "versions": versions(), "threads": os.environ.get("OMP_NUM_THREADS", "default"),
                "machine": f"{os.cpu_count()} cores, {platform.machine()}", "models": kept,
            }  # fmt: skip
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
