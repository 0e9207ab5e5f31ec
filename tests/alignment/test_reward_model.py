"""A reward model trained here is a reward for everything here."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from counterpoise.alignment.preferences import Preference
from counterpoise.alignment.reward_model import encoded, train_reward_model
from counterpoise.alignment.rsf import rsf
from counterpoise.alignment.settings import RSF, RewardTraining
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.evaluation.rewards import load_reward
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from tiny import save_pair, tiny, tokenizer

CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"


def pairs(count: int, seed: int = 0) -> list[Preference]:
    draw = random.Random(seed)

    def word(letters: str) -> str:
        return "".join(draw.choice(letters) for _ in range(draw.randint(3, 6)))

    return [Preference(Prompt((("user", word("qrstuv")),)), word("abcdefgh"), word("ijklmnop")) for _ in range(count)]


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("chat", [False, True])
def test_it_learns_and_serves_as_a_reward(family: str, chat: bool, tmp_path: Path) -> None:
    pre, _ = save_pair(tmp_path, family)
    words = tokenizer()
    words.chat_template = CHAT if chat else None
    words.save_pretrained(pre)
    record = train_reward_model(
        pre, tmp_path / "rm", pairs(64), RewardTraining(epochs=3, batch_size=8, learning_rate=3e-3)
    )
    assert record["accuracy"]["after"] == 1.0
    assert record["loss"][-1] < record["loss"][0] - 0.1
    assert record["pairs"] == {"given": 64, "trained": 57, "held_out": 7}
    assert json.loads((tmp_path / "rm" / "reward_model.json").read_text()) == record
    reward = load_reward(str(tmp_path / "rm"))
    fresh = pairs(40, seed=1)
    good, bad = (
        reward([p.prompt.text for p in fresh], side)
        for side in zip(*[(p.chosen, p.rejected) for p in fresh], strict=True)
    )
    assert sum(a > b for a, b in zip(good, bad, strict=True)) >= 38
    assert reward(["qrs"], ["abc"]) == pytest.approx(reward(["qrs", "qrstuvqrs"], ["abc", "abcdefghabc"])[:1], abs=1e-5)


def test_the_end_of_a_text_that_is_also_the_padding_is_scored_in_training_as_it_is_later(tmp_path: Path) -> None:
    pre, _ = save_pair(tmp_path)
    words = tokenizer()
    words.chat_template = CHAT + "{{ eos_token }}"
    words.pad_token = words.eos_token
    words.save_pretrained(pre)
    given = pairs(16)
    still = {"learning_rate": 1e-12, "batch_size": 16, "micro_batch_size": 16, "held_out": 0}
    record = train_reward_model(pre, tmp_path / "rm", given, RewardTraining(**still))
    reward = load_reward(str(tmp_path / "rm"))
    prompts = [p.prompt.text for p in given]
    chosen, rejected = (reward(prompts, [getattr(p, side) for p in given]) for side in ("chosen", "rejected"))
    losses = [math.log1p(math.exp(bad - good)) for good, bad in zip(chosen, rejected, strict=True)]
    assert record["loss"] == [pytest.approx(sum(losses) / len(losses), abs=1e-6)]
    assert max(losses) - min(losses) > 1e-3  # the texts are told apart


def test_a_model_is_aligned_on_it(tmp_path: Path) -> None:
    pre, _ = save_pair(tmp_path)
    train_reward_model(
        pre, tmp_path / "rm", pairs(64), RewardTraining(epochs=2, batch_size=8, learning_rate=3e-3, held_out=0)
    )
    model = tiny("llama")
    history = rsf(
        model,
        tokenizer(),
        [p.prompt for p in pairs(8)],
        load_reward(str(tmp_path / "rm")),
        RSF(drawing=Drawing(n=8, max_new_tokens=6), iterations=8, epochs=4, learning_rate=1e-2),
    )
    assert history[-1].reward > history[0].reward + 0.05


@pytest.mark.parametrize(("family", "template"), [("llama", None), ("llama", CHAT), ("bert", None)])
def test_long_responses_are_cut_at_their_end_and_it_is_said_how_much(
    family: str, template: str | None, tmp_path: Path
) -> None:
    pre, _ = save_pair(tmp_path, family)
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(pre)
    asked, long = "q" * 20, "r" * 60
    given = [(asked, "good", "bad"), (asked, "a" * 50, "b" * 50), (asked, "a" * 50, "no"), (long, "good", "bad")]
    told = [Preference(Prompt((("user", p),)), c, r) for p, c, r in given]
    found, lost = encoded(told, words, 40)
    assert [max(map(len, pair.values())) for pair in found][1:] == [40, 40]
    assert all(asked in words.decode(side).replace(" ", "") for pair in found for side in pair.values())
    assert lost["tokens"] == pytest.approx(1 - (2 * 40 + 40 + len(found[2]["rejected_ids"])) / lost_of(told, words))
    one = RewardTraining(batch_size=1, micro_batch_size=1, max_length=40, held_out=0)
    record = train_reward_model(pre, tmp_path / "rm", told, one)
    assert record["cut"] == lost
    assert (lost["pairs"], lost["left_out"], record["pairs"]["trained"]) == (2, 1, 3)


def lost_of(told: list[Preference], words: Any) -> int:
    """Tokens of the two pairs that are cut, whole."""
    whole, _ = encoded(told[1:3], words, 10**6)
    return sum(len(side) for pair in whole for side in pair.values())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    pre, _ = save_pair(tmp_path)
    with pytest.raises(ValueError, match="leave room for a response within 3 tokens, found none of 8; shorten"):
        train_reward_model(pre, tmp_path / "rm", pairs(8), RewardTraining(max_length=3))
    with pytest.raises(ValueError, match="held_out: expected a share"):
        train_reward_model(pre, tmp_path / "rm", pairs(8), RewardTraining(held_out=1.0))
    with pytest.raises(ValueError, match=r"reward model: expected a batch size .* micro-batches of 8, found 12"):
        train_reward_model(pre, tmp_path / "rm", pairs(8), RewardTraining(batch_size=12))
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        train_reward_model(pre, pre, pairs(8))
    with pytest.raises(CheckpointError, match="no such folder"):
        train_reward_model(tmp_path / "none", tmp_path / "rm", pairs(8))
    assert not (tmp_path / "rm").exists()
