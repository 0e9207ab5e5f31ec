"""Texts as token ids: what the encoders read, from a vocabulary or a Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoise.language.dtypes import why_unusable


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Torch's generators start from `seed` inside the block and go on as they were after it."""
    forked = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        torch.manual_seed(seed)
        yield


def check_device(name: str) -> None:
    """Raise a ValueError where there is no device of that name."""
    if why := why_unusable(name):
        raise ValueError(f"device: expected cpu or a device that torch finds here, found {name!r} ({why})")


class SubwordTokens:
    """A Hugging Face tokenizer with the calls of a `Vocabulary`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.padding = 0 if filler is None else int(filler)

    def encode(self, text: str, *, max_tokens: int) -> list[int]:
        """The ids of the first `max_tokens` tokens, with the tokenizer's own first and last ones; at least one."""
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
        return ids or [self.padding]


class TokenIds(NamedTuple):
    """N texts as ids padded on the right, (N, T) int32, and their lengths, (N,) on the CPU.

    Example:
        >>> ids_BT, mask_BT = token_ids([[5, 6], [7], [8, 9, 4]], 0).batch(torch.tensor([1, 0]))
        >>> ids_BT.tolist(), mask_BT.tolist()
        ([[7, 0], [5, 6]], [[True, False], [True, True]])
    """

    ids_NT: Tensor
    lengths_N: Tensor

    def batch(self, chosen_B: Tensor) -> tuple[Tensor, Tensor]:
        """The ids of the chosen texts, cut to the longest of them, (B, T) int64, and which are tokens, (B, T) bool."""
        lengths_B = self.lengths_N[chosen_B]
        longest = int(lengths_B.max())
        device = self.ids_NT.device
        ids_BT = self.ids_NT[chosen_B.to(device), :longest].long()
        return ids_BT, torch.arange(longest, device=device)[None, :] < lengths_B.to(device)[:, None]


def token_ids(rows: Sequence[Sequence[int]], padding: int, device: torch.device | str = "cpu") -> TokenIds:
    """Rows of token ids, none of them empty, as one padded tensor."""
    lengths_N = torch.tensor([len(row) for row in rows], dtype=torch.long)
    ids_NT = torch.full((len(rows), max(map(len, rows), default=0)), padding, dtype=torch.int32)
    for i, row in enumerate(rows):
        ids_NT[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return TokenIds(ids_NT.to(device), lengths_N)
