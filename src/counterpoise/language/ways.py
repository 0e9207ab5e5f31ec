"""What may be done to a model without changing its numbers, found by measuring: once a model, in milliseconds.

Attention does not care how a batch is padded or whether a cache is shared; recurrent states, convolutions and learned
positions often do, and what a family does changes between versions of transformers. So a few tokens are scored plainly,
one row at a time without padding or cache, and in the quick way; the quick way is taken where the two agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from counterpoise.ranks import NoNumbers

W = TypeVar("W")
CLOSE = 1e-3
"""Nats that two ways of computing the same log-probabilities, summed over a few tokens, may differ by."""
NOISE, NARROW = 4.0, 64.0
"""In bfloat16 they differ by more: so many times what two plain forwards differ by, or so many times its resolution, which
is half a nat. (SmolLM2 of 135M in bfloat16: 0.3 nats between cache and plain forward, 2e-5 in float32.)"""
SAME = 2.0
"""What stands in padding changes nothing in any dtype, but for the rounding of experts that see other rows."""
LENGTHS = ((11, (3, 2)), (4, (2, 3)))
"""Tokens of the contexts, and of their continuations, that are tried."""

FULL = (
    "can't allocate memory", "not enough memory: you tried to allocate", "MPS backend out of memory", "_STATUS_ALLOC_FAILED"
)  # fmt: skip
"""What torch says of a lack of memory without a class for it: on Linux, on Windows, on a Mac's GPU, and of cuBLAS."""
FOUND = "_counterpoise_ways"
"""The attribute of a model that keeps what was found."""


def remembered(model: nn.Module, what: str, measure: Callable[[nn.Module], W]) -> W:
    """What `measure` found of this model, measured when it is first asked for, and kept with the model itself."""
    kept: dict[str, W] | None = getattr(model, FOUND, None)  # also through what wraps the model
    if kept is None:
        kept = vars(model)[FOUND] = {}
    if what not in kept:
        kept[what] = measure(model)
    return kept[what]


def context_of(config: Any) -> int | None:
    """Tokens that a model of this config has positions for; None where it sets no bound."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: int | None = getattr(text, "max_position_embeddings", None)
    return found if found and found > 0 else None  # XLNet's -1


@contextmanager
def asking(model: nn.Module) -> Iterator[None]:
    """Inside, the model is asked, not trained: no dropout, no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def probes(model: nn.Module) -> tuple[list[tuple[int, ...]], list[list[tuple[int, ...]]]]:
    """Contexts of two lengths with two continuations each, of tokens spread over the vocabulary, the same every time."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    random = torch.Generator().manual_seed(0)

    def text(length: int) -> tuple[int, ...]:
        return tuple(
            torch.randint(min(4, config.vocab_size - 1), config.vocab_size, (length,), generator=random).tolist()
        )

    fits = (context_of(config) or 64) - 4  # room for the continuations
    contexts = [text(max(1, min(length, fits))) for length, _ in LENGTHS]
    return contexts, [[text(length) for length in following] for _, following in LENGTHS]


class Plain:
    """Log-probabilities as a plain forward gives them, and how far from them another way of computing them may be.

    Args:
        alone: sums in nats, one row at a time.
        together: the same rows in one batch, without padding that a causal model could see.

    Raises:
        ValueError: the two differ although the arithmetic is fine: the model sees what follows.
    """

    def __init__(self, model: nn.Module, alone: Tensor, together: Tensor) -> None:
        self.alone = alone
        if not alone.isfinite().all():
            raise NoNumbers(
                f"{type(model).__name__}: expected finite log-probabilities, found NaN or Inf; the weights are damaged (diff "
                "names the tensor), or --dtype is too narrow for them"
            )
        noise, eps = float((alone - together).abs().max()), torch.finfo(computing_dtype(model)).eps
        rounded = 20 if alone.is_cuda else 2  # there convolutions round float32 (TF32)
        if not noise <= max(rounded * CLOSE, 2 * NARROW * eps):
            raise ValueError(
                f"{type(model).__name__}: expected a causal language model, found one in which the tokens that follow change "
                f"a token's probability, by {noise:.2g} nats; choose a model that reads from left to right"
            )
        self.close, self.same = (max(CLOSE, NOISE * noise, times * eps) for times in (NARROW, SAME))

    def agrees(self, way: Callable[[], Tensor], *, unseen: Callable[[], Tensor] | None = None) -> bool:
        """Whether the sums of another way are these, and not changed by what must be `unseen`; one that fails is not."""

        def same() -> bool:
            found = way()
            changed = 0.0 if unseen is None else float((unseen() - found).abs().max())
            return float((found - self.alone).abs().max()) <= self.close and changed <= self.same

        return succeeds(same)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(said in str(error) for said in FULL)


def succeeds(check: Callable[[], bool]) -> bool:
    """Whether a check passes; one that fails on the way does not; a want of numbers or of memory is raised."""
    try:
        return check()
    except NoNumbers:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        # a cache without the method, of another shape, where there is none: whatever can go wrong
        return False


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's matrix products, also where mixed precision makes it another than that of its weights."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    dtype: torch.dtype = model(input_ids=token).logits.dtype
    if torch.get_float32_matmul_precision() != "highest":
        return torch.bfloat16
    return min(dtype, next(model.parameters()).dtype, key=lambda d: -torch.finfo(d).eps)


def warn_of(model: nn.Module, what: str) -> None:
    """Say once a model what its kind makes necessary."""
    warnings.warn(f"{getattr(model.config, 'model_type', type(model).__name__)}: {what}", stacklevel=2)
