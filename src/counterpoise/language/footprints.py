"""Bytes that drawing, scoring and training need beside the weights: shapes and counts in, numbers out."""

from __future__ import annotations

import math

from counterpoise.language.chunks import CHUNK
from counterpoise.language.shapes import Items, Shape

FIXED = 128
"""A cache of fixed length has a multiple of so many tokens: a step is compiled anew for each length."""


def trained(shape: Shape, lora: int | None = None) -> int:
    """Parameters that the optimiser moves: all, or rank * (inputs + outputs) of every matrix of the body."""
    return shape.parameters if lora is None else lora * shape.edges


def optimiser_bytes(count: int, itemsize: int) -> dict[str, int]:
    """Gradients (one number a trained parameter) and Adam's two moments (two), in the dtype of the weights."""
    return {"gradients": count * itemsize, "Adam's moments": 2 * count * itemsize}


def step_bytes(shape: Shape, count: int, itemsize: int, *, fused: bool, cuda: bool) -> int:
    """What Adam needs for a moment: on a GPU torch works on all parameters at once unless it is fused, else on one."""
    return 0 if fused else count * itemsize if cuda else 2 * shape.largest * itemsize


def cache_bytes(shape: Shape, sequences: float, tokens: float, itemsize: int) -> int:
    """Keys and values: 2 * layers * keys * sequences * tokens * itemsize."""
    return math.ceil(2 * shape.layers * shape.keys * sequences * tokens * itemsize)


def passing_bytes(shape: Shape, tokens: float, itemsize: int) -> int:
    """While so many tokens pass through a layer and nothing is kept for a gradient (counted on Llama with sdpa attention)."""
    return math.ceil(tokens * (4 * shape.hidden + 3 * shape.intermediate + 2 * shape.queries) * itemsize)


def held_tokens(tokens: float, *, fixed: bool) -> float:
    """Tokens that a cache has room for: so many, or of one of a few lengths that do not change while responses grow."""
    return math.ceil(tokens / FIXED) * FIXED if fixed else tokens


def drawing_bytes(
    shape: Shape, sequences: float, prompt: float, response: float, itemsize: int, *, fixed: bool = False
) -> int:
    """While responses are drawn: the cache, and what the prompts need while they are read or a step then needs.

    Prompts count for each sequence: those that share one take less. In a step the cache of one layer is there twice, and
    of the logits six copies in float32 (a sum in float64 among them).
    """
    cache = cache_bytes(shape, sequences, held_tokens(prompt + response, fixed=fixed), itemsize)
    step = cache / max(1, shape.layers) + 6 * 4 * sequences * shape.vocabulary
    return math.ceil(cache + max(step, passing_bytes(shape, sequences * prompt, itemsize)))


def gathered_bytes(shape: Shape, itemsize: int, *, gradients: bool = False) -> int:
    """Whole weights beside those that a process holds of a model that is cut up: a block, the next, and what is in no block.

    Gradients of a block and of what is in none are whole as well until they are shared out.
    """
    return (shape.outside + 2 * shape.block + (shape.outside + shape.block if gradients else 0)) * itemsize


def scoring_bytes(shape: Shape, items: Items, *, batch: int, itemsize: int) -> int:
    """While items are scored: logits of a batch in the model's dtype, a chunk of them in float32; its cache, a layer."""
    whole = items.prompt + items.continuation
    rows = batch * (items.choices if items.shared else 1)
    positions = rows * (items.continuation if items.shared else whole)
    logits = positions * shape.vocabulary
    passing = passing_bytes(shape, max(positions, batch * items.prompt), itemsize)
    return (
        math.ceil(logits * itemsize + _in_chunks(logits / rows)) + cache_bytes(shape, rows, whole, itemsize) + passing
    )


def _in_chunks(logits: float) -> float:
    """Of a row of so many logits what is in float32 at once: five copies of a chunk (`chunks.token_logprobs`)."""
    return 5 * 4 * min(logits, CHUNK)


def training_bytes(
    shape: Shape, sequences: float, prompt: float, response: float, itemsize: int, *, recompute: bool = False
) -> int:
    """While a gradient is computed: what the backward pass needs again, and the logits of the responses.

    layers * tokens * (8 hidden + 2 queries + 2 keys + 4 intermediate) * itemsize + logits * 3 * itemsize + a chunk's

    Per layer the inputs of both norms, of the projections and of the gated activation, their float32 copies counted in
    (counted on Llama with sdpa attention); of the logits the model's own, their gradient and that of the rows before
    padding was left out. With gradient checkpointing one layer's are kept at a time, and the input of every layer.
    """
    kept = 8 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 4 * shape.intermediate
    tokens = sequences * (prompt + response)
    logits = sequences * (response + 1) * shape.vocabulary if shape.head else 0
    layers = shape.layers * kept if not recompute else kept + shape.layers * shape.hidden
    return math.ceil(layers * tokens * itemsize + logits * 3 * itemsize + _in_chunks(logits / max(1, sequences)))
