"""Files as strangers break them: bytes, json values, table cells, safetensors headers, chat templates. All from one Random."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

ODD = [
    "\u2028",
    "\u0085",
    "\ufeff",
    "\x00",
    "\U0001f600",
    "e\u0301",
    "\u202e",
    "\r",
    "\ud800",
    "\t",
    '"',
    "\\",
    "{{",
    "x" * 5000,
]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, -(10**30), 1e308, -0.0, 0.5, float("nan"), float("inf"),
    "", "a", "1", "NaN", "../../x", "/etc/hostname", "\x00", "\ud83d", "\u2028", [], [[]], [None], ["a"], [1, 2], {}, {"a": 1},
    {"": None}, [0] * 1000, "z" * 100_000,
]  # fmt: skip
TEMPLATES = [
    "{{ raise_exception('roles must alternate') }}", "{% for m in messages %}{{ m.content }}", "{{ messages[9].content }}",
    "{{ 1 // 0 }}", "{{ nothing.at.all }}", "{{ messages + 1 }}", "{% include 'x' %}", "{{ bos_token + 1 }}", "", "   ",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% for i in range(10000000000) %}x{% endfor %}", "{{ 'x' * 10**10 }}",
    "{% if messages[0].role == 'user' %}{{ raise_exception('system first') }}{% endif %}", "{{ ''.__class__.__mro__ }}",
    "{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}", "{{ messages | length / 0 }}", "{{ strftime_now(1) }}",
    "{{ messages[0]['content']['text'] }}", "{{ messages | sort }}", "{% set x = messages.pop() %}{{ x }}", "{{ '\ud800' }}",
]  # fmt: skip


def broken_bytes(draw: random.Random, content: bytes) -> bytes:
    """Flipped, cut short, doubled, emptied, marked, recoded or with something put in."""
    at, stop = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    flipped = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        if flipped:
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    odd = draw.choice(ODD).encode("utf-8", "surrogatepass")
    return draw.choice([
        bytes(flipped), bytes(flipped), content[:at], content + content, content[:at] + content[stop:], b"", b"\n",
        b"\xef\xbb\xbf" + content, content[:at] + odd + content[at:], content[:at] + draw.randbytes(9) + content[at:],
        content.decode("utf-8", "replace").encode("utf-16"), content.replace(b"\n", b"\r\n"), content[:at] + bytes(40),
        b"\x1f\x8b" + content, content + b"\x00",
    ])  # fmt: skip


def broken_value(draw: random.Random, content: Any) -> Any:
    """A json value with something in it replaced, lost, added, renamed, repeated or wrapped."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ():
            places.append((holder, key))
            waiting.append(holder[key])
    if not places or draw.random() < 0.03:
        return draw.choice(VALUES)
    # Each depth as often as the others, or the long lists would be all that is tried.
    holder, key = draw.choice(draw.choice([places[:8], places[:40], places]))
    way = draw.randrange(8)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[draw.choice([*ODD, key.upper(), key + "_", "extra"])] = holder.pop(key)
    elif way == 2 and isinstance(holder, dict):
        holder[draw.choice([*ODD, "extra", "rope_scaling", "quantization_config"])] = draw.choice(VALUES)
    elif way == 3 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    elif way == 4:
        holder[key] = draw.choice([[holder[key]], {"value": holder[key]}, str(holder[key])])
    elif way == 5 and isinstance(holder[key], str):
        at = draw.randrange(len(holder[key]) + 1)
        holder[key] = holder[key][:at] + draw.choice(ODD) + holder[key][at:]
    else:
        holder[key] = draw.choice(VALUES)
    return content


def broken_json(draw: random.Random, content: bytes) -> bytes:
    """A json file: its bytes, its values, or brackets nested beyond what a stack holds."""
    if (way := draw.random()) < 0.25:
        return broken_bytes(draw, content)
    if way < 0.28:
        deep = draw.choice([200, 5_000, 200_000])
        return content.rstrip()[:-1] + b', "deep": ' + b"[" * deep + b"]" * deep + b"}"
    value = json.loads(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        value = broken_value(draw, value)
    return _text(draw, value)


def broken_lines(draw: random.Random, content: bytes) -> bytes:
    """A jsonl file: its bytes, or the values of one or all of its lines."""
    if draw.random() < 0.3:
        return broken_bytes(draw, content)
    lines = content.splitlines()
    chosen = range(len(lines)) if draw.random() < 0.2 else [draw.randrange(len(lines))]
    same = draw.getrandbits(32)
    for n in chosen:
        lines[n] = _text(random.Random(same), broken_value(random.Random(same), json.loads(lines[n])))
    return b"\n".join(lines) + b"\n"


def broken_table(draw: random.Random, content: bytes) -> bytes:
    """A csv or tsv file: its bytes, or a cell, a column, a row."""
    if draw.random() < 0.4:
        return broken_bytes(draw, content)
    lines = content.decode().split("\n")
    mark = "\t" if "\t" in lines[0] else ","
    at = draw.choice([0, draw.randrange(len(lines))])
    cells = lines[at].split(mark)
    cell = draw.randrange(len(cells))
    cells[cell] = draw.choice(["", "nan", "inf", "1e999", '"', '"open', "a" * 200_000, *ODD])
    lines[at] = draw.choice([mark.join(cells), mark.join(cells[:cell]), lines[at] + mark + "more", mark * 50, lines[0]])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def broken_tensors(draw: random.Random, content: bytes) -> bytes:
    """A safetensors file: its bytes, the length it gives its header, or the header's values."""
    if (way := draw.random()) < 0.2:
        return broken_bytes(draw, content)
    (length,) = struct.unpack("<Q", content[:8])
    if way < 0.3:
        other = draw.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(content)])
        return struct.pack("<Q", other) + content[8:]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    text = _text(draw, broken_value(draw, header))
    if way < 0.35:
        text = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    body = draw.choice([body, body, body, body[: len(body) // 2], body + bytes(8), b""])
    return struct.pack("<Q", len(text)) + text + body


def broken_template(draw: random.Random, content: bytes) -> bytes:
    """A chat template: another one that cannot work, or this one with its bytes broken."""
    if draw.random() < 0.3:
        return broken_bytes(draw, content)
    return draw.choice(TEMPLATES).encode("utf-8", "surrogatepass")


def _text(draw: random.Random, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    return text.encode("utf-8", draw.choice(["surrogatepass", "replace"]))


KINDS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": broken_json, ".jsonl": broken_lines, ".csv": broken_table, ".tsv": broken_table, ".txt": broken_bytes,
    ".safetensors": broken_tensors, ".jinja": broken_template,
}  # fmt: skip
"""How a file is broken, by the end of its name."""
