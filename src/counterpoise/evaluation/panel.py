"""What a model is measured by, and what it scores: its reward and its abilities, item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from counterpoise.evaluation.abilities import Ability, load_abilities
from counterpoise.evaluation.items import FileAbility
from counterpoise.evaluation.measurement import Measurement, Scores
from counterpoise.evaluation.parts import PARTS, Part, clusters, in_part, placement
from counterpoise.evaluation.rewards import Reward, fingerprint, load_reward, name_of, rate
from counterpoise.evaluation.specs import bare, fewest
from counterpoise.language.engine import LanguageModel
from counterpoise.language.memory import Rows
from counterpoise.language.prompts import Prompt, encode_prompt, encode_prompts, read_prompts
from counterpoise.language.sampling import SCORING, Drawing, sample
from counterpoise.records import Progress, Store, digest
from counterpoise.statistics.bootstrap import Array

Given = LanguageModel | Callable[[], LanguageModel]
"""A model, or what gives it when something is to be measured."""
FEWEST = 8
"""Prompts before a first look."""
FEW, SHORT = 32, 32
"""A rough measurement: prompts and items a part, and tokens of a response, at most."""
ROUGH = f"A rough answer (--fast): at most {FEW} prompts and items a part, and {SHORT} tokens a response"


@dataclass(frozen=True)
class Panel:
    """What a model is measured by: prompts with a reward, and abilities.

    Attributes:
        prompts: split by content into proxy, validation and held-out parts that never mix, groups of them whole.
        reward: (prompts, responses) -> numbers, higher is better.
        reward_id: names the reward in results; stored work is keyed by it.
        abilities: what `load_abilities` returned.
        limit: at most so many items per ability and part.
        prompt_limit: at most so many prompts per part (proxy prompts are not limited).
        drawing: how responses are drawn, n of them for a prompt, whose reward is their mean: more of them steady it, and
            the prompt is read once for all. Every model sees the same random numbers. `batch_size` sequences are scored
            at once, four times as many drawn.
        looks: shares of a part's prompts after which a race looks at the rewards, which are measured piece by piece.
    """

    prompts: Sequence[Prompt]
    reward: Reward
    abilities: Sequence[Ability]
    reward_id: str = "reward"
    limit: int | None = None
    prompt_limit: int | None = None
    drawing: Drawing = SCORING
    source: dict[str, Any] = field(default_factory=dict)
    looks: tuple[float, ...] = ()

    @classmethod
    def load(
        cls,
        prompts: str | Path,
        reward: str | Reward,
        abilities: Sequence[str],
        *,
        device: str = "cpu",
        limit: int | None = None,
        prompt_limit: int | None = None,
        drawing: Drawing = SCORING,
        trust_tasks: bool = False,
    ) -> Panel:
        """From a prompts file, a reward (a spec of `load_reward` or a callable) and ability specs.

        Args:
            device: of a reward that is a model.
            limit, prompt_limit, drawing: see `Panel`.
            trust_tasks: whether folders of lm-eval tasks may run code of their own.

        Raises:
            ValueError: an unreadable file, a spec that is none, a drawing out of range.
        """
        drawing.check()
        return cls(
            read_prompts(prompts),
            load_reward(reward, device=device, batch_size=drawing.rows),
            load_abilities(abilities, trust_tasks=trust_tasks),
            reward_id=fingerprint(reward),
            limit=limit,
            prompt_limit=prompt_limit,
            drawing=drawing,
            source={"prompts": str(prompts), "reward": name_of(reward), "abilities": list(abilities)},
        )

    @property
    def primary(self) -> dict[str, str]:
        """The metrics that count, of the abilities of which it is not the first."""
        return {a.name: a.primary for a in self.abilities if a.primary is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """How responses are drawn and how much is measured, as plain json."""
        names = ("max_new_tokens", "temperature", "chat", "seed")
        drawn = {name: getattr(self.drawing, name) for name in names}
        return {"limit": self.limit, "prompt_limit": self.prompt_limit, "replies": self.drawing.n, **drawn}

    def draws(self, **changes: Any) -> Drawing:
        """How responses are drawn, with some changes."""
        size: Rows = "auto" if self.drawing.batch_size == "auto" else 4 * self.drawing.batch_size
        return replace(self.drawing, batch_size=size, **changes)

    @property
    def fingerprint(self) -> str:
        """sha256 over reward, abilities and prompts: what a result is of."""
        return digest([self.reward_id, [a.fingerprint for a in self.abilities], *placement(self.prompts)])

    def prompts_of(self, part: Part) -> list[Prompt]:
        """The prompts of a part, in the order of their content hash."""
        if not (chosen := self._chosen(part)):
            raise ValueError(
                f"prompts: expected some in the {part} part, found none among {len(self.prompts)}; "
                "give at least some twenty prompts"
            )
        return chosen

    def _chosen(self, part: Part) -> list[Prompt]:
        chosen = in_part(self.prompts, part)
        return chosen if part == "proxy" else chosen[: self.prompt_limit]

    @property
    def asked(self) -> list[Prompt]:
        """The prompts of all parts, in the order of their file."""
        keys = {p.key for part in PARTS for p in self._chosen(part)}
        return [p for p in self.prompts if p.key in keys]

    def refuse_long(self, tokenizer: Any, context: int | None) -> None:
        """Raise where a prompt or an item does not go through the chat template, or not into the model's context.

        Raises:
            ValueError: the first of them, with its file and line, and how many there are.
        """
        how = self.drawing
        encode_prompts(tokenizer, self.asked, chat=how.chat, new=how.max_new_tokens, limit=context)
        for ability in self.abilities:
            if isinstance(ability, FileAbility):
                ability.refuse_long(tokenizer, how, context, self.limit)

    def looks_at(self, count: int) -> list[int]:
        """How many of so many prompts are measured at each look, all of them at the last."""
        return sorted({count, *(n for share in self.looks if FEWEST <= (n := round(share * count)) < count)})

    @property
    def _drawn(self) -> dict[str, Any]:
        """What decides a response beside its prompt, in the keys of stored work."""
        how = self.drawing
        return {"tokens": how.max_new_tokens, "temperature": how.temperature, "chat": how.chat, "seed": how.seed}

    def _pieces(self, part: Part, looks: int | None = None) -> Iterator[list[Prompt]]:
        chosen = self.prompts_of(part)
        for start, end in pairwise([0, *self.looks_at(len(chosen))[:looks]]):
            yield chosen[start:end]

    def _said(
        self, model: Given, tokenizer: Any, some: Sequence[Prompt], store: Store | None, on: Mapping[str, Any]
    ) -> list[Any]:
        def draw() -> list[Any]:
            asked = [encode_prompt(tokenizer, p, chat=self.drawing.chat) for p in some]
            return sample(_at_hand(model), tokenizer, asked, self.draws())

        key = {"what": "responses", "prompts": digest([p.key for p in some]), "replies": self.drawing.n}
        return [[tuple(ids) for ids in group] for group in _kept(store, {**key, **self._drawn, **on}, draw)]

    def responses(
        self, model: Given, tokenizer: Any, part: Part, *, store: Store | None = None, model_id: Any = None
    ) -> list[list[tuple[int, ...]]]:
        """The responses whose reward `measure` takes: of each prompt of the part `drawing.n`, as token ids."""
        on = {"model": model_id, "part": part}
        return [said for some in self._pieces(part) for said in self._said(model, tokenizer, some, store, on)]

    def rewards(
        self,
        model: Given,
        tokenizer: Any,
        part: Part,
        *,
        looks: int | None = None,
        store: Store | None = None,
        model_id: Any = None,
    ) -> Array:
        """The reward of each prompt of a part, in their order, or of those up to so many looks; see `measure`."""
        on, key = {"model": model_id, "part": part}, {"what": "reward", "reward": self.reward_id, **self._drawn}
        key |= {"replies": self.drawing.n} if self.drawing.n > 1 else {}
        found: list[float] = []
        for some in self._pieces(part, looks):

            def rated(some: list[Prompt] = some) -> list[float]:
                said = self._said(model, tokenizer, some, store, on)
                ask = partial(rate, self.reward, tokenizer, some, said)
                return [float(mean) for mean in (ask() if store is None else store.told(ask)).mean(1)]

            found += _kept(store, {**key, "prompts": digest([p.key for p in some]), **on}, rated)
        return np.array(found, dtype=np.float64)

    def measure(
        self,
        model: Given,
        tokenizer: Any,
        part: Part,
        *,
        store: Store | None = None,
        model_id: Any = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Reward and abilities of `model` on one part.

        Args:
            model: or what gives it, asked only where something is not in the store yet.
            store: finished pieces are read from and kept in it, keyed by `model_id` and all that decides them.
            progress: called with (done, total) pieces: the reward and each ability.
        """
        total = 1 + len(self.abilities)
        statistics = self.rewards(model, tokenizer, part, store=store, model_id=model_id)[:, None]
        if progress is not None:
            progress(1, total)
        chosen = self.prompts_of(part)
        reward = Measurement("reward", "", statistics, "mean", None, tuple(p.key for p in chosen), clusters(chosen))
        abilities = {}
        for number, ability in enumerate(self.abilities, start=2):
            abilities[ability.name] = self.score(ability, model, tokenizer, part, store=store, model_id=model_id)
            if progress is not None:
                progress(number, total)
        return Scores(reward, abilities)

    def score(
        self, ability: Ability, model: Given, tokenizer: Any, part: Part, *, store: Store | None, model_id: Any
    ) -> list[Measurement]:
        """One of the abilities of `model` on a part; see `measure`."""

        def run() -> list[Any]:
            found = ability.measure(_at_hand(model), tokenizer, part, self.drawing, limit=self.limit)
            return [m.to_json() for m in found]

        key = {"what": "ability", "ability": ability.fingerprint, "limit": self.limit, **self._drawn}
        measured = _kept(store, {**key, "model": model_id, "part": part}, run)
        return primary_first(ability, [Measurement.from_json(m) for m in measured])


def _at_hand(model: Given) -> LanguageModel:
    return model if isinstance(model, LanguageModel) else model()


def _kept(store: Store | None, key: dict[str, Any], work: Callable[[], Any]) -> Any:
    return work() if store is None else store.once(key, work)


def primary_first(ability: Ability, measured: Sequence[Measurement]) -> list[Measurement]:
    """An ability's measurements, as they are stored, with the one that counts in front.

    Raises:
        ValueError: its primary metric is none of them.
    """
    if (wanted := ability.primary) is None:
        return list(measured)
    if bare(wanted) not in (found := [bare(m.metric) for m in measured]):
        raise ValueError(f"{ability.name}: primary: expected {' or '.join(found)}, numbers per item, found {wanted!r}")
    return sorted(measured, key=lambda m: bare(m.metric) != bare(wanted))


@dataclass(frozen=True)
class PanelFiles:
    """A panel as it is typed, before anything of it is read; see `Panel.load`."""

    prompts: str | Path
    reward: str
    abilities: Sequence[str]
    limit: int | None = None
    prompt_limit: int | None = None
    drawing: Drawing = SCORING
    trust_tasks: bool = False

    def rough(self) -> PanelFiles:
        """The same, for a rough answer in little time."""
        drawing = replace(self.drawing, max_new_tokens=min(SHORT, self.drawing.max_new_tokens))
        return replace(
            self, limit=fewest(self.limit, FEW), prompt_limit=fewest(self.prompt_limit, FEW), drawing=drawing
        )

    def load(self, device: str) -> Panel:
        """The panel itself; a reward that is a model goes to `device`."""
        return Panel.load(**vars(self), device=device)
