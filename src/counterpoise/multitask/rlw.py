"""Random loss weighting (Lin, Ye, Zhang, Tsang, TMLR 2022)."""

from __future__ import annotations

import numpy as np
import torch

from counterpoise.multitask.losses import Tasks
from counterpoise.multitask.values import refuse_outside
from counterpoise.multitask.weighting import Weighting


class RLW(Weighting):
    """Weights drawn anew for every window, softmax of m standard normal numbers (Lin, Ye, Zhang, Tsang: Reasonable
    Effectiveness of Random Weighting, TMLR 2022, algorithm 1): the baseline that a learned weighting has to beat.

    The draw is keyed by the seed and the number of the window: the same on every rank and after a resume, and no other
    random number moves it.

    Args, beside those of every `Weighting`:
        seed: of the draws, >= 0.

    Examples:
        >>> round(sum(RLW(3, seed=1).weights()), 9)
        1.0
    """

    compares = False

    def __init__(self, tasks: Tasks, *, seed: int = 0, micro_batches: int = 1) -> None:
        super().__init__(tasks, micro_batches=micro_batches)
        refuse_outside("[0, inf)", whole=True, seed=seed)
        self.seed = seed

    def weights(self) -> list[float]:
        """Those of the window at hand, in task order."""
        random = np.random.default_rng([self.seed, self.updates + self.skipped])
        normal_M = torch.from_numpy(random.standard_normal(len(self.tasks)))
        return torch.softmax(normal_M, dim=0).tolist()  # type: ignore[no-any-return]
