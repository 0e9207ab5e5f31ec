"""What each method is told: frozen values with the papers' defaults, checked alike by the run and by its dry run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, ClassVar, Self

from counterpoise.alignment.divergences import DIVERGENCES
from counterpoise.language.sampling import Drawing

COUNTS = "iterations prompts_per_iteration epochs batch_size micro_batch_size max_length saves steps every openings"
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (COUNTS, lambda v: isinstance(v, Integral), "a whole number"),
    (COUNTS, lambda v: v >= 1, "at least 1"),
    ("learning_rate beta kl_target clip value_clip", lambda v: 0 < v < math.inf, "a positive number"),
    ("kl value_weight value_learning_rate", lambda v: 0 <= v < math.inf, "a number of at least 0"),
    ("discount trace", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    ("held_out", lambda v: 0 <= v < 1, "a share in [0, 1)"),
)
"""Settings, what they may be, and how that is said."""
KEEP_BY = ("uniform", "bandit")
OWN = ("batch_size", "compiled")
DRAWN = {f.name: f.name for f in fields(Drawing) if f.name not in OWN} | {"draw_batch_size": "batch_size"}
"""Options of how responses are drawn -> fields of `Drawing`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every method is told.

    Attributes:
        title, needs: the method in messages, and the files that it learns from.
        epochs: passes over what is learned; in rsf and ppo over each round's responses.
        batch_size: responses or pairs per optimiser step, of all processes together; `micro_batch_size` of them at once,
            which changes nothing but rounding.
    """

    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    drawing: Drawing | None = None
    epochs: int = 2
    learning_rate: float = 1e-5
    batch_size: int = 32
    micro_batch_size: int = 8

    @classmethod
    def drawn(cls) -> list[str]:
        """Options of how it draws: a method that draws one response a prompt has no `n`."""
        return [] if cls.drawing is None else [n for n in DRAWN if n != "n" or cls.drawing.n > 1]

    @classmethod
    def options(cls) -> set[str]:
        """All that it can be told, by name, with how it draws."""
        return {f.name for f in fields(cls) if f.name != "drawing"} | {*cls.drawn()}

    @classmethod
    def of(cls, given: Mapping[str, Any], *, others: Sequence[str] = ()) -> Self:
        """From options by name; one that is neither its own, nor of how it draws, nor among `others`, is a ValueError."""
        if unknown := [n for n in given if n not in {*cls.options(), *others}]:
            raise ValueError(f"{typed(unknown[0])}: not a setting of {cls.title}; leave it out")
        drawn = {n: given[n] for n in cls.drawn() if n in given}
        own = {n: given[n] for n in cls.options() - {*cls.drawn()} if n in given}
        return cls(**own, drawing=None if cls.drawing is None else drawn_as(cls.drawing, drawn))

    @property
    def told(self) -> dict[str, Any]:
        """All of it by the names of options, as plain json: for records, and what `of` reads."""
        drawn = {n: getattr(self.drawing, DRAWN[n]) for n in self.drawn()}
        return {**{n: v for n, v in vars(self).items() if n != "drawing"}, **drawn}

    def check(self) -> None:
        """Raise a ValueError for a number out of range, and for responses that the method cannot learn from."""
        refuse_settings(**vars(self))


@dataclass(frozen=True, kw_only=True)
class InRounds(Settings):
    """Of a method that draws the responses it learns from, round by round.

    Attributes:
        drawing: how; its seed also decides the order of prompts and of steps.
        iterations: rounds.
        prompts_per_iteration: drawn without replacement until exhausted, then reshuffled.
    """

    needs = ("prompts", "reward")
    drawing: Drawing = Drawing()
    iterations: int = 10
    prompts_per_iteration: int = 512


@dataclass(frozen=True, kw_only=True)
class RSF(InRounds):
    """The paper's (Lin et al. 2024): the best of `drawing.n` responses to a prompt is learned."""

    title = "rsf"
    drawing: Drawing = Drawing(n=32)
    prompts_per_iteration: int = 2048

    def check(self) -> None:
        super().check()
        refuse_equal(self.drawing)


@dataclass(frozen=True, kw_only=True)
class Distil(Settings):
    """The paper's, of RSF in distillation style; `seed` decides the order of steps."""

    title = "rsf with --samples"
    needs = ("samples",)
    chat: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PPO(InRounds):
    """Learning rate, prompts, epochs and KL weight are the paper's (Lin et al. 2024), the rest is usual.

    Attributes:
        drawing: one response a prompt, of a temperature above 0.
        kl: weight of the KL penalty; with `kl_target` its start, adapted towards so many nats per response.
        discount, trace: gamma and lambda of GAE.
        clip, value_clip: how far ratio and value may move within a round; None does not clip the value.
        value_weight: of the value loss in the sum.
    """

    title = "ppo"
    learning_rate: float = 1e-6
    value_learning_rate: float = 1e-4
    kl: float = 0.1
    kl_target: float | None = None
    discount: float = 1.0
    trace: float = 0.95
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_weight: float = 0.1

    def check(self) -> None:
        super().check()
        how = self.drawing
        if how.n != 1:
            raise ValueError(
                f"n: expected 1, found {how.n}; PPO draws one response a prompt: raise prompts_per_iteration"
            )
        if not how.temperature > 0:
            raise ValueError(
                f"temperature: expected a positive number, found {how.temperature}; PPO learns from the probabilities of "
                "what it draws, so leave it at 1"
            )
        how.check()


@dataclass(frozen=True, kw_only=True)
class DPO(Settings):
    """Beta, learning rate, batch and epochs are the paper's (Lin et al. 2024).

    Attributes:
        beta: inverse temperature.
        max_length: longer pairs are cut at their end, at most the model's context; pairs whose prompt alone is longer
            are left out.
        saves: checkpoints on the way, evenly spread, the last at the end; each is an iteration of the run.
    """

    title = "dpo"
    needs = ("preferences",)
    epochs: int = 3
    learning_rate: float = 1e-6
    beta: float = 0.1
    max_length: int = 1024
    saves: int = 5
    chat: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RewardTraining(Settings):
    """Of a reward model.

    Attributes:
        max_length: of a prompt with its response in tokens, see `encoded`; at most the model's context.
        held_out: share of the pairs on which the accuracy is measured and that are not trained on.
    """

    title = "reward model"
    epochs: int = 1
    max_length: int = 1024
    held_out: float = 0.1
    seed: int = 0

    def check(self) -> None:
        super().check()
        rows_at_once(self)


@dataclass(frozen=True)
class Teaching:
    """How long, how fast and by what a student is taught.

    Attributes:
        steps: at most.
        every: steps from one point to the next.
        batch_size: prompts of each side in a step.
        learning_rate: at its height, after a rise of a fifth of the steps; then it falls to a tenth. None: `usual_rate`.
        divergence: a name of `DIVERGENCES`.
        keep_by: how a step's questions are shared among abilities: "uniform", or "bandit", drawn by BanditMTL's p.
    """

    steps: int = 15
    every: int = 5
    batch_size: int = 32
    learning_rate: float | None = None
    divergence: str = "reverse"
    keep_by: str = "uniform"
    micro_batch_size: int = 8

    @property
    def points(self) -> int:
        """Most points that it has, the start left out."""
        return math.ceil(self.steps / self.every)

    def check(self) -> None:
        """Raise a ValueError for a number out of range, or a name that is none."""
        names = {"divergence": DIVERGENCES, "keep_by": KEEP_BY}
        refuse_settings(**{name: value for name, value in vars(self).items() if name not in names})
        for name, known in names.items():
            if (found := getattr(self, name)) not in known:
                raise ValueError(f"{name}: expected {', '.join(known)}, found {found!r}")


def drawn_as(drawing: Drawing, given: Mapping[str, Any]) -> Drawing:
    """`drawing` with what the options say of it."""
    return replace(drawing, **{DRAWN[n]: v for n, v in given.items() if n in DRAWN})


def drawn_of(drawing: Drawing) -> dict[str, Any]:
    """How one response a prompt is drawn, by the names of options."""
    return {name: getattr(drawing, of) for name, of in DRAWN.items() if name != "n"}


def refuse_settings(**settings: Any) -> None:
    """Raise a ValueError for a setting outside its range; None and names that are not known here pass.

    >>> refuse_settings(epochs=0)
    Traceback (most recent call last):
    ValueError: epochs: expected at least 1, found 0
    """
    for name, value in settings.items():
        for names, fits, expected in RANGES:
            if name in names.split() and value is not None and not fits(value):
                raise ValueError(f"{name}: expected {expected}, found {value!r}")


def refuse_equal(drawing: Drawing) -> None:
    """Raise a ValueError for a number out of range, and where all n responses would be the same (temperature 0)."""
    drawing.check()
    if drawing.n > 1 and not drawing.temperature > 0:
        raise ValueError(
            f"temperature: expected a positive number, found {drawing.temperature}, at which all {drawing.n} responses are "
            "the same; raise it, or draw one (n = 1)"
        )


def rows_at_once(settings: Settings, world: int = 1) -> int:
    """How many rows of a step each process runs at once, for a trainer that accumulates micro-batches of one size.

    A batch that `world` processes cannot share in such micro-batches is a ValueError.
    """
    at_once = min(settings.micro_batch_size, max(1, settings.batch_size // world))
    if settings.batch_size % (at_once * world):
        raise ValueError(
            f"{settings.title}: expected a batch size that {world} processes share in micro-batches of {at_once}, found "
            f"{settings.batch_size}"
        )
    return at_once


def typed(option: str) -> str:
    """An option as it is typed."""
    return "--" + option.replace("_", "-")
