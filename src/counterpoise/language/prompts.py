"""Prompts: read from files, known by their content, made into tokens."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from counterpoise.language.groups import groups_of
from counterpoise.language.rows import rows
from counterpoise.language.templates import Refused, has_template, render

Turns = tuple[tuple[str, str], ...]
"""Role and text of each turn."""
KEYS = ("prompt", "messages", "conversations", "instruction", "question")
"""Columns that hold a prompt; the first that is there counts."""
LAYOUTS = (
    '{"prompt": text or messages}, {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]}, '
    '{"instruction", "input"} or {"question"}'
)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
         "developer": "developer", "tool": "tool"}  # fmt: skip
TURN = re.compile(r"\n\n(Human|Assistant):")
"""What stands before each turn of an HH transcript."""


@dataclass(frozen=True)
class Prompt:
    """One conversation that waits for a response: messages in the chat format, `{"role": ..., "content": ...}`.

    Attributes:
        place: the file and line where it stands, for messages.
        group: see `groups_of`; "" where it is alone.
    """

    messages: Turns
    place: str = field(default="", compare=False, repr=False)
    group: str = field(default="", compare=False, repr=False)

    @property
    def text(self) -> str:
        """The words of the conversation without any template: what a reward is shown."""
        return "\n".join(content for _, content in self.messages)

    @cached_property
    def key(self) -> str:
        """sha256 of the content: the same prompt has the same key in every file and order."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read the prompts of a file or data set, see `rows` and `prompt_of`; drops repeats, and a reply that stands last."""
    prompts: dict[str, Prompt] = {}
    records: dict[str, dict[str, Any]] = {}
    for place, record in rows(path):
        prompt = prompt_of(record, place)
        prompts.setdefault(prompt.key, prompt)
        turns = [{"role": role, "content": content} for role, content in prompt.messages]
        records.setdefault(prompt.key, {**record, "prompt": None, "messages": turns})
    if not prompts:
        raise ValueError(f'{path}: expected at least one line {{"prompt": "..."}}, found none')
    groups = groups_of(list(records.values()))
    return [replace(prompt, group=group) for prompt, group in zip(prompts.values(), groups, strict=True)]


def prompt_of(record: Any, place: str) -> Prompt:
    """The prompt of one row, which has one of KEYS; `place` says where it stands, in errors.

    A `prompt` that is a whole HH transcript, "\\n\\nHuman: ...\\n\\nAssistant:", is read as its turns, any other text as one
    turn of the user. Alpaca's `input` follows its instruction, `system` and `history` stand before it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{place}: expected {LAYOUTS}, found {type(record).__name__}")
    if (key := prompt_key(record)) is None:
        raise ValueError(f"{place}: expected {LAYOUTS}, found the columns {', '.join(map(str, record))}; rename one of them "
                         "to prompt")  # fmt: skip
    if isinstance(given := record[key], str):
        more = record.get("input") if key == "instruction" else None
        text = given if more in (None, "") else f"{given}\n{more}"
        before = [p for p in record.get("history") or () if isinstance(p, list)]  # pairs of what was asked and answered
        told = [{"role": r, "content": said} for pair in before for r, said in zip(("user", "gpt"), pair, strict=False)]
        messages = transcript(text) or turns_of([*told, {"role": "user", "content": text}], place)
    else:
        messages = turns_of(given, place)
    if record.get("system") and messages[0][0] != "system":
        messages = (*turns_of([{"role": "system", "content": record["system"]}], place), *messages)
    while messages and messages[-1][0] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"{place}: expected a turn of the user, found only replies")
    return Prompt(messages, place)


def prompt_key(record: Mapping[str, Any]) -> str | None:
    """Which of KEYS a row has; None for none of them."""
    return next((key for key in KEYS if record.get(key) is not None), None)


def turns_of(messages: Any, place: str) -> Turns:
    """Role and text of messages, {"role", "content"} or ShareGPT's {"from", "value"}.

    Raises:
        ValueError: not so.
    """
    with suppress(AttributeError, KeyError, TypeError):
        turns = tuple((ROLES[m.get("role", m.get("from"))], said_in(m)) for m in messages)
        if turns and all(isinstance(said, str) for _, said in turns):
            return turns
    raise ValueError(
        f"{place}: expected a prompt of text or messages with roles {', '.join(ROLES)}, found {str(messages)[:80]!r}"
    )


def said_in(message: Mapping[str, Any]) -> Any:
    """What a message says: a text, or parts of which each is one."""
    said = message.get("content", message.get("value"))
    return "".join(part["text"] for part in said) if isinstance(said, list) else said


def transcript(text: str) -> Turns | None:
    """The turns of an HH transcript, a closing empty Assistant turn dropped; None when `text` does not begin as one.

    >>> transcript("\\n\\nHuman: Hi\\n\\nAssistant:")
    (('user', 'Hi'),)
    """
    before, *parts = TURN.split(text)
    if before.strip() or parts[:1] != ["Human"]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1] == ("assistant", ""):
        turns.pop()
    return tuple(turns)


def encode_prompt(tokenizer: Any, prompt: Prompt, *, chat: bool = True) -> tuple[int, ...]:
    """Token ids of `prompt`: through the tokenizer's chat template when it has one and `chat` holds, else plain text.

    Raises:
        ValueError: the template refuses it; the message says which prompt and why.
    """
    if chat and has_template(tokenizer):
        try:
            text = render(tokenizer, prompt.messages, reply=True)
        except Refused as error:
            raise ValueError(f"{named(prompt)}: {error}") from None
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = tokenizer(prompt.text)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers end every text; a response is to follow
    return tuple(ids)


def begins(tokenizer: Any) -> Any:
    """The id of the token that begins a text, or ends one; None where the tokenizer has neither."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], *, chat: bool, new: int, limit: int | None
) -> list[tuple[int, ...]]:
    """`encode_prompt` of each, where all fit a context of `limit` with `new` tokens more; see `refuse_long_prompts`."""
    encoded = [encode_prompt(tokenizer, p, chat=chat) for p in prompts]
    refuse_long_prompts(prompts, list(map(len, encoded)), new, limit)
    return encoded


def named(prompt: Prompt) -> str:
    """Where a prompt stands, or how it begins."""
    return prompt.place or f"prompt {prompt.text[:60]!r}"


def refuse_long_prompts(prompts: Sequence[Prompt], lengths: Sequence[int], new: int, limit: int | None) -> None:
    """Raise where a prompt of so many tokens and `new` more do not fit a context of `limit` (None has room for all), or has none.

    Raises:
        ValueError: the first of them, and how many there are.
    """
    if empty := [i for i, length in enumerate(lengths) if not length]:
        raise ValueError(
            f"{named(prompts[empty[0]])}: expected a prompt of at least one token, found none ({len(empty)} of {len(prompts)}); "
            "drop it, or mend the chat template that wrote nothing"
        )
    room = math.inf if limit is None else limit - new
    if room < 1:
        raise ValueError(
            f"max_new_tokens: expected less than the model's context of {limit} tokens, found {new}; lower it, so that a "
            "prompt fits in front"
        )
    if long := [i for i, length in enumerate(lengths) if length > room]:
        raise ValueError(
            f"{named(prompts[long[0]])}: expected prompts of at most {room} tokens (a context of {limit} less {new} to "
            f"generate), found {lengths[long[0]]} ({len(long)} of {len(prompts)} are too long); drop or shorten them, or "
            "lower max_new_tokens"
        )
