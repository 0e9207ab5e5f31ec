"""The distillation style: it learns what the online style does, ends included."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken

from counterpoise.alignment.distil import collect, distil, read_samples, write_samples
from counterpoise.alignment.mitigations.replay import read_corpus, response_ids
from counterpoise.alignment.rsf import best_of_n, draw_and_score, fine_tune
from counterpoise.alignment.settings import Distil
from counterpoise.alignment.training.stepping import adam
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing, stop_tokens
from tiny import tiny, tokenizer

PROMPTS = [Prompt((("user", a + b),)) for a in "abcdefgh" for b in "ijklmn"]
DRAWN = Drawing(n=2, max_new_tokens=12)
EOS = 2


def letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [sum(c in "abcdefgh" for c in r) + 0.01 * len(r) for r in responses]


def chatting() -> Any:
    """A tokenizer whose template ends a turn with a token of its own."""
    words = tokenizer()
    words.add_tokens([AddedToken("<end>", special=True)], special_tokens=True)
    words.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>\\n{% endfor %}a:"
    return words


def saying(signs: str, words: Any, end: int) -> Any:
    """A model that says these signs and `end` alone: its responses go into text and back."""
    model, shift = tiny("llama"), torch.full((64,), -1e4)
    shift[[*words(signs)["input_ids"], end]] = 0.0
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + shift)
    return model


@pytest.mark.parametrize("words", [tokenizer(), chatting()], ids=["plain", "chat"])
def test_both_styles_learn_the_same_of_the_same_texts(words: Any, tmp_path: Path) -> None:
    end = stop_tokens(tiny("llama"), words)[-1]  # the template's, where there is one
    model, online, offline = saying("abcdxyz", words, end), tiny("llama"), tiny("llama")
    kept = best_of_n(*draw_and_score(model, words, PROMPTS, letters, DRAWN))
    write_samples(tmp_path / "s.jsonl", collect(model, words, PROMPTS, letters, DRAWN))
    samples = read_samples(tmp_path / "s.jsonl")
    assert [e.response[-1] == end for e in kept] == [s.finished for s in samples]
    assert {s.finished for s in samples} == {True, False}
    sizes = {"epochs": 2, "batch_size": 8, "micro_batch_size": 4}
    fine_tune(online, kept, adam(online, 1e-2), Distil(**sizes), random.Random(0))
    distil(offline, words, samples, Distil(learning_rate=1e-2, **sizes))
    for a, b in zip(online.parameters(), offline.parameters(), strict=True):
        assert torch.equal(a, b)


def test_whether_a_response_finished_is_kept_and_older_files_are_taken_for_finished(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    found = collect(tiny("llama"), tokenizer(), PROMPTS, letters, DRAWN)
    write_samples(file, found)
    assert read_samples(file) == found
    assert all(isinstance(json.loads(line)["finished"], bool) for line in file.read_text().splitlines())
    file.write_text('{"prompt": "a", "response": "b"}\n')
    assert read_samples(file)[0].finished
    file.write_text('{"prompt": "a", "response": "b", "finished": "no"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected two numbers and a boolean in .*'finished'.*'no'"):
        read_samples(file)


def test_a_response_is_ended_as_the_chat_template_does_it(tmp_path: Path) -> None:
    words = chatting()
    end, said = words.convert_tokens_to_ids("<end>"), tuple(words("hi")["input_ids"])
    assert response_ids(words, "hi") == (*said, end)
    assert response_ids(words, "hi", chat=False) == response_ids(tokenizer(), "hi") == (*said, EOS)
    assert response_ids(words, "hi", finished=False) == said
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "response": "hi"}\n')
    found = [read_corpus(tmp_path / "c.jsonl", words, chat=chat)[0].response for chat in (True, False)]
    assert found == [(*said, end), (*said, EOS)]


def test_responses_without_a_token_are_not_learned() -> None:
    empty = collect(tiny("llama"), tokenizer(), PROMPTS[:2], letters, Drawing(n=2, max_new_tokens=2))
    empty = [s._replace(response="", finished=False) for s in empty]
    with pytest.raises(ValueError, match="samples: expected responses with a token to learn, found none in 2"):
        distil(tiny("llama"), tokenizer(), empty)
    one = [*empty, empty[0]._replace(response="ab")]
    assert len(distil(tiny("llama"), tokenizer(), one, Distil(epochs=1))) == 1


def test_equal_responses_are_refused() -> None:
    model, words = tiny("llama"), tokenizer()
    with pytest.raises(
        ValueError, match=r"temperature: expected a positive number, found 0, at which all 2 responses are"
    ):
        collect(model, words, PROMPTS, letters, replace(DRAWN, temperature=0))
    assert len(collect(model, words, PROMPTS[:2], letters, Drawing(temperature=0, n=1, max_new_tokens=2))) == 2
