"""Experience replay: texts of before alignment, learned again beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from counterpoise.alignment.training.stepping import Mitigation, Step
from counterpoise.checkpoints.reading import json_lines
from counterpoise.language.prompts import encode_prompt, prompt_of
from counterpoise.language.sampling import turn_end
from counterpoise.language.scoring import Example, response_nll, response_tokens
from counterpoise.records import digest


@dataclass
class Replay(Mitigation):
    """Learn `ratio` tokens of replayed text for each response token of alignment (Lin et al. 2024).

    Each step adds the summed negative log-likelihood of its replayed tokens over the number N of its response tokens:
    a replayed token weighs as much as one of RSF's. What a step draws too much or too little is settled in the next, so
    the ratio holds in the long run. For PPO and DPO this is ratio times the mean loss of the replayed text.

    Args:
        ratio: replayed tokens per response token; the paper's grid is 0.25 to 4.
        examples: prompts and responses; `read_corpus` reads them, and samples of PRE do as well.
        seed: of their order.

    Raises:
        ValueError: a ratio that is not positive, no examples.

    >>> Replay(0.5, [Example((1,), (5, 6))]).ratio
    0.5
    """

    ratio: float
    examples: Sequence[Example] = field(repr=False)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"replay: expected a positive token ratio that is finite, found {self.ratio}")
        if not self.examples:
            raise ValueError("replay: expected examples, found none")

    def start(self, model: nn.Module, tokenizer: object) -> None:
        self._order = random.Random(self.seed)
        self._queue: list[int] = []
        self._owed = 0.0

    def add_gradients(self, step: Step) -> None:
        size = response_tokens(step.examples)
        batch = [self.examples[i] for i in self._draw(self.ratio * size)]
        for rows in step.batches(batch):
            loss = rows.weight * response_nll(step.model, [batch[i] for i in rows]) / size
            loss.backward()  # type: ignore[no-untyped-call]

    def _draw(self, tokens: float) -> list[int]:
        self._owed += tokens
        drawn: list[int] = []
        while self._owed > 0:
            drawn.append(self._next())
            self._owed -= len(self.examples[drawn[-1]].response)
        return drawn

    def _next(self) -> int:
        self._queue = self._queue or self._order.sample(range(len(self.examples)), len(self.examples))
        return self._queue.pop()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "examples": digest(self.examples)}

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order.getstate(), "queue": self._queue, "owed": self._owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order.setstate(state["order"])
        self._queue, self._owed = list(state["queue"]), state["owed"]


def read_corpus(path: str | Path, tokenizer: Any, *, max_tokens: int = 512, chat: bool = True) -> list[Example]:
    """Read a jsonl file of {"text": str}, or {"prompt" or "messages", "response": str}, for `Replay`.

    A text is cut into pieces of at most `max_tokens`; all its tokens but a piece's first are learned. A response is
    learned with the token that ends it (`response_ids`); a longer pair is cut at its end.

    Raises:
        ValueError: a line of another form, with its number; nothing to learn.
    """
    examples: list[Example] = []
    for place, record in json_lines(path):
        examples += _pieces(record, place, tokenizer, max_tokens, chat)
    if not examples:
        raise ValueError(f'{path}: expected lines {{"text": "..."}} of two tokens or more, found none')
    return examples


def _pieces(record: dict[str, Any], place: str, tokenizer: Any, max_tokens: int, chat: bool) -> list[Example]:
    match record:
        case {"text": str(text)}:
            ids = list(tokenizer(text)["input_ids"])
            parts = [ids[i : i + max_tokens] for i in range(0, len(ids), max_tokens)]
            return [Example(tuple(part[:1]), tuple(part[1:])) for part in parts if len(part) > 1]
        case {"response": str(response)}:
            prompt = encode_prompt(tokenizer, prompt_of(record, place), chat=chat)
            learned = response_ids(tokenizer, response, chat=chat)
            example = Example(prompt, learned[: max(0, max_tokens - len(prompt))])
            return [example] if example.response else []
    raise ValueError(f'{place}: expected {{"text": ...}} or {{"prompt": ..., "response": ...}}, found {record!s:.80}')


def response_ids(tokenizer: Any, response: str, *, chat: bool = True, finished: bool = True) -> tuple[int, ...]:
    """A response as tokens, a `finished` one with its end: of an assistant's turn in the chat template, else of a sequence."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    end = turn_end(tokenizer) if chat else None
    end = tokenizer.eos_token_id if end is None else end
    return (*ids, end) if finished and end is not None else tuple(ids)
