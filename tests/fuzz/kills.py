"""Kill commands at random moments, and see that nothing torn stands at OUT and that the same command makes up for it.

    python tests/fuzz/kills.py --kills 200 --seed 0 --out FILE

After each kill OUT is absent or whole; the same command again gives what it gives when nobody kills it; and no temporary
is left anywhere. Commands are forked with all imports done, so that the moments fall into the work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
import fuzz.environment  # noqa: F401, I001  (first of all)
import torch

from counterpoise.checkpoints import files
from counterpoise.cli.app import app
from counterpoise.records import versions, write_json
from multitask.text.worlds import write_folder
from world import make

PANEL = "--prompts prompts.jsonl --reward world:early_letters --max-new-tokens 6 --quiet"
COMMANDS = {
    "average": "average pre post -o out --ratios 0.1,0.5,0.9 --quiet",
    "merge": "merge pre post post -o out --method dare-ties --quiet",
    "restore": f"restore pre post -o out {PANEL} --abilities choices:guess.jsonl --abilities continue:text.jsonl --mean 0.5 "
               "--proxy-size 12 --prompt-limit 30 --no-controls",
    "align": f"align pre -o out --method rsf {PANEL} --iterations 2 --prompts-per-iteration 8 --n 2 --batch-size 8",
    "multitask train": "multitask train --data tasks -o out --epochs 2 --width 4 --dimension 8 --quiet",
}  # fmt: skip
SIGNALS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
PASSING = {"seconds", "date", "command", "out", "work"}
"""Keys whose values are another at every run."""
TEMPORARY = re.compile(r"\..+\.partial-[0-9a-f]{8}|\..+\.\d+\.[0-9a-f]{16}")


class World:
    """A tiny world, and what each command writes there when nobody kills it."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        (folder / "good").mkdir()
        self.good, self.place = make(folder / "good"), folder / "place"
        write_folder(self.good / "tasks", colours=80, animals=80)
        self.whole: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        for name in COMMANDS:
            self._fresh()
            with chdir(self.place):  # for its imports
                _here(self.place, COMMANDS[name])
            self._fresh()
            begun = time.monotonic()
            ended, said = self._end(self._begin(name), 300)
            self.seconds[name] = time.monotonic() - begun
            assert ended == 0, f"{name}: expected it to work when nobody kills it, found {ended}\n{said}"
            self.whole[name] = _content(self.place / "out")
            assert self.whole[name], f"{name}: expected a result, found none\n{said}"

    def kill(self, number: int, seed: int) -> tuple[str, str, str]:
        """The command, the signal, and what came of it: "finished", "stopped", or what is wrong."""
        draw = random.Random(f"{seed} {number}")
        name, sign = list(COMMANDS)[number % len(COMMANDS)], list(SIGNALS)[number % len(SIGNALS)]  # each pair in turn
        self._fresh()
        child = self._begin(name)
        time.sleep(draw.random() * 1.05 * self.seconds[name])
        with suppress(ProcessLookupError):
            os.kill(child, sign)
            if draw.random() < 0.3:  # an impatient user
                time.sleep(0.005 * draw.random())
                os.kill(child, sign)
        ended, said = self._end(child, 60)
        return name, sign.name, self._verdict(name, ended, SIGNALS[sign], said)

    def _verdict(self, name: str, ended: int, expected: int, said: str) -> str:
        out = self.place / "out"
        if ended not in (0, expected) or "Traceback" in said or "Exception ignored" in said:
            return f"ended with {ended}: {said[-600:]}"
        if there := out.exists():
            if _content(out) != self.whole[name]:
                return "torn: " + _difference(_content(out), self.whole[name])
        elif ended == 0:
            return "nothing written"
        if not there:
            again, said = self._end(self._begin(name), 300)
            if again != 0:
                return f"the same command again ended with {again}: {said[-600:]}"
            if _content(out) != self.whole[name]:
                return "another result: " + _difference(_content(out), self.whole[name])
            if left := [str(p.relative_to(self.place)) for p in self.place.rglob(".*") if TEMPORARY.fullmatch(p.name)]:
                return f"left: {left}"
        return "finished" if there else "stopped"

    def _fresh(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.good, self.place, copy_function=os.link)

    def _begin(self, name: str) -> int:
        sys.stdout.flush()
        # Until the child has its own way out, a signal would take it through the parent's, which removes the world.
        held = set(SIGNALS) - {signal.SIGKILL}
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        if child := os.fork():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
            return child
        status = 99
        files._swept.clear()  # a command by itself has swept no folder yet
        try:
            said = os.open(self.place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
            status = _here(self.place, COMMANDS[name])
            signal.pthread_sigmask(signal.SIG_BLOCK, held)  # or one could still take the way that removes the world
        except KeyboardInterrupt:  # before or after the command
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _end(self, child: int, seconds: float) -> tuple[int, str]:
        deadline = time.monotonic() + seconds
        while not (found := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 124, "hang"
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(found[1])
        said = self.place / "said"
        code = 143 if code == -signal.SIGTERM else code  # before the command heeds it
        return code, said.read_text(errors="replace") if said.is_file() else ""


def _here(place: Path, line: str) -> int:
    os.chdir(place)
    sys.argv = ["counterpoise", *line.split()]
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _content(out: Path) -> dict[str, Any]:
    """Every file of a folder: its bytes; of json what does not tell of times; of pages that they are there."""
    found: dict[str, Any] = {}
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        text = file.read_bytes()
        if file.suffix in (".json", ".jsonl"):
            found[str(file.relative_to(out))] = [_lasting(json.loads(x)) for x in
                                                 (text.splitlines() if file.suffix == ".jsonl" else [text])]  # fmt: skip
        else:
            found[str(file.relative_to(out))] = len(text) > 0 if file.suffix in (".html", ".md") else text
    return found


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in PASSING}
    return [_lasting(v) for v in value] if isinstance(value, list) else value


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    return ", ".join(n for n in {**found, **wanted} if found.get(n) != wanted.get(n))


def main() -> None:
    """The run by hand."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    counts: dict[str, Counter[str]] = {}
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for number in range(asked.kills):
            name, sign, verdict = world.kill(number, asked.seed)
            counts.setdefault(f"{name}, {sign}", Counter())[
                verdict if verdict in ("finished", "stopped") else "failed"
            ] += 1
            if verdict not in ("finished", "stopped"):
                failures.append({"kill": number, "command": name, "signal": sign, "verdict": verdict})
                print(failures[-1])
            if asked.out:
                about = {"seed": asked.seed, "commit": commit.stdout.strip(), "versions": versions()}
                told = {"command": f"python tests/fuzz/kills.py --kills {asked.kills} --seed {asked.seed}", **about}
                write_json(asked.out, {**told, "kills": number + 1, "counts": counts, "failures": failures})
    print(f"{asked.kills} kills, {len(failures)} failed: {dict(sum(counts.values(), Counter()))}")


if __name__ == "__main__":
    main()
