"""Drawing responses from a causal language model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.language.scoring import by_length, device_of, left_pad, position_ids_of, refuse_too_long
from counterpoise.language.templates import has_template, render
from counterpoise.records import Progress


@dataclass(frozen=True)
class Drawing:
    """How responses are drawn.

    Attributes:
        n: responses a prompt.
        max_new_tokens: of the longest response.
        temperature: 0 is greedy.
        chat: whether a prompt goes through the tokenizer's chat template, where it has one.
        batch_size: responses drawn at once, or n where that is more; it decides the random draws.
        seed: two models asked with the same seed and prompts see the same random numbers, so that their rewards can be
            compared in pairs.
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


def stop_tokens(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
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
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    drawing: Drawing,
    *,
    progress: Progress | None = None,
) -> list[list[tuple[int, ...]]]:
    """Draw `drawing.n` responses for each prompt, by ancestral sampling (greedy when the temperature is 0).

    Nothing else shapes the draws: of the model's own generation config only the ids that end a response count.

    Args:
        prompts: token ids, one tuple a prompt.

    Returns:
        For each prompt its n responses as token ids; a finished response ends with the first of `stop_tokens`, a
        response cut at `max_new_tokens` does not.
    """
    from transformers import GenerationConfig

    drawing.check()
    stops = stop_tokens(model, tokenizer)
    pad = stops[0] if stops else 0
    # Said outright: transformers has defaults of its own (top_k 50, for instance).
    how: dict[str, Any] = {"do_sample": drawing.temperature > 0}
    how |= {"temperature": drawing.temperature, "top_k": 0, "top_p": 1.0} if how["do_sample"] else {}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=drawing.max_new_tokens, eos_token_id=list(stops) or None, pad_token_id=pad, **how
    )
    refuse_too_long(model, prompts, drawing.max_new_tokens)
    device, n = device_of(model), drawing.n
    responses: list[list[tuple[int, ...]]] = [[] for _ in prompts]
    done = 0
    was_training = model.training
    model.eval()
    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with fork, _blank_generation_config(model):
        for number, rows in enumerate(by_length(prompts, max(1, drawing.batch_size // n), key=len)):
            torch.manual_seed(drawing.seed * 1_000_003 + number)
            ids_BT, mask_BT = left_pad([prompts[i] for i in rows], pad, device)
            out = model.generate(  # type: ignore[operator]
                input_ids=ids_BT.repeat_interleave(n, dim=0),
                attention_mask=mask_BT.repeat_interleave(n, dim=0),
                past_key_values=_prefilled(model, ids_BT, mask_BT, n),
                generation_config=config,
                synced_gpus=False,  # each process draws on its own, where weights are cut up among several
            )
            drawn = out[:, ids_BT.shape[1] :].view(len(rows), n, -1).tolist()
            for i, texts in zip(rows, drawn, strict=True):
                responses[i] = [_cut_after(tokens, stops) for tokens in texts]
            done += len(rows)
            if progress is not None:
                progress(done, len(prompts))
    model.train(was_training)
    return responses


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
