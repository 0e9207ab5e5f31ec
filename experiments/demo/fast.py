"""What --fast saves: restore and tax on a demo's pair, whole and with --fast, in turn, each several times.

    python experiments/demo/fast.py DEMO [ROUNDS]

DEMO is a folder that `counterpoise demo` wrote. Writes experiments/demo/results/fast.json: processor seconds (of the process
and its children, which a busy machine changes little) and wall seconds of every run, the picks, and the ratios of the
medians; once more without what a dry run takes, which starts, imports and reads as much and measures nothing.
Rounds that stand in the file are not run again.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from counterpoise.records import versions, write_json

RESULTS = Path(__file__).parent / "results" / "fast.json"
ABILITIES = ("choices:capitals.jsonl", "choices:sums.jsonl", "generate:translation.jsonl", "continue:tales.jsonl")
COMMON = ["--prompts", "prompts.jsonl", "--reward", "counterpoise.demo:cheer", "--max-new-tokens", "24"]
COMMON += ["--batch-size", "64", "--device", "cpu", "--json", "-q", *(w for a in ABILITIES for w in ("--abilities", a))]


def main() -> None:
    """Rounds of four runs."""
    demo, rounds = Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    done: list[dict[str, Any]] = json.loads(RESULTS.read_text())["runs"] if RESULTS.is_file() else []
    for number in range(rounds):
        for command in ("restore", "tax", "dry run"):
            for fast in (False, True)[: 1 if command == "dry run" else 2]:
                if not any((r["round"], r["command"], r["fast"]) == (number, command, fast) for r in done):
                    done.append({"round": number, "command": command, "fast": fast, **run(demo, command, fast)})
                    write(done)
                    print(done[-1], flush=True)


def run(demo: Path, command: str, fast: bool) -> dict[str, Any]:
    """One run in a process of its own, into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        name = "restore" if command == "dry run" else command
        words = [sys.executable, "-m", "counterpoise", name, "pre", "post", *COMMON, *(["--fast"] if fast else [])]
        words += ["-o", f"{folder}/out"] if command != "tax" else []
        words += ["--dry-run", "--speed", "1e10,1e10"] if command == "dry run" else []
        before, begun = os.times(), time.monotonic()
        found = subprocess.run(words, cwd=demo, capture_output=True, text=True)
        wall, after = time.monotonic() - begun, os.times()
        assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "processor": round(used, 1),
        "wall": round(wall, 1),
        "pick": told.get("pick"),
        "verdict": told.get("verdict"),
    }


def write(runs: list[dict[str, Any]]) -> None:
    """The runs, and fast over whole of each command."""

    def median(command: str, fast: bool, of: str) -> float:
        return statistics.median(
            [r[of] for r in runs if (r["command"], r["fast"]) == (command, fast)] or [float("nan")]
        )

    ratios = {}
    for command in sorted({r["command"] for r in runs if r["fast"]}):
        told = {of: [median(command, fast, of) for fast in (True, False)] for of in ("processor", "wall")}
        beyond = [seconds - median("dry run", False, "processor") for seconds in told["processor"]]
        told["processor, without start and loading"] = beyond
        ratios[command] = {of: round(fast / whole, 3) for of, (fast, whole) in told.items()}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=True
    )
    about = {"command": "python experiments/demo/fast.py DEMO 3", "commit": commit.stdout.strip(), "seed": 0}
    write_json(RESULTS, {**about, "versions": versions(), "ratios": ratios, "runs": runs})


if __name__ == "__main__":
    main()
