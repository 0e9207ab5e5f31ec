"""Made-up results with the shape and the size of a real run: about twenty points, five abilities, one of them at floor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from counterpoise.statistics.front import front
from counterpoise.statistics.paired import flips

# ability -> (metric, unit, score of PRE, tax of POST, half width of the interval), primary metric first
ABILITIES: dict[str, list[tuple[str, str, float, float, float]]] = {
    "arc_easy": [("logprob", "nats/token", -1.912, 0.084, 0.061), ("accuracy", "%", 61.3, 3.9, 4.6)],
    "piqa": [("logprob", "nats/token", -2.318, 0.047, 0.044), ("accuracy", "%", 68.1, 0.8, 4.4)],
    "boolq": [("logprob", "nats/token", -0.781, 0.012, 0.02), ("accuracy", "%", 52.0, -0.4, 5.1)],
    "lambada": [("-nll", "nats/token", -2.961, 0.171, 0.052)],
    "multi30k": [("-nll", "nats/token", -2.402, 0.312, 0.066), ("bleu", "BLEU", 14.8, 4.1, 1.9)],
}
COUNTED = [a for a in ABILITIES if a != "boolq"]
MEANS = (0.2, 0.4, 0.6, 0.8)
HMA = {0.2: (0.0, 0.02, 0.58), 0.4: (0.0, 0.44, 0.76), 0.6: (0.14, 0.66, 1.0), 0.8: (0.52, 0.88, 1.0)}


def results() -> dict[str, Any]:
    """A whole run that found something."""
    rng = np.random.default_rng(7)
    validation = _points(rng)
    held_out = [_point(rng, p["name"], p["method"], p["ratios"], "held-out") for p in validation if _is_final(p)]
    for found in (validation, held_out):
        for i in front([[p["reward"]["value"], p["retention"]["value"]] for p in found]):
            found[int(i)]["on_front"] = True
    tax = [_tax_row("reward", "reward", "", -0.42, 1.31, 0.09, False)]
    for name, metrics in ABILITIES.items():
        tax += [_tax_row(name, m, u, pre, -t, h, name == "boolq") for m, u, pre, t, h in metrics]
    return {
        "counterpoise": "0.1.0",
        "command": "counterpoise restore pre post -o restored --prompts prompts.jsonl --reward sentiment:reward.csv",
        "seed": 0,
        "commit": "c8bee65f",
        "date": "2026-11-23",
        "seconds": 5127.4,
        "versions": {"python": "3.11.2", "counterpoise": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "inputs": {side: {"source": f"runs/{side}", "sha256": _hashes(side)} for side in ("pre", "post")},
        "prompts": "prompts.jsonl",
        "reward": "sentiment:reward.csv",
        "abilities": [f"choices:{n}.jsonl" for n in ABILITIES],
        "settings": {"blocks": 3, "means": list(MEANS), "mean": None, "keep_reward": 0.9, "proxy_size": 48, "seed": 0},
        "warnings": ["generation_config.json differs; POST's was taken"],
        "partition": partition(),
        "points": validation + held_out,
        "pick": "HMA 0.6",
        "verdict": "Alignment significantly lowered arc_easy, lambada, multi30k (held-out). HMA 0.6 keeps 93% of the "
        "reward gain and gives back 58% of the mean tax, on held-out data.",
        "tax": tax,
        "distance": distance(),
        "calibration": calibration(),
        "pick_against_ma": [
            {k: r[k] for k in ("name", "metric")} | {"difference": _around(0.01, 0.03, 0.2)} for r in tax
        ],
        "hypervolume": {"MA": 1.183, "HMA": 1.241, "LiNeS": 1.204, "reversed": 1.066, "random": 1.12},
        "search": [
            {"mean": m, "ratios": list(HMA[m]), "passes": 5, "trace": _trace(m), "converged": m != 0.8} for m in MEANS
        ],
        "out": "restored",
    }


def distance() -> list[dict[str, Any]]:
    """What `counterpoise.restoration.distance.distances` gives."""
    rows: list[dict[str, Any]] = [
        {"measure": m, "unit": "nats/token", "pre": None, "post": _around(v, 0.02), "pick": _around(0.6 * v, 0.02)}
        for m, v in (("kl_own_answers", 0.146), ("kl_pre_answers", 0.269), ("kl_pre_text", 1.49))
    ]
    for measure, unit, before, after in (("entropy", "nats/token", 2.489, 2.395), ("distinct_2", "%", 61.98, 51.4)):
        row = {"measure": measure, "unit": unit, "pre": _around(before, 0.4), "post": _around(after, 0.4)}
        rows.append({**row, "post_change": _around(after - before, 0.2), "pick": _around(before, 0.4)})
        rows[-1]["pick_change"] = _around(0.0, 0.2)
    return rows


def calibration() -> list[dict[str, Any]]:
    """What `counterpoise.evaluation.measurement.calibrations` gives."""
    sides = {"pre": _around(6.5, 2.0), "post": _around(9.7, 2.0), "rise": _around(3.2, 1.0, 0.01)}
    sides |= {"pick": _around(6.0, 2.0), "pick_rise": _around(-0.5, 1.0, 0.4)}
    return [{"name": n, "measure": m, "items": 400, **sides} for n in ("arc_easy", "piqa") for m in ("ece", "brier")]


def stopped() -> dict[str, Any]:
    """A run that ended after PRE and POST: no reward gain to keep."""
    found = results()
    found["points"] = [p for p in found["points"] if p["method"] in ("PRE", "POST")]
    for row in found["tax"]:
        row["pick"] = row["remaining"] = row["pick_flips"] = None
    for row in (*found["distance"], *found["calibration"]):
        for key in [k for k in row if k.startswith("pick")]:
            del row[key]
    verdict = (
        "POST's reward is not significantly above PRE's on the validation prompts: nothing was searched or written."
    )
    found.update(pick=None, verdict=verdict, hypervolume={}, search=[], out=None)
    del found["pick_against_ma"]
    return found


def without_hma() -> dict[str, Any]:
    """Only MA was measured, and it was picked."""
    found = results()
    found["points"] = [p for p in found["points"] if p["method"] in ("PRE", "POST", "MA")]
    found.update(pick="MA 0.6", hypervolume={"MA": 1.18}, search=None)
    return found


def hostile() -> dict[str, Any]:
    """Names from the outside that try to be markup, in every place that takes one."""
    found = results()
    bad = '</script><script>alert("x")</script>|`é✓\n<img src=x onerror=alert(1)>&amp;'
    found["inputs"]["pre"]["source"] = found["reward"] = found["command"] = found["verdict"] = bad
    found["abilities"] = [bad]
    found["settings"][bad] = bad
    found["versions"][bad] = bad
    found["warnings"] = [bad]
    found["partition"]["blocks"][0]["name"] = bad
    found["pick"] = bad
    for point in found["points"]:
        point["abilities"] = {(bad if n == "piqa" else n): m for n, m in point["abilities"].items()}
        point["name"] = bad if point["name"] == "HMA 0.6" else point["name"]
    found["tax"][3]["name"] = found["tax"][3]["metric"] = found["tax"][3]["unit"] = bad
    found["hypervolume"][bad] = 1.0
    return found


def recipe() -> dict[str, Any]:
    """What a plain average tells its card."""
    return {
        "ratios": [0.0, 0.44, 0.76],
        "mean": 0.4,
        "partition": partition(),
        "inputs": results()["inputs"],
        "donor": "post",
        "versions": results()["versions"],
        "command": "counterpoise average runs/pre runs/post -o out --ratios 0,0.44,0.76",
        "warnings": [],
    }


def partition(layers: int = 30) -> dict[str, Any]:
    """Thirds."""
    cuts = [range(layers // 3), range(layers // 3, 2 * layers // 3), range(2 * layers // 3, layers)]
    blocks = [
        {"name": f"layers {c[0]}-{c[-1]}", "weight": len(c), "layers": list(c), "tensors": 90, "parameters": 35_400_960}
        for c in cuts
    ]
    rest = {"tensors": 3, "parameters": 28_312_128, "policy": "layer-weighted mean"}
    return {"name": "thirds", "blocks": blocks, "rest": rest}


def _points(rng: np.random.Generator) -> list[dict[str, Any]]:
    points = [_point(rng, "PRE", "PRE", [0.0], "validation"), _point(rng, "POST", "POST", [1.0], "validation")]
    for m in MEANS:
        ramp = [min(1.0, 2 * m * n / 29) for n in range(30)]
        points += [
            _point(rng, f"MA {m:g}", "MA", [m], "validation"),
            _point(rng, f"HMA {m:g}", "HMA", list(HMA[m]), "validation", lift=0.05),
            _point(rng, f"LiNeS {m:g}", "LiNeS", ramp, "validation", lift=0.02),
            _point(rng, f"reversed {m:g}", "reversed", ramp[::-1], "validation", lift=-0.12),
            _point(rng, f"random {m:g}", "random", [m + d for d in (-0.1, 0.13, -0.03)], "validation", lift=-0.06),
        ]
    return points


def _is_final(point: dict[str, Any]) -> bool:
    return point["name"] in ("PRE", "POST", "HMA 0.6", "MA 0.6")


def _point(
    rng: np.random.Generator, name: str, method: str, ratios: list[float], part: str, *, lift: float = 0.0
) -> dict[str, Any]:
    mean = sum(ratios) / len(ratios)
    middle = 0.0 if method in ("PRE", "POST") else 1.0
    reward = -0.42 + 1.31 * mean**0.2 + middle * (lift + rng.normal(0, 0.015))
    lost = mean**1.6 - middle * (0.5 * lift + rng.normal(0, 0.01))
    abilities = {a: {m: _around(pre - t * lost, h) for m, _, pre, t, h in metrics} for a, metrics in ABILITIES.items()}
    steps = [-(ABILITIES[a][0][3] * lost) / (ABILITIES[a][0][4] / 1.96) for a in COUNTED]
    retention = sum(steps) / len(steps)
    return {
        "name": name,
        "method": method,
        "part": part,
        "mean": mean,
        "ratios": ratios,
        "reward": _around(reward, 0.11),
        "abilities": abilities,
        "retention": _around(0.0, 0.0) if method == "PRE" else _around(retention, 0.4 + 0.5 * mean),
        "on_front": False,
    }


def _tax_row(name: str, metric: str, unit: str, pre: float, change: float, half: float, floor: bool) -> dict[str, Any]:
    tax, left = -change, -change * (0.93 if name == "reward" else 0.42)
    return {
        "name": name,
        "metric": metric,
        "unit": unit,
        "items": 400,
        "pre": _around(pre, half),
        "post": _around(pre + change, half),
        "pick": _around(pre - left, half),
        "tax": _around(tax, 0.6 * half, math.erfc(abs(tax) / (0.6 * half / 1.96) / math.sqrt(2))),
        "remaining": _around(left, 0.5 * half, math.erfc(abs(left) / (0.5 * half / 1.96) / math.sqrt(2))),
        "at_floor": floor,
        "flips": {"chance": 25.0, **flips([190, 52, 36, 122], 0.25)} if metric == "accuracy" else None,
        "pick_flips": {"chance": 25.0, **flips([220, 22, 16, 142], 0.25)} if metric == "accuracy" else None,
    }


def _around(value: float, half: float, p: float | None = None) -> dict[str, float]:
    found = {"value": value, "low": value - half, "high": value + half}
    return found if p is None else {**found, "p": p}


def _trace(mean: float) -> list[float]:
    return [2.119 - 0.1 * mean - 0.07 * (1 - math.exp(-i)) * (1.1 - mean) for i in range(5)]


def _hashes(side: str) -> dict[str, str]:
    import hashlib

    return {f: hashlib.sha256(f"{side}{f}".encode()).hexdigest() for f in ("config.json", "model.safetensors")}
