"""What a results file must look like before anything is drawn from it: the place of what is wrong, in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

LARGEST = 1e100
"""Of a score: what lies beyond overflows in the first sum."""


def check_results(content: Mapping[str, Any], place: str) -> None:
    """Raise for the first value of a results file that is of another kind than what `reading` takes from it.

    Absent and null values are empty, except a point's name and method; what is not read is not looked at.

    Raises:
        ValueError: with `place` and the path of the value.
    """
    _check(content, RESULTS, place)
    keys = {(p, n, m): a for p, ns in (content.get("items") or {}).items() for n, ms in (ns or {}).items()
            for m, a in (ms or {}).items()}  # fmt: skip
    for number, point in enumerate(content.get("points") or ()):
        for name, metrics in (point.get("statistics") or {}).items():
            for metric, rows in (metrics or {}).items():
                about = keys.get((point.get("part"), name, metric))
                if not about or not rows:
                    continue
                at = f"{place}: points[{number}].statistics.{name}.{metric}"
                widths = {len(row) if isinstance(row, list) else 1 for row in rows}
                groups = about.get("groups") or rows
                if len(rows) != len(about.get("keys") or ()) or len(groups) != len(rows) or len(widths) > 1:
                    raise ValueError(
                        f"{at}: expected one row of one length for each of the items' keys, found {len(rows)}"
                    )
                if widths - ({10} if about["aggregate"].startswith("bleu") else {1, 2}):
                    raise ValueError(
                        f"{at}: expected the columns of {about['aggregate']!r}, found {max(widths)} of them"
                    )


class _Each:
    """A dict of any keys (`keys`) or a list whose values all have one shape."""

    def __init__(self, shape: Any, keys: bool = True) -> None:
        self.shape, self.keys = shape, keys


SCORE = {"value": "number", "low": "bound", "high": "bound", "p": "number"}
METRICS = _Each(_Each(SCORE))
ROW = {"name": "text!", "metric": "text!", "unit": "text", "pre": SCORE, "post": SCORE, "pick": SCORE, "reward": SCORE,
       "tax": SCORE, "remaining": SCORE}  # fmt: skip
GROUP = {**ROW, "subtasks": _Each(ROW, keys=False)}
BLOCKS = {
    "name": "text",
    "blocks": _Each({"name": "text!", "layers": _Each("count", keys=False), "parameters": "count"}, keys=False),
}
POINT = {
    "name": "text!", "method": "text!", "part": "text", "mean": "bound", "ratios": _Each("bound", keys=False), "blocks": "text",
    "reward": SCORE, "retention": SCORE, "retention_by": _Each(SCORE), "abilities": METRICS,
    "statistics": _Each(_Each(_Each("row", keys=False))),
}  # fmt: skip
ITEMS = {"unit": "text", "aggregate": "text!", "chance": "number"} | dict.fromkeys(
    ("keys", "groups"), _Each("text", keys=False)
)
RESULTS = {
    "points": _Each(POINT, keys=False), "tax": _Each(GROUP, keys=False), "items": _Each(_Each(_Each(ITEMS))), "run": "text",
    "seed": "count", "reward": "text", "retention_unit": "text", "pick": "text", "against": "text", "command": "text",
    "hypervolume": _Each("number"), "floored": _Each("text", keys=False), "versions": _Each("text"), "partition": BLOCKS,
    "two_sided": {"partition": BLOCKS},
    "settings": {"keep_reward": "bound", "mean": "bound"},
}  # fmt: skip


def _is_number(value: Any, *, finite: bool) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= LARGEST or not (finite or math.isfinite(value))


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda v: isinstance(v, str)),
    "count": ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool) and abs(v) < 1 << 63),
    "number": ("a number", lambda v: _is_number(v, finite=False)),
    "bound": ("a finite number", lambda v: _is_number(v, finite=True)),
    "row": ("finite numbers", lambda v: all(_is_number(x, finite=True) for x in (v if isinstance(v, list) else [v]))),
}


def _check(value: Any, shape: Any, place: str, at: str = "") -> None:
    def refuse(expected: str) -> None:
        raise ValueError(f"{place}: {at.removeprefix('.')[:120]}: expected {expected}, found {str(value)[:60]!r}")

    if isinstance(shape, str):
        expected, fits = KINDS[shape.rstrip("!")]
        if (value is None and shape.endswith("!")) or (value is not None and not fits(value)):
            refuse(expected)
    elif value is None and not (isinstance(shape, dict) and any(str(kind).endswith("!") for kind in shape.values())):
        return
    elif isinstance(shape, _Each):
        if not isinstance(value, dict if shape.keys else list):
            refuse("an object" if shape.keys else "a list")
        for key, inner in value.items() if shape.keys else enumerate(value):
            _check(inner, shape.shape, place, f"{at}.{key}" if shape.keys else f"{at}[{key}]")
    elif not isinstance(value, dict):
        refuse("an object")
    else:
        for key, inner in shape.items():
            _check(value.get(key), inner, place, f"{at}.{key}")
