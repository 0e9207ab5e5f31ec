"""AlpacaEval's files: a model's outputs, and the annotations of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from counterpoise.checkpoints.reading import json_records

FIELDS = ("instruction", "output", "generator")


class Output(NamedTuple):
    """One response of one model."""

    instruction: str
    output: str
    generator: str


class OutputPair(NamedTuple):
    """Two models' responses to one instruction."""

    instruction: str
    ours: Output
    theirs: Output


def read_outputs(path: str | Path) -> list[Output]:
    """Read a json list (or jsonl) of {"instruction", "output", "generator"}; other fields are not looked at.

    Raises:
        ValueError: not such a file; the message names the place.
    """
    found = []
    for place, row in json_records(path):
        given = row if isinstance(row, dict) else {}
        if wrong := [field for field in FIELDS if not isinstance(given.get(field), str)]:
            kind = type(given[wrong[0]]).__name__ if wrong[0] in given else "missing"
            raise ValueError(f"{place}: expected the strings {', '.join(FIELDS)}; {wrong[0]!r} is {kind}")
        found.append(Output(*(row[field] for field in FIELDS)))
    if not found:
        raise ValueError(f"{path}: expected a json list of outputs with at least one, found none")
    if len(names := {o.generator for o in found}) > 1:
        raise ValueError(f"{path}: expected the outputs of one generator, found {', '.join(sorted(names)[:5])}")
    return found


def pair_outputs(ours: Sequence[Output], theirs: Sequence[Output]) -> list[OutputPair]:
    """The outputs of two models to the same instructions, in the order of `ours`; repeated instructions in turn.

    Raises:
        ValueError: an instruction that one of them lacks.
    """
    waiting: dict[str, list[Output]] = {}
    for output in theirs:
        waiting.setdefault(output.instruction, []).append(output)
    pairs = []
    for output in ours:
        if not waiting.get(output.instruction):
            raise ValueError(
                f"{theirs[0].generator} has no output for {_short(output)}; expected the same instructions"
            )
        pairs.append(OutputPair(output.instruction, output, waiting[output.instruction].pop(0)))
    if left := [o for rest in waiting.values() for o in rest]:
        raise ValueError(
            f"{ours[0].generator} has no output for {len(left)} instructions of {left[0].generator}, first "
            f"{_short(left[0])}; expected the same instructions"
        )
    return pairs


def annotated(pairs: Sequence[OutputPair], scores: Sequence[float | None], annotator: str) -> list[dict[str, Any]]:
    """AlpacaEval's annotations: output_1 is the reference (theirs), output_2 ours; a preference of 2 is a win of ours.

    Args:
        scores: ours, in [0, 1], 0.5 for a tie; None where there is no verdict.
    """
    return [
        {
            "instruction": pair.instruction,
            "output_1": pair.theirs.output,
            "generator_1": pair.theirs.generator,
            "output_2": pair.ours.output,
            "generator_2": pair.ours.generator,
            "annotator": annotator,
            "preference": None if score is None else 1.0 + score,
        }
        for pair, score in zip(pairs, scores, strict=True)
    ]


def _short(output: Output) -> str:
    return repr(output.instruction if len(output.instruction) <= 60 else output.instruction[:59] + "…")
