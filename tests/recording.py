"""What a refactor must not change: every command on a tiny world, recorded, and two recordings compared.

    python tests/recording.py record.json --keep FOLDER       # a minute or two; FOLDER then holds all that was written
    python tests/recording.py after.json --resume FOLDER      # also goes on from FOLDER's unfinished work
    python tests/recording.py --compare record.json after.json

Run it on the code before and after (PYTHONPATH names which `src` is taken). A recording holds what each command printed,
the content of each file it wrote (hashes of weights), and the names of the finished pieces in work folders, which are
hashes of all that decides a piece: a run begun before a refactor goes on after it. Times, dates, versions, commits and
speeds are left out.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PANEL = (
    "--prompts prompts.jsonl --reward letters:letters --abilities continue:text.jsonl --abilities choices:guess.jsonl"
)
PANEL += " --abilities generate:guess_text.jsonl?metric=bleu&limit=8 --limit 12"
QUICK = "--prompt-limit 20 --max-new-tokens 6 --quiet"
SEARCH = "--means 0.3,0.7,1.2 --keep-reward 0.5 --proxy-size 16"
TRAIN = "--learning-rate 1e-2 --batch-size 8 --quiet"
DRAWN = f"--prompts prompts.jsonl --reward letters:letters --iterations 2 --prompts-per-iteration 8 --max-new-tokens 5 {TRAIN}"
HELD = "--l1 0.1 --l2 0.05 --kd 0.1 --sma 0.5 --reset-every 3 --freeze 1 --merge 0.1 --merge-keep 0.5 --replay corpus.jsonl"
HEALED = "--align-teacher post --keep-teacher pre --prompts prompts.jsonl --abilities continue:text.jsonl --abilities "
HEALED += "choices:guess.jsonl --steps 4 --every 2 --prompts-per-step 4 --learning-rate 1e-3 --max-new-tokens 6 --quiet"
JOBS = {
    "demo": "demo --seed 0 -o demo --quiet",
    "average": "average pre post -o average --ratio 0.3 --quiet",
    "average-blocks": "average pre post -o average-blocks --ratios 0,0.4,0.9 --donor pre --quiet",
    "average-module": "average pre16 post16 -o average-module --ratios 0.1,0.9,0.4,0.3,0.2,0.8,0.5,0.6,0.7 "
    "--blocks module --quiet",
    "average-narrow": "average pre16 post16 -o average-narrow --ratio 0.4 --quiet",
    "diff": "diff pre post --blocks layerwise --quiet",
    "merge-ties": "merge pre post post2 -o merge-ties --method ties --density 0.4 --quiet",
    "merge-dare": "merge pre16 post16 -o merge-dare --method dare-ties --density 0.4 --quiet",
    "search": "search pre post -o found.json --prompts prompts.jsonl --reward letters:letters --mean 0.4 "
    "--proxy-size 16 --max-new-tokens 6 --quiet",
    "search-two-sided": "search pre post -o two-sided.json --prompts prompts.jsonl --reward letters:letters "
    "--method two-sided --lambda 0.5 --proxy-size 16 --max-new-tokens 6 --quiet",
    "tax": f"tax pre post {PANEL} {QUICK} --json --work tax.work",
    "restore": f"restore pre post -o restored {PANEL} {QUICK} {SEARCH}",
    "restore-mean": f"restore pre post -o restored-mean {PANEL} {QUICK} --mean 0.4 --proxy-size 16 --no-controls --replies 2",
    "restore-both": f"restore pre post -o restored-both {PANEL} {QUICK} {SEARCH} --search both --lambdas 0.5,2 --calibrate 5",
    "restore-guarded": f"restore pre post -o restored-guarded {PANEL} {QUICK} --means 0.5 --keep-reward 0.5 --proxy-size 16 "
    "--search two-sided --lambdas 1 --min-effective-sets 1.5 --calibrate 4",
    "restore-dry": f"restore pre post -o dry {PANEL} {QUICK} {SEARCH} --search both --dry-run --speed 1e12,1e10",
    "front": "front restored/restore.json restored-both/restore.json -o front.html",
    "rsf": f"align pre -o rsf --method rsf {DRAWN} --n 3 {HELD} --stop-at-reward 99",
    "rsf-lora": f"align pre -o rsf-lora --method rsf {DRAWN} --n 2 --lora 2 --replay self --draw-batch-size 4 --seed 3",
    "rsf-dry": f"align pre -o rsf-dry --method rsf {DRAWN} --n 3 {HELD} --dry-run --speed 1e12,1e10",
    "ppo": f"align pre -o ppo --method ppo {DRAWN} --kl-target 0.5 --epochs 1 --last-checkpoint-only",
    "ppo-dry": f"align pre -o ppo-dry --method ppo {DRAWN} --lora 4 --dry-run --speed 1e12,1e10",
    "dpo": f"align pre -o dpo --method dpo --preferences preferences.jsonl --epochs 1 --l2 0.1 --replay corpus.jsonl {TRAIN}",
    "dpo-dry": f"align pre -o dpo-dry --method dpo --preferences preferences.jsonl --kd 0.1 {TRAIN} --dry-run --speed 1e12,1e10",
    "collect": "align collect post -o best.jsonl --prompts prompts.jsonl --reward letters:letters --n 4 --max-new-tokens 5 "
    "--quiet",
    "distil": f"align pre -o distil --method rsf --samples best.jsonl --sma 0.9 --epochs 1 {TRAIN}",
    "heal": f"heal post -o healed {HEALED}",
    "heal-bandit": f"heal average -o healed-bandit {HEALED} --keep-by bandit --divergence jensen-shannon",
    "heal-dry": f"heal post -o healed-dry {HEALED} --dry-run --speed 1e12,1e10",
    "reward-model": "align reward-model pre -o rm --preferences preferences.jsonl --learning-rate 1e-3 --batch-size 8 --quiet",
    "respond": "judge respond post -o ours.json --prompts prompts.jsonl --limit 20 --max-new-tokens 6 --quiet",
    "respond-pre": "judge respond pre -o theirs.json --prompts prompts.jsonl --limit 20 --max-new-tokens 6 --quiet",
    "respond-dry": "judge respond post -o dry.json --prompts prompts.jsonl --limit 20 --max-new-tokens 6 --dry-run "
    "--speed 1e12,1e10",
    "compare": "judge compare ours.json theirs.json -o judged.json --reward letters:letters --annotations notes.json --quiet",
    "compare-rm": "judge compare ours.json theirs.json -o judged-rm.json --reward rm --quiet",
    "compare-dry": "judge compare ours.json theirs.json -o dry.json --reward rm --dry-run --speed 1e12,1e10",
    "multitask": "multitask train --data tasks -o tasks-model --weighting bandit --min-effective-tasks 1.5 --eta 0.5 --epochs 4 "
    "--width 8 --lr 0.01 --batch-size 16 --dimension 16 --quiet",
    "multitask-evaluate": "multitask evaluate tasks-model --data tasks --json",
    "restore-help": "restore --help",
}  # fmt: skip
AFTER = {
    "front": ["restore", "restore-both"], "heal-bandit": ["average"], "distil": ["collect"],
    "compare": ["respond", "respond-pre"],
    "compare-rm": ["respond", "respond-pre", "reward-model"], "compare-dry": ["respond", "respond-pre", "reward-model"],
    "multitask-evaluate": ["multitask"],
}  # fmt: skip
REWARD = '''"""The reward of the recording: a module whose source no refactor touches."""


def letters(prompts, responses):
    """Letters from a to h, and a trace of length."""
    return [sum(c in "abcdefgh" for c in r) + 0.01 * len(r) for r in responses]
'''
LEFT_OUT = {"seconds", "date", "versions", "commit", "hostname", "wall_s", "counterpoise", "begun", "ended", "python"}
CHANGING = (
    (r"\b\d+(\.\d+)?(e[+-]?\d+)? ?(s|ms|min|h|seconds|minutes)\b", "TIME"),
    (r"TIME( TIME)+", "TIME"),
    (r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?", "DATE"),
    (r"\b(python|torch|transformers|safetensors|numpy|counterpoise) \d[\w.+]*", r"\1 VERSION"),
)


def world(folder: Path) -> None:
    """The data of all jobs below `folder`."""
    import torch
    from safetensors.torch import load_file, save_file

    from multitask.text.worlds import write_folder
    from world import make

    make(folder)
    (folder / "letters.py").write_text(REWARD)
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]

    def write(name: str, rows: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("preferences.jsonl", [{"prompt": p, "chosen": "a" + p[:3], "rejected": "z" + p[2:]} for p in prompts[:24]])
    write("corpus.jsonl", [{"text": p * 3} for p in prompts[:12]])
    write("guess_text.jsonl", [{"prompt": p, "reference": p[::-1]} for p in prompts[:60]])
    write_folder(folder / "tasks")
    post = load_file(folder / "post" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("post2", "post16", "pre16"):
        shutil.copytree(folder / ("pre" if name == "pre16" else "post"), folder / name)
    save_file(
        {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in post.items()},
        folder / "post2" / "model.safetensors",
        {"format": "pt"},
    )
    for name in ("pre16", "post16"):
        file = folder / name / "model.safetensors"
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, {"format": "pt"})


def run(name: str, folder: Path) -> dict[str, Any]:
    """One command in `folder`: its exit code and what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
    environment.pop("COUNTERPOISE_DATA", None)
    command = [sys.executable, "-m", "counterpoise.cli", *JOBS[name].split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return {"code": done.returncode, "out": plain(done.stdout), "err": plain(done.stderr)}


def plain(text: str) -> list[str]:
    """Lines without what changes from run to run."""
    for pattern, instead in CHANGING:
        text = re.sub(pattern, instead, text)
    return [
        re.sub(r" +", " ", line.rstrip()) for line in text.splitlines() if "Warning" not in line and "it/s]" not in line
    ]


def content(value: Any) -> Any:
    """A json value without what changes from run to run."""
    if isinstance(value, dict):
        return {k: content(v) for k, v in value.items() if k not in LEFT_OUT}
    return [content(v) for v in value] if isinstance(value, list) else value


def files(folder: Path) -> dict[str, Any]:
    """Every file below `folder`: json and small texts as they are, the rest by its hash."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = content(json.loads(path.read_text()))
        elif "trainer" not in path.parts and path.suffix in (".jsonl", ".md", ".html"):
            text = re.sub(r"(?s)<script.*?</script>|sha256-[\w+/=]+", "", path.read_text())
            found[name] = hashlib.sha256("\n".join(plain(text)).encode()).hexdigest() if path.suffix == ".html" else [
                content(json.loads(line)) if path.suffix == ".jsonl" else line for line in plain(text)
            ]  # fmt: skip
        elif path.suffix != ".pt" and path.name != "README.md":  # torch and trl write sets in the order of the moment
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def record(folder: Path, names: list[str]) -> dict[str, Any]:
    """All jobs, two at a time, and the files that are there at the end."""
    jobs: dict[str, Any] = {}
    with ThreadPoolExecutor(2) as pool:
        waiting = {}
        for name in sorted(names, key=lambda n: (len(AFTER.get(n, [])), list(JOBS).index(n))):
            needed = [waiting[n] for n in AFTER.get(name, []) if n in waiting]
            waiting[name] = pool.submit(
                lambda name=name, needed=needed: ([f.result() for f in needed] and None) or run(name, folder)
            )
        for name, future in waiting.items():
            jobs[name] = future.result()
            print(f"{name}: exit {jobs[name]['code']}", file=sys.stderr)
    return {"jobs": jobs, "files": files(folder)}


def resumed(kept: Path, folder: Path) -> dict[str, Any]:
    """The restores of `kept` begun again in `folder`, OUT gone and every other finished piece lost: what came out otherwise."""
    before = files(kept)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    for name in ("restored", "restored-both"):
        shutil.rmtree(folder / name)
        for piece in sorted((folder / f"{name}.work").glob("*.json"))[::2]:
            piece.unlink()
    jobs = [run(name, folder) for name in ("restore", "restore-both")]
    after = files(folder)
    differ = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    return {"code": max(job["code"] for job in jobs), "out": differ, "err": []}


def compare(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Print where two recordings differ; how many places."""
    places = 0
    for kind in ("jobs", "files"):
        for name in sorted(a[kind].keys() | b[kind].keys()):
            sides = [
                json.dumps(x[kind].get(name, "(not there)"), indent=1, sort_keys=True).splitlines() for x in (a, b)
            ]
            if sides[0] != sides[1]:
                places += 1
                print(f"== {kind[:-1]} {name}", *list(difflib.unified_diff(*sides, lineterm="", n=1))[:30], sep="\n")
    print(f"{len(b['jobs'])} jobs, {len(b['files'])} files: " + (f"{places} differ" if places else "identical"))
    return places


def main() -> None:
    """See above."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("out", nargs="?", type=Path)
    parse.add_argument("--only", nargs="+", default=list(JOBS), choices=list(JOBS), metavar="JOB")
    parse.add_argument("--keep", type=Path, help="a new folder for all that is written")
    parse.add_argument("--resume", type=Path, help="what --keep of an earlier recording left")
    parse.add_argument("--compare", nargs=2, type=Path)
    asked = parse.parse_args()
    if asked.compare:
        raise SystemExit(compare(*(json.loads(p.read_text()) for p in asked.compare)) > 0)
    with tempfile.TemporaryDirectory() as place:
        folder = asked.keep or Path(place) / "world"
        folder.mkdir(parents=True)
        world(folder)
        made = record(folder, asked.only)
        if asked.resume:
            made["jobs"]["what came out otherwise when resumed"] = resumed(asked.resume, Path(place) / "resumed")
    asked.out.write_text(json.dumps(made, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
