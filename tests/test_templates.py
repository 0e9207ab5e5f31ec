"""Chat templates of other people's making: every one renders, or is refused in one line with the prompt's place."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from counterpoise.alignment.dpo import rows
from counterpoise.alignment.preferences import read_preferences
from counterpoise.evaluation.abilities import load_abilities
from counterpoise.language import templates
from counterpoise.language.prompts import Prompt, encode_prompt, read_prompts
from counterpoise.language.sampling import Drawing, turn_end
from counterpoise.language.templates import fitted
from counterpoise.planning.texts import Words
from tiny import tokenizer

PLAIN = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
DROPS = "{% for m in messages if m.role != 'system' %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
)
TURNS = (("system", "be kind"), ("user", "hi"), ("assistant", "yes"), ("user", "go"))


def speaking(template: Any) -> Any:
    words = tokenizer()
    words.chat_template = template
    return words


def test_a_template_that_takes_a_system_message_gets_it() -> None:
    words = speaking(PLAIN)
    assert words.decode(encode_prompt(words, Prompt(TURNS))) == "s:be kind\nu:hi\na:yes\nu:go\na:"
    assert fitted(words, TURNS) == TURNS


@pytest.mark.parametrize("template", [REFUSES, DROPS, GEMMA])
def test_a_system_text_without_a_place_stands_in_the_first_user_turn(template: str) -> None:
    words = speaking(template)
    words.name_or_path = f"model {hash(template)}"
    with pytest.warns(UserWarning, match=f"{words.name_or_path}: its chat template refuses a system message") as told:
        several = [encode_prompt(words, Prompt(TURNS)) for _ in range(3)]
    assert len([w for w in told if "chat template" in str(w.message)]) == 1
    assert {words.decode(ids) for ids in several} == {"u:be kind\n\nhi\na:yes\nu:go\na:"}


def test_a_refused_conversation_is_named_by_its_file_and_line_everywhere(tmp_path: Path) -> None:
    words = speaking(GEMMA)
    turns = '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]'
    said = r"f\.jsonl, line 2: the chat template refuses this conversation \(user, user.*\): Conversation roles must alternate"
    (tmp_path / "f.jsonl").write_text(f'{{"prompt": "hi"}}\n{{"messages": {turns}}}\n')
    prompts = read_prompts(tmp_path / "f.jsonl")
    for encode in (
        lambda: [encode_prompt(words, p) for p in prompts],
        lambda: Words(words).prompts(prompts, chat=True),
    ):
        with pytest.raises(ValueError, match=said):
            encode()
    assert len(encode_prompt(words, prompts[1], chat=False)) == 3
    (tmp_path / "f.jsonl").write_text(f'{{"prompt": "a", "answer": "b"}}\n{{"messages": {turns}, "answer": "c"}}\n')
    (ability,) = load_abilities([f"generate:{tmp_path / 'f.jsonl'}"])
    with pytest.raises(ValueError, match=said):
        ability.refuse_long(words, Drawing(), 128)  # type: ignore[attr-defined]
    pair = '"chosen": "c", "rejected": "d"'
    (tmp_path / "f.jsonl").write_text(f'{{"prompt": "a", {pair}}}\n{{"prompt": {turns}, {pair}}}\n')
    with pytest.raises(ValueError, match=said):
        rows(read_preferences(tmp_path / "f.jsonl"), words, chat=True)


LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
BAD = [
    LOOP,
    "{% for i in range(10**12) %}{% endfor %}",
    "{% for i in range(1000000) %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 9**9**9 }}",
    "{{ 'x' * 10000000000 }}",
    "{{ 'x'|center(10000000000) }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}",
    "{{ messages[0].nothing.more }}",
    "{{ unknown() }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ [][3].x }}",
    "{% for %}",
    "{% include 'other' %}",
    "{{ messages|nofilter }}",
    "{{ ''.__class__.__mro__ }}",
    "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    {"one": "a", "two": "b"},
]


@pytest.mark.parametrize("template", BAD, ids=[str(b)[:40] for b in BAD])
def test_a_template_that_fails_or_never_ends_is_refused_in_one_line(template: Any) -> None:
    words = speaking(template)
    start = time.thread_time()
    for ask in (lambda: encode_prompt(words, Prompt((("user", "hi"),), "f, line 1")), lambda: turn_end(words)):
        with pytest.raises(ValueError, match="chat template") as told:
            ask()
        assert "\n" not in str(told.value)
    assert time.thread_time() - start < 20


def test_other_threads_are_bounded_too_and_a_tracer_is_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(templates, "STEPS", 20_000)
    words, said = speaking(LOOP), []

    def ask() -> None:
        before = sys.gettrace()
        with pytest.raises(ValueError, match="it goes on after") as told:
            encode_prompt(words, Prompt((("user", "hi"),)))
        said.append((str(told.value), sys.gettrace() is before))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert [kept for _, kept in said] == [True]


def test_what_a_prompt_is_does_not_depend_on_its_place() -> None:
    first, second = Prompt(TURNS, "a, line 1"), Prompt(TURNS, "b, line 2")
    assert first == second
    assert first.key == second.key
