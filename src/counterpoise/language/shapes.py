"""What decides the cost of a model and of the items that it is measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

EXPERTS = (
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
    ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
)
"""Names in configs of how many experts a token is sent to, and of how many there are."""


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
