"""A reward behind an endpoint: a real server that grades, is asked once, and answers without a grade."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from server import Chat, Reply, failed, said, serving

from counterpoise.evaluation.rewards import fingerprint, load_reward
from counterpoise.language.endpoint import EndpointError
from counterpoise.planning.looking import look_at_reward, said_of


def by_length(question: dict[str, Any]) -> Reply:
    """Grades a response by its letters."""
    return said(f"Long or short?\nGrade: {len(json.loads(question['messages'][1]['content'])['response'])}")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MY_KEY", "secret-key-0123456789")


def test_an_endpoint_grades_by_the_rubric_and_is_never_asked_twice(tmp_path: Path) -> None:
    (tmp_path / "rubric.txt").write_text("Shorter is worse.\n")
    with serving(chat := Chat(by_length)) as url:
        spec = f"{url}?model=m&rubric={tmp_path / 'rubric.txt'}&key=MY_KEY&concurrency=2&max_tokens=9"
        assert look_at_reward(spec) is None
        assert "one call a response, none was made" in said_of(spec, None)
        assert chat.asked == []
        reward = load_reward(spec)
        assert reward(["q", "q", "r"], ["four", "4", "four"]) == [4.0, 1.0, 4.0]
        assert reward(["q"], ["four"]) == load_reward(spec)(["q"], ["four"]) == [4.0]
        assert len(chat.asked) == 3
        assert chat.most_at_once <= 2
        _, path, headers, body = chat.asked[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret-key-0123456789")
    assert (body["model"], body["max_tokens"]) == ("m", 9)
    assert "Shorter is worse." in body["messages"][0]["content"]
    kept = list((tmp_path / "cache" / "counterpoise" / "answers").iterdir())
    assert len(kept) == 3
    assert not [file for file in kept if "secret" in file.read_text()]
    before = fingerprint(spec)
    assert fingerprint(spec.replace("concurrency=2", "concurrency=3")) == before
    (tmp_path / "rubric.txt").write_text("Longer is worse.\n")
    assert fingerprint(spec) != before != fingerprint(spec.replace("model=m", "model=n"))


def test_an_answer_without_a_grade_is_asked_for_it_once_more(tmp_path: Path) -> None:
    with serving(chat := Chat(by_length)) as url:
        reward = load_reward(f"{url}?model=m&answers={tmp_path / 'kept'}")
        chat.script = [said("It is fine."), said("**Grade: 7**")]
        assert reward(["q"], ["r"]) == [7.0]
        assert [m["role"] for m in chat.asked[1][3]["messages"]] == ["system", "user", "assistant", "user"]
        chat.script = [said("It is fine."), said("Grade: 70")]
        with pytest.raises(ValueError, match=r"expected an answer that ends with 'Grade: N', .*found 'Grade: 70'"):
            reward(["q"], ["other"])
        chat.script = [failed(404, "no such model")]
        with pytest.raises(EndpointError, match="HTTP 404 no such model"):
            reward(["q"], ["third"])


@pytest.mark.parametrize(("options", "said"), [
    ("", "expected the endpoint's model, found none; add .model=NAME"),
    ("?model=m&rubrik=r", "unknown option 'rubrik'; expected model, rubric,"),
    ("?model=m&timeout=soon", "expected numbers for concurrency, max_tokens, temperature, timeout"),
    ("?model=m&concurrency=0", "a concurrency of at least 1"),
    ("?model=m&key=sk-123", "expected the name of an environment variable, not the key itself"),
])  # fmt: skip
def test_run_and_dry_run_refuse_the_same_endpoint(options: str, said: str) -> None:
    for look in (load_reward, look_at_reward):
        with pytest.raises(ValueError, match=said):
            look(f"http://127.0.0.1:9/v1{options}")
