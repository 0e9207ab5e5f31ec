"""Preference files in every layout, and what is said of those that are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from counterpoise.alignment.preferences import Preference, read_preferences
from counterpoise.language.prompts import Prompt, read_prompts

ASKED = Prompt((("user", "Hi there"),))
TWO = Prompt((("user", "Hi"), ("assistant", "Yes?"), ("user", "Go\n\non")))
HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\non\n\nAssistant:"
MESSAGES = [{"role": r, "content": c} for r, c in TWO.messages]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "Hi there", "chosen": "good", "rejected": "bad"}, ASKED),
        ({"prompt": HH, "chosen": " good", "rejected": " bad"}, TWO),
        ({"prompt": MESSAGES, "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad"}, TWO),
        ({"chosen": HH + " good", "rejected": HH + " bad"}, TWO),
        (
            {
                "conversations": [{"from": "human", "value": "Hi there"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            ASKED,
        ),
    ],
)
def test_every_layout(record: dict[str, object], prompt: Prompt, tmp_path: Path) -> None:
    lines, listed, packed = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "a.jsonl.gz"
    lines.write_text(json.dumps(record) + "\n\n")
    listed.write_text(json.dumps([record], indent=1))
    with gzip.open(packed, "wt") as file:
        file.write(json.dumps(record))
    expected = [Preference(prompt, "good", "bad")]
    assert read_preferences(lines) == read_preferences(listed) == read_preferences(packed) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a", "chosen": "b"}',
            r"line 1: expected the columns chosen and rejected, found no rejected among",
        ),
        ('{"question": "a", "answer": "b"}', r"found no chosen among \['answer', 'question'\]"),
        ('{"chosen": "b", "rejected": "c"}', r"expected a column prompt, or whole transcripts"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', r"expected text or a message in chosen, found '3'"),
        (
            '{"prompt": [{"role": "robot", "content": "a"}], "chosen": "b", "rejected": "c"}',
            r"expected a prompt of text",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt', r"line 2: expected json"),
        ("[1]", r"item 1: expected .*, found int"),
        ("[1", r"expected json"),
        ("", r"expected at least one pair"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', r"expected at least one pair whose responses differ"),
    ],
)
def test_mistakes_name_the_line_and_what_was_expected(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_preferences(path)
    assert str(path) in str(error.value)


def test_transcripts_that_differ_earlier_are_no_pair(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    other = HH.replace("Yes?", "No?")
    rows = [{"chosen": HH + " good", "rejected": other + " bad"}, {"chosen": HH + " good", "rejected": HH + " bad"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_preferences(path) == [Preference(TWO, "good", "bad")]


def test_prompts_and_preferences_read_the_same_turns(tmp_path: Path) -> None:
    texts = [HH, "What does Human: mean?", "Quote:\n\nHuman: hi\n\nAssistant: ho", "\n\nAssistant: ho", "Human: hi"]
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    pairs.write_text("".join(json.dumps({"prompt": t, "chosen": "a", "rejected": "b"}) + "\n" for t in texts))
    found = read_prompts(prompts)
    assert found == [p.prompt for p in read_preferences(pairs)]
    assert [len(p.messages) for p in found] == [3, 1, 1, 1, 1]


def test_the_real_files(data: Path) -> None:
    human = read_preferences(data / "preferences" / "harmless-base-test.jsonl.gz")
    demo = read_preferences(data / "preferences" / "dpo_en_demo.json")
    assert 2250 < len(human) <= 2312
    assert 290 < len(demo) <= 299
    assert all(p.prompt.messages[-1][0] == "user" for p in human + demo)
    assert human[0].prompt.messages[0] == ("user", "what are some pranks with a pen i can do?")
    assert not any("\n\nHuman:" in text for p in human for _, text in p.prompt.messages)


@pytest.mark.parametrize("prompt", [[], [{"role": "user", "content": 5}], [{"role": "user"}], [3], {"a": 1}, 5, True])
def test_a_prompt_of_another_type_is_named_by_its_line(tmp_path: Path, prompt: object) -> None:
    rows = [{"prompt": p, "chosen": "a", "rejected": "b"} for p in ("hi", prompt)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: expected a prompt of text or messages"):
        read_preferences(tmp_path / "p.jsonl")
