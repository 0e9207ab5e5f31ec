"""The relation between the distance from PRE and what was forgotten: README.md from results/*.json.

python experiments/distance/tables.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

HERE = Path(__file__).parent
MEASURES = {
    "kl_own_answers": "KL(POST ‖ PRE), POST's answers",
    "kl_pre_answers": "KL(PRE ‖ POST), PRE's answers",
    "kl_pre_text": "KL(PRE ‖ POST), PRE's own text",
}
RESAMPLES = 2000


def main() -> None:
    """Write README.md and relation.json."""
    (HERE / "README.md").write_text(page(HERE / "results"), encoding="utf-8")


def forgotten(pair: dict[str, Any]) -> dict[str, Any]:
    """What POST lost: the mean log-likelihood of the right answers and texts (nats a token), accuracy, what fell."""
    rows = [r for r in pair["tax"] if r["name"] != "reward" and not r["at_floor"]]
    nats, points = ([r["tax"] for r in rows if r["unit"] == u] for u in ("nats/token", "%"))
    lost = [r["flips"]["lost"]["value"] for r in rows if r.get("flips")]
    return {
        "nats": mean([t["value"] for t in nats]),
        "points": mean([t["value"] for t in points]),
        "lost": mean(lost),
        "fell": len({r["name"] for r in rows if r["tax"]["low"] > 0}),
        "fell_much": len({r["name"] for r in rows if r["unit"] == "%" and r["tax"]["low"] > 0}),
        "abilities": len({r["name"] for r in rows}),
        "gain": -next(r["tax"]["value"] for r in pair["tax"] if r["name"] == "reward"),
    }


def mean(values: Sequence[float]) -> float:
    """NaN of none."""
    return float(np.mean(values)) if values else float("nan")


def kl(pair: dict[str, Any], measure: str) -> float:
    """A distance of POST."""
    return float(next(r["post"]["value"] for r in pair["distance"] if r["measure"] == measure))


def correlation(pairs: Sequence[dict[str, Any]], of: Callable[[Any], float], what: str) -> dict[str, float]:
    """Spearman's, with a 95 % percentile interval over worlds: the pairs of one world share their PRE."""
    groups: dict[Any, list[tuple[float, float]]] = {}
    for pair in pairs:
        groups.setdefault(pair["world"], []).append((of(pair), forgotten(pair)[what]))
    worlds, draw, found = list(groups.values()), np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        some = [x for i in draw.integers(len(worlds), size=len(worlds)) for x in worlds[i]]
        x, y = zip(*some, strict=True)
        found.append(spearmanr(x, y).statistic if len(set(y)) > 1 else np.nan)
    value = spearmanr(*zip(*[x for w in worlds for x in w], strict=True)).statistic
    low, high = np.nanquantile(found, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high), "pairs": sum(map(len, worlds))}


def threshold(pairs: Sequence[dict[str, Any]], of: Callable[[Any], float], what: str = "fell") -> dict[str, float]:
    """The least distance at which something fell, and how many pairs lie below it, in all of which nothing did.

    Returns:
        least; below; and bound: the most, at 95 % (Clopper and Pearson), that fall of all such pairs below it.
    """
    at = sorted((of(p), bool(forgotten(p)[what])) for p in pairs)
    least = next((x for x, fell in at if fell), float("inf"))
    below = sum(x < least for x, _ in at)
    return {"least": least, "below": below, "bound": 1 - 0.05 ** (1 / below) if below else 1.0}


def family(pair: dict[str, Any]) -> str:
    """How a pair was aligned: its method, or that a mitigation was beside RSF."""
    method, _, *held = pair["way"].split()
    return "mitigations" if held else str(method)


def in_order(way: str) -> tuple[Any, ...]:
    """Plain ways first, methods together, the largest step first."""
    method, step, *held = way.split()
    return bool(held), method, -float(step), held


def page(folder: Path) -> str:
    """The tables."""
    pairs = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.json"))]
    ways = sorted({p["way"] for p in pairs}, key=in_order)
    worlds = {p["world"] for p in pairs}
    lines = [
        "# Does the distance from PRE predict what was forgotten?",
        "",
        "Shenfeld et al. 2025 (arXiv 2509.04259) say so of KL(PRE ‖ POST) on the new task's prompts.",
        f"`python experiments/distance/run.py` trains demo worlds and aligns each PRE in many ways: {len(pairs)} pairs of",
        f"{len(worlds)} worlds are here, every pair that was measured. RSF is the demo's, at several steps of the optimiser,",
        "and with what `counterpoise align` has against forgetting. DPO is on the best and the worst of PRE's own responses,",
        "PPO is eight rounds, SFT trains on four glad words, which earn the reward and which PRE would not say. Held-out data.",
        "*Forgotten*: PRE minus POST, the mean over abilities above floor. Not here: pairs of SmolLM2, whose checkpoints are",
        "not kept; `run.py --pair NAME PRE POST` takes them into the same table.",
        "",
        "| way | pairs | reward gain | "
        + " | ".join(MEASURES.values())
        + " | forgotten, nats a token | accuracy points | right to wrong, % | abilities that fell |",
        "|---|---:|---:|" + "---:|" * (len(MEASURES) + 4),
    ]
    for way in ways:
        some = [p for p in pairs if p["way"] == way]
        lost = [forgotten(p) for p in some]
        cells = [spread([x["gain"] for x in lost]), *(spread([kl(p, m) for p in some]) for m in MEASURES)]
        cells += [spread([x[k] for x in lost]) for k in ("nats", "points", "lost")]
        fell = f"{sum(x['fell'] for x in lost)} of {sum(x['abilities'] for x in lost)}"
        lines.append(f"| {way} | {len(some)} | {' | '.join(cells)} | {fell} |")
    lines += [
        "",
        "Means, least and most in brackets. Spearman's correlation over pairs, with 95 % intervals over worlds (the pairs of one",
        "world share their PRE, so they are drawn together):",
        "",
        "| distance | pairs | forgotten, nats | accuracy points | right to wrong |",
        "|---|---:|---:|---:|---:|",
    ]
    relation: dict[str, Any] = {}
    families = {"all": pairs, **{k: [p for p in pairs if family(p) == k] for k in sorted({family(p) for p in pairs})}}
    for name_of, some in families.items():
        if len({p["world"] for p in some}) < 3:
            continue
        measures: dict[str, Callable[[Any], float]] = {m: (lambda p, m=m: kl(p, m)) for m in MEASURES}  # type: ignore[misc]
        measures["reward gain"] = lambda p: float(forgotten(p)["gain"])
        for name, of in measures.items():
            found = {what: correlation(some, of, what) for what in ("nats", "points", "lost")}
            relation[f"{name_of}: {name}"] = found
            cells = [f"{f['value']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" for f in found.values()]
            lines.append(f"| {name_of}: {MEASURES.get(name, name)} | {found['nats']['pairs']} | {' | '.join(cells)} |")
    lines.append("")
    for m in MEASURES:
        with_it, against = (
            [f for f in families if (r := relation.get(f"{f}: {m}")) and sign * r["nats"][end] > 0]
            for sign, end in ((1, "low"), (-1, "high"))
        )
        contrary = f", against it in {', '.join(against)}" if against else ""
        lines.append(f"- {MEASURES[m]} goes with the nats forgotten in {', '.join(with_it) or 'none'}{contrary}.")
    lines += [
        "",
        "KD and replay here hold on to PRE's answers to the very prompts of the alignment: that distance is small, and what is",
        "lost elsewhere it does not see. The distance on PRE's own text does.",
        "",
        "## Is there a distance below which nothing fell?",
        "",
        "*Fell*: the 95 % interval of some ability's tax lies above 0. *Bound*: of pairs like those below the least distance at",
        "which something fell, at most so many fall, at 95 %.",
        "",
        "| distance | by | something fell from | pairs below | bound |",
        "|---|---|---:|---:|---:|",
    ]
    for name, what in (("any metric", "fell"), ("accuracy or exact match", "fell_much")):
        for m in MEASURES:
            found = relation[f"threshold, {name}: {m}"] = threshold(pairs, lambda p, m=m: kl(p, m), what)
            cells = [f"{found['least']:.2g}", f"{found['below']} of {len(pairs)}", f"{100 * found['bound']:.0f} %"]
            lines.append(f"| {MEASURES[m]} | {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "A likelihood that fell is found at any distance: the same items are compared, so that next to nothing is measurable.",
        "So `restore` has no distance below which it stops: it goes by the abilities themselves, which it measures first.",
    ]
    commits, versions = sorted({p["commit"] for p in pairs}), pairs[0]["versions"]
    lines += [
        "",
        f"Commits {', '.join(commits)}; versions " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
    ]
    text = json.dumps(relation, indent=1, ensure_ascii=False) + "\n"
    (folder.parent / "relation.json").write_text(text, encoding="utf-8")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean, least and most."""
    return f"{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "–"


if __name__ == "__main__":
    main()
