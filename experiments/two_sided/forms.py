"""Other forms of the alignment side: good responses set against bad ones, and the reward itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from on_policy import OnPolicy, advantages
from torch import nn

from counterpoise.averaging.resident import Objective
from counterpoise.evaluation.rewards import Rated, draw_rated
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language.prompts import Prompt
from counterpoise.language.scoring import Example, response_tokens, row_nlls
from counterpoise.search.both_sides import BothSides
from counterpoise.search.on_bench import examples_of
from counterpoise.search.proxies import parts
from counterpoise.search.sides import Likelihood


@dataclass(eq=False)
class Contrast(BothSides):
    """Good responses of POST and of PRE against bad ones, n of each to a prompt."""

    n: int = 4
    form: ClassVar[str] = "contrast"

    @cached_property
    def alignment(self) -> Likelihood:
        """The advantage-weighted set, as one objective."""
        weighed = contrast(self.rated, batch_size=self.batch, temperature=self.bench.panel.drawing.temperature)
        return Likelihood(self.bench.resident, self.cut, weighed.terms)

    @property
    def aligned(self) -> Any:
        """The temperature, and every response with its reward."""
        return [self.bench.panel.drawing.temperature, [[list(r.examples), r.rewards.tolist()] for r in self.rated]]

    @cached_property
    def rated(self) -> list[Rated]:
        """Responses of both ends."""
        return ratings(self.bench, self.size, self.n)


@dataclass(eq=False)
class OnReward(BothSides):
    """The reward itself, its gradient from n responses a prompt that are drawn anew at every point, `size` in all."""

    n: int = 4
    form: ClassVar[str] = "reward"

    @cached_property
    def alignment(self) -> OnPolicy:
        """The sampled side."""
        bench, panel = self.bench, self.bench.panel
        drawing = replace(panel.drawing, n=self.n, batch_size=8 * self.batch, seed=panel.drawing.seed + 1)
        how: dict[str, Any] = {"groups": min(8, max(2, self.size // self.n)), "batch_size": self.batch}
        how["progress"] = bench.stage("drawing along the diagonal")
        return OnPolicy(bench.resident, self.cut, bench.tokenizer, self.asked, panel.reward, drawing, **how)

    @property
    def asked(self) -> list[Prompt]:
        """Prompts that are answered at every point."""
        return self.bench.panel.prompts_of("proxy")[: max(2, self.size // self.n)]

    @property
    def aligned(self) -> Any:
        """The reward, the prompts, and how responses are drawn."""
        panel = self.bench.panel
        how = panel.drawing
        data = [panel.reward_id, [p.key for p in self.asked]]
        return [*data, how.max_new_tokens, how.temperature, how.chat, how.seed, self.n]

    def measure(self) -> dict[str, Any]:
        """Slopes of both sides, and which neighbours' samples were used."""
        return {**super().measure(), "neighbours": [k._asdict() for k in self.alignment.kept]}


FORMS: dict[str, type[BothSides]] = {"imitation": BothSides, "contrast": Contrast, "reward": OnReward}


@dataclass(frozen=True)
class WeightedSet:
    """An objective: sum_i w_i NLL_i over the number of response tokens, NLL_i in nats.

    With advantages as weights it is the contrast of good against bad responses: minus the advantage-weighted
    log-likelihood, whose gradient at the model that drew the responses is minus the policy gradient of the reward.
    """

    examples: tuple[Example, ...]
    weights: tuple[float, ...]
    batch_size: int = 8
    temperature: float = 1.0

    @property
    def terms(self) -> list[Objective]:
        """The objective as a sum: `Objectives`."""
        return [partial(self._run, part) for part in parts(self.examples, self.batch_size)]

    def backward(self, model: nn.Module) -> float:
        """The objective, its gradient accumulated in the parameters: an `Objective`."""
        return sum(term(model) for term in self.terms)

    def _run(self, batches: Sequence[list[int]], model: nn.Module) -> float:
        tokens, total = response_tokens(self.examples), 0.0
        for rows in batches:
            nlls = row_nlls(model, [self.examples[i] for i in rows], temperature=self.temperature)
            loss = (nlls * nlls.new_tensor([self.weights[i] for i in rows])).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total


def contrast(rated: Sequence[Rated], *, batch_size: int = 8, temperature: float = 1.0) -> WeightedSet:
    """Minus the advantage-weighted log-likelihood of the responses, so that only what earns reward counts as alignment.

    F(r) = -sum_i a_i log p_r(y_i | x_i) / tokens, the advantages summing to 0 over the responses of one model to one
    prompt. So what POST says and PRE does not counts for nothing by itself; only a response better or worse than its
    siblings does. At the model that drew them the gradient is minus the policy gradient of the reward (RLOO).

    Args:
        rated: of POST, and of PRE too where the search should also know what to prefer at that end.

    Raises:
        ValueError: all responses to every prompt have the same reward.
    """
    pairs = [
        (e, a)
        for group in rated
        for e, a in zip(group.examples, advantages(group.rewards).ravel().tolist(), strict=True)
        if a != 0.0
    ]
    if not pairs:
        raise ValueError(
            "contrast: expected responses of different reward to at least one prompt, found none; "
            "draw more responses or use a finer reward"
        )
    return WeightedSet(tuple(e for e, _ in pairs), tuple(a for _, a in pairs), batch_size, temperature)


def ratings(bench: Workbench, size: int, n: int) -> list[Rated]:
    """Rated responses of POST and of PRE to the same proxy prompts, `size` in all: both ends of a contrast."""
    panel, drawing = bench.panel, bench.panel.draws(n=n, seed=bench.panel.drawing.seed + 1)
    prompts = panel.prompts_of("proxy")[: max(1, size // (2 * n))]

    def draw(end: float) -> dict[str, Any]:
        model, progress = bench.model_at(end), bench.stage(f"drawing responses of {'POST' if end else 'PRE'}")
        rated = draw_rated(model, bench.tokenizer, prompts, panel.reward, drawing, progress=progress)
        return {"examples": rated.examples, "rewards": rated.rewards.tolist()}

    key = {"what": "rated", "model": bench.inputs, "prompts": [p.key for p in prompts], "reward": panel.reward_id}
    key |= drawing.decides
    kept = [bench.store.together({**key, "end": end}, partial(draw, end)) for end in (1.0, 0.0)]
    return [Rated(tuple(examples_of(k["examples"])), np.array(k["rewards"])) for k in kept]
