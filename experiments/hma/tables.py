"""Rewrite the tables of README.md from results/*.json.

python experiments/hma/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from counterpoise.report import tables
from counterpoise.report.grid import as_markdown
from counterpoise.report.numbers import p_value, spoken

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Fill in what stands between <!-- NAME --> and <!-- end -->."""
    run, more = (
        json.loads((HERE / "results" / f"{n}.json").read_text(encoding="utf-8")) for n in ("real_run", "partwise")
    )
    made = {
        "tax": as_markdown(tables.tax(run)),
        "points": points(run),
        "hma": against_ma(more["hma_minus_ma"]),
        "parts": parts(more["partwise"]),
        "check": check(more["check"]),
    }
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    for name, table in made.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    page.write_text(text, encoding="utf-8")


def rows(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def points(run: dict[str, Any]) -> str:
    """Validation points with the share of the reward gain, the mean tax and the front."""
    found = [p for p in run["points"] if p["part"] == "validation"]
    low, high = (p["reward"]["value"] for p in found[:2])
    body = []
    for p in found:
        share = f"{(p['reward']['value'] - low) / (high - low):.0%}"
        ratios = " ".join(f"{r:.2f}" for r in p["ratios"]) if len(p["ratios"]) < 4 else "by layer"
        body.append(
            [p["name"], ratios, spoken(p["reward"]), share, spoken(p["retention"]), "yes" if p["on_front"] else ""]
        )
    volumes = ", ".join(f"{m} {v:.3f}" for m, v in run["hypervolume"].items())
    head = ["point", "ratios", "reward", "of the gain", "retention", "on the front"]
    return rows(head, body) + f"\n\nHypervolume of each method's front: {volumes}."


def against_ma(found: list[dict[str, Any]]) -> str:
    """HMA minus MA."""
    body = []
    for f in found:
        reward = next(r for r in f["rows"] if r["name"] == "reward")["tax"]
        worse = [r["name"] for r in f["rows"] if r["name"] != "reward" and r["tax"]["high"] < 0]
        better = [r["name"] for r in f["rows"] if r["name"] != "reward" and r["tax"]["low"] > 0]
        body.append(
            [
                f"{f['mean']:g}",
                " ".join(f"{r:.2f}" for r in f["ratios"]),
                f"{spoken(reward)}, p {p_value(reward['p'])}",
                spoken(f["retention"]["difference"]),
                ", ".join(dict.fromkeys(better)) or "none",
                ", ".join(dict.fromkeys(worse)) or "none",
            ]
        )
    head = ["mean", "HMA's ratios", "reward", "retention", "abilities better", "abilities worse"]
    return rows(head, body)


def parts(found: list[dict[str, Any]]) -> str:
    """One third averaged, against POST; abilities by their first metric."""
    body, names = [], []
    for f in found:
        gains: dict[str, Any] = {}
        for r in f["gain_over_post"]:
            gains.setdefault(r["name"], r["tax"])
        reward = gains.pop("reward")
        names = list(gains)
        body.append(
            [f["part"], f"{f['ratio']:g}", f"{spoken(reward)}, p {p_value(reward['p'])}", *map(spoken, gains.values())]
        )
    return rows(["third", "ratio", "reward", *names], body)


def check(found: dict[str, Any]) -> str:
    """The second classifier."""
    names = [n for n in found if n not in ("reward", "gain")]
    body = [
        [n, spoken(found[n]), "" if n == "PRE" else f"{spoken(found['gain'][n])}, p {p_value(found['gain'][n]['p'])}"]
        for n in names
    ]
    return rows(["", "log-odds of positive", "minus PRE's"], body)


if __name__ == "__main__":
    main()
