"""Rows of training and their task, in with_mixture and with_weighting: what the column and the data may be."""

import numpy as np
import pytest
import torch
import trl
from datasets import ClassLabel, Dataset, IterableDataset
from torch.utils.data import ConcatDataset, DataLoader, Subset
from transformers import Trainer, TrainingArguments

from counterpoise.multitask import BanditMTL, with_mixture, with_weighting
from counterpoise.multitask.drawing import task_indices, tasks_of

from .hf import tiny_llama, token_rows, train
from .mixtures import COMMON, bandit, run, texts, words
from .toy import TASKS

ORDER = ClassLabel(names=["kitchen", "dvd", "books"])


def labelled(data, names=ORDER):
    return data.cast_column("task", names)


def reward(completions, task, **_):
    return [0.1 * (len(c) % 7) for c in completions]


@pytest.mark.parametrize(
    ("kind", "data", "how"),
    [
        ("Trainer", token_rows, labelled),
        ("Trainer", token_rows, lambda data: Subset(labelled(data), range(len(data)))),
        ("Trainer", token_rows, lambda data: ConcatDataset([labelled(data)])),
        ("SFT", texts, labelled),
        ("GRPO", texts, labelled),
    ],
)
def test_class_labels_are_read_by_their_names_in_a_mixture(tmp_path, kind, data, how):
    more = {"mix": {"reward_funcs": reward}} if kind == "GRPO" else {}
    data = data().rename_column("text", "prompt") if kind == "GRPO" else data()
    named, numbered = run(kind, tmp_path, dataset=data, **more), run(kind, tmp_path, dataset=how(data), **more)
    assert numbered.schedule.drawn() == named.schedule.drawn()
    assert numbered.mixture.last_losses == named.mixture.last_losses
    assert numbered.mixture.weights() == named.mixture.weights() != pytest.approx([1 / 3] * 3)


def test_packed_rows_of_class_labels_are_of_their_task(tmp_path):
    settings = {"packing": True, "max_length": 12, "per_device_train_batch_size": 2}
    named, numbered = (run("SFT", tmp_path, dataset=x, **settings) for x in (texts(), labelled(texts())))
    assert numbered.mixture.last_losses == named.mixture.last_losses


@pytest.mark.parametrize("how", [labelled, lambda data: labelled(data).to_iterable_dataset()])
def test_class_labels_are_read_by_their_names_in_a_weighting(tmp_path, how):
    named, numbered = (train(str(tmp_path), batch=8, dataset=x) for x in (token_rows(), how(token_rows())))
    again = train(str(tmp_path), batch=8, dataset=token_rows().to_iterable_dataset())
    expected = (named if isinstance(how(token_rows()), Dataset) else again).weighting
    assert numbered.weighting.last_losses == expected.last_losses
    assert numbered.weighting.weights() == expected.weights() != [1 / 3] * 3


def test_streams_that_trl_maps_keep_the_names_of_their_class_labels(tmp_path):
    """`IterableDataset.map` forgets the features."""
    rows = token_rows().remove_columns("attention_mask")
    found = [
        train(str(tmp_path), batch=8, base=Tokenized, dataset=x.to_iterable_dataset()).weighting.last_losses
        for x in (rows, labelled(rows))
    ]
    assert found[0] == found[1]


class Tokenized(trl.SFTTrainer):
    """As in `train`, with a tokenizer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, processing_class=words(), **kwargs)


def test_numbers_are_indices_where_the_tasks_or_the_labels_are_numbered(tmp_path):
    data = token_rows()
    expected = train(str(tmp_path), batch=8, dataset=data).weighting.last_losses
    in_order = labelled(data, ClassLabel(names=list(TASKS)))
    numbered = Dataset.from_list([row | {"task": TASKS.index(row["task"])} for row in data])
    for tasks, rows in [(3, in_order), (TASKS, labelled(numbered, ClassLabel(num_classes=3)))]:
        weighting = BanditMTL(tasks, min_effective_tasks=1.5)
        assert train(str(tmp_path), batch=8, dataset=rows, weighting=weighting).weighting.last_losses == expected


def test_class_labels_that_are_not_the_tasks_are_refused(tmp_path):
    rows = token_rows()
    others = Dataset.from_list([row | {"task": row["task"][::-1]} for row in rows])
    other = labelled(others, ClassLabel(names=[t[::-1] for t in TASKS]))
    mixed = ConcatDataset([labelled(rows), labelled(rows, ClassLabel(names=list(TASKS)))])
    for data, what in ((other, r"'task'.*names \['skoob'"), (mixed, "'task'.*different names")):
        with pytest.raises(ValueError, match=what):
            run("Trainer", tmp_path, dataset=data)
        with pytest.raises(ValueError, match=what):
            train(str(tmp_path), batch=8, dataset=data)
    more = labelled(rows, ClassLabel(names=["toys", *TASKS]))
    assert run("Trainer", tmp_path, dataset=more).schedule.drawn() == run("Trainer", tmp_path).schedule.drawn()
    toys = more.map(lambda row, i: {"task": 0 if i == 5 else row["task"]}, with_indices=True)
    with pytest.raises(ValueError, match=r"'task', row 5: expected one of .*, found 0 \('toys'\)"):
        run("Trainer", tmp_path, dataset=toys)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), 0.9, -1, 3, "1", [1], torch.tensor([0, 1])])
def test_what_names_no_task_is_told_with_its_column_and_row(bad):
    with pytest.raises(ValueError, match=r"column 'kind', row 1: expected one of \['books', .* or its index, found"):
        task_indices([0, bad], TASKS, "kind")
    with pytest.raises(ValueError, match="column 'kind', row 1 of a batch: "):
        tasks_of([{"kind": "dvd"}, {"kind": bad}], TASKS, "kind")


def test_a_task_is_a_name_or_any_whole_number():
    whole = ["kitchen", 2, 2.0, np.int64(2), np.float32(2), torch.tensor(2), torch.tensor([2.0])]
    assert task_indices(whole, TASKS, "task") == [2] * len(whole)
    assert task_indices([True, False], TASKS, "task") == [1, 0]


class Endless(torch.utils.data.Dataset):
    """A map-style data set that reads on from the beginning, as one that repeats its rows does."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return dict(self.rows[i % len(self.rows)])


def test_a_data_set_of_torch_is_as_long_as_it_says(tmp_path):
    ended, endless = run("Trainer", tmp_path), run("Trainer", tmp_path, dataset=Endless(token_rows()))
    assert endless.schedule.rounds == ended.schedule.rounds
    with pytest.raises(ValueError, match="expected a column 'task'"):
        run("Trainer", tmp_path, dataset=Endless([*token_rows(), {"x": 1}]))


@pytest.mark.parametrize("what", [Endless(token_rows(4)), None, {"train": token_rows(4)}])
def test_data_of_a_task_that_is_no_data_set_is_refused_by_its_task(tmp_path, what):
    with pytest.raises(ValueError, match=r"a list of rows for each task, found \['dvd: "):
        run("Trainer", tmp_path, dataset={t: what if t == "dvd" else token_rows(4) for t in TASKS})


def test_a_task_of_no_rows_is_refused_in_a_mapping(tmp_path):
    rows = token_rows(8).remove_columns("task")
    for nothing in (rows.select([]), []):
        with pytest.raises(ValueError, match=r"without a row in the training data: \['dvd'\]"):
            run("Trainer", tmp_path, dataset={"books": rows, "dvd": nothing, "kitchen": rows})


@pytest.mark.parametrize(
    ("how", "where"),
    [
        (lambda rows: rows, "training data"),
        (lambda rows: rows.to_list(), "training data"),
        (labelled, "training data"),
        (lambda rows: Endless(rows), "first epoch"),
        (lambda rows: rows.to_iterable_dataset(), "first epoch"),
    ],
)
def test_a_weighting_says_which_tasks_have_no_row(tmp_path, how, where, recwarn):
    all_tasks = token_rows(32)
    train(str(tmp_path), batch=8, dataset=how(all_tasks))
    assert not [w for w in recwarn if "without a row" in str(w.message)]
    rows = all_tasks.filter(lambda row: row["task"] != "dvd")
    with pytest.warns(UserWarning, match=rf"without a row in the {where}.*: \['dvd'\]. Their share") as told:
        train(str(tmp_path), batch=len(rows) // 3, dataset=how(rows))
    assert len([w for w in told if "without a row" in str(w.message)]) == 1


def test_a_run_of_another_seed_or_other_data_is_not_gone_on_with(tmp_path):
    run("Trainer", tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    kept = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="with the data_seed or seed 7, found 42: resume with those"):
        run("Trainer", tmp_path, resume=kept, seed=7)
    with pytest.raises(ValueError, match=r"its rows by task are \[.*, found \[.*: resume with those"):
        run("Trainer", tmp_path, resume=kept, dataset=token_rows(20))
    assert run("Trainer", tmp_path, resume=kept, data_seed=42).state.global_step == 4


def test_workers_that_read_far_ahead_are_told_of(tmp_path, recwarn):
    run("Trainer", tmp_path, gradient_accumulation_steps=4, dataloader_num_workers=2, max_steps=2)
    assert not [w for w in recwarn if "workers read" in str(w.message)]
    with pytest.warns(UserWarning, match="num_workers=2: rows are drawn by the weights of about 5 steps before"):
        run("Trainer", tmp_path, dataloader_num_workers=2, max_steps=1)


class OwnLoader(Trainer):
    """Leaves out the sampler that a trainer is asked for."""

    def get_train_dataloader(self):
        rows = self.train_dataset.remove_columns("attention_mask")
        return self.accelerator.prepare(DataLoader(rows, batch_size=8, collate_fn=self.data_collator))


def test_a_base_that_reads_the_rows_itself_is_refused(tmp_path):
    trainer = with_mixture(OwnLoader)(
        model=tiny_llama(), mixture=bandit(), train_dataset=token_rows(),
        args=TrainingArguments(str(tmp_path), max_steps=2, save_strategy="no", **COMMON),
    )  # fmt: skip
    with pytest.raises(ValueError, match="a step was trained on rows that the mixture did not draw"):
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "given", "words_of_it"),
    [
        ("Trainer", {"mix": {"oversample": 2}}, "oversample is for GRPOTrainer and RLOOTrainer"),
        ("SFT", {"mix": {"reward_bounds": (0, 1)}}, "reward_bounds is for GRPOTrainer and RLOOTrainer"),
        ("GRPO", {"mix": {"oversample": True}}, r"oversample must be a whole number in \[1, inf\), found True"),
        ("GRPO", {"mix": {"make_up": "yes"}}, "make_up must be True, False or None, found 'yes'"),
        ("Trainer", {"mix": {"improvement": None}}, r"improvement must be a number in \[0, inf\), found None"),
        ("Trainer", {"mix": {"reference": "loss"}}, "reference must hold one number per task.*found 'loss'"),
        ("Trainer", {"mix": {"task_column": "kind"}}, r"expected a column 'kind' .*found only \[.*'task'\]"),
        ("Trainer", {"dataset": {t: token_rows(8).select([]) for t in TASKS}}, r"without a row .*\['books'"),
        (
            "Trainer",
            {"dataset": {t: token_rows(8).rename_columns({c: f"{t} {c}" for c in token_rows(8).column_names}) for t in TASKS}},
            "expected columns that all tasks have, found {'books'",
        ),
        ("Trainer", {"dataset": dict.fromkeys(TASKS, IterableDataset.from_generator(lambda: iter([1, 2])))},
         "task '.*': expected rows of values by column, found int, 1"),
    ],
)  # fmt: skip
def test_what_is_given_wrongly_is_told_with_what_is_expected(tmp_path, kind, given, words_of_it):
    with pytest.raises((TypeError, ValueError), match=words_of_it):
        run(kind, tmp_path, **given)


def test_columns_that_some_tasks_lack_are_left_out_and_said(tmp_path):
    sets = {t: token_rows(8) for t in TASKS}
    sets["dvd"] = sets["dvd"].add_column("id", list(range(8)))
    with pytest.warns(UserWarning, match=r"train_dataset: left out \['id'\], which some tasks lack"):
        trainer = run("Trainer", tmp_path, dataset=sets)
    assert trainer.state.global_step > 0


@pytest.mark.parametrize("base", [int, "Trainer", object()])
def test_what_is_no_trainer_class_is_refused(base):
    for make in (with_mixture, with_weighting):
        with pytest.raises(TypeError, match="expected a trainer class, such as Trainer or SFTTrainer itself, found"):
            make(base)
