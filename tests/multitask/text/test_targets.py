"""Pairs of texts, numbers and several labels: read, trained on, scored, answered."""

import json
import warnings

import pytest
import torch
from torch.nn import functional as F

from counterpoise.classification import (
    Design,
    Target,
    Vocabulary,
    build_classifier,
    evaluate,
    load,
    read_tasks,
    save,
    tokenize,
    train,
    weighted,
)
from counterpoise.classification.files import Columns, read_rows

from .worlds import tasks, write_kinds

SMALL = Design("textcnn", width=16, dropout=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return read_tasks(write_kinds(tmp_path_factory.mktemp("kinds"), count=240))


@pytest.fixture(scope="module")
def trained(found):
    classifier = build_classifier(found, SMALL, dimension=16)
    return classifier, train(found, classifier, epochs=20, lr=0.01, batch_size=16, patience=20)


def test_what_is_asked_is_read_from_the_columns(found):
    pairs, stars, topics = found
    assert [t.kind for t in found] == ["classes", "number", "labels"]
    assert (pairs.labels, stars.labels, topics.labels) == (("other", "same"), ("score",), ("blue", "dog", "red"))
    assert [t.target().pair for t in found] == [True, False, False]
    assert all(len(x) == 2 for x in pairs.train.texts)
    assert all(isinstance(x, float) for x in stars.test.labels)
    assert any(y == () for y in topics.train.labels)


@pytest.mark.parametrize(
    ("name", "content", "columns", "expected"),
    [
        ("a.tsv", "#1 String\t#2 String\tQuality\na\tb\t1\n", {}, [(("a", "b"), "1")]),
        ("a.csv", "question1,question2,is_duplicate\na,b,0\n", {}, [(("a", "b"), "0")]),
        ("a.csv", "query,passage,grade\na,b,3\n", {"texts": ("query", "passage"), "labels": ("grade",)}, None),
        ("a.csv", "sentence,label\na,1.0\nb,0.0\n", {}, [("a", "1.0"), ("b", "0.0")]),
        ("a.CSV", "sentence,label\na,1.0\nb,-3\n", {}, [("a", "1.0"), ("b", "-3")]),
        ("a.csv", "text,label\na,1.0\nb,1.10\n", {"kind": "classes"}, [("a", "1.0"), ("b", "1.10")]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 1.0}\n', {}, [("a", "1"), ("b", "1.0")]),
        ("a.jsonl", '{"text": "a", "label": "1.0"}\n{"text": "b", "label": "2.0"}\n', {}, [("a", "1.0"), ("b", "2.0")]),
        ("a.csv", "text,label\na,007\nb,nan\nc,word\n", {}, [("a", "007"), ("b", "nan"), ("c", "word")]),
        ("a.csv", "text,labels\na,\"['joy', 'fun']\"\nb,[]\n", {}, [("a", ("joy", "fun")), ("b", ())]),
        (
            "a.csv",
            'text,tags\na,"[""joy"", ""\\ud83d\\ude00""]"\n',
            {"labels": ("tags",)},
            [("a", ("joy", "\U0001f600"))],
        ),
        ("a.csv", 'text,labels\na,"[""joy"", 3, 3]"\n', {}, [("a", ("joy", "3"))]),
        ("a.csv", 'text,label\na,"[0, 9]"\nb,"[10, 19]"\n', {}, [("a", "[0, 9]"), ("b", "[10, 19]")]),
        ("a.tsv", 'text\tlabels\na\t["a;b"]\nb\t["c"]\n', {}, [("a", ("a;b",)), ("b", ("c",))]),
        ("a.csv", "text,label\na,1\nb,inf\n", {}, [("a", "1"), ("b", "inf")]),
        ("a.csv", "text,label\na,1\nb,nan\n", {"kind": "classes"}, [("a", "1"), ("b", "nan")]),
        ("a.csv", "text,label\na,[NEG]\n", {}, [("a", "[NEG]")]),
        ("a.csv", "sentence,label\na,1\nb,0.5\n", {}, [("a", 1.0), ("b", 0.5)]),
        ("a.jsonl", '{"sentence": "a", "label": "3.5"}\n', {}, [("a", "3.5")]),
        ("a.jsonl", '{"sentence": "a", "score": 3}\n', {}, [("a", 3.0)]),
        ("a.csv", "text,label\na,4\n", {"kind": "number"}, [("a", 4.0)]),
        ("a.csv", 'text,labels\na,"x, y"\nb,\n', {}, [("a", ("x", "y")), ("b", ())]),
        ("a.csv", "text,rude,loud\na,1,0\nb,0,0\n", {"labels": ("rude", "loud")}, [("a", ("rude",)), ("b", ())]),
    ],
)
def test_columns_as_glue_and_others_name_them(name, content, columns, expected):
    assert read_rows(content.encode(), name, Columns(**columns)) == (expected or [(("a", "b"), "3")])


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", "text,label\na,1.5\nb,x\n", {}, "a.csv, line 3: expected a number, as this task's other labels"),
        ("a.csv", "text,rude,loud\na,1,2\n", {"labels": ("rude", "loud")}, "a.csv, line 2: expected 0 or 1 in loud"),
        (
            "a.tsv",
            "index\tsentence\n0\ta\n",
            {},
            r"expected the columns sentence, label, found .*leave out a file without",
        ),
        ("a.csv", "title,label\na,b\n", {"texts": ("body",)}, r"expected the columns body, label, found title, label"),
        ("a.jsonl", '{"text": "a", "label": ["x", 2.5]}', {}, "a.jsonl, line 1: expected a label, a word or a number"),
        (
            "a.jsonl",
            '{"text": "a", "labels": [1, 0, 0]}',
            {},
            "a.jsonl, line 1: expected the names of the labels that hold",
        ),
        ("a.csv", 'text,labels\na,"x,y"\nb,"0,1,0"\n', {}, "a.csv, line 3: expected the names of the labels that hold"),
        (
            "a.csv",
            """text,labels\na,['a' 'b']\n""",
            {},
            r"a.csv, line 2: expected labels in a list, or separated by commas",
        ),
        ("a.csv", "text,labels\na,[0 1]\n", {}, r"a.csv, line 2: expected labels in a list, .*, found '\[0 1\]'"),
        ("a.csv", "text,labels\na,x\nb,x;y\n", {}, "a.csv, line 3: expected labels separated by commas, found 'x;y'"),
        (
            "a.csv",
            "text,label\na,1.0\nb,nan\n",
            {},
            "a.csv, line 3: expected a label, as this file's other numbers are",
        ),
        ("a.csv", 'text,label\na,"x\ny"\n', {}, "a.csv, line 3: expected a label on one line and without tabs"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1, "score": 0.5}\n{"text": "b", "score": 0.9}',
            {},
            r"a.jsonl, line 2: expected the columns text, label, found text, score \(no label\)",
        ),
    ],
)
def test_columns_that_do_not_fit_are_named_with_their_line(name, content, columns, message):
    with pytest.raises(ValueError, match=message):
        read_rows(content.encode(), name, Columns(**columns))


def test_glue_as_published(tmp_path):
    files = {
        "CoLA/train.tsv": "gj04\t1\t\tA fine one.\ngj04\t0\t*\tOne a \"fine.\n" + "x\t1\t\tmore\n" * 3,
        "CoLA/dev.tsv": "gj04\t1\t\tStill fine.\n",
        "CoLA/test.tsv": "index\tsentence\n0\tNot told.\n",
        "STS-B/train.tsv": "index\tsentence1\tsentence2\tscore\n" + "".join(f"{i}\ta{i}\tb\t{i}\n" for i in range(9)),
        "STS-B/dev.tsv": "index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.400\n",
        "MNLI/train.tsv": "sentence1\tsentence2\tgold_label\n" + "".join(f"a{i}\tb\t{i % 2}\n" for i in range(9)),
        "MNLI/dev_matched.tsv": "sentence1\tsentence2\tgold_label\na\tb\t1\n",
        "MNLI/dev_mismatched.tsv": "sentence1\tsentence2\tgold_label\na\tb\t0\n",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    cola, mnli, stsb = read_tasks(tmp_path, "glue", need=["train", "test"])
    assert cola.test.texts == ("Still fine.",)
    assert {*cola.train.texts, *cola.validation.texts} == {"A fine one.", 'One a "fine.', "more"}
    assert mnli.test.labels == ("1",)
    assert (stsb.kind, stsb.test.labels, stsb.test.texts) == ("number", (2.4,), (("a", "b"),))
    short = (tmp_path / "MNLI/train.tsv").read_text() + "a row\tthat ends\n"
    (tmp_path / "MNLI/train.tsv").write_text(short)
    with pytest.warns(
        UserWarning, match=r"MNLI/train.tsv: 1 rows have fewer columns than the first line and were left out"
    ):
        assert read_tasks(tmp_path, "glue", tasks=["MNLI"], need=["train"])[0].train == mnli.train
    with pytest.raises(ValueError, match="layout glue: expected no columns"):
        read_tasks(tmp_path, "glue", label=["x"])


def test_files_of_a_task_may_stand_in_a_folder_of_its_name(tmp_path):
    (tmp_path / "rte").mkdir()
    for part in ("train", "dev", "test"):
        (tmp_path / "rte" / f"{part}.csv").write_text(f"text,label\n{part},1\nb,0\n")
    [task] = read_tasks(tmp_path)
    assert (task.name, task.validation.texts, task.test.texts) == ("rte", ("dev", "b"), ("test", "b"))


def test_columns_of_one_task_leave_the_others_theirs_and_a_name_that_no_file_has_is_refused(tmp_path):
    rows = "\n".join(f"a{i},{i % 2}" for i in range(60))
    (tmp_path / "plain.csv").write_text("sentence,label\n" + rows)
    (tmp_path / "odd.csv").write_text("body,grade\n" + rows)
    odd, plain = read_tasks(tmp_path, texts=["body"], label=["grade"])
    assert odd.test.texts == plain.test.texts
    (tmp_path / "odd.csv").write_text("body,label\n" + rows)
    with pytest.raises(ValueError, match="expected the columns grades in some file, found them in none together"):
        read_tasks(tmp_path, texts=["body"], label=["grades"])


def test_a_pair_is_cut_where_it_is_longer_and_keeps_its_boundary():
    words = Vocabulary(["<sep>", "a", "b"])
    assert tokenize(("a <sep>", "b")) == ["a", "<", "sep", ">", "<sep>", "b"]
    assert words.encode(("a a a a a", "b"), max_tokens=4) == [3, 3, 2, 4]
    assert words.encode(("a", "b b b b"), max_tokens=4) == [3, 2, 4, 4]
    assert words.encode(("a a a", "b b b"), max_tokens=5) == [3, 3, 2, 4, 4]


def test_all_kinds_are_learned_at_once_and_picked_by_their_figures(found, trained):
    classifier, run = trained
    scores = evaluate(classifier, found)
    assert scores["stars"].figures["pearson"] > 0.8
    assert scores["topics"].figures["macro-f1"] > 0.8
    best = run.epochs[run.best_epoch - 1]
    judged = {"pairs": "accuracy", "stars": "pearson-spearman", "topics": "macro-f1"}
    assert best.mean() == pytest.approx(sum(best.validation[t][name] for t, name in judged.items()) / 3)
    assert best.mean() == max(e.mean() for e in run.epochs)
    spearman = best.validation["stars"]["spearman"]
    others = best.validation["pairs"]["accuracy"] + best.validation["topics"]["macro-f1"]
    assert best.mean("spearman") == pytest.approx((spearman + others) / 3)


def test_scores_of_numbers_and_of_several_labels_are_scipys_and_scikit_learns(found, trained):
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, precision_score

    classifier, scores = trained[0], evaluate(trained[0], found)
    stars, topics = found[1].test, found[2].test
    said = classifier.probabilities("stars", stars.texts)[:, 0].numpy()
    assert scores["stars"].figures["pearson"] == pytest.approx(pearsonr(said, stars.labels).statistic)
    assert scores["stars"].figures["spearman"] == pytest.approx(spearmanr(said, stars.labels).statistic)
    variance = torch.tensor(found[1].train.labels, dtype=torch.float64).var(correction=0)
    error = (torch.from_numpy(said) - torch.tensor(stars.labels, dtype=torch.float64)).square().mean()
    assert scores["stars"].loss == pytest.approx(float(error / variance), rel=1e-5)
    held = [[label in row for label in found[2].labels] for row in topics.labels]
    answered = (classifier.probabilities("topics", topics.texts) > 0.5).tolist()
    figures = scores["topics"].figures
    for name, theirs in (("macro-f1", "macro"), ("micro-f1", "micro")):
        assert figures[name] == pytest.approx(f1_score(held, answered, average=theirs))
    assert figures["exact"] == pytest.approx(accuracy_score(held, answered))
    precisions = [row["precision"] for row in scores["topics"].classes.values()]
    assert precisions == pytest.approx(precision_score(held, answered, average=None).tolist())


def test_a_constant_answer_has_a_correlation_of_zero_and_no_label_at_all_an_f1_of_zero():
    number = Target(("score",), "number").score(torch.ones(4, 1).double(), torch.arange(4.0).reshape(4, 1))
    assert number.figures == {"pearson-spearman": 0.0, "pearson": 0.0, "spearman": 0.0}
    several = Target(("a", "b"), "labels").score(-torch.ones(3, 2).double(), torch.zeros(3, 2))
    assert several.figures == {"macro-f1": 0.0, "micro-f1": 0.0, "exact": 1.0}


def test_answers_say_their_kind_and_come_back_from_the_folder(found, trained, tmp_path):
    classifier = trained[0]
    again = load(save(classifier, tmp_path / "model"))
    assert again.targets == classifier.targets
    for task in found:
        texts = task.test.texts
        assert torch.equal(again.probabilities(task.name, texts), classifier.probabilities(task.name, texts))
    [many, none] = classifier.predict("topics", ["the rose and the sea", "it was of the"])
    assert many.label == "blue,red"
    assert none.label == ""
    [number] = classifier.predict("stars", ["rose sea bone the of"])
    assert number.probability is None
    assert float(number.label) == pytest.approx(3.5, abs=0.8)
    with pytest.raises(ValueError, match=r"task 'pairs': expected two texts at a time, a tuple .*, found 'alone'"):
        classifier.predict("pairs", ["alone"])
    with pytest.raises(ValueError, match="task 'stars': expected one text at a time"):
        classifier.predict("stars", [("a", "b")])


def test_class_weights_by_hand():
    logits, truth = torch.tensor([[0.3, -1.0], [2.0, 0.1], [0.0, 0.5], [1.0, 1.0]]), torch.tensor([0, 0, 0, 1])
    target = Target(("x", "y"))
    weights = torch.tensor(target.weights("t", "balanced", ["x", "x", "x", "y"]))
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    each = F.cross_entropy(logits, truth, reduction="none") * weights[truth]
    assert float(target.loss(logits, truth, weights)) == pytest.approx(float(each.mean()))
    halves = [target.loss(logits[i : i + 2], truth[i : i + 2], weights) for i in (0, 2)]
    assert float(sum(halves) / 2) == pytest.approx(float(each.mean()))  # small batches add up to the large one
    several = Target(("x", "y"), "labels")
    assert several.weights("t", "balanced", [("x",), (), ("y",), ("y",)]) == (3.0, 1.0)
    assert several.weights("t", "balanced", [("x",), ("x", "y")]) == (1.0, 1.0)  # x always holds: 0 would untrain it
    assert target.weights("t", {"t": {"y": 9}}, []) == (1.0, 9.0)
    assert target.weights("t", {"other": {"y": 9}}, []) == ()
    assert Target(("score",), "number").weights("t", "balanced", [1.0, 2.0]) == ()
    for wrong in ({"z": 1.0}, {"y": -1.0}, {"y": "much"}, 3):
        with pytest.raises(ValueError, match="class weights of 't': expected"):
            target.weights("t", {"t": wrong}, [])


def test_balanced_classes_find_more_of_a_rare_one(tmp_path):
    # A rose is of the rare class in one of three cases: without weights the better answer to it is 0, with them 1.
    lines = [f"n{i} {'sea' if i % 8 else 'rose'},{int(i % 24 == 0)}" for i in range(1200)]
    (tmp_path / "rare.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    found = read_tasks(tmp_path)
    recalls = {}
    for weights in (None, "balanced"):
        classifier = build_classifier(found, Design("textcnn", width=4, dropout=0.0, max_tokens=8), dimension=4)
        given = weighted(found, weights) if weights else found
        train(given, classifier, "uniform", epochs=2, lr=0.02, pick="loss")
        recalls[weights] = evaluate(classifier, found)["rare"].classes["1"]["recall"]
    assert recalls == {None: 0.0, "balanced": 1.0}


def test_weights_of_unknown_tasks_are_refused(tmp_path):
    found = tasks(tmp_path)
    with pytest.raises(
        ValueError, match=r"class weights: expected tasks among \['colour', 'animal'\], found \['colours'\]"
    ):
        weighted(found, {"colours": {"red": 2.0}})


def test_labels_of_the_wrong_kind_are_refused_in_an_evaluation(found, trained, tmp_path):
    (tmp_path / "stars.test.csv").write_text("text,label\nrose,high\n")
    with pytest.raises(ValueError, match="task 'stars': expected numbers for labels, found 'high'"):
        evaluate(trained[0], read_tasks(tmp_path, need=["test"]))
    (tmp_path / "stars.test.csv").write_text(
        "text,label\nrose,1\nrose sea,2\n"
    )  # whole numbers, the model knows better
    assert evaluate(trained[0], read_tasks(tmp_path, need=["test"]))["stars"].examples == 2
    for name, row in (("a", {"text": "x", "labels": ["p"]}), ("b", {"text": "x", "label": "p"})):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        part = "train" if name == "a" else "test"
        (tmp_path / "mixed" / f"m.{part}.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="task 'm': expected lists of labels in every row"):
        read_tasks(tmp_path / "mixed")


def test_numbers_that_are_all_the_same_are_said_and_not_divided_by():
    target = Target(("score",), "number")
    with pytest.warns(UserWarning, match=r"task 'stars': all its training labels are 3.3; nothing can be learned"):
        fitted = target.fitted("stars", [3.3] * 7, centred=True)
    assert fitted.scale == 1.0
    assert fitted.mean == pytest.approx(3.3)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("labels", [[1.0, 2.0, 4.5, 2.0], [2.7, 1.2, 4.9, 3.0], [1e15 + i for i in (1, 5, 2, 9)]])
def test_the_loss_of_a_number_is_in_variances_and_its_ranks_are_exact_whatever_the_head(labels, centred):
    from scipy.stats import spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if labels[0] > 1e9 else "error")
        target = Target(("score",), "number").fitted("t", labels, centred=centred)
    truth, values = target.encode("t", labels), torch.tensor(labels, dtype=torch.float64)
    said = truth + torch.tensor([[0.1], [-0.2], [0.05], [0.0]], dtype=torch.float64)
    score = target.score(said, truth)
    error = (target.answers(said)[:, 0] - values).square().mean() / values.var(correction=0)
    assert labels[0] > 1e9 or score.loss == pytest.approx(float(error), rel=1e-6)
    assert score.figures["spearman"] == pytest.approx(spearmanr(said[:, 0], labels).statistic)
    if centred:
        assert target.loss(torch.zeros(4, 1).double(), truth) == pytest.approx(1.0)


def test_a_head_without_bias_is_no_place_for_numbers_far_from_zero():
    with pytest.warns(UserWarning, match="the mean of its training labels is 1000 of their standard deviations"):
        Target(("score",), "number").fitted("t", [999.0, 1001.0], centred=False)


def test_a_number_is_told_to_a_part_of_its_spread():
    from types import SimpleNamespace

    from counterpoise.classification import TextClassifier

    target = Target(("score",), "number", mean=1.7e9, scale=3e4, deviation=3e4)
    asked = SimpleNamespace(task=str, tasks={"t": target.labels}, targets={"t": target})
    assert TextClassifier.prediction(asked, "t", [1_712_345_678.4]).label == "1712345678.4"
    assert TextClassifier.prediction(asked, "t", [0.0]).label == "0"


def test_balanced_weights_of_classes_that_are_numbers():
    assert Target(("0", "1")).weights("t", "balanced", [0, 0, 0, 1]) == Target(("0", "1")).weights(
        "t", "balanced", list("0001")
    )


@pytest.mark.parametrize("texts", ["good film", [None], [["a", "b"]], [3]])
def test_what_is_no_list_of_texts_is_refused(trained, texts):
    with pytest.raises(ValueError, match=r"expected several, in a list|expected one text at a time"):
        trained[0].predict("topics", texts)


def test_classes_of_one_value_are_one_class_however_they_are_spelled():
    target = Target(("0.0", "1.0"))  # of a model that was trained on them
    assert target.encode("t", ["1", "0.0", "0", "1.00"]).tolist() == [1, 0, 0, 1]
    assert Target(("1", "x")).encode("t", ["1.0", "x"]).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"expected the model's labels \['0.0', '1.0'\], found \['2'\]"):
        target.encode("t", ["2", "1"])
