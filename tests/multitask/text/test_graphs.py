"""Methods that look at gradients get a graph per task in training: the gradients are those of one graph for all."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from counterpoise.classification import Design, build_classifier, weighting_for
from counterpoise.classification.training import _Run
from counterpoise.multitask import Uniform

from .worlds import tasks, tiny_encoder

ROUNDS = 3


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return tasks(tmp_path_factory.mktemp("data"), colours=120, animals=90)


def run_of(found, design, weighting: str):
    """A run in float64, whose texts are padded far beyond most of them, and its weighting."""
    classifier = build_classifier(found, design, dimension=8)
    classifier.model.double()
    balance = weighting_for(weighting, classifier, rounds_per_epoch=3)
    return _Run(found, classifier, balance, batch=7, lr=0.01, seed=0)


def round_on_one_graph(run) -> None:
    """What `_Run.round` does, with one forward pass of all tasks' rows, as other libraries train."""
    model = run.classifier.model.train()
    drawn = run.draw()
    features = torch.split(model(*run.texts.batch(torch.cat(drawn))), [len(rows_B) for rows_B in drawn])
    parts = enumerate(zip(features, drawn, strict=True))
    losses = [cross_entropy(model.logits(x_BF, i), run.truth[i][rows_B - run.first[i]]) for i, (x_BF, rows_B) in parts]
    run.optimizer.zero_grad()
    run.weighting(torch.stack(losses)).backward()
    run.optimizer.step()
    run.weighting.step()


@pytest.mark.parametrize("weighting", ["mgda", "gradnorm", "upgrad", "pcgrad"])
@pytest.mark.parametrize("model", ["textcnn", "bert"])
def test_a_graph_per_task_gives_the_gradients_of_one_graph(found, tmp_path, model, weighting):
    kind = str(tiny_encoder(tmp_path)) if model == "bert" else model
    design = Design(kind, width=6, dropout=0.0, max_tokens=40)
    if model == "bert":
        for setting in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            _switch_off(tmp_path, setting)
    ours, shared = run_of(found, design, weighting), run_of(found, design, weighting)
    for number in range(ROUNDS):
        torch.manual_seed(number)  # PCGrad draws its order
        assert ours.round() == []
        torch.manual_seed(number)
        round_on_one_graph(shared)
        pairs = zip(ours.classifier.model.named_parameters(), shared.classifier.model.parameters(), strict=True)
        for (name, a), b in pairs:
            if a.grad is not None or b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert ours.weighting.last_losses == pytest.approx(shared.weighting.last_losses, rel=1e-9)
    if weighting == "gradnorm":
        assert ours.weighting.weights() == pytest.approx(shared.weighting.weights(), rel=1e-9)
        assert ours.weighting.weights() != [1.0, 1.0]


def test_it_would_notice_other_gradients(found):
    design = Design("textcnn", width=6, dropout=0.0, max_tokens=40)
    ours, other = run_of(found, design, "mgda"), run_of(found, design, "uniform")
    assert isinstance(other.weighting, Uniform)
    ours.round()
    round_on_one_graph(other)
    pairs = zip(ours.classifier.model.parameters(), other.classifier.model.parameters(), strict=True)
    assert any(not torch.allclose(a.grad, b.grad) for a, b in pairs)


def _switch_off(folder, setting: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: 0.0}))
