"""How fast a device is at a plan's own model: a few passes of it, timed, on random weights."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from counterpoise.averaging.mix import mix
from counterpoise.checkpoints.files import first_line
from counterpoise.language.costs import Lengths, Plan, forward, training
from counterpoise.language.memory import free_memory
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example, response_nll, score_responses
from counterpoise.language.shapes import shape_of
from counterpoise.language.ways import context_of
from counterpoise.language.work import Speed

DEPTHS = (1, 3)
"""Layers that a model too large for this is built with; each further layer is taken to cost what these two differ by."""
TOKENS, MIXED = 512, 1 << 22
"""Of the timed pass at most, and elements of the timed average."""
TRIES, ENOUGH = 5, 0.3
"""The median of so many tries counts, on a machine as busy as it is; after so many seconds there are no more."""
STEPS = 8
"""Tokens that are drawn to time one."""


class Times(NamedTuple):
    """Seconds of a pass over whole sequences, of one with its gradient, and of a step of drawing for one row and for all."""

    read: float
    trained: float
    one: float
    all: float


def speed_at(plan: Plan, device: str) -> tuple[Speed, str]:
    """The speed at a plan's model, and what was timed for it.

    What the plan has no work for is not timed. A model that does not fit into a quarter of the free memory with its
    gradients is timed at two depths. What is computed is of no interest: weights are random. Without a model, and where its
    passes fail, a matrix product is timed.
    """
    why = ""
    if plan.model is not None and plan.at is not None:
        try:
            return _at_model(plan.model, plan.at, plan, device)
        except Exception as error:  # the rest of the plan is told all the same
            why = f"; the model itself could not be timed: {type(error).__name__}: {first_line(error)}"
    square = torch.ones(TOKENS, TOKENS, device=device, dtype=getattr(torch, plan.dtype))
    rate = 2 * TOKENS**3 / _seconds(lambda: square @ square, device)
    return Speed(rate, float("inf")), f"a matrix product in {plan.dtype}, timed just now{why}"


def _at_model(model: nn.Module, at: Lengths, plan: Plan, device: str) -> tuple[Speed, str]:
    dtype, shape = getattr(torch, plan.dtype), shape_of(model)
    free = free_memory(device)
    fits = free is not None and 8 * shape.parameters * dtype.itemsize <= free
    depths = (shape.layers,) if fits or shape.layers <= DEPTHS[1] else DEPTHS
    trains, draws = (any(getattr(s.work, what) for s in plan.stages) for what in ("trained", "steps"))
    found = [_times(_built(model, shape.layers, d, dtype, device), at, device, trains, draws) for d in depths]
    if len(found) > 1:
        more = (shape.layers - DEPTHS[1]) / (DEPTHS[1] - DEPTHS[0])
        found.append(Times(*(b + max(0.0, b - a) * more for a, b in zip(*found, strict=True))))
    t, (rows, tokens, answer), drawn = found[-1], _sizes(model, at), 8 * at.batch
    each = max((t.all - t.one) / max(1, drawn - 1), 1e-12)  # seconds of one more row
    a, b = (torch.zeros(MIXED, dtype=dtype, device=device).add_(x) for x in (1.0, 1.01))
    speed = Speed(
        forward(shape, tokens, sequences=rows, logits=answer).flops / t.read,
        float("inf"),
        forward(shape, 1, logits=1, start=at.prompt).flops / each if draws else None,
        training(shape, tokens - answer, answer, sequences=rows).flops / t.trained if trains else None,
        max(0.0, t.one - each),
        _seconds(lambda: mix(a, b, 0.3), device) / MIXED,
    )
    return speed, f"{depths[-1]} of the model's {shape.layers} layers in {plan.dtype}, timed just now"


def _times(model: nn.Module, at: Lengths, device: str, trains: bool, draws: bool) -> Times:
    rows, tokens, answer = _sizes(model, at)
    texts = [Example(tuple(row[:-answer]), tuple(row[-answer:])) for row in _ids(model, rows, tokens).tolist()]

    def read() -> torch.Tensor:
        return score_responses(model, texts).logprobs()

    def train() -> None:
        response_nll(model, texts).backward()  # type: ignore[no-untyped-call]
        for p in model.parameters():
            p.grad = None

    trained = _seconds(train, device) if trains else 0.0
    with torch.no_grad():
        whole = _seconds(read, device)
        counts = (1, 8 * at.batch)
        try:
            steps = [_step(model, n, device) if draws else 0.0 for n in counts]
        except ValueError:  # not drawn from: a mask that is a buffer went with its values. A pass a token, then
            steps = [whole * n / rows for n in counts]
        return Times(whole, trained, *steps)


def _step(model: nn.Module, rows: int, device: str) -> float:
    """Seconds that one more token takes so many rows, drawn as responses are."""
    prompts = [tuple(row) for row in _ids(model, rows, 8).tolist()]

    def seconds(new: int) -> float:
        drawing = Drawing(max_new_tokens=new, batch_size=rows, chat=False)
        return _seconds(lambda: sample(model, Endless(), prompts, drawing), device)

    return max(1e-9, (seconds(1 + STEPS) - seconds(1)) / STEPS)


class Endless:
    """As much of a tokenizer as drawing asks for: no response ends."""

    eos_token_id = None
    chat_template = None


def _ids(model: nn.Module, rows: int, tokens: int) -> torch.Tensor:
    """Tokens spread over the vocabulary, so that a mixture's experts are all met."""
    words: int = model.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
    random = torch.Generator().manual_seed(0)
    return torch.randint(min(4, words - 1), words, (rows, tokens), generator=random)


def _sizes(model: nn.Module, at: Lengths) -> tuple[int, int, int]:
    """Rows, tokens and tokens of the response of the timed pass."""
    most = min(TOKENS, context_of(model.config) or TOKENS)  # texts of a file may be longer than the context
    tokens = max(2, min(most, round(at.prompt + at.response)))
    return max(1, min(at.batch, TOKENS // tokens)), tokens, max(1, min(tokens - 1, round(at.response)))


def _built(model: nn.Module, layers: int, depth: int, dtype: torch.dtype, device: str) -> nn.Module:
    """A model from the meta device with its first layers alone, in memory with random weights."""
    made = copy.deepcopy(model).to(dtype)
    stacks: list[str] = []
    for name, inside in list(made.named_modules()):
        within = any(name.startswith(f"{stack}.") for stack in stacks)  # such as as many experts as there are layers
        if isinstance(inside, nn.ModuleList) and len(inside) == layers > depth and not within:
            made.set_submodule(name, inside[:depth])
            stacks.append(name)
    made = made.to_empty(device=device).eval()
    made.generation_config.eos_token_id = None  # type: ignore[union-attr]
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(1.0) if tensor.dim() < 2 else tensor.normal_(0, 0.02)
            else:
                tensor.zero_()
    return made


def _seconds(work: Callable[[], object], device: str) -> float:
    """Seconds of the median try after one that prepares."""

    def one() -> float:
        begun = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    one()
    found: list[float] = []
    while len(found) < TRIES and sum(found) < ENOUGH:
        found.append(one())
    return statistics.median(found)
