"""Groups and tags of lm-eval as abilities: the numbers are lm-eval's own, their intervals resample within subtasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterpoise.evaluation.abilities import load_abilities
from counterpoise.evaluation.harness_tasks import find_task
from counterpoise.evaluation.measurement import Measurement, Scores, difference, flips_of, interval_of, tax_table
from counterpoise.evaluation.parts import part_of
from counterpoise.evaluation.results import Measured, measurement, results
from counterpoise.language.sampling import Drawing
from counterpoise.statistics.bootstrap import clustered, interval, paired, weighted
from counterpoise.tables.grid import as_html, as_markdown
from counterpoise.tables.taxes import ability_taxes, tax_rich
from evaluation.lm_logs import local_tasks
from tiny import nudge, tiny, tokenizer

pytest.importorskip("lm_eval", reason="needs the extra eval")

GROUPS = {
    "sized": "group: sized\ntask: [one, two]\naggregate_metric_list:\n  - {metric: acc}\n",
    "nested": "group: nested\ntask:\n  - both\n  - group: inner\n    task: [last]\n"
    "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n",
    "twice": "group: twice\ntask: [both, two]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: false}\n",
    "tagged": "group: tagged\ntask: [pair]\naggregate_metric_list:\n  - {metric: acc}\n  - {metric: acc_norm}\n",
    "flat": "group: flat\ntask: [one, two]\n",
    "round": "group: round\ntask: [round]\n",
    "lacks": "group: lacks\ntask: [one, gone]\n",
    "rolls": "group: rolls\ntask: [rolling]\naggregate_metric_list:\n  - {metric: word_perplexity}\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = local_tasks(tmp_path_factory.mktemp("groups") / "tasks")
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text((folder / f"{name}.yaml").read_text() + "tag: pair\n")
    for name, text in GROUPS.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def own_numbers(tasks: Path, name: str, limit: int | None = None) -> dict[str, Any]:
    """What lm-eval says of the held-out part."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False, include_path=str(tasks)).load([name])
    chosen = {}
    for task in loaded["tasks"].values():
        ability = load_abilities([f"{tasks}?task={task.task_name}"])[0]
        keys = [k for k in sorted(ability.keys) if part_of(k) == "held-out"][:limit]  # type: ignore[attr-defined]
        chosen[task.task_name] = sorted(ability.keys.index(k) for k in keys)  # type: ignore[attr-defined]
    lm = HFLM(pretrained=tiny("llama"), tokenizer=tokenizer(), batch_size=16, device="cpu")
    found = evaluate(lm, loaded, samples=chosen, bootstrap_iters=0)
    assert found is not None
    return dict(found["results"])


def measured(tasks: Path, name: str, model: Any = None) -> list[Measurement]:
    (ability,) = load_abilities([f"{tasks}?task={name}"])
    return ability.measure(model or tiny("llama"), tokenizer(), "held-out", Drawing(batch_size=16))


@pytest.mark.parametrize(("name", "limit", "subtasks"), [
    ("both", None, ["one", "two"]),
    ("sized", None, ["one", "two"]),
    ("sized", 2, ["one", "two"]),
    ("nested", None, ["one", "two", "last"]),
    ("twice", None, ["one", "two"]),
    ("tagged", None, ["one", "two"]),
])  # fmt: skip
def test_a_groups_number_is_lm_evals_own(tasks: Path, name: str, limit: int | None, subtasks: list[str]) -> None:
    found = {m.metric: m for m in measured(tasks, name if limit is None else f"{name}&limit={limit}")}
    own = own_numbers(tasks, name, limit)
    for metric in [k.partition(",")[0] for k in own[name] if "," in k and "stderr" not in k]:
        assert found[metric].value == pytest.approx(100 * own[name][f"{metric},none"])
        for task, part in found[metric].apart():
            assert part.value == pytest.approx(100 * own[task][f"{metric},none"])
    assert [task for task, *_ in found["acc"].subtasks] == subtasks
    assert len(found["acc"].keys) == sum(n for _, n, _ in found["acc"].subtasks)


@pytest.mark.parametrize("name", ["pair", "flat"])
def test_what_lm_eval_gives_no_number_weighs_by_items(tasks: Path, name: str) -> None:
    found = {m.metric: m for m in measured(tasks, name)}
    assert list(found) == ["logprob", "acc", "acc_norm"]
    assert found["acc"].value == pytest.approx(found["acc"].statistics.mean())
    assert [task for task, *_ in found["acc_norm"].subtasks] == ["one"]


def test_what_cannot_be_a_group_is_refused_before_a_model_is(tasks: Path) -> None:
    for name, message in (("round", "found one that contains itself"), ("lacks", "found 'gone' in it, which is not")):
        with pytest.raises(ValueError, match=message):
            find_task(f"{tasks}?task={name}")
    with pytest.raises(ValueError, match="primary: expected logprob or acc, found 'acc_norm'"):
        find_task(f"{tasks}?task=both&primary=acc_norm")  # a task below it has one, the group none
    with pytest.raises(ValueError, match=r"expected a group with a mean of numbers per item .*word_perplexity"):
        measured(tasks, "rolls")


def test_a_dry_run_counts_the_tasks_of_a_group(tasks: Path) -> None:
    found = {name: find_task(f"{tasks}?task={name}") for name in ("one", "both", "nested", "pair")}
    assert {name: (f.tasks, f.output_type) for name, f in found.items()} == {
        "one": (1, "multiple_choice"), "both": (2, "multiple_choice"), "nested": (3, ""), "pair": (2, "multiple_choice"),
    }  # fmt: skip


def test_the_fingerprint_holds_the_weights_and_the_items(tasks: Path) -> None:
    both, sized, flat = (load_abilities([f"{tasks}?task={name}"])[0].fingerprint for name in ("both", "sized", "flat"))
    assert len({both, sized, flat}) == 3


def test_intervals_resample_within_subtasks() -> None:
    easy, hard = np.full((60, 1), 100.0), np.zeros((40, 1))
    joined = np.concatenate([easy, hard])
    assert interval(joined, weighted("mean", [(60, 60), (40, 40)]))[:3] == (60.0, 60.0, 60.0)
    assert interval(joined, "mean").high > 65
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(100, 1)), draw.normal(size=(100, 1))
    a[:60] += 5
    found = interval(a, weighted("mean", [(60, 1), (40, 1)]))
    assert found.value == pytest.approx((a[:60].mean() + a[60:].mean()) / 2)
    error = np.sqrt(a[:60].var(ddof=1) / 60 + a[60:].var(ddof=1) / 40) / 2
    assert found.high - found.low == pytest.approx(2 * 1.98 * error, rel=0.08)
    alone = paired(a, b, weighted("mean", [(100, 1)])).difference()
    assert alone == paired(a, b, "mean").difference()


def test_what_shares_a_passage_is_resampled_whole_within_its_subtask(tmp_path: Path) -> None:
    folder = local_tasks(tmp_path / "tasks")
    for name in ("one", "two"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        told = [json.dumps({**row, "passage": f"passage {i // 3}"}) for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(told))
    found = measured(folder, "both")[1]
    parts = [part for _, part in found.apart()]
    assert [len(p.keys) for p in parts] == [3 * len(set(p.groups)) for p in parts]
    sums = np.concatenate([clustered(p.statistics, p.groups) for p in parts])
    assert np.array_equal(found.sampled, sums)
    assert found.sampled_as == weighted("mean", [(len(set(p.groups)), 1) for p in parts])


def test_items_said_thrice_make_no_group_surer() -> None:
    draw = np.random.default_rng(0)
    once = [draw.normal(size=(100, 1)) for _ in range(2)]
    keys, tasks = tuple(f"{i // 60} {i:03}" for i in range(100)), ((60, 2), (40, 1))
    thrice = tuple(key for key in keys for _ in range(3))

    def made(x: np.ndarray, by: int, groups: tuple[str, ...]) -> Measurement:
        strata = weighted("mean", [(by * n, w) for n, w in tasks])
        subtasks = tuple((str(w), by * n, None) for n, w in tasks)
        return Measurement("acc", "", x, strata, None, groups or keys, groups, subtasks)

    (a, b), (c, d) = ([made(x, 1, ()) for x in once], [made(np.repeat(x, 3, axis=0), 3, thrice) for x in once])
    assert interval_of(a) == pytest.approx(interval_of(c))
    assert difference(a, b) == pytest.approx(difference(c, d))
    assert interval_of(a.apart()[1][1]) == pytest.approx(interval_of(c.apart()[1][1]))


@pytest.mark.parametrize(
    "aggregate", ["mean by 60:1", "mean by x:1 40:1", "mean by 60:0 40:0", "mean by 60 40", "mean by 0:1 100:1"]
)
def test_weights_of_other_items_are_refused(aggregate: str) -> None:
    with pytest.raises(ValueError, match="expected ITEMS:WEIGHT of each task, of 100 items together"):
        interval(np.zeros((100, 1)), aggregate)


def test_a_group_is_one_row_with_its_subtasks_beneath_it_everywhere(tasks: Path) -> None:
    before = measured(tasks, "both")
    after = measured(tasks, "both", nudge(tiny("llama"), scale=0.2))
    prompts = Measurement("reward", "", np.arange(9.0)[:, None], "mean", None, tuple(map(str, range(9))))
    pre, post = Scores(prompts, {"both": before}), Scores(prompts, {"both": after})
    made = results([Measured("PRE", "PRE", pre), Measured("POST", "POST", post)], run="r", seed=0, reward="x")
    made = json.loads(json.dumps(made))
    assert [r["name"] for r in made["tax"]] == ["reward", "both", "both"]
    row = made["tax"][2]
    assert row["tax"] == difference(before[1], after[1])
    assert [s["name"] for s in row["subtasks"]] == ["one", "two"]
    for sub, (a, b) in zip(row["subtasks"], zip(*(m.apart() for m in (before[1], after[1])), strict=True), strict=True):
        assert (sub["pre"], sub["tax"], sub["items"]) == (interval_of(a[1]), difference(a[1], b[1]), len(a[1].keys))
    read = measurement(made, made["points"][0], "both", "acc")
    assert read is not None
    assert (read.subtasks, read.value, interval_of(read)) == (
        before[1].subtasks,
        before[1].value,
        interval_of(before[1]),
    )
    assert Measurement.from_json(json.loads(json.dumps(before[1].to_json()))).subtasks == before[1].subtasks
    assert tax_table(pre, post)[2]["subtasks"] == row["subtasks"]
    names = [cells[0].text for cells in ability_taxes(made).cells()]
    assert names == ["reward", "both", "· one", "· two", "both", "· one", "· two"]
    assert "· two" in as_markdown(ability_taxes(made))
    assert "· two" in as_html(ability_taxes(made), "title")
    assert tax_rich(made).row_count == 7


def test_flips_of_a_group_are_those_of_its_tasks_where_its_items_weigh_alike(tasks: Path) -> None:
    other = nudge(tiny("llama"), scale=0.2)
    pre, post = ({m.metric: m for m in measured(tasks, "sized", *model)} for model in ((), (other,)))
    group = flips_of(pre["acc"], post["acc"])
    assert group is not None
    each = [flips_of(a, b) for (_, a), (_, b) in zip(pre["acc"].apart(), post["acc"].apart(), strict=True)]
    assert group["cells"] == [sum(column) for column in zip(*(f["cells"] for f in each if f), strict=True)]
    weights = [sum(f["cells"]) for f in each if f]
    assert group["by_chance"] == pytest.approx(np.average([f["by_chance"] for f in each if f], weights=weights))
    assert min(weights) * group["by_chance"] > 0
    unequal = [measured(tasks, "both", *model)[1] for model in ((), (other,))]
    assert flips_of(unequal[0], unequal[1]) is None  # its tasks weigh alike, not its items


def test_how_sure_a_group_was_is_kept_task_by_task_and_comes_back(tasks: Path) -> None:
    whole = next(m for m in measured(tasks, "flat") if m.metric == "logprob")
    assert whole.sureness is not None
    again = Measurement.from_json(json.loads(json.dumps(whole.to_json())))
    parts = [m.sureness for _, m in again.apart()]
    assert [len(p) for p in parts if p is not None] == [items for _, items, _ in whole.subtasks]
    np.testing.assert_array_equal(np.concatenate([p for p in parts if p is not None]), whole.sureness)
