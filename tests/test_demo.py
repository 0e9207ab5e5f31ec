"""The demo is a true run: the world is learned, the reward rises, and every number is that of restore."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from counterpoise import demo
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.evaluation.abilities import load_abilities


def test_the_reward_counts_moods() -> None:
    assert demo.cheer(["", "", ""], ["the happy cat was kind .", "sad and lost and merry", ""]) == [2.0, -1.0, 0.0]


def test_a_world_is_decided_by_its_seed_and_has_one_answer_each(tmp_path: Path) -> None:
    assert demo.World.invent(3) == demo.World.invent(3) != demo.World.invent(4)
    world = demo.World.invent(0)
    for pairs in (world.facts(), world.sums(), world.translations()):
        assert len({asked for asked, _ in pairs}) == len(pairs)
    words = demo.make_tokenizer(world.vocabulary())
    lessons = [*world.facts(), *world.sums(), *world.translations(), *world.tales(demo.random.Random(0), 20)]
    assert all(words.unk_token_id not in words(f"{a} {b}")["input_ids"] for a, b in lessons)
    demo.write_world(world, tmp_path, 0)
    for ability in load_abilities([f"choices:{tmp_path / 'capitals.jsonl'}", f"choices:{tmp_path / 'sums.jsonl'}"]):
        for item in ability.items:  # type: ignore[attr-defined]
            query, choices, gold = (item.fields[k] for k in ("query", "choices", "gold"))
            assert len(set(choices)) == 4
            assert (query, choices[gold]) in [*world.facts(), *world.sums()]


def test_studying_twice_gives_the_same_model() -> None:
    world = demo.World.invent(0)
    words = demo.make_tokenizer(world.vocabulary())
    models = [demo.make_model(len(words), 0) for _ in range(2)]
    for model in models:
        demo.study(model, words, world, seed=0, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_the_whole_story_in_short(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = demo.run_demo(out, seed=1, epochs=4)
    kept = json.loads((out / "demo.json").read_text())
    assert kept["tax"] == json.loads(json.dumps(result["restore"]["tax"]))
    reward = kept["tax"][0]
    assert reward["name"] == "reward"
    assert reward["tax"]["high"] < 0
    assert (out / "restored").exists() == (kept["pick"] is not None)
    assert {"pre", "post", "prompts.jsonl", "demo.json"} <= {f.name for f in out.iterdir()}
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        demo.run_demo(out)


def test_a_demo_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path / "demo", epochs=1, progress=stop)
    assert list(tmp_path.iterdir()) == []
