"""with_mixture in Trainer and SFTTrainer: p moves on the loss that is trained, or it is refused."""

import pytest
import torch
import trl
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from counterpoise.multitask import with_mixture

from .hf import tiny_llama, token_rows, train
from .mixtures import COMMON, bandit, run
from .test_trainer import classifier, gpt2, mixtral


def rows(targets):
    tokens = torch.randint(0, 32, (6, 5), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": targets, "task": [0, 1, 2] * 2})


class Another(torch.nn.Module):
    """A classifier whose loss is not the one that its head suggests, in the output that `form` makes of it."""

    def __init__(self, form, factor=2.0):
        super().__init__()
        self.inner, self.form, self.factor = classifier(3), form, factor
        self.config = self.inner.config

    def forward(self, input_ids, labels=None, **kwargs):
        found = self.inner(input_ids=input_ids, labels=labels, **kwargs)
        return self.form(self.factor * found.loss, found.logits)


FORMS = {
    "output": lambda loss, logits: SequenceClassifierOutput(loss=loss, logits=logits),
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "tuple": lambda loss, logits: (loss, logits),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_another_loss_is_refused(tmp_path, form, accumulate):
    """Two micro-batches, where twice the loss over both is that of one alone."""
    data = rows([0, 1, 2, 0, 1, 2])
    more = {"batch": 6 // accumulate, "accumulate": accumulate, "steps": 1, "dataset": data}
    with pytest.raises(ValueError, match=r"Another: its own loss of the first batch is .*example_losses"):
        train(str(tmp_path), mixture=bandit(), model=Another(FORMS[form]), **more)
    same = train(str(tmp_path), mixture=bandit(), model=Another(FORMS[form], 1.0), **more)
    assert same.mixture.updates == 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (lambda: classifier(3), [0, 1, 2, 0, 1, 2]),
        (lambda: classifier(1), [0.5, 1.0, -1.0, 0.0, 2.0, 0.3]),
        (lambda: classifier(2, "multi_label_classification"), [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]] * 2),
        (gpt2, None),
        (mixtral, None),
        (tiny_llama, None),
    ],
)
def test_models_of_transformers_have_the_loss_that_is_observed(tmp_path, build, targets, accumulate):
    """Whether or not they divide by num_items_in_batch, and whatever a mixture of experts adds."""
    data = token_rows() if targets is None else rows(targets)
    more = {"batch": 6 // accumulate, "accumulate": accumulate, "steps": 2, "dataset": data}
    assert train(str(tmp_path), mixture=bandit(), model=build(), **more).mixture.updates == 2


def test_the_first_batch_with_a_label_is_compared(tmp_path):
    data = rows([-100, -100, -100, 0, 1, 2])
    with pytest.raises(ValueError, match="Another: its own loss"):
        train(str(tmp_path), mixture=bandit(), model=Another(FORMS["output"]), batch=1, steps=6, dataset=data)


def doubled(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return 2.0 * torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


def test_a_loss_function_of_ones_own_needs_the_losses_of_examples(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", **COMMON)
    given = {"mixture": bandit(), "train_dataset": token_rows()}
    build = with_mixture(Trainer)
    with pytest.raises(ValueError, match=r"compute_loss_func.*example_losses"):
        build(model=tiny_llama(), args=arguments, compute_loss_func=doubled, **given)
    positional = (tiny_llama(), arguments, None, token_rows(), None, None, None, doubled)
    with pytest.raises(ValueError, match=r"compute_loss_func.*example_losses"):
        build(*positional, mixture=bandit())
    with pytest.raises(ValueError, match="compute_loss_func"):
        run("SFT", tmp_path, mix={"compute_loss_func": doubled})
    trainer = build(*positional, mixture=bandit(), example_losses=lambda outputs, labels: outputs.logits.mean((1, 2)))
    trainer.train()
    assert trainer.mixture.updates == 1


def test_losses_of_examples_are_for_trainer_alone(tmp_path):
    class Mine(trl.SFTTrainer):
        pass

    for base in (trl.SFTTrainer, Mine):
        with pytest.raises(ValueError, match=r"example_losses is for Trainer.*SFTTrainer"):
            with_mixture(base)(model=None, mixture=bandit(), example_losses=lambda outputs, labels: outputs.logits)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("SFT", {"loss_type": "dft"}),
        ("SFT", {"label_smoothing_factor": 0.5}),
        ("Trainer", {"label_smoothing_factor": 0.5}),
    ],
)
def test_the_level_is_the_plain_loss_whatever_is_made_of_it(tmp_path, kind, settings):
    """As of the start of training, of which one step tells."""
    given = {"max_steps": 1, "per_device_train_batch_size": 24}
    plain, other = run(kind, tmp_path, **given), run(kind, tmp_path, **given, **settings)
    assert other.state.log_history[0]["loss"] != pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)
    assert other.mixture.last_losses == pytest.approx(plain.mixture.last_losses)
