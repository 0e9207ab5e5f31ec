"""The methods on gradients where lengths differ much, in low precision, and where a loss has no gradient to give."""

import copy

import pytest
import torch
from torch import nn

from counterpoise.multitask import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ExcessMTL,
    GradNorm,
    JacobianWeighting,
    NashMTL,
    PCGrad,
    UPGrad,
)

ROWS = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3
EACH = [MGDA, PCGrad, UPGrad, CAGrad, AlignedMTL, IMTLG, NashMTL, GradNorm, ExcessMTL]


def leaf(size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.ones(size, dtype=dtype, requires_grad=True)


def direction(method, rows_KN, dtype, factor=1.0, **settings):
    theta = leaf(rows_KN.shape[1], dtype)
    losses = [(row * theta).sum() for row in rows_KN.to(dtype)]
    (method(len(rows_KN), shared=[theta], **settings)(losses) * factor).backward()
    return theta.grad.double() / factor


def aligned(g):
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    return (s[-1] * u @ v).mean(0)


def impartial(g):
    unit = g / g.norm(dim=1, keepdim=True)
    weights = torch.linalg.solve(unit @ unit.T, torch.ones(len(g), dtype=g.dtype)) / g.norm(dim=1)
    return weights @ g / weights.sum()


def averse(g, radius=0.4):
    """Over a fine grid of the one weight that two tasks leave."""
    mean = g.mean(0)
    w = torch.linspace(0, 1, 200_001, dtype=g.dtype)
    gram = g @ g.T
    length = (w**2 * gram[0, 0] + 2 * w * (1 - w) * gram[0, 1] + (1 - w) ** 2 * gram[1, 1]).sqrt()
    best = w[(w * (g[0] @ mean) + (1 - w) * (g[1] @ mean) + radius * mean.norm() * length).argmin()]
    toward = best * g[0] + (1 - best) * g[1]
    return mean + radius * mean.norm() * toward / toward.norm()


@pytest.mark.parametrize(("method", "reference"), [(AlignedMTL, aligned), (IMTLG, impartial), (CAGrad, averse)])
@pytest.mark.parametrize(("size", "ratio"), [(1.0, 1.0), (1.0, 1e4), (1e-3, 1.0), (1e-8, 1.0), (1e-3, 1e5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_and_unequal_gradients_give_what_the_equations_say(method, reference, size, ratio, dtype):
    rows_KN = (size * ROWS * torch.tensor([[1.0], [ratio]])).to(dtype).double()
    expected = reference(rows_KN)
    error = (direction(method, rows_KN, dtype) - expected).norm() / expected.norm()
    assert error < max(1e-4, 1e-6 * ratio if dtype == torch.float32 else 0.0)


def test_rows_that_are_equal_but_for_rounding_count_as_one():
    rows_KN = ROWS[:1].repeat(3, 1).float()
    rows_KN[1] *= 1 + 1e-7
    for method in (AlignedMTL, IMTLG):
        found = direction(method, rows_KN, torch.float32)
        assert float(found.norm()) == pytest.approx(float(ROWS[0].norm()), rel=0.5)


@pytest.mark.parametrize("method", [AlignedMTL, IMTLG, CAGrad])
def test_gradients_of_zero_give_zero(method):
    assert direction(method, torch.zeros(3, 4), torch.float32).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize("method", [MGDA, AlignedMTL, IMTLG, NashMTL])
def test_half_precision_parameters_get_the_aggregate_to_the_last_bit_but_one(method, factor, dtype):
    rows_KN = (ROWS * torch.tensor([[1.0], [100.0]])).to(dtype).double()
    expected = direction(method, rows_KN, torch.float64)
    found = direction(method, rows_KN, dtype, factor)
    assert float((found - expected).norm() / expected.norm()) < torch.finfo(dtype).eps


def test_the_exchange_in_half_precision_is_of_its_own_backward_pass():
    theta, rows_KN = leaf(20, torch.bfloat16), (ROWS * torch.tensor([[1.0], [100.0]])).to(torch.bfloat16)
    weighting = AlignedMTL(2, shared=[theta])

    def scalar():
        weighting.discard()
        return weighting([(row * theta).sum() for row in rows_KN])

    scalar()  # never run
    (3.0 * theta).sum().backward()
    assert theta.grad.tolist() == [3.0] * 20  # no hook is left
    theta.grad = None
    (g,) = torch.autograd.grad(scalar(), theta)
    twice = scalar()
    twice.backward(retain_graph=True)
    twice.backward()
    torch.testing.assert_close(theta.grad, 2 * g)
    theta.grad = None
    (scalar() + 64.0 * theta.sum()).backward()  # what else arrives stays
    torch.testing.assert_close(theta.grad, g + 64.0, rtol=0, atol=4.0)
    theta.grad = None
    (3.0 * theta).sum().backward()
    assert theta.grad.tolist() == [3.0] * 20


@pytest.mark.parametrize("method", EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_weighting_changes_nothing(method, dtype):
    found = []
    for enabled in (False, True):
        theta = leaf(4)
        losses = [(theta * x).square().sum() for x in torch.randn(3, 4, generator=torch.Generator().manual_seed(1))]
        torch.manual_seed(0)
        weighting = method(3, shared=[theta])
        with torch.autocast("cpu", dtype, enabled=enabled):
            scalar = weighting(losses)
        scalar.backward()
        weighting.step()
        found.append(theta.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("method", [MGDA, IMTLG, NashMTL])
def test_small_gradients_do_not_sink_to_0_in_float16(method):
    torch.manual_seed(0)
    layer, heads, x = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(2)), torch.randn(64, 8)
    found = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            out = [head(layer(x)) for head in heads]
        losses = [(y.float() - i).square().mean() * 1e-5 * (1 + i) for i, y in enumerate(out)]
        (method(2, shared=layer.parameters())(losses) * 2.0**16).backward()
        found.append(layer.weight.grad)
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.01


@pytest.mark.parametrize("method", EACH)
def test_parameters_that_no_loss_depends_on_are_said(method):
    theta = leaf(2)
    weighting = copy.deepcopy(method(2, shared=[theta]))
    with pytest.raises(RuntimeError, match="no task's loss depends on the shared parameters: were they replaced"):
        weighting([theta[0].square(), theta[1].square()])


@pytest.mark.parametrize("method", EACH)
def test_a_loss_without_a_gradient_has_one_of_zeros(method):
    theta = leaf(2)
    weighting = method(2, shared=[theta])
    weighting([2 * theta[0], torch.tensor(1.0)]).backward()
    weighting.step()
    assert theta.grad.isfinite().all()
    with torch.no_grad():
        assert weighting([theta[0], theta[1]]).isfinite()


@pytest.mark.parametrize("method", EACH)
def test_parameters_frozen_since_get_nothing(method):
    first, second = leaf(2), leaf(2)
    weighting = method(2, shared=[first, second])
    second.requires_grad_(False)
    weighting([first[0].square() * second[0], first.square().sum()]).backward()
    weighting.step()
    assert second.grad is None
    assert first.grad.any()


@pytest.mark.parametrize("method", EACH)
def test_sparse_gradients_are_as_dense_ones(method):
    grads, i = [], torch.tensor([1, 1, 2])
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, sparse=sparse)
        method(2, shared=table.parameters())([table(i).sum(), table(i[:2]).square().sum()]).backward()
        grads.append(table.weight.grad.to_dense())
    torch.testing.assert_close(*grads)


def test_an_aggregator_with_a_memory_needs_every_task():
    from torchjd.aggregation import Constant, GradVac

    theta = leaf(3)
    losses = [theta[0], None, 2 * theta[2]]
    with pytest.raises(RuntimeError, match="remembers each row by its place, and 1 of 3 tasks are absent"):
        JacobianWeighting(3, shared=[theta], aggregate=GradVac())(losses)
    with pytest.raises(ValueError) as failed:  # noqa: PT011
        JacobianWeighting(3, shared=[theta], aggregate=Constant(torch.ones(3)))(losses)
    assert "1 of 3 tasks are absent: it was given 2 rows." in failed.value.__notes__


@pytest.mark.parametrize(
    "aggregate", [lambda g: g.mean(), lambda g: g, lambda g: g.sum(0, keepdim=True), lambda g: 1.0]
)
def test_what_an_aggregator_must_give_is_said(aggregate):
    theta = leaf(3)
    with pytest.raises(ValueError, match=r"aggregate must map \(2, 3\) to \(3,\), found"):
        JacobianWeighting(2, shared=[theta], aggregate=aggregate)([theta[0], theta[1]])
    with pytest.raises(TypeError, match="found 'MGDA'"):
        JacobianWeighting(2, shared=[theta], aggregate="MGDA")
