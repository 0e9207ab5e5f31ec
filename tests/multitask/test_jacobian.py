"""The methods on gradients: what lands on shared parameters and on heads, against torchjd's own route."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torchjd import aggregation

from counterpoise.multitask import MGDA, CAGrad, GradNorm, JacobianWeighting, PCGrad, UPGrad
from counterpoise.multitask.jacobian import project_weights, shortest

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
        weights = solve_qp(gram + 1e-13 * np.eye(tasks), zeros, None, None, ones, [1.0], zeros, None, solver="quadprog")
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
