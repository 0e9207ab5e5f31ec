"""Two restores in two threads of one process give what each gives alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from counterpoise.language.sampling import Drawing
from counterpoise.restoration.restore import restore
from world import make, panel, searches


def test_two_restores_at_once_give_what_each_gives_alone(tmp_path: Path) -> None:
    world = make(tmp_path)

    def run(name: str, seed: int, mean: float) -> dict[str, Any]:
        drawing = Drawing(max_new_tokens=6, batch_size=32, seed=seed)
        asked = {"means": (mean,), "keep_reward": 0.5, **searches(controls=False)}
        return restore(world / "pre", world / "post", tmp_path / name, panel(world, drawing=drawing), **asked)

    asked = [(0, 0.3), (1, 0.7)]
    alone = [run(f"alone{seed}", seed, mean) for seed, mean in asked]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda a: run(f"together{a[0]}", *a), asked))
    assert alone[0]["points"] != alone[1]["points"]
    for one, other in zip(alone, together, strict=True):
        assert other["points"] == one["points"]
        assert other["pick"] == one["pick"]
