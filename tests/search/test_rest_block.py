"""Embeddings, final norm and head with a ratio of their own: on disk, in memory and in the gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from counterpoise.averaging.average import average
from counterpoise.averaging.mix import mix
from counterpoise.averaging.partition import OUTSIDE, layerwise, thirds
from counterpoise.averaging.recipe import Recipe
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.preflight import preflight
from test_resident import proxies
from tiny import save_pair


def test_a_recipe_with_it_makes_the_same_checkpoint_again(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, "gpt2")
    pair = preflight(pre, post)
    cut = thirds(pair.names).with_rest_block()
    recipe = Recipe(cut, (0.1, 0.5, 0.9, 0.3))
    assert Recipe.from_json(recipe.to_json()).partition == cut
    average(pre, post, tmp_path / "a", recipe)
    again = Recipe.read(tmp_path / "a" / "recipe.json")
    assert (again.partition, again.ratios) == (cut, recipe.ratios)
    average(pre, post, tmp_path / "b", again)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("a", "b"))
    ratios = cut.ratios(list(one), recipe.ratios)
    assert {ratios[n] for n in cut.blocks[-1].tensors} == {0.3}
    for name, tensor in one.items():
        assert torch.equal(tensor, mix(*pair.tensors(name), ratios[name]))
        assert torch.equal(tensor, two[name])
    assert OUTSIDE in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_gradient_is_what_the_mean_ratio_shared_out(tmp_path: Path, family: str) -> None:
    pair = preflight(*save_pair(tmp_path, family, dtype=torch.float64))
    model, cut = ResidentAverage(pair), layerwise(pair.names)
    wider = cut.with_rest_block()
    at = np.full(7, 0.4)
    shared = model.loss_and_gradient(cut, at[:6], proxies().backward)
    own = model.loss_and_gradient(wider, at, proxies().backward)
    assert own[0] == shared[0]
    np.testing.assert_allclose(own[1][:6] + own[1][6] / 6, shared[1], rtol=1e-7, atol=1e-10)
    h = 1e-3
    moved = [model.loss_and_gradient(wider, at + h * s * np.eye(7)[6], proxies().backward)[0] for s in (1, -1)]
    assert own[1][6] == pytest.approx((moved[0] - moved[1]) / (2 * h), rel=1e-3, abs=1e-6)
