"""with_mixture: rows drawn by the bandit's weights in the Hugging Face Trainer and TRL's trainers."""

from itertools import islice

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from counterpoise.multitask import BanditMTL, Uniform, with_mixture
from counterpoise.multitask.drawing import Interleaved, MixtureSampler, Schedule, quotas

from .hf import parameters, tiny_llama, token_rows
from .mixtures import COMMON, TRL, bandit, reward, run, stream, texts, words
from .toy import TASKS


def test_quotas_are_whole_within_one_and_right_on_average():
    p = np.array([0.55, 0.25, 0.2])
    found = np.array([quotas(p, 7, (k + 0.5) / 1000) for k in range(1000)])
    assert (found.sum(axis=1) == 7).all()
    assert (abs(found - 7 * p) < 1.0).all()
    np.testing.assert_allclose(found.mean(axis=0), 7 * p, atol=2e-3)


def test_all_rows_of_a_task_come_before_one_comes_again_over_epochs_too():
    schedule, epoch = Schedule(lambda: [0.5, 0.3, 0.2], seed=3), [0]
    schedule.size = 5
    sampler = MixtureSampler(schedule, [[0, 1, 2], [3, 4], [5]], 4, lambda: epoch[0], repeat=2, mini=3)
    first = list(sampler)
    assert len(first) == len(sampler) == 4 * 5 * 2 * 3
    rounds = np.array(first).reshape(4, 2, 5, 3)
    assert (rounds == rounds[:, :1, :, :1]).all()  # GRPO's repeats
    epoch[0] = 1
    rows = [*rounds[:, 0, :, 0].ravel(), *np.array(list(sampler)).reshape(4, 2, 5, 3)[:, 0, :, 0].ravel()]
    for mine in ([0, 1, 2], [3, 4]):
        came = [r for r in rows if r in mine]
        for start in range(0, len(came) - len(mine) + 1, len(mine)):
            assert sorted(came[start : start + len(mine)]) == mine
    assert list(sampler) == list(sampler)


def test_training_is_the_plain_trainers_on_the_rows_that_p_drew(tmp_path):
    """And p moves by the mirror step on the tasks' mean losses."""
    data = token_rows()
    bold = bandit(eta=20.0, rho=0.8)
    mixed = run(
        "Trainer", tmp_path, dataset=data, mixture=bold, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert np.ptp(np.array(mixed.schedule.rounds), axis=0).any()  # the quotas moved with p
    schedule = Schedule(list, seed=42)
    schedule.load(mixed.schedule.state() | {"size": 1, "sizes": []})
    schedule.size = 8
    rows = [[i for i, t in enumerate(data["task"]) if t == name] for name in TASKS]
    order = list(MixtureSampler(schedule, rows, 4, lambda: 0))

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return order

    settings = COMMON | {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    plain = InOrder(
        model=tiny_llama(), args=TrainingArguments(str(tmp_path), save_strategy="no", **settings), train_dataset=data
    )
    plain.train()
    assert all(map(torch.equal, parameters(mixed), parameters(plain)))

    again = bandit(eta=20.0, rho=0.8)
    again.corrects = False
    for logged in [h for h in mixed.state.log_history if "loss" in h]:
        again.observe([torch.tensor(logged[f"mixture/loss/{t}"]) for t in TASKS])
        again.step()
        assert [logged[f"mixture/weight/{t}"] for t in TASKS] == pytest.approx(again.weights(), rel=1e-4)


def test_a_mixture_held_at_its_prior_draws_by_it(tmp_path):
    held = bandit(rho=0.0, prior=[6, 1, 1], exploration=0.0)
    trainer = run("Trainer", tmp_path, mixture=held, max_steps=8)
    assert trainer.schedule.drawn()[0] == 6 * 8
    assert trainer.state.log_history[-2]["mixture/drawn/books"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Trainer", {"gradient_accumulation_steps": 2, "max_steps": 5, "dataloader_num_workers": 1}),
        ("Trainer", {"dataset": "stream"}),
        ("SFT", {"packing": True, "max_length": 12, "per_device_train_batch_size": 2}),
        ("GRPO", {"gradient_accumulation_steps": 2, "num_iterations": 2, "mix": {"improvement": 5.0}}),
        ("GRPO", {"mix": {"oversample": 2}}),
        ("RLOO", {}),
    ],
)
def test_a_resumed_run_is_bitwise_one_without_a_stop(tmp_path, kind, settings):
    """The checkpoint lies inside an epoch or at its end; data loaders have read ahead of it."""

    def go(where, **more):
        given = dict(settings)
        if given.get("dataset"):
            given["dataset"] = stream(token_rows(12).remove_columns("task").to_list())
        return run(kind, tmp_path / where, **given | more)

    straight = go("a", save_strategy="steps", save_steps=2)
    resumed = go("b", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert all(map(torch.equal, parameters(straight), parameters(resumed)))
    assert straight.mixture.metrics() == resumed.mixture.metrics()
    assert straight.schedule.rounds == resumed.schedule.rounds
    assert straight.told() == resumed.told()
    assert straight.mixture.weights() != pytest.approx([1 / 3] * 3, abs=1e-6)


def test_another_batch_size_is_refused_when_resuming(tmp_path):
    run("Trainer", tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(
        ValueError, match="expected the mixture of a run with 4 rows an optimiser step, found one with 8"
    ):
        run("Trainer", tmp_path, resume=str(tmp_path / "checkpoint-1"), per_device_train_batch_size=4)


def test_packed_and_padding_free_rows_have_the_losses_of_padded_ones(tmp_path):
    """One step on all rows; of six tokens each, so that four of them fill a packed sequence."""
    ids = [[3 + (5 * i + k * k) % 29 for k in range(6)] for i in range(24)]
    rows = Dataset.from_list([{"input_ids": x, "task": TASKS[i % 3]} for i, x in enumerate(ids)])
    ways = [
        {"per_device_train_batch_size": 24},
        {"per_device_train_batch_size": 24, "padding_free": True, "max_length": None},
        {"per_device_train_batch_size": 6, "packing": True, "max_length": 24},
    ]
    padded, free, packed = [run("SFT", tmp_path, dataset=rows, max_steps=1, **way) for way in ways]
    assert list(packed.train_dataset["seq_lengths"]) == [[6] * 4] * 6
    assert padded.mixture.last_losses == pytest.approx(free.mixture.last_losses, rel=1e-5)
    assert padded.mixture.last_losses == pytest.approx(packed.mixture.last_losses, rel=1e-5)
    assert len(set(padded.mixture.last_losses)) == 3


@pytest.mark.parametrize("kind", ["SFT", "GRPO"])
def test_streams_are_interleaved_by_p_and_begin_anew(tmp_path, kind):
    rows = [{"text": f"w{i} w3"} if kind == "SFT" else {"prompt": f"w{i} w3"} for i in range(5, 9)]
    more = {} if kind == "SFT" else {"shuffle_dataset": False}
    trainer = run(kind, tmp_path, dataset=stream(rows), **more)
    assert sum(trainer.schedule.drawn()) >= 4 * trainer.schedule.size > len(TASKS) * len(rows)
    assert trainer.mixture.updates == 4


def test_interleaved_rows_have_their_streams_task_and_order():
    schedule = Schedule(lambda: [0.5, 0.3, 0.2])
    schedule.size = 10
    streams = {t: [{"x": (t, i)} for i in range(k)] for k, t in enumerate(TASKS, start=1)}
    found = list(islice(Interleaved(streams, schedule, lambda: 0, "task")(), 40))
    for times, (k, t) in zip((20, 12, 8), enumerate(TASKS, start=1), strict=True):
        assert [row["x"] for row in found if row["task"] == t] == [(t, i % k) for i in range(times)]


def test_levels_of_rl_are_one_minus_the_mean_reward_between_the_bounds(tmp_path):
    given = run("GRPO", tmp_path, max_steps=1, mix={"reward_bounds": (0.0, 4.0)})
    assert given.mixture.last_losses[2] == pytest.approx(1 - 0.5 / 4)
    logged = given.state.log_history[0]
    assert (logged["mixture/given_low"], logged["mixture/given_high"]) == (0.0, 4.0)
    seen = run("GRPO", tmp_path, max_steps=3)
    logged = seen.state.log_history[2]
    low, high = logged["mixture/seen_low"], logged["mixture/seen_high"]
    assert logged["mixture/loss/kitchen"] == pytest.approx(1 - (0.5 - low) / (high - low))
    with pytest.warns(UserWarning, match=r"rewards from .* leave reward_bounds=\(0.0, 0.1\)"):
        run("GRPO", tmp_path, max_steps=1, mix={"reward_bounds": (0.0, 0.1)})


def test_groups_without_an_advantage_are_made_up_for(tmp_path):
    """kitchen's never have one: its quota grows by at most four; with oversampling the others' fill the batch."""
    held = bandit(rho=0.0, exploration=0.0)
    trainer = run("GRPO", tmp_path, mixture=held, max_steps=8, per_device_train_batch_size=24, mix={"make_up": True})
    shares = trainer.told()
    assert shares["with_advantage/kitchen"] < 0.1 < shares["with_advantage/dvd"]
    p = np.array(trainer.probabilities_of_tasks())
    told = np.maximum(0.25, [shares[f"with_advantage/{t}"] for t in TASKS])
    np.testing.assert_allclose(p * told / (p * told).sum(), [1 / 3] * 3)
    assert sorted(trainer._fill([0, 1, 2, 2], [True, True, False, False], 2)) == [0, 1]
    assert sorted(trainer._fill([0, 0, 0, 1, 1, 2], [True] * 6, 3)) == [0, 3, 5]


def test_oversampling_trains_on_the_groups_that_were_kept(tmp_path):
    kept = []

    class Watched(with_mixture(trl.GRPOTrainer)):
        def _generate_and_score_completions(self, inputs):
            found = super()._generate_and_score_completions(inputs)
            kept.append((len(inputs), found))
            return found

    prompts = Dataset.from_list([{"prompt": f"w{3 + i} w4", "task": TASKS[i % 3]} for i in range(24)])
    arguments = trl.GRPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=4,
        save_strategy="no", **TRL | COMMON,
    )  # fmt: skip
    Watched(
        model=tiny_llama(), reward_funcs=reward, args=arguments, train_dataset=prompts, processing_class=words(),
        mixture=bandit(), oversample=3,
    ).train()  # fmt: skip
    assert [n for n, _ in kept] == [24, 24]
    for _, found in kept:
        assert len(found["completion_ids"]) == len(found["advantages"]) == 8
        assert int(found["num_items_in_batch"]) == int(found["completion_mask"].sum())
        assert (found["advantages"].view(2, 4).abs().sum(1) > 0).all()


def test_p_moves_on_what_is_above_the_reference_and_on_what_falls_slowly():
    losses = torch.tensor([3.0, 2.0, 1.0])
    excess = bandit()
    excess.corrects, excess.reference = False, [3.5, 1.0, 1.0]  # excess 0, 1, 0
    excess.observe(losses)
    excess.step()
    assert excess.weights()[1] == max(excess.weights())
    assert excess.weights()[0] == pytest.approx(excess.weights()[2])
    slow = bandit(eta=1.0, rho=5.0)
    slow.corrects, slow.improvement = False, 2.0
    for falls in ([1.0, 1.0, 1.0], [0.5, 1.0, 1.5]):
        slow.observe(torch.tensor(falls))
        slow.step()
    p = np.exp([0.5 - 2 * 0.5, 1.0, 1.5 + 2 * 0.5])  # the level and twice its change
    assert slow.weights() == pytest.approx((p / p.sum()).tolist())


def test_the_bandit_is_as_it_was_built_before_and_after_a_trainer_trains(tmp_path):
    """In a loop of one's own each drawn task is corrected for how often it was drawn, and nothing has a reference."""
    mixture, seen = bandit(), []

    class Watched(Trainer):
        def training_step(self, *args, **kwargs):
            seen.append((mixture.corrects, mixture.improvement, mixture.reference, mixture.micro_batches))
            return super().training_step(*args, **kwargs)

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, gradient_accumulation_steps=2, save_strategy="no", **COMMON
    )
    given = {"args": arguments, "train_dataset": token_rows(), "mixture": mixture}
    trainer = with_mixture(Watched)(model=tiny_llama(), reference=[1.0, 1.0, 1.0], improvement=2.0, **given)
    with_mixture(Trainer)(model=tiny_llama(), **given)
    as_built = mixture.corrects, mixture.improvement, mixture.reference, mixture.micro_batches
    assert as_built == (True, 0.0, None, 1)
    trainer.train()
    assert seen == [(False, 2.0, [1.0, 1.0, 1.0], 2)] * 2
    assert as_built == (mixture.corrects, mixture.improvement, mixture.reference, mixture.micro_batches)
    with pytest.raises(ValueError, match="valid checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "none"))
    assert mixture.corrects


def test_evaluation_by_task_gives_the_worst_loss_and_the_best_checkpoint_by_it(tmp_path):
    held = {t: token_rows(12).remove_columns("task") for t in TASKS[:2]}
    held["books"] = held["books"].to_iterable_dataset()
    trainer = with_mixture(Trainer)(
        model=tiny_llama(), mixture=bandit(), train_dataset=token_rows(), eval_dataset=held,
        args=TrainingArguments(
            str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            metric_for_best_model="worst_loss", load_best_model_at_end=True, **COMMON,
        ),
    )  # fmt: skip
    trainer.train()
    logged = [h for h in trainer.state.log_history if "eval_worst_loss" in h]
    assert trainer.state.best_metric == min(h["eval_worst_loss"] for h in logged)
    found = trainer.evaluate()
    assert found["eval_worst_loss"] == max(found[f"eval_{t}_loss"] for t in held)


def test_evaluation_of_rl_gives_the_worst_reward(tmp_path):
    rows = [{"prompt": f"w{i} w4", "task": t} for i, t in enumerate(("books", "kitchen") * 4, start=3)]
    held = {t: Dataset.from_list([r for r in rows if r["task"] == t]) for t in ("books", "kitchen")}
    how = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    how |= {"metric_for_best_model": "worst_reward", "load_best_model_at_end": True, "per_device_eval_batch_size": 8}
    trainer = run("GRPO", tmp_path, max_steps=2, mix={"eval_dataset": held}, **how)
    logged = [h["eval_worst_reward"] for h in trainer.state.log_history if "eval_worst_reward" in h]
    assert len(logged) == 2
    assert trainer.state.best_metric == max(logged)
    found = trainer.evaluate()
    assert found["eval_kitchen_reward"] == 0.5
    assert found["eval_worst_reward"] == min(0.5, found["eval_books_reward"])
    assert "eval_worst_loss" not in found


def test_an_infinite_reward_is_no_bound(tmp_path, monkeypatch):
    once = iter([float("inf")])

    def rewards(completions, task, **_):
        return [next(once, x) for x in reward(completions, task)]

    trainer = run("GRPO", tmp_path, mix={"reward_funcs": rewards})
    assert trainer.mixture.updates == 4
    assert all(np.isfinite(trainer._seen_bounds))
    assert trainer.mixture.weights() != [1 / 3] * 3


def test_tasks_that_hold_their_share_are_told_that_they_never_move(tmp_path):
    with pytest.warns(UserWarning, match="one task"):
        run("Trainer", tmp_path, mixture=bandit(missing="hold"), per_device_train_batch_size=1, max_steps=40)


def test_data_by_task_may_have_the_column_or_be_lists(tmp_path):
    rows = {t: [r for r in token_rows() if r["task"] == t] for t in TASKS}
    listed = run("Trainer", tmp_path, dataset=rows)
    named = run("Trainer", tmp_path, dataset={t: Dataset.from_list(x) for t, x in rows.items()})
    assert listed.mixture.weights() == named.mixture.weights() != [1 / 3] * 3
    with pytest.raises(ValueError, match=r"train_dataset: expected data of the tasks .*, found \['books'\]"):
        run("Trainer", tmp_path, dataset={"books": rows["books"]})


def test_packed_evaluation_sets_may_have_the_column(tmp_path):
    held = {t: texts().filter(lambda row, t=t: row["task"] == t) for t in TASKS}
    more = {"mix": {"eval_dataset": held}, "packing": True, "max_length": 16}
    found = run("SFT", tmp_path, max_steps=1, **more).evaluate()
    assert found["eval_worst_loss"] == max(found[f"eval_{t}_loss"] for t in TASKS)


@pytest.mark.parametrize(
    ("kind", "given", "words_of_it"),
    [
        ("Trainer", {"mixture": Uniform(TASKS)}, "mixture must be a BanditMTL, found Uniform"),
        ("Trainer", {"mixture": BanditMTL(TASKS, rho=0.3)}, 'drawn_by="p"'),
        ("Trainer", {"mixture": BanditMTL([*TASKS, "toys"], rho=0.3, drawn_by="p")}, r"without a row .*\['toys'\]"),
        ("Trainer", {"dataset": token_rows(8).remove_columns("task")}, "expected a column 'task'"),
        ("Trainer", {"dataset": token_rows(8).to_iterable_dataset()}, "train_dataset={task: stream"),
        ("Trainer", {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ("Trainer", {"auto_find_batch_size": True}, "auto_find_batch_size"),
        ("Trainer", {"ignore_data_skip": True}, "ignore_data_skip=True reads a resumed epoch from its beginning"),
        ("GRPO", {"ignore_data_skip": True}, "ignore_data_skip=True"),
        ("Trainer", {"dataset": stream([{"x": 1}]), "dataloader_num_workers": 2}, "dataloader_num_workers=2"),
        ("SFT", {"dataset": stream([{"text": "w3"}]), "packing": True}, "packing=True"),
        ("GRPO", {"dataset": stream([{"prompt": "w3"}])}, "shuffle_dataset=True"),
        ("GRPO", {"mix": {"reward_bounds": (1.0, 0.0)}}, "reward_bounds"),
        ("GRPO", {"mix": {"reward_bounds": (0.0, float("inf"))}}, "reward_bounds: expected two finite numbers"),
        ("GRPO", {"mix": {"oversample": 0}}, "oversample must be a whole number"),
        ("GRPO", {"mix": {"oversample": 1.5}}, r"oversample must be a whole number in \[1, inf\), found 1.5"),
        ("RLOO", {"mix": {"oversample": "2"}}, "oversample must be .* found '2'"),
        ("Trainer", {"mix": {"reference": {"books": 1.0}}}, r"reference: .* each of the tasks .*, found \['books'\]"),
        ("GRPO", {"mix": {"example_losses": lambda outputs, labels: labels}}, "argument 'example_losses'"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_by_name(tmp_path, kind, given, words_of_it):
    with pytest.raises((TypeError, ValueError), match=words_of_it):
        run(kind, tmp_path, **given)
    with pytest.raises(ValueError, match=r"DPOTrainer has no loss per row.*GRPOTrainer or RLOOTrainer"):
        with_mixture(trl.DPOTrainer)(model=None, mixture=bandit())
