"""What a checkpoint's own card says of it, and what a model made from several may say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from counterpoise.checkpoints.checkpoint import Checkpoint

LICENCE = ("license", "license_name", "license_link")
TOLD = (*LICENCE, "language", "pipeline_tag")


def about(folder: Path) -> dict[str, Any]:
    """Licence, languages and task, from the front matter of README.md; empty where there is none that can be read."""
    if not (folder / "README.md").is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(folder / "README.md")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    plain = {name: value for name in TOLD if (value := (found or {}).get(name))}
    return {n: v for n, v in plain.items() if isinstance(v, str) or (n == "language" and isinstance(v, list))}


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is recorded of an input beside its name: the commit, what its card says, the hashes."""
    told = {"revision": checkpoint.revision, "card": about(checkpoint.folder), "sha256": checkpoint.sha256}
    return {name: value for name, value in told.items() if value}


def inherited(cards: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What a model made of these takes over, the last of them first, and a warning where their licences differ.

    Args:
        cards: name ("PRE") -> what `about` found.
    """
    terms = {name: {k: card[k] for k in LICENCE if k in card} for name, card in cards.items() if "license" in card}
    found = {name: " ".join(str(v) for k, v in t.items() if k != "license_link") for name, t in terms.items()}
    taken: dict[str, Any] = {}
    for card in cards.values():
        taken |= {k: v for k, v in card.items() if k not in LICENCE}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name} {licence}" for name, licence in found.items())
        return taken, [
            f"the licences differ ({told}): the card of OUT names none; see which terms hold for a model made of both"
        ]
    return taken | next(iter(terms.values()), {}), []
