"""What settings of a training run may be, said once: the methods ask, and a dry run asks with the same words."""

from __future__ import annotations

import math

COUNTS = ("iterations", "prompts_per_iteration", "epochs", "batch_size", "micro_batch_size", "max_length", "saves")
"""At least 1."""
POSITIVE = ("learning_rate", "beta", "kl_target", "clip", "value_clip")
NOT_NEGATIVE = ("kl", "value_weight", "value_learning_rate")
SHARES = ("discount", "trace")
"""From 0 to 1."""


def refuse_settings(**settings: float | None) -> None:
    """Raise for a setting out of range; None and names that are not known here pass.

    Raises:
        ValueError: a count below 1, a rate that is not positive, a weight below 0, a share outside [0, 1].

    >>> refuse_settings(epochs=0)
    Traceback (most recent call last):
    ValueError: epochs: expected at least 1, found 0
    """
    for name, value in settings.items():
        if value is None:
            continue
        if name in COUNTS and value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
        if name in POSITIVE and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, found {value}")
        if name in NOT_NEGATIVE and not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number of at least 0, found {value}")
        if name in SHARES and not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, found {value}")
