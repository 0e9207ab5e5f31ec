"""Methods that combine the tasks' gradients instead of their losses, through torchjd's aggregators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from counterpoise.multitask.aggregators import (
    aligned,
    conflict_averse,
    fair,
    impartial,
    no_longer,
    project_weights,
    shortest,
    torchjd_aggregator,
)
from counterpoise.multitask.losses import Batch, Tasks
from counterpoise.multitask.shared import jacobian, shared_parameters
from counterpoise.multitask.values import refuse_outside, wide
from counterpoise.multitask.weighting import Weighting


class JacobianWeighting(Weighting):
    """A scalar whose backward leaves the aggregated gradient on the shared parameters and, on every other parameter,
    the gradient of the plain sum of losses: each head gets its own task's.

    With J (one row per task, over the shared parameters) and its aggregation g(J), the scalar is
    sum_i l_i + <g(J) - sum_i J_i, theta - stop(theta)>: the second term is 0 and its gradient replaces the first one's
    on the shared parameters. It costs one backward pass per task over the shared part, and the usual one. For shared
    parameters in bfloat16 or float16, where sum - sum + g would leave rounding of the sum, another pass finds that
    sum, and a hook exchanges what arrives: as exact as the type, when the scalar is multiplied by a power of two alone.

    A pass per task is cheap when each task has a graph of its own: one forward pass per task, and the losses given as a
    mapping or a sequence. From one forward pass of all rows, or losses stacked beforehand, it costs the whole batch.

    The rows must be the whole batch's, so gradient accumulation and several processes raise.

    Args:
        tasks: names, or how many.
        shared: the parameters that all tasks share, for instance `encoder.parameters()`.
        aggregate: the map from a Jacobian (k, n) to a gradient (n,), for instance any torchjd aggregator. What one with
            a memory of its own remembers (those of torchjd with a `reset()`) is not in the state here; it
            needs all tasks in each batch.

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> middle = JacobianWeighting(3, shared=[theta], aggregate=lambda rows_KN: rows_KN.median(dim=0).values)
        >>> middle([theta[0], 2 * theta[0], 9 * theta[0]]).backward()
        >>> theta.grad
        tensor([2., 0.])
    """

    whole_batch_only = True

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor], aggregate: Callable[[Tensor], Tensor]) -> None:
        super().__init__(tasks, missing="hold")  # a remembered gradient would be that of other weights
        self.shared = shared_parameters(shared)
        if not callable(aggregate):
            raise TypeError(
                f"aggregate must be a function or an aggregator, torchjd.aggregation.MGDA(), found {aggregate!r}."
            )
        self.aggregate = aggregate
        self._hooks: list[Any] = []

    def reset(self) -> None:
        super().reset()
        if hasattr(self.aggregate, "reset"):
            self.aggregate.reset()

    def rows(self, rows_KN: Tensor, present: list[int]) -> Tensor:
        """What is aggregated, of the Jacobian's rows of the tasks present; a method may change it."""
        return rows_KN

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        """The sum of the losses, with the shared parameters' gradient exchanged."""
        total = batch.values_K.sum()
        if not torch.is_grad_enabled() or not total.requires_grad:
            return total
        rows_KN, finite = jacobian(batch.single(), self.shared)
        if not finite:  # no aggregator can use it; the loss says what is wrong
            return total
        with torch.autocast(total.device.type, enabled=False):
            chosen_KN = self.rows(rows_KN, [i for i, _ in batch.sizes()])
            return self._exchanged(total, self._aggregated(chosen_KN), rows_KN.sum(dim=0))

    def _aggregated(self, rows_KN: Tensor) -> Tensor:
        absent = len(self.tasks) - len(rows_KN)
        if absent and hasattr(self.aggregate, "reset"):
            raise RuntimeError(
                f"{self.aggregate} remembers each row by its place, and {absent} of {len(self.tasks)} tasks are absent: "
                f"expected every task in each batch. Mix them in each, or take an aggregator without a memory."
            )
        try:
            found = self.aggregate(rows_KN)
        except Exception as error:
            if absent:
                error.add_note(f"{absent} of {len(self.tasks)} tasks are absent: it was given {len(rows_KN)} rows.")
            raise
        if not isinstance(found, Tensor) or found.shape != rows_KN.shape[1:]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"aggregate must map {tuple(rows_KN.shape)} to {tuple(rows_KN.shape[1:])}, found {shape}.")
        return found

    def _exchanged(self, total: Tensor, aggregated_N: Tensor, sum_N: Tensor) -> Tensor:
        """The total, with this aggregate as the shared parameters' gradient in the place of their sum."""
        while self._hooks:  # of a backward pass that broke off
            self._hooks.pop().remove()
        sizes = [p.numel() for p in self.shared]
        changes, parts = torch.split(aggregated_N - sum_N, sizes), torch.split(aggregated_N, sizes)
        halves = [p for p in self.shared if p.requires_grad and wide(p) is not p]
        sums = torch.autograd.grad(total, halves, retain_graph=True, allow_unused=True) if halves else ()
        summed = {id(p): x for p, x in zip(halves, sums, strict=True) if x is not None}
        for p, change, part in zip(self.shared, changes, parts, strict=True):
            if id(p) in summed:
                total = total + _Exchange.apply(  # type: ignore[no-untyped-call]
                    p, summed[id(p)], part.reshape(p.shape), total.dtype, self._hooks
                )
            else:
                total = total + (change.reshape(p.shape).to(p.dtype) * (p - p.detach())).sum()
        return total


class _Exchange(torch.autograd.Function):
    """0, whose backward pass takes the sum of the tasks' gradients off what arrives at a parameter, and adds the aggregate.

    The hook is there from this node to the parameter of the same pass, so that no other pass meets it.
    """

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, sum_: Tensor, aggregate: Tensor, dtype: torch.dtype, hooks: list[Any]
    ) -> Tensor:
        ctx.all = parameter, sum_, aggregate, hooks
        return torch.zeros((), dtype=dtype, device=parameter.device)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        parameter, sum_, aggregate, hooks = ctx.all

        def exchange(arrived: Tensor) -> Tensor:
            hooks.remove(handle)
            handle.remove()
            # What else arrives, as of a penalty added to the scalar, stays.
            exchanged: Tensor = (wide(arrived) - wide(sum_) * factor) + aggregate * factor
            return exchanged.to(arrived.dtype)

        handle = parameter.register_hook(exchange)
        hooks.append(handle)
        return (None,) * 5


class _Settled(JacobianWeighting):
    """A method with no settings: its aggregator, or what torchjd calls it."""

    aggregator: ClassVar[Any]

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor]) -> None:
        named = isinstance(self.aggregator, str)
        aggregate = torchjd_aggregator(self.aggregator, **self.settings) if named else self.aggregator
        super().__init__(tasks, shared=shared, aggregate=aggregate)

    settings: ClassVar[dict[str, Any]] = {}


class MGDA(_Settled):
    """The shortest convex combination of the tasks' gradients (Sener, Koltun: Multi-Task Learning as Multi-Objective
    Optimization, NeurIPS 2018, equation 3), of raw, unnormalised gradients.

    Departure: exact, as one non-negative least-squares problem (`shortest`), where the paper's Frank-Wolfe steps stop at
    a tolerance.

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> MGDA(2, shared=[theta])([theta[0] * 2, theta[1] * 2]).backward()
        >>> theta.grad
        tensor([1., 1.])
    """

    aggregator = staticmethod(shortest)


class PCGrad(_Settled):
    """The sum of the tasks' gradients after removing from each, in random order, its conflict with every other
    (Yu et al.: Gradient Surgery for Multi-Task Learning, NeurIPS 2020, algorithm 1), by torchjd.

    The order comes from torch's global generator: seed it to repeat a run.

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> PCGrad(2, shared=[theta])([theta[0], theta[1] - theta[0]]).backward()
        >>> theta.grad
        tensor([0.5000, 1.5000])
    """

    aggregator = "PCGrad"


class CAGrad(JacobianWeighting):
    """The direction that helps the worst-off task most within a ball of radius c ||g|| around the mean gradient g
    (Liu et al.: Conflict-Averse Gradient Descent, NeurIPS 2021, algorithm 1), whose weights torchjd solves
    with cvxpy.

    Args, beside those of every `JacobianWeighting`:
        radius: c, >= 0; 0 is the mean gradient. The paper uses 0.4 and 0.5.
    """

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor], radius: float = 0.4) -> None:
        refuse_outside("[0, inf)", radius=radius)
        weigh = torchjd_aggregator("CAGradWeighting", c=radius, norm_eps=1e-12)
        aggregate = partial(conflict_averse, weigh=weigh, radius=radius)
        super().__init__(tasks, shared=shared, aggregate=aggregate)
        self.radius = radius


class UPGrad(_Settled):
    """The mean of the tasks' gradients, each first projected onto the directions that no task opposes (Quinton, Rey:
    Jacobian Descent for Multi-Objective Optimization, 2024, section 3), by torchjd.

    Departure: torchjd's default projector needs quadprog and shifts the Gramian by 1e-4 to be solvable; here the same
    quadratic program is solved as non-negative least squares by scipy, unshifted.

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> UPGrad(2, shared=[theta])([theta[0], theta[1] - theta[0]]).backward()
        >>> theta.grad
        tensor([0.2500, 0.7500])
    """

    aggregator, settings = "UPGrad", {"projector": project_weights}


class AlignedMTL(_Settled):
    """The mean gradient after the Jacobian's singular values are all brought to the smallest (Senushkin, Patakin,
    Kuznetsov, Konushin: Independent Component Alignment for Multi-Task Learning, CVPR 2023, algorithm 1).

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> AlignedMTL(2, shared=[theta])([4 * theta[0], theta[1]]).backward()
        >>> theta.grad
        tensor([0.5000, 0.5000])
    """

    aggregator = staticmethod(aligned)


class IMTLG(_Settled):
    """The combination, with weights that add up to 1, whose projections onto all tasks' gradients are equal (Liu et al.:
    Towards Impartial Multi-task Learning, ICLR 2021, section 3.1).

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> IMTLG(2, shared=[theta])([4 * theta[0], theta[1]]).backward()
        >>> theta.grad
        tensor([0.8000, 0.8000])
    """

    aggregator = staticmethod(impartial)


class FairGrad(JacobianWeighting):
    """The direction J'w that is fair to the tasks' gains: J J' w = w^(-1/a) (Ban, Ji: Fair Resource Allocation in
    Multi-Task Learning, ICML 2024, equation 4), by torchjd. Its solver is exact to about 1e-4 where the gradients' lengths
    are within a factor of 100 of each other; with fairness 1, for any.

    Args, beside those of every `JacobianWeighting`:
        fairness: a, > 0; 1 is the direction of `NashMTL`, more favours the task that gains least.

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> FairGrad(2, shared=[theta], fairness=1.0)([4 * theta[0], theta[1]]).backward()
        >>> [round(x, 3) for x in theta.grad.tolist()]
        [1.0, 1.0]
    """

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor], fairness: float = 1.0) -> None:
        refuse_outside("(0, inf)", fairness=fairness)
        solve = torchjd_aggregator("FairGrad", alpha=fairness)
        super().__init__(tasks, shared=shared, aggregate=partial(fair, solve=solve, fairness=fairness))
        self.fairness = fairness


class NashMTL(FairGrad):
    """The tasks' bargaining solution: J'w with J J' w = 1 / w, no longer than `max_norm` (Navon et al.: Multi-Task
    Learning as a Bargaining Game, ICML 2022, claim 3.1 and algorithm 1).

    Departure: solved exactly, as `FairGrad` with fairness 1, where the paper's code takes steps of a convex-concave
    procedure.

    Args, beside those of every `JacobianWeighting`:
        max_norm: of the direction, 1 in the paper's code; infinity: no bound. Unbounded it has the length sqrt(k).

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> NashMTL(2, shared=[theta])([4 * theta[0], theta[1]]).backward()
        >>> [round(x, 3) for x in theta.grad.tolist()]
        [0.707, 0.707]
    """

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor], max_norm: float = 1.0) -> None:
        super().__init__(tasks, shared=shared)
        refuse_outside("(0, inf]", max_norm=max_norm)
        self.max_norm = max_norm
        self.aggregate = partial(no_longer, aggregate=self.aggregate, most=max_norm)
