"""How far two models are apart on given responses, and what restore and tax make of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from counterpoise.cli.app import app
from counterpoise.evaluation.panel import Panel
from counterpoise.language import sampling
from counterpoise.language.divergence import distinct, divergences
from counterpoise.language.scoring import Example
from counterpoise.report import page
from counterpoise.restoration.request import Details
from counterpoise.restoration.restore import measure_tax, restore
from counterpoise.tables.grid import as_markdown
from counterpoise.tables.shifts import distances, flips, likelier
from tiny import nudge, tiny
from world import make, panel, searches

EXAMPLES = [Example((1, *range(4, 4 + n)), tuple(range(9, 10 + n % 4))) for n in range(9)]


def pair(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    model = tiny(family, dtype=dtype)
    return model, nudge(copy.deepcopy(model), scale=0.05)


def measured(one: nn.Module, two: nn.Module, **how: Any) -> np.ndarray:
    return divergences(lambda: one, lambda: two, EXAMPLES, **how)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_divergence_is_the_sum_over_the_whole_vocabulary(family: str) -> None:
    one, two = pair(family)
    found = measured(one, two)
    for example, (kl, entropy, tokens) in zip(EXAMPLES, found, strict=True):
        ids, begin = torch.tensor([[*example.prompt, *example.response]]), len(example.prompt) - 1
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, begin:-1].double().softmax(-1).numpy() for m in (one, two))
        assert tokens == len(example.response)
        assert kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-3)
        assert entropy == pytest.approx(-(p * np.log(p)).sum(), rel=1e-4)
    assert (found[:, 0] > 1e-4).all()
    assert np.abs(measured(one, one)[:, 0]).max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_and_chunks_change_no_number_of_a_divergence(dtype: torch.dtype) -> None:
    one, two = pair(dtype=dtype)
    whole, close = measured(one, two), 1e-4 if dtype == torch.float32 else 0.1  # bfloat16: as the forward itself
    for how in ({"batch_size": 1}, {"batch_size": 4}, {"batch_size": 2, "held": 1}, {"batch_size": 3, "held": 1500}):
        np.testing.assert_allclose(measured(one, two, **how), whole, rtol=close)
    np.testing.assert_allclose(measured(one, two, batch_size=2, held=1), measured(one, two, batch_size=2), rtol=0)


def test_one_model_whose_weights_change_is_moved_once_a_chunk() -> None:
    moved: list[int] = []
    models = pair()

    def at(end: int) -> nn.Module:
        moved.append(end)
        return models[end]

    divergences(lambda: at(0), lambda: at(1), EXAMPLES, batch_size=3, held=1)
    turns = [a for a, b in zip(moved, [None, *moved], strict=False) if a != b]
    assert turns == [0, 1, 0, 1]  # three chunks: each begins with the model in place


def test_words_without_probability_add_nothing() -> None:
    one, two = pair()

    def mute(_model: object, _given: object, out: Any) -> None:
        out.logits[..., 0] = -math.inf  # a word that no probe of the model says

    for model in (one, two):
        model.register_forward_hook(mute)
    assert np.isfinite(measured(one, two)).all()


def test_pairs_that_one_prompt_alone_has_go_with_it() -> None:
    said = [[[1, 2, 3], [1, 2]], [[1, 2, 4]], [[5]]]
    expected = [3 / 5, 2 / 2, 2 / 3, 3 / 5]
    np.testing.assert_allclose(distinct(said), expected)
    assert np.isnan(distinct([[[5]], [[6]]])).all()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("apart"))


def test_tax_says_how_far_post_is_and_which_answers_changed_sides(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure_tax(world / "pre", world / "post", panel(world), work=tmp_path / "work")
    rows = {r["measure"]: r for r in found["distance"]}
    for measure in ("kl_own_answers", "kl_pre_answers", "kl_pre_text"):
        assert 0 < rows[measure]["post"]["low"] < rows[measure]["post"]["value"] < rows[measure]["post"]["high"]
    change = rows["entropy"]["post_change"]
    assert change["value"] == pytest.approx(rows["entropy"]["post"]["value"] - rows["entropy"]["pre"]["value"])
    assert rows["distinct_2"]["post_change"]["high"] < 0  # alignment narrowed what is said
    guess = next(r for r in found["tax"] if r["metric"] == "accuracy")
    lost, won = (guess["flips"][k]["seen"] for k in ("lost", "won"))
    assert lost - won == pytest.approx(guess["tax"]["value"])
    assert guess["flips"]["by_chance"] > 10  # two choices, nothing known
    assert {(r["name"], r["measure"]) for r in found["calibration"]} == {("guess", "ece"), ("guess", "brier")}
    assert likelier(found) in found["verdict"]
    for table in (distances(found), flips(found)):
        assert "POST" in as_markdown(table)
    json.dumps(found.to_json(), allow_nan=False)

    def draw(*_: object, **__: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(sampling, "begun_rows", draw)
    monkeypatch.setattr("counterpoise.restoration.distance.divergences", draw)
    assert measure_tax(world / "pre", world / "post", panel(world), work=tmp_path / "work") == found


def test_the_page_the_json_and_the_terminal_of_a_tax_say_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "plotly_script", lambda: "")
    panel = ["--prompts", world / "prompts.jsonl", "--reward", "world:early_letters", "--max-new-tokens", 6]
    panel += ["--abilities", f"choices:{world / 'guess.jsonl'}", "--prompt-limit", 20]
    common = [*map(str, ("tax", world / "pre", world / "post", *panel, "--work", tmp_path / "work", "--quiet"))]
    done = CliRunner().invoke(app, [*common, "--page", str(tmp_path / "tax.html")])
    assert done.exit_code == 0, done.output
    found = json.loads(CliRunner().invoke(app, [*common, "--json"]).stdout)
    html = (tmp_path / "tax.html").read_text()
    for text in (found["verdict"], done.output, html):
        assert "times as likely to POST as to PRE" in " ".join(text.split())
    first, *others = (html.index(f">{title}<") for title in (
        "How far it has gone from PRE", "The tax, ability by ability", "Answers that changed sides",
        "How sure, and how often right",
    ))  # fmt: skip
    assert all(first < other for other in others)
    for told in ("surprise PRE by", "right to wrong", "ECE"):
        assert told in done.output
        assert told in html


def test_responses_are_drawn_once_for_the_reward_and_for_the_distance(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = sampling.begun_rows

    def counting(model: Any, ids_BT: Any, *rest: Any) -> Any:
        asked.append(len(ids_BT))
        return real(model, ids_BT, *rest)

    monkeypatch.setattr(sampling, "begun_rows", counting)
    measure_tax(world / "pre", world / "post", panel(world))
    assert asked[-3:] == [30, 30, 64]  # PRE's answers, POST's, PRE's own text
    assert len(asked) <= 4  # the first is a look at how the model may be drawn from


def test_restore_stops_before_the_sweep_where_nothing_fell_unless_told_to_go_on(world: Path, tmp_path: Path) -> None:
    whole = panel(world)
    safe = Panel(**{**vars(whole), "abilities": [a for a in whole.abilities if a.name == "guess"]})
    ends = (world / "pre", world / "post")
    how: dict[str, Any] = {"means": (0.5,), **searches(controls=False)}
    stopped = restore(*ends, tmp_path / "a", safe, **how)
    assert "nothing was searched or written" in stopped["verdict"]
    assert [p["name"] for p in stopped["points"] if p["part"] == "validation"] == ["PRE", "POST"]
    assert stopped["distance"]
    assert not (tmp_path / "a").exists()
    gone_on = restore(
        *ends, tmp_path / "a", safe, details=Details(anyway=True), **how
    )  # another request: not the finished one
    assert len(gone_on["points"]) > len(stopped["points"])
