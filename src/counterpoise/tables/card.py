"""The model card (README.md) of an averaged checkpoint: what it is, what it cost, how to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from counterpoise.checkpoints.about import inherited
from counterpoise.checkpoints.files import hub_id
from counterpoise.tables import reading, tables, taxes
from counterpoise.tables.grid import as_markdown
from counterpoise.tables.numbers import number

FRONT = ("base_model", "language", "library_name", "license", "license_name", "license_link", "pipeline_tag", "tags",
         "base_model_relation")  # fmt: skip
"""The order in which the hub's own code writes it."""


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
        "Ratios": as_markdown(ratios) if mean is not None else "",
        "What was measured": as_markdown(taxes.ability_taxes(content)) if content.get("tax") else "",
        "Warnings": "\n".join(f"- {w}" for w in content.get("warnings") or ()),
        "Made from": f"{command}{_commits(content)}{files}\n\nVersions: {versions}.",
    }
    card = [
        front_matter(
            content["inputs"],
            relation="merge" if mean is not None else "finetune",
            results=_measured(content),
            name=Path(content.get("out") or "model").name,
        ),
        "# Averaged checkpoint" if mean is not None else "# Healed checkpoint",
        content.get("verdict") or "Weights before and after alignment, averaged.",
        _made(content, mean),
        *(f"## {title}\n\n{text}" for title, text in sections.items() if text),
    ]
    return "\n\n".join(card).rstrip() + "\n"


def _made(content: Mapping[str, Any], mean: float | None) -> str:
    if mean is not None:
        return (
            f"Every tensor is `pre + ratio * (post - pre)`, with a mean ratio of {number(mean, 3)}; "
            "`recipe.json` lists which tensor took which ratio."
        )
    return tables.healing_told(content)


def aligned_card(record: Mapping[str, Any]) -> str:
    """Markdown for a model that `align` made.

    Args:
        record: of align.json.
    """
    plain = {k: v for k, v in record["settings"].items() if isinstance(v, (int, float, str)) and len(str(v)) < 40}
    held = [str(m.get("name") or m) for m in record["settings"].get("mitigations", ())]
    command = f"```bash\n{record['command']}\n```" if record.get("command") else ""
    card = [
        front_matter({"pre": record}, relation="finetune"),
        "# Aligned checkpoint",
        f"`{record['source']}` after {record['iterations']} iterations of {plain.get('method', 'alignment')}"
        + (f", with {', '.join(held)}" if held else "") + ".",
        "What alignment cost the model's other abilities is not in this card: `counterpoise tax` measures it.",
        *(["## Made by", command] if command else []),
        "Settings: " + ", ".join(f"{k} {v}" for k, v in plain.items()) + ". Versions: "
        + ", ".join(f"{k} {v}" for k, v in record["versions"].items()) + ".",
    ]  # fmt: skip
    return "\n\n".join(card) + "\n"


def front_matter(inputs: Mapping[str, Any], *, relation: str, results: Sequence[Any] = (), name: str = "model") -> str:
    """What the hub reads: where the model comes from, on what terms, and what was measured.

    Args:
        inputs: name ("pre") -> its source, revision and what its own card says.
        relation: to the models that it is made from: merge or finetune.
        results: `EvalResult`s of the model called `name`.
    """
    sources = [str((told or {}).get("source") or "") for told in inputs.values()]
    hub = dict.fromkeys(found[0] for s in sources if (found := hub_id(s)))
    taken, _ = inherited({name: (told or {}).get("card") or {} for name, told in inputs.items()})
    made: dict[str, Any] = {"base_model": list(hub) or None, "base_model_relation": relation if hub else None}
    tags = ["merge"] * (relation == "merge") + ["counterpoise"]
    told: dict[str, Any] = {"library_name": "transformers", "tags": tags, **made, **taken}
    if results:
        from huggingface_hub import ModelCardData

        text = ModelCardData(**told, model_name=name, eval_results=list(results)).to_yaml()
    else:  # the same text, without a third of a second for the import
        ordered = {name: told[name] for name in FRONT if told.get(name) is not None}
        text = yaml.dump(ordered, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{text}\n---"


def _measured(content: Mapping[str, Any]) -> list[Any]:
    """The pick's numbers as the hub lists them."""
    if not content.get("tax"):
        return []
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            "text-generation", row["name"], row["name"], row["metric"], row["pick"]["value"], dataset_split="held-out"
        )
        for row in content["tax"]
        if row.get("pick")
    ]


def _commits(content: Mapping[str, Any]) -> str:
    """Which commit a hub id stood for on that day: a branch moves."""
    sides = {name: side or {} for name, side in (content.get("inputs") or {}).items()}
    return "".join(
        f"{name.upper()} is `{side['source'].partition('@')[0]}` at commit `{side['revision']}`.\n\n"
        for name, side in sides.items()
        if side.get("revision")
    )
