"""Early stopping by a reward budget: as little alignment as gives the reward asked for."""

from __future__ import annotations

from dataclasses import dataclass

from counterpoise.alignment.training.stepping import Mitigation


@dataclass
class RewardBudget(Mitigation):
    """End training as soon as the mean reward of the model's own samples reaches `budget`.

    The paper (Lin et al. 2024) stops RSF after 2, 4, 6 or 8 of 10 iterations, which the checkpoints of every
    iteration give without this. A budget is asked of the samples that an iteration draws anyway, before it learns from
    them: the model that is kept is the one that reached it.

    Args:
        budget: in units of the reward.

    >>> RewardBudget(0.5).stop(0.6)
    True
    """

    budget: float

    def stop(self, reward: float) -> bool:
        """Whether the budget is reached."""
        return reward >= self.budget
