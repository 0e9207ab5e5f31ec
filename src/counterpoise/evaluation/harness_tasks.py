"""Tasks of EleutherAI's lm-evaluation-harness by name, before their data is loaded: settings read, foreign code refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from counterpoise.checkpoints.reading import read_text
from counterpoise.evaluation.specs import ABILITIES, limit_of, options_of, primary_of
from counterpoise.language.templates import bounded, refuse_boundless, within_memory

PLAIN_TAGS = ("str", "int", "float", "bool", "null", "seq", "map", "set", "omap", "binary", "timestamp")
"""yaml's own, which run nothing."""
SUMS = ("bleu", "word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics of lm-eval that are no number per item, and can be made of sums over items."""
PAIRS = ("f1", "mcc", "matthews_corrcoef", "brier_score", "likelihood", "chrf", "chrf++", "ter", "bypass")
"""Metrics and aggregations of lm-eval that cannot."""
MEND = "mend the task"


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
    place, options = spec.partition("?")[0], options_of(spec, ("task", "name", "limit", "primary"))
    if ":" in place and not Path(place).exists():  # said before lm-eval is loaded, none of whose tasks has a colon
        raise ValueError(f"ability {spec!r}: expected {ABILITIES}")
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ability {spec!r}: expected {ABILITIES}; lm-eval is not installed: pip install 'counterpoise[eval]'"
        ) from error
    _sandbox()
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
        expected = f"one of {', '.join(local)} as ?task=NAME" if local else ABILITIES
        raise ValueError(f"ability {spec!r}: expected {expected}; `lm-eval ls tasks` lists what lm-eval has")
    try:
        leaves = _leaves(manager.task_index, name, spec)
    except RecursionError:
        raise ValueError(f"{spec}: expected a group of tasks, found one that contains itself") from None
    kinds = ["" if "class" in c else str(c.get("output_type", "generate_until")) for c in leaves]
    primary = options.get("primary")
    if all(kinds):
        named = [metric for c, kind in zip(leaves, kinds, strict=True) for metric in _reported(c, kind)]
        listed = (getattr(manager.task_index[name], "cfg", None) or {}).get("aggregate_metric_list") or ()
        group = {str(e["metric"]) for e in (listed if isinstance(listed, list) else [listed]) if e}
        kept = [m for m in dict.fromkeys(named) if not group or m in group or m == "logprob"]
        primary = primary_of(spec, options, kept)
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
    """From now on lm-eval renders a task's templates in jinja's sandbox, within bounds: plain jinja reaches all of Python."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    own = utils.env
    box = SandboxedEnvironment(undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline)
    box.filters |= own.filters
    compiled = lru_cache(box.from_string)

    def apply_template(template: str, doc: dict[str, Any]) -> str:
        found = f"expected a template of lm-eval that fits its documents, found {template[:80]!r}"
        refuse_boundless(template, f"{found}, which", MEND)
        with within_memory(), bounded(found, MEND):
            return compiled(template).render(**doc)

    utils.apply_template = apply_template


@contextmanager
def silent() -> Iterator[list[str]]:
    """Inside, lm-eval and datasets draw no bars and say nothing; what lm-eval would have said is in the list."""
    from tqdm.std import tqdm

    said: list[str] = []
    log, drawn = logging.getLogger("lm_eval"), tqdm.__init__
    handler, passed = logging.Handler(), log.propagate
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]

    def hidden(bar: Any, *args: Any, **settings: Any) -> None:
        drawn(bar, *args, **{**settings, "disable": True})

    log.addHandler(handler)
    log.propagate, tqdm.__init__ = False, hidden  # type: ignore[method-assign]
    try:
        yield said
    finally:
        log.propagate, tqdm.__init__ = passed, drawn  # type: ignore[method-assign]
        log.removeHandler(handler)


@cache
def _all_tasks() -> Any:
    """lm-eval's own tasks; reading them all takes some ten seconds."""
    from lm_eval.tasks import TaskManager

    with silent():
        return TaskManager()
