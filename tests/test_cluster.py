"""What an engine of a cluster measures with, in one process and without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.workbench import Model, Piece, Workbench
from counterpoise.language.sampling import Drawing
from counterpoise.records import Store
from counterpoise.restoration.cluster import _Carried
from world import make, panel


@pytest.mark.parametrize("behind", [False, True])
def test_a_store_in_memory_measures_what_a_folder_does(tmp_path: Path, behind: bool) -> None:
    world = make(tmp_path)
    files = panel(world, drawing=Drawing(max_new_tokens=4, batch_size=4), prompt_limit=4, limit=4)
    store = Store(tmp_path / "work")
    bench = Workbench(preflight(world / "pre", world / "post"), files, store)
    half = Model("MA 0.5", "MA", bench.whole, (0.5,))
    pieces = [Piece(half, "validation", n) for n in range(1 + len(files.abilities))]
    for piece in pieces:
        bench.piece(piece)
    bench.store = carried = _Carried({}, store if behind else None)
    for piece in pieces:
        bench.piece(piece)
    assert len(carried.values) >= len(pieces)
    for key, value in carried.values.values():
        assert store.once(key, pytest.fail) == json.loads(json.dumps(value))
