"""Adversarial multi-task learning: a task discriminator behind a gradient reversal, joined with any weighting; one process."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.multitask import Counts, Losses, Tchebycheff, Uniform, Weighting
from counterpoise.multitask.losses import Tasks, by_task


def reverse_gradient(features: Tensor, strength: float = 1.0) -> Tensor:
    """The features unchanged; their gradient multiplied by -strength (Ganin, Lempitsky, ICML 2015).

    Examples:
        >>> x = torch.ones(1, requires_grad=True)
        >>> reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000])
    """
    same = features.view_as(features)
    if same.requires_grad:
        same.register_hook(lambda gradient: -strength * gradient)  # type: ignore[no-untyped-call]
    return same


class TaskDiscriminator(nn.Module):
    """Guesses the task from the shared features, while the features learn to hide it.

    Returns the mean cross-entropy of the guesses. Its gradient trains the discriminator as it is, and reaches the
    features multiplied by -strength: in one backward pass the min-max game of Liu, Qiu, Huang (Adversarial Multi-task
    Learning for Text Classification, ACL 2017, eq. 10 to 12).

    Args:
        features: size F of the shared features.
        tasks: how many.
        strength: weight of the game for the features.

    Examples:
        >>> discriminator = TaskDiscriminator(8, 3)
        >>> discriminator(torch.zeros(4, 8), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])
    """

    def __init__(self, features: int, tasks: int, *, strength: float = 0.05) -> None:
        super().__init__()
        if tasks < 2:
            raise ValueError(f"a discriminator tells tasks apart: expected at least 2, found {tasks}.")
        self.classifier = nn.Linear(features, tasks)
        self.strength = strength

    def forward(self, features_BF: Tensor, task_B: Tensor) -> Tensor:
        """Mean cross-entropy of the task (indices in [0, tasks)), with the features' gradient reversed."""
        return F.cross_entropy(self.classifier(reverse_gradient(features_BF, self.strength)), task_B)


class Adversarial(nn.Module):
    """A weighting and a task discriminator as one module with a weighting's calls.

    The scalar is weighting(losses) + discriminator(features, tasks). The discriminator is trained by the same
    optimiser: give it this module's parameters.

    Args:
        weighting: weighs the task losses.
        features: size F of the shared features.
        strength: see `TaskDiscriminator`.
        threshold: the features feel the discriminator only while its loss is above this; 0: always.

    Examples:
        >>> balance = Adversarial(Uniform(["books", "dvd"]), features=8)
        >>> shared_BF, task_B = torch.zeros(4, 8, requires_grad=True), torch.tensor([0, 1, 1, 0])
        >>> balance(torch.ones(2), features_BF=shared_BF, task_B=task_B).backward()
        >>> balance.step()
    """

    sees_features = True

    def __init__(self, weighting: Weighting, *, features: int, strength: float = 0.05, threshold: float = 0.0) -> None:
        super().__init__()
        self.weighting = weighting
        self.discriminator = TaskDiscriminator(features, len(weighting.tasks), strength=strength)
        self.threshold = threshold
        self.tasks = weighting.tasks

    def forward(
        self,
        losses: Losses,
        counts: Counts | None = None,
        window_counts: Counts | None = None,
        *,
        features_BF: Tensor | None = None,
        task_B: Tensor | None = None,
    ) -> Tensor:
        """The weighted losses and, in training, the discriminator's loss on this micro-batch's features.

        Inside a window of several calls the discriminator's part is the micro-batch's own mean times its share of
        `window_counts`, so that the calls add up.
        """
        scalar: Tensor = self.weighting(losses, counts, window_counts)
        if not self.training:
            return scalar
        if features_BF is None or task_B is None:
            raise TypeError(
                "an adversarial weighting needs the shared features and the task of each example: expected "
                "features_BF=(batch, features) and task_B=(batch,), found None."
            )
        share = 1.0
        if window_counts is not None:
            share = len(task_B) / sum(by_task(self.tasks, window_counts, "window_counts"))
        loss: Tensor = self.discriminator(features_BF, task_B)
        if float(loss.detach()) <= self.threshold:
            loss = self.discriminator(features_BF.detach(), task_B)
        return scalar + share * loss

    def step(self) -> None:
        """Close the weighting's window, after the optimiser's step; the discriminator learns by the optimiser alone."""
        self.weighting.step()

    def metrics(self) -> dict[str, float]:
        """What the weighting tells a logger; the discriminator adds nothing."""
        return self.weighting.metrics()


def adversarial_mtl(tasks: Tasks, *, features: int, strength: float = 0.05) -> Adversarial:
    """Uniform weights and a task discriminator (Liu, Qiu, Huang, ACL 2017), for a hard-shared encoder.

    Departure: the paper's private encoders, and the penalty that keeps them apart, are the model's, not the weighting's.

    Examples:
        >>> adversarial_mtl(["books", "dvd"], features=8).tasks
        ('books', 'dvd')
    """
    return Adversarial(Uniform(tasks), features=features, strength=strength)


def tchebycheff_adversarial(
    tasks: Tasks, *, features: int, strength: float = 0.05, threshold: float = 0.0
) -> Adversarial:
    """The worst task's loss and a task discriminator (Mao, Yun, Liu, Du: Tchebycheff Procedure for Multi-task Text
    Classification, ACL 2020, the adversarial procedure).

    The paper was not at hand: that the features feel the discriminator only while its loss exceeds a threshold is
    taken from a published summary, its value is unknown, and the default of 0 leaves it on throughout.

    Examples:
        >>> tchebycheff_adversarial(2, features=8).tasks
        ('0', '1')
    """
    return Adversarial(Tchebycheff(tasks), features=features, strength=strength, threshold=threshold)


ADVERSARIAL = {"adversarial": adversarial_mtl, "tchebycheff-adversarial": tchebycheff_adversarial}
"""By the names that run.py has for them."""
