"""Time and memory of `counterpoise multitask` by the number of rows, on one core.

    python benchmarks/text_rows.py REVIEWS              # REVIEWS: the folder of the FDU-MTL reviews, for their words
    python benchmarks/text_rows.py REVIEWS --rows 1000 --out /tmp/quick.json

Rows are runs of 32 words from the reviews, all different, in two tasks of two classes. Each command is a process of its
own; CPU seconds and the largest memory are the kernel's. `train` is one epoch of the default TextCNN with random vectors, on
the 70 % of the rows that are not held out; `predict` answers all rows, from stdin. Where the machine is busy, CPU seconds
are what to read. Sizes that are in the results file are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments" / "banditmtl"))
from layouts import read_tasks

WORDS = 32
MEASURE = """
import json, resource, subprocess, sys, time
begun = time.perf_counter()
with open(sys.argv[1], "rb") as given, open(sys.argv[2], "wb") as answers:
    subprocess.run(sys.argv[3:], stdin=given, stdout=answers, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "seconds": round(time.perf_counter() - begun, 1),
                  "peak_mib": round(used.ru_maxrss / 1024)}))
"""


def measured(command: list[str], given: Path, answers: Path) -> dict[str, float]:
    """A command in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, str(given), str(answers), sys.executable, "-m", "counterpoise", "multitask", *command],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    return json.loads(told.stdout)


def written(folder: Path, rows: int, words: list[str]) -> Path:
    """Two csv files of so many rows together, and their texts, one a line."""
    starts = [(WORDS * i) % (len(words) - WORDS) for i in range(rows)]
    texts = [" ".join(words[k : k + WORDS]) + f" {i}" for i, k in enumerate(starts)]
    for k, task in enumerate(("first", "second")):
        lines = [f'"{text}",{i % 2}' for i, text in enumerate(texts[k::2])]
        (folder / f"{task}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    lines = folder.parent / "lines.txt"
    lines.write_text("\n".join(texts) + "\n")
    return lines


def main() -> None:
    """Measure, and write after each size."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("reviews", type=Path)
    options.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "text_rows.json")
    asked = options.parse_args()
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    words = [
        word for task in read_tasks(asked.reviews, "fdu-mtl") for text in task.train.texts for word in text.split()
        if word.isalpha()
    ]  # fmt: skip
    found: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {"by_rows": {}}
    for rows in asked.rows:
        if str(rows) in found["by_rows"]:
            continue
        with TemporaryDirectory() as name:
            folder, model = Path(name) / "data", Path(name) / "model"
            folder.mkdir()
            lines = written(folder, rows, words)
            settings = ["--data", str(folder), "-o", str(model), "--epochs", "1", "--quiet", "--device", "cpu"]
            trained = measured(["train", *settings], Path(os.devnull), Path(name) / "said.txt")
            asking = ["predict", str(model), "--task", "first", "--device", "cpu"]
            predicted = measured(asking, lines, Path(name) / "answers.txt")
            answers = len((Path(name) / "answers.txt").read_text().splitlines())
        found["by_rows"][str(rows)] = {"train_one_epoch": trained, "predict": predicted, "answers": answers}
        found |= {
            "command": "python benchmarks/text_rows.py REVIEWS", "commit": commit, "seed": 0, "words_a_row": WORDS,
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "threads": 1, "load_average": os.getloadavg()[0],
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {"python": platform.python_version(), "torch": version("torch")},
        }  # fmt: skip
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
        print(rows, found["by_rows"][str(rows)], time.strftime("%H:%M:%S"), flush=True)


if __name__ == "__main__":
    main()
