"""BanditMTL: task weights from an adversarial bandit inside a KL ball, as a module for any training loop."""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoise.multitask.losses import Batch, Counts, Losses, Tasks, WindowMeans, gather
from counterpoise.multitask.mirror import ball_radius, best_response_floats, divergence, hold, mirror_floats
from counterpoise.multitask.weighting import Missing, Weighting, on_device, weighted_sum
from counterpoise.ranks import world_size


class BanditMTL(Weighting):
    """Weights the tasks by a bandit adversary that favours the large losses, inside a ball around uniform weights.

    min over theta, max over p of sum_i p_i l_i(theta), with KL(p || uniform) <= rho (Mao, Wang, Liu, Lin, Hu:
    BanditMTL, ACL 2021). The maximum is mean + sqrt(2 rho Var) + ..., so it penalises the variance of the task losses.
    `balance(losses)` descends on the p held at the start of the optimiser step; `balance.step()` moves p by one
    `mirror_step` on that window's losses.

    Departures: the order (descend, then ascend) is that of the public re-implementation; the paper's own could not be
    read. Absent tasks, windows, ranks and the floor of 1e-12 under the weights are not in the paper.

    rho is read relative to log m: at least m exp(-rho) tasks stay effective, which `min_effective_tasks` says directly.
    Losses should be in comparable units (a 4-way and a binary cross-entropy are not: see `normalize`).
    Never feed policy-gradient surrogates, whose size means nothing.

    Args:
        tasks: names, or how many; at least two.
        rho: radius of the ball, >= 0; 0 is uniform weighting. Exactly one of rho and min_effective_tasks.
        min_effective_tasks: rho = log(m / min_effective_tasks), in [1, m].
        eta: step size of the ascent, in 1 / units of loss.
        micro_batches: calls per optimiser step when `window_counts` are not given (see `Weighting`).
        drawn_by: how tasks come to be in a batch. None: whichever way; an absent task counts as `missing` says.
            A sequence: each example's task is drawn with these known probabilities, all above 0; losses and gradients
            are weighted by their inverse, so both are unbiased. "p": the batches are drawn by p itself (`draw`), fed
            with `observe` instead of weighted; calling the module is then an error.
        exploration: with `drawn_by="p"`, the share of the uniform distribution mixed into p.
        normalize: divide each task's loss by its mean in the first window it was seen in (that window runs undivided).
        missing: "last": an absent task counts with its last known loss, so that one task a batch moves the weights to
            where full batches would; one that was never seen keeps its share. "hold": every absent task keeps its share
            (see `hold`), so that one task a batch never moves them. Not used with `drawn_by`, which corrects instead.
        half_life: see `Weighting`.

    Raises:
        ValueError: both or none of rho and min_effective_tasks, or one out of range. See `Weighting` for the rest.

    Example:
        >>> balance = BanditMTL(["books", "dvd", "kitchen"], min_effective_tasks=2)
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> optimizer = torch.optim.SGD([theta], lr=0.1)
        >>> for _ in range(3):
        ...     losses = (theta - torch.tensor([1.0, 2.0, 3.0])).square()
        ...     optimizer.zero_grad()
        ...     balance(dict(zip(balance.tasks, losses))).backward()
        ...     optimizer.step()
        ...     balance.step()
        >>> [round(w, 3) for w in balance.probabilities().tolist()]
        [0.061, 0.184, 0.756]
    """

    def __init__(
        self,
        tasks: Tasks,
        *,
        rho: float | None = None,
        min_effective_tasks: float | None = None,
        eta: float = 0.5,
        micro_batches: int = 1,
        drawn_by: Sequence[float] | Literal["p"] | None = None,
        exploration: float = 0.05,
        normalize: bool = False,
        missing: Missing = "last",
        half_life: float = 0.0,
    ) -> None:
        super().__init__(tasks, micro_batches=micro_batches, missing=missing, half_life=half_life)
        m = len(self.tasks)
        if m < 2:
            raise ValueError(f"BanditMTL weighs tasks against each other: expected at least 2, found {m}.")
        self.rho = _radius(m, rho, min_effective_tasks)
        if not 0.0 < eta < math.inf:
            raise ValueError(f"eta must be positive and finite, found {eta}.")
        if not 0.0 <= exploration <= 1.0:
            raise ValueError(f"exploration must lie in [0, 1], found {exploration}.")
        self.eta, self.exploration, self.normalize = eta, exploration, normalize
        self.samples = drawn_by == "p"
        if isinstance(drawn_by, str) and not self.samples:
            raise ValueError(f'drawn_by must be None, "p" or one probability per task, found {drawn_by!r}.')
        self._drawn_by = None if drawn_by is None or isinstance(drawn_by, str) else _simplex(m, drawn_by)
        self.compares = drawn_by is None and self.rho > 0.0  # each drawn task is feedback of its own
        self._log_p, self._initial, self._multiplier = [-math.log(m)] * m, [math.nan] * m, 0.0
        self._cached: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def forward(self, losses: Losses, counts: Counts | None = None, window_counts: Counts | None = None) -> Tensor:
        """sum_i p_i l_i with this window's p; see `Weighting.forward`."""
        if self.samples:
            raise RuntimeError(
                'this BanditMTL was built with drawn_by="p": its batches are drawn by p, and weighting their losses by '
                "p too would count it twice. Train on the plain loss and pass the task losses to observe()."
            )
        return super().forward(losses, counts, window_counts)

    def observe(self, losses: Losses, counts: Counts | None = None) -> None:
        """Record task losses for the next `step()` without weighting them (for batches drawn by `draw`)."""
        if not self.samples:
            raise RuntimeError('observe() is for batches drawn by p: build BanditMTL with drawn_by="p", or call it.')
        batch = gather(self.tasks, losses, counts)
        self._window.refuse_if_complete(batch, None, self.micro_batches)
        self._window.add(batch, None)

    def draw(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Task indices, (size,), drawn independently by `probabilities()`."""
        if not self.samples:
            raise RuntimeError(
                "this BanditMTL weights losses by p; drawing batches by p too would count it twice. Build it with "
                'drawn_by="p" to draw.'
            )
        return torch.multinomial(self.probabilities(), size, replacement=True, generator=generator)

    def probabilities(self) -> Tensor:
        """p in task order, float64, (m,); with `drawn_by="p"` mixed with uniform, as `draw` needs it."""
        p = torch.tensor(self.weights(), dtype=torch.float64)
        if self.samples:
            p = (1.0 - self.exploration) * p + self.exploration / len(p)
        return p / p.sum()

    def weights(self) -> list[float]:
        return list(map(math.exp, self._log_p))

    def metrics(self) -> dict[str, float]:
        """`Weighting.metrics` and effective_tasks, kl, lambda (where finite), and robust_value: the maximum over the ball."""
        kl = divergence(torch.tensor(self._log_p, dtype=torch.float64))
        effective = len(self.tasks) * math.exp(-kl)
        found = super().metrics() | {"kl": kl, "effective_tasks": effective, "lambda": self._multiplier}
        if all(map(math.isfinite, self.last_losses)):
            response = best_response_floats(self.last_losses, self.rho)
            found["robust_value"] = sum(p * x for p, x in zip(response, self.last_losses, strict=True))
        return {name: number for name, number in found.items() if math.isfinite(number)}  # JSON has no infinite lambda

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        values_K = batch.values_K
        exact = values_K.dtype == torch.float64 or (scale_K is not None and scale_K.dtype == torch.float64)
        key = values_K.device, torch.float64 if exact else torch.float32
        weights_M = self._cached.get(key)
        if weights_M is None:
            weights = self._in_units(self.weights())
            # frombuffer: several times faster than torch.tensor on a list.
            weights_M = torch.frombuffer(array("d" if exact else "f", weights), dtype=key[1])
            if values_K.device.type != "cpu":
                weights_M = weights_M.to(values_K.device, non_blocking=True)
            if not weights_M.is_inference():  # autograd would refuse it in the next training call
                self._cached[key] = weights_M
        return weighted_sum(batch.of_present(weights_M), values_K, scale_K)

    def update(self, means: WindowMeans) -> None:
        """One mirror step of p on the window's means."""
        own, counts = vars(self), means.counts  # see `Weighting.step`
        if self.normalize:
            triples = zip(means.means, counts, self._initial, strict=True)
            own["_initial"] = [x if c > 0.0 and math.isnan(u) else u for x, c, u in triples]
        losses = self._in_units(means.means)
        if (drawn_by := self._draw_probabilities()) is not None:
            total = sum(counts)
            losses = [x * c / (total * d) for x, c, d in zip(losses, counts, drawn_by, strict=True)]
        elif 0.0 in counts:
            losses, known = self.compared(means)
            losses = self._in_units(losses)
            if not all(known):
                losses = hold(self._log_p, losses, known, self.eta)
        own["_log_p"], own["_multiplier"] = mirror_floats(self._log_p, losses, self.rho, self.eta)
        self._cached.clear()

    def state(self) -> dict[str, Any]:
        """log p, lambda, and the initial losses that `normalize` divides by."""
        log_p_M, initial_M = (torch.tensor(x, dtype=torch.float64) for x in (self._log_p, self._initial))
        return {"log_p": log_p_M, "initial": initial_M, "lambda": self._multiplier}

    def load_state(self, state: dict[str, Any]) -> None:
        self._log_p, self._initial = state["log_p"].tolist(), state["initial"].tolist()
        self._multiplier = state["lambda"]
        self._cached.clear()

    def _in_units(self, values: list[float]) -> list[float]:
        """Values over each task's initial loss, when `normalize` says so and it is known."""
        if not self.normalize:
            return values
        return [x / u if u > 0.0 else x for x, u in zip(values, self._initial, strict=True)]

    def _draw_probabilities(self) -> list[float] | None:
        if self.samples:
            return self.probabilities().tolist()  # type: ignore[no-any-return]
        return self._drawn_by

    def _scale(self, batch: Batch, totals: list[float] | None) -> Tensor | None:
        drawn_by = self._draw_probabilities()
        if drawn_by is None:
            return super()._scale(batch, totals)
        # E[count_i / all counts] = drawn_by_i, so l_i count_i / (all counts * drawn_by_i) has the mean l_i.
        everything = sum(self._totals(batch, totals) or [c for _, c in batch.sizes()])
        parts = [world_size() * c / (everything * drawn_by[i]) for i, c in batch.sizes()]
        return on_device(parts, batch.values_K.device)


def _radius(m: int, rho: float | None, min_effective_tasks: float | None) -> float:
    if (rho is None) == (min_effective_tasks is None):
        raise ValueError(
            f"expected exactly one of rho and min_effective_tasks, found rho={rho} and "
            f"min_effective_tasks={min_effective_tasks}. rho = log({m} / min_effective_tasks)."
        )
    radius = ball_radius(m, min_effective_tasks) if min_effective_tasks is not None else float(rho or 0.0)
    if not radius >= 0.0:
        raise ValueError(f"rho must be >= 0, found {rho}: 0 is uniform weighting.")
    if radius >= math.log(m):
        warnings.warn(
            f"rho = {radius:.4g} >= log({m}) = {math.log(m):.4g}: the ball holds every weighting, and what is left is "
            f"Group DRO's update, which may put all weight on one task. Choose a smaller rho (or min_effective_tasks "
            f"> 1), or GroupDRO if you meant that.",
            stacklevel=3,
        )
    return radius


def _simplex(m: int, probabilities: Sequence[float]) -> list[float]:
    values = [float(x) for x in probabilities]
    if len(values) != m or min(values) < 0.0 or abs(sum(values) - 1.0) > 1e-6:
        raise ValueError(f"drawn_by must hold {m} probabilities that add up to 1, one per task, found {values}.")
    if 0.0 in values:
        raise ValueError(
            f"drawn_by is 0 for task {values.index(0.0)}, found {values}: expected every probability above 0, since "
            f"losses are divided by it. Leave out a task that is never drawn."
        )
    return values
