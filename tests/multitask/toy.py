"""A shared layer and one head per task, in float64, and every weighting built on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from counterpoise.multitask import (
    DBMTL,
    DWA,
    FAMO,
    IMTLG,
    IMTLL,
    MGDA,
    RLW,
    AlignedMTL,
    BanditMTL,
    CAGrad,
    ExcessMTL,
    FairGrad,
    GradNorm,
    GroupDRO,
    NashMTL,
    PCGrad,
    SmoothTchebycheff,
    Tchebycheff,
    UncertaintyWeighting,
    Uniform,
    UPGrad,
    Weighting,
)

TASKS = ["books", "dvd", "kitchen"]

METHODS: dict[str, Callable[[list[Tensor]], Weighting]] = {
    "uniform": lambda shared: Uniform(TASKS),
    "uncertainty": lambda shared: UncertaintyWeighting(TASKS),
    "dwa": lambda shared: DWA(TASKS, steps_per_epoch=2),
    "gradnorm": lambda shared: GradNorm(TASKS, shared=shared),
    "tchebycheff": lambda shared: Tchebycheff(TASKS),
    "smooth_tchebycheff": lambda shared: SmoothTchebycheff(TASKS),
    "famo": lambda shared: FAMO(TASKS),
    "groupdro": lambda shared: GroupDRO(TASKS, eta=0.5),
    "bandit": lambda shared: BanditMTL(TASKS, min_effective_tasks=2),
    "bandit_normalized": lambda shared: BanditMTL(TASKS, rho=0.3, normalize=True),
    "bandit_importance": lambda shared: BanditMTL(TASKS, rho=0.3, drawn_by=[0.5, 0.2, 0.3]),
    "bandit_proportional": lambda shared: BanditMTL(TASKS, rho=0.3, prior="proportional"),
    "bandit_sqrt": lambda shared: BanditMTL(TASKS, rho="30%", prior="sqrt"),
    "bandit_sizes": lambda shared: BanditMTL(TASKS, rho=0.3, prior=[100, 30, 10]),
    "rlw": lambda shared: RLW(TASKS, seed=3),
    "imtl_l": lambda shared: IMTLL(TASKS),
    "excess": lambda shared: ExcessMTL(TASKS, shared=shared, eta=0.5),
    "mgda": lambda shared: MGDA(TASKS, shared=shared),
    "pcgrad": lambda shared: PCGrad(TASKS, shared=shared),
    "cagrad": lambda shared: CAGrad(TASKS, shared=shared),
    "upgrad": lambda shared: UPGrad(TASKS, shared=shared),
    "aligned": lambda shared: AlignedMTL(TASKS, shared=shared),
    "imtl_g": lambda shared: IMTLG(TASKS, shared=shared),
    "fairgrad": lambda shared: FairGrad(TASKS, shared=shared, fairness=2.0),
    "nash": lambda shared: NashMTL(TASKS, shared=shared),
    "dbmtl": lambda shared: DBMTL(TASKS, shared=shared),
}
"""One row per weighting: everything in test_weightings.py runs on each."""


class Toy(nn.Module):
    """Losses of three regression tasks whose scales differ."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shared = nn.Linear(4, 5).double()
        self.heads = nn.ModuleList(nn.Linear(5, 1).double() for _ in TASKS)

    def losses(self, x: Tensor, y: Tensor, task: Tensor) -> tuple[dict[str, Tensor | None], list[float]]:
        """The mean loss of each task on these rows, None where it has none, and the counts."""
        h = torch.tanh(self.shared(x))
        found: dict[str, Tensor | None] = {}
        for i, name in enumerate(TASKS):
            rows = task == i
            error = (1 + i) * (self.heads[i](h[rows]).squeeze(-1) - y[rows]).square()
            found[name] = error.mean() if rows.any() else None
        return found, [float((task == i).sum()) for i in range(len(TASKS))]


def rows(count: int, seed: int, tasks: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows; every task appears when there are at least three."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(count, generator=generator, dtype=torch.float64)
    task = torch.arange(count) % 3 if tasks is None else torch.tensor(tasks)
    return x, y, task


def gradients(module: nn.Module) -> list[Tensor]:
    """Copies of all gradients, zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
