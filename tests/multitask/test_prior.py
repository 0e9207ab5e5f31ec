"""BanditMTL around another centre than the uniform weights, and the shares that rows are weighted by."""

import itertools
import math
import random

import cvxpy
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from counterpoise.multitask import BanditMTL, best_response, divergence, mirror_step

from .hf import parameters, tiny_llama, token_rows, train as hf_train
from .toy import TASKS

PRIORS = [[100.0, 30.0, 10.0, 3.0], [1.0, 1.0, 1.0, 1.0], [0.9, 0.05, 0.03, 0.02]]


def solved(losses, prior, rho, eta, before=None):
    """The maximiser of eta <p, l> - KL(p || before) over the ball, by an interior-point solver; without before, of <p, l>."""
    prior = np.array(prior) / sum(prior)
    p = cvxpy.Variable(len(losses))
    target = p @ np.array(losses) * eta
    if before is not None:
        target = target - cvxpy.sum(cvxpy.rel_entr(p, before))
    ball = [cvxpy.sum(p) == 1, cvxpy.sum(cvxpy.rel_entr(p, prior)) <= rho]
    cvxpy.Problem(cvxpy.Maximize(target), ball).solve(
        solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
    )
    return p.value


@pytest.mark.parametrize("prior", PRIORS)
def test_step_and_best_response_around_a_prior_are_those_of_an_interior_point_solver(prior):
    rng = np.random.default_rng(0)
    for rho in (0.02, 0.3):
        losses, before = rng.uniform(0, 3, 4), rng.dirichlet(np.full(4, 3.0))
        log_p, _ = mirror_step(np.log(before).tolist(), losses.tolist(), rho, 1.0, prior)
        np.testing.assert_allclose(np.exp(log_p), solved(losses, prior, rho, 1.0, before), atol=2e-6)
        response = best_response(torch.from_numpy(losses), rho, torch.tensor(prior)).numpy()
        np.testing.assert_allclose(response, solved(losses, prior, rho, 1.0), atol=2e-5)
        reached = divergence(torch.from_numpy(response).log(), torch.tensor(prior))
        assert reached == pytest.approx(rho, rel=1e-9) or (reached < rho and max(response) == 1.0)


def test_a_step_around_a_prior_stays_in_its_ball_in_3000_random_cases():
    rng = random.Random(0)
    for _ in range(3000):
        m = rng.randint(2, 20)
        prior = [math.exp(rng.gauss(0, 3)) for _ in range(m)]
        rho = rng.random() ** 3 * math.log(sum(prior) / min(prior))
        log_p = [math.log(c) + rng.gauss(0, 1) for c in prior]
        losses = [rng.random() * 10 ** rng.uniform(-6, 4) for _ in range(m)]
        new, multiplier = mirror_step(log_p, losses, rho, 0.5, prior)
        p = [math.exp(x) for x in new]
        total = sum(prior)
        assert math.fsum(x * (a - math.log(c / total)) for x, a, c in zip(p, new, prior, strict=True)) <= rho + 1e-9
        assert math.fsum(p) == pytest.approx(1, abs=1e-12)
        assert multiplier >= 0
        order = rng.sample(range(m), m)
        permuted, _ = mirror_step(
            [log_p[i] for i in order], [losses[i] for i in order], rho, 0.5, [prior[i] for i in order]
        )
        assert [math.exp(x) for x in permuted] == pytest.approx([p[i] for i in order], abs=1e-11)


def test_a_prior_of_equal_numbers_is_the_uniform_one():
    losses = torch.tensor([0.2, 1.5, 0.7])
    two = [BanditMTL(3, rho=0.3, prior=prior) for prior in ("uniform", [7, 7, 7])]
    for balance in two:
        for _ in range(5):
            balance(losses)
            balance.step()
    assert two[0].weights() == pytest.approx(two[1].weights(), rel=1e-13)
    assert two[0].metrics()["kl"] == pytest.approx(two[1].metrics()["kl"], rel=1e-12)


@pytest.mark.parametrize("shift", [1e3, 1e12, -1e12])
def test_a_step_does_not_see_what_all_losses_have_in_common(shift):
    losses = [0.25, 1.5, 0.75]  # exact in float64 beside 1e12
    for prior in (None, [3.0, 2.0, 1.0]):
        plain = mirror_step([-1.0, -1.2, -1.1], losses, 0.2, 0.3, prior)
        assert mirror_step([-1.0, -1.2, -1.1], [x + shift for x in losses], 0.2, 0.3, prior) == plain


ROWS = [(0, 1.0), (0, -2.0), (0, 0.5), (1, 3.0), (0, 1.5), (2, -1.0)]  # task, and what theta is drawn to


def gradient_of(balance: BanditMTL, batch) -> float:
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    of = [[(theta - y).square() for t, y in batch if t == i] for i in range(3)]
    balance([torch.stack(x).mean() if x else None for x in of], [float(len(x)) for x in of]).backward()
    balance.step()
    return float(theta.grad)


@pytest.mark.parametrize("known", [True, False])
def test_at_the_proportional_prior_the_gradient_is_that_of_the_plain_mean_over_rows(known):
    shares = [4 / 6, 1 / 6, 1 / 6]
    balance = BanditMTL(3, rho=0.0, prior="proportional", drawn_by=shares if known else None)
    for batch in itertools.product(ROWS, repeat=2):
        assert gradient_of(balance, batch) == pytest.approx(sum(-2 * y for _, y in batch) / 2, rel=1e-8)


@pytest.mark.parametrize("prior", ["uniform", "sqrt", 5.0, [5, 2, 1]])
def test_over_all_batches_the_gradient_is_that_of_the_priors_mean_over_tasks(prior):
    """Every batch of two rows of the data set once: the expectation, exactly."""
    shares = [4 / 6, 1 / 6, 1 / 6]
    power = {"uniform": 0.0, "sqrt": 0.5, 5.0: 0.2}.get(prior if not isinstance(prior, list) else None)
    wanted = np.array(prior if power is None else [x**power for x in shares], dtype=float)
    of_task = [np.mean([-2 * y for t, y in ROWS if t == i]) for i in range(3)]
    batches = list(itertools.product(ROWS, repeat=2))
    balance = BanditMTL(3, rho=0.0, prior=prior, drawn_by=shares)
    found = np.mean([gradient_of(balance, batch) for batch in batches])
    assert found == pytest.approx(wanted @ of_task / wanted.sum(), rel=1e-12)
    estimated = BanditMTL(3, rho=0.0, prior=prior)
    for batch in batches * 10:  # the shares are learned; then they move by one window in 361
        gradient_of(estimated, batch)
    state = estimated.state_dict()
    again = []
    for batch in batches:
        estimated.load_state_dict(state)
        again.append(gradient_of(estimated, batch))
    assert np.mean(again) == pytest.approx(wanted @ of_task / wanted.sum(), abs=0.05)


def test_shares_come_with_their_standard_error():
    generator, ends = torch.Generator().manual_seed(0), []
    for _ in range(200):
        balance = BanditMTL(3, rho=0.1)
        for _ in range(25):
            drawn = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 8, replacement=True, generator=generator)
            counts = torch.bincount(drawn, minlength=3).tolist()
            balance([torch.tensor(1.0) if c else None for c in counts], counts)
            balance.step()
        found = balance.metrics()
        ends.append(abs(found["share/0"] - 0.7) / found["share_error/0"])
    assert 0.88 <= sum(e < 2.06 for e in ends) / 200 <= 0.99  # 95 % by Student's t with 24 degrees
    still = BanditMTL(3, rho=0.1)
    for _ in range(3):
        still(torch.ones(3), [4, 2, 2])
        still.step()
    assert "share/0" not in still.metrics()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_the_trainer_the_proportional_prior_trains_as_the_plain_trainer_does(tmp_path, accumulate):
    held = BanditMTL(TASKS, rho=0.0, prior="proportional")
    ours = hf_train(str(tmp_path), batch=4, accumulate=accumulate, steps=3, weighting=held)
    plain = Trainer(
        model=tiny_llama(),
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=accumulate, max_steps=3,
            learning_rate=0.5, lr_scheduler_type="constant", optim="sgd", report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=token_rows(),
    )  # fmt: skip
    plain.train()
    for a, b in zip(parameters(ours), parameters(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_the_adversary_moves_around_the_prior_and_stays_in_its_ball():
    sizes, losses = [100, 30, 10, 3], torch.tensor([0.5, 0.6, 0.4, 2.0])
    balance = BanditMTL(4, rho="30%", prior=sizes)
    assert balance.rho == pytest.approx(0.3 * math.log(143 / 3))
    assert balance.weights() == pytest.approx([x / 143 for x in sizes])
    for _ in range(400):
        balance(losses)
        balance.step()
    found = balance.metrics()
    response = best_response(losses.double(), balance.rho, torch.tensor(sizes))
    assert balance.weights() == pytest.approx(response.tolist(), abs=1e-6)
    assert found["kl"] == pytest.approx(balance.rho, rel=1e-6)
    assert found["robust_value"] == pytest.approx(float(response @ losses.double()), rel=1e-9)
    assert found["effective_tasks"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in balance.weights())))


def test_a_moving_prior_goes_with_the_shares_and_so_do_the_weights():
    balance = BanditMTL(3, rho="20%", prior="proportional")
    for counts in ([8, 0, 0], [6, 2, 0], [6, 1, 1], [4, 3, 1]):
        balance([torch.tensor(1.0) if c else None for c in counts], counts)
        balance.step()
    shares = [24 / 32, 6 / 32, 2 / 32]
    assert balance.weights() == pytest.approx(shares, rel=1e-6)  # equal losses: p stays at the prior
    assert balance.rho == pytest.approx(0.2 * math.log(16))
    again = BanditMTL(3, rho="20%", prior="proportional")
    again.load_state_dict(balance.state_dict())
    for one in (balance, again):
        one(torch.tensor([0.5, 1.0, 2.0]), [4, 2, 2])
        one.step()
    assert again.weights() == balance.weights()
    assert balance.weights()[2] > shares[2]


def test_a_mixture_explores_towards_its_prior():
    balance = BanditMTL(3, rho=0.2, prior=[8, 1, 1], drawn_by="p", exploration=1.0)
    assert balance.probabilities().tolist() == pytest.approx([0.8, 0.1, 0.1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_effective_tasks": 2, "prior": "sqrt"}, 'rho="30%"'),
        ({"rho": "lots"}, "30%"),
        ({"rho": "130%"}, "30%"),
        ({"rho": 0.1, "prior": "linear"}, "proportional"),
        ({"rho": 0.1, "prior": -1.0}, "temperature above 0"),
        ({"rho": 0.1, "prior": [1, 2]}, "prior must hold one number per task"),
        ({"rho": 0.1, "prior": [1, 2, 0]}, "above 0 for every task"),
        ({"rho": 0.1, "prior": "sqrt", "drawn_by": "p"}, 'drawn_by="p"'),
    ],
)
def test_a_wrong_prior_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        BanditMTL(TASKS, **settings)


def test_a_ball_that_holds_every_weighting_is_said_for_the_prior_at_hand():
    with pytest.warns(UserWarning, match=r"log\(1 / min prior\) = 2.303"):
        BanditMTL(2, rho=2.4, prior=[9, 1])
    assert BanditMTL(["a", "b"], rho=2.0, prior={"a": 9, "b": 1}).rho == 2.0  # above log 2, and still a ball


def test_a_ball_around_a_moving_prior_is_as_large_after_loading_and_as_at_first_after_a_reset():
    balance = BanditMTL(["a", "b"], rho="30%", prior="proportional")
    first = balance.rho
    for _ in range(3):
        balance(torch.tensor([1.0, 2.0]), counts=[95, 5])
        balance.step()
    again = BanditMTL(["a", "b"], rho="30%", prior="proportional")
    again.load_state_dict(balance.state_dict())
    assert balance.rho == again.rho != first
    assert again.metrics() == balance.metrics()
    balance.reset()
    assert balance.rho == first


def test_the_state_of_another_prior_is_refused():
    saved = BanditMTL(["a", "b"], rho=0.1, prior=[9, 1])
    with pytest.raises(ValueError, match="expected the state of a run with the prior"):
        BanditMTL(["a", "b"], rho=0.1).load_state_dict(saved.state_dict())
    BanditMTL(["a", "b"], rho=0.1, prior=[18, 2]).load_state_dict(saved.state_dict())
