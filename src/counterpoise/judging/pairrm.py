"""PairRM, a pairwise preference model (Jiang et al. 2023, arXiv 2306.02561), without the code of its repository."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.checkpoints.checkpoint import unwrapped
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.judging.judges import Ranker
from counterpoise.language.scoring import by_length

MARKS = {"source_prefix_id": "<|source|>", "cand1_prefix_id": "<|candidate1|>", "cand2_prefix_id": "<|candidate2|>"}
"""Names in the checkpoint's config -> the tokens in front of prompt, first and second response."""
MARK = re.compile("|".join(map(re.escape, MARKS.values())))
LONGEST = {"prompt": 1224, "all": 1224 + 2 * 412}
"""Tokens that are read, as its authors use it; the responses share what the prompt leaves."""


class PairRM(nn.Module):
    """How much better the first of two responses is: score(prompt, first) - score(prompt, second).

    DeBERTa reads prompt and both responses together; a score is a two-layer head on the states at the tokens in front of
    the prompt and of that response. Attributes are named as the checkpoint names them.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import DebertaV2Model

        self.marks = [getattr(config, name) for name in MARKS]
        self.pretrained_model = DebertaV2Model(config)
        width = config.hidden_size
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * width, width),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(width, config.n_tasks),
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits that the first is better, (B,), from rows that hold each mark once, (B, T)."""
        states_BTH = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        prompt_BH, first_BH, second_BH = (states_BTH[input_ids == mark] for mark in self.marks)
        scores = [self.head_layer(torch.cat([prompt_BH, response_BH], -1)) for response_BH in (first_BH, second_BH)]
        better: Tensor = (scores[0] - scores[1]).mean(-1)
        return better


def read(prompt: int, first: int, second: int) -> int:
    """Tokens that are read of a prompt and two responses of so many.

    >>> read(10, 20, 30), read(2000, 20, 3000)
    (60, 1656)
    """
    seen = min(prompt, LONGEST["prompt"])
    return seen + sum(min(n, _room(seen)) for n in (first, second))


def _room(prompt: int) -> int:
    """Tokens that are left for each response."""
    return (LONGEST["all"] - prompt) // 2


def refuse_no_pairrm(source: str | Path, config: Mapping[str, Any]) -> None:
    """Raise for the config of anything but PairRM.

    Raises:
        ValueError: it lacks one of PairRM's settings.
    """
    if lost := [name for name in (*MARKS, "n_tasks", "drop_out") if name not in config]:
        raise ValueError(
            f"--preference {source}: expected PairRM (DebertaV2PairRM), found {config.get('architectures')} without "
            f"{lost[0]} in its config; give a classifier as --reward, anything else as module:function"
        )


def pairrm(source: str | Path, *, device: str = "cpu", batch_size: int = 16) -> Ranker:
    """A PairRM checkpoint: (instructions, firsts, seconds) -> P(first is better).

    Args:
        source: a folder or a hub id, such as llm-blender/PairRM-hf.

    Raises:
        ValueError: a checkpoint of another kind, or a tokenizer without its marks.
        CheckpointError: no such checkpoint.
    """
    from transformers import AutoTokenizer, DebertaV2Config

    checkpoint = open_checkpoint(source)
    refuse_no_pairrm(source, checkpoint.config)
    model = PairRM(DebertaV2Config(**checkpoint.config))
    names = unwrapped([*model.state_dict()])  # a checkpoint is read without what wraps a model: here `pretrained_model`
    if missing := sorted(own for own, plain in names.items() if plain not in checkpoint):
        raise ValueError(f"--preference {source}: expected a trained PairRM, found no {missing[0]} in it")
    model.load_state_dict({own: checkpoint[plain] for own, plain in names.items()})
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    for name, mark in MARKS.items():
        if tokenizer.convert_tokens_to_ids(mark) != checkpoint.config[name]:
            raise ValueError(f"--preference {source}: expected token {checkpoint.config[name]} to be {mark}, found "
                             f"{tokenizer.convert_ids_to_tokens(checkpoint.config[name])!r}")  # fmt: skip

    def encode(instruction: str, first: str, second: str) -> list[int]:
        # A mark inside a text would be taken for the text's beginning.
        texts = [m + MARK.sub("", t) for m, t in zip(MARKS.values(), (instruction, first, second), strict=True)]
        prompt: list[int] = tokenizer.encode(texts[0], max_length=LONGEST["prompt"], truncation=True)
        room = _room(len(prompt))
        return prompt + [i for t in texts[1:] for i in tokenizer.encode(t, max_length=room, truncation=True)]

    @torch.no_grad()
    def prefer(instructions: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> Sequence[float]:
        rows = [encode(*texts) for texts in zip(instructions, firsts, seconds, strict=True)]
        found = [0.0] * len(rows)
        for batch in by_length(rows, batch_size, key=len):
            filled = tokenizer.pad({"input_ids": [rows[i] for i in batch]}, return_tensors="pt").to(device)
            logits = model(filled["input_ids"], filled["attention_mask"])
            for i, p in zip(batch, logits.double().sigmoid().tolist(), strict=True):
                found[i] = p
        return found

    return prefer
