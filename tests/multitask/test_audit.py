"""First losses and gradients of 0, evaluation, windows that are not what was promised, and states of other settings."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from counterpoise.multitask import (
    DBMTL,
    DWA,
    FAMO,
    MGDA,
    RLW,
    BanditMTL,
    CAGrad,
    ExcessMTL,
    GradNorm,
    GroupDRO,
    divergence,
    weighting as module,
)

ONES = torch.ones(3, dtype=torch.float64)


def leaf(size: int = 2) -> torch.Tensor:
    return torch.ones(size, requires_grad=True)


def fed(weighting, losses, times=1):
    for _ in range(times):
        weighting(losses)
        weighting.step()
    return weighting


def test_excess_mtl_holds_a_task_until_its_first_gradient():
    """Heads of zeros: the first gradient on the shared layer is 0, and an excess over it would take all weight."""
    theta = leaf()
    weighting = ExcessMTL(2, shared=[theta], eta=0.5)
    for scale in (0.0, 0.0, 1.0, 1.0, 1.0):
        fed(weighting, [theta[0].square(), scale * theta[1].square()])
        assert 0.3 < weighting.weights()[0] < 0.7


def test_excess_mtl_trains_all_tasks_from_heads_of_zeros():
    torch.manual_seed(1)
    layer, heads = nn.Linear(5, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
    for head in heads:
        nn.init.zeros_(head.weight)
    weighting, x = ExcessMTL(3, shared=layer.parameters()), torch.randn(64, 5)
    optimizer = torch.optim.Adam([*layer.parameters(), *heads.parameters()], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        weighting([(h(layer(x)) - (1 + i) * x[:, :1]).square().mean() for i, h in enumerate(heads)]).backward()
        optimizer.step()
        weighting.step()
    assert min(weighting.weights()) > 0.2


@pytest.mark.parametrize("start", [0.0, -5.0])
def test_gradnorm_goes_on_from_the_first_loss_above_0(start):
    """From there on it is a run that began there, but for the other task's loss falling meanwhile, which it does not."""
    theta = leaf()
    weighting = GradNorm(2, shared=[theta])
    for k in range(60):
        second = start + 0.0 * theta[1] if k == 0 else theta[1].square()
        fed(weighting, [theta[0].square(), second])
    assert weighting.weights() == pytest.approx([1.0, 1.0], abs=0.1)
    always = GradNorm(2, shared=[theta])
    for _ in range(60):
        fed(always, [theta[0].square(), theta[1].square() - 5.0])
    assert min(always.weights()) > 0.05


@pytest.mark.parametrize("prior", [None, "uniform", "sqrt"])
def test_evaluation_is_the_weighted_sum_whatever_training_drew(prior, monkeypatch):
    weighting = BanditMTL(3, rho=0.1, prior=prior) if prior else GroupDRO(3)
    for n in range(100):
        i = (n % 10 > 5) + (n % 10 > 8)
        fed(weighting, [ONES[0] * (1 + j) if j == i else None for j in range(3)])
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(module, "sum_over_ranks", lambda values: pytest.fail("a collective in evaluation"))
    assert float(weighting.eval()(ONES)) == pytest.approx(1.0)
    weights = weighting.weights()
    assert float(weighting([None, None, 2 * ONES[2]])) == pytest.approx(2 * weights[2])
    theta = leaf()
    assert float(MGDA(2, shared=[theta]).eval()([theta[0], theta[1]]).detach()) == 2.0


@pytest.mark.parametrize("later", [[8, 8], [15, 1]])
def test_a_share_that_changes_is_named_once(later):
    weighting = GroupDRO(["a", "b"])
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for n in range(2400):
            b = int(torch.distributions.Binomial(16, torch.tensor([1 / 16, later[1] / 16][n > 1200])).sample())
            weighting([torch.tensor(1.0), torch.tensor(1.0) if b else None], [16 - b, b])
            weighting.step()
    changed = [str(w.message) for w in said if "not what they were" in str(w.message)]
    assert len(changed) == (later[1] == 8)
    assert not changed or ("'b' from 0.06" in changed[0] and "call reset()" in changed[0])


@pytest.mark.parametrize("prior", ["sqrt", "proportional"])
def test_the_weights_in_use_stay_in_the_ball_around_a_prior_that_moves(prior):
    weighting, random = BanditMTL(3, rho=0.1, prior=prior), torch.Generator().manual_seed(0)
    for _ in range(100):
        i = int(torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), 1, generator=random))
        values = torch.ones(3, dtype=torch.float64, requires_grad=True)
        share = weighting.share_of_rows([float(j == i) for j in range(3)])[i]
        scalar = weighting([x * (1 + 2 * i) if j == i else None for j, x in enumerate(values)])
        p = torch.tensor(weighting._weights(weighting._center_now), dtype=torch.float64)
        center = torch.tensor(weighting._center_now, dtype=torch.float64)
        assert divergence(p.log(), center) <= 0.1 + 1e-6
        assert float(scalar.detach()) / (1 + 2 * i) * share == pytest.approx(float(p[i]), rel=1e-6)
        weighting.step()


def test_window_counts_below_the_first_call_are_refused():
    with pytest.raises(RuntimeError, match="hold 4 of task 0, window_counts promised 2"):
        BanditMTL(2, rho=0.1)(torch.ones(2), [4, 4], [2, 2])


def test_a_window_split_by_task_is_refused_where_the_whole_batch_is_needed():
    theta = leaf()
    with pytest.raises(RuntimeError, match="whole batch in one call"):
        MGDA(2, shared=[theta])([theta[0], None], [1, 0], [1, 1])


def test_settings_are_those_of_the_object_not_of_the_state():
    theta = leaf()
    for build, settings in ((FAMO, {"weight_decay": 0.0}), (GradNorm, {"shared": [theta]})):
        old, new = build(2, **settings), build(2, **settings | {"lr": 0.5})
        fed(old, [theta[0].square() + 1, theta[1].square() + 2], 3)
        new.load_state_dict(old.state_dict())
        assert new.weights() == old.weights()
        before = new.weights()[0]
        fed(new, [theta[0].square() + 3, theta[1].square() + 2])
        fed(old, [theta[0].square() + 3, theta[1].square() + 2])
        assert abs(new.weights()[0] - before) > 5 * abs(old.weights()[0] - before) > 0


def test_a_refused_state_changes_nothing():
    old, new = fed(BanditMTL(2, rho=0.1), torch.ones(2)), BanditMTL(2, rho=0.1, prior=[1, 2])
    with pytest.raises(ValueError, match="prior"):
        new.load_state_dict(old.state_dict())
    assert math.isnan(new.last_losses[0])
    assert new.updates == 0


@pytest.mark.parametrize("method", [ExcessMTL, DBMTL])
def test_a_state_of_other_shared_parameters_is_refused(method):
    two, three = leaf(2), leaf(3)
    old, new = method(2, shared=[two]), method(2, shared=[three])
    fed(old, [two[0].square(), two[1].square()])
    with pytest.raises(ValueError, match="expected the state of 3 shared numbers, found that of 2"):
        new.load_state_dict(old.state_dict())
    fed(new, [three[0].square(), three[1].square()])


@pytest.mark.parametrize("method", [FAMO, DBMTL])
def test_a_loss_below_the_logarithm_is_named(method):
    theta = leaf()
    weighting = method(["a", "b"], **({"shared": [theta]} if method is DBMTL else {}))
    weighting([theta[0] + 1.0, theta[1] - 1.5])
    with pytest.raises(
        ValueError, match=r"expected losses of at least 0, found -0\.5 of task 'b': \w+ takes logarithms"
    ):
        weighting.step()


def test_a_method_of_weights_needs_no_combine_of_its_own():
    weighting = fed(fed(DWA(3, steps_per_epoch=1), ONES), ONES * torch.tensor([1.0, 2.0, 4.0]))
    assert float(weighting(ONES)) == pytest.approx(3.0)


def test_a_small_temperature_is_no_division_by_zero():
    assert fed(BanditMTL(10, rho=0.1, prior=3e-4), torch.ones(10)).weights() == pytest.approx([0.1] * 10)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        (GradNorm, {"asymmetry": math.nan}, "asymmetry must be a number in [0, inf), found nan"),
        (GradNorm, {"lr": 0.0}, "lr must be a number in (0, inf), found 0.0"),
        (CAGrad, {"radius": math.nan}, "radius must be a number in [0, inf), found nan"),
        (DWA, {"steps_per_epoch": 1.5}, "steps_per_epoch must be a whole number in [1, inf), found 1.5"),
        (ExcessMTL, {"warmup": 1.5}, "warmup must be a whole number in [1, inf), found 1.5"),
        (DBMTL, {"forgetting": 1.0}, "forgetting must be a number in [0, 1), found 1.0"),
        (FAMO, {"lr": "0.1"}, "lr must be a number in [0, inf), found '0.1'"),
        (RLW, {"seed": -1}, "seed must be a whole number in [0, inf), found -1"),
        (GroupDRO, {"eta": None}, "eta must be a number in (0, inf), found None"),
        (GroupDRO, {"half_life": "1"}, "half_life must be a number in [0, inf), found '1'"),
        (BanditMTL, {"rho": 0.1, "micro_batches": 1.5}, "micro_batches must be a whole number in [1, inf), found 1.5"),
        (BanditMTL, {"rho": 0.1, "exploration": 1.1}, "exploration must be a number in [0, 1], found 1.1"),
        (BanditMTL, {"rho": 0.1, "drawn_by": 5}, 'drawn_by must be None, "p" or one probability per task, found 5'),
        (BanditMTL, {"rho": 0.1, "prior": True}, "a temperature above 0 or a number per task, found True"),
    ],
)
def test_settings_out_of_range_are_named(method, settings, expected):
    shared = {"shared": [leaf()]} if method in (GradNorm, CAGrad, ExcessMTL, DBMTL) else {}
    with pytest.raises(ValueError, match=re.escape(expected)):
        method(2, **shared, **settings)


def test_units_are_in_the_repr():
    assert "normalize=[1.0, 2.0]" in repr(BanditMTL(2, rho=0.1, normalize=[1, 2]))


def test_numbers_of_numpy_are_numbers():
    assert BanditMTL(np.int64(3), rho=0.1, eta=np.float32(0.5), micro_batches=np.int32(2)).tasks == ("0", "1", "2")


def test_losses_too_large_to_square_are_no_error():
    assert fed(GroupDRO(2), torch.tensor([1e200, 0.0], dtype=torch.float64)).metrics()["task_variance"] == math.inf
