"""Which average to write, and how to say what it bought."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from counterpoise.evaluation.measurement import retention, units
from counterpoise.evaluation.workbench import Point


def choose(pre: Point, post: Point, able: Sequence[Point], counted: Sequence[str], keep: float) -> Point | None:
    """Among averages that keep the share `keep` of the reward gain, the one with the smallest mean tax.

    Args:
        able: what may be picked, measured on validation data as PRE and POST.
        counted: the abilities that are not at floor.

    Returns:
        None when no average has both more reward than PRE and less tax than POST at the reward asked for.
    """
    gain = post.scores.reward.value - pre.scores.reward.value
    needed = pre.scores.reward.value + keep * gain

    unit = units(pre.scores, post.scores, counted)
    kept = {id(p): retention(pre.scores, p.scores, unit)["value"] for p in (*able, post)} if unit else {}
    found = [p for p in able if p.scores.reward.value >= needed and unit and kept[id(p)] > kept[id(post)]]
    return max(found, key=lambda p: kept[id(p)]) if found else None


def no_gain(gain: Mapping[str, float]) -> str:
    """Why nothing is searched when the reward did not rise: `gain` is POST's reward minus PRE's, with its interval."""
    return (
        f"POST's reward is not significantly above PRE's on the validation prompts ({gain['value']:+.3g}, 95 % interval "
        f"{gain['low']:.3g} to {gain['high']:.3g}): there is no alignment gain to keep, so nothing was searched or written."
    )


def verdict(result: dict[str, Any], pick: Point | None, keep: float, pickable: Collection[str]) -> str:
    """What was lost, what the pick keeps and gives back, in two sentences; or why none of the `pickable` was picked."""
    rows = {r["name"]: r for r in result["points"] if r["part"] == "held-out"}
    pre, post = rows["PRE"], rows["POST"]
    taxed = [
        r["name"]
        for r in result["tax"]
        if r["name"] != "reward" and not r["at_floor"] and r["tax"]["value"] > 0 and r["tax"]["p"] < 0.05
    ]
    cost = (
        f"Alignment significantly lowered {', '.join(dict.fromkeys(taxed))}"
        if taxed
        else "No ability fell significantly"
    )
    if pick is None:
        return (
            f"{cost} (held-out). No average keeps {keep:.0%} of the reward gain with less tax than POST: no point beats both "
            f"ends, so no checkpoint was written.{_next_best(result, pickable)}"
        )
    chosen = rows[pick.name]
    gain, kept = (row["reward"]["value"] - pre["reward"]["value"] for row in (post, chosen))
    share = f"keeps {kept / gain:.0%} of the reward gain" if gain > 0 else f"moves the reward by {kept:+.3g}"
    if post["retention"] is None:
        back = "there is no ability above floor to give back"
    elif (lost := post["retention"]["value"]) < 0:
        back = f"gives back {1 - chosen['retention']['value'] / lost:.0%} of the mean tax"
    else:
        back = "POST has no mean tax to give back"
    return f"{cost} (held-out). {pick.name} {share} and {back}, on held-out data."


def _next_best(result: dict[str, Any], pickable: Collection[str]) -> str:
    """What a lower demand on the reward would have picked."""
    rows = [r for r in result["points"] if r["part"] == "validation"]
    pre, post = rows[0], rows[1]
    if post["retention"] is None:
        return " Every ability is at floor in PRE: there was nothing to lose."
    better = [r for r in rows if r["name"] in pickable and r["retention"]["value"] > post["retention"]["value"]]
    if not better:
        return ""
    best = max(better, key=lambda r: r["reward"]["value"])
    gain = post["reward"]["value"] - pre["reward"]["value"]
    kept = math.floor(100 * (best["reward"]["value"] - pre["reward"]["value"]) / gain) / 100
    return f" {best['name']} comes closest: --keep-reward {kept:.2f} would accept it." if kept > 0 else ""
