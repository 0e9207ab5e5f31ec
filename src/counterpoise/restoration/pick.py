"""Which average to write, and how to say what it bought."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from counterpoise.evaluation.measurement import (
    Scores,
    difference,
    fallen,
    retention,
    reward_kept,
    tax_given_back,
    units,
)
from counterpoise.evaluation.workbench import Point
from counterpoise.tables.shifts import likelier


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


def nothing_fell(counted: int, held_out: Sequence[str]) -> str:
    """Why nothing is searched where alignment took nothing that can be measured; `held_out`: what fell there all the same."""
    if not counted:
        return "Every ability is at floor in PRE: there was nothing to lose, so nothing was searched or written."
    later = f" (On held-out data {', '.join(held_out)} fell.)" if held_out else ""
    return (
        f"Nothing measurable fell: on validation data no metric of the {counted} abilities above floor has its interval below "
        f"PRE's, so there is nothing to give back, and nothing was searched or written.{later} --anyway searches all the same."
    )


def tax_verdict(result: Mapping[str, Any]) -> str:
    """What `tax` found, in two sentences: what fell, and how far POST is from PRE."""
    counted = {r["name"] for r in result["tax"] if r["name"] != "reward" and not r["at_floor"]}
    many, lost = f"{len(counted)} abilities above floor", fallen(result["tax"])
    if lost:
        said = f"Of {many}, {len(lost)} fell: {', '.join(lost)}."
    elif counted:
        said = (
            f"Nothing measurable fell: of {many} none has a metric whose interval lies below PRE's; nothing to restore."
        )
    else:
        said = "Every ability is at floor in PRE: there was nothing to lose."
    return f"{said} {likelier(result)}".strip()


def verdict(result: dict[str, Any], pick: Point | None, keep: float, pickable: Collection[str]) -> str:
    """What was lost, what the pick keeps and gives back, in two sentences; or why none of the `pickable` was picked."""
    taxed = fallen(result["tax"])
    cost = f"Alignment significantly lowered {', '.join(taxed)}" if taxed else "No ability fell significantly"
    if pick is None:
        return (
            f"{cost} (held-out). No average keeps {keep:.0%} of the reward gain with less tax than POST: no point beats both "
            f"ends, so no checkpoint was written.{_next_best(result, pickable)}"
        )
    return f"{reached(result['shares'], pick.name)} {cost} (held-out)."


def shares(pre: Scores, post: Scores, pick: Scores, counted: Collection[str]) -> dict[str, Any]:
    """What the pick keeps of the gain and gives back of the tax on this part, with intervals; None where neither is sure."""
    unit = units(pre, post, [*counted])
    return {
        "gain": difference(post.reward, pre.reward),
        "reward_kept": reward_kept(pre, post, pick),
        "tax_given_back": tax_given_back(pre, post, pick, unit),
        "retention": retention(pre, pick, unit) if unit else None,
    }


def reached(found: Mapping[str, Any], name: str) -> str:
    """One sentence that can be quoted: what was asked for, what came, of how many abilities, and how sure that is."""
    kept, back, left, asked = (found[key] for key in ("reward_kept", "tax_given_back", "retention", "asked"))
    missed = "" if kept is None or asked is None or kept["value"] >= asked else "The demand was missed: "
    demand = "" if asked is None else f" (asked for {asked:.0%})"
    if kept is None:
        gain = f"{found['gain']['value']:+.3g} [{found['gain']['low']:+.3g}, {found['gain']['high']:+.3g}]"
        first = (
            f"{name}: POST's gain in reward was not confirmed on held-out data ({gain}), so no share of it can be said"
        )
    else:
        first = f"{missed}{name} keeps {_percent(kept)} of the reward gain{demand}"
    if left is None:
        return f"{first}; there is no ability above floor to give back."
    if back is None:
        return f"{first}; POST's mean tax is not clear of 0 on held-out data, so no share of it can be given back."
    below = f"; {left['below']} of them still below PRE, {left['worst']['name']} the most" if left["below"] else ""
    return (
        f"{first} and gives back {_percent(back)} of the mean tax of {left['of']} abilities{below}, on held-out data."
    )


def _percent(share: Mapping[str, float]) -> str:
    return f"{share['value']:.0%} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"


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
