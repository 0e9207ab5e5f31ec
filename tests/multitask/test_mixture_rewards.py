"""with_mixture in GRPO and RLOO: the unit of the levels, and which groups are drawn."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from .hf import tiny_llama
from .mixtures import bandit, run, words
from .toy import TASKS


def judged(tmp_path, mixture, **mix):
    """A trainer after one step, and a call that judges rewards by task in place of a generation."""
    scores = []

    def rewards(completions, task, **_):
        return [scores.pop(0) if scores else 0.5 * (i % 2) for i, _ in enumerate(completions)]

    trainer = run("GRPO", tmp_path, mixture=mixture, max_steps=1, mix={"reward_funcs": rewards, **mix})
    mixture.reset()

    def judge(step=True, **by_task):
        rows = [t for t, found in by_task.items() for _ in found]
        scores[:] = [x for found in by_task.values() for x in found]
        inputs = [{"prompt": "w3", "task": t} for t in rows]
        trainer._calculate_rewards(inputs, ["w3"] * len(rows), ["w4"] * len(rows), [[4]] * len(rows))
        if step:
            mixture.step()

    return trainer, judge


@pytest.mark.parametrize("settings", [{"half_life": 2.0}, {"normalize": True}])
def test_levels_that_are_remembered_follow_the_bounds_that_are_seen(tmp_path, settings):
    """Of a task that is absent, too, and inside a window: they are what they would be in the last bounds throughout."""
    mixture, twin = bandit(eta=1e-3, **settings), bandit(eta=1e-3, **settings)
    _, judge = judged(tmp_path, mixture, improvement=2.0)
    mixture.corrects = twin.corrects = False
    mixture.improvement = twin.improvement = 2.0
    mixture.micro_batches = twin.micro_batches = 2
    windows = [
        {"books": [0.0, 0.5], "dvd": [0.5, 1.0], "kitchen": [0.0, 0.0]},
        {"books": [1.0, 1.0], "dvd": [0.5, 0.5]},
        {"books": [10.0, 1.0]},
        {"books": [5.0, -10.0]},
    ]
    for number, window in enumerate(windows):
        judge(step=number != 2, **window)
        levels = {t: torch.tensor(1 - (sum(x) / 2 + 10) / 20) for t, x in window.items()}
        twin.observe([levels.get(t) for t in TASKS], [2.0 * (t in window) for t in TASKS])
        if number != 2:
            twin.step()
    for remembered in ("last_losses", "_known", "_initial", "_before"):
        assert vars(mixture)[remembered] == pytest.approx(vars(twin)[remembered], nan_ok=True, rel=1e-5), remembered


def test_a_run_that_goes_on_with_other_bounds_has_its_levels_in_them(tmp_path):
    seen, judge = judged(tmp_path, bandit())
    judge(books=[0.0, 0.5], dvd=[0.5, 1.0], kitchen=[0.0, 0.0])
    given, _ = judged(tmp_path, bandit(), reward_bounds=(-10.0, 10.0))
    given.take_back(seen.kept())
    expected = [1 - (x + 10) / 20 for x in (0.25, 0.75, 0.0)]
    assert given.mixture.last_losses == pytest.approx(expected)
    given.take_back(given.kept())
    assert given.mixture.last_losses == pytest.approx(expected)
    older = seen.kept()
    del older["unit"]
    given.take_back(older)  # told nothing, it goes on as it was
    assert given.mixture.last_losses == pytest.approx([0.75, 0.25, 1.0])


def test_a_reference_without_bounds_has_no_unit(tmp_path):
    with pytest.raises(ValueError, match=r"expected reward_bounds=\(smallest, largest\)"):
        run("GRPO", tmp_path, mix={"reference": dict.fromkeys(TASKS, 0.5)})


def test_rewards_on_different_scales_are_compared_by_bounds_of_each_task(tmp_path):
    """books is nearly solved on its own scale; on one scale for all it seems the worst."""
    bounds = {"books": (0, 1), "dvd": (0, 10), "kitchen": (0, 10)}
    mixture = bandit()
    trainer, judge = judged(tmp_path, mixture, reward_bounds=bounds)
    judge(step=False, books=[0.9, 1.0], dvd=[1.0, 3.0], kitchen=[2.0, 2.0])
    mixture.corrects = False
    mixture.step()
    assert mixture.last_losses == pytest.approx([0.05, 0.8, 0.8])
    assert mixture.weights()[0] < 0.2
    told = trainer.told()
    assert (told["given_high/books"], told["given_high/dvd"]) == (1.0, 10.0)
    with pytest.warns(UserWarning, match=r"rewards of 'books' from 0 to 2 leave reward_bounds=\(0.0, 1.0\)"):
        judge(books=[2.0, 2.0])
    again, _ = judged(tmp_path, bandit(), reward_bounds=(0, 10))
    again.take_back(trainer.kept())
    assert again.mixture.last_losses[0] == pytest.approx(1 - 2.0 / 10)


@pytest.mark.parametrize(
    ("bounds", "words_of_it"),
    [
        ({"books": (0, 1)}, r"or one for each of the tasks \['books', 'dvd', 'kitchen'\], found \['books'\]"),
        (dict.fromkeys(TASKS, (0, 1)) | {"dvd": (1, 0)}, r"reward_bounds of 'dvd': .*the smaller one first.*\(1, 0\)"),
        (dict.fromkeys(TASKS, 1.0), r"reward_bounds of 'books': expected two finite numbers"),
        ((0.0, 1.0, 2.0), r"reward_bounds: expected two finite numbers.*found \(0.0, 1.0, 2.0\)"),
        (5, r"reward_bounds: expected two finite numbers.*found 5"),
    ],
)
def test_bounds_that_are_none_are_refused_by_name(tmp_path, bounds, words_of_it):
    with pytest.raises(ValueError, match=words_of_it):
        run("RLOO", tmp_path, mix={"reward_bounds": bounds})


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_mixture_of_rewards_held_at_its_prior_draws_by_it(tmp_path, kind):
    """kitchen never has an advantage: that is made up for only where p moves, or as make_up says."""
    few = {"per_device_train_batch_size": 24, "max_steps": 6}
    held = run(kind, tmp_path, mixture=bandit(rho=0.0, exploration=0.0), **few)
    assert held.told()["with_advantage/kitchen"] < 0.2
    assert held.schedule.drawn() == [4 * 6] * 3
    asked = run(kind, tmp_path, mixture=bandit(rho=0.0, exploration=0.0), mix={"make_up": True}, **few)
    assert asked.schedule.drawn()[2] > 4 * 6
    moving = run(kind, tmp_path, mixture=bandit(eta=1e-6, exploration=0.0), **few)
    assert moving.schedule.drawn() == asked.schedule.drawn()
    plain = run(kind, tmp_path, mixture=bandit(eta=1e-6, exploration=0.0), mix={"make_up": False}, **few)
    assert plain.schedule.drawn() == held.schedule.drawn()


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_run_resumed_inside_a_generation_is_told(tmp_path, kind, recwarn):
    """Which lasts three steps; at its end nothing is lost, and nothing said."""
    long = {"steps_per_generation": 3, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    run(kind, tmp_path, save_strategy="steps", save_steps=1, **long)
    run(kind, tmp_path, resume=str(tmp_path / "checkpoint-3"), **long)
    assert not [w for w in recwarn if "generation:" in str(w.message)]
    with pytest.warns(UserWarning, match=r"after step 2, inside a generation.*save_steps=3, or a multiple"):
        run(kind, tmp_path, resume=str(tmp_path / "checkpoint-2"), **long)


def test_groups_are_counted_by_the_advantages_that_are_trained_on(tmp_path):
    """RLOO clips what it adds up and takes KL off it; a task that no one rewards lacks none of its advantages."""

    def rewards(completions, task, **_):
        levels = {"books": lambda c: 2.0 + len(c), "dvd": lambda c: len(c) % 2, "kitchen": lambda c: None}
        return [levels[t](c) for c, t in zip(completions, task, strict=True)]

    few = {"per_device_train_batch_size": 24, "max_steps": 6}
    clipped = run("RLOO", tmp_path, mix={"reward_funcs": rewards}, reward_clip_range=(0.0, 1.0), **few)
    told = clipped.told()
    assert told["with_advantage/books"] < 0.2 < told["with_advantage/dvd"]
    assert (told["loss/books"], told["seen_high"]) == (0.0, 1.0)
    assert told["with_advantage/kitchen"] == 1.0
    tiny_llama().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    moved = {"model": AutoModelForCausalLM.from_pretrained(tmp_path / "model")}
    penalised = run("RLOO", tmp_path, mix=moved, beta=0.05, **few)
    assert penalised.told()["with_advantage/kitchen"] > 0.3  # its rewards are all equal, but books moves the policy
    cut = run("GRPO", tmp_path, mask_truncated_completions=True, max_completion_length=1, **few)
    assert cut.told()["with_advantage/dvd"] < 0.2


def test_one_reward_that_stretches_the_scale_is_told(tmp_path, recwarn):
    _, judge = judged(tmp_path, bandit())
    judge(books=[0.0, 1.0], dvd=[0.0, 5.0])
    assert not [w for w in recwarn if "hardly moves" in str(w.message)]
    with pytest.warns(
        UserWarning, match=r"from 0 to 1e\+06, found in one generation after 0 to 5: .*Give reward_bounds="
    ):
        judge(books=[1e6, 0.0])
    _, judge = judged(tmp_path, bandit(), reward_bounds=(0.0, 1e7))
    judge(books=[0.0, 1.0])
    recwarn.clear()
    judge(books=[1e6, 0.0])
    assert not [w for w in recwarn if "hardly moves" in str(w.message)]


def test_what_is_left_of_oversampled_prompts_is_told(tmp_path):
    """kitchen's groups never have an advantage: drawn the most, they are hardly kept."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 8, "mix": {"oversample": 3}}
    trainer = run("GRPO", tmp_path, save_strategy="steps", save_steps=2, **settings)
    told = trainer.told()
    shares = [told[f"trained/{t}"] for t in TASKS]
    assert sum(shares) == pytest.approx(1.0)
    assert shares[2] < told["drawn/kitchen"] / 2
    again = run("GRPO", tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)
    assert again.told() == told
    assert "trained/books" not in run("GRPO", tmp_path, max_steps=1).told()
