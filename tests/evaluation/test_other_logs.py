"""Logs of Inspect and results files of counterpoise as the two sides of a tax."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterpoise.evaluation.log_tax import compare
from counterpoise.evaluation.logs import read_log
from counterpoise.evaluation.measurement import Measurement, Scores
from counterpoise.evaluation.results import Measured, results, write_results
from counterpoise.statistics.bootstrap import weighted


def tax(a: Path | str, b: Path | str) -> dict[str, Any]:
    return compare(read_log(str(a)), read_log(str(b), "POST"))


def rows(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["name"], r["metric"]): r for r in found["tax"]}


def inspect_run(folder: Path, right: int, form: str) -> Path:
    """What Inspect writes of a mock model that answers sums right in `right` of 8 cases, and choices by turns."""
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import choice, f1, match
    from inspect_ai.solver import generate, multiple_choice

    def said(text: str) -> Any:
        made = ModelOutput.from_content("mockllm/model", text)
        made.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return made

    sums = [Sample(input=f"What is {i} + 1?", target=str(i + 1)) for i in range(8)]
    picks = [Sample(input=f"Pick {i}", choices=["a", "b"], target="AB"[i % 2]) for i in range(4)]
    answers = [str(i + 1) if i < right else "?" for i in range(8)] + ["ANSWER: A"] * 8
    tasks = [
        inspect_ai.Task(dataset=sums, solver=generate(), scorer=[match(), f1()], name="sums", version=3),
        inspect_ai.Task(dataset=picks, solver=multiple_choice(), scorer=choice(), name="picks", epochs=2),
    ]
    settings = {"log_dir": str(folder), "log_format": form, "display": "none", "max_samples": 1, "max_tasks": 1}
    inspect_ai.eval(tasks, model=get_model("mockllm/model", custom_outputs=map(said, answers)), **settings)
    return folder


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inspect")
    return {f"{n}.{form}": inspect_run(folder / f"{n}.{form}", n, form) for n in (6, 2) for form in ("eval", "json")}


@pytest.mark.parametrize(("a", "b"), [("6.eval", "2.eval"), ("6.json", "2.json"), ("6.eval", "2.json")])
def test_inspects_logs_have_their_own_numbers_in_either_format(inspected: dict[str, Path], a: str, b: str) -> None:
    found = rows(tax(inspected[a], inspected[b]))
    sums, picks = found["sums", "match"], found["picks", "choice"]
    assert (sums["pre"]["value"], sums["post"]["value"], sums["items"], sums["unit"]) == (75, 25, 8, "%")
    assert sums["flips"]["lost"]["count"] == 4
    assert found["sums", "f1"]["tax"]["value"] == 50
    assert (picks["pre"]["value"], picks["items"]) == (50, 4)  # two epochs of each are one item
    assert sums["reported"] == {"pre": 0.75, "post": 0.25}


def rewritten(log: Path, out: Path, **changes: Any) -> Path:
    """A json log of Inspect with other values in its header."""
    file = next(log.glob("*sums*.json"))
    content = json.loads(file.read_text())
    content["eval"] |= changes.pop("eval", {})
    out.write_text(json.dumps({**content, **changes}))
    return out


def test_other_versions_and_shots_of_an_inspect_task_are_refused(inspected: dict[str, Path], tmp_path: Path) -> None:
    log = inspected["6.json"]
    with pytest.raises(ValueError, match=r"expected the same versions of a task.*sums \(3 in .*4 in"):
        tax(log, rewritten(log, tmp_path / "a.json", eval={"task_version": 4}))
    shots = [rewritten(log, tmp_path / f"{n}.json", eval={"task_args": {"fewshot": n}}) for n in (0, 5)]
    with pytest.raises(ValueError, match="expected the same numbers of few-shot examples"):
        tax(*shots)


def test_an_inspect_run_that_ended_early_says_so_and_a_reducer_that_is_no_mean_is_left_out(
    inspected: dict[str, Path], tmp_path: Path
) -> None:
    log = inspected["6.json"]
    found = tax(log, rewritten(log, tmp_path / "a.json", status="cancelled"))
    assert "a.json: its run ended with status 'cancelled'; what was scored counts." in found["notes"]
    scores = json.loads(next(log.glob("*sums*.json")).read_text())["results"]
    scores["scores"][0]["metrics"]["accuracy"]["value"] = 0.9
    found = tax(log, rewritten(log, tmp_path / "b.json", results=scores))
    assert "sums: match is left out: Inspect's own number is no mean over its samples and epochs." in found["notes"]
    assert ("sums", "match") not in rows(found)


def test_a_damaged_or_unfinished_eval_file_is_named(inspected: dict[str, Path], tmp_path: Path) -> None:
    whole = next(inspected["6.eval"].glob("*sums*.eval"))
    (tmp_path / "cut.eval").write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cut.eval: expected an Inspect log, found it damaged"):
        read_log(str(tmp_path / "cut.eval"))
    with zipfile.ZipFile(tmp_path / "begun.eval", "w") as begun:
        begun.writestr("_journal/start.json", "{}")
    with pytest.raises(ValueError, match=r"begun.eval: expected a finished Inspect log, found no header"):
        read_log(str(tmp_path / "begun.eval"))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python unpacks zstandard itself")
def test_a_log_that_this_python_cannot_unpack_says_what_can(
    inspected: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zipfile_zstd", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"found it compressed by zstandard; pip install zipfile-zstd"):
        read_log(str(inspected["6.eval"]))


@pytest.mark.parametrize("form", ["eval", "json"])
def test_inspects_grades_parts_and_unscored_samples(tmp_path: Path, form: str) -> None:
    """Written by hand in Inspect's format, so that it is read where Inspect is not installed."""

    def log(name: str, grades: str) -> Path:
        samples: list[dict[str, Any]] = []
        for i, grade in enumerate(grades):
            said = [{"id": f"{name}{i}", "role": "user", "content": f"q{i}"}, {"role": "assistant", "content": name}]
            scores = {} if grade == "-" else {"judge": {"value": grade}, "parts": {"value": {"a": i, "b": "yes"}}}
            samples.append({"id": i, "epoch": 1, "input": said[:1], "target": "t", "messages": said, "scores": scores})
        head = {"version": 2, "status": "success", "eval": {"task": "quiz", "task_version": 0, "created": "2026"}}
        file = tmp_path / f"{name}.{form}"
        if form == "json":
            file.write_text(json.dumps({**head, "samples": samples}))
            return file
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for sample in samples:
                packed.writestr(f"samples/{sample['id']}_epoch_1.json", json.dumps(sample))
            packed.writestr("header.json", json.dumps(head))
        return file

    found = tax(log("one", "CCCPI"), log("two", "CIN-C"))
    row = rows(found)["quiz", "judge"]
    assert (row["items"], row["pre"]["value"], row["post"]["value"]) == (4, 75, 50)
    assert row["flips"] == {**row["flips"], "p": 1.0}
    assert [row["flips"][k]["count"] for k in ("lost", "won")] == [2, 1]
    assert found["notes"] == [
        *(f"quiz: 1 of 5 items have no number for {m}; left out." for m in ("judge", "parts/a", "parts/b")),
        "Whether higher is better is not known: quiz parts/a; shown as if, and not counted.",
    ]
    assert rows(found)["quiz", "parts/a"]["tax"]["value"] == 0


def test_an_items_epochs_are_one_value(tmp_path: Path) -> None:
    grades = [("C", "I"), ("C", "C"), ("I", "I")]
    samples = [
        {"id": i, "epoch": e, "input": str(i), "target": "t", "scores": {"judge": {"value": grade}}}
        for e in (0, 1) for i, grade in enumerate(g[e] for g in grades)
    ]  # fmt: skip
    content = {"status": "success", "eval": {"task": "quiz"}, "samples": samples}
    (tmp_path / "a.json").write_text(json.dumps(content))
    row = rows(tax(tmp_path / "a.json", tmp_path / "a.json"))["quiz", "judge"]
    assert (row["items"], row["pre"]["value"], row["flips"]) == (3, 0.5, None)


def own(folder: Path, groups: tuple[str, ...] = ()) -> Path:
    """A results file of PRE, POST and an average, with reward, accuracy and likelihood per token."""
    draw = np.random.default_rng(0)
    keys = tuple(f"{i:064x}" for i in range(1, 41))

    def measured(lost: float) -> Scores:
        hits = 100.0 * (draw.random((40, 1)) < 0.9 - lost)
        losses = np.hstack([-draw.random((40, 1)) - lost, np.full((40, 1), 2.0)])
        reward = Measurement("reward", "", draw.random((40, 1)) + lost, "mean", None, keys)
        quiz = [
            Measurement("accuracy", "%", hits, "mean", 50.0, keys, groups),
            Measurement("-nll", "nats/token", losses, "ratio", None, keys, groups),
        ]
        return Scores(reward, {"quiz": quiz})

    points = [
        Measured(n, m, measured(v)) for n, m, v in (("PRE", "PRE", 0), ("POST", "POST", 0.5), ("MA 0.4", "MA", 0.2))
    ]
    write_results(folder / "own.json", results(points, run="r", seed=0, reward="r"))
    return folder / "own.json"


@pytest.mark.parametrize("together", [1, 4])
def test_counterpoises_own_results_give_the_tax_they_hold(tmp_path: Path, together: int) -> None:
    """And the flips: groups of items are resampled whole, as the run itself did."""
    file = own(tmp_path, tuple(str(n // together) for n in range(40)) if together > 1 else ())
    compared = tax(file, file)
    found, held = rows(compared), json.loads(file.read_text())["tax"]
    assert "Of 1 task by the first metric" in compared["verdict"]  # the reward is none
    for row in held:
        ours = found[row["name"], row["metric"]]["tax"]
        assert [ours[k] for k in ("value", "low", "high")] == pytest.approx(
            [row["tax"][k] for k in ("value", "low", "high")], rel=1e-6
        )
        assert (found[row["name"], row["metric"]]["flips"] or {}).get("lost") == (row["flips"] or {}).get("lost")
    assert found["quiz", "accuracy"]["flips"]["lost"]["count"] > 5
    chosen = rows(tax(file, f"{file}#MA 0.4"))
    assert 0 < chosen["quiz", "accuracy"]["tax"]["value"] < found["quiz", "accuracy"]["tax"]["value"]


@pytest.mark.parametrize(("way", "weights"), [("size", (1200, 300)), ("macro", (1, 1))])
def test_a_group_of_many_items_in_our_results_is_its_tasks_and_their_mean(
    tmp_path: Path, way: str, weights: tuple[int, int]
) -> None:
    draw, sizes = np.random.default_rng(0), (1200, 300)
    keys = tuple(f"{i:064x}" for i in range(1, 1501))
    about: tuple[Any, ...] = (weighted("mean", [*zip(sizes, weights, strict=True)]), None, keys)
    subtasks = tuple((name, n, None) for name, n in zip("ab", sizes, strict=True))

    def measured(lost: float) -> Scores:
        hits = 100.0 * (draw.random((1500, 1)) < np.repeat([0.9 - lost, 0.6], sizes)[:, None])
        found = [Measurement("acc", "%", hits, *about, subtasks=subtasks)]
        found.append(Measurement("-nll", "nats", -draw.random((1500, 1)) - lost, *about, subtasks=subtasks))
        return Scores(Measurement("reward", "", hits[:40], "mean", None, keys[:40]), {"many": found})

    points = [Measured(n, n, measured(v)) for n, v in (("PRE", 0.0), ("POST", 0.3))]
    write_results(tmp_path / "own.json", results(points, run="r", seed=0, reward="r"))
    found = compare(read_log(str(tmp_path / "own.json")), read_log(str(tmp_path / "own.json"), "POST"))["tax"]
    for row in (r for r in json.loads((tmp_path / "own.json").read_text())["tax"] if r["name"] == "many"):
        parts = [next(r for r in found if (r["name"], r["metric"]) == (f"many: {t}", row["metric"])) for t in "ab"]
        (whole,) = (r for r in found if (r["name"], r["metric"]) == ("many", row["metric"]))
        assert (whole["weights"], whole["tasks"], [p["items"] for p in parts]) == (way, 2, [1200, 300])
        assert whole["tax"]["value"] == pytest.approx(row["tax"]["value"], rel=1e-6)
        assert whole["tax"]["low"] == pytest.approx(row["tax"]["low"], rel=0.1)


def test_a_point_that_is_not_there_and_a_file_without_items_are_named(tmp_path: Path) -> None:
    file = own(tmp_path)
    with pytest.raises(ValueError, match=r"expected a point named 'MA 0.9', found PRE \(held-out\), POST .*MA 0.4"):
        read_log(f"{file}#MA 0.9")
    content = json.loads(file.read_text())
    for point in content["points"]:
        del point["statistics"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected the statistics of every item, found none for PRE"):
        read_log(str(file))
