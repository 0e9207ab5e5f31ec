"""Both sides of the alignment tax: MA, HMA, LiNeS and the two-sided search on one or several pairs, resumable.

    python experiments/two_sided/run.py WORK [WORK ...] --run rsf

WORK as experiments/hma/make_post.py left it (pre/, post/, prompts.jsonl, reward.csv, the ability files, METHOD.json),
one for each training seed. Finished pieces are kept in WORK/two_sided.store: the same command goes on after a kill, or with
more curves. After every curve results/RUN-SEED.json is written anew, with every item's statistics and a list of what was
not run; `python experiments/two_sided/tables.py` renders the page from those files.

Searches see the proxy part of the prompts and POST's and PRE's own words; two curves (sum and worst ability) also see
right answers of validation items. Every point is measured on the held-out part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from curves import CURVES, MA_SWEEP, REQUIRED, Curves, Settings
from studies import SIZES, noise, openings, sizes

from counterpoise.checkpoints.preflight import preflight, scan
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.results import Measured, results, write_results
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.sampling import Drawing
from counterpoise.records import Store, versions

HERE = Path(__file__).resolve().parent
ABILITIES = (
    "choices:arc_easy.jsonl?limit=200",
    "choices:piqa.jsonl?limit=200",
    "continue:lambada_openai.jsonl?limit=200",
    "generate:multi30k.jsonl?metric=bleu&limit=40",
)
STUDIES = ("sizes", "openings", "noise")
MADE = ("rsf.json", "dpo.json", "ppo.json")


def main() -> None:
    """Parse, then run one pair after the other."""
    options = parse()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    here = Path.cwd()
    options.borrow = options.borrow and (here / options.borrow).resolve()
    results_folder = (here / options.results).resolve() if options.results else HERE / "results"
    for work in options.work:
        os.chdir(here / work)
        run_pair(options, results_folder, deadline)
        os.chdir(here)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="+")
    parser.add_argument("--run", default="rsf", help="what was aligned and how, without the seed; names the file")
    parser.add_argument("--seed", type=int, help="the training seed (default: that of make_post.py)")
    parser.add_argument("--curves", nargs="+", default=list(CURVES), help=f"of {', '.join(CURVES)}; or 'required'")
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--abilities", nargs="+", default=list(ABILITIES))
    parser.add_argument("--reward", default="sentiment:reward.csv")
    parser.add_argument("--means", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8])
    parser.add_argument("--sweep", type=float, nargs="+", default=list(MA_SWEEP), help="ratios of MA")
    parser.add_argument("--borrow", type=Path, help="another pair's results file, for the borrowed curves")
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--proxy-size", type=int, default=64)
    parser.add_argument("--max-passes", type=int, default=8)
    parser.add_argument("--calibrated", type=int, default=16, help="validation items an ability, for two curves")
    parser.add_argument("--replies", type=int, default=2, help="responses a prompt that its reward is averaged over")
    parser.add_argument("--prompt-limit", type=int, default=300)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--size-searches", nargs="+", default=["path", "exact"], choices=["path", "exact"])
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32", help="of the searches")
    parser.add_argument("--measure-dtype", help="of the measurements (default: that of the searches)")
    parser.add_argument("--no-chat-template", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="start nothing new after so long")
    parser.add_argument("--results", help="folder of the results files (default: results/ beside this file)")
    options = parser.parse_args()
    if options.curves == ["required"]:
        options.curves = list(REQUIRED)
    if unknown := [c for c in options.curves if c not in CURVES]:
        parser.error(f"--curves: unknown {unknown[0]!r}; expected some of {', '.join(CURVES)}")
    return options


def run_pair(options: argparse.Namespace, folder: Path, deadline: float | None) -> None:
    """Every curve and study of the pair in the current folder."""
    trained = made()
    if options.seed is None and trained is None:
        raise SystemExit(f"{Path.cwd()}: no {', '.join(MADE)}; give the training seed with --seed")
    seed = options.seed if options.seed is not None else int((trained or {})["settings"]["seed"])
    panel = Panel.load(
        "prompts.jsonl",
        options.reward,
        options.abilities,
        drawing=Drawing(
            n=options.replies,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            chat=not options.no_chat_template,
        ),
        limit=options.limit,
        prompt_limit=options.prompt_limit,
        device=options.device,
    )
    pair = preflight("pre", "post")
    scan(pair)
    measure_dtype = options.measure_dtype or options.dtype
    bench, judge = (
        Workbench(
            pair,
            panel,
            Store("two_sided.store"),
            dtype=getattr(torch, name),
            device=options.device,
            progress=shown,
        )
        for name in (options.dtype, measure_dtype)
    )
    settings = Settings(
        tuple(options.means),
        tuple(options.lambdas),
        tuple(options.sweep),
        options.proxy_size,
        options.max_passes,
        options.calibrated,
    )
    lender = json.loads(options.borrow.read_text(encoding="utf-8")) if options.borrow else None
    curves = Curves(bench, judge if measure_dtype != options.dtype else bench, settings, lender)
    points = [ends(bench, curves, name, ratio) for name, ratio in (("PRE", 0.0), ("POST", 1.0))]
    about: dict[str, Any] = {
        "command": command(options),
        "commit": commit(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(options.device),
        "settings": {**panel.settings, **vars(settings), "dtype": options.dtype, "measure_dtype": measure_dtype},
        "made": trained,
    }
    left = [*options.curves, *options.studies]
    failed: dict[str, str] = {}
    done: dict[str, Any] = {}

    def save() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        absent = [c for c in (*CURVES, *STUDIES) if c in left or c not in (*options.curves, *options.studies)]
        more = {"not_run": [c for c in absent if c not in failed], "failed": failed, "studies": done}
        content = results(
            points,
            run=options.run,
            seed=seed,
            reward=options.reward,
            about={**about, **more, "seconds": curves.costs},
        )
        write_results(folder / f"{options.run}-{seed}.json", content)

    for name in list(left):
        if deadline is not None and time.monotonic() > deadline:
            print(f"time is up; not run: {', '.join(left)}", flush=True)
            break
        try:
            if name in STUDIES:
                done[name] = study(name, curves, options)
            else:
                points += [measured(curves, a) for a in curves.averages(name)]
        except ValueError as error:  # a side with nothing to keep is a result, not a crash
            failed[name] = str(error)
            print(f"{name}: {error}", flush=True)
        left.remove(name)
        save()
    save()


def study(name: str, curves: Curves, options: argparse.Namespace) -> Any:
    """One of the smaller questions."""
    test = max(options.sizes)
    if name == "sizes":
        return list(sizes(curves, tuple(options.sizes), test, tuple(options.size_searches)))
    return list(openings(curves, test)) if name == "openings" else noise(curves)


def measured(curves: Curves, average: Any) -> Measured:
    """One point of a curve, scored."""
    scores = curves.measured(average)
    mean = average.cut.mean(average.ratios)
    return Measured(
        average.name,
        average.curve,
        scores,
        average.ratios,
        mean,
        {**average.settings, "blocks": average.cut.name},
    )


def ends(bench: Workbench, curves: Curves, name: str, ratio: float) -> Measured:
    """PRE or POST, scored."""
    from curves import Average

    return Measured(name, name, curves.measured(Average(name, name, bench.whole, (ratio,), {})), (ratio,), ratio)


def made() -> dict[str, Any] | None:
    """What make_post.py wrote down of the training."""
    paths = [Path(name) for name in MADE if Path(name).is_file()]
    return json.loads(paths[0].read_text(encoding="utf-8")) if paths else None


def command(options: argparse.Namespace) -> str:
    """What was typed, without this machine's paths."""
    places = {str(w) for w in options.work} | {str(options.results)}
    typed = [a for a in sys.argv[1:] if a not in places and a != "--results"]
    return " ".join(["python experiments/two_sided/run.py WORK", *typed])


def commit() -> str:
    """The commit that ran."""
    found = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(found, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def device_name(device: str) -> str:
    """The accelerator's name, or the number of threads."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"cpu, {torch.get_num_threads()} threads"


def shown(stage: str, done: int, total: int) -> None:
    """One line a finished piece."""
    if done == total:
        print(f"{time.strftime('%H:%M:%S')} {stage}: {total}", flush=True)


if __name__ == "__main__":
    main()
