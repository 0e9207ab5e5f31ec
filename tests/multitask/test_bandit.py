"""BanditMTL as a module: what is its own beside the table in test_weightings.py."""

import math
import warnings

import pytest
import torch

from counterpoise.multitask import BanditMTL, GroupDRO, Uniform, best_response, mirror_step

from .toy import TASKS, Toy, rows


def loss_tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_three_lines_weight_then_ascend():
    balance = BanditMTL(TASKS, min_effective_tasks=2, eta=0.5)
    assert balance.rho == pytest.approx(math.log(1.5))
    log_p = [-math.log(3)] * 3
    for seed in range(5):
        losses = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
        values = losses.clone().requires_grad_()
        scalar = balance(values)
        p = torch.tensor(log_p, dtype=torch.float64).exp()
        torch.testing.assert_close(balance.probabilities(), p, rtol=1e-12, atol=0)
        assert float(scalar.detach()) == pytest.approx(float(p @ losses), rel=1e-12)
        scalar.backward()
        torch.testing.assert_close(values.grad, p, rtol=1e-12, atol=0)  # weights detached
        balance.step()
        log_p, _ = mirror_step(log_p, losses.tolist(), balance.rho, 0.5)


def test_gradients_are_those_of_finite_differences():
    toy, balance = Toy(), BanditMTL(TASKS, rho=0.3)
    balance(torch.tensor([1.0, 3.0, 2.0]))
    balance.step()
    balance.eval()
    batch = rows(6, 0)
    balance(*toy.losses(*batch)).backward()
    weight, h = toy.shared.weight, 1e-6
    for i, j in ((0, 0), (2, 3), (4, 1)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, j] += sign * h
                values.append(float(balance(*toy.losses(*batch))))
                weight[i, j] -= sign * h
        assert float(weight.grad[i, j]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-9)


def test_danskin_through_a_model():
    toy, rho, h = Toy(), 0.3, 1e-5
    batch = rows(6, 0)

    def robust() -> torch.Tensor:
        losses = torch.stack(list(toy.losses(*batch)[0].values()))
        return best_response(losses.detach(), rho) @ losses

    robust().backward()
    bias = toy.shared.bias
    for i in range(5):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[i] += sign * h
                values.append(float(robust()))
                bias[i] -= sign * h
        assert float(bias.grad[i]) == pytest.approx((values[0] - values[1]) / (2 * h), abs=1e-8)


def test_micro_batches_without_window_counts_move_p_as_the_big_batch_does():
    toy = Toy()
    x, y, task = rows(8, 0, tasks=[0, 0, 1, 1, 2, 2, 0, 1])
    parts, whole = BanditMTL(TASKS, rho=0.4, micro_batches=4), BanditMTL(TASKS, rho=0.4)
    for i in range(0, 8, 2):
        parts(*toy.losses(x[i : i + 2], y[i : i + 2], task[i : i + 2]))
    whole(*toy.losses(x, y, task))
    parts.step()
    whole.step()
    torch.testing.assert_close(parts.probabilities(), whole.probabilities(), rtol=0, atol=1e-12)
    assert not torch.allclose(whole.probabilities(), torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts the synchronisations of a GPU")
@pytest.mark.parametrize("calls", [1, 4])
def test_a_gpu_waits_for_the_host_at_most_once_a_step(calls):
    balance = BanditMTL(3, rho=0.3)
    losses = [torch.rand(3, device="cuda", requires_grad=True) for _ in range(3 * calls)]
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for i, x in enumerate(losses, start=1):
            balance(x, [1, 1, 1], [calls] * 3).backward()
            if i % calls == 0:
                balance.step()
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) <= 3


def test_losses_that_wait_give_the_sums_of_those_that_do_not(monkeypatch):
    """On a GPU the window keeps the losses until it closes; here the same, without one."""
    from counterpoise.multitask.losses import Window, gather

    calls = [
        ([1.1, None, 0.3], [2, 0, 1]),
        ([0.7, 0.2, None], [1, 3, 0]),
        ([0.1, 0.9, 0.4], [1, 1, 1]),
    ]
    direct, waiting = Window(3), Window(3)
    monkeypatch.setattr(waiting, "_fold", lambda: None)
    for values, counts in calls:
        batch = gather(TASKS, [None if x is None else torch.tensor(x) for x in values], counts)
        direct.add(batch, None)
        waiting.add(batch, None)
    monkeypatch.undo()
    assert waiting.close() == direct.close()


def test_one_call_too_many_for_the_promised_window():
    balance = BanditMTL(2, rho=0.3)
    balance(loss_tensor(1.0, 2.0), [1, 2], [2, 4])
    with pytest.raises(RuntimeError, match="window_counts changed"):
        balance(loss_tensor(1.0, 2.0), [1, 2], [2, 5])
    balance(loss_tensor(1.0, 2.0), [1, 2], [2, 4])
    with pytest.raises(RuntimeError, match=r"hold 3 of task 0, window_counts promised 2"):
        balance(loss_tensor(1.0, 2.0), [1, 2], [2, 4])
    balance.step()
    with pytest.raises(RuntimeError, match="hold 1 of task 0, window_counts promised 0"):
        balance(loss_tensor(1.0, 2.0), [1, 1], [0, 1])


def test_hold_keeps_the_share_of_absent_tasks():
    balance = BanditMTL(4, rho=1.2, missing="hold")
    balance(loss_tensor(1.0, 2.0, 3.0, 1.5))
    balance.step()
    before = balance.probabilities()
    balance([torch.tensor(0.1), None, torch.tensor(0.2), None])
    balance.step()
    after = balance.probabilities()
    assert float(after[[1, 3]].sum()) == pytest.approx(float(before[[1, 3]].sum()), rel=1e-9)
    assert float(after[1] / after[3]) == pytest.approx(float(before[1] / before[3]), rel=1e-9)
    assert after[2] / after[0] > before[2] / before[0]


def test_hold_is_not_zero_filling():
    held, filled = BanditMTL(3, rho=0.5), BanditMTL(3, rho=0.5)
    for _ in range(20):
        held([torch.tensor(1.0), torch.tensor(1.0), None])
        held.step()
        filled(torch.tensor([1.0, 1.0, 0.0]))
        filled.step()
    assert float(held.probabilities()[2]) == pytest.approx(1 / 3)
    assert float(filled.probabilities()[2]) < 0.1


def test_importance_is_unbiased_for_the_loss_and_the_ascent():
    drawn_by, losses = [0.6, 0.3, 0.1], [0.5, 1.0, 2.0]
    balance = BanditMTL(3, rho=0.5, drawn_by=drawn_by)
    scalars, seen = [], []
    for i, chance in enumerate(drawn_by):
        one = [torch.tensor(losses[k], dtype=torch.float64) if k == i else None for k in range(3)]
        balance(loss_tensor(*losses))
        balance.discard()
        scalars.append(chance * float(balance(one)))
        balance.step()
        fed = [losses[i] / chance if k == i else 0.0 for k in range(3)]
        log_p, _ = mirror_step([0.0] * 3, fed, rho=0.5, eta=0.5)
        seen.append((balance.probabilities(), torch.tensor(log_p, dtype=torch.float64).exp()))
        balance = BanditMTL(3, rho=0.5, drawn_by=drawn_by)
    assert sum(scalars) == pytest.approx(sum(losses) / 3)  # at the start p is uniform
    for ours, fed in seen:
        torch.testing.assert_close(ours, fed, rtol=1e-12, atol=0)


def test_drawing_by_p_and_weighting_by_p_exclude_each_other():
    sampler, weigher = BanditMTL(3, rho=0.5, drawn_by="p", exploration=0.1), BanditMTL(3, rho=0.5)
    with pytest.raises(RuntimeError, match="count it twice"):
        sampler(torch.ones(3))
    with pytest.raises(RuntimeError, match="count it twice"):
        weigher.draw(4)
    with pytest.raises(RuntimeError, match="drawn_by"):
        weigher.observe(torch.ones(3))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn = sampler.draw(16, generator)
        counts = torch.bincount(drawn, minlength=3).tolist()
        sampler.observe(torch.tensor([1.0, 3.0, 1.0]), counts)
        sampler.step()
    p = sampler.probabilities()
    assert p.dtype == torch.float64
    assert p.argmax() == 1
    assert float(p[1]) > 0.6
    assert float(p.min()) >= 0.1 / 3 - 1e-12
    shares = torch.bincount(sampler.draw(20_000, generator), minlength=3) / 20_000
    torch.testing.assert_close(shares.double(), p, atol=0.02, rtol=0)


def test_normalize_divides_by_the_units_given():
    balance = BanditMTL(TASKS, rho=0.5, normalize=dict(zip(TASKS, (4.0, 1.0, 2.0), strict=True)))
    for again in range(2):
        balance(torch.tensor([8.0, 2.0, 4.0], requires_grad=True))
        balance.step()
        assert balance.weights() == pytest.approx([1 / 3] * 3), again
        balance.reset()
    balance.load_state_dict(balance.state_dict())
    with pytest.raises(ValueError, match="normalize must be above 0 for every task, found"):
        BanditMTL(TASKS, rho=0.5, normalize=[1.0, 0.0, 1.0])


def test_normalize_divides_by_the_first_loss():
    balance = BanditMTL(2, rho=0.5, normalize=True)
    balance(loss_tensor(10.0, 0.1))
    balance.step()
    torch.testing.assert_close(balance.probabilities(), torch.tensor([0.5, 0.5], dtype=torch.float64))
    losses = loss_tensor(10.0, 0.1)
    balance(losses).backward()
    torch.testing.assert_close(losses.grad, torch.tensor([0.05, 5.0], dtype=torch.float64))
    balance.discard()
    balance(loss_tensor(5.0, 0.1))
    balance.step()
    log_p, _ = mirror_step([0.0, 0.0], [0.5, 1.0], rho=0.5, eta=0.5)
    torch.testing.assert_close(balance.probabilities(), torch.tensor(log_p, dtype=torch.float64).exp())


def test_rho_zero_is_uniform():
    balance, uniform = BanditMTL(3, rho=0.0), Uniform(3)
    for _ in range(3):
        losses = loss_tensor(1.0, 5.0, 0.1).detach()
        assert float(balance(losses)) == pytest.approx(float(uniform(losses)))
        balance.step()
        uniform.step()


def test_a_ball_as_wide_as_the_simplex_warns_and_is_group_dro():
    for kwargs in ({"rho": math.log(3)}, {"rho": 5.0}, {"min_effective_tasks": 1}):
        with pytest.warns(UserWarning, match="Group DRO"):
            balance = BanditMTL(3, eta=0.3, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BanditMTL(3, rho=1.0)
    group = GroupDRO(3, eta=0.3)
    for _ in range(5):
        for method in (balance, group):
            method(torch.tensor([1.0, 2.0, 0.5]))
            method.step()
    assert balance.weights() == pytest.approx(group.weights(), rel=1e-12)


def test_metrics_watch_the_ball():
    balance = BanditMTL(TASKS, min_effective_tasks=2)
    for _ in range(50):
        balance(loss_tensor(0.2, 1.0, 0.4))
        balance.step()
    found = balance.metrics()
    assert found["effective_tasks"] == pytest.approx(2, rel=1e-9)
    assert found["kl"] == pytest.approx(balance.rho, rel=1e-9)
    assert found["lambda"] > 0
    p = [found[f"weight/{t}"] for t in TASKS]
    assert sum(p) == pytest.approx(1)
    assert p[1] == max(p)
    losses = loss_tensor(0.2, 1.0, 0.4).detach()
    expected = float(best_response(losses, balance.rho) @ losses)
    assert found["robust_value"] == pytest.approx(expected)
    assert found["robust_value"] <= 1.6 / 3 + 0.8 * math.sqrt(balance.rho / 2)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, "exactly one of rho and min_effective_tasks"),
        ({"rho": 0.1, "min_effective_tasks": 2}, "exactly one"),
        ({"rho": -0.1}, r"rho must be >= 0, found -0.1"),
        ({"rho": math.nan}, "rho must be >= 0"),
        ({"min_effective_tasks": 4}, r"\[1, 3\]"),
        ({"rho": 0.1, "eta": 0.0}, "eta"),
        ({"rho": 0.1, "exploration": 2.0}, "exploration"),
        ({"rho": 0.1, "drawn_by": [0.5, 0.6, 0.1]}, "add up to 1"),
        ({"rho": 0.1, "drawn_by": [0.5, 0.0, 0.5]}, "drawn_by is 0 for task 1"),
        ({"rho": 0.1, "drawn_by": "q"}, "'q'"),
    ],
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        BanditMTL(TASKS, **kwargs)


def test_one_task_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        BanditMTL(["books"], rho=0.0)


def test_the_variance_of_the_losses_falls_against_uniform():
    """What the method is for: tasks that compete for one shared parameter end closer together."""

    def variance(balance) -> float:
        theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for _ in range(500):
            losses = torch.stack([(theta - 1).square(), (theta - 1.2).square(), (theta + 1).square()])
            (gradient,) = torch.autograd.grad(balance(losses), theta)
            theta = (theta - 0.05 * gradient).detach().requires_grad_()
            balance.step()
        return balance.metrics()["task_variance"]

    assert variance(BanditMTL(3, min_effective_tasks=2, eta=0.1)) < 0.5 * variance(Uniform(3))
