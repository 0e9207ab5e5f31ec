"""The model card (README.md) of an averaged checkpoint: what it is, what it cost, how to make it again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from counterpoise.tables import reading, tables
from counterpoise.tables.grid import as_markdown
from counterpoise.tables.numbers import number

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def model_card(content: Mapping[str, Any]) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        content: of restore.json; or for a plain average a dict of ratios, mean, partition, inputs, donor, versions,
            command and warnings.
    """
    point = reading.picked(content)
    if point:
        mean, ratios = point["mean"], tables.pick_ratios(content)
    else:
        mean, partition = content.get("mean"), content["partition"]
        shares = reading.block_shares(partition, content["ratios"])
        ratios = tables.ratio_table(shares, partition.get("rest"), mean)
    command = f"```bash\n{content['command']}\n```\n\n" if content.get("command") else ""
    files, versions = as_markdown(tables.files(content)), reading.version_list(content)
    sections = {
        "Ratios": as_markdown(ratios),
        "What was measured": as_markdown(tables.ability_taxes(content)) if content.get("tax") else "",
        "Warnings": "\n".join(f"- {w}" for w in content.get("warnings") or ()),
        "Made from": f"{command}{_commits(content)}{files}\n\nVersions: {versions}.",
    }
    card = [
        _front_matter(content),
        "# Averaged checkpoint",
        content.get("verdict") or "Weights before and after alignment, averaged.",
        f"Every tensor is `pre + ratio * (post - pre)`, with a mean ratio of {number(mean, 3)}; "
        "`recipe.json` lists which tensor took which ratio.",
        *(f"## {title}\n\n{text}" for title, text in sections.items() if text),
    ]
    return "\n\n".join(card).rstrip() + "\n"


def _front_matter(content: Mapping[str, Any]) -> str:
    """Json strings are valid YAML; a folder on somebody's disk is not a base model."""
    sources = [str((content["inputs"].get(side) or {}).get("source") or "") for side in ("pre", "post")]
    hub = [s.partition("@")[0] for s in sources if HUB_ID.fullmatch(s) and not Path(s.partition("@")[0]).exists()]
    bases = ["base_model:", *(f"  - {json.dumps(name)}" for name in dict.fromkeys(hub))] if hub else []
    return "\n".join(["---", "tags:", "  - merge", "  - counterpoise", *bases, "---"])


def _commits(content: Mapping[str, Any]) -> str:
    """Which commit a hub id stood for on that day: a branch moves."""
    sides = {name: side or {} for name, side in (content.get("inputs") or {}).items()}
    return "".join(
        f"{name.upper()} is `{side['source'].partition('@')[0]}` at commit `{side['revision']}`.\n\n"
        for name, side in sides.items()
        if side.get("revision")
    )
