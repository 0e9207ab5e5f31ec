"""The losses of single examples are those of the model itself, whatever its head, its labels and their type."""

import pytest
import torch
import transformers as hf
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from counterpoise.multitask import Uniform, with_weighting
from counterpoise.multitask.own_losses import counted, own_losses

from .toy import TASKS

SIZE = {"vocab_size": 32, "pad_token_id": 0, "num_labels": 3}
WIDE = SIZE | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "Bert": lambda: hf.BertConfig(**WIDE, max_position_embeddings=16),
    "DistilBert": lambda: hf.DistilBertConfig(**SIZE, dim=16, hidden_dim=16, n_layers=1, n_heads=2),
    "GPT2": lambda: hf.GPT2Config(**SIZE, n_embd=16, n_layer=1, n_head=2, n_positions=16, eos_token_id=1),
    "Llama": lambda: hf.LlamaConfig(**WIDE, num_key_value_heads=2),
    "Roberta": lambda: hf.RobertaConfig(**WIDE, max_position_embeddings=20),
    "DebertaV2": lambda: hf.DebertaV2Config(**WIDE, max_position_embeddings=16),
    "T5": lambda: hf.T5Config(**SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0),
}
SEVERAL, SINGLE, REGRESSION = "multi_label_classification", "single_label_classification", "regression"
FLOATS, ONES = [[0.5, -1.0, 2.0], [0.0, 0.3, 1.0], [1.0, 1.0, -2.0]], [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0] * 3]
TOKENS = [[-100, 5, 6, 7], [4, 5, -100, 7], [9, -100, -100, 3]]
POOLED = [
    (3, None, [0, 2, 1]),
    (3, SINGLE, [[0], [2], [1]]),
    (1, None, [0.5, 3.0, -1.0]),
    (1, REGRESSION, [[0.5], [3.0], [-1.0]]),
    (1, REGRESSION, [0, 3, 5]),
    (3, REGRESSION, FLOATS),
    (3, REGRESSION, [[0, 1, 5], [2, 0, 0], [1, 1, 7]]),
    (3, SEVERAL, ONES),
]
CASES = [
    *[(a, "SequenceClassification", *c) for a in ("Bert", "DistilBert", "GPT2", "Llama", "DebertaV2") for c in POOLED],
    *[(a, "SequenceClassification", 3, None, ONES) for a in ("Bert", "Llama")],
    *[(a, "SequenceClassification", 1, None, [0, 3, 5]) for a in ("Bert", "Roberta", "Llama")],
    *[(a, "TokenClassification", 10, None, TOKENS) for a in ("Bert", "Llama")],
    *[(a, "MaskedLM", 3, None, TOKENS) for a in ("Bert", "DistilBert")],
    *[(a, "CausalLM", 3, None, TOKENS) for a in ("GPT2", "Llama")],
    ("T5", "ConditionalGeneration", 3, None, TOKENS),
    *[(a, "QuestionAnswering", 2, None, [[0, 1], [2, 3], [1, 1]]) for a in ("Bert", "DistilBert", "Llama")],
]


def build(architecture: str, head: str, outputs: int, problem_type: str | None):
    torch.manual_seed(0)
    config = CONFIGS[architecture]()
    config.num_labels, config.problem_type = outputs, problem_type
    names = {("GPT2", "CausalLM"): "GPT2LMHeadModel"}
    name = names.get((architecture, head), f"{architecture}For{head}")
    return getattr(hf, name)(config).eval()


def columns(head: str, targets) -> dict[str, torch.Tensor]:
    labels = torch.tensor(targets)
    return (
        dict(zip(("start_positions", "end_positions"), labels.T, strict=True))
        if "Question" in head
        else {"labels": labels}
    )


@pytest.mark.parametrize(("architecture", "head", "outputs", "problem_type", "targets"), CASES)
def test_the_loss_of_one_example_is_the_models_own_and_so_is_that_of_the_batch(
    architecture, head, outputs, problem_type, targets
):
    model = build(architecture, head, outputs, problem_type)
    tokens = torch.randint(4, 32, (3, 4), generator=torch.Generator().manual_seed(1))
    shifts = head == "CausalLM"
    given = columns(head, targets)
    labels = given.get("labels", given)
    fresh = build(architecture, head, outputs, problem_type)  # whose config no forward pass has completed
    counts = counted(fresh, labels, shifts=shifts, length=4)
    with torch.no_grad():
        whole = model(input_ids=tokens, **given)
        losses = own_losses(fresh, whole, labels, shifts=shifts)
        for i in range(3):
            alone = model(input_ids=tokens[i : i + 1], **{k: v[i : i + 1] for k, v in given.items()}).loss
            assert float(losses[i].sum() / counts[i].sum()) == pytest.approx(float(alone), rel=1e-4)
    assert float(losses.sum() / counts.sum()) == pytest.approx(float(whole.loss), rel=1e-4)


def settings(tmp_path, **kwargs) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, learning_rate=0.1, optim="sgd",
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, **kwargs,
    )  # fmt: skip


def run(tmp_path, model, labels: dict[str, list], **kwargs):
    tokens = torch.randint(4, 32, (4, 4), generator=torch.Generator().manual_seed(1)).tolist()
    rows = Dataset.from_dict({"input_ids": tokens, "task": [1] * 4, **labels})
    kwargs = {"weighting": Uniform(TASKS), "args": settings(tmp_path)} | kwargs
    trainer = with_weighting(Trainer)(model=model, train_dataset=rows, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("problem_type", [None, REGRESSION])
def test_a_regression_on_whole_numbers_is_trained(tmp_path, problem_type):
    model = build("Bert", "SequenceClassification", 1, problem_type)
    before = model.classifier.bias.detach().clone()
    trainer = run(tmp_path, model, {"labels": [5, 0, 3, 1]})
    assert trainer.weighting.last_losses[1] > 0.1
    assert not torch.equal(before, model.classifier.bias)


def test_question_answering_is_trained_and_masked_spans_count_nothing(tmp_path):
    model = build("Bert", "QuestionAnswering", 2, None)
    before = model.qa_outputs.bias.detach().clone()
    trainer = run(tmp_path, model, {"start_positions": [0, 1, 2, 9], "end_positions": [1, 1, 3, 9]})
    assert 0.5 < trainer.weighting.last_losses[1] < 3.0
    assert not torch.equal(before, model.qa_outputs.bias)


def double() -> hf.BertForPreTraining:
    torch.manual_seed(0)
    return hf.BertForPreTraining(CONFIGS["Bert"]())


def test_several_label_columns_are_refused_or_given_by_name(tmp_path):
    labels = {"labels": [[4, 5, 6, 7]] * 4, "next_sentence_label": [0, 1, 0, 1]}
    with pytest.raises(
        ValueError, match=r"one label column, found \['labels', 'next_sentence_label'\].*example_losses"
    ):
        run(tmp_path, double(), labels)

    def by_name(outputs, given):
        assert given.keys() == labels.keys()
        return given["next_sentence_label"] + 0.0 * outputs.seq_relationship_logits.sum(-1)

    assert run(tmp_path, double(), labels, example_losses=by_name).weighting.last_losses[1] == 0.5


def test_losses_of_ones_own_that_are_not_one_per_example_are_refused(tmp_path):
    model = build("Bert", "SequenceClassification", 3, None)
    with pytest.raises(ValueError, match=r"expected one loss per example, \(4,\), found \(4, 3\)"):
        run(tmp_path, model, {"labels": [0, 1, 2, 0]}, example_losses=lambda outputs, labels: outputs.logits)


class Doubled(hf.BertForSequenceClassification):
    """Its loss is none of transformers' own."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        found = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
        found.loss = 2.0 * found.loss
        return found


@pytest.mark.parametrize("targets", [[0, 1, 2, 0], [5, 0, 3, 1]])
def test_a_model_with_a_loss_of_its_own_is_refused_unless_it_is_given(tmp_path, targets):
    def fresh():
        torch.manual_seed(0)
        config = CONFIGS["Bert"]()
        config.num_labels = 1 if 5 in targets else 3
        return Doubled(config)

    with pytest.raises(ValueError, match=r"Doubled: its own loss of the first batch is .*example_losses"):
        run(tmp_path, fresh(), {"labels": targets})
    run(tmp_path, fresh(), {"labels": targets}, example_losses=lambda outputs, labels: outputs.logits.sum(-1))


def test_a_flattening_collator_is_refused_by_name(tmp_path):
    model = build("Llama", "CausalLM", 3, None)
    for collator in (DataCollatorWithFlattening(), *padding_free()):
        with pytest.raises(ValueError, match=f"{type(collator).__name__} joins rows of different tasks"):
            run(tmp_path, model, {"labels": [[4, 5, 6, 7]] * 4}, data_collator=collator)


def padding_free():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return [DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)]


def test_rows_that_a_collator_joined_are_refused_by_what_it_did(tmp_path):
    class Joining:
        def __call__(self, rows):
            joined = [t for row in rows for t in row["input_ids"]]
            return {"input_ids": torch.tensor([joined]), "labels": torch.tensor([joined])}

    with pytest.raises(ValueError, match=r"Joining made 1 row\(s\) of 4 examples"):
        run(tmp_path, build("Llama", "CausalLM", 3, None), {"labels": [[4, 5, 6, 7]] * 4}, data_collator=Joining())


def test_a_label_column_of_another_name_is_the_label_column(tmp_path):
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("Bert", "SequenceClassification", 3, None)
            self.config = self.inner.config

        def forward(self, input_ids, target=None):
            return self.inner(input_ids=input_ids, labels=target)

    trainer = run(tmp_path, Other(), {"target": [0, 1, 2, 0]}, args=settings(tmp_path, label_names=["target"]))
    assert trainer.weighting.last_losses[1] > 0.1
