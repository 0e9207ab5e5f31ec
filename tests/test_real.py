"""A real model through the whole of it: stories15m, RSF towards cheerful stories, restore. Needs COUNTERPOISE_DATA."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from counterpoise import Details, Panel, average, restore
from counterpoise.alignment.rsf import rsf
from counterpoise.alignment.settings import RSF
from counterpoise.averaging.recipe import Recipe
from counterpoise.evaluation.parts import part_of
from counterpoise.evaluation.rewards import load_reward
from counterpoise.language.prompts import read_prompts
from counterpoise.language.sampling import Drawing
from counterpoise.search.candidates import HMA

NAMES = "Tom Lily Ben Anna Max Sue Tim Mia Sam Zoe Jack Amy".split()
DEEDS = "lost a toy,found a shell,saw a dog,went home,heard a noise,made a cake,fell down,had a dream".split(",")


def test_stories_keep_their_cheer_and_get_their_plot_back(data: Path, tmp_path: Path) -> None:
    reviews = tmp_path / "reviews.csv"
    with gzip.open(data / "imdb-reviews" / "imdb.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[::8]
    with reviews.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, ["text", "label"])
        writer.writeheader()
        writer.writerows({"text": r["text"], "label": r["label"]} for r in rows)
    openings = [f"One day, {name} {deed}." for name in NAMES for deed in DEEDS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in openings))
    lambada = (data / "benchmarks" / "lambada_openai.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    (tmp_path / "lambada.jsonl").write_text("\n".join(lambada), encoding="utf-8")

    tokenizer = AutoTokenizer.from_pretrained(data / "stories15m")
    model = AutoModelForCausalLM.from_pretrained(data / "stories15m", dtype=torch.float32)
    for side in ("pre", "post"):
        if side == "post":
            prompts = [p for p in read_prompts(tmp_path / "prompts.jsonl") if part_of(p.key) == "proxy"]
            reward = load_reward(f"sentiment:{reviews}")
            rsf(
                model,
                tokenizer,
                prompts,
                reward,
                RSF(drawing=Drawing(n=4, max_new_tokens=24), iterations=1, epochs=3, learning_rate=3e-4, batch_size=8),
            )
        model.save_pretrained(tmp_path / side)
        tokenizer.save_pretrained(tmp_path / side)

    panel = Panel.load(
        tmp_path / "prompts.jsonl",
        f"sentiment:{reviews}",
        [f"continue:{tmp_path / 'lambada.jsonl'}"],
        drawing=Drawing(max_new_tokens=24, batch_size=8),
        limit=12,
    )
    result = restore(
        tmp_path / "pre",
        tmp_path / "post",
        tmp_path / "out",
        panel,
        details=Details(mean=0.5),
        searches=[HMA(proxy_size=8)],
    )
    tax = {row["name"]: row for row in result["tax"]}
    assert tax["reward"]["post"]["value"] > tax["reward"]["pre"]["value"]
    if (
        result["out"] is None
    ):  # so few responses may leave the gain within noise: then restore says so, and average works
        assert "not significantly above" in result["verdict"]
        average(tmp_path / "pre", tmp_path / "post", tmp_path / "out", 0.5)
    assert Recipe.read(tmp_path / "out" / "recipe.json").mean == pytest.approx(0.5, abs=1e-12)
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer("One day, Lily", return_tensors="pt").input_ids
    story = tokenizer.decode(restored.generate(ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    assert len(story.split()) > 8
    assert story.isascii()
