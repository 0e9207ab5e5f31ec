"""Rows that share a group, a passage or a prompt: one part, and resampled as one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterpoise.evaluation.abilities import load_abilities
from counterpoise.evaluation.items import FileAbility
from counterpoise.evaluation.measurement import Measurement, Scores, difference, interval_of
from counterpoise.evaluation.parts import PARTS, clusters, in_part, part_of
from counterpoise.evaluation.results import Measured, measurement, results
from counterpoise.language.groups import groups_of
from counterpoise.language.prompts import read_prompts
from counterpoise.records import digest

PASSAGES = [f"Passage {n}: {'the river rises in the hills and ends in the sea. ' * 3}" for n in range(60)]


def choices(path: Path, rows: list[dict[str, Any]]) -> FileAbility:
    path.write_text("\n".join(json.dumps({"choices": ["no", "yes"], "gold": 1, **row}) for row in rows))
    (ability,) = load_abilities([f"choices:{path}"])
    assert isinstance(ability, FileAbility)
    return ability


@pytest.mark.parametrize("form", ["within the query", "passage", "group", "reworded"])
def test_what_shares_a_passage_or_a_group_is_in_one_part(tmp_path: Path, form: str) -> None:
    rows = []
    for n, passage in enumerate(PASSAGES):
        for q in range(3):
            asked = f"Question: is it {n} of {q}?"
            words = passage.upper().replace(" ", "  ") if form == "reworded" and q else passage
            joined = {"query": f"{words}\n{asked}"} if form in ("within the query", "reworded") else {"query": asked}
            field = {"passage": {"passage": passage}, "group": {"group": n}}.get(form, {})
            rows.append({**joined, **field})
    lone = [{"query": f"Does {n} stand alone?"} for n in range(60)]
    ability = choices(tmp_path / "a.jsonl", random.Random(0).sample([*rows, *lone], 240))
    parts = {item.fields["query"]: part for part in PARTS for item in in_part(ability.items, part)}
    assert len(parts) == 240
    for n in range(60):
        assert len({part for query, part in parts.items() if f"is it {n} of" in query}) == 1
    assert len(set(parts.values())) == 3
    for item in ability.items:  # what is alone stays where its own content puts it
        assert bool(item.group) == ("is it" in item.fields["query"])
        assert item.group or parts[item.fields["query"]] == part_of(item.key)
    some = ability.items_of("proxy")
    assert set(clusters(some)) == {item.group or item.key for item in some}


def test_without_groups_nothing_moves_and_stored_work_keeps_its_key(tmp_path: Path) -> None:
    ability = choices(tmp_path / "a.jsonl", [{"query": f"Is {n} even?", "group": n} for n in range(50)])
    keys = sorted(item.key for item in ability.items)
    assert ability.fingerprint == digest(["choices", ability.metric_id, None, keys])
    assert clusters(ability.items) == ()
    other = choices(tmp_path / "b.jsonl", [{"query": f"Is {n} even?", "group": n // 2} for n in range(50)])
    assert sorted(item.key for item in other.items) == keys
    assert other.fingerprint != ability.fingerprint  # the parts are others


def test_rows_are_joined_through_others_and_templates_join_nothing() -> None:
    joined = groups_of(
        [{"group": 1, "query": "a"}, {"query": "A "}, {"context": "a", "group": 2}, {"group": 2}, {"query": "b"}]
    )
    assert len(set(joined[:4])) == 1
    assert joined[0]
    assert joined[4] == ""
    template = "Answer the question that follows, with yes or with no, and give no reason for the answer that you choose. Thanks."
    assert not any(groups_of([{"query": f"{template}\n{n}"} for n in range(40)]))
    assert not any(groups_of([{"context": "", "continuation": "x"}] * 3))
    more = groups_of([{"query": f"{PASSAGES[0]}\n{n}"} for n in range(3)] + [{"query": str(n)} for n in range(9)])
    assert more[:2] == groups_of([{"query": f"{PASSAGES[0]}\n{n}"} for n in range(2)])  # more rows do not move a group


def test_prompts_are_kept_together_too(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    hh = "\n\nHuman: How is tea made?\n\nAssistant:"
    rows = [
        {"prompt": hh},
        {"prompt": hh + " With water.\n\nHuman: And then?\n\nAssistant:"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how is tea  made?"}]},
        {"prompt": "One", "group": "g"},
        {"prompt": "Two", "group": "g"},
        {"prompt": "Three"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    groups = [p.group for p in read_prompts(path)]
    assert groups[0] == groups[1] == groups[2] != groups[3] == groups[4] != groups[5] == ""


def test_groups_are_resampled_whole_and_kept_in_results() -> None:
    draw = np.random.default_rng(0)
    of = np.repeat(np.arange(40), 4)
    values = draw.normal(size=(40, 1))[of] + 0.1 * draw.normal(size=(160, 1))
    keys, groups = tuple(map(digest, range(160))), tuple(digest(int(g)) for g in of)

    def measured(step: float, groups: tuple[str, ...] = groups) -> Measurement:
        return Measurement("logprob", "nats", values * (1 + step) - step, "mean", None, keys, groups)

    whole, apart = (interval_of(measured(0, g)) for g in (groups, ()))
    assert whole["value"] == pytest.approx(apart["value"])
    assert whole["high"] - whole["low"] == pytest.approx(2 * (apart["high"] - apart["low"]), rel=0.15)
    assert Measurement.from_json(measured(0).to_json()).groups == groups
    assert "groups" not in measured(0, ()).to_json()
    points = [
        Measured(name, name, Scores(measured(-step), {"a": [measured(step)]}))
        for name, step in (("PRE", 0), ("POST", 1))
    ]
    content = json.loads(json.dumps(results(points, run="r", seed=0, reward="r")))
    read = [measurement(content, point, "a", "logprob") for point in content["points"]]
    assert read[0] is not None
    assert read[1] is not None
    assert len(read[0].sampled) == 40
    assert difference(read[0], read[1]) == pytest.approx(content["tax"][1]["tax"], rel=1e-6)
