"""lm-eval tasks as abilities, on a local task and a tiny in-memory model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from counterpoise.evaluation.abilities import load_abilities
from counterpoise.evaluation.harness_tasks import find_task
from counterpoise.evaluation.panel import primary_first
from counterpoise.evaluation.parts import PARTS
from counterpoise.language import templates
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import continuation_logprobs
from tiny import tiny, tokenizer

pytest.importorskip("lm_eval", reason="needs the extra eval")

METRICS = [("acc_norm", "mean"), ("mcc", "matthews_corrcoef")]
ITEMS = [{"q": f"is {n} even", "options": ["yes", "no", "maybe so"], "gold": n % 2} for n in range(60)]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "parity.yaml").write_text(
        "task: parity\noutput_type: multiple_choice\ntest_split: test\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'items.jsonl'}}}}}\n"
        "doc_to_text: '{{q}}:'\ndoc_to_choice: '{{options}}'\ndoc_to_target: gold\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    return folder


def test_a_local_task_scores_as_by_hand_and_its_parts_do_not_mix(task: Path) -> None:
    ability = load_abilities([f"{task}?name=even"])[0]
    assert ability.name == "even"
    model, words = tiny("llama"), tokenizer()
    seen: dict[str, tuple[str, ...]] = {}
    for part in PARTS:
        logprob, accuracy = ability.measure(model, words, part, Drawing(batch_size=4))
        seen[part] = logprob.keys
        assert accuracy.chance == pytest.approx(100 / 3)
        chosen = [ITEMS[ability.keys.index(key)] for key in logprob.keys]  # type: ignore[attr-defined]
        context = [tuple(words(f"{i['q']}:")["input_ids"]) for i in chosen]
        options = [[tuple(words(f" {o}")["input_ids"]) for o in i["options"]] for i in chosen]
        scores = continuation_logprobs(model, context, options)
        gold = [i["gold"] for i in chosen]
        np.testing.assert_allclose(
            logprob.statistics[:, 0], [s[g] for s, g in zip(scores, gold, strict=True)], rtol=1e-4
        )
        right = [100.0 * (int(np.argmax(s)) == g) for s, g in zip(scores, gold, strict=True)]
        np.testing.assert_array_equal(accuracy.statistics[:, 0], right)
    assert sorted(key for keys in seen.values() for key in keys) == sorted(ability.keys)  # type: ignore[attr-defined]


def test_limit_and_fingerprint(task: Path) -> None:
    ability = load_abilities([f"{task}?limit=5"])[0]
    assert len(ability.measure(tiny("llama"), tokenizer(), "proxy")[0].keys) == 5
    before = ability.fingerprint
    assert load_abilities([str(task)])[0].fingerprint == before
    (task / "items.jsonl").write_text("".join(json.dumps({**item, "q": "other"}) + "\n" for item in ITEMS))
    assert load_abilities([str(task)])[0].fingerprint != before


def test_few_shot_examples_are_the_same_at_every_measurement(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = task / "parity.yaml"
    yaml.write_text(yaml.read_text() + "num_fewshot: 3\nfewshot_split: test\n")
    ability, model = load_abilities([str(task)])[0], tiny("llama")
    model.config.max_position_embeddings = 512
    first, second = (ability.measure(model, tokenizer(), "held-out")[0].statistics for _ in range(2))
    np.testing.assert_array_equal(first, second)
    before = ability.fingerprint
    monkeypatch.setattr("counterpoise.evaluation.harness.FEWSHOT_SEED", 5)
    assert load_abilities([str(task)])[0].fingerprint != before
    assert not np.array_equal(ability.measure(model, tokenizer(), "held-out")[0].statistics, first)


def test_unknown_tasks_are_named(task: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one of parity as \?task=NAME"):
        load_abilities([f"{task}?task=none"])


def test_the_metric_that_counts_is_any_that_a_task_reports(task: Path) -> None:
    yaml = task / "parity.yaml"
    more = "".join(f"  - {{metric: {m}, aggregation: {a}, higher_is_better: true}}\n" for m, a in METRICS)
    yaml.write_text(yaml.read_text() + more)
    model, words = tiny("llama"), tokenizer()
    for asked in ("acc_norm", "acc", "logprob"):
        ability = load_abilities([f"{task}?primary={asked}&limit=6"])[0]
        assert primary_first(ability, ability.measure(model, words, "proxy"))[0].metric == asked
        assert ability.fingerprint == load_abilities([f"{task}?limit=6"])[0].fingerprint
    for wrong in ("bleu", "mcc", ""):  # mcc is no number per item
        said = []
        for read in (load_abilities, lambda specs: [find_task(spec) for spec in specs]):
            with pytest.raises(ValueError, match=f"expected logprob or acc or acc_norm, found '{wrong}'") as refused:
                read([f"{task}?primary={wrong}"])
            said.append(str(refused.value))
        assert said[0] == said[1]
    ability = dataclasses.replace(ability, primary="f1")  # a task in Python says what it reports only when it is run
    with pytest.raises(
        ValueError, match="parity: primary: expected logprob or acc or acc_norm, numbers per item, found 'f1'"
    ):
        primary_first(ability, ability.measure(model, words, "proxy"))


def test_it_is_silent_and_says_what_it_cut(task: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{**item, "q": "ab " * 60 + item["q"]} for item in ITEMS]
    (task / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capfd.readouterr()
    with pytest.warns(
        UserWarning, match=r"lm-eval cut texts to the model's context of 128 tokens \(\d+ times, first: .*"
    ):
        load_abilities([f"{task}?limit=4"])[0].measure(tiny("llama"), tokenizer(), "proxy")
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(("text", "line"), [
    ("process_docs: !function code.run\n", 1),
    ("metric_list:\n  - metric: !function code.run\n", 2),
    ("x: !!python/object/apply:os.getcwd []\n", 1),
    ("%TAG !p! tag:yaml.org,2002:python/\n---\nx: 1\n", 1),
    ("include: ../elsewhere.txt\n", 2),
    ("include: [../elsewhere.txt]\n", 2),
    ("x: &away ../elsewhere.txt\ninclude: *away\n", 2),
])  # fmt: skip
def test_a_task_that_runs_code_is_refused_before_it_does(task: Path, text: str, line: int) -> None:
    ran = task / "ran"
    (task / "code.py").write_text(f"open({str(ran)!r}, 'w')\ndef run(docs): return docs\n")
    (task.parent / "elsewhere.txt").write_text("a: 1\nprocess_docs: !function tasks.code.run\n")
    settings = (task / "parity.yaml").read_text()
    (task / "parity.yaml").write_text(settings + text if not text.startswith("%") else text)
    line += 0 if text.startswith(("%", "include", "x: &")) else settings.count("\n")
    for read in (load_abilities, lambda specs: [find_task(spec) for spec in specs]):
        with pytest.raises(ValueError, match=rf", line {line}: this task runs code of its own .* give --trust-tasks"):
            read([str(task)])
    assert not ran.exists()


@pytest.mark.parametrize("metric", ["metric: ./code", "metric: acc, hf_evaluate: true"])
def test_a_metric_of_the_evaluate_library_is_code(task: Path, metric: str) -> None:
    yaml = task / "parity.yaml"
    yaml.write_text(yaml.read_text().replace("metric: acc", metric))
    with pytest.raises(
        ValueError, match=r"this task runs code of its own .* of the evaluate library.; .* --trust-tasks"
    ):
        find_task(str(task))


ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ cycler.__init__.__globals__.os.getcwd() }}", "unsafe"),
        ("{{ q.__class__.__mro__ }}", "unsafe"),
        (ENDLESS, "goes on after"),
        ("{{ q * 10**9 }}", "may never end"),
        ("{{ q.nothing.more }}", "no attribute"),
        ("{{ q[0] / 0 }}", "unsupported operand"),
    ],
)
def test_a_template_does_not_reach_python_and_ends(
    task: Path, monkeypatch: pytest.MonkeyPatch, template: str, said: str
) -> None:
    monkeypatch.setattr(templates, "STEPS", 20_000)
    yaml = task / "parity.yaml"
    yaml.write_text(yaml.read_text().replace("'{{q}}:'", f"'{template}'"))
    with pytest.raises(ValueError, match=f"expected a template of lm-eval .*{said}.*; mend the task"):
        load_abilities([str(task)])[0].measure(tiny("llama"), tokenizer(), "proxy")


def test_a_template_may_use_filters_loops_and_methods(task: Path) -> None:
    yaml = task / "parity.yaml"
    text = "{{ q.upper()|replace('IS', 'are')|regex_replace('EVEN', 'odd') }}{% for o in options[:1] %} {{ o }}{% endfor %}"
    yaml.write_text(yaml.read_text().replace("'{{q}}:'", json.dumps(text)))
    ability = load_abilities([str(task)])[0]
    assert ability.task.doc_to_text(ITEMS[7]) == "are 7 odd yes"  # type: ignore[attr-defined]


def test_a_trusted_task_runs_its_code(task: Path) -> None:
    (task / "code.py").write_text("def run(docs): return docs.select(range(20))\n")
    yaml = task / "parity.yaml"
    yaml.write_text(yaml.read_text() + "process_docs: !function code.run\n")
    (ability,) = load_abilities([str(task)], trust_tasks=True)
    assert len(ability.keys) == 20  # type: ignore[attr-defined]
