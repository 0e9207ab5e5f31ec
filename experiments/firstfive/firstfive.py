"""The first five minutes of a stranger: every command, its seconds, and what was on the screen.

    python experiments/firstfive/firstfive.py WORK            # on a fresh clone, and from the wheel

Writes results/clone.json, results/wheel.json and results/README.md. A command that is done is not done again: give the
same WORK to go on. Needs git, pip and the packages of constraints.txt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TRY = [
    "counterpoise --version",
    "counterpoise",
    "counterpoise demo -q",
    "ls -s --block-size=1K counterpoise-demo/restored",
    "counterpoise diff counterpoise-demo/pre counterpoise-demo/post -q",
    "counterpoise average counterpoise-demo/pre counterpoise-demo/post -o half --ratio 0.5 -q",
    "counterpoise front counterpoise-demo/restored/restore.json -o front.html",
    "counterpoise tax counterpoise-demo/pre counterpoise-demo/post --prompts nothing.jsonl "
    "--reward counterpoise.demo:cheer --abilities choices:counterpoise-demo/sums.jsonl",
]
WAYS = {
    "clone": [
        f"git clone -q {ROOT} counterpoise-clone",
        "python3 -m venv venv",
        "cd counterpoise-clone && ../venv/bin/pip install -q -c constraints.txt -e .",
        *TRY,
    ],
    "wheel": [
        f"python3 -m venv venv && venv/bin/pip wheel -q --no-deps -w dist {ROOT}",
        f"venv/bin/pip install -q -c {ROOT}/constraints.txt dist/*.whl",
        "du -sm venv/lib/python*/site-packages/* | sort -rn | head -24",
        *TRY,
    ],
}
LONGEST = 40
"""Lines of a screen that are kept, the first and the last half of them."""


def main(work: str) -> None:
    """Both ways, one command after the other."""
    for way, commands in WAYS.items():
        folder = Path(work).absolute() / way
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / "done.json"
        steps: list[dict[str, Any]] = json.loads(done.read_text(encoding="utf-8")) if done.exists() else []
        for command in commands[len(steps) :]:
            steps.append(typed(command, folder))
            done.write_text(json.dumps(steps), encoding="utf-8")
            print(f"{way}: {command[:60]}: {steps[-1]['seconds']} s, status {steps[-1]['status']}", flush=True)
        about = {
            "command": "python experiments/firstfive/firstfive.py WORK",
            "commit": subprocess.check_output(
                ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], text=True
            ).strip(),
            "seed": 0,
            "versions": {"python": sys.version.split()[0]},
            "cores": os.cpu_count(),
        }
        text = json.dumps({**about, "steps": steps}, indent=1, ensure_ascii=False).replace(str(folder), ".")
        text = text.replace(str(ROOT), "counterpoise")
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{way}.json").write_text(text + "\n", encoding="utf-8")
    (HERE / "results" / "README.md").write_text(page(), encoding="utf-8")


def typed(command: str, folder: Path) -> dict[str, Any]:
    """A command in a terminal of 80 columns, in the environment that the earlier ones made."""
    path = f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    begun = time.monotonic()
    found = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**kept, "PATH": path, "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    screen = [line.rstrip() for line in found.stdout.splitlines() if "is ignored: it is neither" not in line]
    if len(screen) > LONGEST:
        screen = [*screen[: LONGEST // 2], "...", *screen[-LONGEST // 2 :]]
    busy = round(os.getloadavg()[0], 1)
    seconds = round(time.monotonic() - begun, 1)
    return {"command": command, "seconds": seconds, "load": busy, "status": found.returncode, "screen": screen}


def page() -> str:
    """Both results as one page."""
    parts = ["# The first five minutes of a stranger", "", "Made by `firstfive.py`, which says how."]
    for way in WAYS:
        content = json.loads((HERE / "results" / f"{way}.json").read_text(encoding="utf-8"))
        parts += ["", f"## From the {way}, commit {content['commit']}, {content['cores']} shared cores"]
        for step in content["steps"]:
            told = f"{step['seconds']} s, status {step['status']}, load {step['load']}"
            parts += ["", f"`{step['command']}`: {told}"]
            parts += ["", "```text", *step["screen"], "```"] if step["screen"] else []
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main(sys.argv[1])
