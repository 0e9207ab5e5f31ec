"""Drawing responses from a causal language model."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoise.language.engine import Engine, LanguageModel
from counterpoise.language.memory import as_fits
from counterpoise.language.scoring import (
    Example,
    by_length,
    device_of,
    left_pad,
    position_ids_of,
    refuse_too_long,
    scored_plainly,
)
from counterpoise.language.templates import has_template, render
from counterpoise.language.ways import NoNumbers, asking, probes, remembered, succeeds, warn_of
from counterpoise.ranks import gathered, turn
from counterpoise.records import Progress


@dataclass(frozen=True)
class Drawing:
    """How responses are drawn.

    Attributes:
        n: responses a prompt.
        max_new_tokens: of the longest response.
        temperature: 0 is greedy.
        chat: whether a prompt goes through the tokenizer's chat template, where it has one.
        batch_size: responses drawn at once, or n where that is more.
        seed: of the random numbers, one for each (prompt, reply, token): two models that are asked the same see the same
            ones, so that their rewards can be compared in pairs.
    """

    n: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    chat: bool = True
    batch_size: int = 64
    seed: int = 0

    @property
    def decides(self) -> dict[str, Any]:
        """All but the batch, as plain json: for keys of stored work."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}

    def check(self) -> None:
        """Raise for what cannot be drawn.

        Raises:
            ValueError: a number out of range.
        """
        for name in ("n", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
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
    device, n, way = device_of(model), drawing.n, way_of(model)

    def answered(some: Sequence[int]) -> list[list[tuple[int, ...]]]:
        ids_BT, mask_BT = left_pad([prompts[i] for i in some], pad, device)
        begun = _begun(model, ids_BT, mask_BT, n, way)
        draw = InverseCdf([keys[i] for i in some], drawing, ids_BT.shape[1]) if drawing.temperature > 0 else None
        drawn = [_cut_after(row, stops) for row in _to_the_end(model, begun, way, stops, drawing.max_new_tokens, draw)]
        return [drawn[place * n : (place + 1) * n] for place in range(len(some))]

    done = 0
    was_training = model.training
    model.eval()
    with _blank_generation_config(model):
        for number, rows in enumerate(_batches(prompts, max(1, drawing.batch_size // n), way)):
            if number % turn[1] == turn[0]:
                for i, texts in zip(rows, as_fits(model, f"drawing {n} a prompt", rows, answered), strict=True):
                    responses[i] = texts
            done += len(rows)
            if progress is not None:
                progress(done, len(prompts))
    model.train(was_training)
    return responses


def sample_together(
    model: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    drawing: Drawing,
    *,
    progress: Progress | None = None,
) -> list[list[tuple[int, ...]]]:
    """`sample` with the batches shared among processes that have met; all know all responses."""
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


@contextmanager
def _blank_generation_config(model: nn.Module) -> Iterator[None]:
    """Inside, the model's generation config is blank: `generate` fills from it whatever it was not told.

    The object is emptied, not replaced, so that it works through whatever wraps the model.
    """
    from transformers import GenerationConfig

    config = vars(model.generation_config)
    own = dict(config)
    config.clear()
    config.update(vars(GenerationConfig()))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        config.clear()
        config.update(own)


class Way(NamedTuple):
    """How responses may be drawn without changing a model's numbers.

    Attributes:
        pads_in_front: prompts of different length may be answered together.
        shares: the cache of a prompt may be repeated for its responses.
        caches: a cache may be kept from token to token; else all is computed again for each.
        leaves: rows may leave the cache, so that a response that has ended costs nothing more.
    """

    pads_in_front: bool
    shares: bool
    caches: bool
    leaves: bool


WAYS = (
    Way(True, True, True, True), Way(True, False, True, True), Way(True, False, True, False),
    Way(False, False, True, True), Way(False, False, True, False), Way(False, False, False, True),
)  # fmt: skip
"""From the quickest to the one that is left: prompts of one length together, without a cache."""
ENDED = 0.5
"""The share of the rows that have ended at which these leave; see benchmarks/drawing.py."""


def way_of(model: nn.Module) -> Way:
    """Measured once a model: the first of WAYS whose log-probabilities, token by token, are those of a plain forward.

    A warning names what cannot be done.

    Raises:
        ValueError: see `scoring.way_of`.
    """
    return remembered(model, "drawing", _measured)


def _measured(model: nn.Module) -> Way:
    prompts, _ = probes(model)

    def agrees(way: Way) -> bool:
        examples, sums = [], []
        for rows in _batches(prompts, len(prompts), way):
            begun = _begun(model, *left_pad([prompts[i] for i in rows], 0, device_of(model)), 2, way)
            stay, logits = list(range(2 * len(rows))), list[Tensor]()
            if way.leaves:  # the first row, after one token
                out = _drawn(model, begun, way, 1, output_logits=True)
                begun = _left(out, begun, torch.tensor(stay[1:], device=begun.ids_BT.device), way)
                stay, logits = stay[1:], [out.logits[0][1:]]
            out = _drawn(model, begun, way, 3 - len(logits), output_logits=True)
            logp_BCV = torch.stack([*logits, *out.logits], 1).log_softmax(-1, dtype=torch.float32)
            new_BC = out.sequences[:, -3:]
            sums.append(logp_BCV.gather(2, new_BC[..., None]).double().sum((1, 2)))
            asked = [prompts[rows[k // 2]] for k in stay]
            examples += [Example(p, tuple(r)) for p, r in zip(asked, new_BC.tolist(), strict=True)]
        return scored_plainly(model, examples).agrees(lambda: torch.cat(sums))

    with asking(model), _blank_generation_config(model):
        way = next((w for w in WAYS if succeeds(partial(agrees, w))), None)
    if way is None:
        raise ValueError(
            f"{type(model).__name__}: expected a model whose `generate` gives what a plain forward gives, found that it does "
            "not, with a cache or without; it can be averaged, but not drawn from"
        )
    if way[:3] != WAYS[0][:3]:
        caches = (
            "keeps a cache of its own"
            if way.caches
            else "is computed anew for each token, as its cache changes its numbers"
        )
        together = "" if way.pads_in_front else "; only prompts of one length are answered together"
        warn_of(model, f"each response {caches}{together}")
    return way


def _batches(prompts: Sequence[tuple[int, ...]], size: int, way: Way) -> Iterator[list[int]]:
    """Prompts answered together, longest first; of one length where padding would change the numbers."""
    for rows in by_length(prompts, size, key=len):
        if way.pads_in_front:
            yield rows
        else:
            yield from (list(same) for _, same in groupby(rows, key=lambda i: len(prompts[i])))


class _Rows(NamedTuple):
    """Responses that are being drawn: all tokens so far, where they stand, and what is kept of them; None at first."""

    ids_BT: Tensor
    mask_BT: Tensor
    cache: Any


def _begun(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, n: int, way: Way) -> _Rows:
    """n rows of each prompt."""
    cache = _prefilled(model, ids_BT, mask_BT, n) if way.shares else None
    return _Rows(ids_BT.repeat_interleave(n, dim=0), mask_BT.repeat_interleave(n, dim=0), cache)


def _to_the_end(
    model: nn.Module, rows: _Rows, way: Way, stops: Sequence[int], most: int, draw: InverseCdf | None
) -> list[list[int]]:
    """At most so many tokens for each row; what follows the first of `stops` counts nothing."""
    found: list[list[int]] = [[] for _ in rows.ids_BT]
    here, begin, ends = list(range(len(found))), rows.ids_BT.shape[1], torch.tensor(stops, device=rows.ids_BT.device)

    def many_ended(ids_BT: Tensor, scores: Any) -> Tensor:
        return (torch.isin(ids_BT[:, -1], ends).float().mean() >= ENDED).expand(len(ids_BT))

    while True:
        left = begin + most - rows.ids_BT.shape[1]
        out = _drawn(model, rows, way, left, draw, stops, [many_ended] if stops and way.leaves else [])
        for row, tokens in zip(here, out.sequences[:, begin:].tolist(), strict=True):
            found[row] = tokens
        on = [k for k, row in enumerate(here) if len(found[row]) < most and found[row][-1] not in stops]
        if not on:
            return found
        here, stay = [here[k] for k in on], torch.tensor(on, device=rows.ids_BT.device)
        rows = _left(out, rows, stay, way)
        if draw is not None:
            draw.keep(stay)


def _left(out: Any, rows: _Rows, stay: Tensor, way: Way) -> _Rows:
    """The rows that stay, after what `generate` gave for all."""
    new = out.sequences.shape[1] - rows.mask_BT.shape[1]
    if way.caches:  # one that is not given back would have to be computed again: such a way fails when it is measured
        out.past_key_values.batch_select_indices(stay)
    return _Rows(out.sequences[stay], F.pad(rows.mask_BT[stay], (0, new), value=1), out.past_key_values)


def _drawn(
    model: nn.Module, rows: _Rows, way: Way, most: int, draw: InverseCdf | None = None, stops: Sequence[int] = (),
    until: Sequence[Any] = (), **more: Any,
) -> Any:  # fmt: skip
    """What `generate` gives: at most so many tokens more, until all rows have ended or `until` says so."""
    from transformers import GenerationConfig

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=most, eos_token_id=list(stops) or None, pad_token_id=stops[0] if stops else 0, do_sample=False,
        use_cache=way.caches, return_dict_in_generate=True, **more,
    )  # fmt: skip
    return model.generate(  # type: ignore[operator]
        input_ids=rows.ids_BT,
        attention_mask=rows.mask_BT,
        past_key_values=rows.cache,
        generation_config=config,
        logits_processor=[] if draw is None else [draw],
        stopping_criteria=list(until),
        synced_gpus=False,  # each process draws on its own, where weights are cut up among several
    )


def _prefilled(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, n: int) -> Any:
    """The cache of all prompt tokens but the last, run once per prompt and repeated for its n responses."""
    if n == 1 or ids_BT.shape[1] == 1:
        return None
    mask = mask_BT[:, :-1]
    seen = {"input_ids": ids_BT[:, :-1], "attention_mask": mask, "position_ids": position_ids_of(mask)}
    cache = model(**seen, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(n)
    return cache


def decode(tokenizer: Any, responses: Sequence[tuple[int, ...]]) -> list[str]:
    """Responses as text, special tokens dropped."""
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in responses]


def _cut_after(tokens: list[int], stops: Sequence[int]) -> tuple[int, ...]:
    return tuple(tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stops), None)])
