"""Exported folders: AutoModelForSequenceClassification gives the same answers, for every kind of task."""

import pytest
import torch

from counterpoise.classification import Design, build_classifier, export, load, read_tasks, save, train

from .test_saving import design
from .worlds import encoder_of_pairs, tasks, write_kinds


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return read_tasks(write_kinds(tmp_path_factory.mktemp("kinds"), count=60))


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "llama"])
def test_transformers_gives_the_same_answers(found, tmp_path, family):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    encoder = encoder_of_pairs(tmp_path / "encoder", family)
    classifier = build_classifier(found, Design(str(encoder), max_tokens=64, dropout=0.1))
    train(found, classifier, epochs=1, lr=3e-3)
    classifier = load(save(classifier, tmp_path / "model"))
    for folder, task in zip(export(classifier, tmp_path / "out"), found, strict=True):
        target = classifier.targets[task.name]
        model, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        assert list(model.config.id2label.values()) == list(task.labels)
        kinds = {
            "classes": "single_label_classification",
            "labels": "multi_label_classification",
            "number": "regression",
        }
        assert model.config.problem_type == kinds[task.kind]
        # One is cut, and one has an empty second text.
        more = [("the sea " * 9, "bone"), ("the sea", "")] if target.pair else ["the sea " * 12]
        texts = [*task.test.texts, *more]
        given = list(zip(*texts, strict=True)) if target.pair else [texts]
        batch = tokenizer(*map(list, given), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            logits_NC = model.eval()(**batch).logits.double()
        kind = {"classes": logits_NC.softmax(1), "labels": logits_NC.sigmoid(), "number": logits_NC}
        ours = classifier.probabilities(task.name, texts)
        torch.testing.assert_close(kind[task.kind], ours, rtol=1e-5, atol=1e-6)
        assert float(ours.std(dim=0).max()) > 1e-4
    if family == "bert":  # the second text has a type of its own
        types = tokenizer("a", "b")["token_type_ids"]
        assert types == [0, 0, 0, 1, 1]
        one, other = (classifier.encode([("a b", "c")]).ids_NT, classifier.encode([("a b", "c")[::-1]]).ids_NT)
        assert not torch.equal(one, other)


def test_a_pipeline_gives_the_labels(found, tmp_path):
    from transformers import pipeline

    classifier = build_classifier(found, Design(str(encoder_of_pairs(tmp_path / "bert", "bert")), max_tokens=64))
    [folder] = export(classifier, tmp_path / "out", ["topics"])
    [row] = pipeline("text-classification", model=str(folder), top_k=None)(["the sea and a bone"])
    ours = dict(
        zip(found[2].labels, classifier.probabilities("topics", ["the sea and a bone"])[0].tolist(), strict=True)
    )
    assert {x["label"]: x["score"] for x in row} == pytest.approx(ours, rel=1e-5)


def test_what_no_class_of_transformers_holds_is_refused(tmp_path):
    from transformers import AutoModel, T5Config

    from tiny import tokenizer

    made = tasks(tmp_path / "data", colours=80, animals=60)
    classifier = build_classifier(made, design("textcnn", tmp_path), dimension=8)
    with pytest.raises(
        ValueError, match=r"export: expected a model on a transformers encoder .*, found textcnn; train with"
    ):
        export(classifier, tmp_path / "out")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1, "vocab_size": 64}
    AutoModel.from_config(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    classifier = build_classifier(made, Design(str(tmp_path / "t5"), max_tokens=20))
    with pytest.raises(ValueError, match="with the mean of its last states"):
        export(classifier, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_pads_on_the_left_gives_the_same_answers_in_a_batch(tmp_path):
    from transformers import AutoTokenizer, pipeline

    folder = encoder_of_pairs(tmp_path / "bert", "bert")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.save_pretrained(folder)
    classifier = build_classifier(tasks(tmp_path / "data"), Design(str(folder), max_tokens=64))
    out, *_ = export(classifier, tmp_path / "out", ["colour"])
    texts = ["the sea", "the rose and the sea and a bone and the rose"]
    found = pipeline("text-classification", model=str(out), batch_size=2)(texts)
    ours = classifier.predict("colour", texts)
    assert [(x["label"], pytest.approx(x["score"], abs=1e-6)) for x in found] == [
        (x.label, x.probability) for x in ours
    ]
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
