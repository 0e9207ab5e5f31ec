"""The commands: train, evaluate and predict, as a user types them."""

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from counterpoise.cli.multitask import app

from .worlds import write_folder, write_kinds

QUICK = ["--epochs", "6", "--width", "8", "--lr", "0.01", "--batch-size", "16", "--dimension", "16", "--quiet"]


def call(*arguments, text=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data folder, the model trained on it, and what the command printed."""
    folder = tmp_path_factory.mktemp("run")
    data = write_folder(folder / "data")
    settings = ["--weighting", "bandit", "--min-effective-tasks", "1.5", "--eta", "0.5", "--seed", "3"]
    result = call("train", "--data", data, "--tasks", "colour, animal", *settings, *QUICK, "-o", folder / "model")
    assert result.exit_code == 0, result.output
    return data, folder / "model", result.stdout


def test_training_prints_its_scores_and_leaves_its_history(trained):
    data, model, printed = trained
    assert printed.startswith("best epoch ")
    assert printed.rstrip().endswith(f"wrote {model}; the run as a page: {model / 'report.html'}")
    record = json.loads((model / "training.json").read_text())
    assert record["weighting"] == "bandit"
    assert record["min_effective_tasks"] == 1.5
    assert record["seed"] == 3
    assert record["data"] == str(data)
    assert sum(map(sum, record["examples"].values())) == 400
    assert set(record["test"]) == {"colour", "animal"}
    assert len(record["epochs"]) >= record["best_epoch"] >= 1
    assert record["rounds"][0]["weight/colour"] <= 1.0


def test_evaluate_gives_the_scores_of_training(trained):
    data, model, printed = trained
    table = call("evaluate", model, "--data", data).stdout
    assert table in printed
    assert [line.split()[0] for line in table.splitlines()] == ["task", "colour", "animal", "mean", "worst"]
    found, quiet = (call("evaluate", model, "--data", data, "--tasks", "animal", "--json", *q) for q in ((), ("-q",)))
    assert (found.stderr, quiet.stderr) == ("device: cpu\n", "")
    [score] = json.loads(quiet.stdout)
    assert score["task"] == "animal"
    assert score["accuracy"] == json.loads((model / "training.json").read_text())["test"]["animal"]["accuracy"]


def test_predict_a_text_and_lines_from_stdin(trained):
    _, model, _ = trained
    result = call("predict", model, "--task", "colour", "the sea and the sky")
    task, label, probability = result.stdout.rstrip("\n").split("\t")
    assert (task, label) == ("colour", "blue")
    assert 0.5 < float(probability) <= 1.0
    lines = call("predict", model, "--task", "animal", text="they had milk\nthis bone\n\n").stdout.splitlines()
    assert [line.split("\t")[:2] for line in lines[:2]] == [["animal", "cow"], ["animal", "dog"]]
    assert len(lines) == 3
    answer = json.loads(call("predict", model, "--task", "animal", "--json", "they had milk").stdout)
    assert answer["label"] == "cow"
    assert answer["probability"] == max(answer["all"].values())
    assert sum(answer["all"].values()) == pytest.approx(1.0)


def asking(model) -> list[str]:
    """The command that answers lines from stdin, in a process of its own."""
    command = [sys.executable, "-m", "counterpoise", "multitask", "predict", str(model), "--task", "colour"]
    return [*command, "--device", "cpu"]


def test_an_answer_does_not_wait_for_the_last_line(trained):
    read, write = os.pipe()
    command = asking(trained[1])
    with subprocess.Popen(command, stdin=read, stdout=subprocess.PIPE, text=True) as asked:
        for text, label in (("the sea and the sky", "blue"), ("the sky", "blue")):
            os.write(write, f"{text}\n".encode())
            assert asked.stdout.readline().split("\t")[:2] == ["colour", label]  # the pipe is still open
        os.close(write)
        assert asked.wait() == 0


@pytest.mark.parametrize("ends", [True, False])
def test_a_reader_that_has_enough_ends_it_quietly(trained, ends):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(asking(trained[1]), **pipes) as asked:
        asked.stdin.write(b"the sea\n")
        asked.stdin.flush()
        assert asked.stdout.readline().startswith(b"colour\tblue")
        asked.stdout.close()
        asked.stdin.write(b"the sea\n" * 100)
        asked.stdin.flush()
        if ends:
            asked.stdin.close()
        assert asked.wait() == 128 + 13
        assert asked.stderr.read() == b""


def test_what_is_wrong_in_a_line_is_said_after_the_answers_before_it_and_ends_it(trained):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(asking(trained[1]), **pipes) as asked:
        asked.stdin.write(b"the sea\nthe sky\ncaf\xe9\nthe sea\n")
        asked.stdin.flush()  # and it stays open: Python must not wait for a thread that reads it
        assert [line.split(b"\t")[1] for line in asked.stdout] == [b"blue", b"blue"]
        assert asked.wait() == 1
        assert b"stdin, line 3: expected UTF-8" in asked.stderr.read()


def test_lines_are_utf8_whatever_the_locale(trained):
    command = asking(trained[1])
    text = "\ufeffthe s\u00eba\n".encode()
    for locale in ("C.UTF-8", "POSIX"):
        how = {"env": os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0"}, "capture_output": True, "check": False}
        told = subprocess.run(command, input=text + b"caf\xe9\n", **how)
        assert told.returncode == 1
        assert told.stderr.decode().strip() == (
            "error: stdin, line 2: expected UTF-8, found the bytes b'\\xe9'; convert it first"
        )


def test_the_run_is_a_page(trained):
    _, model, _ = trained
    page = (model / "report.html").read_text()
    record = json.loads((model / "training.json").read_text())
    for figure in ("accuracies", "curves", "weights", "variance"):
        assert f'data-figure="{figure}"' in page
    assert f"{100 * record['test']['colour']['accuracy']:.1f}" in page
    assert {"python", "torch"} <= set(record["versions"])
    assert record["model"] == "textcnn"


def test_the_folder_is_absent_or_whole_whenever_a_kill_may_come(trained, tmp_path):
    """What stands at OUT is looked at before every file that is opened, made, renamed or removed."""
    data, model, found, watching = trained[0], tmp_path / "model", [], [True]

    def look(event, arguments):
        if watching and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            watching.clear()  # looking opens the folder
            found.append(sorted(os.listdir(model)) if model.exists() else [])
            watching.append(True)

    sys.addaudithook(look)  # there is no way to take it out again
    try:
        assert call("train", "--data", data, *QUICK, "-o", model).exit_code == 0
    finally:
        watching.clear()
    whole = ["config.json", "model.safetensors", "report.html", "training.json", "vocabulary.json"]
    assert sorted(os.listdir(model)) == whole
    assert [x for x in found if x not in ([], whole)] == []
    assert [] in found
    assert whole in found


def refused(result, message):
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_errors_are_one_message(trained, tmp_path):
    data, model, _ = trained
    refused(call("predict", model, "--task", "colours", "x"), "error: the model's tasks are ['colour', 'animal']")
    refused(call("predict", tmp_path, "--task", "colour", "x"), "expected a folder that `counterpoise multitask train`")
    refused(call("predict", model, "--task", "colour", text=""), "expected a text, or texts on stdin")
    for one in (("predict", model, "--task", "colour", "x"), ("evaluate", model, "--data", data)):
        refused(call(*one, "--batch-size", 0), "should be greater than or equal to 1")
    share = call("train", "--data", data, "--weighting", "bandit", "--rho", "a lot", *QUICK, "-o", tmp_path / "m")
    refused(share, "rho must be a number or a share of log(1 / min prior) below 100 %, such as \"30%\", found 'a lot'")
    alone = call("train", "--data", data, "--tasks", "colour", "--weighting", "bandit", *QUICK, "-o", tmp_path / "m")
    refused(alone, "weighs tasks against each other: expected at least 2, found 1; one needs uniform weights alone.")
    refused(
        call("evaluate", model, "--data", data, "--part", "dev"), "'dev' is not one of 'test', 'validation', 'train'"
    )
    refused(call("train", "--data", data, *QUICK, "-o", model), "expected a new or empty folder")
    refused(call("train", "--data", data, "--tasks", "film", *QUICK, "-o", tmp_path / "m"), "found ['film']")
    wrong = ["--weighting", "uniform", "--eta", "1"]
    refused(call("train", "--data", data, *wrong, *QUICK, "-o", tmp_path / "m"), "expected no settings, found eta")
    nowhere = ["--device", "mtia:3"]
    refused(call("train", "--data", data, *nowhere, *QUICK, "-o", tmp_path / "m"), "device: expected cpu or a device")
    refused(call("evaluate", model, "--data", data, *nowhere), "found 'mtia:3'")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "film.csv").write_bytes(b"\n")
    empty = call("train", "--data", tmp_path / "empty", *QUICK, "-o", tmp_path / "m")
    refused(empty, "film.csv: expected rows with text and label, found none; fill the file or leave it out")
    assert not (tmp_path / "m").exists()


def test_help_imports_nothing_of_the_work():
    code = "import sys, counterpoise.cli.multitask; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    assert not {"transformers", "safetensors", "counterpoise.classification.models"} & set(modules)


def test_pairs_numbers_and_several_labels_from_the_command_line(tmp_path):
    data = write_kinds(tmp_path / "data", count=60)
    (tmp_path / "weights.json").write_text('{"pairs": {"same": 3}}')
    result = call(
        "train",
        "--data",
        data,
        "--class-weights",
        tmp_path / "weights.json",
        "--pick",
        "spearman",
        *QUICK,
        "-o",
        tmp_path / "m",
    )
    assert result.exit_code == 0, result.output
    heads = "accuracy macro-F1 MCC P+S / 2 Pearson Spearman micro-F1 exact loss examples"
    assert heads in " ".join(result.stdout.split())
    rows = json.loads(call("evaluate", tmp_path / "m", "--data", data, "--json").stdout)
    assert [("accuracy" in r, "pearson" in r, "micro_f1" in r) for r in rows] == [
        (True, False, False), (False, True, False), (False, False, True),
    ]  # fmt: skip
    assert json.loads((tmp_path / "m" / "training.json").read_text())["test"]["topics"] == {
        k: v for k, v in rows[2].items() if k != "task"
    }
    page = (tmp_path / "m" / "report.html").read_text()
    assert "Score, task by task" in page
    shown = f"{100 * rows[2]['macro_f1']:.1f}"
    told = next(line for line in re.split("<tr", page) if "topics</t" in line)
    assert re.findall(r">([\d.]+)<", told)[2] == shown  # after what it was trained on, and its validation
    assert "nats" not in re.sub("<script.*?</script>", "", page, flags=re.S)
    alone = call("predict", tmp_path / "m", "--task", "pairs", "the rose", "a rose").stdout
    assert call("predict", tmp_path / "m", "--task", "pairs", text="the rose\ta rose\n").stdout == alone
    typed = call("predict", tmp_path / "m", "--task", "pairs", text="the rose\ta rose\n7\tthe rose\ta rose\n")
    assert typed.stdout == alone
    refused(typed, "error: stdin, line 2: task 'pairs': expected two texts at a time")
    refused(
        call("predict", tmp_path / "m", "--task", "pairs", "the rose"),
        "expected two texts at a time, a tuple (in a line, a tab between them), found",
    )
    task, number = call("predict", tmp_path / "m", "--task", "stars", "the rose").stdout.split()
    assert (task, float(number) > 0) == ("stars", True)
    told = json.loads(call("predict", tmp_path / "m", "--task", "topics", "--json", "the rose").stdout)
    assert told["labels"] == [label for label, p in told["all"].items() if p > 0.5]
    both = ("--regression", "stars", "--classes", "pairs,stars")
    refused(call("train", "--data", data, *both, *QUICK, "-o", tmp_path / "n"), "found 'stars' in two")
    refused(call("predict", tmp_path / "m", "--task", "stars", "caf\udce9"), "expected one text at a time")
    refused(call("export", tmp_path / "m", "-o", tmp_path / "out"), "found textcnn; train with --model ENCODER")
    refused(
        call("train", "--data", data, "--class-weights", "some", *QUICK, "-o", tmp_path / "n"),
        "--class-weights: expected balanced, or a json file",
    )


def test_a_small_task_that_comes_often_is_said_and_a_prior_of_sizes_shows_each_row_once(tmp_path):
    data = write_folder(tmp_path / "data", colours=600, animals=40)
    quick = [*QUICK[:-1], "--epochs", "1"]  # not quiet
    shown = call("train", "--data", data, *quick, "-o", tmp_path / "m").stderr
    assert "note: an epoch shows animal 1" in shown
    rounds = call("train", "--data", data, *quick, "--batch-size", 1000, "-o", tmp_path / "o").stderr
    assert "note:" not in rounds  # one round, in which each row is once
    shown = call("train", "--data", data, *quick, "--prior", "proportional", "-o", tmp_path / "n").stderr
    assert "note:" not in shown


TWO = "text,label,rude,title,grade\n" + "".join(
    f"{'good' if i % 3 else 'bad'} text {i},{i % 2},{i // 3 % 2},{'rose' if i // 3 % 2 else 'sea'} {i},{i % 4}\n"
    for i in range(240)
)


@pytest.mark.parametrize(
    "options",
    [
        "--label-columns rude",
        "--text-columns title --label-columns rude",
        "--text-columns text,title",
        "--label-columns label,rude",
        "--label-columns grade --regression a",
    ],
)
@pytest.mark.parametrize("name", ["a", "a,b"])
def test_what_training_read_is_what_an_evaluation_reads(tmp_path, options, name):
    if "regression" in options and name == "a,b":
        pytest.skip("an option names tasks with commas between them")
    data = tmp_path / "data"
    data.mkdir()
    (data / f"{name}.csv").write_text(TWO)
    (data / "c.tsv").write_text(TWO.replace(",", "\t"))
    trained = call("train", "--data", data, *options.split(), *QUICK, "-o", tmp_path / "m")
    assert trained.exit_code == 0, trained.output
    found = call("evaluate", tmp_path / "m", "--data", data)
    assert found.exit_code == 0, found.output
    assert found.stdout in trained.stdout


def test_glue_is_read_as_glue_again(tmp_path):
    for part, count in (("train", 90), ("dev", 30)):
        place = tmp_path / "glue" / "SST-2" / f"{part}.tsv"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(
            "sentence\tlabel\n" + "".join(f"{'rose sea'.split()[i % 2]} {i % 9}\t{i % 2}\n" for i in range(count))
        )
    call("train", "--data", tmp_path / "glue", "--layout", "glue", *QUICK, "-o", tmp_path / "m")
    [row] = json.loads(call("evaluate", tmp_path / "m", "--data", tmp_path / "glue", "--json").stdout)
    assert row["examples"] == 30


def test_one_task_needs_no_option_and_new_rows_are_all_scored_when_asked(tmp_path):
    data, new = tmp_path / "films", tmp_path / "new"
    data.mkdir()
    (data / "train.csv").write_text(TWO)
    trained = call("train", "--data", data, *QUICK[:-1], "-o", tmp_path / "m")
    assert trained.exit_code == 0, trained.output
    assert json.loads((tmp_path / "m" / "training.json").read_text())["weighting"] == "uniform"
    new.mkdir()
    (new / "films.csv").write_text(TWO)
    some = call("evaluate", tmp_path / "m", "--data", new)
    assert re.search(r"note: films: \d+ of 240 rows, those for a test; --part all takes every one", some.stderr)
    [row] = json.loads(call("evaluate", tmp_path / "m", "--data", new, "--part", "all", "--json").stdout)
    assert row["examples"] == 240
    for setting in (("--rho", "0.1"), ("--prior", "sqrt"), ("--eta", "0.3")):
        refused(
            call("train", "--data", data, *setting, *QUICK, "-o", tmp_path / "n"),
            "BanditMTL weighs tasks against each other: expected at least 2, found 1; one needs uniform weights alone",
        )


def test_a_task_without_rows_for_a_test_is_named(tmp_path, recwarn):
    data = write_folder(tmp_path / "data")
    (data / "small.train.csv").write_text("text,label\nthe rose,red\nthe sea,blue\nrose,red\nsea,blue\n")
    (data / "small.dev.csv").write_text("text,label\nrose,red\n")
    (data / "small.csv").unlink(missing_ok=True)
    result = call("train", "--data", data, *QUICK[:-1], "-o", tmp_path / "m")
    evaluated = call("evaluate", tmp_path / "m", "--data", data)
    assert result.exit_code == 0, result.output
    small = json.loads((tmp_path / "m" / "training.json").read_text())["examples"]["small"]
    assert small == [4, 1, 0]
    said = [str(w.message) for w in recwarn]
    assert "task 'small': the best epoch is picked by 1 rows of validation; give it more" in said
    assert "task 'small': 1 of 1 texts for validation also stand in training, and tell of recall" in said
    assert said.count("small has no rows for test, and is left out of the table") == 2
    for told in (result, evaluated):
        assert "colour" in told.stdout
        assert "small" not in told.stdout
    refused(
        call("evaluate", tmp_path / "m", "--data", data, "--tasks", "small"), "expected examples for test, found none"
    )


def test_the_figure_that_picks_is_the_one_that_is_told(tmp_path):
    data = write_folder(tmp_path / "data")
    told = call("train", "--data", data, "--pick", "macro-f1", *QUICK, "-o", tmp_path / "m").stdout
    run = json.loads((tmp_path / "m" / "training.json").read_text())
    figures = run["epochs"][run["best_epoch"] - 1]["validation"].values()
    assert f"validation macro-F1 {100 * sum(x['macro-f1'] for x in figures) / 2:.2f} %, task variance" in told
    page = re.sub("<script.*?</script>", "", (tmp_path / "m" / "report.html").read_text(), flags=re.S)
    assert f"Mean macro-F1 {50 * sum(x['macro_f1'] for x in run['test'].values()):.1f}" in page
    blue = run["test"]["colour"]["classes"]["blue"]
    row = next(line for line in page.split("<tr") if ">blue<" in line)
    assert re.findall(r">([\d.]+)<", row) == [f"{100 * blue[x]:.1f}" for x in ("precision", "recall", "f1")] + [
        f"{blue['examples']:.0f}"
    ]
    assert "macro-f1" in page[page.index("Picked by") :]
    mean = next(line.split() for line in told.splitlines() if line.startswith("mean"))
    for at, name in ((1, "accuracy"), (3, "macro_f1")):
        assert mean[at] == f"{50 * sum(x[name] for x in run['test'].values()):.2f}"
