"""Break one file of a good world, run the command that reads it, and see that it ends in a result or one clear line.

    python tests/fuzz/run.py --cases 20000 --seed 0 --out FILE

Each case is a forked process with 1 GB of address space beyond what it starts with and ten seconds of time. Case N of a
seed is always the same. FILE is written as it goes; the same command goes on from it. `--only N` shows one case, `--targets
A,B` breaks files of those kinds alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
import fuzz.environment  # noqa: I001  (first of all)
import torch
from safetensors import safe_open

from counterpoise.cli.app import app
from counterpoise.records import versions, write_json
from fuzz.cases import TARGETS, Target, make
from fuzz.mutate import KINDS

SECONDS, MEMORY = 10.0, 1 << 30
STARVED = re.compile(r"out of memory|MemoryError|DefaultCPUAllocator", re.I)


class World:
    """The good files, with every command run once, so that a forked case finds all imports done."""

    def __init__(self, folder: Path, targets: Sequence[Target] = TARGETS) -> None:
        torch.set_num_threads(1)
        self.targets = targets
        self.folder = make(folder / "good")
        self.places = folder / "case"
        bad = []
        for target in {t.command: t for t in targets}.values():
            place, hear = self._place(target, None), contextlib.redirect_stdout
            with open(os.devnull, "w") as none, contextlib.chdir(place), hear(none), contextlib.redirect_stderr(none):
                _command(target.command)  # in this process first, for its imports
            ended, said = self._end(self._begin(target, None), 300)
            if ended != "0":
                bad.append(f"{target.command}: expected the good files to work, found {ended}\n{said[-600:]}")
        assert not bad, "\n".join(bad)

    def case(self, number: int, seed: int) -> tuple[Target, str, str]:
        """The target of case `number`, how it ended ("right", "refused", or what is wrong), and what was said."""
        draw = random.Random(f"{seed} {number}")
        target = draw.choices(self.targets, [t.share for t in self.targets])[0]
        begun = time.monotonic()
        ended, said = self._end(self._begin(target, draw), SECONDS)
        return target, self._verdict(ended, said, time.monotonic() - begun), said

    def _place(self, target: Target, draw: random.Random | None) -> Path:
        shutil.rmtree(self.places, ignore_errors=True)
        shutil.copytree(self.folder, self.places, copy_function=os.link)
        if draw is not None:
            file = self.places / target.file
            content = KINDS[file.suffix](draw, file.read_bytes())
            file.unlink()
            file.write_bytes(content)
        return self.places

    def _begin(self, target: Target, draw: random.Random | None) -> int:
        place = self._place(target, draw)
        sys.stdout.flush()
        sys.stderr.flush()
        if child := os.fork():
            return child
        status = 99
        try:
            said = os.open(place / "said", os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))  # pytest has others
            os.chdir(place)
            if draw is not None:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            status = _command(target.command)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _end(self, child: int, seconds: float) -> tuple[str, str]:
        deadline = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "hang", (self.places / "said").read_text(errors="replace")
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        return str(code), (self.places / "said").read_text(errors="replace")

    def _verdict(self, ended: str, said: str, seconds: float) -> str:
        if ended == "hang":
            return "hang"
        if "Traceback (most recent call last)" in said:
            return "memory" if "MemoryError" in said or "DefaultCPUAllocator" in said else "traceback"
        if ended not in ("0", "1"):
            return f"exit {ended}"
        errors = [line for line in said.split("\n") if line.startswith("error: ")]
        if ended == "0":
            return "right" if not errors and self._whole() else "wrong result"
        told = [line for line in said.rstrip("\n").split("\n") if not line.startswith("warning: ")]
        if not errors or STARVED.search(errors[0]):
            return "memory" if errors else "silent"
        left = [
            p.name for p in self.places.iterdir() if ".partial-" in p.name or re.match(r"\..*\.[0-9a-f]{16}$", p.name)
        ]
        if left or (self.places / "out").exists():
            return "leftovers"
        return "refused" if told[-1] == errors[-1] and len(errors) == 1 else "many lines"

    def _whole(self) -> bool:
        """A checkpoint that was written can be read, and holds numbers."""
        for file in self.places.glob("out/*.safetensors"):
            with safe_open(file, "pt") as opened:
                if not all(opened.get_tensor(n).isfinite().all() for n in opened.keys()):  # noqa: SIM118
                    return False
        return True


def _command(line: str) -> int:
    sys.argv = ["counterpoise", *line.split()]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def fuzz(world: World, numbers: Sequence[int], seed: int, found: dict[str, object], after: object = None) -> None:
    """Run the cases; counts by target and the cases that ended badly go into `found`."""
    counts: dict[str, dict[str, int]] = found.setdefault("targets", {})  # type: ignore[assignment]
    failures: list[dict[str, object]] = found.setdefault("failures", [])  # type: ignore[assignment]
    for number in numbers:
        target, verdict, said = world.case(number, seed)
        counts[target.name] = dict(Counter(counts.get(target.name, {})) + Counter([verdict]))
        if verdict not in ("right", "refused"):
            tail = said.rstrip()[-1500:].replace(str(world.places), "")
            failures.append({"case": number, "target": target.name, "verdict": verdict, "said": tail})
        found["done"] = number + 1
        if callable(after):
            after()


def main() -> None:
    """The run by hand."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", type=int)
    parser.add_argument("--targets", help="comma between names; other numbers than without")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [t for t in TARGETS if t.name in asked.targets.split(",")] if asked.targets else TARGETS
        world = World(Path(folder), chosen)
        if asked.only is not None:
            target, verdict, said = world.case(asked.only, asked.seed)
            print(f"{target}\n{verdict}\n{said}")
            return
        known = asked.out is not None and asked.out.is_file()
        found = json.loads(asked.out.read_text()) if known else {}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        if known and (found["seed"], found["commit"]) != (asked.seed, commit.stdout.strip()):
            raise SystemExit(f"{asked.out}: expected a run of this seed and commit; choose another --out")
        about = {"seed": asked.seed, "commit": commit.stdout.strip(), "versions": versions()}
        found |= {"command": f"python tests/fuzz/run.py --cases {asked.cases} --seed {asked.seed}", **about}

        def keep() -> None:
            if asked.out and (found["done"] % 20 == 0 or found["done"] == asked.cases):
                write_json(asked.out, found)

        fuzz(world, range(found.get("done", 0), asked.cases), asked.seed, found, keep)
    total: Counter[str] = sum((Counter(c) for c in found["targets"].values()), Counter())
    print(f"{found['done']} cases: " + ", ".join(f"{n} {v}" for v, n in total.most_common()))
    for failure in found["failures"] if not asked.out else []:
        print(f"case {failure['case']} {failure['target']}: {failure['verdict']}\n{failure['said'][-400:]}\n")


if __name__ == "__main__":
    main()
