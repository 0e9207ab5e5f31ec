"""Tasks of EleutherAI's lm-evaluation-harness as abilities. The only file that imports lm_eval."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from counterpoise.checkpoints.reading import read_text
from counterpoise.evaluation.logged import made_of, of_item
from counterpoise.evaluation.measurement import Measurement
from counterpoise.evaluation.parts import Part, part_of
from counterpoise.evaluation.specs import fewest, limit_of, options_of, primary_of
from counterpoise.language.groups import groups_of
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

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """sha256 of every document's content, in lm-eval's order."""
        return tuple(
            hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()
            for doc in self.task.eval_docs
        )

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The group of every document, its own key where it is alone."""
        docs = {k: d if isinstance(d, dict) else {} for k, d in zip(self.keys, self.task.eval_docs, strict=True)}
        of = dict(zip(docs, groups_of([*docs.values()]), strict=True))
        return tuple(of[key] or key for key in self.keys)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the documents, the first prompt, the task's settings and version, the seed of its examples."""
        from importlib.metadata import version

        first = self.task.doc_to_text(self.task.eval_docs[0])
        settings = json.dumps(self.task.dump_config(), sort_keys=True, default=_named)
        about = [version("lm-eval"), str(self.task.VERSION), settings, str(first), FEWSHOT_SEED]
        together = sorted({(g, k) for g, k in zip(self.groups, self.keys, strict=True) if g != k})
        return digest([*about, sorted(self.keys), *([together] if together else [])])

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
        with silent() as said:
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
        found = self._measurements([by_index[i] for i in chosen], tuple(self.keys[i] for i in chosen))
        groups = tuple(self.groups[i] for i in chosen)
        return [replace(m, groups=groups if len(set(groups)) < len(groups) else ()) for m in found]

    def questions(self, tokenizer: Any, part: Part, drawing: Drawing) -> list[tuple[int, ...]]:
        """See `Ability.questions`; none of a task whose contexts are no plain text."""
        texts = [self.task.doc_to_text(self.task.eval_docs[i]) for i in self._chosen(part, self.limit)]
        return [tuple(tokenizer(text)["input_ids"]) for text in texts if isinstance(text, str) and text]

    def _chosen(self, part: Part, limit: int | None) -> list[int]:
        indices = {key: i for i, key in reversed(list(enumerate(self.keys))) if part_of(self.groups[i]) == part}
        if not indices:
            raise ValueError(f"{self.source}: expected items in the {part} part, found none among {len(self.keys)}")
        return sorted(indices[key] for key in sorted(indices)[:limit])  # lm-eval wants them in its own order

    def _measurements(self, rows: Sequence[Mapping[str, Any]], keys: tuple[str, ...]) -> list[Measurement]:
        made = []
        several = self.task.OUTPUT_TYPE == "multiple_choice"
        if several and all(isinstance(row["target"], int) for row in rows):
            logs = [[float(r[0]) for r in row["filtered_resps"][: _choices(row)]] for row in rows]
            gold = [v[row["target"]] for v, row in zip(logs, rows, strict=True)]
            sure = np.array([choice_calibration(v, row["target"]) for v, row in zip(logs, rows, strict=True)])
            made.append(Measurement("logprob", "nats", np.array(gold)[:, None], "mean", None, keys, sureness=sure))
        for name in rows[0]["metrics"]:
            statistics = _statistics(name, [row[name] for row in rows])
            if statistics is None:
                continue
            values, aggregate, unit = statistics
            chance: float | None = None
            if unit == "%":
                chance = 100 * float(np.mean([1 / _choices(r) for r in rows])) if several else 0.0
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
        output_type: "multiple_choice", "generate_until", ...; "" for one that is written in Python, and for tasks of several.
        primary: the metric that counts, where that was asked for.
        tasks: 1, or how many a group or tag has.
    """

    name: str
    task: str
    limit: int | None
    output_type: str
    manager: Any
    primary: str | None
    tasks: int = 1


def find_task(spec: str, *, trusted: bool = False) -> TaskFound:
    """Look up the task, group or tag that a spec names; see `harness_groups.load_task`. Its data set is not touched."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ability {spec!r}: expected choices:, continue: or generate:FILE.jsonl, or a task of lm-eval, which is "
            "not installed; pip install 'counterpoise[eval]'"
        ) from error
    _sandbox()
    place, options = spec.partition("?")[0], options_of(spec, ("task", "name", "limit", "primary"))
    limit = limit_of(spec, options)
    if Path(place).is_dir():
        if not trusted:
            _refuse_code(spec, Path(place))
        with silent():
            manager = TaskManager(include_defaults=False, include_path=place)
        local = sorted(manager.all_tasks)
        name = options.get("task") or (local[0] if len(local) == 1 else "")
    else:
        manager, local, name = _all_tasks(), [], place
    if name not in manager.all_tasks:
        expected = f"one of {', '.join(local)} as ?task=NAME" if local else "a file spec or the name of an lm-eval task"
        raise ValueError(f"ability {spec!r}: expected {expected}; `lm-eval ls tasks` lists what lm-eval has")
    try:
        leaves = _leaves(manager.task_index, name, spec)
    except RecursionError:
        raise ValueError(f"{spec}: expected a group of tasks, found one that contains itself") from None
    kinds = ["" if "class" in c else str(c.get("output_type", "generate_until")) for c in leaves]
    primary = options.get("primary")
    if all(kinds):
        named = [metric for c, kind in zip(leaves, kinds, strict=True) for metric in _reported(c, kind)]
        primary = primary_of(spec, options, list(dict.fromkeys(named)))
    kind = kinds[0] if len(set(kinds)) == 1 else ""
    return TaskFound(options.get("name") or name, name, limit, kind, manager, primary, len(leaves))


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


def _leaves(index: Mapping[str, Any], item: Any, spec: str) -> list[Mapping[str, Any]]:
    """The settings of every task below a name, or below what a group's yaml has in its place."""
    name = item if isinstance(item, str) else item.get("group") or item.get("task")
    if (entry := index.get(name) if isinstance(name, str) else None) is not None:
        inside: Any = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
        own = entry.cfg or {}
    elif isinstance(item, str):
        raise ValueError(f"{spec}: expected a group of tasks that are there, found {item!r} in it, which is not")
    else:
        inside, own = item.get("task"), item
    return [leaf for one in inside for leaf in _leaves(index, one, spec)] if isinstance(inside, list) else [own]


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
            text = read_text(file)
            for token in yaml.scan(text):
                plain = isinstance(token, yaml.TagToken) and token.value[0] == "!!" and token.value[1] in PLAIN_TAGS
                if isinstance(token, (yaml.TagToken, yaml.DirectiveToken)) and not plain:
                    raise _code(
                        f"{spec}: {file}, line {token.start_mark.line + 1}", "".join(map(str, token.value or ()))
                    )
            settings = list(_settings(yaml.safe_load(text)))
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{file}: expected yaml, found {' '.join(str(error).split())}") from None
        for key, value in settings:
            if key == "include":
                waiting += [file.parent / str(name) for name in (value if isinstance(value, list) else [value])]
            if (key == "hf_evaluate" and value) or (key == "metric" and not _known_metric(value)):
                raise _code(f"{spec}: {file}", f"{key}: {value!s:.80}, of the evaluate library")


def _code(place: str, found: str) -> ValueError:
    return ValueError(f"{place}: this task runs code of its own ({found}); read it, and give --trust-tasks to let it")


def _settings(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every key with its value, however deep; what several aliases stand for is looked at once."""
    waiting, seen = [content], set[int]()
    while waiting:
        if id(found := waiting.pop()) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, dict):
            yield from found.items()
        waiting += found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()


def _known_metric(name: Any) -> bool:
    """lm-eval has it; any other name is looked up in Hugging Face's evaluate, which runs a script of that name."""
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    return isinstance(name, str) and name in metric_registry


@cache
def _sandbox() -> None:
    """From now on lm-eval renders a task's templates in jinja's sandbox: plain jinja reaches all of Python."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    own = utils.env
    box = SandboxedEnvironment(undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline)
    box.filters |= own.filters

    def apply_template(template: str, doc: dict[str, Any]) -> str:
        try:
            return box.from_string(template).render(**doc)
        except TemplateError as error:
            raise ValueError(
                f"expected a template of lm-eval that fits its documents, found {template[:80]!r} ({error}); mend the task"
            ) from None

    utils.apply_template = apply_template


def _hidden(bar: Any, *args: Any, **settings: Any) -> Any:
    return bar(*args, **{**settings, "disable": True})


@contextmanager
def silent() -> Iterator[list[str]]:
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

    with silent():
        return TaskManager()


def _named(thing: Any) -> str:
    """A function of a task's settings by its name: its address differs from run to run."""
    return str(getattr(thing, "__qualname__", type(thing).__name__))


def _choices(row: Mapping[str, Any]) -> int:
    """How many a model chose from; for mutual information they are asked once more, without the question."""
    return len(row["filtered_resps"]) // (2 if "acc_mutual_info" in row["metrics"] else 1)


def _statistics(name: str, values: list[Any]) -> tuple[Array, str, str] | None:
    """Per-item statistics, aggregate and unit; None for a metric that is no sum over items."""
    rows = [of_item(name, value) for value in values]
    if None in rows:
        return None
    statistics = np.array(rows, dtype=np.float64)
    return (100 * statistics, "mean", "%") if name in PERCENT else (statistics, *made_of(name, statistics.shape[1]))
