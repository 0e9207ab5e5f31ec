"""On-policy distillation from both parents: the student answers, POST teaches what aligns, PRE what there was before.

The loss of a step is half the mean divergence per token to POST on the student's answers to alignment prompts, and half
that to PRE on its answers to questions of the abilities; no label is read. Sources: Agarwal et al. 2024 (GKD, arXiv
2306.13649) for the student's own samples and the divergences; GLM-5 (2602.15763) and MOPD (2606.30406) for earlier
checkpoints of the same run as teachers.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from counterpoise.alignment.divergences import diverge
from counterpoise.alignment.mitigations.balanced import bandit_of_means
from counterpoise.alignment.settings import Teaching
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.models import Machine, load, load_frozen
from counterpoise.alignment.training.rounds import draw_together
from counterpoise.alignment.training.run import Run
from counterpoise.alignment.training.sharding import part_like
from counterpoise.alignment.training.stepping import Mitigation, Step, adam, finish_all, start_all, take_step
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example, device_of, refuse_too_long, response_tokens, score_responses
from counterpoise.language.sharded import own_part
from counterpoise.multitask import BanditMTL
from counterpoise.ranks import NoNumbers, is_sharded, sum_over_ranks

Ids = tuple[int, ...]
POST, PRE = 0, 1
"""The sides, by their teachers."""
NAMES = {POST: "the teacher of alignment", PRE: "the teacher of what there was before"}
DRAWN_BY = "mean divergences over those of START"
"""What BanditMTL compares. It was each ability's mean over that of its first few answers, whose luck decided p."""
PATIENCE = 2
"""Points in a row without progress on validation data that end a healing."""
PER_SEED = 1_000_000
"""Seeds of the draws of one run: one a step, and the last one of the looks at validation data."""


class Asked(NamedTuple):
    """Prompts of one kind as token ids: those that are taught on, and those that are only looked at."""

    name: str
    taught: tuple[Ids, ...]
    checked: tuple[Ids, ...]


class Teachers:
    """POST (0) and PRE (1), frozen, memory-mapped where their dtype and device allow.

    Args:
        turns: hold one of them at a time, and read the other from disk when it is asked for.
    """

    def __init__(
        self, post: str | Path, pre: str | Path, machine: Machine | None = None, *, turns: bool = False
    ) -> None:
        self.sources, self.turns, self.machine = (post, pre), turns, machine
        self._held: dict[int, nn.Module] = {}

    def __call__(self, side: int) -> nn.Module:
        if side not in self._held:
            if self.turns:
                self._held.clear()
            self._held[side] = load_frozen(self.sources[side], self.machine)
        return self._held[side]


@dataclass
class Lesson(Mitigation):
    """What one teacher adds to a step: half the mean divergence per token on the student's own answers.

    Attributes:
        examples, of: the answers, and the number of the source that each was asked from.
        sums: the divergence of each in nats, known to all processes.
        name: of the teacher, in errors.
    """

    teacher: Callable[[], nn.Module]
    divergence: str
    examples: list[Example] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    name: str = "the teacher"

    def add_gradients(self, step: Step) -> None:
        self.look(step, scale=0.5 / response_tokens(self.examples))

    def look(self, step: Step, *, scale: float | None = None) -> None:
        """Fill `sums`; with `scale` the gradient of all of them, times it, is added to the parameters'."""
        teacher, sums = self.teacher(), [0.0] * len(self.examples)
        for rows in step.batches(self.examples):
            batch = [self.examples[i] for i in rows]
            with torch.no_grad(), named(self.name):
                there_BCV = score_responses(teacher, batch).logits_BCV
            with torch.set_grad_enabled(scale is not None), named("the student"):
                own = score_responses(step.model, batch)
            found = diverge(own, there_BCV, self.divergence, scale=None if scale is None else scale * rows.weight)
            for i, value in zip(rows, found, strict=True):
                sums[i] += value * rows.weight
        self.sums = sum_over_ranks(sums)
        if not all(map(math.isfinite, self.sums)):
            raise NoNumbers("heal: expected a divergence that is a number, found NaN or infinity")

    @property
    def means(self) -> dict[int, float]:
        """Source -> its divergence per token."""
        found = {}
        for k in sorted(set(self.of)):
            own = [i for i, source in enumerate(self.of) if source == k]
            found[k] = sum(self.sums[i] for i in own) / response_tokens([self.examples[i] for i in own])
        return found


@contextmanager
def named(who: str) -> Iterator[None]:
    """Say whose numbers are none."""
    try:
        yield
    except NoNumbers as error:
        raise NoNumbers(f"{who}: {error}") from None


def teach(
    model: nn.Module,
    tokenizer: Any,
    asked: Sequence[Asked],
    teachers: Callable[[int], nn.Module],
    start: Path,
    *,
    drawing: Drawing = Drawing(),
    teaching: Teaching = Teaching(),
    mitigations: Sequence[Mitigation] = (),
    run: Run,
) -> None:
    """Heal `model` in place, and leave in it the best of its points by both sides' validation prompts.

    A point, every so many steps, is a checkpoint of `run`. Healing ends early where PATIENCE points in a row are no better
    than the best, or where a number overflows; a run that was stopped goes on bit for bit.

    Args:
        asked: the alignment prompts, and then those of each ability.
        start: the checkpoint that `model` was loaded from; what it holds stays where no point is better.
        drawing: how the student answers.

    Raises:
        ValueError: a prompt too long for the context, DeepSpeed.
    """
    processes.refuse_sharded("heal", cut_up=is_sharded(model))
    processes.join(device_of(model))
    for source in asked:
        refuse_too_long(model, (*source.taught, *source.checked), drawing.max_new_tokens)
    names = [source.name for source in asked[1:]]
    balance: BanditMTL | None = None
    rate = teaching.learning_rate or usual_rate(sum(p.numel() for p in model.parameters()))
    lessons = [Lesson(partial(teachers, side), teaching.divergence, name=NAMES[side]) for side in (POST, PRE)]
    start_all(mitigations, model, tokenizer)
    optimizer = adam(model, rate)
    state = run.load(model, tokenizer, optimizer, mitigations) or {"taken": [0] * len(asked), "looked": []}
    taken, looked = state["taken"], state["looked"]

    def answer(prompts: Sequence[tuple[int, Ids]], number: int) -> int:
        """Give the lessons the student's answers to prompts, each with its source; returns their tokens."""
        how = replace(drawing, n=1, seed=PER_SEED * drawing.seed + number)
        examples = answers(model, tokenizer, [ids for _, ids in prompts], how)
        for side, lesson in enumerate(lessons):
            own = [i for i, (k, _) in enumerate(prompts) if min(k, 1) == side]
            lesson.examples, lesson.of = [examples[i] for i in own], [prompts[i][0] for i in own]
        return response_tokens(examples)

    def look() -> tuple[dict[str, float], int]:
        """The divergences per token on validation prompts, by side and ability ("keep/NAME"), and the tokens drawn for them."""
        tokens = answer([(k, ids) for k, s in enumerate(asked) for ids in s.checked], PER_SEED - 1)
        with ExitStack() as stack:
            for mitigation in mitigations:
                stack.enter_context(mitigation.as_finished(model))
            for lesson in lessons:
                lesson.look(Step(model, (), 0.0, teaching.micro_batch_size))
        kept = lessons[PRE].means
        told = {"align": lessons[POST].means[0], "keep": sum(kept.values()) / len(kept)}
        return {"loss": sum(told.values()) / 2, **told, **{f"keep/{names[k - 1]}": v for k, v in kept.items()}}, tokens

    def step(number: int) -> int:
        for group in optimizer.param_groups:
            group["lr"] = rate * height(number, teaching.steps)
        counts = [teaching.batch_size, *shares(len(names), teaching.batch_size, number, drawing.seed, balance)]
        places = [(k, taken[k] + i) for k, n in enumerate(counts) for i in range(n)]
        prompts = [(k, in_turn(asked[k].taught, f"{drawing.seed} {k}", place)) for k, place in places]
        taken[:] = [a + b for a, b in zip(taken, counts, strict=True)]
        tokens = answer(prompts, number)
        both = [example for lesson in lessons for example in lesson.examples]
        take_step(model, optimizer, both, lambda rows: None, teaching.micro_batch_size, [*lessons, *mitigations])
        if balance is not None:
            means = lessons[PRE].means
            balance.observe(torch.tensor([means.get(k, 0.0) for k in range(1, len(asked))]), counts[1:])
            balance.step()
        return tokens

    begun = time.time()
    if not looked:
        found, tokens = look()
        looked.append(found)
        if not run.metrics() and processes.is_first():
            told = {"method": "heal", "step": 0, "learning_rate": rate, **found, "drawn": tokens, "trained": 0}
            run.log({"iteration": 0, **told, "seconds": round(time.time() - begun, 1)})
    if teaching.keep_by == "bandit" and len(names) > 1:
        at_start = [looked[0][f"keep/{name}"] for name in names]
        balance = bandit(names, [x if x > 0.0 else 1.0 for x in at_start])
        if "balance" in state:
            balance.load_state_dict(state["balance"])
    while run.done < teaching.points and not ended(looked):
        begun, point, trained = time.time(), run.done + 1, 0
        stage = run.stage(f"healing, point {point} of {teaching.points}")
        numbers = range((point - 1) * teaching.every, min(teaching.steps, point * teaching.every))
        try:
            for done, number in enumerate(numbers, start=1):
                trained += step(number)
                if stage is not None:
                    stage(done, len(numbers))
            found, tokens = look()
        except NoNumbers:
            break  # this is no point; those before it are whole
        looked.append(found)
        told = {"method": "heal", "step": numbers.stop, **found, "drawn": trained + tokens, "trained": trained}
        kept = {"taken": taken, "looked": looked} | ({} if balance is None else {"balance": balance.state_dict()})
        run.save(point, metrics={**told, "seconds": round(time.time() - begun, 1)}, loop=kept)
    finish_all(mitigations, model)
    best = best_of(looked)
    put_back(model, run.checkpoint(best) if best else start)  # a break may have left other weights


def best_of(looked: Sequence[Mapping[str, float]]) -> int:
    """The number of the look with the least loss: 0 is the start."""
    return min(range(len(looked)), key=lambda i: looked[i]["loss"])


def ended(looked: Sequence[Mapping[str, float]]) -> bool:
    """Whether the last PATIENCE looks are all no better than the best before them."""
    return len(looked) - 1 - best_of(looked) >= PATIENCE


def how_it_ended(looked: Sequence[Mapping[str, float]], teaching: Teaching) -> str:
    """Of a finished healing: "steps", all of them; "no progress", see `ended`; "overflow", a number was NaN or infinite."""
    if len(looked) > teaching.points:
        return "steps"
    return "no progress" if ended(looked) else "overflow"


def height(number: int, steps: int) -> float:
    """The share of the learning rate at a step: up in a straight line over a fifth of the steps, then down to a tenth.

    >>> [round(height(i, 10), 2) for i in range(10)]
    [0.5, 1.0, 0.89, 0.78, 0.66, 0.55, 0.44, 0.32, 0.21, 0.1]
    """
    rise = math.ceil(steps / 5)
    return min((number + 1) / rise, 1 - 0.9 * max(0, number + 1 - rise) / max(1, steps - rise))


def usual_rate(parameters: int) -> float:
    """3e-4 up to 1.35 million parameters, falling with their root: 3e-5 at 135 million, to two digits.

    >>> usual_rate(1_350_000), usual_rate(135_000_000), usual_rate(7_000_000_000)
    (0.0003, 3e-05, 4.2e-06)
    """
    return float(f"{3e-4 * min(1.0, math.sqrt(1.35e6 / parameters)):.2g}")


def bandit(names: Sequence[str], units: Sequence[float] | None = None) -> BanditMTL:
    """Draws abilities, more than half of them always effective; their divergences count in these units."""
    return bandit_of_means(names, (len(names) + 1) / 2, units)


def shares(count: int, size: int, number: int, seed: int, balance: BanditMTL | None) -> list[int]:
    """How many of a step's `size` questions each of `count` abilities asks.

    >>> shares(3, 8, 0, 0, None), shares(3, 8, 1, 0, None)
    ([2, 3, 3], [3, 2, 3])
    """
    if balance is None:  # floor((x + k) / count) over all k adds up to x
        return [(size * (number + 1) + k) // count - (size * number + k) // count for k in range(count)]
    drawn = balance.draw(size, torch.Generator().manual_seed(PER_SEED * seed + number))
    return torch.bincount(drawn, minlength=count).tolist()  # type: ignore[no-any-return]


def in_turn(prompts: Sequence[Ids], key: str, place: int) -> Ids:
    """What stands at a place of an endless shuffle in which every prompt comes once before any comes twice."""
    again, at = divmod(place, len(prompts))
    return prompts[_shuffled(f"{key} {again}", len(prompts))[at]]


@lru_cache(maxsize=64)
def _shuffled(key: str, count: int) -> list[int]:
    return random.Random(key).sample(range(count), count)


def answers(model: nn.Module, tokenizer: Any, prompts: Sequence[Ids], drawing: Drawing) -> list[Example]:
    """One answer to each prompt; several processes share the drawing, and all know what was drawn."""
    found = draw_together(model, tokenizer, prompts, drawing, lambda rows, drawn: [group[0] for group in drawn])
    return list(map(Example, prompts, found))


@torch.no_grad()
def put_back(model: nn.Module, folder: Path) -> None:
    """Set the weights to those of a checkpoint of the same model."""
    kept, _ = load(folder, Machine(next(model.parameters()).dtype))
    for own, other in zip(model.parameters(), kept.parameters(), strict=True):
        own_part(own).copy_(part_like(other, own))
