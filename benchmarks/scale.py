"""How the cost of a restore grows: time against prompts, items, points, blocks and layers, four sizes each, on the CPU.

    python benchmarks/scale.py WORK [--rounds 5]

Pairs are those of gpu.py, Llamas of random weights and 3 to 24 layers, made in WORK. Sizes are timed in turn, round after
round; medians, the line through them by least squares of relative errors, and how far the furthest median is from it, go to
benchmarks/results/scale.json. "linear" is said where that is at most a tenth.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import torch

from counterpoise.averaging.partition import partition, whole
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.preflight import preflight
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example, continuation_logprobs
from counterpoise.planning.timing import Endless
from counterpoise.records import versions, write_json
from counterpoise.search.proxies import ProxySet

LAYERS = (3, 6, 12, 24)
PROMPTS, ITEMS, POINTS, BLOCKS, NEW = (16, 32, 64, 128), (32, 64, 128, 256), (2, 4, 8, 16), (1, 3, 6, 12), 12
AS_LINEAR = 0.1


class Scale:
    """The pairs, and the pieces of a restore at any size."""

    def __init__(self, work: Path) -> None:
        self.held = {}
        for layers in LAYERS:
            shape = f"{layers} layers"
            gpu.SHAPES[shape] = {**gpu.SHAPES["tiny"], "hidden_size": 256, "intermediate_size": 640}
            gpu.SHAPES[shape] |= {"num_hidden_layers": layers, "vocab_size": 4096}
            folder = work / str(layers)
            if not (folder / "made").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                gpu.make(folder, shape, "cpu")
            pair = preflight(folder / f"pre-{shape}", folder / f"post-{shape}")
            self.held[layers] = pair, ResidentAverage(pair, dtype=torch.float32)
        draw = torch.Generator().manual_seed(0)
        self.rows: list[list[int]] = torch.randint(3, 4096, (max(ITEMS), 48), generator=draw).tolist()

    def draw(self, prompts: int, layers: int = 12) -> None:
        """Responses of NEW tokens."""
        drawing = Drawing(max_new_tokens=NEW, chat=False, batch_size=16)
        sample(self.held[layers][1].model, Endless(), [tuple(r[:16]) for r in self.rows[:prompts]], drawing)

    def score(self, items: int, layers: int = 12) -> None:
        """Two choices of 8 tokens after 32."""
        some = self.rows[:items]
        model, choices = self.held[layers][1].model, [[r[32:40], r[40:]] for r in some]
        continuation_logprobs(model, [r[:32] for r in some], choices, batch_size=16)

    def sweep(self, points: int, layers: int = 12) -> None:
        """Averages set, drawn from and scored."""
        pair, resident = self.held[layers]
        for number in range(points):
            resident.set(whole(pair.names), [number / points])
            self.draw(PROMPTS[0], layers)
            self.score(ITEMS[0], layers)

    def step(self, blocks: int, layers: int = 12) -> None:
        """A search step over 16 responses."""
        pair, resident = self.held[layers]
        examples = tuple(Example(tuple(r[:24]), tuple(r[24:])) for r in self.rows[:16])
        cut = partition(pair.shapes, blocks)
        self.moved = 0.9 - getattr(self, "moved", 0.4)  # 0.5 and 0.4 in turn
        resident.loss_and_gradient(cut, [self.moved] * len(cut), ProxySet(examples, 8).backward)


def curve(sizes: tuple[int, ...], rounds: list[list[float]]) -> dict[str, Any]:
    """Medians of the sizes, and the line through them."""
    medians = [statistics.median(of) for of in zip(*rounds, strict=True)]
    a = np.stack([np.ones(len(sizes)), np.array(sizes, float)], 1) / np.array(medians)[:, None]
    (start, each), *_ = np.linalg.lstsq(a, np.ones(len(sizes)), rcond=None)
    off = max(abs(start + each * n - t) / t for n, t in zip(sizes, medians, strict=True))
    found = {
        "sizes": sizes,
        "rounds_s": rounds,
        "medians_s": medians,
        "start_s": start,
        "each_s": each,
        "furthest": off,
    }
    return {**found, "linear": bool(off <= AS_LINEAR)}


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    scale = Scale(options.work)
    axes: dict[str, tuple[tuple[int, ...], Callable[[int], None]]] = {
        "prompts": (PROMPTS, scale.draw),
        "items": (ITEMS, scale.score),
        "points": (POINTS, scale.sweep),
        "blocks": (BLOCKS, scale.step),
        "layers": (LAYERS, lambda layers: scale.sweep(1, layers)),
    }
    seconds, curves = gpu.clock("cpu"), {}
    for name, (sizes, work) in axes.items():
        work(sizes[0])
        curves[name] = curve(sizes, [[seconds(partial(work, n)) for n in sizes] for _ in range(options.rounds)])
        c = curves[name]
        print(f"{name:8} {c['start_s']:.3f} s + {c['each_s']:.4f} s each, furthest {c['furthest']:.0%}", flush=True)
    pair, resident = scale.held[12]
    sets = [seconds(lambda i=i: resident.set(whole(pair.names), [0.3 + 0.1 * (i % 2)])) for i in range(options.rounds)]
    write_json(
        Path(__file__).parent / "results" / "scale.json",
        {
            "command": f"python benchmarks/scale.py WORK --rounds {options.rounds}",
            "commit": gpu.git("describe", "--always", "--dirty"),
            "date": time.strftime("%Y-%m-%d"),
            "seed": 0,
            "versions": versions(),
            "parameters": {n: sum(p.numel() for p in r.model.parameters()) for n, (_, r) in scale.held.items()},
            "points a minute": 60 / curves["points"]["each_s"],
            "drawn tokens a second": NEW / curves["prompts"]["each_s"],
            "set, s": statistics.median(sets),
            "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            "curves": curves,
        },
    )


if __name__ == "__main__":
    main()
