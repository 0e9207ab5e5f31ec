"""The tax of two finished runs: items paired by their content, every task, metric and group with intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from counterpoise.evaluation.logged import CALIBRATION, Column, Key, Log, Task
from counterpoise.evaluation.measurement import bounded
from counterpoise.statistics.bootstrap import Array, clustered
from counterpoise.statistics.paired import (
    MOST,
    Resampled,
    calibration,
    cells,
    flips,
    holm,
    resampled,
    stratified,
)

FORMAT = "counterpoise tax --from 1"
FIRST, LIKELIHOOD, FURTHER, GROUP, REWARD = "first", "likelihood", "further", "group", "reward"
"""Families of tests: p is adjusted within each. The reward of our own results is no task."""
NOT_LINEAR = ("perplexity", "word_perplexity", "byte_perplexity")
"""lm-eval averages these over a group's tasks; their logarithms are what is compared here."""


Kept = tuple[Resampled, Array | None]
"""What a group's row needs of a task: both sides resampled, and `cells` of each group of items, or of each item."""


class Pairs(NamedTuple):
    """Positions of the same items in two lists of keys.

    Attributes:
        reworded: pairs whose prompts differ.
        retargeted: items that both have, with other targets.
    """

    first: list[int]
    second: list[int]
    reworded: int
    retargeted: int


def compare(pre: Log, post: Log) -> dict[str, Any]:
    """The tax of two logs as plain json: rows of tasks and groups, calibration, and what has to be said.

    Raises:
        ValueError: no task in both, other versions of a task or other numbers of examples in its prompt.
    """
    if not (pre.named and post.named) and len(pre.tasks) == len(post.tasks) == 1:
        (task,), name = post.tasks.values(), next(iter(pre.tasks))
        post.tasks = {name: task}
    common = [name for name in pre.tasks if name in post.tasks]
    if not common:
        found = (f"{log.source} with {_listed(list(log.tasks))}" for log in (pre, post))
        raise ValueError(f"tax --from: expected a task that both logs have, found {' and '.join(found)}")
    _refuse_others(pre, post, common)
    notes = [*pre.notes, *post.notes]
    for log, other in ((pre, post), (post, pre)):
        if lone := [name for name in log.tasks if name not in other.tasks]:
            notes.append(f"Only in {log.source}, left out: {', '.join(lone)}.")
    rows: list[dict[str, Any]] = []
    calibrated: list[dict[str, Any]] = []
    kept: dict[tuple[str, str, str], Kept] = {}
    grouped_tasks = {task for group in pre.groups.values() for task in group.tasks}
    sizes = Counter[int]()
    for name in common:
        first, second = pre.tasks[name], post.tasks[name]
        for why in (first.left_out | second.left_out).items():
            notes.append(f"{name}: {why[0]} is left out: {why[1]}.")
        before = len(rows)
        for (metric, kind), a, b, items in _columns(first, second, pre, post, notes):
            if a.aggregate == CALIBRATION:
                calibrated += [
                    {"name": name, "measure": k, "items": items, **v}
                    for k, v in calibration(*_both(a, b), a.groups).items()
                ]
                continue
            row, sides, flipped = _row(name, metric, kind, a, b)
            row["family"] = FIRST if len(rows) == before else LIKELIHOOD if metric == "logprob" else FURTHER
            if name == REWARD and pre.kind == "counterpoise":
                row["family"] = REWARD
            rows.append(row)
            if name in grouped_tasks:
                kept[name, metric, kind] = resampled(*sides, a.aggregate, seed=sizes[min(items, MOST)]), flipped
        sizes.update({min(row["items"], MOST) for row in rows[before:]})
    if not rows:
        raise ValueError(f"tax --from: expected items that both logs have, found none; {' '.join(notes)}")
    rows += _group_rows(pre, post, kept, rows, notes)
    for family in (FIRST, LIKELIHOOD, FURTHER, GROUP, REWARD):
        some = [row["tax"] for row in rows if row["family"] == family]
        for tax, p in zip(some, holm([t["p"] for t in some]), strict=True):
            tax["p_holm"] = p
    unknown = [f"{r['name']} {r['metric']}" for r in rows if r["up"] is None]
    if unknown:
        notes.append(f"Whether higher is better is not known: {', '.join(unknown)}; shown as if, and not counted.")
    about = {side: {"source": log.source, "kind": log.kind} for side, log in (("pre", pre), ("post", post))}
    return {"format": FORMAT, **about, "verdict": verdict(rows), "notes": notes, "tax": rows, "calibration": calibrated}


def matched(a: list[Key], b: list[Key]) -> Pairs:
    """Pair items by document, target and prompt; what is left, by document and target; the nth copy with the nth."""
    first: list[int] = []
    second: list[int] = []
    rest_a, rest_b, found = list(range(len(a))), list(range(len(b))), []
    for length in (3, 2):
        places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for j in reversed(rest_b):
            places[b[j][:length]].append(j)
        left = []
        for i in rest_a:
            if at := places.get(a[i][:length]):
                first.append(i)
                second.append(at.pop())
            else:
                left.append(i)
        rest_a, rest_b = left, sorted(j for at in places.values() for j in at)
        found.append(len(first))
    documents = {b[j].document for j in rest_b}
    return Pairs(first, second, found[1] - found[0], sum(a[i].document in documents for i in rest_a))


def verdict(rows: list[dict[str, Any]]) -> str:
    """How many tasks fell and rose by their first metric, for certain."""
    first = [r for r in rows if r["family"] == FIRST and r["up"] is not None]
    clear = [r["tax"]["value"] for r in first if r["tax"]["p_holm"] < 0.05]
    fell, rose = sum(v > 0 for v in clear), sum(v < 0 for v in clear)
    many = "1 task" if len(first) == 1 else f"{len(first)} tasks"
    return f"Of {many} by the first metric, {fell} fell and {rose} rose (p < 0.05, adjusted over tasks by Holm)."


def _columns(
    first: Task, second: Task, pre: Log, post: Log, notes: list[str]
) -> Iterator[tuple[tuple[str, str], Column, Column, int]]:
    """Each metric that both have, with the values of the items that both have; what differs goes into the notes."""
    name, paired = first.name, dict[int, Pairs]()
    for key, a in first.columns.items():
        if (b := second.columns.get(key)) is None:
            if key[0] != CALIBRATION:
                notes.append(f"{name}: {_label(*key)} is in {pre.source} alone; left out.")
            continue
        if id(a.keys) not in paired:
            pairs = paired[id(a.keys)] = matched(a.keys, b.keys)
            notes += _differences(name, key[1], pairs, a, b, pre, post)
        pairs = paired[id(a.keys)]
        values = [
            (i, x, y)
            for i, j in zip(pairs.first, pairs.second, strict=True)
            if i < len(a.values)
            and j < len(b.values)
            and (x := a.values[i]) is not None
            and (y := b.values[j]) is not None
        ]
        if (lost := len(pairs.first) - len(values)) and key[0] != CALIBRATION:
            notes.append(f"{name}: {lost:,} of {len(pairs.first):,} items have no number for {_label(*key)}; left out.")
        if a.aggregate != b.aggregate or a.up is not b.up:
            notes.append(f"{name}: {_label(*key)} is another measure in each log; left out.")
        elif values:
            at, before, after = map(list, zip(*values, strict=True))
            groups = [a.groups[i] for i in at] if a.groups else ()
            yield key, replace(a, values=before, groups=groups), replace(b, values=after), len(values)
    for key in second.columns:
        if key not in first.columns and key[0] != CALIBRATION:
            notes.append(f"{name}: {_label(*key)} is in {post.source} alone; left out.")


def _differences(name: str, kind: str, pairs: Pairs, a: Column, b: Column, pre: Log, post: Log) -> Iterator[str]:
    task = name if kind in ("none", "") else f"{name} ({kind})"
    both, sizes = len(pairs.first), (len(a.keys), len(b.keys))
    if sizes != (both, both):
        yield f"{task}: {both:,} items are in both logs, of {sizes[0]:,} and {sizes[1]:,}; the others are left out."
    if pairs.retargeted:
        yield f"{task}: {pairs.retargeted:,} documents have another target in each log; left out."
    if pairs.reworded:
        other = [
            k.removesuffix("_sha").replace("_", " ") for k, v in pre.prompting.items() if post.prompting.get(k) != v
        ]
        why = f"other {' and '.join(other)}" if other else "few-shot examples, description or chat template"
        yield f"{task}: {pairs.reworded:,} of {both:,} items were asked with another prompt in each log ({why})."


def _both(a: Column, b: Column) -> tuple[Array, Array]:
    return np.array(a.values, dtype=np.float64), np.array(b.values, dtype=np.float64)


def _row(
    name: str, metric: str, kind: str, a: Column, b: Column
) -> tuple[dict[str, Any], tuple[Array, Array], Array | None]:
    """A row, what is resampled of both sides, and how many items of each group flipped, where items are right or wrong."""
    sides, unit, flipped, together = _both(a, b), a.unit, None, None
    levels = set(np.unique(np.concatenate(sides)).tolist()) if a.aggregate == "mean" else {np.nan}
    if levels <= {0.0, 1.0} or levels <= {-1.0, 0.0}:
        sides, unit = (100 * sides[0], 100 * sides[1]), "%"
        levels = {100 * v for v in levels}
    if a.up is not None and (levels <= {0.0, 100.0} or levels <= {-100.0, 0.0}):
        rows = cells(*(side[:, 0] == (0.0 if min(levels) < 0 else 100.0) for side in sides))
        together = clustered(rows, a.groups) if a.groups else rows
        flipped = flips(rows.sum(0), a.chance, together if a.groups else ())
    first, second = (clustered(side, a.groups) if a.groups else side for side in sides)
    found = resampled(first, second, a.aggregate)
    tax = found.tax()._asdict()
    if flipped:
        tax["p"] = flipped["p"]
    row = {
        "name": name,
        "metric": f"-{_label(metric, kind)}" if a.up is False else _label(metric, kind),
        "unit": unit,
        "up": a.up,
        "items": len(a.values),
        "pre": bounded(found.scores[0].interval(), unit, negated=a.up is False),
        "post": bounded(found.scores[1].interval(), unit, negated=a.up is False),
        "tax": tax,
        "flips": flipped and {"chance": 100 * a.chance, **flipped},
        "reported": {"pre": a.reported, "post": b.reported},
    }
    return row, (first, second), together


def _group_rows(
    pre: Log, post: Log, kept: dict[tuple[str, str, str], Kept], rows: list[Any], notes: list[str]
) -> Iterator[dict[str, Any]]:
    of = {(r["name"], r["metric"].removeprefix("-")): r for r in rows}
    for name, group in pre.groups.items():
        if (other := post.groups.get(name)) is None:
            notes.append(f"Group {name} is in {pre.source} alone; left out.")
            continue
        tasks = [t for t in group.tasks if t in other.tasks]
        wanted = {key: [w for w in ways if w in other.weights.get(key, ())] for key, ways in group.weights.items()}
        if ways := next(iter(wanted.values()), None):
            wanted["logprob", "none"] = ways
        for (metric, kind), ways in wanted.items():
            some, label = [t for t in tasks if (t, metric, kind) in kept], _label(metric, kind)
            if not ways or metric in NOT_LINEAR:
                notes.append(f"Group {name}: {label} is left out: lm-eval's number is no mean of its tasks' scores.")
            elif some:
                if len(some) < (whole := len({*group.tasks, *other.tasks})):
                    notes.append(f"Group {name}: {label} is of {len(some)} of its {whole} tasks.")
                leaves = [of[t, label.removeprefix("-")] for t in some]
                yield _group_row(name, ways[0], leaves, [kept[t, metric, kind] for t in some])


def _group_row(name: str, way: str, leaves: list[dict[str, Any]], parts: list[Kept]) -> dict[str, Any]:
    sizes = [row["items"] if way == "size" else 1 for row in leaves]
    before, after, tax = (
        d._asdict() for d in stratified([scores for scores, _ in parts], [n / sum(sizes) for n in sizes])
    )
    flipped, items = None, sum(row["items"] for row in leaves)
    rows = [flipped for _, flipped in parts if flipped is not None]
    if way == "size" and len(rows) == len(leaves):
        together = np.concatenate(rows) if sum(map(len, rows)) < items else ()
        flipped = flips([r.sum(0) for r in rows], [row["flips"]["chance"] / 100 for row in leaves], together)
    about = {k: leaves[0][k] for k in ("metric", "unit", "up")} | {"items": items, "family": GROUP}
    scores = {"pre": _bare(before), "post": _bare(after), "tax": tax, "flips": flipped}
    return {"name": name, **about, **scores, "tasks": len(leaves), "weights": way}


def _bare(found: dict[str, float]) -> dict[str, float]:
    return {k: found[k] for k in ("value", "low", "high")}


def _refuse_others(pre: Log, post: Log, common: list[str]) -> None:
    for what, name in (("version", "versions"), ("shots", "numbers of few-shot examples")):
        other = []
        for task in common:
            a, b = getattr(pre.tasks[task], what), getattr(post.tasks[task], what)
            if a is not None and b is not None and str(a) != str(b):
                other.append(f"{task} ({a} in {pre.source}, {b} in {post.source})")
        if other:
            raise ValueError(
                f"tax --from: expected the same {name} of a task in both logs, found others of {', '.join(other)}; "
                "run one of the two again"
            )


def _label(metric: str, kind: str) -> str:
    return metric if kind in ("none", "") or metric == "logprob" else f"{metric} ({kind})"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
