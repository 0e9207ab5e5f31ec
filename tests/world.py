"""A pair whose alignment is real: a tiny model before and after RSF, with prompts, a reward and abilities on disk."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import string
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from counterpoise.alignment.rsf import rsf
from counterpoise.alignment.settings import RSF
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.parts import part_of
from counterpoise.language.prompts import read_prompts
from counterpoise.language.sampling import Drawing
from counterpoise.search.candidates import CONTROLS, HMA, TwoSided
from tiny import tiny, tokenizer


def early_letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward: letters from a to h, plus a trace of length so that it is no small integer."""
    return [sum(c in "abcdefgh" for c in r) + 0.01 * len(r) for r in responses]


def make(folder: Path) -> Path:
    """pre, post, prompts.jsonl, guess.jsonl and text.jsonl below `folder`; trained once a process."""
    return Path(shutil.copytree(_made(), folder, dirs_exist_ok=True))


@cache
def _made() -> Path:
    folder, draw = Path(tempfile.mkdtemp()), random.Random(0)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def word(length: int, letters: str = string.ascii_lowercase) -> str:
        return "".join(draw.choice(letters) for _ in range(length))

    def write(name: str, rows: list[dict[str, object]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("prompts.jsonl", [{"prompt": word(5)} for _ in range(120)])
    write("text.jsonl", [{"context": word(3), "continuation": word(6, string.digits)} for _ in range(60)])
    write("guess.jsonl", [{"query": word(4), "choices": [word(2), word(2)], "gold": i % 2} for i in range(60)])
    model, words = tiny("llama"), tokenizer()
    for side in ("pre", "post"):
        if side == "post":
            prompts = [p for p in read_prompts(folder / "prompts.jsonl") if part_of(p.key) == "proxy"]
            rsf(
                model,
                words,
                prompts,
                early_letters,
                RSF(
                    drawing=Drawing(n=8, max_new_tokens=6, seed=3),
                    iterations=2,
                    prompts_per_iteration=24,
                    epochs=4,
                    learning_rate=1e-2,
                    batch_size=8,
                ),
            )
        model.save_pretrained(folder / side)
        words.save_pretrained(folder / side)
    return folder


def panel(folder: Path, **settings: object) -> Panel:
    """Everything in `folder`, as `restore` takes it."""
    specs = [f"continue:{folder / 'text.jsonl'}", f"choices:{folder / 'guess.jsonl'}"]
    options = {"prompt_limit": 30, "drawing": Drawing(max_new_tokens=6, batch_size=32), **settings}
    return Panel.load(folder / "prompts.jsonl", early_letters, specs, **options)  # type: ignore[arg-type]


def searches(*, hma: bool = True, controls: bool = True, size: int = 12, **two: object) -> dict[str, object]:
    """What `restore` compares: HMA on `size` proxies, the controls, and the two-sided search where it is told something."""
    found: list[object] = [HMA(proxy_size=size)] if hma else []
    found += CONTROLS if controls else ()
    if two:
        found.append(TwoSided(proxy_size=size, **two))  # type: ignore[arg-type]
    return {"searches": found}
