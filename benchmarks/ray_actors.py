"""How fast averages are measured by one process, and by one and two engines on Ray, with the same numbers.

    OMP_NUM_THREADS=1 python benchmarks/ray_actors.py MODEL [--rounds 3] [--engines 1,2] [--prompts 64]

PRE is MODEL (a folder, such as stories15m), POST is MODEL with a little noise. Three averages are measured on so many prompts and
continuations; the rounds are taken in turn, after one that does not count. (The file is not called ray.py, as that would
hide the package.) Writes benchmarks/results/ray.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from counterpoise.averaging.partition import whole
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.panel import PanelFiles
from counterpoise.evaluation.workbench import Model, Workbench
from counterpoise.language.sampling import Drawing
from counterpoise.records import Store, versions
from counterpoise.restoration.cluster import Cluster
from counterpoise.restoration.request import Request

ROOT = Path(__file__).resolve().parents[1]
WORDS = (
    "once upon a time there was little girl boy dog cat who liked to play in the park with red ball big tree".split()
)
SEED = 0


def made(model: Path, folder: Path, count: int) -> PanelFiles:
    """PRE and POST, prompts, a reward and a task below `folder`."""
    draw = random.Random(SEED)
    torch.manual_seed(SEED)

    def words(length: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(length))

    def write(name: str, rows: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("prompts.jsonl", [{"prompt": f"{words(8)} {n}"} for n in range(4 * count)])
    write("text.jsonl", [{"context": f"{words(8)} {n}", "continuation": words(24)} for n in range(4 * count)])
    (folder / "reward.py").write_text(
        "def reward(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for side in ("pre", "post"):
        found.save_pretrained(folder / side)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder / side)
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02 * parameter.std())
    how = Drawing(max_new_tokens=48, batch_size=16)
    specs = [f"continue:{folder / 'text.jsonl'}"]
    return PanelFiles(folder / "prompts.jsonl", f"{folder / 'reward.py'}:reward", specs, count, count, how)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default="1,2")
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()
    counts = [int(n) for n in options.engines.split(",")]
    with tempfile.TemporaryDirectory() as place, ExitStack() as after:
        folder = Path(place)
        files = made(options.model, folder, options.prompts)
        bench = Workbench(preflight(folder / "pre", folder / "post"), files.load("cpu"), Store(folder / "none"))
        request = Request(folder / "pre", folder / "post", folder / "out")
        begun = time.perf_counter()
        ray.init("local", num_cpus=sum(counts), include_dashboard=False, log_to_driver=False)
        after.callback(ray.shutdown)
        started = time.perf_counter() - begun
        ways = {"without Ray": None}
        for count in counts:  # all of them wait in the background, at no cost
            after.enter_context(Cluster(files.load, replicas=count, needs={"CPU": 1}).measuring(bench, request))
            ways[f"{count} engine{'s' * (count > 1)}"] = bench.elsewhere
        cut = whole(bench.pair.names)
        models = [Model(f"MA {r}", "MA", cut, (r,)) for r in (0.3, 0.5, 0.7)]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        loads: list[float] = []
        found = {}
        for number in range(-1, options.rounds):
            for name, bench.elsewhere in ways.items():
                bench.store = Store(folder / f"{number} {name}")
                begun = time.perf_counter()
                found[name] = [point.scores.summary() for point in bench.points(models, "validation")]
                taken = time.perf_counter() - begun
                if number >= 0:
                    seconds[name].append(round(taken, 2))
                    loads.append(os.getloadavg()[0])
        assert all(value == found["without Ray"] for value in found.values())
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    result = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/ray_actors.py {options.model.name} --rounds {options.rounds} "
        f"--engines {options.engines} --prompts {options.prompts}",
        "commit": subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], text=True).strip(),
        "seed": SEED,
        "versions": {**versions(), "ray": ray.__version__},
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load": [min(loads), max(loads)],
        "start_of_ray_s": round(started, 1),
        "seconds": seconds,
        "median_s": medians,
        "points_a_minute": {name: round(60 * len(models) / s, 1) for name, s in medians.items()},
        "speedup_over_without_ray": {
            name: round(statistics.median(a / b for a, b in zip(seconds["without Ray"], of, strict=True)), 2)
            for name, of in seconds.items()
        },
        "same_numbers": True,
    }
    (ROOT / "benchmarks" / "results" / "ray.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
