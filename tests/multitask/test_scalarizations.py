"""The methods that look at losses only, each against torchjd's scalarizer or its own definition."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchjd import scalarization as torchjd

from counterpoise.multitask import (
    DWA,
    FAMO,
    IMTLL,
    RLW,
    GradNorm,
    GroupDRO,
    SmoothTchebycheff,
    Tchebycheff,
    UncertaintyWeighting,
    Uniform,
)


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(4, dtype=torch.float64, generator=generator) * 3 + 0.1 for _ in range(count)]


def value_and_gradient(scalarize, losses):
    values = losses.clone().requires_grad_()
    scalar = scalarize(values)
    scalar.backward()
    return scalar.detach(), values.grad


def assert_same(ours, theirs, losses):
    for a, b in zip(value_and_gradient(ours, losses), value_and_gradient(theirs, losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_uniform_is_torchjds_mean():
    assert_same(Uniform(4), torchjd.Mean(), batches(1)[0])


@pytest.mark.parametrize(
    ("make", "theirs", "name", "sign"),
    [(UncertaintyWeighting, torchjd.UW, "log_var", 1), (IMTLL, torchjd.IMTLL, "log_scale", -1)],
)
def test_learned_weights_are_torchjds_and_train_the_same(make, theirs, name, sign):
    ours, theirs = make(4).double(), theirs(4).double()
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (ours, theirs)]
    for losses in batches(5):
        assert_same(ours, theirs, losses)
        for optimizer in optimizers:
            optimizer.step()
        ours.step()
    learned = getattr(theirs, name)
    torch.testing.assert_close(sign * ours.log_variance_M, learned)
    assert learned.abs().max() > 0.05
    expected = 0.5 * torch.exp(-learned) if sign == 1 else learned.exp()
    assert ours.weights() == pytest.approx(expected.tolist())


def test_rlw_is_torchjds_on_the_same_normal_numbers_and_no_other_draw_moves_it(monkeypatch):
    ours, windows = RLW(4, seed=5), []
    for window, losses in enumerate(batches(3)):
        torch.manual_seed(window)
        normal = torch.from_numpy(np.random.default_rng([5, window]).standard_normal(4))
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn", lambda *size, drawn=normal, **where: drawn)
            theirs = value_and_gradient(torchjd.Random(), losses)
        for a, b in zip(value_and_gradient(ours, losses), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        windows.append(ours.weights())
        ours.step()
    assert RLW(4, seed=5).weights() == windows[0] != windows[1]
    assert RLW(4, seed=6).weights() != windows[0]
    seen = np.mean([RLW(4, seed=s).weights() for s in range(500)], axis=0)
    assert seen == pytest.approx([0.25] * 4, abs=0.03)


def test_dwa_is_torchjds_epoch_by_epoch():
    ours, theirs = DWA(4, steps_per_epoch=3), torchjd.DWA()
    for step, losses in enumerate(batches(12)):
        assert_same(ours, theirs, losses)
        ours.step()
        if step % 3 == 2:
            theirs.step()
    assert max(ours.weights()) > 1.01


def test_dwa_does_not_judge_a_task_it_has_not_seen():
    weighting = DWA(2, steps_per_epoch=1)
    for losses in ([torch.tensor(1.0), None], [torch.tensor(1.0), torch.tensor(9.0)]):
        weighting(losses)
        weighting.step()
    assert weighting.weights() == [1.0, 1.0]


@pytest.mark.parametrize("smoothing", [0.01, 0.5])
def test_smooth_tchebycheff_is_torchjds(smoothing):
    preferences, ideal = [0.1, 0.2, 0.3, 0.4], [0.1, 0.0, 0.2, 0.0]
    ours = SmoothTchebycheff(4, smoothing=smoothing, preferences=preferences, ideal=ideal)
    theirs = torchjd.STCH(smoothing, *torch.tensor([preferences, ideal], dtype=torch.float64))
    assert_same(ours, theirs, batches(1)[0])
    assert_same(SmoothTchebycheff(4, smoothing=smoothing), torchjd.STCH(smoothing), batches(1)[0])


@pytest.mark.parametrize("smoothing", [1e-3, 1e-12, 1e-30, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smooth_tchebycheff_does_not_overflow_at_a_small_mu(smoothing, dtype):
    losses = torch.tensor([1.0, 3000.0, 2.0], dtype=dtype)
    value, gradient = value_and_gradient(SmoothTchebycheff(3, smoothing=smoothing), losses)
    assert float(value) == pytest.approx(1000.0, rel=1e-6)
    assert gradient.tolist() == pytest.approx([0.0, 1 / 3, 0.0])


def test_tchebycheff_is_the_worst_task_and_the_limit_of_the_smooth_one():
    losses = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    value, gradient = value_and_gradient(Tchebycheff(3), losses)
    assert float(value) == pytest.approx(1.0)
    assert gradient.tolist() == pytest.approx([0, 1 / 3, 0])
    smooth, soft = value_and_gradient(SmoothTchebycheff(3, smoothing=1e-3), losses)
    assert float(smooth) == pytest.approx(1.0, abs=2e-3)
    torch.testing.assert_close(soft, gradient, atol=1e-6, rtol=0)
    shifted = Tchebycheff(3, preferences=[0.8, 0.1, 0.1], ideal=[0.9, 0, 0])
    assert value_and_gradient(shifted, losses)[1].tolist() == pytest.approx([0, 0.1, 0])


@pytest.mark.parametrize(
    "build",
    [
        lambda: Tchebycheff(3, preferences=[1, 1, 1]),
        lambda: Tchebycheff(3, preferences=[0.5, 0.5]),
        lambda: Tchebycheff(3, ideal=[0.0, math.nan, 0.0]),
        lambda: SmoothTchebycheff(3, smoothing=0.0),
        lambda: DWA(3, steps_per_epoch=0),
        lambda: DWA(3, steps_per_epoch=1, temperature=0),
        lambda: FAMO(3, lr=-1),
        lambda: FAMO(3, min_losses=[0.0]),
        lambda: GroupDRO(3, eta=0),
    ],
)
def test_bad_arguments_raise(build):
    with pytest.raises(ValueError, match="found"):
        build()


def test_famo_is_torchjds():
    ours, theirs = FAMO(4), torchjd.FAMO(4).double()
    for before, after in zip(batches(10)[::2], batches(10)[1::2], strict=True):
        assert_same(ours, theirs, before)
        ours.step(after)
        theirs.update(after)
        expected = torch.softmax(theirs._w.detach(), 0)
        torch.testing.assert_close(torch.tensor(ours.weights()).double(), expected, rtol=1e-6, atol=1e-7)
    assert max(ours.weights()) > 0.26


def test_famo_takes_off_what_the_losses_cannot_go_below_as_torchjd_does():
    least = [0.05, 0.0, 0.09, -0.5]
    ours, theirs = (
        FAMO(4, min_losses=least),
        torchjd.FAMO(4, min_losses=torch.tensor(least, dtype=torch.float64)).double(),
    )
    for before, after in zip(batches(6)[::2], batches(6)[1::2], strict=True):
        assert_same(ours, theirs, before)
        ours.step(after)
        theirs.update(after)
        expected = torch.softmax(theirs._w.detach(), 0)
        torch.testing.assert_close(torch.tensor(ours.weights()).double(), expected, rtol=1e-6, atol=1e-7)


def test_famo_without_losses_after_takes_the_next_batch():
    waiting, told = FAMO(4), FAMO(4)
    first, second, third = batches(3)
    for losses, after in ((first, second), (second, third)):
        told(losses)
        told.step(after)
    for losses in (first, second, third):
        waiting(losses)
        waiting.step()
    assert waiting.weights() == pytest.approx(told.weights())
    assert max(waiting.weights()) > 0.25


def test_famo_favours_the_task_that_falls_least():
    weighting = FAMO(2)
    for _ in range(20):
        weighting(torch.tensor([1.0, 1.0]))
        weighting.step(torch.tensor([0.5, 0.99]))
    assert weighting.weights()[1] > 0.6


def famo_after(*windows: list[float | None]) -> list[float]:
    weighting = FAMO(len(windows[0]), weight_decay=0.0)
    for window in windows:
        weighting([None if x is None else torch.tensor(x) for x in window])
        weighting.step()
    return weighting.weights()


def test_famo_holds_the_share_of_absent_tasks():
    falling = [[0.98**k, 0.98**k, None] for k in range(1, 100)]
    assert famo_after([1.0, 1.0, 1.0], *falling) == pytest.approx([1 / 3] * 3)
    uneven = famo_after([1.0, 1.0, 1.0], [0.5, 0.99, None])
    assert uneven[2] == pytest.approx(1 / 3, abs=1e-3)
    assert uneven[1] > 0.34


def test_famo_compares_a_task_with_when_it_was_last_seen():
    assert famo_after([1.0, 1.0], [0.9, None]) == [0.5, 0.5]  # one task: nothing to compare
    assert famo_after([1.0, 1.0], [0.9, None], [0.8, 0.1])[0] > 0.51
    told = FAMO(2)
    told(torch.tensor([1.0, 1.0]))
    told.step([torch.tensor(0.9), None])
    told([None, torch.tensor(0.5)])
    told.step()
    assert told.get_extra_state()["before"] == [None, 0.5]


def test_group_dro_is_its_update():
    weighting, log_p = GroupDRO(4, eta=0.3), torch.zeros(4, dtype=torch.float64)
    for losses in batches(5):
        assert float(weighting(losses)) == pytest.approx(float(torch.softmax(log_p, 0) @ losses))
        weighting.step()
        log_p = log_p + 0.3 * losses
    assert weighting.weights() == pytest.approx(torch.softmax(log_p, 0).tolist(), rel=1e-12)


def test_gradnorm_step_descends_on_its_own_loss():
    torch.manual_seed(4)
    layer = nn.Linear(3, 2, bias=False).double()
    x = torch.tensor([[1.0, -0.5, 2.0]], dtype=torch.float64)
    weighting = GradNorm(2, shared=layer.parameters(), asymmetry=1.5, lr=0.01)

    def losses() -> torch.Tensor:
        out = layer(x)[0]
        return torch.stack([out[0].square() + 0.1, 5 * out[1].square() + 0.1])

    start = losses().detach()
    weighting(losses()).backward()
    weighting.step()
    with torch.no_grad():
        layer.weight.mul_(0.7)
    now = losses()
    weights = torch.tensor(weighting.weights(), dtype=torch.float64).requires_grad_()
    norms = torch.stack([torch.autograd.grad(v, layer.weight, retain_graph=True)[0].norm() for v in now])
    ratios = (now / start).detach()
    target = ((weights * norms).mean() * (ratios / ratios.mean()) ** 1.5).detach()
    (gradient,) = torch.autograd.grad((weights * norms - target).abs().sum(), weights)
    before = weights.detach()
    scalar = weighting(now)
    assert float(scalar.detach()) == pytest.approx(float(before @ now.detach()))
    weighting.step()
    after = torch.tensor(weighting.weights(), dtype=torch.float64)
    assert float(after.sum()) == pytest.approx(2)
    assert torch.equal(torch.sign(after[0] - after[1] - before[0] + before[1]), -torch.sign(gradient[0] - gradient[1]))


def test_gradnorm_evens_out_gradients_of_unequal_size():
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    weighting = GradNorm(2, shared=[theta], lr=0.05)
    for _ in range(300):
        weighting(torch.stack([theta[0], 4 * theta[1]])).backward()  # frozen losses: equal rates
        weighting.step()
    ours = weighting.weights()
    assert ours[0] / ours[1] == pytest.approx(4, rel=0.15)
