"""Tasks drawn by a bandit's weights in TRL's GRPO and RLOO trainers, where a task's level is 1 - its mean reward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from counterpoise.multitask.bandit import BanditMTL
from counterpoise.multitask.drawing import quotas, tasks_of
from counterpoise.multitask.mixing import Mixed, refuse_other_tasks
from counterpoise.multitask.values import refuse_outside

Bounds = tuple[float, float]
"""The smallest and the largest reward."""
STRETCH = 10
"""How much longer one generation may make the scale of the rewards seen before that is told."""


class MixedRewards(Mixed):
    """Levels are 1 - mean reward."""

    judged_by = "reward", min
    columns_may_differ = True  # rewards may read some that other tasks lack
    args: Any
    num_generations: int
    num_iterations: int
    reward_weights: Tensor

    def __init__(
        self,
        *args: Any,
        mixture: BanditMTL,
        reward_bounds: Bounds | Mapping[str, Bounds] | None = None,
        oversample: int = 1,
        make_up: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if reward_bounds is None and kwargs.get("reference") is not None:
            raise ValueError(
                "reference: a level has a unit only between known rewards, and those seen so far move: expected "
                "reward_bounds=(smallest, largest) beside it."
            )
        refuse_outside("[1, inf)", whole=True, oversample=oversample)
        if make_up not in (None, True, False):
            raise ValueError(f"make_up must be True, False or None, found {make_up!r}.")
        tasks = getattr(mixture, "tasks", ())
        self.reward_bounds, self.oversample, self.make_up, m = reward_bounds, oversample, make_up, len(tasks)
        self._given = None if reward_bounds is None else _by_task(reward_bounds, tasks)
        self._seen: list[Bounds] = [(math.inf, -math.inf)] * m
        self._unit = list(self._seen)
        """By task: the bounds of its rewards so far; those in which the levels stand that the bandit remembers."""
        self._groups, self._telling = [1.0] * m, [1.0] * m  # recent groups, and those with an advantage
        self._trained = [0] * m
        self._evaluated: list[float] = []
        super().__init__(*args, mixture=mixture, **kwargs)
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if oversample > 1 and isinstance(self.train_dataset, IterableDataset):
            raise ValueError("oversample: a stream gives each generation its prompts alone; expected oversample=1.")
        if oversample > 1 and rows % self.num_generations:
            raise ValueError(
                f"oversample={oversample} drops whole groups on each process: expected per_device_train_batch_size * "
                f"steps_per_generation to be a multiple of num_generations={self.num_generations}, found {rows}."
            )

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The base's, with the mean reward; of several data sets each one's, and the smallest, `eval_worst_reward`."""
        if isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            return super().evaluate(eval_dataset, *args, **kwargs)
        self._evaluated = []
        found = super().evaluate(eval_dataset, *args, **kwargs)
        if self._evaluated:
            key = f"{kwargs.get('metric_key_prefix', 'eval')}_reward"
            found[key] = math.fsum(self._evaluated) / len(self._evaluated)
            if key != "eval_reward":  # which TRL logs, without a name
                self.log({key: found[key]})
        return found

    def rows_of_a_round(self) -> int:
        """The prompts of one generation, over all ranks."""
        return self.oversample * self.args.generation_batch_size // self.num_generations  # type: ignore[no-any-return]

    def batches_of_a_round(self) -> int:
        """A generation is one."""
        return 1

    def probabilities_of_tasks(self) -> list[float]:
        """p, or where it is made up for groups without an advantage, p over the share of each task's groups that have one,
        of which at least a quarter is assumed."""
        p_M = super().probabilities_of_tasks()
        if not (self.balance.rho > 0.0 if self.make_up is None else self.make_up):
            return p_M
        shares = [max(0.25, a / b) for a, b in zip(self._telling, self._groups, strict=True)]
        raised = [p / s for p, s in zip(p_M, shares, strict=True)]
        return [x / sum(raised) for x in raised]

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        size = batch_size * (self.oversample if kwargs.get("is_training") else 1)
        return super()._get_dataloader(dataset, description, size, *args, **kwargs)

    def _calculate_rewards(self, inputs: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Tensor:
        rewards_NF: Tensor = super()._calculate_rewards(inputs, *args, **kwargs)  # type: ignore[misc]
        total_N = (rewards_NF * self.reward_weights.to(rewards_NF.device)).nansum(dim=1)
        clip = getattr(self, "reward_clip_range", None) if self.model.training else None  # RLOO's
        total_N = total_N.clamp(*clip) if clip else total_N
        scored_N = ~rewards_NF.isnan().all(dim=1) & total_N.isfinite()  # an infinite one would be a bound for good
        if not self.model.training:
            self._evaluated += total_N[scored_N].tolist()
            return rewards_NF
        tasks = tasks_of(inputs, self.balance.tasks, self.task_column, self.numbered)
        task_B = torch.tensor(tasks, device=rewards_NF.device)
        task_N = self.accelerator.gather(task_B)
        self._scored_P = scored_N.view(-1, self.num_generations).any(dim=1)
        self._see(total_N[scored_N].tolist(), task_N[scored_N].tolist())
        self._bring_into(bounds := self._bounds())
        if all(low < high for low, high in bounds):
            mine = slice(self.accelerator.process_index * len(tasks), (self.accelerator.process_index + 1) * len(tasks))
            levels_B = torch.zeros_like(total_N[mine])
            for i, (low, high) in enumerate(bounds):
                levels_B = (1.0 - (total_N[mine] - low) / (high - low)).where(scored_N[mine] & (task_B == i), levels_B)
            here_B1 = scored_N[mine].to(levels_B.dtype).unsqueeze(1)
            self.observe(self.by_task(levels_B.unsqueeze(1), task_B), self.by_task(here_B1, task_B))
        return rewards_NF

    def _generate_and_score_completions(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if not self.model.training:
            return found
        tasks = tasks_of(inputs, self.balance.tasks, self.task_column, self.numbered)
        learned_BT = found["completion_mask"] * found.get("tool_mask", 1)
        tells_P = self._count_groups(tasks, found["advantages"] * learned_BT.any(dim=1))
        if self.oversample == 1:
            return found
        if "pixel_values" in found:
            raise ValueError("oversample drops whole rows, and images are not in rows: expected oversample=1.")
        groups, rows, rank = len(inputs) // self.num_generations, len(inputs), self.accelerator.process_index
        tells = tells_P[rank * groups : (rank + 1) * groups].tolist()
        kept = self._fill(tasks[:: self.num_generations], tells, groups // self.oversample)
        kept_G = torch.tensor([tasks[g * self.num_generations] for g in kept], device=self.accelerator.device)
        for i in self.accelerator.gather(kept_G).tolist():
            self._trained[i] += 1
        chosen = [g * self.num_generations + i for g in kept for i in range(self.num_generations)]
        for name, value in found.items():
            if isinstance(value, Tensor) and value.dim() and len(value) == rows:
                found[name] = value[chosen]
            elif isinstance(value, list) and len(value) == rows:
                found[name] = [value[i] for i in chosen]
        if "num_items_in_batch" in found:
            learned = found["completion_mask"] * found.get("tool_mask", 1)
            found["num_items_in_batch"] = self.accelerator.gather(learned.sum()).sum()
        return found

    def _fill(self, tasks: list[int], tells: list[bool], size: int) -> list[int]:
        """So many groups: each task's quota of those that tell, then others that tell, then any."""
        random = np.random.default_rng([self.schedule.seed, self.state.global_step, self.accelerator.process_index, 2])
        wanted = quotas(super().probabilities_of_tasks(), size, random.random())
        ranked, chosen = sorted(range(len(tasks)), key=lambda g: not tells[g]), list[int]()
        for by_quota in (True, False):
            for g in ranked:
                if len(chosen) < size and g not in chosen and (not by_quota or (tells[g] and wanted[tasks[g]] > 0)):
                    chosen.append(g)
                    wanted[tasks[g]] -= 1
        return chosen

    def _count_groups(self, tasks: list[int], advantages_B: Tensor) -> Tensor:
        """Which groups of all processes have an advantage, and the share of such by task, over about the last ten
        generations; a group without any reward counts nowhere."""
        size_N: Tensor = self.accelerator.gather(advantages_B).abs()
        task_N = self.accelerator.gather(torch.tensor(tasks, device=size_N.device))
        # next to none is what rounding leaves of equal rewards
        tells_P = (size_N > max(1e-6, 1e-3 * size_N.amax().item())).view(-1, self.num_generations).any(dim=1)
        found = list(
            zip(task_N[:: self.num_generations].tolist(), tells_P.tolist(), self._scored_P.tolist(), strict=True)
        )
        for i, (groups, telling) in enumerate(zip(self._groups, self._telling, strict=True)):
            own = [tells for task, tells, scored in found if task == i and scored]
            if own:
                self._groups[i], self._telling[i] = 0.9 * groups + len(own), 0.9 * telling + sum(own)
        return tells_P

    @property
    def _seen_bounds(self) -> Bounds:
        """The bounds of all rewards so far, one scale for all tasks."""
        return min(low for low, _ in self._seen), max(high for _, high in self._seen)

    def _bounds(self) -> list[Bounds]:
        """Those that count, by task."""
        return self._given or [self._seen_bounds] * len(self._seen)

    def _scales(self) -> list[tuple[str, Bounds, Bounds]]:
        """Of each scale of rewards how its task is told, the bounds seen, and those that count."""
        if isinstance(self.reward_bounds, Mapping):
            return list(zip(self.balance.tasks, self._seen, self._bounds(), strict=True))
        return [("", self._seen_bounds, self._bounds()[0])]

    def _see(self, totals: list[float], tasks: list[int]) -> None:
        """Take note of rewards, and say which leave the bounds given, or stretch those seen."""
        before = self._seen_bounds
        for total, i in zip(totals, tasks, strict=True):
            self._seen[i] = min(total, self._seen[i][0]), max(total, self._seen[i][1])
        for task, (low, high), given in self._scales():
            if low < given[0] or high > given[1]:
                of = f" of {task!r}" if task else ""
                warnings.warn(f"rewards{of} from {low:.4g} to {high:.4g} leave reward_bounds={given}.", stacklevel=2)
        now = self._seen_bounds
        if self._given is None and 0.0 < STRETCH * (before[1] - before[0]) < now[1] - now[0]:
            warnings.warn(
                f"rewards from {now[0]:.4g} to {now[1]:.4g}, found in one generation after {before[0]:.4g} to "
                f"{before[1]:.4g}: on a scale so much longer the tasks are nearly alike, and p hardly moves. Give "
                f"reward_bounds=(smallest, largest), or clip the rewards.",
                stacklevel=2,
            )

    def _bring_into(self, bounds: list[Bounds]) -> None:
        """Bring the levels that the bandit remembers into the unit of these bounds."""
        if bounds == self._unit or not all(low < high for low, high in bounds):
            return
        # 1 - (reward - low) / (high - low), from the level between the old bounds
        pairs = [(old, new) if old[0] < old[1] else (new, new) for old, new in zip(self._unit, bounds, strict=True)]
        slopes = [(old[1] - old[0]) / (new[1] - new[0]) for old, new in pairs]
        starts = [(new[1] - old[1]) / (new[1] - new[0]) for old, new in pairs]
        self.balance.change_unit(starts, slopes)
        self._unit = bounds

    def told(self) -> dict[str, float]:
        """Also the bounds, by task the share of groups with an advantage, and with oversampling of the groups kept."""
        whose = "given" if self._given else "seen"
        bounds: dict[str, float] = {}
        for task, _, (low, high) in self._scales():
            of = f"/{task}" if task else ""
            bounds |= {f"{whose}_low{of}": low, f"{whose}_high{of}": high} if low <= high else {}
        shares = zip(self.balance.tasks, self._telling, self._groups, strict=True)
        trained = zip(self.balance.tasks, self._trained, strict=True)
        more = {f"trained/{t}": n / sum(self._trained) for t, n in trained if any(self._trained)}
        return super().told() | bounds | more | {f"with_advantage/{t}": a / b for t, a, b in shares}

    def kept(self) -> dict[str, Any]:
        found = {"bounds": list(self._seen), "unit": self._unit, "groups": self._groups, "telling": self._telling}
        return super().kept() | found | {"trained": self._trained}

    def take_back(self, state: dict[str, Any]) -> None:
        super().take_back(state)
        seen = state["bounds"]
        self._seen = list(seen) if isinstance(seen, list) else [seen] * len(self._seen)  # older states hold one pair
        self._groups, self._telling = list(state["groups"]), list(state["telling"])
        self._trained = list(state.get("trained", self._trained))
        self._unit = state.get("unit", self._bounds())
        self._bring_into(self._bounds())
        generation, step = self.args.steps_per_generation * self.num_iterations, self.args.gradient_accumulation_steps
        if self.state.global_step * step % generation:
            warnings.warn(
                f"resumed after step {self.state.global_step}, inside a generation: TRL keeps none that is begun, so the run "
                f"is not the one without a stop. Save where one ends: save_steps={generation // math.gcd(generation, step)}, "
                f"or a multiple of it.",
                stacklevel=2,
            )


def _by_task(given: Bounds | Mapping[str, Bounds], tasks: Sequence[str]) -> list[Bounds]:
    """Each task's bounds, from one pair for all or a pair for each."""
    each = given if isinstance(given, Mapping) else dict.fromkeys(tasks, given)
    refuse_other_tasks("reward_bounds: expected a pair of numbers, or one for each", each, tasks)
    found = []
    for task in tasks:
        try:
            low, high = map(float, each[task])
        except (TypeError, ValueError):
            low = high = math.nan
        if not -math.inf < low < high < math.inf:
            of = f" of {task!r}" if isinstance(given, Mapping) else ""
            raise ValueError(
                f"reward_bounds{of}: expected two finite numbers, the smaller one first, found {each[task]!r}."
            )
        found.append((low, high))
    return found
