"""The methods on gradients: what lands on shared parameters and on heads, against torchjd's own route."""

import subprocess
import sys

import cvxpy
import numpy as np
import pytest
import torch
from torch import nn
from torchjd import aggregation

from counterpoise.multitask import (
    DBMTL,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ExcessMTL,
    FairGrad,
    GradNorm,
    GroupDRO,
    JacobianWeighting,
    NashMTL,
    PCGrad,
    UPGrad,
)
from counterpoise.multitask.aggregators import project_weights, shortest

from .toy import TASKS, Toy, gradients, rows

ROUTES = {
    "mgda": (MGDA, {}, lambda: shortest),
    "pcgrad": (PCGrad, {}, lambda: aggregation.PCGrad()),
    "cagrad": (CAGrad, {"radius": 0.5}, lambda: aggregation.CAGrad(c=0.5)),
    "upgrad": (UPGrad, {}, lambda: aggregation.UPGrad(projector=project_weights)),
}


@pytest.mark.parametrize("name", ROUTES)
def test_shared_parameters_get_the_aggregate_and_heads_their_own_gradient(name):
    from torchjd.autojac import backward, jac_to_grad

    method, settings, theirs = ROUTES[name]
    ours, reference = Toy(), Toy()
    aggregator = theirs()
    losses = reference.losses(*rows(9, 0))[0]
    torch.manual_seed(0)
    backward(list(losses.values()), inputs=list(reference.shared.parameters()), retain_graph=True)
    jac_to_grad(list(reference.shared.parameters()), aggregator)
    heads = [p for head in reference.heads for p in head.parameters()]
    for parameter, gradient in zip(heads, torch.autograd.grad(sum(losses.values()), heads), strict=True):
        parameter.grad = gradient
    torch.manual_seed(0)
    weighting = method(TASKS, shared=ours.shared.parameters(), **settings)
    scalar = weighting(ours.losses(*rows(9, 0))[0])
    scalar.backward()
    for a, b in zip(gradients(ours), gradients(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert float(scalar.detach()) == pytest.approx(sum(float(x.detach()) for x in losses.values()))


def direction(method, rows_KN: torch.Tensor, **settings) -> torch.Tensor:
    """The gradient that a method leaves on one shared parameter whose losses have these gradients."""
    theta = torch.zeros(rows_KN.shape[1], dtype=torch.float64, requires_grad=True)
    method(len(rows_KN), shared=[theta], **settings)(rows_KN @ theta + 1.0).backward()
    return theta.grad


def conflicting(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 7, dtype=torch.float64) * torch.tensor([[0.1], [1.0], [5.0]]) + 0.1


@pytest.mark.parametrize("seed", range(3))
def test_aligned_mtl_brings_every_singular_value_to_the_smallest(seed):
    rows_KN = conflicting(seed)
    u, s, v = torch.linalg.svd(rows_KN, full_matrices=False)
    torch.testing.assert_close(direction(AlignedMTL, rows_KN), (s[-1] * u @ v).mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_imtl_g_is_the_papers_closed_form(seed):
    g = conflicting(seed)
    unit = g / g.norm(dim=1, keepdim=True)
    away, turned = g[:1] - g[1:], unit[:1] - unit[1:]
    others = g[:1] @ turned.T @ torch.linalg.inv(away @ turned.T)
    weights = torch.cat([1.0 - others.sum(1, keepdim=True), others], dim=1)
    torch.testing.assert_close(direction(IMTLG, g), (weights @ g)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
@pytest.mark.parametrize("fairness", [0.5, 1.0, 2.0])
def test_fairgrad_solves_its_equation_at_every_size_of_the_gradients(fairness, size):
    rows_KN = conflicting(1) * size
    found = direction(FairGrad, rows_KN, fairness=fairness)
    w = torch.linalg.lstsq(rows_KN.T, found[:, None]).solution[:, 0]
    torch.testing.assert_close(rows_KN @ found, w ** (-1 / fairness), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_nash_mtl_is_the_bargain_over_the_unit_ball_that_cvxpy_finds(seed):
    rows_KN = conflicting(seed)
    d = cvxpy.Variable(7)
    gains = cvxpy.sum(cvxpy.log(rows_KN.numpy() @ d))
    cvxpy.Problem(cvxpy.Maximize(gains), [cvxpy.norm(d) <= 1]).solve(solver="CLARABEL")
    torch.testing.assert_close(direction(NashMTL, rows_KN), torch.from_numpy(d.value), rtol=0, atol=1e-4)
    free = direction(NashMTL, rows_KN, max_norm=float("inf"))
    assert float(free.norm()) == pytest.approx(3**0.5, rel=1e-6)


def test_db_mtl_is_its_average_of_log_gradients_at_one_length():
    """As in LibMTL: the buffer moves first, then every row gets the length of the longest."""
    theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
    weighting, buffer = DBMTL(3, shared=[theta], forgetting=0.6), torch.zeros(3, 4, dtype=torch.float64)
    for step in range(4):
        torch.manual_seed(step)
        scale = torch.rand(3, 4, dtype=torch.float64)
        values = (scale * theta).square().sum(1)
        theta.grad = None
        weighting(values).backward()
        weighting.step()
        rows_KN = 2 * scale**2 * theta.detach() / (values.detach()[:, None] + 1e-8)
        buffer = rows_KN + 0.6 * (buffer - rows_KN)
        lengths = buffer.norm(dim=1)
        torch.testing.assert_close(theta.grad, (lengths.max() / (lengths + 1e-8)) @ buffer, rtol=1e-9, atol=0)
        with torch.no_grad():
            theta -= 0.05 * theta.grad


def test_excess_mtl_is_torchjds_with_one_step_of_warmup():
    theta = torch.ones(4, dtype=torch.float64, requires_grad=True)
    ours, theirs = ExcessMTL(3, shared=[theta], eta=0.3), aggregation.ExcessMTL(0.3, n_warmup_steps=1)
    for step in range(6):
        torch.manual_seed(step)
        scale = torch.rand(3, 4, dtype=torch.float64)
        ours((scale * theta).square().sum(1))
        ours.step()
        expected = theirs.weighting((2 * scale**2 * theta).detach())
        assert ours.weights() == pytest.approx(expected.tolist(), rel=1e-9)
        with torch.no_grad():
            theta *= 0.8
    assert max(ours.weights()) > 1.05 * min(ours.weights())


def test_excess_mtl_leaves_a_task_of_noisy_labels_alone_where_group_dro_goes_for_it():
    """Task 0 cannot get below 2.0; both are solved as fast."""
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    ours, other = ExcessMTL(2, shared=[theta], eta=0.05), GroupDRO(2, eta=0.05)
    for _ in range(60):
        losses = torch.stack([2.0 + (theta[0] - 1).square(), (theta[1] + 1).square()])
        (gradient,) = torch.autograd.grad(ours(losses), theta)
        other(losses.detach())
        ours.step()
        other.step()
        with torch.no_grad():
            theta -= 0.1 * gradient
    assert ours.weights()[0] == pytest.approx(0.5, abs=0.05)
    assert other.weights()[0] > 0.99


@pytest.mark.parametrize("name", ["ConFIG", "DualProj", "GradVac", "TrimmedMean", "Krum"])
def test_any_aggregator_of_torchjd_serves(name):
    settings = {"TrimmedMean": {"trim_number": 1}, "Krum": {"n_byzantine": 0}}.get(name, {})
    rows_KN = conflicting(0)
    torch.manual_seed(0)
    expected = getattr(aggregation, name)(**settings)(rows_KN)
    torch.manual_seed(0)
    found = direction(JacobianWeighting, rows_KN, aggregate=getattr(aggregation, name)(**settings))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_mgda_and_upgrad_help_every_task_where_the_sum_does_not():
    rows_KN = torch.tensor([[1.0, 0.0], [-3.0, 1.0]])
    for method in (MGDA, UPGrad):
        theta = torch.zeros(2, requires_grad=True)
        method(2, shared=[theta])(rows_KN @ theta).backward()
        assert (rows_KN @ theta.grad >= -1e-5).all()
    assert (rows_KN @ rows_KN.sum(0) < 0).any()


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_mgda_finds_the_shortest_point_that_a_quadratic_program_finds(tasks):
    from qpsolvers import solve_qp

    torch.manual_seed(tasks)
    for scale in (1e-6, 1.0, 1e6):
        rows_KN = scale * (torch.randn(tasks, 12, dtype=torch.float64) + 0.5)
        gram = (rows_KN @ rows_KN.T).numpy() / scale**2
        ones, zeros = np.ones((1, tasks)), np.zeros(tasks)
        weights = solve_qp(
            gram + 1e-13 * np.eye(tasks), zeros, None, None, ones, np.ones(1), zeros, None, solver="quadprog"
        )
        torch.testing.assert_close(shortest(rows_KN), torch.from_numpy(weights) @ rows_KN, rtol=1e-7, atol=1e-7 * scale)
    frank_wolfe = aggregation.MGDA(epsilon=1e-5, max_iters=3000)(rows_KN)
    assert float(shortest(rows_KN).norm()) <= float(frank_wolfe.norm()) * (1 + 1e-12)


def test_mgda_is_zero_where_the_gradients_are_opposed():
    rows_KN = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [0.0, 0.0]])
    assert shortest(rows_KN).norm() < 1e-6
    assert shortest(torch.zeros(3, 2)).tolist() == [0.0, 0.0]


def test_upgrad_equals_torchjds_own_projector():
    from torchjd.linalg import QuadprogProjector

    torch.manual_seed(0)
    for _ in range(5):
        rows_KN = torch.randn(4, 10, dtype=torch.float64)
        exact = aggregation.UPGrad(projector=QuadprogProjector(norm_eps=0.0, reg_eps=1e-12))(rows_KN)
        ours = aggregation.UPGrad(projector=project_weights)(rows_KN)
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [MGDA, GradNorm])
def test_a_pass_per_task_runs_through_that_tasks_graph_alone(method):
    layer, passes = nn.Linear(4, 1), []

    def run(together: bool) -> list[int]:
        passes.clear()
        losses = []
        for i, x in enumerate(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))):
            hidden = layer(x)
            hidden.register_hook(lambda gradient, i=i: passes.append(i))
            losses.append(hidden.square().mean())
        method(TASKS, shared=layer.parameters())(torch.stack(losses) if together else losses)
        return sorted(passes)

    assert run(together=False) == [0, 1, 2]
    assert run(together=True) == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # what stacking beforehand costs, as the docstring says


def test_a_non_finite_gradient_falls_back_to_the_sum():
    theta = torch.zeros(2, requires_grad=True)
    weighting = MGDA(2, shared=[theta])
    weighting(torch.stack([theta[0].sqrt(), theta[1]])).backward()  # d sqrt at 0 is infinite
    assert theta.grad.isinf().any()
    assert theta.grad[1] == 1


def test_accumulation_is_refused():
    layer = nn.Linear(2, 2)
    weighting = MGDA(2, shared=layer.parameters())
    losses = layer(torch.ones(2))
    with pytest.raises(RuntimeError, match="MGDA needs the whole batch"):
        weighting(losses, [1, 1], [2, 2])
    weighting(losses)
    with pytest.raises(RuntimeError, match=r"step\(\)"):
        weighting(losses)
    with pytest.raises(TypeError):
        MGDA(2, shared=layer.parameters(), micro_batches=2)


@pytest.mark.parametrize(
    ("shared", "error", "words"),
    [
        ([], ValueError, "at least one"),
        (torch.ones(2, requires_grad=True), TypeError, "one tensor"),
        ([torch.ones(2)], ValueError, "requires_grad=False"),
        ([1.0], TypeError, "float"),
        (nn.Linear(2, 2), TypeError, r"found Linear: pass module.parameters\(\)"),
    ],
)
def test_bad_shared_parameters_are_named(shared, error, words):
    with pytest.raises(error, match=words):
        JacobianWeighting(2, shared=shared, aggregate=lambda rows_KN: rows_KN.sum(0))


def test_a_repeated_parameter_is_refused():
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="more than once"):
        MGDA(2, shared=[theta, theta])


def test_importing_the_package_imports_neither_torchjd_nor_transformers():
    code = (
        "import sys, counterpoise.multitask;"
        "print([m for m in ('torchjd', 'transformers', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
