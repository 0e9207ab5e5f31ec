"""Tasks of EleutherAI's lm-evaluation-harness as abilities, measured; `harness_tasks` finds and checks them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from counterpoise.evaluation.harness_tasks import silent
from counterpoise.evaluation.logged import made_of, of_item
from counterpoise.evaluation.measurement import Measurement
from counterpoise.evaluation.parts import Part, part_of
from counterpoise.evaluation.specs import fewest
from counterpoise.language.engine import NO_TASKS, Engine, LanguageModel
from counterpoise.language.generating import way_of
from counterpoise.language.groups import groups_of
from counterpoise.language.sampling import SCORING, Drawing
from counterpoise.records import digest
from counterpoise.statistics.bootstrap import Array
from counterpoise.statistics.paired import choice_calibration

FEWSHOT_SEED = 1234
"""Of the random examples in few-shot prompts, the same at every measurement; lm-eval's own default."""
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
        self, model: LanguageModel, tokenizer: Any, part: Part, drawing: Drawing = SCORING, *, limit: int | None = None
    ) -> list[Measurement]:
        """See `Ability.measure`; prompts, lengths and stop words are the task's own, without a chat template.

        lm-eval cuts what does not fit the context; a warning says so.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        if isinstance(model, Engine):
            raise ValueError(NO_TASKS)
        chosen = self._chosen(part, fewest(limit, self.limit))
        device, batch_size = str(next(model.parameters()).device), drawing.rows
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
