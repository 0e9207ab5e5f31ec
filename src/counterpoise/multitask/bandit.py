"""BanditMTL: task weights from an adversarial bandit inside a KL ball, as a module for any training loop."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from numbers import Real
from operator import add, sub
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from counterpoise.multitask.losses import Batch, Counts, Losses, Tasks, WindowMeans, by_task, gather
from counterpoise.multitask.mirror import best_response_floats, divergence, hold, mirror_step
from counterpoise.multitask.prior import (
    FLOOR,
    Prior,
    ball_of,
    largest_radius,
    part_of_the_largest,
    powers,
    simplex,
    temperature,
)
from counterpoise.multitask.values import refuse_outside, weighted_sum
from counterpoise.multitask.weighting import Missing, Weighting


class BanditMTL(Weighting):
    """Weights the tasks by a bandit adversary that favours the large losses, inside a ball around a prior.

    min over theta, max over p of sum_i p_i l_i(theta), with KL(p || prior) <= rho (Mao, Wang, Liu, Lin, Hu:
    BanditMTL, ACL 2021, whose prior is uniform). The maximum is mean + sqrt(2 rho Var) + ..., with the mean and the
    variance of the task losses under the prior, so it penalises that variance.
    `balance(losses)` descends on the p held at the start of the optimiser step; `balance.step()` moves p by one
    `mirror_step` on that window's losses.

    Departures: the order (descend, then ascend) is that of the public re-implementation; the paper's own could not be
    read. Other priors, absent tasks, windows, ranks and the floor of 1e-12 under the weights are not in the paper.

    rho is read relative to log(1 / min prior), at which the ball holds every weighting. For the uniform prior that is
    log m, and at least m exp(-rho) tasks stay effective, which `min_effective_tasks` says directly.
    Losses should be in comparable units (a 4-way and a binary cross-entropy are not: see `normalize`).
    Never feed policy-gradient surrogates, whose size means nothing.

    Args:
        tasks: names, or how many; at least two.
        rho: radius of the ball, >= 0; 0 keeps p at the prior. Or, as "30%", a share of log(1 / min prior). Exactly one
            of rho and min_effective_tasks.
        min_effective_tasks: rho = log(m / min_effective_tasks), in [1, m]; for the uniform prior.
        eta: step size of the ascent, in 1 / units of loss.
        micro_batches: calls per optimiser step when `window_counts` are not given (see `Weighting`).
        prior: the centre of the ball. "uniform"; "proportional" to the share of the rows that is each task's, which is
            what a plain trainer on the same batches minimises; "sqrt" of that share, or a temperature T > 0 for
            share^(1/T); or one positive number per task, such as the sizes of the data sets, in proportion to which.
            The shares are those of `drawn_by`, else those seen so far, and the prior then moves with them.
        drawn_by: how tasks come to be in a batch. None: whichever way; an absent task counts as `missing` says.
            A sequence: each example's task is drawn with these known probabilities, all above 0; losses and gradients
            are weighted by their inverse, so both are unbiased. "p": the batches are drawn by p itself (`draw`), fed
            with `observe` instead of weighted; calling the module is then an error.
        exploration: with `drawn_by="p"`, the share of the prior mixed into p.
        normalize: divide each task's loss by a number of its own, above 0; True: by its mean in the first window it was
            seen in (that window runs undivided), whose error stays.
        missing: "last": an absent task counts with its last known loss, so that one task a batch moves the weights to
            where full batches would; one that was never seen keeps its share. "hold": every absent task keeps its share
            (see `hold`), so that one task a batch never moves them. Not used with `drawn_by`, which corrects instead.
        half_life: see `Weighting`.

    Raises:
        ValueError: both or none of rho and min_effective_tasks, one out of range, or min_effective_tasks with a prior
            that is not uniform; a prior of the shares drawn with drawn_by="p". See `Weighting` for the rest.

    Examples:
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

    remembers: ClassVar[Mapping[str, str]] = {
        "log_p": "_tilt", "initial": "_initial", "lambda": "_multiplier", "center": "_center", "before": "_before",
    }  # fmt: skip

    def __init__(
        self,
        tasks: Tasks,
        *,
        rho: float | str | None = None,
        min_effective_tasks: float | None = None,
        eta: float = 0.5,
        micro_batches: int = 1,
        prior: Prior = "uniform",
        drawn_by: Sequence[float] | Literal["p"] | None = None,
        exploration: float = 0.05,
        normalize: bool | Counts = False,
        missing: Missing = "last",
        half_life: float = 0.0,
    ) -> None:
        super().__init__(tasks, micro_batches=micro_batches, missing=missing, half_life=half_life)
        m = len(self.tasks)
        if m < 2:
            alone = "one needs uniform weights alone"
            raise ValueError(f"BanditMTL weighs tasks against each other: expected at least 2, found {m}; {alone}.")
        refuse_outside("(0, inf)", eta=eta)
        refuse_outside("[0, 1]", exploration=exploration)
        self.eta, self.exploration = eta, exploration
        self._units = [math.nan] * m if isinstance(normalize, bool) else by_task(self.tasks, normalize, "normalize")
        if 0.0 in self._units:
            raise ValueError(f"normalize must be above 0 for every task, found {self._units}.")
        self.normalize = normalize if isinstance(normalize, bool) else self._units
        self.samples = drawn_by == "p"
        if isinstance(drawn_by, str | Real) and not self.samples:
            raise ValueError(f'drawn_by must be None, "p" or one probability per task, found {drawn_by!r}.')
        self.corrects = drawn_by is not None
        """Whether the losses are corrected for how often their tasks were drawn. `with_mixture`, which fills quotas,
        turns it off: each drawn task then counts with its mean, an absent one as `missing` says."""
        self.improvement = 0.0
        self.reference: list[float] | None = None
        self.drawn_by = drawn_by
        self._drawn_by = (
            None
            if drawn_by is None or isinstance(drawn_by, str)
            else simplex(m, [*by_task(self.tasks, drawn_by, "drawn_by")] if isinstance(drawn_by, Mapping) else drawn_by)
        )
        self.prior = prior
        self._fixed = self._read_prior(prior)
        self._part = part_of_the_largest(rho) if isinstance(rho, str) else None
        self._asked = ball_of(m, rho, min_effective_tasks, self._fixed, self._temperature == math.inf)
        self.rho = self._asked
        self.reset()

    @property
    def compares(self) -> bool:  # type: ignore[override]
        """Whether it needs other tasks to learn from one; where losses are corrected, each drawn task is feedback of its own."""
        return not self.corrects and self.rho > 0.0

    def reset(self) -> None:
        super().reset()
        m, self.rho = len(self.tasks), self._asked
        self._center = self._center_now = self._fixed or [1.0] * m
        # log(p / prior), with the prior relative to uniform: for the uniform prior log p itself.
        self._tilt, self._initial, self._multiplier = [-math.log(m)] * m, list(self._units), 0.0
        self._before = [math.nan] * m
        self._cached: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def forward(self, losses: Losses, counts: Counts | None = None, window_counts: Counts | None = None) -> Tensor:
        """sum_i p_i l_i with this window's p; see `Weighting.forward`."""
        if self.samples:
            raise RuntimeError(
                'this BanditMTL was built with drawn_by="p": its batches are drawn by p, and weighting their losses by '
                "p too would count it twice. Train on the plain loss and pass the task losses to observe()."
            )
        return super().forward(
            losses, self._counted(losses, counts) if window_counts is None else counts, window_counts
        )

    def observe(self, losses: Losses, counts: Counts | None = None) -> None:
        """Record task losses for the next `step()` without weighting them (for batches drawn by `draw`)."""
        if not self.samples:
            raise RuntimeError('observe() is for batches drawn by p: build BanditMTL with drawn_by="p", or call it.')
        batch = gather(self.tasks, losses, self._counted(losses, counts))
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
        """p in task order, float64, (m,); with `drawn_by="p"` mixed with the prior, as `draw` needs it."""
        p = torch.tensor(self.weights(), dtype=torch.float64)
        if self.samples:
            center = torch.tensor(self._center, dtype=torch.float64)
            p = (1.0 - self.exploration) * p + self.exploration * center / center.sum()
        return p / p.sum()

    def weights(self) -> list[float]:
        """p, in task order."""
        return self._weights(self._center)

    def metrics(self) -> dict[str, float]:
        """`Weighting.metrics` and effective_tasks (exp of p's entropy), kl from the prior, lambda (where finite), and
        robust_value: the maximum over the ball.
        """
        log_p_M = torch.tensor(self.weights(), dtype=torch.float64).log()
        effective = len(self.tasks) * math.exp(-divergence(log_p_M))
        kl = divergence(log_p_M, torch.tensor(self._center, dtype=torch.float64))
        found = super().metrics() | {"kl": kl, "effective_tasks": effective, "lambda": self._multiplier}
        if all(map(math.isfinite, self.last_losses)):
            response = best_response_floats(self.last_losses, self.rho, self._center)
            found["robust_value"] = sum(p * x for p, x in zip(response, self.last_losses, strict=True))
        return {name: number for name, number in found.items() if math.isfinite(number)}  # JSON has no infinite lambda

    def combine(self, batch: Batch, scale_K: Tensor | None) -> Tensor:
        values_K = batch.values_K
        exact = values_K.dtype == torch.float64 or (scale_K is not None and scale_K.dtype == torch.float64)
        key = values_K.device, torch.float64 if exact else torch.float32
        weights_M = self._cached.get(key)
        if weights_M is None:
            weights = self._in_units(self._weights(self._center_now if self.training else self._center))
            # frombuffer: several times faster than torch.tensor on a list.
            weights_M = torch.frombuffer(array("d" if exact else "f", weights), dtype=key[1])
            if values_K.device.type != "cpu":
                weights_M = weights_M.to(values_K.device, non_blocking=True)
            # An inference tensor autograd would refuse in the next training call; a moving prior is of this call.
            if self._fixed and not weights_M.is_inference():
                self._cached[key] = weights_M
        return weighted_sum(batch.of_present(weights_M), values_K, scale_K)

    def update(self, means: WindowMeans) -> None:
        """One mirror step of p on the window's means."""
        own, counts = vars(self), means.counts  # see `Weighting.step`
        if self.normalize:
            triples = zip(means.means, counts, self._initial, strict=True)
            own["_initial"] = [x if c > 0.0 and math.isnan(u) else u for x, c, u in triples]
        losses, known = means.means, [True]
        if not self.corrects and 0.0 in counts:
            losses, known = self.compared(means)
        losses = self._in_units(self._excess(losses))
        if self.corrects:
            total, drawn_by = sum(counts), self._draw_probabilities() or []
            losses = [x * c / (total * d) for x, c, d in zip(losses, counts, drawn_by, strict=True)]
        elif self.improvement:
            changed = list(zip(losses, counts, self._before, strict=True))
            own["_before"] = [x if c > 0.0 else b for x, c, b in changed]
            changes = [x - b if c > 0.0 and not math.isnan(b) else 0.0 for x, c, b in changed]
            losses = [x + self.improvement * d for x, d in zip(losses, changes, strict=True)]
        own["_center"] = center = self._fixed or powers(self._known_shares(), self._temperature)
        log_center = list(map(math.log, center))
        log_p = list(map(add, self._tilt, log_center))
        if not all(known):
            losses = hold(log_p, losses, known, self.eta)
        self._size_ball()
        log_p, own["_multiplier"] = mirror_step(log_p, losses, self.rho, self.eta, center)
        own["_tilt"] = list(map(sub, log_p, log_center))
        self._cached.clear()

    def change_unit(self, starts: Sequence[float], slopes: Sequence[float]) -> None:
        """Every loss so far counts, by task, as start + slope * loss: as if it had been observed in another unit."""
        own = vars(self)
        for name in ("last_losses", "_known", "_initial"):
            own[name] = [a + b * x for a, b, x in zip(starts, slopes, own[name], strict=True)]
        level_M = self._in_units(self._excess(self.last_losses))
        own["_before"] = [b if math.isnan(b) else x for b, x in zip(self._before, level_M, strict=True)]
        self._window.change_unit(starts, slopes)

    def load_state(self, state: dict[str, Any]) -> None:
        center = [float(c) for c in state.get("center", self._fixed or [])]
        if self._fixed and not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(center, self._fixed, strict=True)):
            raise ValueError(
                f"expected the state of a run with the prior {self._fixed}, relative to uniform, found {center}."
            )
        super().load_state(state)
        self._size_ball()
        self._stay_inside()
        self._cached.clear()

    def _stay_inside(self) -> None:
        """Bring weights of a run with a larger ball to the edge of this one."""
        center = [c / sum(self._center) for c in self._center]
        log_p = [t + math.log(c) for t, c in zip(self._tilt, self._center, strict=True)]
        if (
            divergence(torch.tensor(log_p, dtype=torch.float64), torch.tensor(center, dtype=torch.float64))
            > self.rho + 1e-9
        ):
            log_p, _ = mirror_step(log_p, [0.0] * len(log_p), self.rho, self.eta, self._center)
            vars(self)["_tilt"] = [x - math.log(c) for x, c in zip(log_p, self._center, strict=True)]

    def _size_ball(self) -> None:
        """The radius of a share of the largest, around a prior that moves."""
        if self._part is not None and not self._fixed:
            center = [c for c in self._center if c > FLOOR]
            vars(self)["rho"] = self._part * largest_radius(center, sum(self._center))

    def _in_units(self, values: list[float]) -> list[float]:
        """Values over each task's initial loss, when `normalize` says so and it is known."""
        if not self.normalize:
            return values
        return [x / u if u > 0.0 else x for x, u in zip(values, self._initial, strict=True)]

    def _excess(self, losses: list[float]) -> list[float]:
        """Losses above their references, or 0."""
        if self.reference is None:
            return losses
        return [max(x - r, 0.0) for x, r in zip(losses, self.reference, strict=True)]

    def _draw_probabilities(self) -> list[float] | None:
        if self.samples:
            return self.probabilities().tolist()  # type: ignore[no-any-return]
        return self._drawn_by

    def share_of_rows(self, counts: Sequence[float]) -> list[float]:
        """See `Weighting`; those of `drawn_by` where they are known. Brings a prior that moves to the window at hand."""
        shares = self._draw_probabilities() or super().share_of_rows(counts)
        if self._temperature == 1.0 and not self._fixed:  # rows as they come: p over the share is 1, whatever it is
            shares = self._shares_now().of_all(counts)
        vars(self)["_center_now"] = self._fixed or powers(shares, self._temperature)
        return shares

    def _known_shares(self) -> list[float]:
        return self._shares.sums if self._temperature == 1.0 else self._shares.known()

    def _counted(self, losses: Losses, counts: Counts | None) -> Counts | None:
        """The counts; where none are given and rows are drawn by known chances, those that are expected of the tasks here."""
        if counts is not None or not self.corrects or isinstance(losses, Tensor):
            return self._draw_probabilities() if counts is None and self.corrects else counts
        here = [losses.get(t) for t in self.tasks] if isinstance(losses, Mapping) else losses
        chances = zip(here, self._draw_probabilities() or [], strict=False)
        expected = [0.0 if x is None else chance for x, chance in chances]
        # Else `gather` says what is wrong.
        return expected if len(expected) == len(self.tasks) and any(expected) else None

    def _weights(self, center: list[float]) -> list[float]:
        if self._fixed:
            return [c * math.exp(x) for x, c in zip(self._tilt, center, strict=True)]
        log_p = [x + math.log(c) for x, c in zip(self._tilt, center, strict=True)]
        return list(map(math.exp, mirror_step(log_p, [0.0] * len(log_p), self.rho, self.eta, center)[0]))

    def _read_prior(self, prior: Prior) -> list[float] | None:
        """The prior relative to uniform; None where it moves with the shares seen, to the power of 1 / temperature."""
        m, self._temperature = len(self.tasks), 1.0
        if isinstance(prior, str | float | int):
            self._temperature = temperature(prior)
            if self._temperature == math.inf:
                return [1.0] * m
            if self.samples:
                raise ValueError(
                    f'prior={prior!r} follows the shares in which tasks are drawn, which drawn_by="p" makes p itself: '
                    f"expected a number per task, such as the sizes of their data."
                )
            numbers = self._drawn_by
        else:
            numbers = by_task(self.tasks, prior, "prior")
            if 0.0 in numbers:
                raise ValueError(f"prior must be above 0 for every task, found {numbers}: leave out a task of none.")
        return numbers and powers(numbers, self._temperature)
