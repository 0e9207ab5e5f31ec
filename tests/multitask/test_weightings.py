"""What every weighting must do: one row per method (see toy.METHODS)."""

import copy
import gc
import io
import math
import weakref

import pytest
import torch

from counterpoise.multitask import Uniform, Weighting
from counterpoise.multitask.values import weighted_sum

from .toy import METHODS, TASKS, Toy, gradients, rows


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def build(method: str) -> tuple[Toy, Weighting, torch.optim.Optimizer]:
    toy = Toy()
    weighting = METHODS[method](list(toy.shared.parameters()))
    return toy, weighting, torch.optim.SGD([*toy.parameters(), *weighting.parameters()], lr=0.05)


def train(toy, weighting, optimizer, seeds) -> None:
    for seed in seeds:
        torch.manual_seed(seed)  # PCGrad draws its order
        optimizer.zero_grad()
        losses, counts = toy.losses(*rows(6, seed))
        weighting(losses, counts).backward()
        optimizer.step()
        weighting.step()


def everything(toy, weighting, optimizer):
    stream = io.BytesIO()
    torch.save([toy.state_dict(), weighting.state_dict(), optimizer.state_dict()], stream)
    return stream


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or (
            a.dtype.is_floating_point
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_losses_go_down_and_weights_are_those_of_the_method(method):
    toy, weighting, optimizer = build(method)
    before = sum(float(x.detach()) for x in toy.losses(*rows(6, 0))[0].values())
    steps = 4 if method == "dbmtl" else 30  # the logarithm of losses that can reach 0 falls without end
    train(toy, weighting, optimizer, [0] * steps)
    after = sum(float(x.detach()) for x in toy.losses(*rows(6, 0))[0].values())
    assert after < 0.9 * before
    assert weighting.updates == steps
    weights = weighting.weights()
    assert weights is None or (len(weights) == 3 and min(weights) > 0)


def test_the_scalar_does_not_depend_on_how_the_losses_are_passed(method):
    values = torch.tensor([0.3, 2.0, 0.9], dtype=torch.float64)
    scalars = []
    for form in ("tensor", "list", "mapping"):
        toy, weighting, _ = build(method)
        base = toy.shared.weight.sum() * 0 + values
        named = dict(zip(TASKS, base, strict=True))
        losses = {"tensor": base, "list": list(base), "mapping": {t: named[t] for t in reversed(TASKS)}}[form]
        torch.manual_seed(0)
        scalars.append(weighting(losses))
        assert scalars[-1].shape == ()
    assert scalars[0] == scalars[1] == scalars[2]


def test_stop_and_resume_is_bitwise_no_stop(method):
    straight = build(method)
    train(*straight, range(7))
    first = build(method)
    train(*first, range(4))
    stream = everything(*first)
    second = build(method)
    stream.seek(0)
    for part, state in zip(second, torch.load(stream, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, range(4, 7))
    assert same([x.state_dict() for x in straight], [x.state_dict() for x in second])
    assert straight[1].metrics() == second[1].metrics()


def test_stop_and_resume_inside_a_window(method):
    toy, weighting, _ = build(method)
    losses, counts = toy.losses(*rows(6, 0))
    weighting(losses, counts)
    fresh = build(method)[1]
    fresh.load_state_dict(copy.deepcopy(weighting.state_dict()))
    with pytest.raises(RuntimeError, match=r"step\(\)"):
        fresh(losses, counts)
    weighting.step()
    fresh.step()
    assert same(weighting.state_dict(), fresh.state_dict())


def test_casting_the_model_does_not_touch_the_memory(method):
    toy, weighting, optimizer = build(method)
    train(toy, weighting, optimizer, range(3))
    before = weighting.get_extra_state()
    weighting.to(torch.bfloat16)
    assert same(before, weighting.get_extra_state())
    assert weighting.get_extra_state()["losses"].dtype == torch.float64


def test_a_non_finite_loss_is_skipped_and_counted(method):
    toy, weighting, optimizer = build(method)
    train(toy, weighting, optimizer, range(3))
    before = weighting.get_extra_state()
    losses, _ = toy.losses(*rows(6, 9))
    for bad in (math.nan, math.inf):
        weighting({**losses, "dvd": losses["dvd"] * bad})
        weighting.step()
    after = weighting.get_extra_state()
    assert after.pop("skipped") == before.pop("skipped") + 2 == 2
    assert same(before, after)


def test_a_forgotten_step_and_a_superfluous_one_raise(method):
    toy, weighting, _ = build(method)
    losses, _ = toy.losses(*rows(6, 0))
    with pytest.raises(RuntimeError, match="none open"):
        weighting.step()
    weighting(losses)
    with pytest.raises(RuntimeError, match=r"call step\(\)"):
        weighting(losses)
    weighting.discard()
    weighting(losses)
    weighting.step()
    assert weighting.updates == 1


def test_evaluation_mode_records_nothing(method):
    toy, weighting, _ = build(method)
    losses, _ = toy.losses(*rows(6, 0))
    before = weighting.get_extra_state()
    weighting.eval()
    weighting(losses)
    weighting(losses)
    assert same(before, weighting.get_extra_state())


@pytest.mark.parametrize("sizes", [None, [2.0, 2.0, 2.0]])
def test_training_goes_on_after_an_evaluation_in_inference_mode(method, sizes):
    (toy, weighting, _), (toy_too, undisturbed, _) = build(method), build(method)
    losses, _ = toy.losses(*rows(6, 0))
    weighting.eval()
    with torch.inference_mode():
        weighting(torch.tensor([0.3, 2.0, 0.9], dtype=torch.float64), sizes, sizes)
    torch.manual_seed(0)
    weighting.train()(losses, sizes, sizes).backward()
    torch.manual_seed(0)
    undisturbed(toy_too.losses(*rows(6, 0))[0], sizes, sizes).backward()
    assert same(gradients(toy), gradients(toy_too))


def test_a_state_is_a_snapshot(method):
    toy, weighting, optimizer = build(method)
    train(toy, weighting, optimizer, range(3))
    state = weighting.get_extra_state()
    before = copy.deepcopy(state)
    train(toy, weighting, optimizer, range(3, 6))
    assert same(state, before)
    toy, fresh, optimizer = build(method)
    fresh.set_extra_state(state)
    train(toy, fresh, optimizer, range(3, 6))
    assert same(state, before)


def test_reset_is_a_fresh_start(method):
    toy, weighting, optimizer = build(method)
    train(toy, weighting, optimizer, range(4))
    weighting(toy.losses(*rows(6, 9))[0])  # an open window too
    weighting.reset()
    fresh_toy, fresh, fresh_optimizer = build(method)
    assert same(weighting.state_dict(), fresh.state_dict())
    toy.load_state_dict(fresh_toy.state_dict())
    train(toy, weighting, torch.optim.SGD([*toy.parameters(), *weighting.parameters()], lr=0.05), range(3))
    train(fresh_toy, fresh, fresh_optimizer, range(3))
    assert same(weighting.state_dict(), fresh.state_dict())
    assert same(toy.state_dict(), fresh_toy.state_dict())


def test_the_repr_says_the_settings(method):
    text = repr(build(method)[1])
    assert text.startswith(type(build(method)[1]).__name__ + "(")
    assert "tasks=('books', 'dvd', 'kitchen')" in text
    said = {
        "bandit": "rho=0.405",
        "famo": "lr=0.025",
        "rlw": "seed=3",
        "gradnorm": "asymmetry=1.5",
        "dwa": "temperature",
    }
    assert said.get(method, "") in text
    assert "tensor(" not in text
    assert "Parameter containing" not in text


def test_the_expected_scalar_is_the_weighted_sum_of_the_means_whatever_the_loader(method):
    """After one that holds all tasks, windows of others in other numbers, each in turn the last; nothing else moves."""
    if build(method)[1].whole_batch_only or method == "bandit_importance":
        pytest.skip("takes the batch as it is, or was told other shares than these")
    windows, scalars = [[5, 1, 0], [2, 0, 3], [0, 4, 4], [6, 1, 1]], []
    losses = torch.tensor([0.3, 2.0, 0.9], dtype=torch.float64)
    for last in windows:
        weighting = build(method)[1]
        weighting.update = lambda means: None
        for counts in [[2, 1, 1], *(w for w in windows if w is not last)]:
            weighting([x if c else None for x, c in zip(losses, counts, strict=True)], counts)
            weighting.step()
        weights = weighting.weights()
        scalars.append(float(weighting([x if c else None for x, c in zip(losses, last, strict=True)], last).detach()))
    shares = [sum(w[i] / sum(w) for w in windows) / 4 for i in range(3)]
    moving = {"bandit_proportional": shares, "bandit_sqrt": [x**0.5 / sum(y**0.5 for y in shares) for x in shares]}
    expected = sum(w * x for w, x in zip(moving.get(method, weights), losses.tolist(), strict=True))
    assert sum(scalars) / 4 == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("calls", [1, 3])
def test_rows_of_a_task_that_comes_late_count_as_those_of_any_other(method, calls):
    """Data that is sorted by task: two tasks in turn for 300 windows (or calls), then the third for 50."""
    weighting = build(method)[1]
    weighting.micro_batches = calls
    if weighting.whole_batch_only or method in ("bandit_importance", "famo", "uncertainty", "imtl_l"):
        pytest.skip("takes the batch as it is, or was told other shares, or learns what it multiplies with")
    weighting.update = lambda means: None
    values = torch.ones(3, dtype=torch.float64, requires_grad=True)
    order = [0, 1] * 150 + [2] * 50
    for n, task in enumerate(order):
        [gradient] = torch.autograd.grad(weighting([x if i == task else None for i, x in enumerate(values)]), values)
        assert 0.0 <= float(gradient[task]) < 3.5
        if (n + 1) % weighting.micro_batches == 0 or n + 1 == len(order):
            weighting.step()


def test_an_absent_task_gets_no_gradient(method):
    toy, weighting, optimizer = build(method)
    train(toy, weighting, optimizer, range(2))
    optimizer.zero_grad()
    losses, counts = toy.losses(*rows(4, 5, tasks=[0, 0, 2, 2]))
    assert losses["dvd"] is None
    weighting(losses, counts).backward()
    weighting.step()
    assert toy.heads[1].weight.grad is None or not toy.heads[1].weight.grad.any()
    assert toy.shared.weight.grad.any()
    assert weighting.updates == 3


def test_a_state_of_other_tasks_or_another_method_is_refused(method):
    _, weighting, _ = build(method)
    state = weighting.state_dict()
    state["_extra_state"]["tasks"] = ["books", "kitchen", "dvd"]
    with pytest.raises(ValueError, match=r"expected.*'dvd', 'kitchen'.*found.*'kitchen', 'dvd'"):
        weighting.load_state_dict(state)
    state["_extra_state"] |= {"tasks": TASKS, "method": "Astrology"}
    with pytest.raises(ValueError, match="Astrology"):
        weighting.load_state_dict(state)


def test_micro_batches_add_up_to_the_big_batch_or_are_refused(method):
    x, y, task = rows(8, 3, tasks=[0, 1, 1, 2, 0, 2, 2, 0])
    toy, weighting, optimizer = build(method)
    train(toy, weighting, optimizer, range(3))
    whole = copy.deepcopy((toy, weighting))
    totals = [3, 2, 3]
    if weighting.whole_batch_only:
        losses, counts = toy.losses(x[:5], y[:5], task[:5])
        with pytest.raises(RuntimeError, match="whole batch in one call"):
            weighting(losses, counts, totals)
        return
    optimizer.zero_grad()
    for i in range(0, 8, 2):
        losses, counts = toy.losses(x[i : i + 2], y[i : i + 2], task[i : i + 2])
        weighting(losses, counts, totals).backward()
    whole[0].zero_grad()
    losses, counts = whole[0].losses(x, y, task)
    whole[1](losses, counts).backward()
    for a, b in zip(gradients(toy), gradients(whole[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    weighting.step()
    whole[1].step()
    after, expected = weighting.metrics(), whole[1].metrics()
    assert {k: pytest.approx(v, rel=1e-12) for k, v in expected.items()} == after


def test_metrics_are_plain_finite_numbers(method):
    toy, weighting, optimizer = build(method)
    assert all(isinstance(v, float) for v in weighting.metrics().values())
    train(toy, weighting, optimizer, range(2))
    found = weighting.metrics()
    assert all(type(v) is float and math.isfinite(v) for v in found.values())
    losses = [found[f"loss/{t}"] for t in TASKS]
    mean = sum(losses) / 3
    assert found["task_variance"] == pytest.approx(sum((x - mean) ** 2 for x in losses) / 3)
    assert found["worst_task_loss"] == max(losses)


def test_low_precision_losses_give_a_float32_scalar(method):
    toy, weighting, _ = build(method)
    base = (toy.shared.weight.sum() * 0).to(torch.bfloat16)
    scalar = weighting(base + torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16))
    assert scalar.dtype in (torch.float32, torch.float64)


def test_no_graph_is_kept(method):
    toy, weighting, _ = build(method)
    values = torch.ones(3, dtype=torch.float64) + toy.shared.weight.sum() * 0
    watched = weakref.ref(values)
    weighting(values)
    del values
    gc.collect()
    assert watched() is None


def test_weights_go_to_the_losses_device_also_with_window_counts():
    """Weights are built on the host; "meta" stands for a GPU, which refuses to multiply with the host as well."""
    values, scale = torch.ones(3, device="meta"), torch.ones(3, device="meta", dtype=torch.float64)
    assert weighted_sum(torch.ones(3, dtype=torch.float64), values, scale).device.type == "meta"


def test_micro_batches_must_be_positive():
    with pytest.raises(ValueError, match="micro_batches"):
        Uniform(2, micro_batches=0)
