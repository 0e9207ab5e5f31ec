"""The two-sided closed form beside plain averaging and ramps, on demo worlds: forward passes alone, no search.

    python experiments/winning/closed_form.py WORK [--seeds 2]

WORK/demo-N holds a world as `experiments/demo/seeds.py --keep WORK` leaves it. For every linear layer of the blocks

    D = (post - pre) (C_A + e) (C_A + e + lambda (C_R + e))^-1

C_A, C_R are the second moments of the layer's inputs: of POST on its good responses, of PRE on its own text; e is a
hundredth of their mean diagonal. Where both sides are alike D is plain averaging with the ratio 1 / (1 + lambda), which is
what every other tensor gets. "x LiNeS 0.9" is D times LiNeS's ratio. One layer's moments are in memory at a time. Writes
results/closed-form.json after every world, and closed-form.md; finished pieces stay in WORK.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from counterpoise import demo
from counterpoise.averaging.partition import layerwise
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.measurement import Scores, above_floor, retention, reward_kept, units
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.scoring import Example
from counterpoise.records import Store, versions, write_json, write_whole
from counterpoise.search.hma import linear_ramp
from counterpoise.search.on_bench import proxies, words

HERE = Path(__file__).resolve().parent
MEANS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LAMBDAS = (0.1, 0.25, 0.5, 1.0)
RAMPS = (None, 0.9, 0.8)
SIZE, RIDGE = 96, 0.01
PART = "held-out"


def main() -> None:
    """Every world that is missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    asked, place = parser.parse_args(), HERE / "results" / "closed-form.json"
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"worlds": {}}
    for seed in range(asked.seeds):
        if str(seed) not in found["worlds"]:
            found["worlds"][str(seed)] = world(asked.work / f"demo-{seed}", seed)
            write_json(place, {**about(), "worlds": found["worlds"]})
    write_whole(HERE / "closed-form.md", page(json.loads(place.read_text(encoding="utf-8"))))


def bench_of(at: Path, seed: int) -> Workbench:
    """A demo world's pair under its panel; finished pieces in AT/pieces."""
    _, panel = demo.asked(at, demo.write_world(demo.World.invent(seed), at, seed), seed)
    return Workbench(preflight(at / "pre", at / "post"), panel, Store(at / "pieces"))


def world(at: Path, seed: int) -> list[dict[str, Any]]:
    """Points of one world: what each keeps of the reward and of the abilities, and what it cost to find."""
    bench = bench_of(at, seed)
    deep = layerwise(bench.pair.names)
    pre, post = (p.scores for p in bench.ends(PART))
    unit = units(pre, post, above_floor(pre))

    def told(name: str, method: str, scores: Scores, **more: Any) -> dict[str, Any]:
        kept = reward_kept(pre, post, scores)
        print(time.strftime("%H:%M:%S"), seed, name, kept and round(kept["value"], 3), flush=True)
        return {"name": name, "method": method, "reward": kept, "retention": retention(pre, scores, unit), **more}

    rows = []
    for mean in MEANS:
        ramps = {
            "MA": np.full(len(deep), mean),
            "LiNeS": linear_ramp(deep, mean),
            "step": linear_ramp(deep, mean, np.inf),
        }
        for method, ratios in ramps.items():
            name = f"{method} {mean:g}"
            rows.append(told(name, method, bench.point(method, deep, ratios, PART, name=name).scores, mean=mean))
    good, own = proxies(bench, SIZE), [e for rows in words(bench, SIZE).values() for e in rows]
    model = AutoModelForCausalLM.from_pretrained(at / "post", dtype=torch.float32).eval()
    for price in LAMBDAS:
        begun = time.process_time()
        filtered = closed(bench, good, own, price)
        seconds = round(time.process_time() - begun, 2)
        for ramp in RAMPS:
            name = f"closed {price:g}" + (f" x LiNeS {ramp:g}" if ramp else "")
            ratios = [1.0] * len(deep) if ramp is None else linear_ramp(deep, ramp).tolist()
            put(model, bench, filtered, price, deep.ratios(bench.pair.names, ratios))
            identity = {**bench.inputs, "closed": price, "ramp": ramp, "size": SIZE, "ridge": RIDGE}
            scores = bench.panel.measure(model, bench.tokenizer, PART, store=bench.store, model_id=identity)
            method = "closed form" if ramp is None else "closed form x LiNeS"
            rows.append(told(name, method, scores, seconds=seconds, **{"lambda": price, "ramp": ramp}))
    return rows


@torch.no_grad()
def closed(bench: Workbench, good: Sequence[Example], own: Sequence[Example], price: float) -> dict[str, Tensor]:
    """D of every linear layer of the blocks, by the name of its weight, layer after layer."""
    found: dict[str, Tensor] = {}
    for block in layerwise(bench.pair.names).blocks:
        inside = [t.removesuffix(".weight") for t in block.tensors if t.endswith(".weight")]
        sides = [moments(bench.model_at(end), inside, said) for end, said in ((1.0, good), (0.0, own))]
        for name in sides[0]:
            alike, kept = (
                s[name] + RIDGE * s[name].diagonal().mean() * torch.eye(len(s[name])).double() for s in sides
            )
            pre, post = (t.double() for t in bench.pair.tensors(f"{name}.weight"))
            # D = Delta A (A + lambda R)^-1; both are symmetric, so D^T solves (A + lambda R) D^T = A Delta^T
            found[f"{name}.weight"] = torch.linalg.solve(alike + price * kept, alike @ (post - pre).T).T
    return found


def moments(model: nn.Module, names: Sequence[str], said: Sequence[Example]) -> dict[str, Tensor]:
    """The second moments of the inputs of some linear layers, per token, float64."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    hooks = []
    for name in names:
        if isinstance(module := model.get_submodule(name), nn.Linear):

            def add(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                x = inputs[0].flatten(0, -2).double()
                sums[name] = sums.get(name, 0) + x.T @ x

            hooks.append(module.register_forward_pre_hook(add))
    for example in said:
        ids = torch.tensor([[*example.prompt, *example.response]])
        tokens += ids.numel()
        model(ids)
    for hook in hooks:
        hook.remove()
    return {name: s / tokens for name, s in sums.items()}


@torch.no_grad()
def put(
    model: nn.Module, bench: Workbench, filtered: dict[str, Tensor], price: float, ratios: dict[str, float]
) -> None:
    """Write pre + ratio D into the model; tensors without a D are averaged with the ratio / (1 + lambda)."""
    held = model.state_dict()
    for name, ratio in ratios.items():
        pre, post = (t.double() for t in bench.pair.tensors(name))
        step = filtered[name] if name in filtered else (post - pre) / (1 + price)
        held[name].copy_(pre + ratio * step)


def about() -> dict[str, Any]:
    """Command, commit and versions."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    return {"command": " ".join(sys.argv), "commit": commit, "versions": versions(), "date": time.strftime("%Y-%m-%d")}


def read_off(rows: Sequence[dict[str, Any]], share: float) -> float | None:
    """The retention of a curve where it keeps this share of the reward, on straight lines from PRE through its points to POST."""
    ends = [(0.0, 0.0), (1.0, -1.0)]
    curve = sorted([*ends, *((r["reward"]["value"], r["retention"]["value"]) for r in rows)])
    best = np.maximum.accumulate([y for _, y in curve][::-1])[::-1]  # a curve that turns back is read at its best
    return float(np.interp(share, [x for x, _ in curve], best)) if share <= curve[-1][0] else None


def page(content: dict[str, Any]) -> str:
    """The table: share of each ability's own loss that is left, where a method keeps a share of the reward."""
    methods = ("MA", "LiNeS", "step", "closed form", "closed form x LiNeS")
    lines = [
        "# The two-sided closed form, on demo worlds",
        "",
        f"`{content['command']}`, commit {content['commit']}. Held-out: the mean share of each ability's own loss that is left",
        "(by likelihood), where a method keeps this share of the reward, read off straight lines between its points.",
        "",
        "| world | reward kept | " + " | ".join(methods) + " |",
        "|---:|---:|" + "---:|" * len(methods),
    ]
    for seed, rows in content["worlds"].items():
        for share in (0.8, 0.9, 0.95):
            read = [read_off([r for r in rows if r["method"] == m], share) for m in methods]
            cells = ["–" if x is None else f"{-x:.3f}" for x in read]
            lines.append(f"| {seed} | {share:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
