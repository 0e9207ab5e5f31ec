"""How many tokens the prompts, responses and items of a plan have, counted as a run would read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from counterpoise.checkpoints.files import CheckpointError, first_line
from counterpoise.evaluation.abilities import is_file, load_abilities, refuse_repeats
from counterpoise.evaluation.items import FileAbility
from counterpoise.evaluation.parts import Part
from counterpoise.evaluation.specs import fewest
from counterpoise.language.costs import Lengths
from counterpoise.language.prompts import Prompt, encode_prompt, refuse_long_prompts
from counterpoise.language.sampling import Drawing
from counterpoise.language.shapes import Items
from counterpoise.language.ways import context_of
from counterpoise.planning.looking import Source

CHARACTERS = 4
"""Characters a token, where there is no tokenizer to ask."""
UNSEEN = {"items": 1000, "prompt": 300, "choices": 4, "continuation": 10, "generated": 256}
"""Of an lm-eval task, whose data set is not loaded: items a part where no limit is given, and tokens an item."""


@dataclass(frozen=True)
class Words:
    """Counts tokens: with a checkpoint's tokenizer, or by characters where it has none."""

    tokenizer: Any

    @classmethod
    def of(cls, folder: Path) -> Words:
        """The tokenizer of a folder, if it holds one."""
        files = sorted((*folder.glob("tokenizer*"), *folder.glob("*.model")))
        return cls(_tokenizer(folder, *((f, f.stat().st_mtime_ns) for f in files)) if files else None)

    def prompts(self, prompts: Sequence[Prompt], *, chat: bool) -> list[int]:
        """Tokens of each prompt, through the chat template if there is one."""
        if self.tokenizer is None:
            return self.lengths([p.text for p in prompts])
        return [len(encode_prompt(self.tokenizer, p, chat=chat)) for p in prompts]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        if self.tokenizer is None:
            return [math.ceil(len(t) / CHARACTERS) for t in texts]
        return [len(self.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]

    def mean(self, texts: Sequence[str], most: int = 200) -> float:
        """Mean tokens of the first texts."""
        found = self.lengths(texts[:most])
        return sum(found) / max(1, len(found))


@lru_cache(maxsize=2)
def _tokenizer(folder: Path, *files: tuple[Path, int]) -> Any:
    """The tokenizer of these files, read once: a dry run asks for it at every step."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        said = first_line(error)
        raise CheckpointError(f"{folder}: expected a tokenizer that can be read, found: {said}") from None


def look_at_abilities(
    specs: Sequence[str], source: Source, *, limit: int | None, drawing: Drawing, trust_tasks: bool = False
) -> tuple[dict[Part, list[Items]], list[str]]:
    """The items of every ability on validation and held-out data, and what had to be taken for granted.

    Raises:
        ValueError: an unreadable file, an item that does not fit the context, no such task of lm-eval, one that runs
            code and is not trusted, two abilities of one name.
    """
    words, new = Words.of(source.folder), drawing.max_new_tokens
    loaded = [a for a in load_abilities([s for s in specs if is_file(s)]) if isinstance(a, FileAbility)]
    for ability in loaded if words.tokenizer else ():
        ability.refuse_long(words.tokenizer, drawing, context_of(source.model.config), limit)
    tasks = [_of_harness(spec, limit, trust_tasks) for spec in specs if not is_file(spec)]
    parts: tuple[Part, ...] = ("validation", "held-out")
    found = {p: [*(_of_file(a, p, words, limit, new) for a in loaded), *(items for items, _ in tasks)] for p in parts}
    refuse_repeats([i.name for i in found["validation"]])
    return found, [line for _, told in tasks for line in told]


def _of_file(ability: FileAbility, part: Part, words: Words, limit: int | None, new: int) -> Items:
    read = [ability.wording(item.fields) for item in ability.items_of(part, fewest(limit, ability.limit))]
    following = [c for wording in read for c in wording.continuations]
    context, answer = words.mean([wording.context for wording in read]), words.mean(following)
    each = len(following) / len(read)
    return Items(ability.name, len(read), context, each, answer, generated=new if ability.draws else 0)


def _of_harness(spec: str, limit: int | None, trusted: bool) -> tuple[Items, list[str]]:
    from counterpoise.evaluation.harness_tasks import find_task

    task = find_task(spec, trusted=trusted)
    most = fewest(limit, task.limit)
    count, told = task.tasks * (most or UNSEEN["items"]), []
    if most is None:
        told.append(f"{task.name}: {count:,} items a part (data sets of lm-eval are not loaded; --limit bounds them)")
    if not task.output_type:
        told.append(f"{task.name}: written in Python, so taken to draw one answer an item; whether its metrics are numbers "
                    "per item, as they must be, shows when it is run")  # fmt: skip
    told.append(f"{task.name}: {UNSEEN['prompt']} tokens a prompt, {UNSEEN['generated']} of a drawn answer")
    items = Items(task.name, count, UNSEEN["prompt"], shared=False)
    if task.output_type not in ("multiple_choice", "loglikelihood", "loglikelihood_rolling"):
        return replace(items, generated=UNSEEN["generated"]), told
    choices = UNSEEN["choices"] if task.output_type == "multiple_choice" else 1
    return replace(items, choices=choices, continuation=UNSEEN["continuation"]), told


def lengths(
    source: Source,
    prompts: Sequence[Prompt],
    drawing: Drawing,
    itemsize: int,
    batch: int,
    *,
    longest_refused: bool = True,
) -> tuple[Lengths, list[str]]:
    """How long these prompts and responses are, `batch` at once in training, and what is said of them.

    Raises:
        ValueError: a prompt that does not fit the context with its response, unless not `longest_refused`.
    """
    words, new = Words.of(source.folder), drawing.max_new_tokens
    found = words.prompts(prompts, chat=drawing.chat)
    if longest_refused:
        refuse_long_prompts(prompts, found, new, context_of(source.model.config))
    assumed = [] if words.tokenizer else [f"no tokenizer: {CHARACTERS} characters a token, no chat template"]
    mean = sum(found) / len(found)
    told = [f"prompts of {mean:.0f} tokens in the mean, the longest {max(found)}", *assumed]
    return Lengths(mean, max(found), new, max(1, batch), itemsize), told
