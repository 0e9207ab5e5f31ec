"""Task balancing while training: losses in, one scalar out.

```python
balance = BanditMTL(["books", "dvd", "kitchen"], min_effective_tasks=2)
loss = balance(losses)                                   # dict or tensor of task losses -> one scalar
loss.backward(); optimizer.step(); balance.step()
```

Every other method is called the same way. Hugging Face and TRL trainers: `with_weighting`. Lightning: make the
weighting a submodule, and close its window once per optimiser step,

```python
class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.balance = BanditMTL(tasks, min_effective_tasks=2)   # saved and restored with the module

    def training_step(self, batch, batch_idx):
        return self.balance(self.task_losses(batch))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.balance.step()
        self.log_dict(self.balance.metrics())
```

and when Lightning accumulates gradients, build it with `micro_batches=n` and call `step()` every n batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .adversarial import (
    Adversarial,
    TaskDiscriminator,
    adversarial_mtl,
    difference_penalty,
    reverse_gradient,
    tchebycheff_adversarial,
)
from .bandit import BanditMTL
from .cagrad import CAGrad
from .dwa import DWA
from .famo import FAMO
from .gradnorm import GradNorm
from .groupdro import GroupDRO
from .jacobian import JacobianWeighting
from .losses import Counts, Losses
from .mgda import MGDA
from .mirror import MirrorStep, ball_radius, best_response, divergence, hold, mirror_step
from .pcgrad import PCGrad
from .tchebycheff import SmoothTchebycheff, Tchebycheff
from .uncertainty import UncertaintyWeighting
from .uniform import Uniform
from .upgrad import UPGrad
from .weighting import Weighting

if TYPE_CHECKING:
    from .trainer import with_weighting

__all__ = [
    "DWA",
    "FAMO",
    "MGDA",
    "Adversarial",
    "BanditMTL",
    "CAGrad",
    "Counts",
    "GradNorm",
    "GroupDRO",
    "JacobianWeighting",
    "Losses",
    "MirrorStep",
    "PCGrad",
    "SmoothTchebycheff",
    "TaskDiscriminator",
    "Tchebycheff",
    "UPGrad",
    "UncertaintyWeighting",
    "Uniform",
    "Weighting",
    "adversarial_mtl",
    "ball_radius",
    "best_response",
    "difference_penalty",
    "divergence",
    "hold",
    "mirror_step",
    "reverse_gradient",
    "tchebycheff_adversarial",
    "with_weighting",
]


def __getattr__(name: str) -> Any:
    if name == "with_weighting":  # transformers is slow to import
        from .trainer import with_weighting

        return with_weighting
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
