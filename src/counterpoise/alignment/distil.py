"""RSF in the paper's distillation style: collect the best of n once from a finished run, then fine-tune PRE on them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from counterpoise.alignment.mitigations.replay import response_ids
from counterpoise.alignment.rsf import best_of_n, draw_and_score, fine_tune
from counterpoise.alignment.settings import Distil
from counterpoise.alignment.training import processes
from counterpoise.alignment.training.run import Run
from counterpoise.alignment.training.stepping import Mitigation, adam, finish_all, start_all
from counterpoise.checkpoints.reading import json_lines
from counterpoise.evaluation.rewards import Reward
from counterpoise.language.prompts import Prompt, encode_prompt, encode_prompts, prompt_of
from counterpoise.language.sampling import Drawing, decode, stop_tokens
from counterpoise.language.scoring import Example
from counterpoise.language.ways import context_of
from counterpoise.ranks import is_sharded
from counterpoise.records import NUMERICS, Progress, Store, digest

STORED_TOGETHER = 128
"""Prompts whose responses are drawn, scored and stored together."""


USUAL = {"reward": math.nan, "mean_reward": math.nan, "finished": True}
"""What a line of a file of samples may leave out, and what then holds."""


class Sample(NamedTuple):
    """A response that was the best of n for its prompt, as text; not `finished` when it was cut at its longest length."""

    prompt: Prompt
    response: str
    reward: float
    mean_reward: float
    finished: bool = True


def collect(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    drawing: Drawing = Drawing(n=32),
    *,
    store: Store | None = None,
    key: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Sample]:
    """The best of n responses of a finished model to every prompt (Lin et al. 2024).

    Args:
        store, key: finished chunks are kept in `store` under `key`, which must name the model and the reward.
        progress: called with (done, total) prompts.

    Returns:
        One `Sample` a prompt, in the order of `prompts`; `mean_reward` is the mean over its n responses.

    Raises:
        ValueError: several processes, whose output files would be one; n equal responses (temperature 0).
    """
    if (started := processes.started()) > 1:
        raise ValueError(f"collect: expected one process, found {started} (WORLD_SIZE); start it without torchrun")
    room: dict[str, Any] = {"new": drawing.max_new_tokens, "limit": context_of(model.config)}
    encode_prompts(tokenizer, prompts, chat=drawing.chat, **room)  # all of them, before the first is drawn
    stops = stop_tokens(model, tokenizer)
    found: list[Sample] = []
    for start in range(0, len(prompts), STORED_TOGETHER):
        chunk = prompts[start : start + STORED_TOGETHER]

        def work(chunk: Sequence[Prompt] = chunk) -> list[Any]:
            encoded, drawn, scores = draw_and_score(model, tokenizer, chunk, reward, drawing)
            kept = [example.response for example in best_of_n(encoded, drawn, scores)]
            finished = [ids[-1] in stops for ids in kept]
            columns = (decode(tokenizer, kept), scores.amax(1).tolist(), scores.mean(1).tolist(), finished)
            return list(map(list, zip(*columns, strict=True)))

        pieces = {"what": "collect, finished", "numerics": NUMERICS, **(key or {}), **drawing.decides}
        rows = work() if store is None else store.once({**pieces, "prompts": digest([p.key for p in chunk])}, work)
        found += [Sample(p, *row) for p, row in zip(chunk, rows, strict=True)]
        if progress is not None:
            progress(len(found), len(prompts))
    return found


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write a jsonl file: {"messages", "response", "reward", "mean_reward", "finished"} a line, the fields of a `Sample`."""
    with open(path, "w", encoding="utf-8") as file:
        for prompt, *values in samples:
            messages = [{"role": role, "content": content} for role, content in prompt.messages]
            record = {"messages": messages, **dict(zip(Sample._fields[1:], values, strict=True))}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_samples(path: str | Path) -> list[Sample]:
    """Read what `write_samples` wrote; lines need {"prompt" or "messages", "response"}, the rest may be missing.

    A response is taken for finished where its line does not say "finished": false.

    Raises:
        ValueError: a line of another form, with its number; no line at all.
    """
    samples = []
    for place, record in json_lines(path):
        prompt = prompt_of(record, place)
        if not isinstance(record.get("response"), str):
            raise ValueError(f'{place}: expected a column "response" with text, found columns {sorted(record)}')
        best, mean, finished = (record.get(name, usual) for name, usual in USUAL.items())
        if not all(isinstance(v, float | int) for v in (best, mean)) or not isinstance(finished, bool):
            raise ValueError(
                f"{place}: expected two numbers and a boolean in {[*USUAL]}, found {[best, mean, finished]}"
            )
        samples.append(Sample(prompt, record["response"], float(best), float(mean), finished))
    if not samples:
        raise ValueError(f'{path}: expected lines {{"messages": ..., "response": ...}}, found none')
    return samples


def distil(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    settings: Distil = Distil(),
    *,
    mitigations: Sequence[Mitigation] = (),
    run: Run | None = None,
) -> list[float]:
    """Fine-tune `model`, in place, on samples that another collected: RSF in distillation style, with the paper's defaults.

    A response that is not finished is learned without an end, as in `rsf`. Several processes share the rows of every
    step.

    Args:
        model: PRE; with mitigations this is how the paper compares them (Lin et al. 2024).
        run: a folder with a checkpoint an epoch; a run that was stopped goes on from its last whole epoch.

    Returns:
        The mean loss per response token (nats) of each epoch of this process.

    Raises:
        ValueError: DeepSpeed, no sample with a token to learn.
    """
    settings.check()
    processes.refuse_sharded("rsf, distillation style", cut_up=is_sharded(model))
    processes.join(next(model.parameters()).device)
    learned = [response_ids(tokenizer, s.response, chat=settings.chat, finished=s.finished) for s in samples]
    prompts = [encode_prompt(tokenizer, s.prompt, chat=settings.chat) for s in samples]
    examples = [Example(prompt, ids) for prompt, ids in zip(prompts, learned, strict=True) if ids]
    if not examples:
        raise ValueError(f"samples: expected responses with a token to learn, found none in {len(samples)}")
    order = random.Random(settings.seed)
    start_all(mitigations, model, tokenizer)
    optimizer = adam(model, settings.learning_rate)
    first = 0
    if run is not None and (state := run.load(model, tokenizer, optimizer, mitigations)) is not None:
        first = run.done
        order.setstate(state["order"])
    losses: list[float] = []
    once = replace(settings, epochs=1)
    for epoch in range(first, settings.epochs):
        stage = None if run is None else run.stage(f"epoch {epoch + 1} of {settings.epochs}")
        losses += fine_tune(model, examples, optimizer, once, order, mitigations, progress=stage)
        if run is not None:
            told = {"method": "rsf, distillation style", "loss": losses[-1]}
            run.save(epoch + 1, metrics=told, loop={"order": order.getstate()})
    finish_all(mitigations, model)
    return losses
