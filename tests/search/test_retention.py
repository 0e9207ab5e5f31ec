"""What is retained: PRE's own words, and right answers of validation items."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from counterpoise.evaluation.generation import Generation
from counterpoise.evaluation.items import Item
from counterpoise.evaluation.likelihood import Choices
from counterpoise.evaluation.parts import part_of
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.search.retention import calibration, draw_retention
from search.pairs import resident
from tiny import tokenizer

PROMPTS = [Prompt((("user", "ab"),)), Prompt((("user", "cd"),))]


def test_retention_is_what_pre_says_unselected_and_shared_out(tmp_path: Path) -> None:
    model, cut = resident(tmp_path)
    model.set(cut, np.zeros(6))
    words = tokenizer()
    found = draw_retention(
        model.model, words, Drawing(max_new_tokens=4, seed=3), size=9, openings=("ab", "cde", ""), prompts=PROMPTS
    )
    assert [(name, len(rows)) for name, rows in found.items()] == [("text", 5), ("prompts", 4)]
    starts = [tuple(words(t)["input_ids"]) for t in ("ab", "cde")]
    assert [e.prompt for e in found["text"]] == [*starts, (words.bos_token_id,), *starts]
    assert found == draw_retention(
        model.model, words, Drawing(max_new_tokens=4, seed=3), size=9, openings=("ab", "cde", ""), prompts=PROMPTS
    )
    assert list(draw_retention(model.model, words, Drawing(max_new_tokens=2), size=3)) == ["text"]
    with pytest.raises(ValueError, match="retention: expected openings or prompts"):
        draw_retention(model.model, words, Drawing(max_new_tokens=64), size=3, openings=())


def test_calibration_reads_the_validation_part_alone() -> None:
    items = tuple(Item({"query": f"q{i}", "choices": ["no", "yes"], "gold": 1}) for i in range(40))
    ability = Choices("guess", items)
    words = tokenizer()
    found = calibration(ability, words, limit=5)
    allowed = {tuple(words(i.fields["query"])["input_ids"]) for i in items if part_of(i.key) == "validation"}
    assert len(found) == 5
    assert calibration(replace(ability, limit=2), words, limit=5) == found  # `?limit` is of what is measured
    assert {e.prompt for e in found} <= allowed
    assert {words.decode(list(e.response)) for e in found} == {" yes"}
    written = Generation("talk", tuple(Item({"messages": [], "reference": f"{i}"}) for i in range(40)))
    with pytest.raises(ValueError, match="calibration takes plain prompts"):
        calibration(written, words)
