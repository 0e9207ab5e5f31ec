"""The weightings of `counterpoise.multitask` by name, for a model with hard sharing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from counterpoise import multitask
from counterpoise.classification.classifier import TextClassifier
from counterpoise.multitask import Weighting
from counterpoise.multitask.prior import part_of_the_largest

_METHODS: dict[str, Callable[..., Weighting]] = {
    "uniform": lambda tasks, model: multitask.Uniform(tasks),
    "bandit": lambda tasks, model, **settings: multitask.BanditMTL(tasks, **settings),
    "uncertainty": lambda tasks, model: multitask.UncertaintyWeighting(tasks),
    "dwa": lambda tasks, model, **settings: multitask.DWA(tasks, **settings),
    "gradnorm": lambda tasks, model: multitask.GradNorm(tasks, shared=model.encoder.last_shared()),
    "tchebycheff": lambda tasks, model: multitask.Tchebycheff(tasks),
    "smooth-tchebycheff": lambda tasks, model: multitask.SmoothTchebycheff(tasks),
    "famo": lambda tasks, model: multitask.FAMO(tasks),
    "groupdro": lambda tasks, model, **settings: multitask.GroupDRO(tasks, **settings),
    "mgda": lambda tasks, model: multitask.MGDA(tasks, shared=model.shared()),
    "pcgrad": lambda tasks, model: multitask.PCGrad(tasks, shared=model.shared()),
    "cagrad": lambda tasks, model: multitask.CAGrad(tasks, shared=model.shared()),
    "upgrad": lambda tasks, model: multitask.UPGrad(tasks, shared=model.shared()),
    "rlw": lambda tasks, model: multitask.RLW(tasks),
    "excess": lambda tasks, model: multitask.ExcessMTL(tasks, shared=model.shared()),
    "imtl-l": lambda tasks, model: multitask.IMTLL(tasks),
    "imtl-g": lambda tasks, model: multitask.IMTLG(tasks, shared=model.shared()),
    "fairgrad": lambda tasks, model: multitask.FairGrad(tasks, shared=model.shared()),
    "nash": lambda tasks, model: multitask.NashMTL(tasks, shared=model.shared()),
    "aligned": lambda tasks, model: multitask.AlignedMTL(tasks, shared=model.shared()),
    "db-mtl": lambda tasks, model: multitask.DBMTL(tasks, shared=model.shared()),
}
"""From the tasks' names, the model and the settings to a weighting."""

WEIGHTINGS = tuple(_METHODS)
MILD: dict[str, Any] = {"rho": "10%", "eta": 0.2}
"""Of bandit, unless it is told otherwise. In the tables of experiments/banditmtl/UNEQUAL.md their mean is nowhere told to be
below that of equal weights; larger balls gain and lose more."""


def weighting_for(
    name: str,
    classifier: TextClassifier,
    *,
    rounds_per_epoch: int,
    rho: float | str | None = None,
    min_effective_tasks: float | None = None,
    eta: float | None = None,
    normalize: bool = False,
    prior: Sequence[float] | None = None,
) -> Weighting:
    """The weighting of that name over the classifier's tasks, looking at its shared parameters where it needs them.

    Everything not named here has the method's own default. GradNorm looks at the last shared layer, the methods that
    combine gradients at all shared parameters.

    Args:
        name: one of `WEIGHTINGS`.
        classifier: the model it will train.
        rounds_per_epoch: rounds after which DWA's averages roll on; see `rounds_per_epoch`.
        rho, min_effective_tasks: of bandit, at most one; by default see `MILD`.
        eta: of bandit (see `MILD`) and groupdro.
        normalize: of bandit.
        prior: of bandit, a number per task. `train` gives each task its share of a round's rows by it.

    Raises:
        ValueError: an unknown name, or a setting that this weighting does not take.
    """
    settings = check_weighting(
        name, rho=rho, min_effective_tasks=min_effective_tasks, eta=eta, normalize=normalize, prior=prior
    )
    tasks = list(classifier.tasks)
    if name == "bandit":
        settings = {**MILD, **settings}
        if min_effective_tasks is not None:
            del settings["rho"]
    if name == "dwa":
        settings["steps_per_epoch"] = rounds_per_epoch
    return _METHODS[name](tasks, classifier.model, **settings).to(classifier.device)


def check_weighting(
    name: str,
    *,
    rho: float | str | None,
    min_effective_tasks: float | None,
    eta: float | None,
    normalize: bool,
    prior: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The settings of `weighting_for` that were given, checked before a model is there.

    Raises:
        ValueError: an unknown name, a setting that this weighting does not take, or two that say one thing.
    """
    if name not in _METHODS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, found {name!r}")
    of_bandit: dict[str, Any] = {"rho": rho, "min_effective_tasks": min_effective_tasks, "eta": eta, "prior": prior}
    of_bandit["normalize"] = normalize or None
    settings = {key: value for key, value in of_bandit.items() if value is not None}
    takes = {"bandit": set(of_bandit), "groupdro": {"eta"}}.get(name, set())
    if strange := [key for key in settings if key not in takes]:
        raise ValueError(
            f"weighting {name}: expected {', '.join(sorted(takes)) or 'no settings'}, found {', '.join(strange)}; "
            f"leave them out, or choose bandit"
        )
    if isinstance(rho, str):
        part_of_the_largest(rho)
    if rho is not None and min_effective_tasks is not None:
        raise ValueError("weighting bandit: expected rho or min_effective_tasks, found both; leave one out")
    if prior is not None and min_effective_tasks is not None:
        raise ValueError(
            "weighting bandit: min_effective_tasks counts from the uniform prior; give rho with another one"
        )
    return settings
