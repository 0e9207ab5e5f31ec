"""RSF on a tiny model: the reward rises, and nothing depends on how a batch is cut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from counterpoise.alignment.rsf import fine_tune, rsf
from counterpoise.alignment.settings import RSF
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example
from tiny import tiny, tokenizer

PROMPTS = [Prompt((("user", text),)) for text in ("abc", "hello", "what?", "one two", "z", "go on")]


def count_early_letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(sum(c in "abcdefgh" for c in r)) for r in responses]


def test_the_reward_rises() -> None:
    model = tiny("llama")
    history = rsf(
        model,
        tokenizer(),
        PROMPTS,
        count_early_letters,
        RSF(drawing=Drawing(n=8, max_new_tokens=8), iterations=8, epochs=3, learning_rate=1e-2),
    )
    assert history[-1].reward > history[0].reward + 1
    assert all(it.best_reward >= it.reward for it in history)


def test_the_same_seed_gives_the_same_model() -> None:
    models = [tiny("llama"), tiny("llama")]
    for model in models:
        rsf(
            model,
            tokenizer(),
            PROMPTS,
            count_early_letters,
            RSF(drawing=Drawing(n=4, max_new_tokens=6, seed=3), iterations=1, learning_rate=1e-2),
        )
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_micro_batches_do_not_change_the_step() -> None:
    examples = [Example((1, 5 + i), tuple(range(6, 8 + i))) for i in range(8)]
    models = [tiny("gpt2", dtype=torch.float64), tiny("gpt2", dtype=torch.float64)]
    for model, micro in zip(models, (1, 8), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fine_tune(model, examples, optimizer, RSF(epochs=2, batch_size=8, micro_batch_size=micro), random.Random(0))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_reward_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="expected finite numbers, found nan for the response"):
        rsf(
            tiny("llama"),
            tokenizer(),
            PROMPTS,
            lambda p, r: [float("nan")] * len(r),
            RSF(drawing=Drawing(n=2, max_new_tokens=2), iterations=1),
        )
