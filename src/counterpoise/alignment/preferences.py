"""Preference data: prompts with a chosen and a rejected response, in the three layouts in which they are published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from counterpoise.checkpoints.reading import json_records
from counterpoise.language.prompts import TURN, Prompt, transcript

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
LAYOUTS = (
    '{"prompt": text or messages, "chosen": ..., "rejected": ...}, HH transcripts {"chosen": "\\n\\nHuman: ...", '
    '"rejected": ...}, or {"conversations": [{"from", "value"}], "chosen": {"value"}, "rejected": {"value"}}'
)


class Preference(NamedTuple):
    """A prompt and two responses, of which people or a model preferred the first."""

    prompt: Prompt
    chosen: str
    rejected: str


def read_preferences(path: str | Path) -> list[Preference]:
    """Read a jsonl file or a json list, gzipped or not.

    A line is {"prompt", "chosen", "rejected"}, where the prompt is text or messages and a response is text, a message or
    a list with one; an HH transcript pair {"chosen", "rejected"} that differs in the last Assistant turn; or
    LLaMA-Factory's {"conversations", "chosen", "rejected"}. Left out are pairs without a difference, and transcripts that
    differ before the last turn (a handful in the published HH files), which are not two responses to one prompt.

    Raises:
        ValueError: a missing column or another form, with the line; no pair at all.
    """
    read = [_pair(record, place) for place, record in json_records(path)]
    pairs = [pair for pair in read if pair is not None and pair.chosen != pair.rejected]
    if not pairs:
        raise ValueError(f"{path}: expected at least one pair whose responses differ, found none; lines are {LAYOUTS}")
    return pairs


def _pair(record: Any, place: str) -> Preference | None:
    if not isinstance(record, Mapping):
        raise ValueError(f"{place}: expected {LAYOUTS}, found {type(record).__name__}")
    if missing := [name for name in ("chosen", "rejected") if name not in record]:
        raise ValueError(
            f"{place}: expected the columns chosen and rejected, found no {missing[0]} among {sorted(record)}; "
            f"lines are {LAYOUTS}"
        )
    prompt = record.get("prompt", record.get("conversations", record.get("messages")))
    if prompt is None:
        return _transcripts(record, place)
    sides = (_response(record[side], side, place) for side in ("chosen", "rejected"))
    return Preference(_prompt(prompt, place), *sides)


def _prompt(value: Any, place: str) -> Prompt:
    if isinstance(value, str):
        return replace(transcript(value) or Prompt((("user", value),)), place=place)
    try:
        turns = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in value]
        if turns and all(isinstance(content, str) for _, content in turns):
            return Prompt(tuple((ROLES[role], content) for role, content in turns), place)
    except (AttributeError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{place}: expected a prompt of text or messages with roles {', '.join(ROLES)}, found {str(value)[:80]!r}"
    )


def _response(value: Any, side: str, place: str) -> str:
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        value = value.get("content", value.get("value"))
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected text or a message in {side}, found {str(value)[:80]!r}")
    return value.strip()


def _transcripts(record: Mapping[str, Any], place: str) -> Preference | None:
    sides = [record["chosen"], record["rejected"]]
    if not all(isinstance(side, str) and TURN.search(side) for side in sides):
        raise ValueError(
            f'{place}: expected a column prompt, or whole transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ...") in chosen and '
            f"rejected, found columns {sorted(record)} without either"
        )
    heads, _, tails = zip(*(side.rpartition("\n\nAssistant:") for side in sides), strict=True)
    prompt = transcript(heads[0])
    if heads[0] != heads[1] or prompt is None:
        return None
    return Preference(replace(prompt, place=place), tails[0].strip(), tails[1].strip())
