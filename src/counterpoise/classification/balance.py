"""The weightings of `counterpoise.multitask` by name, for a model with hard sharing."""

from __future__ import annotations

from collections.abc import Callable

from counterpoise.classification.classifier import TextClassifier
from counterpoise.classification.encoding import seeded
from counterpoise.multitask import (
    DWA,
    FAMO,
    MGDA,
    Adversarial,
    BanditMTL,
    CAGrad,
    GradNorm,
    GroupDRO,
    PCGrad,
    SmoothTchebycheff,
    Tchebycheff,
    UncertaintyWeighting,
    Uniform,
    UPGrad,
    Weighting,
    adversarial_mtl,
    tchebycheff_adversarial,
)

Balance = Weighting | Adversarial

WEIGHTINGS = (
    "uniform", "bandit", "uncertainty", "dwa", "gradnorm", "tchebycheff", "smooth-tchebycheff", "famo", "groupdro", "mgda",
    "pcgrad", "cagrad", "upgrad", "adversarial", "tchebycheff-adversarial",
)  # fmt: skip


def weighting_for(
    name: str,
    classifier: TextClassifier,
    *,
    rounds_per_epoch: int,
    rho: float | None = None,
    min_effective_tasks: float | None = None,
    eta: float | None = None,
    normalize: bool = False,
    seed: int = 0,
) -> Balance:
    """The weighting of that name over the classifier's tasks, looking at its shared parameters where it needs them.

    Everything not named here has the method's own default. GradNorm looks at the last shared layer, the methods that
    combine gradients at all shared parameters, the discriminator at the shared features.

    Args:
        name: one of `WEIGHTINGS`.
        classifier: the model it will train.
        rounds_per_epoch: rounds after which DWA's averages roll on; see `rounds_per_epoch`.
        rho, min_effective_tasks: of bandit, at most one; by default half the tasks stay effective, 1.5 of two.
        eta: of bandit and groupdro.
        normalize: of bandit.
        seed: of a discriminator's random start.

    Raises:
        ValueError: an unknown name, or a setting that this weighting does not take.
    """
    if name not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, found {name!r}")
    _refuse_settings(name, rho=rho, min_effective_tasks=min_effective_tasks, eta=eta, normalize=normalize or None)
    tasks = list(classifier.tasks)
    if name == "bandit":
        if rho is None and min_effective_tasks is None:
            min_effective_tasks = max(len(tasks) / 2, 1.5)
        return BanditMTL(
            tasks,
            rho=rho,
            min_effective_tasks=min_effective_tasks,
            eta=0.5 if eta is None else eta,
            normalize=normalize,
        )
    if name == "groupdro":
        return GroupDRO(tasks) if eta is None else GroupDRO(tasks, eta=eta)
    if name == "dwa":
        return DWA(tasks, steps_per_epoch=rounds_per_epoch)
    with seeded(seed, classifier.device):
        return _plain(tasks, classifier)[name]()


def _plain(tasks: list[str], classifier: TextClassifier) -> dict[str, Callable[[], Balance]]:
    """The weightings that take no setting from here."""
    model = classifier.model
    features = model.encoder.features
    return {
        "uniform": lambda: Uniform(tasks),
        "uncertainty": lambda: UncertaintyWeighting(tasks).to(classifier.device),
        "gradnorm": lambda: GradNorm(tasks, shared=model.encoder.last_shared()),
        "tchebycheff": lambda: Tchebycheff(tasks),
        "smooth-tchebycheff": lambda: SmoothTchebycheff(tasks),
        "famo": lambda: FAMO(tasks),
        "mgda": lambda: MGDA(tasks, shared=model.shared()),
        "pcgrad": lambda: PCGrad(tasks, shared=model.shared()),
        "cagrad": lambda: CAGrad(tasks, shared=model.shared()),
        "upgrad": lambda: UPGrad(tasks, shared=model.shared()),
        "adversarial": lambda: adversarial_mtl(tasks, features=features).to(classifier.device),
        "tchebycheff-adversarial": lambda: tchebycheff_adversarial(tasks, features=features).to(classifier.device),
    }


def _refuse_settings(name: str, **settings: object) -> None:
    takes = {"bandit": set(settings), "groupdro": {"eta"}}.get(name, set())
    if strange := [k for k, v in settings.items() if v is not None and k not in takes]:
        raise ValueError(
            f"weighting {name}: expected {', '.join(sorted(takes)) or 'no settings'}, found {', '.join(strange)}; "
            f"leave them out, or choose bandit"
        )
