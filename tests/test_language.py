"""Prompts, sampling and scoring, each against one sequence at a time without padding or cache."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, strategies as st
from transformers import AddedToken, StaticCache

from counterpoise.language import generating
from counterpoise.language.prompts import Prompt, encode_prompt, encode_prompts, read_prompts
from counterpoise.language.sampling import Drawing, InverseCdf, decode, sample, stop_tokens, turn_end
from counterpoise.language.scoring import (
    Example,
    by_length,
    continuation_logprobs,
    response_nll,
    response_tokens,
    score_responses,
)
from tiny import CAUSAL, tiny, tokenizer

EOS = 2
CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\non\n\nAssistant:"
RAGGED = [(1, 5, 9), (1, 7), (1, 8, 8, 8, 20, 31), (1,), (1, 40, 12, 5)]


def logprobs(model: torch.nn.Module, sequence: tuple[int, ...]) -> torch.Tensor:
    """Log-probability of every token but the first, one sequence, no padding, no cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].double()
    return torch.log_softmax(logits, -1)[torch.arange(len(sequence) - 1), torch.tensor(sequence[1:])]


# Prompts


def test_prompts_are_read_once_each_and_in_order(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "hi"}',
        "",
        '{"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "go"}]}',
        '{"prompt": "ça va?", "id": 3}',
        '{"messages": [{"role": "user", "content": "hi"}]}',
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, second, third = read_prompts(tmp_path / "p.jsonl")
    assert first == Prompt((("user", "hi"),))
    assert second.messages == (("system", "be kind"), ("user", "go"))
    assert second.text == "be kind\ngo"
    assert third.text == "ça va?"
    (tmp_path / "q.jsonl").write_text("\n".join(reversed(lines)), encoding="utf-8")
    assert {p.key for p in read_prompts(tmp_path / "q.jsonl")} == {first.key, second.key, third.key}


def test_a_transcript_is_read_as_its_turns_and_nothing_else_is(tmp_path: Path) -> None:
    plain = ["Say Human: twice", "Quote:\n\nHuman: hi\n\nAssistant: ho", "\n\nAssistant:", "Human: hi", "\n\nHuman\n"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (HH, *plain)))
    first, *others = read_prompts(tmp_path / "p.jsonl")
    assert first.messages == (("user", "Hi"), ("assistant", "Yes?"), ("user", "Go\n\non"))
    assert [p.messages for p in others] == [(("user", text),) for text in plain]


@pytest.mark.parametrize(("line", "found"), [
    ("{prompt: hi}", r"line 2: expected json, found '\{prompt: hi\}"),
    ('{"text": "hi"}', r'line 2: expected \{"prompt": text or messages\}, .*, found the columns text; rename'),
    ('{"prompt": 3}', "line 2: expected"),
    ('"hi"', "line 2: expected"),
    ('{"messages": []}', "line 2: expected"),
    ('{"messages": [{"role": "user"}]}', "line 2: expected"),
    ('{"messages": [{"role": "user", "content": null}]}', "line 2: expected"),
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str, found: str) -> None:
    (tmp_path / "bad.jsonl").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"bad\.jsonl, {found}"):
        read_prompts(tmp_path / "bad.jsonl")


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: expected at least one line"):
        read_prompts(tmp_path / "empty.jsonl")


def test_a_prompt_goes_through_the_chat_template_only_when_there_is_one() -> None:
    words, prompt = tokenizer(), Prompt((("system", "ab"), ("user", "c")))
    plain = tuple(words.convert_tokens_to_ids(list("ab\nc")))
    assert encode_prompt(words, prompt) == plain
    words.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    assert encode_prompt(words, prompt) == tuple(words.convert_tokens_to_ids(["<s>", *"s:ab\nu:c\na:"]))
    assert encode_prompt(words, prompt, chat=False) == plain


def test_decode_drops_special_tokens() -> None:
    words = tokenizer()
    assert decode(words, [words.convert_tokens_to_ids([*" ok go.", "</s>"]), (EOS,)]) == ["ok go.", ""]


# Sampling


def test_sampling_is_decided_by_the_seed_alone() -> None:
    model, words = tiny("llama"), tokenizer()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = sample(model, words, RAGGED, Drawing(n=3, max_new_tokens=5, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's own random numbers are left alone
    torch.manual_seed(6)
    assert sample(model, words, RAGGED, Drawing(n=3, max_new_tokens=5, seed=1)) == first
    assert sample(model, words, RAGGED, Drawing(n=3, max_new_tokens=5, seed=2)) != first
    assert [len(group) for group in first] == [3] * 5
    assert len({r for group in first for r in group}) > 10  # n responses, not n copies of one


def test_a_response_is_the_same_in_any_company() -> None:
    model, words = tiny("llama", dtype=torch.float64), tokenizer()
    how = {"max_new_tokens": 8, "seed": 3}
    whole = sample(model, words, RAGGED, Drawing(n=3, **how))
    for size in (1, 2, 7, 15):
        assert sample(model, words, RAGGED, Drawing(n=3, batch_size=size, **how)) == whole
    assert sample(model, words, RAGGED[::-1], Drawing(n=3, batch_size=4, **how)) == whole[::-1]
    torch.manual_seed(5)
    torch.rand(3)
    assert [sample(model, words, [p], Drawing(n=1, **how))[0] for p in RAGGED] == [group[:1] for group in whole]
    assert [group[:3] for group in sample(model, words, RAGGED, Drawing(n=5, **how))] == whole


def test_the_same_prompt_again_draws_other_responses() -> None:
    model, words = tiny("llama"), tokenizer()
    [first], [again] = sample(model, words, [(1, 5)] * 2, Drawing(max_new_tokens=12))
    assert first != again
    assert sample(model, words, [(1, 7), (1, 5)], Drawing(max_new_tokens=12))[1] == [first]


def test_two_threads_draw_what_each_draws_alone() -> None:
    models, words = [tiny(f, dtype=torch.float64) for f in ("llama", "gpt2")], tokenizer()

    def draw(model: torch.nn.Module) -> list[list[tuple[int, ...]]]:
        return sample(model, words, RAGGED, Drawing(n=4, max_new_tokens=12, batch_size=5))

    alone = [draw(m) for m in models]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(draw, models * 3)) == alone * 3


def drawn_from(logits_V: torch.Tensor, uniforms: torch.Tensor | None = None, count: int = 20_000) -> torch.Tensor:
    """Tokens that `InverseCdf` draws of the same logits, one a row."""
    draw = InverseCdf([((1,), 0)], Drawing(n=count, max_new_tokens=1), 1)
    draw.uniforms_BT = draw.uniforms_BT if uniforms is None else uniforms[:, None]
    rows = len(draw.uniforms_BT)
    return draw(torch.ones(rows, 1, dtype=torch.long), logits_V.repeat(rows, 1)).argmax(-1)


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=50).astype(np.float32))
    seen = torch.bincount(drawn_from(logits), minlength=50).numpy()
    wanted = 20_000 * logits.double().softmax(-1).numpy()
    assert scipy.stats.chisquare(seen, wanted).pvalue > 1e-3


@pytest.mark.parametrize("possible", [[2, 5], [0], [9], [0, 9]])
def test_what_has_no_probability_is_never_drawn(possible: list[int]) -> None:
    logits = torch.full((10,), -torch.inf)
    logits[possible] = torch.tensor([0.3, 1.7])[: len(possible)]
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert drawn_from(logits, ends).tolist() == [possible[0], possible[-1]]
    assert set(drawn_from(logits, count=500).tolist()) == set(possible)
    with pytest.raises(ValueError, match="logits that are numbers"):
        drawn_from(torch.full((10,), torch.nan), ends)


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_is_what_generate_gives_one_prompt_at_a_time(family: str) -> None:
    model, words = tiny(family), tokenizer()
    found = sample(model, words, RAGGED, Drawing(n=2, max_new_tokens=6, temperature=0, batch_size=6))
    for prompt, group in zip(RAGGED, found, strict=True):
        alone = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=6,
            eos_token_id=list(stop_tokens(model, words)), pad_token_id=0,
        )  # fmt: skip
        assert group == [tuple(alone[0, len(prompt) :].tolist())] * 2
    assert sample(model, words, RAGGED, Drawing(max_new_tokens=6, temperature=0)) == [[group[0]] for group in found]


def test_the_shared_prefix_draws_what_each_prompt_alone_would() -> None:
    """One token from the cached path: frequencies against the model's own probabilities, by chi-squared."""
    model, words = tiny("llama"), tokenizer()
    model.lm_head.weight.data *= 20  # uneven probabilities, so that another prompt's would show
    prompts, n = RAGGED[:3], 2000
    drawn = sample(model, words, prompts, Drawing(n=n, max_new_tokens=1, batch_size=3 * n))
    assert sample(model, words, prompts, Drawing(n=n, max_new_tokens=1, batch_size=3 * n, temperature=0.5)) != drawn
    for prompt, group in zip(prompts, drawn, strict=True):
        wanted = n * model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).detach()
        seen = torch.bincount(torch.tensor(group).flatten(), minlength=64)
        assert ((seen - wanted) ** 2 / wanted).sum() < 120  # 63 degrees of freedom: exceeded once in 20,000


def test_temperature_sharpens_and_top_k_of_the_model_is_not_used() -> None:
    model, words = tiny("llama"), tokenizer()
    model.generation_config.top_k = 1
    kinds = [
        {g[0] for g in sample(model, words, [(1, 5)], Drawing(n=400, max_new_tokens=1, temperature=t))[0]}
        for t in (1.0, 1e-4)
    ]
    assert len(kinds[0]) > 40
    assert len(kinds[1]) == 1


def test_a_response_ends_with_the_first_eos() -> None:
    model, words = tiny("llama"), tokenizer()
    responses = [r for group in sample(model, words, RAGGED, Drawing(n=40, max_new_tokens=20)) for r in group]
    ended = [r for r in responses if EOS in r]
    assert ended
    assert all(r.index(EOS) == len(r) - 1 for r in ended)
    assert all(len(r) == 20 for r in responses if EOS not in r)
    assert stop_tokens(model, words) == (EOS,)
    words.eos_token = None
    model.generation_config.eos_token_id = 7
    assert stop_tokens(model, words) == (7,)
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, words) == ()
    assert {len(r) for group in sample(model, words, RAGGED, Drawing(n=40, max_new_tokens=20)) for r in group} == {20}


def chatting() -> Any:
    """A tokenizer whose template ends a turn with a token of its own."""
    words = tokenizer()
    words.add_tokens([AddedToken("<end>", special=True)], special_tokens=True)
    words.chat_template = CHAT
    return words


def test_a_response_ends_with_the_first_of_all_tokens_that_end_one() -> None:
    model, words = tiny("llama"), chatting()
    end = words.convert_tokens_to_ids("<end>")
    model.generation_config.eos_token_id = [EOS, 7, 8]
    stops = stop_tokens(model, words)
    assert stops == (EOS, 7, 8, end)
    responses = [r for group in sample(model, words, RAGGED, Drawing(n=40, max_new_tokens=20)) for r in group]
    assert {r[-1] for r in responses if len(r) < 20} == set(stops)
    assert not any(token in stops for r in responses for token in r[:-1])
    model.generation_config.eos_token_id = EOS
    words.chat_template = None
    same = [r for group in sample(model, words, RAGGED, Drawing(n=40, max_new_tokens=20)) for r in group]
    assert any(7 in r[:-1] for r in same)


def test_the_end_of_a_turn_is_read_off_the_chat_template() -> None:
    words = chatting()
    assert turn_end(words) == words.convert_tokens_to_ids("<end>")
    for template, end in {
        CHAT.replace("<end>", "</s>"): EOS, CHAT.replace("<end>", " !"): None, "<s>{{ messages[0].content }}": None,
    }.items():  # fmt: skip
        words.chat_template = template
        assert turn_end(words) == end
    assert turn_end(tokenizer()) is None


POISON = {
    "repetition_penalty": 5.0, "min_p": 0.9, "typical_p": 0.2, "epsilon_cutoff": 0.1, "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(4, 30)), "begin_suppress_tokens": [40], "bad_words_ids": [[41]], "min_new_tokens": 12,
    "sequence_bias": [[[42], 9.0]], "num_beams": 2, "return_dict_in_generate": True,
}  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_the_generation_config_of_the_model_does_not_shape_the_draws_and_is_given_back(temperature: float) -> None:
    clean, poisoned, words = tiny("llama"), tiny("llama"), tokenizer()
    for name, value in POISON.items():
        setattr(poisoned.generation_config, name, value)
    before = poisoned.generation_config.to_dict()
    draws = [
        sample(m, words, RAGGED, Drawing(n=2, max_new_tokens=12, temperature=temperature)) for m in (clean, poisoned)
    ]
    assert draws[0] == draws[1]
    assert poisoned.generation_config.to_dict() == before
    with pytest.raises(ValueError, match="stop here"):
        sample(poisoned, words, RAGGED, Drawing(max_new_tokens=1), progress=stops_here)
    assert poisoned.generation_config.to_dict() == before


def stops_here(done: int, total: int) -> None:
    raise ValueError("stop here")


def test_sampling_gives_the_model_back_as_it_was() -> None:
    model = tiny("llama").train()
    done: list[tuple[int, int]] = []
    sample(model, tokenizer(), RAGGED, Drawing(max_new_tokens=1, batch_size=2), progress=lambda *at: done.append(at))
    assert model.training
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_what_does_not_fit_the_context_is_refused() -> None:
    model, words = tiny("llama"), tokenizer()
    assert len(sample(model, words, [(1,) * 120], Drawing(max_new_tokens=8))[0][0]) >= 1
    with pytest.raises(ValueError, match=r"at most 128 tokens .* found one of 121 with 8 more to generate"):
        sample(model, words, [(1,), (1,) * 121], Drawing(max_new_tokens=8))
    with pytest.raises(ValueError, match=r"at most 128 tokens .* found one of 129; drop or shorten"):
        continuation_logprobs(model, [(1,) * 127], [[(5, 6)]])


# Scoring

CHOICES = [
    [(5,), (6,)], [(9, 4, 12), (8,), (30, 31)], [(11, 12)], [(7, 7, 7, 7), (7, 7)], [(3,), (4, 5), (6, 7, 8)],
]  # fmt: skip


@pytest.mark.parametrize("family", CAUSAL)
def test_continuations_score_as_each_pair_alone(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    wanted = [
        [float(logprobs(model, (*context, *choice))[len(context) - 1 :].sum()) for choice in group]
        for context, group in zip(RAGGED, CHOICES, strict=True)
    ]
    for batch_size in (1, 2, 5):
        found = continuation_logprobs(model, RAGGED, CHOICES, batch_size=batch_size)
        for a, b in zip(found, wanted, strict=True):
            assert a == pytest.approx(b, abs=2e-5)  # the log-softmax is taken in float32


def test_choices_that_share_a_context_do_not_see_each_other() -> None:
    model = tiny("qwen2")
    together = continuation_logprobs(model, RAGGED, CHOICES)
    apart = [
        [continuation_logprobs(model, [context], [[choice]])[0][0] for choice in group]
        for context, group in zip(RAGGED, CHOICES, strict=True)
    ]
    for a, b in zip(together, apart, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_an_empty_context_or_continuation_is_refused() -> None:
    for contexts, continuations in (([()], [[(5,)]]), ([(1,)], [[(5,), ()]])):
        with pytest.raises(ValueError, match="at least one token in every context and continuation"):
            continuation_logprobs(tiny("llama"), contexts, continuations)


EXAMPLES = [Example(p, c[0]) for p, c in zip(RAGGED, CHOICES, strict=True)]


@pytest.mark.parametrize("family", CAUSAL)
def test_response_nll_is_the_sum_over_response_tokens(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    wanted = [-float(logprobs(model, e.prompt + e.response)[len(e.prompt) - 1 :].sum()) for e in EXAMPLES]
    assert response_nll(model, EXAMPLES).item() == pytest.approx(sum(wanted), rel=1e-10)  # padded to the longest
    alone = [response_nll(model, [e]).item() for e in EXAMPLES]
    assert alone == pytest.approx(wanted, rel=1e-10)
    assert response_tokens(EXAMPLES) == 1 + 3 + 2 + 4 + 1


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gpt_neox"])
def test_float64_with_eager_attention_gives_in_padded_batches_what_each_row_alone_gives(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    model.set_attn_implementation("eager")  # type: ignore[operator]  # a row of masked scores there was once NaN
    found = score_responses(model, EXAMPLES).logprobs()
    alone = [logprobs(model, e.prompt + e.response)[-len(e.response) :] for e in EXAMPLES]
    for row, wanted in zip(found, alone, strict=True):
        torch.testing.assert_close(row[-len(wanted) :], wanted, rtol=1e-10, atol=1e-10)
    together = continuation_logprobs(model, RAGGED, CHOICES)
    for context, group, values in zip(RAGGED, CHOICES, together, strict=True):
        apart = [float(logprobs(model, (*context, *c))[len(context) - 1 :].sum()) for c in group]
        assert values == pytest.approx(apart, abs=2e-5)
    response_nll(model, EXAMPLES).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_gradient_of_response_nll_does_not_depend_on_padding() -> None:
    together, apart = tiny("llama", dtype=torch.float64), tiny("llama", dtype=torch.float64)
    response_nll(together, EXAMPLES).backward()
    for example in EXAMPLES:
        response_nll(apart, [example]).backward()
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@given(st.lists(st.integers(0, 9)), st.integers(1, 5), st.randoms())
def test_by_length_covers_everything_once_longest_first(lengths: list[int], size: int, order: random.Random) -> None:
    order.shuffle(lengths)
    batches = list(by_length([(0,) * n for n in lengths], size, key=len))
    rows = [i for batch in batches for i in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[i] for i in rows] == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert all(0 < len(batch) <= size for batch in batches)


def test_a_prompt_without_a_token_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n{"prompt": ""}\n')
    with pytest.raises(
        ValueError, match=r"p\.jsonl, line 2: expected a prompt of at least one token, found none \(1 of 2\)"
    ):
        encode_prompts(tokenizer(), read_prompts(tmp_path / "p.jsonl"), chat=False, new=3, limit=None)


def test_a_model_that_answers_nan_is_called_damaged_and_not_a_model_that_looks_ahead() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="expected finite log-probabilities, found NaN or Inf"):
        continuation_logprobs(model, [(1, 5, 6)], [[(7, 8)]])
    with pytest.raises(ValueError, match="expected finite log-probabilities, found NaN or Inf"):
        sample(model, tokenizer(), [(1, 5, 6)], Drawing(max_new_tokens=2))


COMPILED = pytest.param(True, marks=pytest.mark.skipif(which("g++") is None, reason="torch.compile: no C++ compiler"))


@pytest.mark.parametrize("compiles", [False, COMPILED])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_cache_of_fixed_length_gives_the_same_tokens_compiled_or_not(
    family: str, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, words = tiny(family), tokenizer()
    for stack in [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]:
        del stack[1:]  # a layer is enough to compile
    model.config.num_hidden_layers = 1  # type: ignore[union-attr]
    graphs = []
    if compiles:  # transformers compiles on a GPU alone
        plain, kind = torch.compile, type(model)
        fixed = lambda self, kwargs, config: isinstance(kwargs["past_key_values"], StaticCache)  # noqa: E731
        monkeypatch.setattr(kind, "_valid_auto_compile_criteria", fixed)
        monkeypatch.setattr(torch, "compile", lambda *a, **more: graphs.append(more) or plain(*a, **more))
    prompts = [(1, 5 + i % 9, *range(9, 9 + i % 5)) for i in range(11)]
    model.generation_config.eos_token_id = [9, 11]  # type: ignore[union-attr]
    for temperature in (1.0,) if compiles else (1.0, 0.0):
        how = Drawing(n=2, max_new_tokens=24, temperature=temperature, batch_size=16)
        wanted = sample(model, words, prompts, how)
        assert sample(model, words, prompts, replace(how, compiled=True)) == wanted
        assert temperature == 0 or len({len(r) for group in wanted for r in group}) > 1  # some end before others
    assert generating.way_of(model, compiled=True) == generating.COMPILED
    assert bool(graphs) == compiles
