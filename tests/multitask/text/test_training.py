"""Training: it learns, it repeats itself, it stops, and its history says what happened."""

import math

import layouts
import pytest
import torch

from counterpoise.classification import (
    WEIGHTINGS,
    Design,
    build_classifier,
    evaluate,
    read_tasks,
    rounds_per_epoch,
    train,
    training,
    weighting_for,
)
from counterpoise.classification.training import _rows
from counterpoise.multitask import BanditMTL, UncertaintyWeighting, Uniform

from .worlds import tasks, tiny_encoder

SMALL = Design("textcnn", width=8, dropout=0.1, max_tokens=16)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return tasks(tmp_path_factory.mktemp("data"))


def fitted(found, weighting="bandit", *, design=SMALL, seed=0, **settings):
    classifier = build_classifier(found, design, dimension=16, seed=seed)
    settings = {"epochs": 8, "lr": 0.01, "batch_size": 16} | settings
    return classifier, train(found, classifier, weighting, seed=seed, **settings)


def mean_accuracy(classifier, found):
    scores = evaluate(classifier, found)
    return sum(s.accuracy for s in scores.values()) / len(scores)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_learns_both_tasks(found, weighting):
    classifier, run = fitted(found, weighting)
    scores = evaluate(classifier, found)
    assert scores["colour"].accuracy > 0.85  # chance is 0.5
    assert scores["animal"].accuracy > 0.75  # chance is 0.33
    assert run.rounds[-1]["loss/animal"] < math.log(3)


def test_a_hugging_face_encoder_trains(found, tmp_path):
    design = Design(str(tiny_encoder(tmp_path)), max_tokens=64, dropout=0.0)
    for weighting in ("bandit", "gradnorm"):
        _, run = fitted(found, weighting, design=design, epochs=4, lr=3e-3)
        losses = [sum(e.train_loss.values()) for e in run.epochs]
        assert losses[-1] < 0.97 * losses[0]


def test_one_task_alone(found):
    classifier, _ = fitted(found[:1], "uniform")
    assert evaluate(classifier, found[:1])["colour"].accuracy > 0.85


def test_a_task_alone_can_take_as_many_steps_as_together(found, monkeypatch):
    monkeypatch.setattr(training, "EVERY", 1)
    rare, rounds = found[1:], rounds_per_epoch(found, 16)
    assert rounds > rounds_per_epoch(rare, 16)
    _, run = fitted(rare, "dwa", epochs=2, rounds=rounds)
    assert [r["round"] for r in run.rounds] == list(range(1, 2 * rounds + 1))
    _, same = fitted(rare, "dwa", epochs=2, rounds=rounds_per_epoch(rare, 16))
    assert same.rounds == fitted(rare, "dwa", epochs=2)[1].rounds


def test_the_same_seed_gives_the_same_run_and_leaves_the_callers_generator_alone(found):
    torch.manual_seed(5)
    first, run = fitted(found, epochs=2)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    again, same = fitted(found, epochs=2)
    other, _ = fitted(found, epochs=2, seed=1)
    assert [e.train_loss for e in run.epochs] == [e.train_loss for e in same.epochs]
    assert run.rounds == same.rounds
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])
    assert not torch.equal(first.model.heads[0].weight, other.model.heads[0].weight)


def test_the_history_holds_losses_weights_variance_and_accuracy(found, monkeypatch):
    monkeypatch.setattr(training, "EVERY", 3)
    seen = []
    classifier = build_classifier(found, SMALL, dimension=16)
    run = train(found, classifier, epochs=2, batch_size=16, progress=lambda *x: seen.append(x))
    rounds = rounds_per_epoch(found, 16)
    assert rounds == math.ceil(len(found[0].train) / 16)
    assert seen == [("training", i, 2 * rounds) for i in range(1, 2 * rounds + 1)]
    assert [r["round"] for r in run.rounds] == [1, *range(3, 2 * rounds + 1, 3)]
    last = run.rounds[-1]
    assert last["weight/colour"] + last["weight/animal"] == pytest.approx(1.0)
    assert {"loss/colour", "loss/animal", "task_variance", "effective_tasks", "robust_value"} <= set(last)
    for number, epoch in enumerate(run.epochs, start=1):
        a, b = epoch.train_loss["colour"], epoch.train_loss["animal"]
        assert epoch.epoch == number
        assert epoch.task_variance == pytest.approx((a - b) ** 2 / 4)
        assert set(epoch.validation_accuracy) == set(epoch.validation_loss) == {"colour", "animal"}
    assert [e.seconds for e in run.epochs] == sorted(e.seconds for e in run.epochs)


def test_it_stops_when_validation_no_longer_improves_and_keeps_the_best(found):
    classifier, run = fitted(found, "uniform", epochs=60, patience=2)
    accuracies = [e.mean() for e in run.epochs]
    assert run.stopped == "2 epochs without a better one"
    assert len(run.epochs) == run.best_epoch + 2
    assert accuracies.index(max(accuracies)) + 1 == run.best_epoch
    scores = evaluate(classifier, found, "validation")
    assert {n: s.accuracy for n, s in scores.items()} == run.epochs[run.best_epoch - 1].validation_accuracy
    assert {n: s.loss for n, s in scores.items()} == run.epochs[run.best_epoch - 1].validation_loss
    assert not classifier.model.training


def test_a_loss_that_is_no_number_ends_the_run_with_what_was_learned(found):
    classifier = build_classifier(found, SMALL, dimension=16)
    rounds = rounds_per_epoch(found, 16)

    def spoil(stage, done, total):
        if done == rounds + 2:
            with torch.no_grad():
                classifier.model.heads[1].bias.fill_(math.nan)

    run = train(found, classifier, epochs=5, batch_size=16, progress=spoil)
    assert run.stopped == "in epoch 2 the loss of ['animal'] was no number; try a smaller lr"
    assert run.best_epoch == len(run.epochs) == 1
    assert bool(classifier.model.heads[1].bias.isfinite().all())
    with torch.no_grad():
        classifier.model.heads[0].bias.fill_(math.inf)
    with pytest.raises(ValueError, match=r"training gave nothing: in epoch 1 the loss of \['colour'\] was no number"):
        train(found, classifier, epochs=5)


def test_rows_come_round_without_leaving_an_example_out():
    stream = _rows(10, 15, torch.Generator().manual_seed(0))
    for _ in range(3):
        assert sorted(next(stream) for _ in range(5)) == [10, 11, 12, 13, 14]


def test_with_a_prior_of_sizes_no_task_is_repeated_in_an_epoch(tmp_path):
    found = tasks(tmp_path, animals=60)
    sizes = [float(len(t.train)) for t in found]
    classifier = build_classifier(found, SMALL, dimension=16)
    weighting = weighting_for("bandit", classifier, rounds_per_epoch=1, prior=sizes)
    assert weighting.rho == pytest.approx(0.1 * math.log(sum(sizes) / min(sizes)))
    run = train(found, classifier, weighting, epochs=2, batch_size=8)
    assert weighting.updates == 2 * math.ceil(sum(sizes) / 16)
    shares = [weighting.metrics()[f"share/{t.name}"] for t in found]
    assert shares == pytest.approx([n / sum(sizes) for n in sizes], abs=0.02)
    assert all(math.isfinite(x) for e in run.epochs for x in e.train_loss.values())
    assert weighting_for("bandit", classifier, rounds_per_epoch=1, rho="50%").rho == pytest.approx(0.5 * math.log(2))
    with pytest.raises(ValueError, match="min_effective_tasks counts from the uniform prior"):
        weighting_for("bandit", classifier, rounds_per_epoch=1, prior=sizes, min_effective_tasks=1.5)


@pytest.mark.parametrize(("prior", "same"), [({"animal": 1.0, "colour": 3.0}, [3, 1]), (torch.tensor([3, 1]), [3, 1])])
def test_a_prior_trains_the_same_in_every_form(found, prior, same):
    def history(given):
        weighting = BanditMTL(["colour", "animal"], rho=0.1, prior=given)
        return train(found, build_classifier(found, SMALL, dimension=16), weighting, epochs=1, batch_size=16).rounds

    assert history(prior) == history(same)


@pytest.mark.parametrize("prior", ["proportional", "sqrt", 2.0])
def test_a_prior_that_follows_the_batches_is_refused_where_the_batches_follow_the_prior(found, prior):
    weighting = BanditMTL(["colour", "animal"], rho=0.1, prior=prior)
    with pytest.raises(ValueError, match=r"prior=.* follows the rows of the batches.*give a number per task"):
        train(found, build_classifier(found, SMALL, dimension=16), weighting, epochs=1, batch_size=16)


def test_scores_are_scikit_learns(found):
    from sklearn.metrics import classification_report, matthews_corrcoef

    classifier = build_classifier(found, SMALL, dimension=16, seed=1)
    held = found[1].test
    score = evaluate(classifier, found[1:2])["animal"]
    said = [p.label for p in classifier.predict("animal", held.texts)]
    report = classification_report(held.labels, said, output_dict=True, zero_division=0.0)
    assert score.figures["macro-f1"] == pytest.approx(report["macro avg"]["f1-score"])
    assert score.figures["mcc"] == pytest.approx(matthews_corrcoef(held.labels, said))
    for label, row in score.classes.items():
        told = [report[label][k] for k in ("precision", "recall", "f1-score", "support")]
        assert list(row.values()) == pytest.approx(told)


def test_the_figure_that_is_asked_for_picks_the_epoch(found):
    classifier = build_classifier(found, SMALL, dimension=16)
    run = train(found, classifier, epochs=4, batch_size=16, lr=3e-3, pick="loss")
    means = [e.mean("loss") for e in run.epochs]
    assert run.best_epoch == 1 + means.index(min(means))
    assert all(e.mean("mcc") <= 1.0 for e in run.epochs)
    with pytest.raises(ValueError, match=r"pick: expected one of accuracy, macro-f1, micro-f1, .*, found 'f1'"):
        train(found, classifier, pick="f1")


def test_a_rare_task_is_in_every_round(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "EVERY", 1)
    found = tasks(tmp_path, animals=60)
    _, run = fitted(found, "uniform", epochs=1, batch_size=64)
    assert all({"loss/colour", "loss/animal"} <= set(r) for r in run.rounds)


def test_settings_of_the_weightings(found):
    classifier = build_classifier(found, SMALL, dimension=16)
    made = weighting_for("bandit", classifier, rounds_per_epoch=3, min_effective_tasks=1.5, eta=0.1)
    assert isinstance(made, BanditMTL)
    assert made.rho == pytest.approx(math.log(2 / 1.5))
    assert made.eta == 0.1
    mild = weighting_for("bandit", classifier, rounds_per_epoch=3)
    assert (mild.rho, mild.eta) == (pytest.approx(0.1 * math.log(2)), 0.2)
    assert weighting_for("bandit", classifier, rounds_per_epoch=3, rho=0.0).rho == 0.0
    with pytest.raises(ValueError, match=r"weighting: expected one of uniform, bandit, .* found 'bandits'"):
        weighting_for("bandits", classifier, rounds_per_epoch=3)
    with pytest.raises(ValueError, match="weighting uniform: expected no settings, found rho, eta"):
        weighting_for("uniform", classifier, rounds_per_epoch=3, rho=0.1, eta=0.1)
    with pytest.raises(ValueError, match="weighting groupdro: expected eta, found normalize"):
        weighting_for("groupdro", classifier, rounds_per_epoch=3, normalize=True)


def test_parameters_of_a_weighting_are_trained(found):
    weighting = UncertaintyWeighting([t.name for t in found])
    fitted(found, weighting, epochs=1)
    assert float(weighting.log_variance_M.detach().abs().min()) > 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "expected at least 1"),
        ({"patience": 0}, "expected at least 1"),
        ({"rounds": 0}, "rounds: expected at least 1, found 0"),
        ({"batch_size": 0, "rounds": 3}, "batch size: expected at least 1, found 0"),
        ({"lr": -1.0}, "lr: expected a positive number, found -1"),
        ({"weighting": Uniform(["colour", "other"])}, r"expected a weighting over \['colour', 'animal'\], found"),
    ],
)
def test_bad_settings(found, settings, message):
    with pytest.raises(ValueError, match=message):
        fitted(found, **settings)


def test_other_tasks_than_the_models(found, tmp_path):
    classifier = build_classifier(found, SMALL, dimension=16)
    with pytest.raises(ValueError, match=r"expected the classifier's tasks \['colour', 'animal'\]"):
        train(found[::-1], classifier)
    (tmp_path / "animal.test.csv").write_text("text,label\nhiss,snake\n")
    with pytest.raises(ValueError, match=r"task 'animal': expected the model's labels .*, found \['snake'\]"):
        evaluate(classifier, read_tasks(tmp_path, need=["test"]))
    (tmp_path / "plant.test.csv").write_text("text,label\nleaf,oak\n")
    with pytest.raises(KeyError, match="found 'plant'"):
        evaluate(classifier, read_tasks(tmp_path, tasks=["plant"], need=["test"]))
    with pytest.raises(ValueError, match="expected examples for train, found none"):
        evaluate(classifier, read_tasks(tmp_path, tasks=["plant"], need=["test"]), "train")


def test_it_learns_the_real_reviews(data):
    found = layouts.read_tasks(data / "sentiment-reviews", "fdu-mtl", tasks=["books", "kitchen_housewares"])
    vectors = data / "glove-50d" / "glove.6B.50d.subset.txt.gz"
    classifier = build_classifier(found, Design("textcnn", width=16, max_tokens=64), vectors=vectors)
    before = mean_accuracy(classifier, found)
    train(found, classifier, epochs=5, lr=3e-3)
    assert mean_accuracy(classifier, found) > max(before + 0.05, 0.62)
