"""Tasks of EleutherAI's lm-evaluation-harness as abilities. The only file that imports lm_eval."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from counterpoise.checkpoints.reading import read_text
from counterpoise.evaluation.generation import bleu
from counterpoise.evaluation.measurement import Measurement
from counterpoise.evaluation.parts import Part, part_of
from counterpoise.evaluation.specs import fewest, limit_of, options_of, primary_of
from counterpoise.language.sampling import SCORING, Drawing, way_of
from counterpoise.records import digest
from counterpoise.statistics.bootstrap import Array
from counterpoise.statistics.paired import choice_calibration

FEWSHOT_SEED = 1234
"""Of the random examples in few-shot prompts, the same at every measurement; lm-eval's own default."""
PLAIN_TAGS = ("str", "int", "float", "bool", "null", "seq", "map", "set", "omap", "binary", "timestamp")
"""yaml's own, which run nothing."""
SUMS = ("bleu", "word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics of lm-eval that are no number per item, and can be made of sums over items."""
PAIRS = ("f1", "mcc", "matthews_corrcoef", "brier_score", "likelihood", "chrf", "chrf++", "ter", "bypass")
"""Metrics and aggregations of lm-eval that cannot."""
PERCENT = ("acc", "acc_norm", "exact_match", "em", "f1")


@dataclass(frozen=True)
class HarnessAbility:
    """One lm-eval task, scored item by item on the in-memory model.

    Attributes:
        task: lm_eval's own object; its evaluation split is cut into parts by the content of each document.
        limit: at most so many items per part.
        primary: the metric that counts, where that was asked for.
    """

    name: str
    task: Any
    limit: int | None = None
    source: str = ""
    primary: str | None = None

    @classmethod
    def load(cls, spec: str, *, trusted: bool = False) -> HarnessAbility:
        """From the name of a task that lm-eval knows, or a folder with the yaml of a local one.

        Args:
            spec: `arc_easy`, `tasks/mine` or `tasks/mine?task=first&name=mine&limit=100`.
            trusted: whether a folder may run code of its own.

        Raises:
            ModuleNotFoundError: lm-eval is not installed.
            ValueError: no such task, a group of tasks, several tasks in one folder, code in one that is not trusted, a
                primary metric that it does not report.
        """
        found = find_task(spec, trusted=trusted)
        with _silent():
            tasks = found.manager.load([found.task])["tasks"]
        if len(tasks) != 1:
            raise ValueError(f"{spec}: expected one task, found a group of {len(tasks)}; give its tasks one by one")
        task = next(iter(tasks.values()))
        if not found.output_type:  # written in Python: what it reports shows when it is loaded
            primary_of(spec, {} if found.primary is None else {"primary": found.primary}, list(task.aggregation()))
        return cls(found.name, task, found.limit, spec, found.primary)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """sha256 of every document's content, in lm-eval's order."""
        return tuple(
            hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()
            for doc in self.task.eval_docs
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the documents, the first prompt, the task's settings and version, the seed of its examples."""
        from importlib.metadata import version

        first = self.task.doc_to_text(self.task.eval_docs[0])
        settings = json.dumps(self.task.dump_config(), sort_keys=True, default=_named)
        about = [version("lm-eval"), str(self.task.VERSION), settings, str(first), FEWSHOT_SEED]
        return digest([*about, sorted(self.keys)])

    def measure(
        self, model: nn.Module, tokenizer: Any, part: Part, drawing: Drawing = SCORING, *, limit: int | None = None
    ) -> list[Measurement]:
        """See `Ability.measure`; prompts, lengths and stop words are the task's own, without a chat template.

        lm-eval cuts what does not fit the context; a warning says so.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        chosen = self._chosen(part, fewest(limit, self.limit))
        device, batch_size = str(next(model.parameters()).device), drawing.batch_size
        if self.task.OUTPUT_TYPE == "generate_until":  # lm-eval pads in front and keeps a cache
            way = way_of(model)
            batch_size = batch_size if way.pads_in_front else 1
            if not way.caches:
                raise ValueError(
                    f"{self.source}: expected a model that gives the same numbers with a cache, as lm-eval draws with one, "
                    f"found {type(model).__name__}; use an ability of generate:FILE.jsonl"
                )
        task = self.task.task_name
        self.task.set_fewshot_seed(FEWSHOT_SEED)
        with _silent() as said:
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device)
            found = evaluate(lm, {task: self.task}, samples={task: chosen}, log_samples=True, bootstrap_iters=0)
        if cut := [line for line in said if "runcat" in line]:
            warnings.warn(
                f"{self.source}: lm-eval cut texts to the model's context of {lm.max_length} tokens ({len(cut)} times, "
                f"first: {cut[0]}); the scores are of what was left",
                stacklevel=2,
            )
        rows = found["samples"][task]
        first = rows[0]["filter"]  # a task may post-process its answers in several ways; its first one counts
        by_index = {row["doc_id"]: row for row in rows if row["filter"] == first}
        return self._measurements([by_index[i] for i in chosen], tuple(self.keys[i] for i in chosen))

    def _chosen(self, part: Part, limit: int | None) -> list[int]:
        indices = {key: i for i, key in reversed(list(enumerate(self.keys))) if part_of(key) == part}
        if not indices:
            raise ValueError(f"{self.source}: expected items in the {part} part, found none among {len(self.keys)}")
        return sorted(indices[key] for key in sorted(indices)[:limit])  # lm-eval wants them in its own order

    def _measurements(self, rows: Sequence[Mapping[str, Any]], keys: tuple[str, ...]) -> list[Measurement]:
        made = []
        several = self.task.OUTPUT_TYPE == "multiple_choice"
        if several and all(isinstance(row["target"], int) for row in rows):
            logs = [[float(r[0]) for r in row["filtered_resps"]] for row in rows]
            gold = [v[row["target"]] for v, row in zip(logs, rows, strict=True)]
            sure = np.array([choice_calibration(v, row["target"]) for v, row in zip(logs, rows, strict=True)])
            made.append(Measurement("logprob", "nats", np.array(gold)[:, None], "mean", None, keys, sure))
        for name in rows[0]["metrics"]:
            statistics = _statistics(name, [row[name] for row in rows])
            if statistics is None:
                continue
            values, aggregate, unit = statistics
            chance: float | None = None
            if unit == "%":
                chance = 100 * float(np.mean([1 / len(r["filtered_resps"]) for r in rows])) if several else 0.0
            lower = not self.task.higher_is_better().get(name, True) and aggregate == "mean" and name != "perplexity"
            made.append(
                Measurement(f"-{name}" if lower else name, unit, -values if lower else values, aggregate, chance, keys)
            )
        if not made:
            raise ValueError(
                f"{self.source}: none of its metrics is a number per item: {', '.join(rows[0]['metrics'])}"
            )
        return made


class TaskFound(NamedTuple):
    """A task that lm-eval knows, before its data set is loaded.

    Attributes:
        name: what results call it.
        task: what lm-eval calls it.
        output_type: "multiple_choice", "generate_until", ...; "" for one that is written in Python.
        primary: the metric that counts, where that was asked for.
    """

    name: str
    task: str
    limit: int | None
    output_type: str
    manager: Any
    primary: str | None


def find_task(spec: str, *, trusted: bool = False) -> TaskFound:
    """Look up the task that a spec names; see `HarnessAbility.load`. Its data set is not touched."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ability {spec!r}: expected choices:, continue: or generate:FILE.jsonl, or a task of lm-eval, which is "
            "not installed; pip install 'counterpoise[eval]'"
        ) from error
    place, options = spec.partition("?")[0], options_of(spec, ("task", "name", "limit", "primary"))
    limit = limit_of(spec, options)
    if Path(place).is_dir():
        if not trusted:
            _refuse_code(spec, Path(place))
        with _silent():
            manager = TaskManager(include_defaults=False, include_path=place)
        local = sorted(manager.all_tasks)
        name = options.get("task") or (local[0] if len(local) == 1 else "")
    else:
        manager, local, name = _all_tasks(), [], place
    if name not in manager.all_tasks:
        expected = f"one of {', '.join(local)} as ?task=NAME" if local else "a file spec or the name of an lm-eval task"
        raise ValueError(f"ability {spec!r}: expected {expected}; `lm-eval ls tasks` lists what lm-eval has")
    if name not in manager.all_subtasks:
        raise ValueError(f"{spec}: expected one task, found a group of them; give its tasks one by one")
    settings = manager.task_index[name].cfg or {}
    kind = "" if "class" in settings else str(settings.get("output_type", "generate_until"))
    primary = primary_of(spec, options, _reported(settings, kind)) if kind else options.get("primary")
    return TaskFound(options.get("name") or name, name, limit, kind, manager, primary)


def _reported(settings: Mapping[str, Any], kind: str) -> list[str]:
    """The metrics of a task that are numbers per item, by its yaml."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    several, own = kind == "multiple_choice", bool(settings.get("process_results"))
    listed = settings.get("metric_list") or [{"metric": m} for m in DEFAULT_METRIC_REGISTRY.get(kind, ())]
    found = ["logprob"] if several else []
    for entry in listed:
        name = str(entry.get("metric"))
        name = name.rpartition(".")[2] if "/" in name else name  # a function stands there with its file
        pairs = name in PAIRS if several and not own else entry.get("aggregation", name) in PAIRS
        found += [name] if name in SUMS or not pairs else []
    return found


def _refuse_code(spec: str, folder: Path) -> None:
    """Raise where a yaml of the folder, or one that it includes, names code; nothing of it is constructed."""
    import yaml

    waiting, seen = sorted(folder.rglob("*.yaml")), set[Path]()
    while waiting:
        file = waiting.pop(0).resolve()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        try:
            tokens = list(yaml.scan(read_text(file)))
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{file}: expected yaml, found {' '.join(str(error).split())}") from None
        for token in tokens:
            plain = isinstance(token, yaml.TagToken) and token.value[0] == "!!" and token.value[1] in PLAIN_TAGS
            if isinstance(token, (yaml.TagToken, yaml.DirectiveToken)) and not plain:
                raise ValueError(
                    f"{spec}: {file}, line {token.start_mark.line + 1}: this task runs code of its own "
                    f"({''.join(map(str, token.value or ()))}); read it, and give --trust-tasks to let it"
                )
        key = ""
        for before, token in pairwise(tokens):
            if isinstance(token, yaml.ScalarToken):
                if isinstance(before, yaml.KeyToken):
                    key = token.value
                elif key == "include":
                    waiting.append(file.parent / token.value)


def _hidden(bar: Any, *args: Any, **settings: Any) -> Any:
    return bar(*args, **{**settings, "disable": True})


@contextmanager
def _silent() -> Iterator[list[str]]:
    """Inside, lm-eval and datasets draw no bars and say nothing; what lm-eval would have said is in the list."""
    import datasets

    said: list[str] = []
    log, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    drawn = [
        m
        for name, m in list(sys.modules.items())
        if name.startswith("lm_eval.") and isinstance(getattr(m, "tqdm", None), type)
    ]
    before, passed = [m.tqdm for m in drawn], log.propagate
    datasets.disable_progress_bars()
    log.addHandler(handler)
    log.propagate = False
    for module, bar in zip(drawn, before, strict=True):
        module.tqdm = partial(_hidden, bar)  # type: ignore[attr-defined]
    try:
        yield said
    finally:
        for module, bar in zip(drawn, before, strict=True):
            module.tqdm = bar  # type: ignore[attr-defined]
        log.propagate = passed
        log.removeHandler(handler)
        if not bars:
            datasets.enable_progress_bars()


@cache
def _all_tasks() -> Any:
    """lm-eval's own tasks; reading them all takes some ten seconds."""
    from lm_eval.tasks import TaskManager

    with _silent():
        return TaskManager()


def _named(thing: Any) -> str:
    """A function of a task's settings by its name: its address differs from run to run."""
    return str(getattr(thing, "__qualname__", type(thing).__name__))


def _statistics(name: str, values: list[Any]) -> tuple[Array, str, str] | None:
    """Per-item statistics, aggregate and unit; None for a metric that is no sum over items."""
    if name == "bleu":
        answers = [str(answer) for _, answer in values]
        references = [str(gold[0] if isinstance(gold, (list, tuple)) else gold) for gold, _ in values]
        return bleu(answers, references), "bleu", "BLEU"
    if name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):  # (log-likelihood, words or bytes)
        return np.array(values, dtype=np.float64), "ratio", f"nats/{'word' if name[0] == 'w' else 'byte'}"
    if not all(isinstance(v, (bool, int, float, np.number)) for v in values):
        return None
    numbers = np.array(values, dtype=np.float64)[:, None]
    if name == "perplexity":  # what lm-eval averages, before it takes the exponential
        return numbers, "mean", "nats"
    return (100 * numbers, "mean", "%") if name in PERCENT else (numbers, "mean", "")
