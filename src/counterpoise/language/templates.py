"""Templates of other people's making, of chats above all: rendered within bounds, and asked once what they refuse."""

from __future__ import annotations

import re
import sys
import tracemalloc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from types import FrameType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

STEPS = 1_000_000
"""Lines that a rendering may run; a usual one runs some hundred."""
LARGEST = 1_000_000
"""The largest number that a template may hold: above it one operation can take for ever, or all memory."""
MEMORY = 256 << 20
"""Bytes that the first rendering may take."""
WITHOUT = "give --no-chat-template"
SYSTEM, USER = "counterpoise-system", "counterpoise-user"
Messages = Sequence[tuple[str, str]]


class Refused(ValueError):
    """What a template says of a conversation that it does not render."""


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_of(tokenizer: Any) -> str:
    """The template that a tokenizer's conversations go through.

    Raises:
        Refused: several, and none of them is the default.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several, none of them the default
        raise Refused(f"expected one chat template, or one named default, found several ({error})") from None


def render(tokenizer: Any, messages: Messages, *, reply: bool = False) -> str:
    """The text of a conversation under the tokenizer's chat template, with the opening of a `reply` if so.

    Raises:
        Refused: the template refuses these messages, is none, or takes too long.
    """
    return _rendered(tokenizer, fitted(tokenizer, messages), reply)


def fitted(tokenizer: Any, messages: Messages) -> Messages:
    """The messages with the system's text in the first user turn, where the chat template has no place for it.

    A warning says so once.
    """
    takes = _takes_system(tokenizer, template_of(tokenizer))
    told = [content for role, content in messages if role == "system"]
    others = [turn for turn in messages if turn[0] != "system"]
    if takes or not told or "user" not in dict(others):
        return messages
    first = [role for role, _ in others].index("user")
    _say_folded(str(getattr(tokenizer, "name_or_path", "")))
    others[first] = ("user", "\n\n".join([*told, others[first][1]]))
    return others


@lru_cache(maxsize=16)
def _takes_system(tokenizer: Any, template: str) -> bool:
    """Whether a system's text is in what is rendered; asked once, when it is also seen that the template ends."""
    refuse_boundless(template, "the chat template", f"mend it, or {WITHOUT}")
    turns = (("user", USER),)
    with within_memory():
        _rendered(tokenizer, turns, False)
        try:
            return SYSTEM in _rendered(tokenizer, (("system", SYSTEM), *turns), False)
        except Refused:
            return False


@cache
def _say_folded(name: str) -> None:
    said = (
        "its chat template refuses a system message or leaves it out; the system's text stands in the first user turn"
    )
    warnings.warn(f"{name or 'tokenizer'}: {said}", stacklevel=4)


def _rendered(tokenizer: Any, messages: Messages, reply: bool) -> str:
    told = [{"role": role, "content": content} for role, content in messages]
    roles = ", ".join(role for role, _ in messages[:6])
    with bounded(f"the chat template refuses this conversation ({roles})", f"change its turns, or {WITHOUT}"):
        return str(tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=reply))


@contextmanager
def bounded(refusal: str, advice: str) -> Iterator[None]:
    """Inside, a template is rendered, within STEPS lines of Python; whatever goes wrong is a `Refused` of these words."""
    try:
        with _within_steps():
            yield
    except Exception as error:  # whatever jinja, or an operation inside it, has to say
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise Refused(f"{refusal}: {said}; {advice}") from None


@lru_cache(maxsize=64)
def refuse_boundless(template: str, called: str, advice: str) -> None:
    """Refuse powers and huge numbers, which jinja works out while it compiles, and what is no template."""
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)  # transformers' own tag
    try:
        tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        numbers = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, (int, float))]
        powers = tree.find(nodes.Pow) is not None
    except (TemplateError, RecursionError) as error:
        raise Refused(f"{called} cannot be read ({error}); {advice}") from None
    if powers or any(not abs(number) <= LARGEST for number in numbers):
        raise Refused(
            f"{called} computes powers or holds numbers above {LARGEST:,}, so that it may never end; {advice}"
        )


@contextmanager
def _within_steps() -> Iterator[None]:
    """Inside, this thread runs at most STEPS lines of Python: counted, as a clock would depend on the machine."""
    left, most = STEPS, tracemalloc.get_traced_memory()[0] + MEMORY

    def watch(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"it goes on after {STEPS:,} steps")
        if tracemalloc.get_traced_memory()[0] > most:  # 0 where nobody counts it
            raise ValueError(f"it takes more than {MEMORY >> 20} MiB")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def within_memory() -> Iterator[None]:
    """Inside, what Python allocates is counted, unless somebody counts it already."""
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    try:
        yield
    finally:
        if ours:
            tracemalloc.stop()
