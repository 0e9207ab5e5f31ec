"""Ratios from labelled and unlabelled validation data."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from adamerging import EntropySet, adamerging, token_entropy

from counterpoise.averaging.partition import layerwise, thirds
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.preflight import preflight
from counterpoise.language.scoring import Example
from test_resident import proxies
from tiny import save_pair, tiny


def test_labelled_ratios_are_as_good_as_the_best_of_a_grid(tmp_path: Path) -> None:
    pair = preflight(*save_pair(tmp_path, "gpt2", scale=0.15))
    resident, cut, data = ResidentAverage(pair), thirds(pair.names), proxies()
    found = adamerging(resident, cut, data.backward, max_passes=40, tolerance=1e-6)
    grid = {}
    for ratios in itertools.product(np.arange(0, 1.01, 0.25), repeat=3):
        resident.set(cut, ratios)
        grid[ratios] = data.nll(resident.model)
    best = min(grid, key=grid.__getitem__)
    assert found.trace[0] - grid[best] > 0.004  # there is something to find
    assert found.value <= grid[best] + 1e-4
    assert all(0 <= r <= 1 for r in found.ratios)
    assert cut.mean(found.ratios) != pytest.approx(0.5, abs=0.01)  # nothing holds the mean
    assert adamerging(ResidentAverage(pair), cut, data.backward, max_passes=4, tolerance=1e-6) == adamerging(
        resident, cut, data.backward, max_passes=4, tolerance=1e-6
    )


def test_a_wider_box_is_never_worse_and_a_start_outside_is_refused(tmp_path: Path) -> None:
    pair = preflight(*save_pair(tmp_path, scale=0.15))
    resident, cut, data = ResidentAverage(pair), thirds(pair.names), proxies()
    inside = adamerging(resident, cut, data.backward, max_passes=30)
    wider = adamerging(resident, cut, data.backward, start=np.array(inside.ratios), upper=1.5, max_passes=30)
    assert wider.value <= inside.value
    assert max(wider.ratios) <= 1.5
    with pytest.raises(ValueError, match=r"start: expected ratios in \[0, 1\], found \[0\.5, 1\.2, 0\.5\]"):
        adamerging(resident, cut, data.backward, start=np.array([0.5, 1.2, 0.5]))


def test_entropy_is_that_of_each_example_alone() -> None:
    model = tiny("llama", dtype=torch.float64)
    examples = (Example((1, 5, 9), (7, 8)), Example((4,), (3, 3, 6, 2)), Example((1, 2), (9,)))
    total = 0.0
    for e in examples:
        logits = model(torch.tensor([e.prompt + e.response])).logits.detach()[0, len(e.prompt) - 1 : -1]
        total += float(torch.distributions.Categorical(logits=logits).entropy().sum())
    assert token_entropy(model, examples).item() == pytest.approx(total, rel=1e-10)
    for batch in (1, 2, 3):
        assert EntropySet(examples, batch).backward(model) == pytest.approx(total / 7, rel=1e-10)


def test_entropy_falls_and_its_gradient_is_that_of_differences(tmp_path: Path) -> None:
    pair = preflight(*save_pair(tmp_path, scale=0.15))
    resident = ResidentAverage(pair, dtype=torch.float64)
    cut, data = layerwise(pair.names), EntropySet(proxies().examples)
    middle = np.full(len(cut), 0.5)
    _, gradient = resident.loss_and_gradient(cut, middle, data.backward)
    for k in (0, len(cut) - 1):
        ends = [
            resident.loss_and_gradient(cut, middle + s * 1e-3 * np.eye(len(cut))[k], data.backward)[0] for s in (1, -1)
        ]
        assert gradient[k] == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)
    found = adamerging(resident, cut, data.backward)
    assert found.value < found.trace[0]
