"""Logs of lm-eval for tests: written by lm-eval itself from local tasks, or by hand in exactly its format."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATE = "2026-11-28T12-16-18.213191"
HEAD = "test_split: test\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\nmetadata: {{version: 1.0}}\n"
CHOICE = "output_type: multiple_choice\ndoc_to_text: '{{q}}:'\ndoc_to_choice: '{{options}}'\ndoc_to_target: gold\n"
TASKS = {
    "one": CHOICE + "metric_list:\n  - {metric: acc}\n  - {metric: acc_norm}\n  - {metric: mcc}\n",
    "two": CHOICE + "metric_list:\n  - {metric: acc}\n",
    "text": "output_type: generate_until\ndoc_to_text: '{{q}}:'\ndoc_to_target: '{{a}}'\n"
    "generation_kwargs: {until: [' '], max_gen_toks: 8}\n"
    "filter_list:\n  - {name: strict, filter: [{function: take_first}]}\n"
    "  - {name: letters, filter: [{function: regex, regex_pattern: '([a-h]+)'}, {function: take_first}]}\n"
    "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n  - {metric: bleu}\n",
    "last": "output_type: loglikelihood\ndoc_to_text: '{{q}}:'\ndoc_to_target: ' {{a}}'\n"
    "metric_list:\n  - {metric: perplexity}\n  - {metric: acc}\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}} {{a}}'\n"
    "metric_list:\n  - {metric: word_perplexity}\n  - {metric: byte_perplexity}\n  - {metric: bits_per_byte}\n",
}
GROUP = "group: both\ntask: [one, two]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: false}\n"


def local_tasks(folder: Path) -> Path:
    """The yaml files of TASKS and their data: 24 and 15 choices, 20 texts."""
    draw = random.Random(0)
    folder.mkdir()

    def words(n: int) -> str:
        return " ".join("".join(draw.choice("abcdefgh") for _ in range(3)) for _ in range(n))

    choices = [{"q": f"{words(3)}{i}", "options": [words(1), words(2), words(1)], "gold": i % 3} for i in range(24)]
    texts = [{"q": f"{words(3)}{i}", "a": words(1)} for i in range(20)]
    for name, settings in TASKS.items():
        rows = choices if name == "one" else choices[:15] if name == "two" else texts
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + HEAD.format(data=data) + settings)
    (folder / "both.yaml").write_text(GROUP)
    return folder


def run(tasks: Path, names: Sequence[str], model: Any, words: Any, out: Path, limit: int | None = None) -> Path:
    """What `lm_eval --log_samples --output_path OUT` writes."""
    from lm_eval.evaluator import evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=str(tasks))
    lm = HFLM(pretrained=model, tokenizer=words, batch_size=16, device="cpu")
    found = evaluate(lm, manager.load(list(names)), limit=limit, log_samples=True, bootstrap_iters=0, verbosity="ERROR")
    assert found is not None
    tracker = EvaluationTracker(output_path=str(out))
    tracker.general_config_tracker.log_experiment_args("hf", f"pretrained={out.name}", None, None, False)  # type: ignore[arg-type]
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    return out


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def row(i: int, metrics: Mapping[str, Any], *, kind: str = "none", prompt: str = "", **more: Any) -> dict[str, Any]:
    """One line of a samples file about document `i`."""
    hashes = {"doc_hash": sha(f"document {i}"), "prompt_hash": sha(f"{prompt}{i}"), "target_hash": sha("target")}
    return {"doc_id": i, "filter": kind, "metrics": list(metrics), **hashes, **metrics, **more}


def choice(i: int, logs: Sequence[float], gold: int, **more: Any) -> dict[str, Any]:
    """One line of a multiple choice task."""
    right = float(max(range(len(logs)), key=logs.__getitem__) == gold)
    answers = [[[str(v), "False"]] for v in logs]
    return row(i, {"acc": right}, target=str(gold), resps=answers, **more)


def write(folder: Path, tasks: Mapping[str, Sequence[Mapping[str, Any]]], *, date: str = DATE, **header: Any) -> Path:
    """A folder with the samples of some tasks and, where a header is given, their results file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (folder / f"samples_{name}_{date}.jsonl").write_text(text)
    if header:
        content = {"results": {}, "versions": {}, "higher_is_better": {}, **header}
        (folder / f"results_{date}.json").write_text(json.dumps(content))
    return folder
