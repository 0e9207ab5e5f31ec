"""Drawing responses from a causal language model."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoise.language.engine import Engine, LanguageModel
from counterpoise.language.footprints import drawing_bytes
from counterpoise.language.generating import batches, begun_rows, blank_generation_config, to_the_end, way_of
from counterpoise.language.memory import USUAL, Rows, as_fits, free_beside, rows_that_fit
from counterpoise.language.scoring import (
    device_of,
    left_pad,
    refuse_too_long,
)
from counterpoise.language.shapes import shape_of
from counterpoise.language.templates import has_template, render
from counterpoise.language.ways import remembered
from counterpoise.ranks import NoNumbers, from_first, gathered, in_step, turn
from counterpoise.records import Progress


@dataclass(frozen=True)
class Drawing:
    """How responses are drawn.

    Attributes:
        n: responses a prompt.
        max_new_tokens: of the longest response.
        temperature: 0 is greedy.
        chat: whether a prompt goes through the tokenizer's chat template, where it has one.
        batch_size: responses drawn at once, or n where that is more; "auto": as many as fit (`memory.rows_that_fit`).
        compiled: on a GPU the step is compiled (`generating.COMPILED`): quicker where few rows are drawn in many steps.
        seed: of the random numbers, one for each (prompt, reply, token): two models that are asked the same see the same
            ones, so that their rewards can be compared in pairs.
    """

    n: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    chat: bool = True
    batch_size: Rows = USUAL
    seed: int = 0
    compiled: bool = False

    @property
    def decides(self) -> dict[str, Any]:
        """All but the batch and how it is computed, as plain json: for keys of stored work."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch_size", "compiled")}

    @property
    def rows(self) -> int:
        """A batch of what cannot say how much memory it needs: gradients, rewards, lm-eval."""
        return SCORING.rows if self.batch_size == "auto" else self.batch_size

    def check(self) -> None:
        """Raise for what cannot be drawn.

        Raises:
            ValueError: a number out of range.
        """
        for name, number in (("n", self.n), ("max_new_tokens", self.max_new_tokens), ("batch_size", self.rows)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, found {number}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number of at least 0, found {self.temperature}")


SCORING = Drawing(batch_size=16)
"""The default where models are measured: 16 sequences at once are scored."""


def stop_tokens(model: LanguageModel, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response: the tokenizer's, those of the model's generation config, the chat template's."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = eos if isinstance(eos, (list, tuple)) else [eos]
    ids = [getattr(tokenizer, "eos_token_id", None), *several, turn_end(tokenizer)]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after what the assistant said; None without template or token."""
    if not has_template(tokenizer):
        return None
    said = "counterpoise"
    _, found, after = render(tokenizer, (("user", "?"), ("assistant", said))).rpartition(said)
    ids = tokenizer(after if found else "", add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return next((int(i) for i in ids if i in added and added[i].special), None)


@torch.no_grad()
def sample(
    model: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    drawing: Drawing,
    *,
    turn: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> list[list[tuple[int, ...]]]:
    """Draw `drawing.n` responses for each prompt, by ancestral sampling (greedy when the temperature is 0).

    Nothing else shapes the draws: of the model's own generation config only the ids that end a response count. What is
    drawn does not depend on the batch, on n, on the other prompts or on what ran before, but for the last bits of the
    logits: a token changes where its random number falls between two that differ in those (`InverseCdf`).

    Args:
        prompts: token ids, one tuple a prompt; the same one again draws other responses.
        turn: (k, m) answers each m-th batch alone, from the k-th; other prompts get no responses. To an engine all are one
            batch.

    Returns:
        For each prompt its n responses as token ids; a finished response ends with the first of `stop_tokens`, a
        response cut at `max_new_tokens` does not.
    """
    drawing.check()
    stops = stop_tokens(model, tokenizer)
    pad = stops[0] if stops else 0
    refuse_too_long(model, prompts, drawing.max_new_tokens)
    responses: list[list[tuple[int, ...]]] = [[] for _ in prompts]
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for prompt in prompts:
        keys.append((prompt, seen[prompt]))
        seen[prompt] += 1
    if isinstance(model, Engine):
        return responses if turn[0] else _drawn_by(model, keys, stops, drawing, progress)
    device, n, way = device_of(model), drawing.n, way_of(model, compiled=drawing.compiled)
    size = settled(model, prompts, drawing).rows

    def answered(some: Sequence[int]) -> list[list[tuple[int, ...]]]:
        full = min(1 << (len(some) - 1).bit_length(), max(len(some), size // n)) if way.fixed else len(some)
        each = [*some, *[some[-1]] * (full - len(some))]  # a step is compiled anew for each number of rows
        ids_BT, mask_BT = left_pad([prompts[i] for i in each], pad, device)
        begun = begun_rows(model, ids_BT, mask_BT, n, way)
        draw = InverseCdf([keys[i] for i in each], drawing, ids_BT.shape[1]) if drawing.temperature > 0 else None
        drawn = [_cut_after(row, stops) for row in to_the_end(model, begun, way, stops, drawing.max_new_tokens, draw)]
        return [drawn[place * n : (place + 1) * n] for place in range(len(some))]

    done = 0
    was_training = model.training
    model.eval()
    with blank_generation_config(model):
        for number, rows in enumerate(batches(prompts, max(1, size // n), way)):
            if number % turn[1] == turn[0]:
                for i, texts in zip(rows, as_fits(model, f"drawing {n} a prompt", rows, answered), strict=True):
                    responses[i] = texts
            done += len(rows)
            if progress is not None:
                progress(done, len(prompts))
    model.train(was_training)
    return responses


def settled(model: LanguageModel, prompts: Sequence[tuple[int, ...]], drawing: Drawing) -> Drawing:
    """A drawing with a number in the place of "auto": of responses to these prompts as many as fit now."""
    if drawing.batch_size != "auto" or isinstance(model, Engine) or not prompts:
        return drawing
    shape, longest = remembered(model, "shape", shape_of), max(map(len, prompts))
    size = next(model.parameters()).dtype.itemsize

    def need(rows: int) -> int:
        return drawing_bytes(shape, rows, longest, drawing.max_new_tokens, size, fixed=drawing.compiled)

    rows = rows_that_fit("auto", need, free_beside(model), drawing.n)
    return replace(drawing, batch_size=rows)


def sample_together(
    model: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    drawing: Drawing,
    *,
    progress: Progress | None = None,
) -> list[list[tuple[int, ...]]]:
    """`sample` with the batches shared among processes that have met; all know all responses.

    A model whose weights are cut up answers all of them in all processes, in step.
    """
    if isinstance(model, nn.Module) and in_step(model):
        return sample(model, tokenizer, prompts, drawing, progress=progress)
    drawing = from_first(lambda: settled(model, prompts, drawing))
    parts = gathered(lambda: sample(model, tokenizer, prompts, drawing, turn=turn(), progress=progress))
    return [next(filter(None, of)) for of in zip(*parts, strict=True)]


class InverseCdf:
    """Draws each row's next token by the inverse of its distribution function, for `generate` to take.

    Token i is drawn where u lies between the sums of the probabilities before i and up to i; u is uniform, a number of its
    own for each (seed, prompt, reply, position), from Philox (Salmon et al. 2011), the same on every machine. What has no
    probability is never drawn.

    Args:
        keys: token ids of a prompt, and how often it came before; `drawing.n` rows of each.
        begin: columns before the first drawn token.
    """

    def __init__(self, keys: Sequence[tuple[tuple[int, ...], int]], drawing: Drawing, begin: int) -> None:
        self.temperature, self.begin = drawing.temperature, begin
        rows = [uniforms(*key, reply, drawing) for key in keys for reply in range(drawing.n)]
        self.uniforms_BT = torch.from_numpy(np.stack(rows))

    def __call__(self, ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        """Scores for the next token: 0 for the drawn one, minus infinity for all others."""
        u_B = self.uniforms_BT[:, ids_BT.shape[1] - self.begin].to(logits_BV.device)
        below_BV = torch.softmax(logits_BV.float() / self.temperature, dim=-1).cumsum(-1, dtype=torch.float64)
        total_B = below_BV[:, -1]
        if not total_B.isfinite().all():
            raise NoNumbers("sampling: expected logits that are numbers, found NaN or infinity; try dtype float32")
        reached_B1 = torch.searchsorted(
            below_BV, (u_B * total_B)[:, None], right=True
        )  # u < 1: below the total in float64
        return torch.full_like(logits_BV, -math.inf).scatter_(1, reached_B1, 0.0)

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows alone."""
        self.uniforms_BT = self.uniforms_BT[rows.cpu()]


def uniforms(prompt: Sequence[int], before: int, reply: int, drawing: Drawing) -> NDArray[np.float64]:
    """The random numbers of one response, in [0, 1): shape (max_new_tokens,); `before`: how often the prompt came before."""
    raw = np.random.Philox(key=_key_of(prompt, before, reply, drawing)).random_raw(drawing.max_new_tokens)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _key_of(prompt: Sequence[int], before: int, reply: int, drawing: Drawing) -> int:
    """128 bits that decide the random numbers of one response."""
    named = json.dumps([drawing.seed, list(prompt), before, reply]).encode()
    return int.from_bytes(hashlib.sha256(named).digest()[:16])


def _drawn_by(
    engine: Engine,
    keys: Sequence[tuple[tuple[int, ...], int]],
    stops: Sequence[int],
    drawing: Drawing,
    progress: Progress | None,
) -> list[list[tuple[int, ...]]]:
    """`sample` by an engine, which has random numbers of its own: seeded by the keys, so that models share them."""
    n, of = drawing.n, [(*key, reply) for key in keys for reply in range(drawing.n)]
    seeds = [_key_of(*each, drawing) >> 65 for each in of]
    how = {"new": drawing.max_new_tokens, "temperature": drawing.temperature, "stops": stops}
    drawn = [_cut_after(tokens, stops) for tokens in engine.draw([prompt for prompt, *_ in of], seeds, **how)]  # type: ignore[arg-type]
    if progress is not None:
        progress(len(keys), len(keys))
    return [drawn[i * n : (i + 1) * n] for i in range(len(keys))]


def decode(tokenizer: Any, responses: Sequence[tuple[int, ...]]) -> list[str]:
    """Responses as text, special tokens dropped."""
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in responses]


def _cut_after(tokens: list[int], stops: Sequence[int]) -> tuple[int, ...]:
    return tuple(tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stops), None)])
