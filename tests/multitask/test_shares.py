"""How much a row counts: by its task's weight over the share of the rows that is the task's, and what is said of it."""

import math
import pickle
import re
import warnings

import pytest
import torch

from counterpoise.multitask import BanditMTL, FairGrad, NashMTL

from .toy import METHODS, TASKS, Toy, rows


def test_micro_batches_of_one_task_each_count_whole_from_the_second_window_on():
    weighting = BanditMTL(TASKS, rho=0.0, micro_batches=3)
    values = torch.tensor([0.3, 2.0, 0.9], dtype=torch.float64, requires_grad=True)
    for window in range(4):
        total = torch.zeros(3, dtype=torch.float64)
        for task in range(3):
            call = weighting([x if i == task else None for i, x in enumerate(values)])
            total += torch.autograd.grad(call, values)[0]
        if window:
            torch.testing.assert_close(total.sum() / 3, torch.tensor(1.0, dtype=torch.float64), rtol=0.2, atol=0)
        weighting.step()


def test_a_rare_task_is_named_once():
    weighting = BanditMTL(TASKS, rho=0.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for n in range(450):
            rare = n % 64 == 0
            weighting(torch.ones(3), [4, 3 if rare else 4, int(rare)])
            weighting.step()
    [one] = [str(w.message) for w in said]
    assert re.search(
        r"counts more than in the plain mean .*: of 'kitchen' \d\d+ times. Steps that hold one are large", one
    )


def test_windows_that_are_never_finite_are_said():
    weighting = BanditMTL(TASKS, rho=0.1)
    for _ in range(20):
        weighting(torch.tensor([1.0, math.nan, 2.0]))
        if weighting.skipped < 19:
            weighting.step()
    with pytest.warns(UserWarning, match=r"20 windows in a row had a loss that is not finite \(now of \['dvd'\]\)"):
        weighting.step()


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (torch.tensor([1, 2, 3]), r"a float per task, found \(3,\) of torch.int64"),
        (
            [torch.tensor(1), torch.tensor(2), torch.tensor(3)],
            "every loss must be a floating-point number, found torch.int64",
        ),
        (
            [torch.tensor(1.0), torch.tensor(1.0, device="meta"), None],
            r"every loss must be on one device, found .*'dvd': 'meta'",
        ),
        (
            {"books": torch.tensor(1.0), "films": torch.tensor(1.0)},
            r"that do not exist: \['films'\]. Name the tasks \['books'",
        ),
        ({"books": torch.tensor(1.0)}, r"losses lack the tasks .* Give each a value: None for a task that is absent"),
    ],
)
def test_losses_that_cannot_be_weighed(losses, message):
    with pytest.raises((ValueError, KeyError), match=message):
        BanditMTL(TASKS, rho=0.1)(losses)


def test_a_set_of_names_has_no_order():
    with pytest.raises(TypeError, match=r"found the set .*, whose order differs by process: pass sorted"):
        BanditMTL({"books", "dvd"}, rho=0.1)
    with pytest.raises(TypeError, match=r"tasks must be a number or a list of names, found 2\.0"):
        BanditMTL(2.0, rho=0.1)


@pytest.mark.parametrize("drawn_by", [[0.9, 0.1], {"b": 0.1, "a": 0.9}])
def test_losses_of_drawn_rows_without_counts_are_those_of_the_counts_that_are_expected(drawn_by):
    ends = []
    for counts in (None, [9, 1]):
        balance = BanditMTL(["a", "b"], rho=0.2, drawn_by=drawn_by)
        values = torch.tensor([1.0, 0.5], requires_grad=True)
        [gradient] = torch.autograd.grad(balance(values, counts), values)
        assert gradient.tolist() == pytest.approx([0.5, 0.5])
        balance.step()
        assert balance.weights()[0] > 0.5  # it is the worse one
        ends.append(balance.weights())
        alone = balance([None, torch.tensor(1.0)])  # one in ten, so ten times its weight
        assert float(alone) == pytest.approx(10.0 * ends[-1][1])
    assert ends[0] == pytest.approx(ends[1])


def test_observed_losses_without_counts_move_p_as_those_with_the_expected_ones():
    ends = []
    for counted in (False, True):
        mixture = BanditMTL(["a", "b"], rho=0.5, drawn_by="p")
        for _ in range(100):
            counts = mixture.probabilities().tolist() if counted else None
            mixture.observe({"a": torch.tensor(1.0), "b": torch.tensor(1.2)}, counts)
            mixture.step()
        ends.append(mixture.weights())
    assert ends[0] == pytest.approx(ends[1])
    assert ends[0][1] > 0.8


def test_weights_of_a_larger_ball_come_to_the_edge_of_a_smaller_one():
    large, small = BanditMTL(TASKS, rho=0.6), BanditMTL(TASKS, rho=0.01)
    for _ in range(50):
        large(torch.tensor([1.0, 2.0, 5.0]))
        large.step()
    same = BanditMTL(TASKS, rho=0.6)
    same.load_state_dict(large.state_dict())
    assert same.weights() == large.weights()
    small.load_state_dict(large.state_dict())
    assert small.metrics()["kl"] == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_pickled(method):
    weighting = METHODS[method](list(Toy().shared.parameters()))
    assert repr(pickle.loads(pickle.dumps(weighting))) == repr(weighting)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_bfloat16(method):
    toy = Toy().to(torch.bfloat16)
    weighting = METHODS[method](list(toy.shared.parameters()))
    x, y, task = rows(6, 0)
    losses, counts = toy.losses(x.to(torch.bfloat16), y.to(torch.bfloat16), task)
    weighting(losses, counts).backward()
    assert toy.shared.weight.grad.isfinite().all()
    weighting.step()


@pytest.mark.parametrize("build", [lambda shared: FairGrad(3, shared=shared), lambda shared: NashMTL(3, shared=shared)])
@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_the_bargaining_solution_does_not_depend_on_the_lengths_of_gradients(build, spread):
    theta = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rows = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([1.0, spread, spread**0.5], dtype=torch.float64)
    found = []
    for scale in (torch.ones(3, dtype=torch.float64), lengths):
        theta.grad = None
        build([theta])(list((scale[:, None] * rows) @ theta)).backward()
        found.append(theta.grad / theta.grad.norm())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "found"), [({"prior": None}, "None"), ({"prior": [None, 1, 2]}, r"\[None, 1, 2\]")]
)
def test_a_prior_of_no_numbers_is_refused(settings, found):
    with pytest.raises(TypeError, match=f"prior must hold one number per task, in order or by name, found {found}"):
        BanditMTL(TASKS, rho=0.1, **settings)


def test_known_chances_do_not_stand_for_counts_where_the_windows_sizes_are_given():
    balance, values = BanditMTL(2, rho=0.3, drawn_by=[0.5, 0.5]), torch.tensor([1.0, 2.0])
    assert sum(float(balance(values, window_counts=[2, 2])) for _ in range(2)) == pytest.approx(1.5)
    with pytest.raises(RuntimeError, match="window_counts promised"):
        balance(values, window_counts=[2, 2])


@pytest.mark.filterwarnings("error")
def test_who_weighs_no_row_or_has_equal_shares_names_no_rare_task():
    mixture, many = BanditMTL(2, rho=0.3, drawn_by="p"), METHODS["dwa"]([])
    for _ in range(210):
        mixture.observe(torch.ones(2), [1, 500])
        mixture.step()
        many(torch.ones(3))
        many.step()
