"""with_weighting on the Hugging Face Trainer and TRL's SFTTrainer."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from counterpoise.multitask import MGDA, BanditMTL, UncertaintyWeighting, Uniform, with_weighting
from counterpoise.multitask.per_task import TaskCollator

from .hf import parameters, tiny_llama, token_rows, train
from .toy import TASKS


def expected_step(weights: dict[str, float], batch: Dataset) -> list[torch.Tensor]:
    """The parameters after one SGD step (rate 0.5, no clipping) on sum_i w_i mean token loss of task i."""
    model = tiny_llama()
    columns = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask", "labels")}
    logits = model(input_ids=columns["input_ids"], attention_mask=columns["attention_mask"]).logits[:, :-1]
    labels = columns["labels"][:, 1:]
    losses = F.cross_entropy(logits.reshape(-1, 32), labels.reshape(-1), reduction="none").reshape(labels.shape)
    loss = 0.0
    for task, weight in weights.items():
        mine = torch.tensor([t == task for t in batch["task"]])
        loss = loss + weight * losses[mine].sum() / (labels[mine] != -100).sum()
    loss.backward()
    return [p.detach() - 0.5 * p.grad for p in model.parameters()]


def test_one_step_is_the_weighted_sum_of_task_means(tmp_path):
    trainer = train(str(tmp_path), batch=32, steps=1, max_grad_norm=0.0)
    reference = expected_step(dict.fromkeys(TASKS, 1 / 3), token_rows())
    torch.testing.assert_close(parameters(trainer), reference, rtol=1e-5, atol=1e-6)


def test_accumulation_is_the_big_batch(tmp_path):
    whole, parts = train(str(tmp_path), batch=8), train(str(tmp_path), batch=2, accumulate=4)
    torch.testing.assert_close(parameters(whole), parameters(parts), rtol=1e-5, atol=1e-6)
    assert whole.weighting.weights() == pytest.approx(parts.weighting.weights(), rel=1e-5)
    assert [h["loss"] for h in whole.state.log_history if "loss" in h] == pytest.approx(
        [h["loss"] for h in parts.state.log_history if "loss" in h], rel=1e-5
    )


def test_resume_is_bitwise_no_stop(tmp_path):
    straight = train(str(tmp_path / "a"), batch=4, accumulate=2, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert (checkpoint / "weighting.pt").exists()
    resumed = train(str(tmp_path / "b"), batch=4, accumulate=2, resume=str(checkpoint))
    assert all(map(torch.equal, parameters(straight), parameters(resumed)))
    assert straight.weighting.weights() == resumed.weighting.weights()
    assert straight.weighting.metrics() == resumed.weighting.metrics()
    assert resumed.weighting.updates == 4
    (checkpoint / "weighting.pt").unlink()
    with pytest.raises(FileNotFoundError, match="without a weighting"):
        train(str(tmp_path / "c"), batch=4, accumulate=2, resume=str(checkpoint))


def gpt2():
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**small, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def mixtral():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, **heads, output_router_logits=True, router_aux_loss_coef=1.0, max_position_embeddings=16)
    )


@pytest.mark.parametrize("build", [gpt2, mixtral])
def test_equal_tasks_with_equal_weights_have_the_loss_of_the_model(tmp_path, build):
    """GPT2LMHeadModel has no loss type, so that transformers counts its labels as if they were not shifted; Mixtral
    adds a loss that balances its experts."""
    rows = [row | {"labels": row["input_ids"], "task": TASKS[i % 2]} for i, row in enumerate(token_rows(8))]
    torch.manual_seed(0)
    model = build()
    columns = {name: torch.tensor([r[name] for r in rows]) for name in ("input_ids", "attention_mask", "labels")}
    model(**columns).loss.backward()
    expected = [p.detach() - 0.5 * p.grad for p in model.parameters()]
    torch.manual_seed(0)
    dataset = Dataset.from_list(rows)
    weighting = Uniform(TASKS[:2])
    trainer = train(
        str(tmp_path), batch=8, steps=1, model=build(), dataset=dataset, weighting=weighting, max_grad_norm=0.0
    )
    for one, other in zip(parameters(trainer), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_window_left_open_by_an_error_is_forgotten(tmp_path):
    weighting = Uniform(TASKS)
    weighting([torch.tensor(1.0)] * 3, [1.0] * 3, [2.0] * 3)  # a step that ran out of memory here
    train(str(tmp_path), batch=8, steps=1, weighting=weighting)
    assert weighting.updates == 1


def test_what_is_logged_is_json(tmp_path):
    train(str(tmp_path), batch=8, steps=1, save_strategy="steps", save_steps=1, weighting=BanditMTL(TASKS, rho=0.0))
    text = (Path(tmp_path) / "checkpoint-1" / "trainer_state.json").read_text()
    json.loads(text, parse_constant=pytest.fail)  # Infinity and NaN are none


def test_metrics_are_logged(tmp_path):
    trainer = train(str(tmp_path), batch=8, steps=2, save_strategy="steps", save_steps=2)
    logged = [h for h in trainer.state.log_history if "loss" in h]
    assert len(logged) == 2
    assert logged[1]["weighting/weight/dvd"] == pytest.approx(trainer.weighting.weights()[1])
    assert {"weighting/loss/books", "weighting/kl", "weighting/task_variance"} <= logged[0].keys()
    saved = json.loads((Path(tmp_path) / "checkpoint-2" / "trainer_state.json").read_text())
    assert "weighting/effective_tasks" in saved["log_history"][0]


def test_learned_weights_are_trained_and_resumed(tmp_path):
    def run(where, **kwargs):
        return train(str(tmp_path / where), batch=8, weighting=UncertaintyWeighting(TASKS), **kwargs)

    straight = run("a", save_strategy="steps", save_steps=2)
    assert straight.weighting.log_variance_M.abs().min() > 0.01
    resumed = run("b", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(straight.weighting.log_variance_M, resumed.weighting.log_variance_M)


def test_evaluation_is_the_bases_own(tmp_path):
    trainer = train(str(tmp_path), batch=8, steps=1)
    before = trainer.weighting.get_extra_state()["window"]["calls"]
    found = trainer.evaluate(token_rows(8))["eval_loss"]
    plain = Trainer(model=trainer.model, args=trainer.args).evaluate(token_rows(8).remove_columns("task"))["eval_loss"]
    assert found == pytest.approx(plain)
    assert trainer.weighting.get_extra_state()["window"]["calls"] == before == 0


def test_evaluation_needs_no_task_column_and_training_does(tmp_path):
    trainer = train(str(tmp_path), batch=8, steps=1)
    rows = token_rows(8)
    assert trainer.evaluate(rows.remove_columns("task"))["eval_loss"] == trainer.evaluate(rows)["eval_loss"]
    with pytest.raises(ValueError, match="expected a column 'task' that names each row's task, found only"):
        train(str(tmp_path), batch=8, dataset=rows.remove_columns("task"))


def test_windows_without_a_label_leave_the_weights_and_go_on(tmp_path):
    for weighting in (BanditMTL(TASKS, rho=0.3), UncertaintyWeighting(TASKS)):
        trainer = train(str(tmp_path), batch=2, accumulate=2, weighting=weighting, dataset=token_rows(16, labelled=0))
        assert trainer.state.global_step == 4
        assert weighting.updates == 0
        assert all(map(torch.equal, parameters(trainer), tiny_llama().parameters()))
    some = train(str(tmp_path), batch=2, dataset=token_rows(8, labelled=2), weighting=Uniform(TASKS))
    assert 1 <= some.weighting.updates <= 2


def test_only_a_weighting_is_taken(tmp_path):
    with pytest.raises(TypeError, match="found Linear"):
        train(str(tmp_path), batch=2, weighting=torch.nn.Linear(2, 1))


def test_methods_on_gradients_work_without_accumulation_only(tmp_path):
    model = tiny_llama()
    shared = list(model.model.layers.parameters())
    trainer = train(str(tmp_path), batch=8, steps=2, model=model, weighting=MGDA(TASKS, shared=shared))
    assert trainer.weighting.updates == 2
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
        train(str(tmp_path), batch=8, accumulate=2, model=model, weighting=MGDA(TASKS, shared=shared))


def classifier(labels: int, problem_type: str | None = None) -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, num_labels=labels, hidden_dropout_prob=0.0, **size)
    config.problem_type, config.attention_probs_dropout_prob = problem_type, 0.0
    return BertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("labels", "problem_type", "targets"),
    [
        (3, None, [0, 1, 2, 0, 1, 2]),
        (1, None, [0.5, 1.0, -1.0, 0.0, 2.0, 0.3]),
        (2, "multi_label_classification", [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]] * 2),
    ],
)
def test_classifiers_and_regressors_have_the_loss_of_their_model(tmp_path, labels, problem_type, targets):
    tokens = torch.randint(0, 32, (6, 5), generator=torch.Generator().manual_seed(0)).tolist()
    rows = {"input_ids": tokens, "labels": targets, "task": [1] * 6}  # one task by index: the plain mean
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=6,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    model = classifier(labels, problem_type)
    with torch.no_grad():
        plain = model(input_ids=torch.tensor(tokens), labels=torch.tensor(targets)).loss
    trainer = with_weighting(Trainer)(
        model=model, args=arguments, train_dataset=Dataset.from_dict(rows), weighting=Uniform(TASKS)
    )
    trainer.train()
    assert trainer.weighting.last_losses[1] == pytest.approx(float(plain), rel=1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(plain) / 3, rel=1e-5)


def test_a_loss_of_ones_own(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = {"input_ids": [[1, 2], [3, 4], [5, 6], [7, 8]], "labels": [0, 1, 2, 0], "task": ["books", "dvd"] * 2}
    trainer = with_weighting(Trainer)(
        model=classifier(3),
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        weighting=Uniform(TASKS),
        example_losses=lambda outputs, labels: labels + 0.0 * outputs.logits.sum(-1),
    )
    trainer.train()
    assert trainer.weighting.last_losses[:2] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("settings", "kwargs", "words"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
        ({}, {"compute_loss_func": lambda *a, **k: 0}, "example_losses"),
    ],
)
def test_settings_that_hide_the_task_losses_are_refused(tmp_path, settings, kwargs, words):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **settings)
    with pytest.raises(ValueError, match=words):
        with_weighting(Trainer)(
            model=classifier(2), args=arguments, train_dataset=token_rows(), weighting=Uniform(TASKS), **kwargs
        )


def test_a_loss_function_that_is_given_in_order_is_refused_too(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    given = (classifier(2), arguments, None, token_rows(), None, None, None, lambda *a, **k: 0)
    with pytest.raises(ValueError, match="compute_loss_func gives one loss for the batch: pass example_losses"):
        with_weighting(Trainer)(*given, weighting=Uniform(TASKS))


def test_the_collator_keeps_the_task_and_names_what_is_wrong():
    collate = TaskCollator(lambda rows: {"n": len(rows), "keys": sorted(rows[0])}, "task", TASKS)
    batch = collate([{"task": "dvd", "x": 1}, {"task": 2, "x": 1}])
    assert batch["task"].tolist() == [1, 2]
    assert batch["keys"] == ["x"]
    with pytest.raises(ValueError, match="expected a column 'task'"):
        collate([{"x": 1}, {"task": "dvd", "x": 1}])
    assert "task" not in collate([{"x": 1}])
    for bad in ("toys", 3, -1):
        with pytest.raises(ValueError, match=r"expected one of \['books', 'dvd', 'kitchen'\]"):
            collate([{"task": bad}])


def sft(tmp_path, weighting, **settings):
    import trl

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, learning_rate=0.5, lr_scheduler_type="constant", optim="sgd",
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        logging_steps=1, max_grad_norm=0.0, **settings,
    )  # fmt: skip
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0")),
        eos_token="w1", pad_token="w2",
    )  # fmt: skip
    trainer = with_weighting(trl.SFTTrainer)(
        model=tiny_llama(),
        args=arguments,
        train_dataset=token_rows().remove_columns("attention_mask"),
        processing_class=tokenizer,
        weighting=weighting,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("batch", "accumulate"), [(32, 1), (8, 4)])
def test_trl_trains_on_the_weighted_sum(tmp_path, batch, accumulate):
    trainer = sft(
        tmp_path,
        BanditMTL(TASKS, rho=0.3),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
    )
    reference = expected_step(dict.fromkeys(TASKS, 1 / 3), token_rows())
    torch.testing.assert_close(parameters(trainer), reference, rtol=1e-4, atol=1e-5)
    assert "weighting/weight/books" in trainer.state.log_history[0]
    assert "mean_token_accuracy" in trainer.state.log_history[0]  # TRL's own are still there
    assert trainer.weighting.weights() != [1 / 3] * 3


@pytest.mark.parametrize("name", ["DPOTrainer", "KTOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer"])
def test_a_trainer_without_a_loss_per_row_is_refused_by_what_it_is(name, tmp_path):
    import trl

    with pytest.raises(ValueError, match=rf"{name} has no loss per row.*drawn_by='p'"):
        with_weighting(getattr(trl, name))(model=None, weighting=Uniform(TASKS), example_losses=lambda *a: None)
    how = {"use_cpu": True, "bf16": False}
    config = getattr(trl, name.replace("Trainer", "Config"))
    with pytest.raises(ValueError, match=rf"{name} has no loss per row"):  # not: loss_type is not supported
        with_weighting(getattr(trl, name))(model=None, weighting=Uniform(TASKS), args=config(str(tmp_path), **how))


def test_a_compute_loss_of_ones_own_is_not_dropped_in_silence(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 2 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    given = {"model": tiny_llama(), "args": arguments, "train_dataset": token_rows(), "weighting": Uniform(TASKS)}
    with pytest.raises(ValueError, match=r"Own computes a loss of its own.*example_losses"):
        with_weighting(Own)(**given)
    with_weighting(Own)(**given, example_losses=lambda outputs, labels: outputs.logits.mean((1, 2)))


@pytest.mark.parametrize("setting", ["packing", "padding_free"])
def test_packing_is_refused_before_the_data_is_touched(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{setting}=True joins rows of different tasks"):
        sft(tmp_path, BanditMTL(TASKS, rho=0.3), **{setting: True})
