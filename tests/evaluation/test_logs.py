"""The tax of two finished runs of lm-eval: paired by content, every metric and group, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterpoise.evaluation.log_tax import compare
from counterpoise.evaluation.logs import read_log
from evaluation.lm_logs import DATE, choice, local_tasks, row, run, sha, write
from tiny import nudge, tiny, tokenizer


def tax(a: Path | str, b: Path | str) -> dict[str, Any]:
    return compare(read_log(str(a)), read_log(str(b), "POST"))


def of(found: dict[str, Any], name: str, metric: str) -> dict[str, Any]:
    (only,) = [r for r in found["tax"] if (r["name"], r["metric"]) == (name, metric)]
    return dict(only)


def said(found: dict[str, Any]) -> str:
    return "\n".join(found["notes"])


def scored(values: list[float], **more: Any) -> list[dict[str, Any]]:
    return [row(i, {"acc": v}, **more) for i, v in enumerate(values)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Logs that lm-eval itself wrote of two models, and of one with another limit."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    folder = tmp_path_factory.mktemp("real")
    tasks, words = local_tasks(folder / "tasks"), tokenizer()
    model, names = tiny("llama"), ["both", "text", "last", "rolling"]
    found = {"A": run(tasks, names, model, words, folder / "A")}
    nudge(model)
    found["B"] = run(tasks, names, model, words, folder / "B")
    found["few"] = run(tasks, ["both", "last"], model, words, folder / "few", limit=10)
    return found


def test_every_number_that_lm_eval_gives_is_the_one_shown(real: dict[str, Path]) -> None:
    found = tax(real["A"], real["B"])
    shown = {
        "perplexity": lambda v: math.exp(-v),
        "word_perplexity": lambda v: math.exp(-v),
        "byte_perplexity": lambda v: math.exp(-v),
        "bits_per_byte": lambda v: -v,
    }
    compared = 0
    for side, folder in (("pre", real["A"]), ("post", real["B"])):
        content = json.loads(next(folder.rglob("results_*.json")).read_text())
        for name, numbers in content["results"].items():
            for key, value in numbers.items():
                metric, comma, kind = key.partition(",")
                if not comma or "_stderr" in metric or metric == "mcc":
                    continue
                ours = of(found, name, metric if kind == "none" else f"{metric} ({kind})")
                value *= 100 if ours["unit"] == "%" else 1
                assert shown.get(metric, float)(ours[side]["value"]) == pytest.approx(value, rel=1e-9), (name, key)
                compared += 1
    assert compared == 2 * (3 + 1 + 4 + 2 + 3)
    assert "one: mcc is left out: no sum over items" in said(found)
    assert of(found, "both", "acc")["weights"] == "macro"
    assert {r["name"] for r in found["tax"] if r["metric"] == "logprob"} == {"one", "two", "both"}
    assert [(r["name"], r["measure"]) for r in found["calibration"]] == [
        (n, m) for n in ("one", "two") for m in ("ece", "brier")
    ]


def test_a_results_file_its_samples_and_the_folder_say_the_same(real: dict[str, Path], tmp_path: Path) -> None:
    whole = tax(real["A"], real["B"])["tax"]
    files = [next(real[side].rglob("results_*.json")) for side in "AB"]
    assert tax(*files)["tax"] == whole
    patterns = [str(real[side] / "*" / "samples_*.jsonl") for side in "AB"]
    assert tax(*patterns)["tax"] == whole
    alone = [shutil.copy(next(real[side].rglob("samples_one_*")), tmp_path / f"{side}.jsonl") for side in "AB"]
    found = tax(*alone)
    assert of(found, "A", "acc")["tax"]["value"] == next(r for r in whole if r["name"] == "one")["tax"]["value"]


def test_another_limit_counts_the_common_items_and_says_so(real: dict[str, Path]) -> None:
    found = tax(real["A"], real["few"])
    assert of(found, "one", "acc")["items"] == 10
    assert "one: 10 items are in both logs, of 24 and 10; the others are left out." in found["notes"]
    assert f"Only in {real['A']}, left out: rolling, text." in found["notes"]


def test_samples_without_their_results_file_say_what_is_not_known(tmp_path: Path) -> None:
    alone = write(tmp_path / "a", {"t": scored([1.0])})
    found = tax(alone, write(tmp_path / "b", {"t": scored([1.0])}, versions={"t": 1}))
    assert found["notes"] == [
        f"{alone} has samples without their results_*.json: the versions of its tasks are not known."
    ]


def test_a_model_against_itself_has_no_tax(real: dict[str, Path]) -> None:
    found = tax(real["A"], real["A"])
    assert all(r["tax"]["value"] == 0 and r["tax"]["p"] == 1 for r in found["tax"])
    assert "0 fell and 0 rose" in found["verdict"]


def test_documents_in_another_order_are_paired_by_content(tmp_path: Path) -> None:
    draw = random.Random(1)
    before, after = ([float(draw.random() < p) for _ in range(50)] for p in (0.8, 0.5))
    a, b = scored(before), scored(after)
    write(tmp_path / "a", {"t": a})
    straight = tax(tmp_path / "a", write(tmp_path / "b", {"t": b}))
    shuffled = [{**r, "doc_id": k} for k, r in enumerate(draw.sample(b, len(b)))]
    assert tax(tmp_path / "a", write(tmp_path / "c", {"t": shuffled}))["tax"] == straight["tax"]
    assert of(straight, "t", "acc")["flips"]["lost"]["count"] == sum(x > y for x, y in zip(before, after, strict=True))


def test_p_of_right_and_wrong_items_is_mcnemars(tmp_path: Path) -> None:
    log = write(tmp_path / "a", {"t": scored([1.0] * 40)})
    found = of(tax(log, write(tmp_path / "b", {"t": scored([0.0] * 5 + [1.0] * 35)})), "t", "acc")
    assert found["tax"]["p"] == found["flips"]["p"] == pytest.approx(2 / 2**5)


def test_copies_of_a_document_pair_by_prompt_first_and_then_in_order(tmp_path: Path) -> None:
    a = [row(0, {"acc": 1.0}, prompt=p) for p in "xxy"]
    b = [row(0, {"acc": v}, prompt=p) for p, v in (("y", 1.0), ("x", 1.0), ("z", 0.0))]
    found = tax(write(tmp_path / "a", {"t": a}), write(tmp_path / "b", {"t": b}))
    assert of(found, "t", "acc")["flips"]["lost"]["count"] == 1
    assert "1 of 3 items were asked with another prompt" in said(found)


def test_other_prompts_are_said_with_their_cause(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"t": scored([1.0, 0.0])}, chat_template_sha="a")
    b = write(tmp_path / "b", {"t": scored([1.0, 1.0], prompt="shot")}, chat_template_sha="b")
    assert "t: 2 of 2 items were asked with another prompt in each log (other chat template)." in tax(a, b)["notes"]


def test_another_target_is_another_item(tmp_path: Path) -> None:
    a, b = scored([1.0, 1.0, 0.0]), scored([1.0, 1.0, 0.0])
    b[1]["target_hash"] = sha("corrected")
    found = tax(write(tmp_path / "a", {"t": a}), write(tmp_path / "b", {"t": b}))
    assert of(found, "t", "acc")["items"] == 2
    assert "t: 1 documents have another target in each log; left out." in found["notes"]


@pytest.mark.parametrize(("what", "name"), [("versions", "versions"), ("n-shot", "numbers of few-shot examples")])
def test_other_versions_and_numbers_of_examples_are_refused_by_name(tmp_path: Path, what: str, name: str) -> None:
    a, b = ({what: {"t": v, "u": 0}} for v in (1, 2))
    both = {"t": scored([1.0]), "u": scored([1.0])}
    write(tmp_path / "a", both, **a)
    write(tmp_path / "b", both, **b)
    with pytest.raises(ValueError, match=rf"expected the same {name} of a task.*others of t \(1 in .*, 2 in .*\); run"):
        tax(tmp_path / "a", tmp_path / "b")


def test_no_common_task_and_no_common_item_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"t": scored([1.0]), "v": scored([1.0])})
    with pytest.raises(ValueError, match=r"expected a task that both logs have, found .*a with t, v and .*b with u"):
        tax(a, write(tmp_path / "b", {"u": scored([1.0])}))
    with pytest.raises(ValueError, match="expected items that both logs have, found none"):
        tax(a, write(tmp_path / "c", {"t": [row(9, {"acc": 1.0})]}))


def test_an_unknown_direction_is_named_and_not_counted(tmp_path: Path) -> None:
    sides = [[row(i, {"speed": v + i % 3}) for i in range(30)] for v in (0.0, 9.0)]
    header = {"higher_is_better": {"t": {"speed": None}}}
    found = tax(*(write(tmp_path / n, {"t": s}, **header) for n, s in zip("ab", sides, strict=True)))
    assert "Whether higher is better is not known: t speed" in said(found)
    assert found["verdict"].startswith("Of 0 tasks")
    header = {"higher_is_better": {"t": {"speed": False}}}
    found = tax(*(write(tmp_path / n, {"t": s}, **header) for n, s in zip("ab", sides, strict=True)))
    assert of(found, "t", "-speed")["tax"]["value"] == 9
    assert "1 fell" in found["verdict"]


def test_a_metric_that_is_no_mean_of_its_items_is_left_out_by_name(tmp_path: Path) -> None:
    items = [row(i, {"acc": float(i % 2), "best": i / 4}) for i in range(4)]
    header = {"results": {"t": {"acc,none": 0.5, "best,none": 0.75}}}
    found = tax(*(write(tmp_path / n, {"t": items}, **header) for n in "ab"))
    assert [r["metric"] for r in found["tax"]] == ["acc"]
    assert "t: best is left out: lm-eval's own number is neither a mean nor a ratio of sums" in said(found)


def test_items_without_a_number_are_left_out_and_counted(tmp_path: Path) -> None:
    a = scored([1.0, 0.0, 1.0, math.nan])
    b = scored([1.0, 0.0, 1.0, 1.0])
    b[0] = row(0, {"other": 1.0})
    found = tax(write(tmp_path / "a", {"t": a}), write(tmp_path / "b", {"t": b}))
    assert of(found, "t", "acc")["items"] == 2
    assert "t: 2 of 4 items have no number for acc; left out." in found["notes"]
    assert f"t: other is in {tmp_path / 'b'} alone; left out." in found["notes"]


def group_logs(folder: Path, number: float, *, sizes: tuple[int, ...] = (40, 10)) -> list[Path]:
    """Two logs of a group of two tasks, whose own number is `number`."""
    made = []
    for name, step in (("a", 0.0), ("b", 0.3)):
        draw = random.Random(name)
        tasks = {
            t: scored([float(draw.random() < p - step) for _ in range(n)])
            for t, n, p in zip("tu", sizes, (0.9, 0.5), strict=True)
        }
        values = {t: float(np.mean([r["acc"] for r in rows])) for t, rows in tasks.items()}
        by = {"size": np.average(list(values.values()), weights=sizes), "macro": np.mean(list(values.values()))}
        results = {**{t: {"acc,none": v} for t, v in values.items()}, "g": {"acc,none": by.get(number, number)}}  # type: ignore[call-overload]
        counts = {t: {"effective": n} for t, n in zip("tu", sizes, strict=True)}
        header = {"results": results, "n-samples": counts, "group_subtasks": {"all": ["g"], "g": ["t", "u"]}}
        made.append(write(folder / name, tasks, **header))
    return made


def paired_error(row: dict[str, Any]) -> float:
    """The standard error of a difference of shares, from the items that flipped alone."""
    lost, won = (row["flips"][k]["count"] / row["items"] for k in ("lost", "won"))
    return float(100 * math.sqrt((lost + won - (lost - won) ** 2) / row["items"]))


def spread(row: dict[str, Any]) -> float:
    """The standard error that a 95 % interval of a difference speaks of."""
    return float((row["tax"]["high"] - row["tax"]["low"]) / 2 / 1.96)


@pytest.mark.parametrize("way", ["size", "macro"])
def test_a_group_has_the_weights_that_give_lm_evals_own_number(tmp_path: Path, way: Any) -> None:
    found = tax(*group_logs(tmp_path, way, sizes=(160, 40)))
    group, leaves = of(found, "g", "acc"), [of(found, t, "acc") for t in "tu"]
    assert (group["weights"], group["tasks"], group["items"]) == (way, 2, 200)
    weights = (0.8, 0.2) if way == "size" else (0.5, 0.5)
    for column in ("pre", "post", "tax"):
        value = sum(w * leaf[column]["value"] for w, leaf in zip(weights, leaves, strict=True))
        assert group[column]["value"] == pytest.approx(value)
    wanted = math.hypot(*(w * paired_error(leaf) for w, leaf in zip(weights, leaves, strict=True)))
    assert spread(group) == pytest.approx(wanted, rel=0.15)


def test_tasks_of_one_size_are_resampled_apart(tmp_path: Path) -> None:
    logs = group_logs(tmp_path, "size", sizes=(40, 40))  # type: ignore[arg-type]
    for log in logs:  # twins: drawn alike, they would flip together
        shutil.copy(log / f"samples_t_{DATE}.jsonl", log / f"samples_u_{DATE}.jsonl")
        file = log / f"results_{DATE}.json"
        content = json.loads(file.read_text())
        content["results"]["u"] = content["results"]["g"] = content["results"]["t"]
        file.write_text(json.dumps(content))
    found = tax(*logs)
    wanted = paired_error(of(found, "t", "acc")) / math.sqrt(2)
    assert spread(of(found, "g", "acc")) == pytest.approx(wanted, rel=0.15)


def test_a_group_whose_number_is_no_mean_is_said(tmp_path: Path) -> None:
    found = tax(*group_logs(tmp_path, 0.123))
    assert "Group g: acc is left out: lm-eval's number is no mean of its tasks' scores." in found["notes"]
    assert not [r for r in found["tax"] if r["name"] == "g"]


def test_a_group_of_which_one_side_lacks_a_task_says_of_how_many_it_is(tmp_path: Path) -> None:
    a, b = group_logs(tmp_path, "size")  # type: ignore[arg-type]
    (b / f"samples_u_{DATE}.jsonl").unlink()
    found = tax(a, b)
    assert "Group g: acc is of 1 of its 2 tasks." in found["notes"]
    assert of(found, "g", "acc")["items"] == 40


def test_calibration_and_likelihood_come_from_the_choices(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    logs = [draw.normal(scale=2, size=(80, 3)) for _ in range(2)]
    sides = [[choice(i, v.tolist(), i % 3) for i, v in enumerate(side)] for side in logs]
    found = tax(*(write(tmp_path / n, {"t": s}) for n, s in zip("ab", sides, strict=True)))
    gold = np.arange(80) % 3
    for side, values in zip(("pre", "post"), logs, strict=True):
        assert of(found, "t", "logprob")[side]["value"] == pytest.approx(values[np.arange(80), gold].mean())
        shares = np.exp(values) / np.exp(values).sum(1, keepdims=True)
        sure, right = shares.max(1), values.argmax(1) == gold
        bins = np.minimum((sure * 10).astype(int), 9)
        ece = sum(abs((sure - right)[bins == k].sum()) for k in range(10)) / 80
        brier = ((shares - np.eye(3)[gold]) ** 2).sum(1).mean()
        rows = {r["measure"]: r for r in found["calibration"]}
        assert rows["ece"][side]["value"] == pytest.approx(100 * ece)
        assert rows["brier"][side]["value"] == pytest.approx(100 * brier)
    assert all(r["rise"]["low"] < r["rise"]["value"] < r["rise"]["high"] for r in found["calibration"])


def test_the_right_choice_is_found_by_its_text_and_from_accuracy(tmp_path: Path) -> None:
    arguments = {f"gen_args_{k}": {"arg_0": "q", "arg_1": f" {t}"} for k, t in enumerate(("no", "yes"))}
    texts = [choice(i, [-1.0, -2.0], i % 2, arguments=arguments) | {"target": ("no", "yes")[i % 2]} for i in range(8)]
    contexts = [choice(i, [-1.0, -2.0], i % 2) | {"target": "the rest"} for i in range(8)]  # as winogrande
    log = write(tmp_path / "a", {"texts": texts, "contexts": contexts})
    found = tax(log, log)
    assert of(found, "texts", "logprob")["pre"]["value"] == of(found, "contexts", "logprob")["pre"]["value"] == -1.5


@pytest.mark.parametrize(("damage", "message"), [
    (b'{"doc_id": 2, "doc_hash"', r"samples_t_.*jsonl, line 3: expected json"),
    (b'["a"]', "line 3: expected a json object"),
    (b'{"a": "\xff"}', "line 3: expected utf-8"),
    (b'{"question": 1}', "line 3: expected a line of lm-eval's --log_samples, with doc_hash, found question"),
])  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes, message: str) -> None:
    log = write(tmp_path / "a", {"t": scored([1.0, 0.0])})
    file = log / f"samples_t_{DATE}.jsonl"
    file.write_bytes(file.read_bytes() + damage)
    with pytest.raises(ValueError, match=message):
        read_log(str(log))


def test_gzipped_samples_are_read_and_a_cut_file_is_named(tmp_path: Path) -> None:
    log = write(tmp_path / "a", {"t": scored([1.0, 0.0])})
    plain = log / f"samples_t_{DATE}.jsonl"
    content = gzip.compress(plain.read_bytes())
    packed = tmp_path / "b" / f"{plain.name}.gz"
    packed.parent.mkdir()
    packed.write_bytes(content)
    assert of(tax(log, packed.parent), "t", "acc")["items"] == 2
    packed.write_bytes(content[:-9])
    with pytest.raises(ValueError, match="expected a whole gzip file"):
        read_log(str(packed))


def test_logs_of_before_the_hashes_are_paired_by_what_is_hashed_today(tmp_path: Path) -> None:
    doc = {"q": "é", "n": 1}
    new = {
        **row(0, {"acc": 1.0}),
        "doc_hash": sha(json.dumps(doc, indent=2, ensure_ascii=False)),
        "target_hash": sha("7"),
        "prompt_hash": sha("ask"),
    }
    old = {"doc_id": 0, "doc": doc, "target": 7, "arguments": [["ask", " 7"]], "acc": 0.0}
    found = tax(write(tmp_path / "a", {"t": [new]}), write(tmp_path / "b", {"t": [old]}))
    assert of(found, "t", "acc")["items"] == 1
    assert [n for n in found["notes"] if "versions of its tasks are not known" not in n] == []


def test_the_newest_of_two_runs_counts_and_two_models_are_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "a" / "m", {"t": scored([0.0])}, date="2025-01-01T00-00-00.000000")
    write(log, {"t": scored([1.0])})
    found = tax(tmp_path / "a", log)
    assert of(found, "t", "acc")["pre"]["value"] == 100
    assert "holds t more than once; the newest one counts" in said(found)
    write(tmp_path / "a" / "n", {"t": scored([1.0])})
    with pytest.raises(ValueError, match=r"expected one run, found t in .*m and in .*n; name one of them"):
        read_log(str(tmp_path / "a"))


def test_what_is_no_log_is_refused_with_what_would_be_one(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    for place in (tmp_path, tmp_path / "other.json"):
        with pytest.raises(ValueError, match="expected lm-eval's folder, its results"):
            read_log(str(place))
    write(tmp_path / "a", {}, versions={"t": 1})
    with pytest.raises(ValueError, match="found none; run lm_eval with --log_samples"):
        read_log(str(tmp_path / "a"))
    with pytest.raises(FileNotFoundError):
        read_log(str(tmp_path / "nothing"))


def test_a_long_file_is_read_line_by_line(tmp_path: Path) -> None:
    log = write(tmp_path / "a", {"t": scored([1.0, 0.0] * 1000, doc="x" * 20_000)})
    tracemalloc.start()
    read_log(str(log))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (log / f"samples_t_{DATE}.jsonl").stat().st_size > 40e6
    assert peak < 3e6
