"""Task balancing while training: losses in, one scalar out.

```python
balance = BanditMTL(["books", "dvd", "kitchen"], min_effective_tasks=2)
loss = balance(losses)                                   # dict or tensor of task losses -> one scalar
loss.backward(); optimizer.step(); balance.step()
```

Every other method is called the same way; `step()` once per optimiser step. Hugging Face and TRL trainers:
`with_weighting`, and `with_mixture` where the weights draw the rows. Lightning: docs/how-to/multitask.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from counterpoise.multitask.bandit import BanditMTL
from counterpoise.multitask.dbmtl import DBMTL
from counterpoise.multitask.dwa import DWA
from counterpoise.multitask.excess import ExcessMTL
from counterpoise.multitask.famo import FAMO
from counterpoise.multitask.gradnorm import GradNorm
from counterpoise.multitask.groupdro import GroupDRO
from counterpoise.multitask.jacobian import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    FairGrad,
    JacobianWeighting,
    NashMTL,
    PCGrad,
    UPGrad,
)
from counterpoise.multitask.losses import Counts, Losses
from counterpoise.multitask.mirror import ball_radius, best_response, divergence, hold, mirror_step
from counterpoise.multitask.rlw import RLW
from counterpoise.multitask.scalarizations import SmoothTchebycheff, Tchebycheff, Uniform
from counterpoise.multitask.uncertainty import IMTLL, UncertaintyWeighting
from counterpoise.multitask.weighting import Weighting

if TYPE_CHECKING:
    from counterpoise.multitask.mixture import with_mixture
    from counterpoise.multitask.trainer import with_weighting

__all__ = [
    "DBMTL", "DWA", "FAMO", "IMTLG", "IMTLL", "MGDA", "RLW", "AlignedMTL", "BanditMTL", "CAGrad", "Counts",
    "ExcessMTL", "FairGrad", "GradNorm", "GroupDRO", "JacobianWeighting", "Losses", "NashMTL",
    "PCGrad", "SmoothTchebycheff", "Tchebycheff", "UPGrad", "UncertaintyWeighting", "Uniform", "Weighting", "ball_radius",
    "best_response", "divergence", "hold", "mirror_step", "with_mixture", "with_weighting",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in ("with_mixture", "with_weighting"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # both import transformers

    return getattr(import_module(f"{__name__}.{'trainer' if name == 'with_weighting' else 'mixture'}"), name)
