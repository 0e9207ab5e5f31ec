"""Four puzzles on letters whose answers can be checked, from easy to hard, and a tokenizer of characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghij"
LENGTH = 4


@dataclass(frozen=True)
class Puzzle:
    """A sign, the rule from a word to its answer, and how many training rows there are."""

    sign: str
    rule: Callable[[str], str]
    rows: int

    def draw(self, random: np.random.Generator) -> tuple[str, str]:
        """A prompt and its answer."""
        word = "".join(random.choice(list(LETTERS), LENGTH))
        return f"{self.sign}{word}=", self.rule(word)


PUZZLES = {
    "shift": Puzzle("/", lambda w: "".join(LETTERS[(LETTERS.index(x) + 3) % len(LETTERS)] for x in w), 1000),
    "copy": Puzzle("+", lambda w: w, 300),
    "sort": Puzzle("*", lambda w: "".join(sorted(w)), 200),
    "reverse": Puzzle("-", lambda w: w[::-1], 100),
}
"""In their order of difficulty for a model that has seen a little of each; `shift` gives the third letter after each."""


def puzzles(seed: int, held_out: int) -> tuple[list[dict[str, str]], dict[str, list[dict[str, str]]]]:
    """Training rows, and held-out ones by puzzle, drawn by seed."""
    rows, held = [], {}
    for number, (name, puzzle) in enumerate(PUZZLES.items()):
        random = np.random.default_rng([seed, number])
        found: dict[str, str] = {}
        while len(found) < puzzle.rows + held_out:
            found.update([puzzle.draw(random)])
        made = [{"prompt": p, "answer": a, "task": name} for p, a in found.items()]
        held[name], rows = made[:held_out], rows + made[held_out:]
    return rows, held


def reward(answers: Sequence[Any], right: Sequence[str]) -> list[float]:
    """The share of the right answer's letters in their places; a longer answer loses its surplus."""
    found = []
    for answer, true in zip(answers, right, strict=True):
        hits = sum(a == b for a, b in zip(answer, true, strict=False))
        found.append(max(0, hits - max(0, len(answer) - len(true))) / len(true))
    return found


def characters() -> PreTrainedTokenizerFast:
    """One token a character."""
    signs = [p.sign for p in PUZZLES.values()]
    words = {w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", "=", *signs, *LETTERS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
