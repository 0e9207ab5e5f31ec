"""The Fisher model: against autograd's Hessian, against brute force over the box, and end to end."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from fisher import Moved, Quadratic, block_fisher, fisher, fisher_path

from counterpoise.averaging.partition import thirds
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.scoring import response_tokens, score_responses
from counterpoise.records import Store
from counterpoise.search.both_sides import BothSides
from search.pairs import resident, said
from world import make, panel


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_it_is_the_hessian_of_the_divergence_from_the_model_itself(tmp_path: Path, anchor: float) -> None:
    """KL(anchor || theta(r)), by double backward, with the tensors outside the layers at the mean ratio."""
    model, cut = resident(tmp_path)
    examples = said(model, cut, anchor, count=3)
    found = block_fisher(model, cut, [anchor] * len(cut), examples, batch_size=2)

    names = dict(model.model.named_parameters())
    model.model.set_attn_implementation("eager")

    def logits(r: torch.Tensor) -> torch.Tensor:
        of = {t: r[k] for k, b in enumerate(cut.blocks) for t in b.tensors} | dict.fromkeys(cut.rest, r.mean())
        moved = {n: torch.lerp(*model.pair.tensors(n), of[n]) for n in names}
        scored = score_responses(Moved(model.model, moved), examples)
        return scored.logits_BCV[scored.mask_BC].log_softmax(-1)

    start = torch.full((len(cut),), anchor, dtype=torch.float64)
    own = logits(start).detach()
    hessian = torch.autograd.functional.hessian(lambda r: (own.exp() * (own - logits(r))).sum(), start)
    # Llama's norms compute in float32, also in a float64 model.
    np.testing.assert_allclose(found, hessian.numpy() / response_tokens(examples), rtol=1e-5, atol=2e-8)


def test_the_models_own_attention_is_put_back_and_batches_do_not_count(tmp_path: Path) -> None:
    model, cut = resident(tmp_path)
    before = model.model.config._attn_implementation
    examples = said(model, cut, 0.0, count=4)
    one, all_at_once = (block_fisher(model, cut, [0.0] * 6, examples, batch_size=n) for n in (1, 4))
    assert model.model.config._attn_implementation == before
    np.testing.assert_allclose(one, all_at_once, rtol=1e-9)
    np.testing.assert_allclose(one, one.T, rtol=1e-12)
    assert np.linalg.eigvalsh(one)[0] > -1e-12


def test_a_quadratic_meets_both_ends() -> None:
    draw = np.random.default_rng(0)
    factor = draw.normal(size=(5, 3))
    for anchor in (0.0, 1.0):
        g = 0.1 * draw.normal(size=3)
        side = Quadratic.meeting_both_ends(anchor, g, factor.T @ factor, 1.0)
        assert side.value([anchor] * 3) == 0.0
        assert side.value([1 - anchor] * 3) == pytest.approx(1.0)
    steep = Quadratic.meeting_both_ends(0.0, np.ones(3), factor.T @ factor, 1.0)
    assert steep.stretch == 0.0
    with pytest.raises(ValueError, match="anchor: expected 0"):
        Quadratic.meeting_both_ends(0.5, np.ones(3), np.eye(3), 1.0)
    with pytest.raises(ValueError, match="a positive sum"):
        Quadratic.meeting_both_ends(0.0, np.ones(3), np.zeros((3, 3)), 1.0)


def test_every_lambda_is_the_minimum_over_the_box() -> None:
    draw = np.random.default_rng(1)
    a, b = (draw.normal(size=(4, 3)) for _ in range(2))
    alignment = Quadratic.meeting_both_ends(1.0, np.array([-0.1, 0.0, -0.2]), a.T @ a, 1.0)
    retention = Quadratic.meeting_both_ends(0.0, np.zeros(3), b.T @ b, 1.0)
    grid = np.array(list(itertools.product(np.linspace(0, 1, 41), repeat=3)))
    for lam, ratios in zip((0.3, 3.0), fisher_path(alignment, retention, [0.3, 3.0]), strict=True):
        least = min(alignment.value(r) + lam * retention.value(r) for r in grid)
        assert alignment.value(ratios) + lam * retention.value(ratios) <= least + 1e-9


def test_the_model_of_a_real_pair_gives_up_more_retention_at_a_lower_price(tmp_path: Path) -> None:
    world = make(tmp_path)
    bench = Workbench(preflight(world / "pre", world / "post"), panel(world), Store(tmp_path / "work"))
    search = BothSides(bench, thirds(bench.pair.names).with_rest_block(), size=24, openings=("ab", "cd", "ef"))
    low, high = fisher(search, (0.5, 2.0), sequences=6)
    assert low.retention["pre"] >= high.retention["pre"]
    assert fisher(search, (0.5, 2.0), sequences=6) == [low, high]
