"""A saved folder: the same predictions in another process, bit for bit; whole or not at all."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from counterpoise.classification import Design, build_classifier, load, read_tasks, save, train

from .worlds import tasks, tiny_encoder, write_folder

READ = """
import sys, torch
torch.set_num_threads(1)
from counterpoise.classification import load
classifier = load(sys.argv[1])
texts = torch.load(sys.argv[2], weights_only=True)
torch.save({t: classifier.probabilities(t, texts) for t in classifier.tasks}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return tasks(tmp_path_factory.mktemp("data"), colours=80, animals=60)


def design(kind, tmp_path):
    if kind == "bert":
        return Design(str(tiny_encoder(tmp_path / "bert")), max_tokens=40)
    return Design(kind, width=6, max_tokens=16)


@pytest.mark.parametrize("kind", ["textcnn", "bert"])
def test_a_fresh_process_gives_the_same_bits(found, tmp_path, kind):
    classifier = build_classifier(found, design(kind, tmp_path), dimension=8)
    train(found, classifier, epochs=1)
    texts = [*found[0].test.texts, *found[1].test.texts, "", "nothing known here \U0001f600"]
    save(classifier, tmp_path / "model", {"seed": 0})
    if kind == "bert":
        (tmp_path / "bert").rename(tmp_path / "gone")  # the folder needs nothing from where the encoder came
    torch.save(texts, tmp_path / "texts.pt")
    paths = [str(tmp_path / name) for name in ("model", "texts.pt", "found.pt")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", READ, *paths], check=True, env=environment)
    again = torch.load(tmp_path / "found.pt", weights_only=True)
    for task in classifier.tasks:
        assert torch.equal(classifier.probabilities(task, texts), again[task])


def test_the_encoder_of_an_encoder_decoder_comes_back(found, tmp_path):
    from transformers import AutoModel, T5Config

    from tiny import tokenizer

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1, "vocab_size": 64}
    AutoModel.from_config(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    classifier = build_classifier(found, Design(str(tmp_path / "t5"), max_tokens=20))
    again = load(save(classifier, tmp_path / "model"))
    texts = found[0].test.texts
    assert torch.equal(classifier.probabilities("colour", texts), again.probabilities("colour", texts))


def test_what_is_in_the_folder(found, tmp_path):
    classifier = build_classifier(found, design("textcnn", tmp_path), dimension=8)
    save(classifier, tmp_path / "model", {"seed": 7})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tasks"] == [
        {"name": name, "labels": labels, "kind": "classes", "pair": False, "mean": 0.0, "scale": 1.0, "deviation": 0.0}
        for name, labels in (("colour", ["blue", "red"]), ("animal", ["cat", "cow", "dog"]))
    ]
    assert config["design"]["kernels"] == [3, 5, 7]
    assert json.loads((tmp_path / "model" / "training.json").read_text()) == {"seed": 7}
    words = json.loads((tmp_path / "model" / "vocabulary.json").read_text())
    assert tuple(words) == classifier.tokens.words
    loaded = load(tmp_path / "model")
    assert (loaded.tasks, loaded.design) == (classifier.tasks, classifier.design)


def test_predictions_are_the_largest_probabilities(found, tmp_path):
    classifier = build_classifier(found, design("textcnn", tmp_path), dimension=8)
    table_NC = classifier.probabilities("animal", found[1].test.texts)
    assert table_NC.sum(dim=1).tolist() == pytest.approx([1.0] * len(table_NC))
    for row, prediction in zip(table_NC, classifier.predict("animal", found[1].test.texts), strict=True):
        assert prediction.probability == float(row.max())
        assert prediction.label == classifier.tasks["animal"][int(row.argmax())]
    assert classifier.predict("animal", []) == []
    assert classifier.probabilities("animal", []).shape == (0, 3)
    with pytest.raises(KeyError, match=r"the model's tasks are \['colour', 'animal'\], found 'animals'"):
        classifier.predict("animals", ["x"])


def test_nothing_is_overwritten_and_nothing_half_written(found, tmp_path):
    classifier = build_classifier(found, design("textcnn", tmp_path), dimension=8)
    out = tmp_path / "model"
    with pytest.raises(TypeError):
        save(classifier, out, {"seed": object()})  # fails after the weights were written
    assert list(tmp_path.iterdir()) == []
    save(classifier, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="expected a new or empty folder, found a folder with content"):
        save(classifier, out)
    assert (out / "model.safetensors").read_bytes() == before


def test_folders_that_cannot_be_loaded(found, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder that `counterpoise multitask train` wrote"):
        load(tmp_path / "absent")
    out = save(build_classifier(found, design("textcnn", tmp_path), dimension=8), tmp_path / "model")
    words = json.loads((out / "vocabulary.json").read_text())
    (out / "vocabulary.json").write_text(json.dumps(words[1:]))
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the weights that config\.json describes"):
        load(out)
    (out / "vocabulary.json").write_text("[")
    with pytest.raises(ValueError, match=r"vocabulary\.json: expected json"):
        load(out)
    (out / "vocabulary.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocabulary\.json: expected this file beside config\.json"):
        load(out)
    (out / "vocabulary.json").write_text(json.dumps(words))
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the weights"):
        load(out)
    (out / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="expected the format counterpoise-multitask-text-1, found None"):
        load(out)


def test_a_model_of_words_that_were_split_otherwise_is_named(tmp_path):
    folder = write_folder(tmp_path / "data")
    (folder / "colour.csv").write_text((folder / "colour.csv").read_text().replace("sea", "\u6d77\u6d0b"))
    model = save(build_classifier(read_tasks(folder), "textcnn", dimension=4), tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model)
    config = json.loads((model / "config.json").read_text())
    del config["splitting"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="trained by an earlier version, which split words of some scripts otherwise"):
        load(model)


def test_a_weight_that_is_no_number_is_named(tmp_path):
    classifier = build_classifier(tasks(tmp_path / "data"), "textcnn", dimension=4)
    with torch.no_grad():
        classifier.model.heads[0].weight[0, 0] = float("nan")
    model = save(classifier, tmp_path / "model")
    with pytest.raises(ValueError, match=r"model.safetensors: .*heads.0.weight"):
        load(model)
