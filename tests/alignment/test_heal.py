"""Healing: its divergences and their gradients, its steps, its end, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import counterpoise
from counterpoise.alignment import teaching
from counterpoise.alignment.divergences import DIVERGENCES, diverge
from counterpoise.alignment.heal import Healing
from counterpoise.alignment.settings import Teaching
from counterpoise.alignment.teaching import Lesson, Teachers, answers, bandit, ended, height, in_turn, shares
from counterpoise.alignment.training.models import Machine
from counterpoise.alignment.training.stepping import take_step
from counterpoise.averaging.line import beside
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.preflight import preflight
from counterpoise.cli.app import app
from counterpoise.language import checkpointing
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example, Scored, score_responses
from counterpoise.planning.heal import plan_heal
from tiny import nudge, save_pair, tiny, tokenizer
from world import make

EXAMPLES = [
    Example((1, 5), (6, 7, 8)),
    Example((1,), (9, 2)),
    Example((1, 4, 4, 4), (3,)),
    Example((1, 8), (5, 5, 5, 2)),
]
DRAWN = Drawing(max_new_tokens=6, batch_size=32)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def few_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterpoise.alignment.heal.CHECKED", 12)


@pytest.fixture(scope="module")
def healed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """POST healed by four steps, whole."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("counterpoise.alignment.heal.CHECKED", 12)
        healing(world, out := tmp_path_factory.mktemp("healed") / "out").run()
    return out


def healing(world: Path, out: Path, **changed: Any) -> Healing:
    settings = {"steps": 4, "every": 2, "batch_size": 6, "learning_rate": 3e-3, **changed.pop("taught", {})}
    given: dict[str, Any] = {
        "start": world / "post", "post": world / "post", "pre": world / "pre", "prompts": world / "prompts.jsonl",
        "abilities": [f"choices:{world / 'guess.jsonl'}", f"continue:{world / 'text.jsonl'}"], "drawing": DRAWN,
    }  # fmt: skip
    return Healing(out=out, teaching=Teaching(**settings), **{**given, **changed})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = counterpoise.open_checkpoint(folder)
    return {name: found[name].clone() for name in found}


def as_scored(logits: torch.Tensor, mask: torch.Tensor) -> Scored:
    return Scored(logits, torch.zeros(mask.shape, dtype=torch.int64), mask, None)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_is_its_definition_and_its_gradient_that_of_finite_differences(kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    own, teacher = (torch.randn(2, 3, 7, generator=random, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, True, True], [False, True, True]])
    own.requires_grad_(True)
    found = diverge(as_scored(own * 1.0, mask), teacher.clone(), kind, scale=0.5)
    q, p = own.detach().softmax(-1), teacher.softmax(-1)
    m = (p + q) / 2

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    wanted = {"reverse": kl(q, p), "forward": kl(p, q), "jensen-shannon": (kl(p, m) + kl(q, m)) / 2}[kind]
    assert found == pytest.approx((wanted * mask).sum(1).tolist())
    for place in [(0, 0, 3), (0, 2, 6), (1, 0, 1), (1, 1, 0)]:
        sums = []
        for step in (1e-5, -1e-5):
            moved = own.detach().clone()
            moved[place] += step
            sums.append(sum(diverge(as_scored(moved, mask), teacher.clone(), kind)))
        assert own.grad is not None
        assert float(own.grad[place]) == pytest.approx(0.5 * (sums[0] - sums[1]) / 2e-5, abs=1e-8)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_is_worked_out_in_chunks_and_of_what_has_no_probability_counts_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(1)
    own, teacher = (torch.randn(2, 5, 7, generator=random) for _ in range(2))
    own[..., 6] = teacher[..., 6] = -math.inf
    mask = torch.ones(2, 5, dtype=torch.bool)
    gradients = []
    for chunk in (1, 1 << 22):
        monkeypatch.setattr("counterpoise.language.chunks.CHUNK", chunk)
        leaf = own.clone().requires_grad_(True)
        found = diverge(as_scored(leaf * 1.0, mask), teacher.clone(), kind, scale=1.0)
        assert all(map(math.isfinite, found))
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-5)
    assert gradients[0].isfinite().all()
    assert diverge(as_scored(own, mask), own.clone(), kind) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_a_step_learns_half_of_each_teacher_however_it_is_cut_into_micro_batches() -> None:
    teachers = [nudge(tiny("llama"), scale=0.3, seed=s).requires_grad_(False) for s in (1, 2)]
    found = []
    for micro in (1, 3, 8):
        model = tiny("llama")
        lessons = [Lesson(lambda t=t: t, "reverse", EXAMPLES[i::2], [i, i]) for i, t in enumerate(teachers)]  # type: ignore[misc]
        take_step(model, torch.optim.SGD(model.parameters(), lr=1.0), EXAMPLES, lambda rows: None, micro, lessons)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    model = tiny("llama")
    loss = torch.zeros(())
    for i, teacher in enumerate(teachers):
        own, there = (score_responses(m, EXAMPLES[i::2]) for m in (model, teacher))
        kl = torch.nn.functional.kl_div(
            there.logits_BCV.log_softmax(-1), own.logits_BCV.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        loss = loss + (kl * own.mask_BC).sum() / own.mask_BC.sum() / 2
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    wanted = torch.cat([(p - p.grad).detach().flatten() for p in model.parameters() if p.grad is not None])
    for one in found:
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-4)


def test_healing_lowers_what_it_lost_and_says_in_its_folder_how_it_was_made(world: Path, healed: Path) -> None:
    before = weights(world / "post")
    told = json.loads((healed / "heal.json").read_text())
    assert told["after"]["loss"] < told["before"]["loss"]
    assert told["before"]["align"] == pytest.approx(0.0, abs=1e-6)
    assert {"keep/guess", "keep/text"} <= told["after"].keys()
    assert told["drawn"] > told["trained"] > 0
    line = beside(preflight(world / "pre", world / "post"), preflight(world / "pre", healed))
    assert told["line"] == pytest.approx(line._asdict())
    assert line.distance > 0.01
    card = (healed / "README.md").read_text()
    assert "This is no average" in card
    assert "`post` where alignment is asked and `pre` elsewhere" in card
    assert card.startswith("---")
    assert str(world) not in card
    assert json.loads((healed / "align.json").read_text())["settings"]["method"] == "teach"
    assert any(not torch.equal(before[n], t) for n, t in weights(healed).items())
    assert all(torch.equal(before[n], t) for n, t in weights(world / "post").items())  # the teachers were not trained


class Killed(Exception):
    pass


@pytest.mark.parametrize("keep_by", ["uniform", "bandit"])
def test_a_healing_that_was_stopped_goes_on_bit_for_bit(
    keep_by: str, world: Path, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, full = partial(healing, world, taught={"keep_by": keep_by}), healed
    if keep_by == "bandit":
        made(full := tmp_path / "whole").run()
    steps = iter(range(100))

    def dying(*given: Any) -> None:
        if next(steps) == 2:
            raise Killed
        take_step(*given)

    with monkeypatch.context() as patched:
        patched.setattr(teaching, "take_step", dying)
        with pytest.raises(Killed):
            made(tmp_path / "cut").run()
    assert not (tmp_path / "cut").exists()
    made(tmp_path / "cut").run()
    whole, cut = weights(full), weights(tmp_path / "cut")
    assert all(torch.equal(whole[n], cut[n]) for n in whole)
    lines = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (full, tmp_path / "cut")]
    assert [{**x, "seconds": 0} for x in lines[0]] == [{**x, "seconds": 0} for x in lines[1]]
    assert made(tmp_path / "cut").run()["already_finished"]
    if keep_by == "bandit":
        state = torch.load(max((tmp_path / "whole.work").glob("state-*.pt")), weights_only=True)["loop"]
        before = [state["looked"][0][f"keep/{n}"] for n in ("guess", "text")]
        assert state["balance"]["_extra_state"]["initial"].tolist() == before


@pytest.mark.parametrize("rate", [0.5, 1e30])
def test_a_divergence_that_grows_ends_healing_and_the_best_point_stays(
    rate: float, world: Path, tmp_path: Path
) -> None:
    told = healing(world, tmp_path / "out", taught={"steps": 40, "learning_rate": rate}).run()
    assert told["healed"]["after"]["step"] == 0
    assert told["healed"]["ended"] == ("no progress" if rate == 0.5 else "overflow")
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    for words in ["no point was better than the start"] if rate < 1 else ["a number overflowed before the first point"]:
        assert [words in line for line in told["warnings"]].count(True) == 1
        assert words in card
    assert told["iterations"] <= teaching.PATIENCE
    assert all(torch.equal(weights(world / "post")[n], t) for n, t in weights(tmp_path / "out").items())


def test_healing_ends_after_points_without_progress_and_not_before() -> None:
    def looks(*losses: float) -> list[dict[str, float]]:
        return [{"loss": x} for x in losses]

    assert not ended(looks(3.0))
    assert not ended(looks(3.0, 2.0, 2.5))
    assert not ended(looks(3.0, 2.0, 2.5, 1.9))
    assert ended(looks(3.0, 2.0, 2.5, 2.4))


def test_teachers_that_take_turns_teach_the_same_and_one_is_held_at_a_time(
    world: Path, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("counterpoise.alignment.heal.free_memory", lambda device: 1)
    assert "teachers: both at once" in plan_heal(healing(world, tmp_path / "mapped")).told
    wide = plan_heal(healing(world, tmp_path / "wide", machine=Machine(torch.float64))).told
    assert "teachers: memory is too small for both, they take turns from disk" in wide
    there = healing(world, tmp_path / "there", machine=Machine(torch.float64))
    for memory, count in ((1e3, 1), (1e12, 2)):  # of a device that is not here
        plan = plan_heal(there, present=False, memory=memory)
        assert plan.resident["teachers"] == count * plan.resident["weights"]
    monkeypatch.setattr("counterpoise.alignment.heal.too_large", lambda *given: True)
    healing(world, tmp_path / "turns").run()
    both, turns = weights(healed), weights(tmp_path / "turns")
    assert all(torch.equal(both[n], turns[n]) for n in both)
    teachers = Teachers(world / "post", world / "pre", turns=True)
    assert teachers(0) is teachers(0)
    teachers(1)
    assert list(teachers._held) == [1]


def test_healing_that_computes_layers_again_gives_the_same_to_the_bit(
    world: Path, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, entered = checkpointing.recomputed, list[Any]()
    monkeypatch.setattr(checkpointing, "recomputed", lambda model: entered.append(model) or plain(model))
    healing(world, tmp_path / "out", machine=Machine(recompute=True)).run()
    assert len(set(map(id, entered))) == 1  # the student
    for name, wanted in weights(healed).items():
        assert torch.equal(weights(tmp_path / "out")[name], wanted)


def test_every_prompt_comes_once_before_any_comes_twice_and_abilities_have_equal_shares() -> None:
    prompts = [(i,) for i in range(5)]
    found = [in_turn(prompts, "0 1", i) for i in range(10)]
    assert sorted(found[:5]) == sorted(found[5:]) == prompts
    assert found[:5] != found[5:]
    counts = torch.tensor([shares(3, 8, number, 0, None) for number in range(6)])
    assert counts.sum(1).tolist() == [8] * 6
    assert counts.sum(0).tolist() == [16] * 3
    assert height(0, 1) == 1.0


def test_the_bandit_asks_more_of_the_ability_that_is_left_behind() -> None:
    balance = bandit(["near", "far"], [0.1, 0.2])
    for far in (0.2, 0.2, 0.19, 0.2):
        balance.observe(torch.tensor([0.1 if far == 0.2 else 0.02, far]), [4, 4])
        balance.step()
    near, far = (float(p) for p in balance.probabilities())
    assert far > near
    level, counts = bandit(list("abcd")), []
    for number in range(40):  # the luck of the draw is no loss
        counts = shares(4, 16, number, 0, level)
        level.observe(torch.full((4,), 0.3), counts)
        level.step()
    assert level.probabilities() == pytest.approx([0.25] * 4)
    drawn = [shares(2, 64, number, 0, balance)[1] for number in range(8)]
    assert sum(drawn) > 32 * 8
    lucky = bandit(["near", "far"], [0.1, 0.2])
    for near in (0.05, 0.1, 0.15, 0.1):  # a first answer that was easy is no unit for what follows
        lucky.observe(torch.tensor([near, 0.2]), [4, 4])
        lucky.step()
    assert lucky.probabilities() == pytest.approx([0.5] * 2)
    assert shares(2, 64, 3, 0, balance) == shares(2, 64, 3, 0, balance)


def test_without_abilities_openings_of_pre_are_continued(world: Path, tmp_path: Path) -> None:
    told = healing(world, tmp_path / "out", abilities=(), openings=40).run()
    assert "keep/openings" in told["healed"]["before"]
    assert told["healed"]["after"]["keep"] < told["healed"]["before"]["keep"]


def test_openings_beside_abilities_are_one_ability_more(folder: Path) -> None:
    told = healing(folder, folder / "out", openings=40, taught={"steps": 2}).run()["healed"]
    asked = {n for n in told["after"] if n.startswith("keep/")}
    assert asked == {"keep/guess", "keep/text", "keep/openings"}
    assert told["after"]["keep"] == pytest.approx(sum(told["after"][n] for n in asked) / 3)
    shutil.copyfile(folder / "text.jsonl", folder / "openings.jsonl")
    named = healing(folder, folder / "two", openings=40, abilities=[f"continue:{folder / 'openings.jsonl'}"])
    with pytest.raises(ValueError, match="expected different names, found 'openings' twice"):
        named.run()


def test_an_ability_whose_questions_leave_no_room_is_left_out_and_told_of(world: Path, tmp_path: Path) -> None:
    rows = [{"query": "ab" * 62 + str(i), "choices": ["a", "b"], "gold": 0} for i in range(40)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = [f"choices:{tmp_path / 'long.jsonl'}", f"choices:{world / 'guess.jsonl'}"]
    _, sources, warned = healing(world, tmp_path / "out", abilities=both).sources(world / "post")
    assert warned == ["long: no question leaves room for 6 tokens more in a context of 128; it is not asked"]
    assert [source.name for source in sources] == ["alignment", "guess"]
    alone = healing(world, tmp_path / "out", abilities=both[:1], taught={"keep_by": "bandit"})
    _, sources, warned = alone.sources(world / "post")
    assert len(sources) == 1
    assert "256 openings that PRE draws stand in for their questions" in warned[1]
    assert "fewer than two abilities can be asked" in warned[2]


def test_items_without_words_are_not_asked_of_a_model_without_a_token_to_begin_with(folder: Path) -> None:
    spoil(folder, "tokens")
    (folder / "blank.jsonl").write_text(
        "".join(json.dumps({"context": "", "continuation": str(i)}) + "\n" for i in range(40))
    )
    both = [f"continue:{folder / 'blank.jsonl'}", f"choices:{folder / 'guess.jsonl'}"]
    _, sources, warned = healing(folder, folder / "out", abilities=both).sources(folder / "post")
    assert [source.name for source in sources] == ["alignment", "guess"]
    assert warned == ["blank: it has no questions in words; it is not asked"]


@pytest.mark.parametrize("name", ["loss", "align", "keep", "step", "drawn", "seconds", "iteration"])
def test_whatever_an_ability_is_called_the_numbers_that_decide_are_those_of_the_healing(
    name: str, world: Path, healed: Path, tmp_path: Path
) -> None:
    called = [f"choices:{world / 'guess.jsonl'}", f"continue:{world / 'text.jsonl'}?name={name}"]
    healing(world, tmp_path / "out", abilities=called).run()
    lines = [
        [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (healed, tmp_path / "out")
    ]
    for usual, other in zip(*lines, strict=True):
        assert other.pop(f"keep/{name}") == usual.pop("keep/text")
        assert {**other, "seconds": 0} == {**usual, "seconds": 0}


def test_another_token_that_ends_a_text_makes_another_run(folder: Path) -> None:
    made = partial(healing, folder, folder / "out", taught={"steps": 1, "every": 1})
    made().run()
    path = folder / "post" / "generation_config.json"
    stops = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**stops, "eos_token_id": [2, 5]}))
    with pytest.raises(CheckpointError, match="or the run that it holds, with its config, stop tokens"):
        made().run()


def test_a_run_goes_on_with_another_batch_of_draws(world: Path, healed: Path, tmp_path: Path) -> None:
    steps, sizes = iter(range(100)), []

    def dying(*given: Any) -> None:
        if next(steps) == 2:
            raise MemoryError
        take_step(*given)

    def counted(*given: Any) -> list[Example]:
        sizes.append(given[-1].batch_size)
        return answers(*given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(teaching, "take_step", dying)
        with pytest.raises(MemoryError):
            healing(world, tmp_path / "out").run()
        patched.setattr(teaching, "take_step", take_step)
        patched.setattr(teaching, "answers", counted)
        healing(world, tmp_path / "out", drawing=Drawing(max_new_tokens=6, batch_size=5)).run()
    assert sizes == [5, 5, 5]  # two steps and a look
    whole, cut = weights(healed), weights(tmp_path / "out")
    assert all(torch.equal(whole[n], cut[n]) for n in whole)


def test_a_teacher_whose_head_is_its_embedding_teaches_a_student_that_has_both(world: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "pre")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    tokenizer().save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in counterpoise.open_checkpoint(tmp_path / "tied").entries
    told = healing(world, tmp_path / "out", pre=tmp_path / "tied").run()
    assert told["healed"]["after"]["loss"] < told["healed"]["before"]["loss"]


@pytest.mark.parametrize("side", ["pre", "post"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_named_and_nothing_is_taught(side: str, value: float, folder: Path) -> None:
    path = folder / side / "model.safetensors"
    held = {n: t.clone() for n, t in load_file(path).items()}
    held["model.layers.0.self_attn.q_proj.weight"][0, 0] = value
    save_file(held, path, metadata={"format": "pt"})
    said = CliRunner().invoke(app, [*HEAL.split(), "--abilities", "choices:guess.jsonl", "--steps", "1"])
    assert said.exit_code == 1
    told = " ".join(said.output.split())
    assert f"{side}: expected finite weights, found NaN or Inf in model.layers.0.self_attn.q_proj.weight" in told
    assert not (folder / "out").exists()


def test_a_student_that_is_unlike_its_teachers_is_named(folder: Path) -> None:
    shutil.copytree(folder / "post", folder / "start")
    config = json.loads((folder / "start" / "config.json").read_text())
    (folder / "start" / "config.json").write_text(json.dumps({**config, "vocab_size": 63}))
    asked = HEAL.replace("heal post", "heal start").split()
    for more in ([], ["--dry-run", "--speed", "1e9,1e9"]):
        said = CliRunner().invoke(app, [*asked, *more])
        assert "start: expected a student like its teachers; in POST's place: PRE has" in " ".join(said.output.split())
        none = CliRunner().invoke(app, [*HEAL.replace("heal post", "heal none").split(), *more])
        assert "error: none: no such folder" in none.output.lower()


def test_questions_hold_no_answer(world: Path) -> None:
    _, sources, _ = healing(world, world / "none").sources(world / "post")
    assert [s.name for s in sources] == ["alignment", "guess", "text"]
    words = tokenizer()
    asked = {tuple(words(json.loads(line)["query"])["input_ids"]) for line in (world / "guess.jsonl").open()}
    assert {*sources[1].taught, *sources[1].checked} <= asked
    assert not {*sources[1].taught} & {*sources[1].checked}


def test_a_student_that_is_no_average_is_warned_of_and_healed(world: Path, tmp_path: Path) -> None:
    counterpoise.average(world / "pre", world / "post", tmp_path / "average", [0.3, 0.9, 0.6])
    assert healing(world, tmp_path / "a", start=tmp_path / "average").run()["warnings"] == []
    nudge(tiny("llama"), scale=0.1, seed=9).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    tokenizer().save_pretrained(tmp_path / "other")
    [warning] = healing(world, tmp_path / "b", start=tmp_path / "other").run()["warnings"]
    assert "no average of the two teachers" in warning
    one = healing(world, tmp_path / "c", post=world / "pre").run()
    assert "both teachers are the same model" in one["warnings"][0]
    assert (
        json.loads(json.dumps(one["healed"]["line"], allow_nan=False)) == one["healed"]["line"]
    )  # Infinity is no json


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_lies_on_the_line_whatever_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, dtype=dtype, scale=0.005)
    counterpoise.average(pre, post, tmp_path / "ma", 0.25)
    counterpoise.average(pre, post, tmp_path / "blocks", [0.0, 0.5, 1.0])
    pair = preflight(pre, post)
    plain, blocks = (beside(pair, preflight(pre, tmp_path / name)) for name in ("ma", "blocks"))
    assert plain.nearest == pytest.approx(0.25, abs=0.02)
    assert plain.spread <= 0.01
    assert blocks.spread <= 0.01 < blocks.distance
    assert beside(pair, preflight(pre, post)) == pytest.approx((1.0, 0.0, 0.0), abs=1e-6)


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world to spoil, in which commands run."""
    shutil.copytree(world, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


HEAL = "heal post --align-teacher post --keep-teacher pre -o out --prompts prompts.jsonl --max-new-tokens 6 --quiet"


def spoil(folder: Path, how: str) -> None:
    if how == "vocabulary":
        config = json.loads((folder / "pre" / "config.json").read_text())
        (folder / "pre" / "config.json").write_text(json.dumps({**config, "vocab_size": 63}))
    if how == "tokenizer":
        content = json.loads((folder / "pre" / "tokenizer.json").read_text())
        words = content["model"]["vocab"]
        content["model"]["vocab"] = {w: (i + 7) % len(words) for w, i in words.items()}
        content["added_tokens"] = [{**t, "id": (t["id"] + 7) % len(words)} for t in content["added_tokens"]]
        (folder / "pre" / "tokenizer.json").write_text(json.dumps(content))
    if how == "words":
        for path in (folder / "post").glob("tokenizer*"):
            path.unlink()
    if how == "adapter":
        shutil.rmtree(folder / "post")
        (folder / "post").mkdir()
        side = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        size = counterpoise.open_checkpoint(folder / "pre")["model.layers.0.self_attn.q_proj.weight"].shape
        factors = {side.format("A"): torch.ones(1, size[1]), side.format("B"): torch.ones(size[0], 1)}
        save_file(factors, folder / "post" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
        (folder / "post" / "adapter_config.json").write_text(json.dumps(config))
    if how == "tokens":
        for side in ("pre", "post"):
            path = folder / side / "tokenizer_config.json"
            config = json.loads(path.read_text())
            path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("bos_token", "eos_token")}))


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("vocabulary", "", "PRE has a vocabulary of 63, POST of 64"),
        ("tokenizer", "", "pre and post give 47 tokens two ids, first"),
        (
            "tokens",
            "",
            "expected questions to keep abilities by, or a tokenizer with a token that begins or ends texts",
        ),
        ("words", "", "expected a tokenizer beside the student's weights, found"),
        ("adapter", "", "expected whole weights to heal or to teach by, found a LoRA adapter"),
        ("", "--steps 0", "steps: expected at least 1, found 0"),
        ("", "--every 0", "every: expected at least 1, found 0"),
        ("", "--prompts-per-step 0", "'--prompts-per-step': Input should be greater than or equal to 1"),
        ("", "--openings 0", "openings: expected at least 1, found 0"),
        ("", "--learning-rate nan", "learning_rate: expected a positive number, found nan"),
        ("", "--divergence kl", "'kl' is not one of 'reverse', 'forward', 'jensen-shannon'"),
        ("", "--keep-by turns", "'turns' is not one of 'uniform', 'bandit'"),
        ("", "--dtype float16", "dtype: expected float32 or bfloat16 weights to train, found float16"),
        ("", "--bf16 --dtype bfloat16", "bf16: expected float32 weights, found bfloat16"),
        ("", "--prompts nowhere.jsonl", "nowhere.jsonl: expected a file or folder, found nothing of that name"),
        ("", "--abilities choices:nowhere.jsonl", "nowhere.jsonl: expected a file or folder, found nothing"),
        ("", "--max-new-tokens 126", "prompts of at most 2 tokens (a context of 128 less 126"),
        ("", "-o pre", "pre: expected a new or empty folder"),
    ],
)
def test_run_and_dry_run_refuse_the_same_things_with_the_same_words(
    folder: Path, how: str, options: str, message: str
) -> None:
    spoil(folder, how)
    said = [
        CliRunner().invoke(app, [*HEAL.split(), *options.split(), *more])
        for more in ([], ["--dry-run", "--speed", "1e9,1e9"])
    ]
    assert said[0].exit_code == said[1].exit_code != 0
    texts = [" ".join(r.output.split()) for r in said]
    assert message in texts[0]
    assert texts[0].lower().partition("error")[2].split(";")[0] == texts[1].lower().partition("error")[2].split(";")[0]
    assert not (folder / "out").exists()


def test_the_command_heals_after_a_dry_run_that_writes_nothing(folder: Path) -> None:
    more = "--abilities choices:guess.jsonl --steps 2 --every 1 --prompts-per-step 4".split()
    asked = [*HEAL.split(), *more, "--dry-run", "--speed", "1e9,1e9"]
    dry, told = CliRunner().invoke(app, asked), CliRunner().invoke(app, [*asked, "--json"])
    assert dry.exit_code == 0, dry.output
    assert "teachers: both at once" in dry.output
    assert "teachers: both at once" in json.loads(told.stdout)["told"]
    assert not (folder / "out").exists()
    assert not (folder / "out.work").exists()
    run = CliRunner().invoke(app, [*HEAL.split(), *more])
    assert run.exit_code == 0, run.output
    assert "nats per token" in run.output
    assert (folder / "out" / "heal.json").is_file()
    one = HEAL.replace("align-teacher post", "align-teacher pre").replace("-o out", "-o towards-one")
    run = CliRunner().invoke(app, [*one.split(), *more])
    assert run.exit_code == 0, run.output
    assert "Both teachers are one model." in run.output
    run = CliRunner().invoke(app, [*one.replace("heal post", "heal pre").replace("towards-one", "none").split(), *more])
    assert "both teachers are the same model, and so is the student" in run.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": ["abc"]}, "prompts: expected a file, or what `read_prompts` gives, found 'abc'"),
        ({"taught": {"steps": 2.5}}, "steps: expected a whole number, found 2.5"),
        ({"drawing": Drawing(4, 6)}, "n: expected 1, as the student answers every prompt once, found 4"),
    ],
)
def test_what_python_may_get_wrong_is_told(given: dict[str, Any], message: str, world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        healing(world, tmp_path / "out", **given).run()


def test_one_ability_may_stand_without_a_list(world: Path, tmp_path: Path) -> None:
    _, sources, _ = healing(world, tmp_path, abilities=f"choices:{world / 'guess.jsonl'}").sources(world / "post")
    assert [s.name for s in sources] == ["alignment", "guess"]


def test_another_architecture_is_no_teacher(world: Path, tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")  # type: ignore[operator]
    tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError):
        healing(world, tmp_path / "out", post=tmp_path / "gpt2").run()
