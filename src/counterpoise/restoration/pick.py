"""Which average to write, and how to say what it bought."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from counterpoise.evaluation.measurement import (
    Scores,
    difference,
    fallen,
    retention,
    reward_kept,
    tax_given_back,
    units,
)
from counterpoise.evaluation.specs import bare
from counterpoise.evaluation.workbench import Point
from counterpoise.statistics.demand import WITHIN, surest
from counterpoise.tables.reading import KINDS, kind_of
from counterpoise.tables.shifts import likelier


def choose(
    pre: Point, post: Point, able: Sequence[Point], counted: Sequence[str], keep: float, confidence: float
) -> tuple[Point | None, dict[str, Any]]:
    """Among averages that surely keep the share `keep` of the reward gain, the one with the smallest mean tax.

    Where none does so surely, the surest of those that keep it here, unless it is too unsure; see `statistics.demand.surest`.

    Args:
        able: what may be picked, measured on validation data as PRE and POST.
        counted: the abilities that are not at floor.
        confidence: of a pick's share being above `keep` less `WITHIN`.

    Returns:
        The pick, and for json how sure it is. None when no average has less tax than POST at the reward asked for, or none
        is sure enough of it.
    """
    unit = units(pre.scores, post.scores, counted)
    kept = {id(p): retention(pre.scores, p.scores, unit)["value"] for p in (*able, post)} if unit else {}
    less = [p for p in able if unit and kept[id(p)] > kept[id(post)]]
    start = pre.scores.reward.sampled
    gain = (post.scores.reward.sampled - start)[:, 0]
    steps = np.hstack([np.empty((len(gain), 0)), *((p.scores.reward.sampled - start)[:, :1] for p in less)])
    index, sure, enough = surest(steps, gain, [kept[id(p)] for p in less], keep, confidence)
    told = {"confidence": confidence, "within": WITHIN, "sure": sure, "prompts": len(gain), "would_do": enough}
    return None if index is None else less[index], told


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
        f"Nothing measurable fell: on validation data no metric of the {_many(counted)} above floor has its interval below "
        f"PRE's, so there is nothing to give back, and nothing was searched or written.{later} --anyway searches all the same."
    )


def tax_verdict(result: Mapping[str, Any]) -> str:
    """What `tax` found, in two sentences: what fell, and how far POST is from PRE."""
    counted = {r["name"] for r in result["tax"] if r["name"] != "reward" and not r["at_floor"]}
    many, lost = f"{_many(len(counted))} above floor", fallen(result["tax"])
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
    cost = lowered(result["tax"])
    unsure = _unsure(result.get("choice"), keep, pick is None)
    if pick is None:
        if unsure:
            return f"{cost} (held-out).{unsure}"
        return (
            f"{cost} (held-out). No average keeps {_share(keep)} of the reward gain with less tax than POST: no point beats "
            f"both ends, so no checkpoint was written.{_next_best(result, pickable)}"
        )
    return f"{reached(result['shares'], pick.name)}{unsure} {cost} (held-out)."


def lowered(tax: Sequence[Mapping[str, Any]]) -> str:
    """Which abilities fell, in the measure that counts, and how many of those measured the other way too fell by that."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for r in tax:
        if r["name"] != "reward" and not r["at_floor"]:
            rows.setdefault(r["name"], {}).setdefault(kind_of(r["unit"]), r)

    def fell(r: Mapping[str, Any]) -> bool:
        return bool(r["tax"]["value"] > 0 and r["tax"]["p"] < 0.05)

    firsts = [next(iter(of.values())) for of in rows.values()]
    names = [f"{r['name']} ({bare(r['metric'])})" for r in firsts if fell(r)]
    said = f"Alignment significantly lowered {', '.join(names)}" if names else "No ability fell significantly"
    told = []
    for kind in KINDS:
        if others := [of[kind] for of in rows.values() if list(of)[1:] == [kind]]:
            down = sum(map(fell, others))
            told.append(f"; by {kind} {down or 'none'} of {len(others)}")
    return said + "".join(told)


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
    if kept is None:
        gain = f"{found['gain']['value']:+.3g} [{found['gain']['low']:+.3g}, {found['gain']['high']:+.3g}]"
        first = (
            f"{name}: POST's gain in reward was not confirmed on held-out data ({gain}), so no share of it can be said"
        )
    elif asked is not None and round(100 * kept["value"]) < 100 * asked:  # as it is printed
        got = f"asked for {_share(asked)}, got {_percent(kept)} of the reward gain"
        first = f"The demand was missed: {got}. {name} keeps that"
    else:
        demand = "" if asked is None else f" (asked for {_share(asked)})"
        first = f"{name} keeps {_percent(kept)} of the reward gain{demand}"
    if left is None:
        return f"{first}; there is no ability above floor to give back."
    if back is None:
        return f"{first}; POST's mean tax is not clear of 0 on held-out data, so no share of it can be given back."
    if left["of"] == 1:
        whose, below = "tax of one ability", "still below PRE"
    else:
        whose = f"mean tax of {left['of']} abilities"
        below = f"{left['below']} of them still below PRE, {left['worst']['name']} the most"
    return f"{first} and gives back {_percent(back)} of the {whose}{f'; {below}' if left['below'] else ''}, on held-out data."


def _unsure(choice: Mapping[str, Any] | None, keep: float, nothing: bool) -> str:
    """That a pick is not sure, or none is sure enough, and how many prompts would do."""
    if choice is None or choice["would_do"] is None:
        return ""
    first = "No pick is sure enough, so no checkpoint was written" if nothing else "It was not sure"
    last = "--confidence 0 takes these prompts' word" if nothing else "this is the surest"
    return (
        f" {first}: no average keeps {_share(keep)} to within {100 * WITHIN:g} points at {_share(choice['confidence'])} "
        f"confidence on {choice['prompts']:,} validation prompts; about {choice['would_do']:,} would do, and {last}."
    )


def _many(count: int) -> str:
    return "one ability" if count == 1 else f"{count} abilities"


def _share(number: float) -> str:
    return f"{100 * number:g}%"


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
