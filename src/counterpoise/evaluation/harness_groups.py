"""lm-eval's tasks by name, and its groups and tags as one ability: subtasks measured each, weighted as lm-eval does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from counterpoise.evaluation.harness import HarnessAbility
from counterpoise.evaluation.harness_tasks import find_task, silent
from counterpoise.evaluation.log_tax import NOT_LINEAR
from counterpoise.evaluation.measurement import Measurement
from counterpoise.evaluation.parts import Part, part_of
from counterpoise.evaluation.specs import primary_of
from counterpoise.language.engine import LanguageModel
from counterpoise.language.sampling import SCORING, Drawing
from counterpoise.records import digest
from counterpoise.statistics.bootstrap import weighted


def load_task(spec: str, *, trusted: bool = False) -> HarnessAbility | HarnessGroup:
    """From the name of a task, group or tag that lm-eval knows, or a folder with the yaml of local ones.

    Args:
        spec: `arc_easy`, `mmlu`, `tasks/mine` or `tasks/mine?task=first&name=mine&limit=100`; a limit is of each subtask.
        trusted: whether a folder may run code of its own.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: no such task, several in one folder and none chosen, or code in one that is not trusted.
    """
    found = find_task(spec, trusted=trusted)
    with silent():
        loaded = found.manager.load([found.task])
    tasks, group = loaded["tasks"], loaded.get("groups", {}).get(found.task)
    if group is None and list(tasks) == [found.task]:
        if not found.output_type:  # written in Python: what it reports shows when it is loaded
            asked = {} if found.primary is None else {"primary": found.primary}
            primary_of(spec, asked, list(tasks[found.task].aggregation()))
        return HarnessAbility(found.name, tasks[found.task], found.limit, spec, found.primary)
    each = [HarnessAbility(name, task, found.limit, f"{spec}: {name}") for name, task in tasks.items()]
    counts = Counter(t.task_name for t in (group.get_all_tasks() if group else tasks.values()))
    sized = {a.metric: bool(a.weight_by_size) for a in (group and group.aggregate_metric_list) or ()}
    return HarnessGroup(found.name, tuple(each), counts, sized, spec, found.primary)


@dataclass(frozen=True)
class HarnessGroup:
    """Several lm-eval tasks with one number each metric.

    Attributes:
        counts: how often lm-eval counts each task: once, or more if it stands in several groups below this one.
        sized: metric -> whether its tasks weigh by their items, else alike, by the group's aggregate_metric_list. Empty for
            a tag and for a group without one, to which lm-eval gives no number: every metric then, by items.
    """

    name: str
    subtasks: tuple[HarnessAbility, ...]
    counts: Mapping[str, int]
    sized: Mapping[str, bool]
    source: str = ""
    primary: str | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 over those of the subtasks and how they weigh."""
        return digest([[a.fingerprint for a in self.subtasks], dict(self.counts), dict(self.sized)])

    def questions(self, tokenizer: Any, part: Part, drawing: Drawing) -> list[tuple[int, ...]]:
        """See `Ability.questions`: those of all its tasks."""
        return [ids for task in self.subtasks for ids in task.questions(tokenizer, part, drawing)]

    def measure(
        self, model: LanguageModel, tokenizer: Any, part: Part, drawing: Drawing = SCORING, *, limit: int | None = None
    ) -> list[Measurement]:
        """See `Ability.measure`; metrics that all subtasks have come first, and one without items in the part is left out."""
        found = {
            a.name: {m.metric: m for m in a.measure(model, tokenizer, part, drawing, limit=limit)}
            for a in self.subtasks
            if any(part_of(group) == part for group in a.groups)
        }
        metrics = list(dict.fromkeys(metric for measured in found.values() for metric in measured))
        metrics.sort(key=lambda metric: sum(metric not in measured for measured in found.values()))
        made = []
        for metric in metrics:
            bare = metric.removeprefix("-")
            sized = self.sized.get(bare, next(iter(self.sized.values()), True) if bare == "logprob" else None)
            if self.sized and (sized is None or bare in NOT_LINEAR):
                continue
            made.append(self._joined({n: ms[metric] for n, ms in found.items() if metric in ms}, sized is not False))
        if not made:
            raise ValueError(
                f"{self.source}: expected a group with a mean of numbers per item in the {part} part, found "
                f"{', '.join(metrics) or 'no items'}; give its tasks one by one"
            )
        return made

    def _joined(self, of: Mapping[str, Measurement], sized: bool) -> Measurement:
        first: Sequence[Measurement] = list(of.values())
        strata = [(len(m.keys), self.counts[name] * (len(m.keys) if sized else 1)) for name, m in of.items()]
        chances = [m.chance for m in first if m.chance is not None]
        chance = float(np.average(chances, weights=[w for _, w in strata])) if len(chances) == len(first) else None
        sure = [m.sureness for m in first if m.sureness is not None]
        groups = tuple(f"{number:04} {group}" for number, m in enumerate(first) for group in m.groups or m.keys)
        return Measurement(
            first[0].metric,
            first[0].unit,
            np.concatenate([m.statistics for m in first]),
            weighted(first[0].aggregate, strata),
            chance,
            tuple(key for m in first for key in m.keys),
            groups if any(m.groups for m in first) else (),
            subtasks=tuple((name, len(m.keys), m.chance) for name, m in of.items()),
            sureness=np.concatenate(sure) if len(sure) == len(first) else None,
        )
