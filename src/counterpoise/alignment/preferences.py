"""Preference data: prompts with a chosen and a rejected response, in the layouts in which they are published."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from counterpoise.language.prompts import TURN, Prompt, prompt_key, prompt_of, said_in, transcript, turns_of
from counterpoise.language.rows import rows

LAYOUTS = (
    '{"prompt": text or messages, "chosen": ..., "rejected": ...}, conversations or HH transcripts {"chosen", "rejected"}, '
    '{"conversations": [{"from", "value"}], "chosen": {"value"}, "rejected": {"value"}}, or UltraFeedback\'s '
    '{"instruction", "completions"}'
)


class Preference(NamedTuple):
    """A prompt and two responses, of which people or a model preferred the first."""

    prompt: Prompt
    chosen: str
    rejected: str


def read_preferences(path: str | Path) -> list[Preference]:
    """Read the pairs of a file or data set; see `rows`.

    A row is a prompt (see `prompt_of`) with `chosen` and `rejected`, each text, a message, or messages of which the last is the
    response; or without a prompt two conversations or HH transcripts that differ in the last turn; or UltraFeedback's
    `completions`, whose best and worst `overall_score` are taken. Left out are pairs without a difference, and
    conversations that differ before the last turn (a handful in the published HH files), which are not two responses to
    one prompt.

    Raises:
        ValueError: a missing column or another form, with the line; no pair at all.
    """
    read = [_pair(record, place) for place, record in rows(path)]
    pairs = [pair for pair in read if pair is not None and pair.chosen != pair.rejected]
    if not pairs:
        raise ValueError(f"{path}: expected at least one pair whose responses differ, found none; lines are {LAYOUTS}")
    return pairs


def _pair(record: Any, place: str) -> Preference | None:
    if not isinstance(record, Mapping):
        raise ValueError(f"{place}: expected {LAYOUTS}, found {type(record).__name__}")
    if isinstance(record.get("completions"), list) and "chosen" not in record:
        record = _best_and_worst(record, place)
    if missing := [name for name in ("chosen", "rejected") if record.get(name) is None]:
        raise ValueError(
            f"{place}: expected the columns chosen and rejected, found no {missing[0]} among {sorted(record)}; "
            f"lines are {LAYOUTS}"
        )
    sides = [record["chosen"], record["rejected"]]
    if all(isinstance(side, list) and len(side) > 1 for side in sides) and not isinstance(record.get("prompt"), list):
        heads = [turns_of(side[:-1], place) for side in sides]
        prompt = Prompt(heads[0], place) if heads[0] == heads[1] else None
    elif prompt_key(record) is None:
        prompt, sides = _transcripts(record, place)
    else:
        prompt = prompt_of(record, place)
    if prompt is None:
        return None
    return Preference(
        prompt, *(_response(said, side, place) for side, said in zip(("chosen", "rejected"), sides, strict=True))
    )


def _best_and_worst(record: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    with suppress(KeyError, TypeError, ValueError):
        ranked = sorted(record["completions"], key=lambda c: float(c["overall_score"]))
        worst, best = ranked[0], ranked[-1]
        said = best["response"], (best if best["overall_score"] == worst["overall_score"] else worst)["response"]
        return {**record, "chosen": said[0], "rejected": said[1]}
    raise ValueError(
        f"{place}: expected completions with response and overall_score, found {str(record['completions'])[:80]}"
    )


def _response(value: Any, side: str, place: str) -> str:
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        with suppress(KeyError, TypeError):
            value = said_in(value)
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected text or a message in {side}, found {str(value)[:80]!r}")
    return value.strip()


def _transcripts(record: Mapping[str, Any], place: str) -> tuple[Prompt | None, list[str]]:
    sides = [record["chosen"], record["rejected"]]
    if not all(isinstance(side, str) and TURN.search(side) for side in sides):
        raise ValueError(
            f'{place}: expected a column prompt, or whole transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ...") in chosen and '
            f"rejected, found columns {sorted(record)} without either"
        )
    heads, _, tails = zip(*(side.rpartition("\n\nAssistant:") for side in sides), strict=True)
    turns = transcript(heads[0]) if heads[0] == heads[1] else None
    return None if turns is None else Prompt(turns, place), list(tails)
