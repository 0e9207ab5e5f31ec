"""What the studies of the two-sided search measure on sequences that no search saw."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import scaled_on

from counterpoise.averaging.partition import thirds
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.workbench import Workbench
from counterpoise.records import Store
from counterpoise.search.both_sides import BothSides
from counterpoise.search.on_bench import words
from world import make, panel


def test_other_examples_are_scaled_by_their_own_ends(tmp_path: Path) -> None:
    world = make(tmp_path)
    bench = Workbench(preflight(world / "pre", world / "post"), panel(world), Store(world / "work"))
    search = BothSides(bench, thirds(bench.pair.names).with_rest_block(), size=24, openings=("ab", "cd", "ef"))
    [found] = search.path((0.5,))
    elsewhere = words(bench, 12, openings=("gh",), seed=9)
    values = scaled_on(search, found, search.good, [e for rows in elsewhere.values() for e in rows])
    [truth] = search.truth([found])
    assert values["alignment"] == pytest.approx(truth["alignment"], abs=1e-5)
    assert values["retention"] != truth["retention"]["pre"]
