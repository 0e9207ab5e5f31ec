"""Prompts into tokens, tokens into log-probabilities, models into responses.

Everything that samples from or scores with a causal language model goes through the three verbs of this file:
`sample`, `continuation_logprobs` (evaluation: the context is computed once per item) and `response_nll` (training and
search: differentiable). Shape suffixes: B rows, T tokens, C continuation tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoise.records import Progress

T = TypeVar("T")
TURN = re.compile(r"\n\n(Human|Assistant):")
"""What stands before each turn of an HH transcript."""


@dataclass(frozen=True)
class Prompt:
    """One conversation that waits for a response: messages in the chat format, `{"role": ..., "content": ...}`."""

    messages: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The words of the conversation without any template: what a reward is shown."""
        return "\n".join(content for _, content in self.messages)

    @cached_property
    def key(self) -> str:
        """sha256 of the content: the same prompt has the same key in every file and order."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()


class Example(NamedTuple):
    """A prompt and a response as token ids; losses count the response alone."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a jsonl file whose lines are {"prompt": str} or {"messages": [{"role", "content"}, ...]}; drops repeats.

    A prompt that is a whole HH transcript, "\\n\\nHuman: ...\\n\\nAssistant:", is read as its turns, any other as one turn of
    the user.
    """
    prompts: dict[str, Prompt] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            prompt = _read_prompt(line, f"{path}, line {number}")
            prompts.setdefault(prompt.key, prompt)
    if not prompts:
        raise ValueError(f'{path}: expected at least one line {{"prompt": "..."}}, found none')
    return list(prompts.values())


def _read_prompt(line: str, place: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: expected one JSON object, found {line[:60]!r} ({error})") from None
    match record:
        case {"prompt": str(text)}:
            return transcript(text) or Prompt((("user", text),))
        case {"messages": [*messages]} if messages and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            return Prompt(tuple((m["role"], m["content"]) for m in messages))
    raise ValueError(
        f'{place}: expected {{"prompt": "text"}} or {{"messages": [{{"role": ..., "content": ...}}]}}, '
        f"found {line.strip()[:80]!r}"
    )


def transcript(text: str) -> Prompt | None:
    """The turns of an HH transcript, a closing empty Assistant turn dropped; None when `text` does not begin as one.

    >>> transcript("\\n\\nHuman: Hi\\n\\nAssistant:").messages
    (('user', 'Hi'),)
    """
    before, *parts = TURN.split(text)
    if before.strip() or parts[:1] != ["Human"]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1] == ("assistant", ""):
        turns.pop()
    return Prompt(tuple(turns))


def encode_prompt(tokenizer: Any, prompt: Prompt, *, chat: bool = True) -> tuple[int, ...]:
    """Token ids of `prompt`: through the tokenizer's chat template when it has one and `chat` holds, else plain text."""
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": role, "content": content} for role, content in prompt.messages]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer(prompt.text)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.text.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # some tokenizers end every text; a response is to follow
    return tuple(ids)


def stop_tokens(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response: the tokenizer's, those of the model's generation config, the chat template's."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = eos if isinstance(eos, (list, tuple)) else [eos]
    ids = [getattr(tokenizer, "eos_token_id", None), *several, turn_end(tokenizer)]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after what the assistant said; None without template or token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    said = "counterpoise"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    _, found, after = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition(said)
    ids = tokenizer(after if found else "", add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return next((int(i) for i in ids if i in added and added[i].special), None)


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    n: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[list[tuple[int, ...]]]:
    """Draw `n` responses for each prompt, by ancestral sampling (greedy when `temperature` is 0).

    Nothing else shapes the draws: of the model's own generation config only the ids that end a response count.

    Args:
        prompts: token ids, one tuple a prompt.
        batch_size: responses generated at once; prompts of like length share a batch.
        seed: two models asked with the same seed and prompts see the same random numbers, so that their rewards can be
            compared in pairs.

    Returns:
        For each prompt its n responses as token ids; a finished response ends with the first of `stop_tokens`, a
        response cut at `max_new_tokens` does not.
    """
    from transformers import GenerationConfig

    stops = stop_tokens(model, tokenizer)
    pad = stops[0] if stops else 0
    # Said outright: transformers has defaults of its own (top_k 50, for instance).
    drawing = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False}
    )
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, eos_token_id=list(stops) or None, pad_token_id=pad, **drawing
    )
    _refuse_too_long(model, prompts, max_new_tokens)
    device = _device_of(model)
    responses: list[list[tuple[int, ...]]] = [[] for _ in prompts]
    done = 0
    was_training = model.training
    model.eval()
    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with fork, _blank_generation_config(model):
        for number, rows in enumerate(by_length(prompts, max(1, batch_size // n), key=len)):
            torch.manual_seed(seed * 1_000_003 + number)
            ids_BT, mask_BT = _left_pad([prompts[i] for i in rows], pad, device)
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
    out = model(
        input_ids=ids_BT[:, :-1], attention_mask=mask, position_ids=_positions(mask), use_cache=True, logits_to_keep=1
    )
    out.past_key_values.batch_repeat_interleave(n)
    return out.past_key_values


def decode(tokenizer: Any, responses: Sequence[tuple[int, ...]]) -> list[str]:
    """Responses as text, special tokens dropped."""
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in responses]


@torch.no_grad()
def continuation_logprobs(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 16,
) -> list[list[float]]:
    """Summed log-probability, in nats, of each continuation of each context.

    The context of an item is run once and its cache shared by the item's continuations, so that four choices cost
    little more than one. Attention is causal, so the numbers are those of scoring each pair on its own.

    Args:
        contexts: token ids, at least one each.
        continuations: for each context, one or more token sequences, at least one token each.
        batch_size: contexts run at once.
    """
    if any(not context for context in contexts) or any(not c for group in continuations for c in group):
        raise ValueError("continuation_logprobs: expected at least one token in every context and continuation")
    longest = [len(c) + max(map(len, group)) for c, group in zip(contexts, continuations, strict=True)]
    _refuse_too_long(model, longest, 0)
    scores: list[list[float]] = [[] for _ in contexts]
    was_training = model.training
    model.eval()
    # Items of one batch need equally many continuations, for the cache to be repeated row by row.
    for rows in by_length(range(len(contexts)), batch_size, key=lambda i: (len(continuations[i]), longest[i])):
        for group in _equal_counts(rows, continuations):
            sums = _score_group(model, [contexts[i] for i in group], [continuations[i] for i in group])
            for i, values in zip(group, sums.tolist(), strict=True):
                scores[i] = values
    model.train(was_training)
    return scores


def _score_group(
    model: nn.Module, contexts: list[Sequence[int]], continuations: list[Sequence[Sequence[int]]]
) -> Tensor:
    """Summed log-probabilities, shape (items, choices), of equally many choices per item."""
    device = _device_of(model)
    choices = len(continuations[0])
    ids_BT, mask_BT = _left_pad(contexts, 0, device)
    prefix = model(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=_positions(mask_BT), use_cache=True, logits_to_keep=1
    )
    first_BV = prefix.logits[:, -1].repeat_interleave(choices, dim=0)
    flat = [c for group in continuations for c in group]
    targets_BC, target_mask_BC = _right_pad(flat, device)
    first_logp_B = F.log_softmax(first_BV.float(), dim=-1).gather(1, targets_BC[:, :1]).squeeze(1)
    if targets_BC.shape[1] == 1:
        return first_logp_B.view(-1, choices).double()
    cache = prefix.past_key_values
    cache.batch_repeat_interleave(choices)
    full_mask = torch.cat([mask_BT.repeat_interleave(choices, dim=0), target_mask_BC[:, :-1]], dim=1)
    positions = _positions(full_mask)[:, mask_BT.shape[1] :]
    rest = model(
        input_ids=targets_BC[:, :-1],
        attention_mask=full_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    nll_BC = F.cross_entropy(rest.logits.float().flatten(0, 1), targets_BC[:, 1:].flatten(), reduction="none")
    rest_logp_B = -(nll_BC.view_as(targets_BC[:, 1:]) * target_mask_BC[:, 1:]).double().sum(1)
    return (first_logp_B.double() + rest_logp_B).view(-1, choices)


def response_nll(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Summed negative log-likelihood, in nats, of the response tokens of one batch: a differentiable scalar.

    Prompts and padding carry no loss (the authors' code of HMA counts prompts and text packed across samples;
    papers/hma.md, fault 7). Divide by the number of response tokens of the whole set for a mean that does not depend on
    how the set was cut into batches.
    """
    device = _device_of(model)
    ids_BT, mask_BT = _left_pad([e.prompt + e.response for e in examples], 0, device)
    longest = max(len(e.response) for e in examples)
    # Rows end together (left padding), so only the last positions need the vocabulary-sized output.
    logits_BCV = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=_positions(mask_BT),
        use_cache=False,
        logits_to_keep=longest + 1,
    ).logits[:, -(longest + 1) : -1]
    targets_BC = ids_BT[:, -longest:]
    lengths_B = torch.tensor([len(e.response) for e in examples], device=device)
    counted_BC = torch.arange(longest, device=device) >= longest - lengths_B[:, None]
    logits = logits_BCV if logits_BCV.dtype == torch.float64 else logits_BCV.float()
    return F.cross_entropy(logits[counted_BC], targets_BC[counted_BC], reduction="sum")


def response_tokens(examples: Sequence[Example]) -> int:
    """Number of response tokens: the divisor of a mean `response_nll`."""
    return sum(len(e.response) for e in examples)


def by_length(items: Sequence[T] | range, batch_size: int, *, key: Callable[[Any], Any]) -> Iterator[list[int]]:
    """Indices of `items` in batches of like length, longest first, so that a batch that does not fit fails at once."""
    order = sorted(range(len(items)), key=lambda i: key(items[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _equal_counts(rows: list[int], continuations: Sequence[Sequence[Any]]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i in rows:
        groups.setdefault(len(continuations[i]), []).append(i)
    return list(groups.values())


def _left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _right_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _cut_after(tokens: list[int], stops: Sequence[int]) -> tuple[int, ...]:
    return tuple(tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stops), None)])


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _refuse_too_long(model: nn.Module, rows: Sequence[Any], new_tokens: int) -> None:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max((row if isinstance(row, int) else len(row) for row in rows), default=0)
    if limit is not None and longest + new_tokens > limit:
        raise ValueError(
            f"expected sequences of at most {limit} tokens (the model's context), found one of {longest}"
            + (f" with {new_tokens} more to generate" if new_tokens else "")
            + "; drop or shorten the longest prompts"
        )
