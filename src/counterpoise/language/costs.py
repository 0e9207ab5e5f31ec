"""What a run would take: operations, memory and time, computed from shapes before anything is drawn or trained.

Pure functions: shapes and counts in, numbers out. `counterpoise.planning` reads the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from counterpoise.language.chunks import CHUNK
from counterpoise.language.memory import Rows, rows_that_fit
from counterpoise.language.work import Speed, Work

EXPERTS = (
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
    ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
)
"""Names in configs of how many experts a token is sent to, and of how many there are."""


AGAIN = 4 / 3
"""The operations of a gradient whose forward pass is done again, in those of one that is not."""
FIXED = 128
"""A cache of fixed length has a multiple of so many tokens: a step is compiled anew for each length."""


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a decoder.

    Attributes:
        queries, keys: width of all query heads together, and of all key heads.
        parameters: elements in all; tied tensors count once.
        body: elements of the matrices that tokens are multiplied with: neither embeddings nor the head.
        active: of the body what one token is multiplied with: of a mixture's experts those that it is sent to.
        head: elements of the matrix that gives the vocabulary's logits; 0 without one.
        largest: elements of the largest parameter.
        edges: inputs plus outputs of the body's matrices together, of each expert's; LoRA of rank r trains r times as many.
    """

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    parameters: int
    body: int
    active: int
    head: int
    largest: int
    edges: int

    @property
    def block(self) -> int:
        """Elements of a layer's matrices."""
        return self.body // self.layers

    @property
    def outside(self) -> int:
        """Elements that are in no layer's matrix."""
        return self.parameters - self.body


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        what: counts in words: passes, responses, items.
        memory: bytes at its peak beside what is resident all the time.
    """

    name: str
    what: str
    work: Work = Work()
    memory: int = 0


@dataclass(frozen=True)
class Plan:
    """A run, stage by stage.

    Attributes:
        resident: what lies in the device's memory all the time -> bytes.
        dtype: of the computation.
        mapped: bytes of files that are read through the page cache of the host; the system can drop them.
        disk: bytes that will be written.
        told: what was resolved, in sentences.
        assumed: what the numbers take for granted, in sentences.
        model, at: what a device's speed is measured with: the architecture on the meta device, and how long its sequences are.
    """

    stages: tuple[Stage, ...]
    resident: Mapping[str, int]
    dtype: str
    mapped: int = 0
    disk: int = 0
    told: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    model: nn.Module | None = None
    at: Lengths | None = None

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: all that is resident, and the largest need of a stage."""
        return sum(self.resident.values()) + max((s.memory for s in self.stages), default=0)

    def seconds(self, speed: Speed) -> float:
        """All stages, one after the other."""
        return sum(s.work.seconds(speed) for s in self.stages)


@dataclass(frozen=True)
class Lengths:
    """How long sequences are and how many run at once.

    Attributes:
        prompt, longest: mean and longest prompt, tokens.
        response: taken for every response: the longest that is allowed.
        batch: sequences at once in training; `restore` draws 8 times as many and scores twice as many.
        itemsize: bytes of a weight.
        shares: processes that share the sequences of a gradient, among which a model is cut up.
        auto: as many are drawn and scored as fit, whatever `batch` says.
        fixed: caches are of fixed length while responses are drawn.
        recompute: a training step computes layers again.
        room: bytes for a stage beside what is resident, so that a run would halve what takes more; None: nobody knows.
    """

    prompt: float
    longest: int
    response: float
    batch: int
    itemsize: int
    shares: int = 1
    auto: bool = False
    fixed: bool = False
    recompute: bool = False
    room: float | None = None

    @property
    def draws(self) -> Rows:
        """The responses that are asked for at once."""
        return "auto" if self.auto else 8 * self.batch

    @property
    def scores(self) -> Rows:
        """The items that are asked for at once."""
        return "auto" if self.auto else 2 * self.batch

    def drawn_at_once(self, shape: Shape, n: int = 1, asked: Rows | None = None) -> int:
        """Responses that a run draws at once, n or more; `asked` where it is for others than `draws`."""
        return rows_that_fit(asked or self.draws, partial(self._drawing, shape), self.room, n)

    def scored_at_once(self, shape: Shape, items: Items) -> int:
        """Items that a run scores at once."""
        need = partial(scoring_bytes, shape, items, itemsize=self.itemsize)
        return rows_that_fit(self.scores, lambda rows: need(batch=rows), self.room)

    def said(self, shape: Shape, n: int = 1) -> str:
        """How many responses a run draws at once; see `at_once`."""
        return at_once(self.draws, self.drawn_at_once(shape, n))

    def drawing_memory(self, shape: Shape, reward: Shape | None = None, n: int = 1) -> int:
        """Bytes while a search draws, and while a reward that is a model rates what was drawn."""
        drawing = self._drawing(shape, self.drawn_at_once(shape, n))
        return drawing + (0 if reward is None else drawing_bytes(reward, 2 * self.batch, 0, 0, self.itemsize))

    def _drawing(self, shape: Shape, rows: int) -> int:
        return drawing_bytes(shape, rows, self.longest, self.response, self.itemsize, fixed=self.fixed)

    def training_memory(self, shape: Shape) -> int:
        """Bytes while the gradient of a search is computed."""
        return self._training(shape, recompute=self.is_scarce(shape))

    def is_scarce(self, shape: Shape) -> bool:
        """Whether there is no room for all that a search's gradient keeps, so that a run computes layers again."""
        return self.room is not None and self._training(shape) > self.room

    def _training(self, shape: Shape, *, recompute: bool = False) -> int:
        how = math.ceil(self.batch / self.shares), self.longest, self.response, self.itemsize
        if self.shares == 1:
            return training_bytes(shape, *how, recompute=recompute) + shape.largest * self.itemsize
        kept = training_bytes(shape, *how, recompute=True)
        gradients = gathered_bytes(shape, self.itemsize, gradients=True) - gathered_bytes(shape, self.itemsize)
        return kept + gradients + 4 * max(shape.outside, shape.block)  # added up in float32


def at_once(asked: Rows, taken: int) -> str:
    """What a stage says of its batch: nothing where it is as it was asked for.

    >>> at_once("auto", 32), at_once(64, 16), at_once(64, 64)
    (', 32 at once', ', 64 at once would be halved to 16', '')
    """
    if asked == "auto":
        return f", {taken} at once"
    return f", {asked} at once would be halved to {taken}" if taken < asked else ""


@dataclass(frozen=True)
class Items:
    """The items of an ability on one part.

    Attributes:
        prompt, choices, continuation: tokens of a context, continuations a context, tokens of each.
        generated: tokens drawn for an item; 0 for one that is only scored.
        shared: whether an item's context is run once for all its continuations (lm-eval runs it for each).
    """

    name: str
    count: int
    prompt: float
    choices: float = 1.0
    continuation: float = 0.0
    generated: int = 0
    shared: bool = True


def shape_of(model: nn.Module) -> Shape:
    """The shape of a transformers model, which may lie on the meta device."""
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    width, heads = config.hidden_size, getattr(config, "num_attention_heads", None) or 0  # none where states recur
    head_width = getattr(config, "head_dim", None) or width // max(1, heads)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    out = model.get_output_embeddings()  # type: ignore[operator]
    head = None if out is None else out.weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head)}
    parameters = list(model.parameters())
    matrices = {n: p for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in tables}
    body = sum(p.numel() for p in matrices.values())
    experts = sum(p.numel() for n, p in matrices.items() if "experts" in n.split("."))
    asked, held = (next((getattr(config, n) for n in names if getattr(config, n, None)), 1) for names in EXPERTS)
    return Shape(
        layers=config.num_hidden_layers,
        hidden=width,
        intermediate=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width,
        queries=heads * head_width,
        keys=key_heads * head_width,
        vocabulary=config.vocab_size,
        parameters=sum(p.numel() for p in parameters),
        body=body,
        active=body - experts + experts * asked // held,
        head=0 if head is None else head.numel(),
        largest=max(p.numel() for p in parameters),
        edges=sum(math.prod(p.shape[:-2]) * sum(p.shape[-2:]) for p in matrices.values()),
    )


def forward(shape: Shape, tokens: float, *, sequences: float = 1, logits: float = 0, start: float = 0) -> Work:
    """A pass over sequences of `tokens` tokens: 2 operations per weight and token, and the attention.

    flops = sequences * (2 active tokens + 2 head logits + 4 layers queries (tokens start + tokens (tokens + 1) / 2))

    Kaplan et al. 2020 (arXiv 2001.08361), table 1, with the sum over the positions that causal attention sees in the place
    of the whole square. Norms, activations and the softmax are left out: some per cent.

    Args:
        logits: positions of a sequence whose logits are computed.
        start: tokens before these, already in the cache.
    """
    seen = tokens * start + tokens * (tokens + 1) / 2
    one = 2 * shape.active * tokens + 2 * shape.head * logits + 4 * shape.layers * shape.queries * seen
    return Work(one * sequences)


def training(shape: Shape, prompt: float, response: float, *, sequences: float) -> Work:
    """Forward and backward over prompt and response: three times the forward pass, logits of the response alone."""
    work = forward(shape, prompt + response, sequences=sequences, logits=response) * 3
    return replace(work, trained=work.flops)


def drawing(
    shape: Shape, prompt: float, response: float, *, prompts: float, n: int = 1, batch: int, itemsize: int
) -> Work:
    """n responses to each prompt, `batch` at once, every one as long as `response`: an upper bound.

    Each step reads all weights once, of a mixture all experts, and the cache of every response; the prompt is run once
    for its n responses.
    """
    first = forward(shape, prompt, sequences=prompts, logits=1)
    rest = forward(shape, response, sequences=prompts * n, logits=response, start=prompt)
    steps = math.ceil(prompts / max(1, batch // n)) * response
    read = 2 * shape.layers * shape.keys * (response * prompt + response * (response + 1) / 2) * prompts * n
    traffic = itemsize * (steps * (shape.body + shape.head) + read)
    return first + replace(rest, drawn=rest.flops) + Work(traffic=traffic, steps=steps)


def measuring(shape: Shape, items: Items, *, batch: int, itemsize: int) -> Work:
    """Scoring, and drawing where there is something to draw, of an ability's items on one part."""
    found, each = Work(), items.count * items.choices
    if items.continuation and items.shared:
        found += forward(shape, items.prompt, sequences=items.count, logits=1)
        found += forward(shape, items.continuation, sequences=each, logits=items.continuation, start=items.prompt)
    elif items.continuation:
        whole = items.prompt + items.continuation
        found += forward(shape, whole, sequences=each, logits=whole)
    if items.generated:
        found += drawing(shape, items.prompt, items.generated, prompts=items.count, batch=batch, itemsize=itemsize)
    return found


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


def drawn(
    shape: Shape, reward: Shape | None, at: Lengths, *, prompts: int, n: int = 1, batch: int | None = None
) -> Work:
    """Drawing n responses to each of some prompts, `batch` at once, and asking the reward for them."""
    batch = batch or at.drawn_at_once(shape, n)
    work = drawing(shape, at.prompt, at.response, prompts=prompts, n=n, batch=batch, itemsize=at.itemsize)
    if reward is not None:
        work += forward(reward, at.prompt + at.response, sequences=prompts * n)
    return work
