"""The two-sided search on a workbench: a pair that RSF really aligned, nothing done twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterpoise.averaging.partition import thirds
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.workbench import Workbench
from counterpoise.records import Store
from counterpoise.search.both_sides import BothSides
from counterpoise.search.candidates import row
from world import make, panel

LAMBDAS = (0.5, 2.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("world"))


def bench(world: Path) -> Workbench:
    return Workbench(preflight(world / "pre", world / "post"), panel(world), Store(world / "work"))


def search(world: Path, **settings: Any) -> BothSides:
    on = bench(world)
    options = {"size": 24, "openings": ("ab", "cd", "ef"), **settings}
    return BothSides(on, thirds(on.pair.names).with_rest_block(), **options)


def test_ratios_are_found_once(world: Path) -> None:
    first = search(world)
    drawn, searched = first.path(LAMBDAS), first.exact(LAMBDAS, max_passes=4)
    assert first.diagonal.passes == 10
    assert [f.weight for f in drawn] == list(LAMBDAS)
    for f in (*drawn, *searched):
        assert len(f.ratios) == 4
        assert all(0 <= r <= 1 for r in f.ratios)
        assert set(f.retention) == {"pre"}
    for f, truth in zip(searched, first.truth(drawn), strict=True):  # the descent cannot end above its start
        assert f.value <= truth["alignment"] + f.weight * truth["retention"]["pre"] + 1e-6
    again = search(world)
    assert again.path(LAMBDAS) == drawn
    assert again.exact(LAMBDAS, max_passes=4) == searched
    assert "resident" not in vars(again.bench)  # no model was loaded: all of it came from the store


def test_the_truth_is_told_beside_the_path(world: Path) -> None:
    on = search(world)
    found = on.path(LAMBDAS)
    truth = on.truth(found[:1])[0]
    assert row(found[0], "path", truth)["measured"] == truth


def test_with_an_adversary_the_sets_stay_apart(world: Path) -> None:
    found = search(world, rho=0.3, calibrated=6)
    assert {"text", "prompts"} <= set(found.diagonal.retention)
    assert set(found.left_out) | set(found.diagonal.retention) == {"text", "prompts", "guess"} | (
        set(found.measured["retention"]) - {"prompts", "guess"}
    )
    with pytest.raises(ValueError, match="min_effective_sets: expected a number from 1 to"):
        assert search(world, calibrated=6, min_effective_sets=9.0).radius
    plain, guarded = (search(world, rho=rho, calibrated=6).path([1.0])[0] for rho in (0.0, 0.3))
    assert max(guarded.retention.values()) <= max(plain.retention.values()) + 1e-6
    assert sum(guarded.shares.values()) == pytest.approx(1.0)


def test_what_cannot_be_searched_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match="rho: expected a finite number >= 0"):
        search(world, rho=-1.0)


def test_ratios_are_plain_numbers(world: Path) -> None:
    found = search(world).path([1.0])[0]
    assert all(type(r) is float for r in found.ratios)
    assert not isinstance(found.alignment, np.floating)
