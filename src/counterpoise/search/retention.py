"""Retention sets: what PRE itself says, on which a search computes what is lost. No ability data is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from counterpoise.evaluation.items import FileAbility, encode_pair, spaced
from counterpoise.language.engine import LanguageModel
from counterpoise.language.prompts import Prompt, begins, encode_prompt
from counterpoise.language.sampling import Drawing, sample_together
from counterpoise.language.scoring import Example
from counterpoise.records import Progress

OPENINGS = (
    "The", "In the", "It is", "There are", "When", "Once upon a time", "A new study", "Most people", "The history of",
    "One of the first", "According to", "For many years", "The main difference between", "How to", "Question:", "Q: What",
    "Dear", "To make", "The city of", "She looked", "He said that", "We are", "If you", "Although", "During the war",
    "In mathematics", "The word", "Water", "The government", "Scientists", "My favourite", "Yesterday", "In chapter one",
    "The following table", "def ", "import ", "Let x", "Step 1:", "Because", "On Monday", "The doctor", "Energy",
    "A list of", "The river", "Trade between", "The theory of", "In French", "Children", "The company", "Music",
    "As of", "Some animals", "The price of", "Every morning", "The law", "He was born", "The film", "A good way to",
    "After the game", "The computer", "Cells", "Her mother", "The train", "In conclusion",
)  # fmt: skip
"""Generic beginnings of text of many kinds: fiction, news, science, questions, instructions, code."""


def draw_retention(
    model: LanguageModel,
    tokenizer: Any,
    drawing: Drawing,
    *,
    size: int,
    openings: Sequence[str] = OPENINGS,
    prompts: Sequence[Prompt] = (),
    progress: Progress | None = None,
) -> dict[str, list[Example]]:
    """PRE's own continuations of openings ("text") and responses to prompts ("prompts"), half of `size` each.

    They are not selected, so their mean NLL under theta(r) is KL(pre || theta(r)) per token up to a constant, estimated
    without any data of the abilities. With no prompts, or no openings, the other set takes the whole size.

    Args:
        model: PRE.
        drawing: of a temperature of 1, for the divergence to be that of the model itself; its n does not count.
        size: sequences in all; each opening and prompt is continued as often as that takes.
    """
    sources = {
        "text": [encode_prompt(tokenizer, Prompt((("user", t),)), chat=False) for t in openings],
        "prompts": [encode_prompt(tokenizer, p, chat=drawing.chat) for p in prompts],
    }
    sources = {name: contexts for name, contexts in sources.items() if contexts}
    if not sources or size < len(sources):
        raise ValueError(
            f"retention: expected openings or prompts and a size of at least one each, found size {size}, "
            f"{len(openings)} openings and {len(prompts)} prompts"
        )
    found = {}
    for number, (name, contexts) in enumerate(sources.items()):
        count = size // len(sources) + (number < size % len(sources))
        used = [c or (int(begins(tokenizer)),) for c in contexts[:count]]  # an empty opening begins where text begins
        how = replace(drawing, n=math.ceil(count / len(used)), seed=drawing.seed + number)
        drawn = sample_together(model, tokenizer, used, how, progress=progress)
        rounds = zip(*drawn, strict=True)  # every context once before any twice
        found[name] = [Example(c, y) for row in rounds for c, y in zip(used, row, strict=True)][:count]
    return found


def calibration(ability: FileAbility, tokenizer: Any, *, limit: int | None = None) -> list[Example]:
    """The right answers of an ability's validation items, as a retention set: for those who have some data to give.

    The validation part alone is read: the held-out numbers stay those of a search that never saw them. (The pick, made
    on validation, then leans towards what was calibrated on the same items.)
    """
    examples = []
    for item in ability.items_of("validation", limit):
        context, answer = ability.right(item.fields)
        examples.append(Example(*encode_pair(tokenizer, context, spaced(context, answer))))
    return examples
