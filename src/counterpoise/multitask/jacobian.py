"""Methods that combine the tasks' gradients instead of their losses, through torchjd's aggregators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoise.multitask.losses import Batch, Tasks
from counterpoise.multitask.values import wide
from counterpoise.multitask.weighting import Weighting


class JacobianWeighting(Weighting):
    """A scalar whose backward leaves the aggregated gradient on the shared parameters and, on every other parameter,
    the gradient of the plain sum of losses: each head gets its own task's.

    With J (one row per task, over the shared parameters) and its aggregation g(J), the scalar is
    sum_i l_i + <g(J) - sum_i J_i, theta - stop(theta)>: the second term is 0 and its gradient replaces the first one's
    on the shared parameters. It costs one backward pass per task over the shared part, and the usual one.

    A pass per task is cheap when each task has a graph of its own: one forward pass per task, and the losses given as a
    mapping or a sequence. From one forward pass of all rows, or losses stacked beforehand, it costs the whole batch.

    The rows must be the whole batch's, so gradient accumulation and several processes raise.

    Args:
        tasks: names, or how many.
        shared: the parameters that all tasks share, for instance `encoder.parameters()`.
        aggregate: the map from a Jacobian (k, n) to a gradient (n,), for instance any torchjd aggregator. What one with
            a memory of its own remembers (those of torchjd with a `reset()`) is not in the state here.

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
        self.aggregate = aggregate

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
        rows_KN = jacobian(batch.single(), self.shared)
        if not bool(rows_KN.isfinite().all()):  # no aggregator can use it; the loss says what is wrong
            return total
        present = [i for i, _ in batch.sizes()]
        rows_KN = wide(rows_KN)  # least squares and roots are not there in bfloat16
        change_N = self.aggregate(self.rows(rows_KN, present)) - rows_KN.sum(dim=0)
        parts = torch.split(change_N, [p.numel() for p in self.shared])
        for parameter, change in zip(self.shared, parts, strict=True):
            moved = parameter - parameter.detach()
            total = total + (change.reshape(parameter.shape).to(parameter.dtype) * moved).sum()
        return total


class MGDA(JacobianWeighting):
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

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor]) -> None:
        super().__init__(tasks, shared=shared, aggregate=shortest)


class PCGrad(JacobianWeighting):
    """The sum of the tasks' gradients after removing from each, in random order, its conflict with every other
    (Yu et al.: Gradient Surgery for Multi-Task Learning, NeurIPS 2020, algorithm 1), by torchjd.

    The order comes from torch's global generator: seed it to repeat a run.

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> PCGrad(2, shared=[theta])([theta[0], theta[1] - theta[0]]).backward()
        >>> theta.grad
        tensor([0.5000, 1.5000])
    """

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor]) -> None:
        super().__init__(tasks, shared=shared, aggregate=torchjd_aggregator("PCGrad"))


class CAGrad(JacobianWeighting):
    """The direction that helps the worst-off task most within a ball of radius c ||g|| around the mean gradient g
    (Liu et al.: Conflict-Averse Gradient Descent, NeurIPS 2021, algorithm 1), by torchjd, which solves it with cvxpy.

    Args, beside those of every `JacobianWeighting`:
        radius: c, >= 0; 0 is the mean gradient. The paper uses 0.4 and 0.5.
    """

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor], radius: float = 0.4) -> None:
        super().__init__(tasks, shared=shared, aggregate=torchjd_aggregator("CAGrad", c=radius))


class UPGrad(JacobianWeighting):
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

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor]) -> None:
        super().__init__(tasks, shared=shared, aggregate=torchjd_aggregator("UPGrad", projector=project_weights))


class AlignedMTL(JacobianWeighting):
    """The mean gradient after the Jacobian's singular values are all brought to the smallest (Senushkin, Patakin,
    Kuznetsov, Konushin: Independent Component Alignment for Multi-Task Learning, CVPR 2023, algorithm 1), by torchjd.

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> AlignedMTL(2, shared=[theta])([4 * theta[0], theta[1]]).backward()
        >>> theta.grad
        tensor([0.5000, 0.5000])
    """

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor]) -> None:
        super().__init__(tasks, shared=shared, aggregate=torchjd_aggregator("AlignedMTL"))


class IMTLG(JacobianWeighting):
    """The combination, with weights that add up to 1, whose projections onto all tasks' gradients are equal (Liu et al.:
    Towards Impartial Multi-task Learning, ICLR 2021, section 3.1), by torchjd.

    Examples:
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> IMTLG(2, shared=[theta])([4 * theta[0], theta[1]]).backward()
        >>> theta.grad
        tensor([0.8000, 0.8000])
    """

    def __init__(self, tasks: Tasks, *, shared: Iterable[Tensor]) -> None:
        super().__init__(tasks, shared=shared, aggregate=torchjd_aggregator("IMTLG"))


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
        if not 0.0 < fairness < math.inf:
            raise ValueError(f"fairness must be positive and finite, found {fairness}.")
        solve = torchjd_aggregator("FairGrad", alpha=fairness)
        super().__init__(tasks, shared=shared, aggregate=partial(_fair, solve=solve, fairness=fairness))
        self.fairness = fairness


def _fair(rows_KN: Tensor, *, solve: Callable[[Tensor], Tensor], fairness: float) -> Tensor:
    """FairGrad's direction, of rows brought to a length of about 1, where the solver is exact."""
    if fairness == 1.0:  # w_i J_i stays the same when J_i is made longer: each row to length 1
        sizes_K = rows_KN.norm(dim=1, keepdim=True)
        return solve(rows_KN / sizes_K.clamp(min=torch.finfo(rows_KN.dtype).tiny))
    size = rows_KN.square().sum(dim=1).mean().sqrt()
    if not size > 0.0:
        return rows_KN.sum(dim=0)
    return solve(rows_KN / size) * size ** ((1.0 - fairness) / (1.0 + fairness))  # w scales with size^(-2a / (1 + a))


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
        if not max_norm > 0.0:
            raise ValueError(f"max_norm must be positive, found {max_norm}.")
        self.max_norm = max_norm
        self.aggregate = partial(_no_longer, aggregate=self.aggregate, most=max_norm)


def _no_longer(rows_KN: Tensor, *, aggregate: Callable[[Tensor], Tensor], most: float) -> Tensor:
    direction_N = aggregate(rows_KN)
    return direction_N * min(1.0, most / max(float(direction_N.norm()), 1e-300))


def project_weights(weights_TM: Tensor, gramian_MM: Tensor) -> Tensor:
    """The weights v >= u, per row u, with the least v' G v: those of the projection onto the dual cone.

    With v = u + z and G = R'R it is min over z >= 0 of ||R z + R u||.
    """
    from scipy.optimize import nnls

    root = _root(gramian_MM)
    rows = weights_TM.detach().cpu().double().numpy()
    solved = np.stack([u + nnls(root, -root @ u)[0] for u in rows])
    return torch.as_tensor(solved, dtype=weights_TM.dtype, device=weights_TM.device)


def shortest(rows_KN: Tensor) -> Tensor:
    """The point of the rows' convex hull that is nearest to 0, (n,).

    With G = R'R, the u >= 0 that minimises ||R u||^2 + (1 - sum u)^2 is that combination times a positive number: where
    u_i > 0, (G u)_i = 1 - sum u, and elsewhere it is at least that (Lawson, Hanson: Solving Least Squares Problems,
    chapter 23).
    """
    from scipy.optimize import nnls

    root = _root(rows_KN @ rows_KN.T)
    u, _ = nnls(np.vstack([root, np.ones(len(root))]), np.append(np.zeros(len(root)), 1.0))
    return rows_KN.new_tensor(u / u.sum()) @ rows_KN


def _root(gramian_MM: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """R with R'R = G over its largest eigenvalue."""
    values, vectors = np.linalg.eigh(gramian_MM.detach().cpu().double().numpy())
    return np.sqrt(np.maximum(values, 0.0) / max(float(values[-1]), 1e-300))[:, None] * vectors.T  # type: ignore[no-any-return]


def shared_parameters(shared: Iterable[Tensor]) -> list[Tensor]:
    """The list of parameters, refusing an empty, repeating or frozen one."""
    if isinstance(shared, Tensor):
        raise TypeError("shared must be an iterable of parameters, found one tensor: write [parameter].")
    parameters = list(shared)
    if not parameters:
        raise ValueError("shared must hold at least one parameter, found none. A used-up generator? Pass a list.")
    if wrong := [type(p).__name__ for p in parameters if not isinstance(p, Tensor)]:
        raise TypeError(f"shared must hold parameters, found {wrong[0]}: pass module.parameters().")
    if len({id(p) for p in parameters}) != len(parameters):
        raise ValueError("shared holds the same parameter more than once.")
    if frozen := sum(not p.requires_grad for p in parameters):
        raise ValueError(f"shared holds {frozen} parameter(s) with requires_grad=False: leave the frozen ones out.")
    return parameters


def jacobian(losses: Sequence[Tensor], parameters: list[Tensor]) -> Tensor:
    """d losses / d parameters, flattened and joined, (k, n): one backward pass per loss; the graph is kept."""
    rows = []
    for value in losses:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        rows.append(torch.cat([g.detach().reshape(-1) for g in flat]))
    return torch.stack(rows)


def torchjd_aggregator(name: str, **settings: object) -> Callable[[Tensor], Tensor]:
    """The aggregator of that name from torchjd, or an ImportError that says what to install."""
    try:
        import torchjd.aggregation

        aggregator: Callable[[Tensor], Tensor] = getattr(torchjd.aggregation, name)(**settings)  # CAGrad imports cvxpy
    except ImportError as error:
        raise ImportError(f"{name} needs what is not here: pip install 'counterpoise[multitask]' ({error}).") from error
    return aggregator
