"""A reward model from preferences, through TRL's RewardTrainer; the folder it writes is a reward for everything here."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from counterpoise.alignment.preferences import Preference
from counterpoise.alignment.settings import RewardTraining
from counterpoise.alignment.training.models import Machine
from counterpoise.alignment.training.run import telling
from counterpoise.alignment.training.trainers import (
    Bar,
    arguments,
    longest,
    on_own_gpu,
    quiet_libraries,
    train_quietly,
    trl_for,
    with_pad_token,
)
from counterpoise.checkpoints.files import CheckpointError, refuse_occupied, staged
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.evaluation.classifiers import spare_token
from counterpoise.language.loading import refuse_damaged, without_bars
from counterpoise.language.templates import has_template, render
from counterpoise.records import Stages, named, versions, write_json


def train_reward_model(
    source: str | Path,
    out: str | Path,
    preferences: Sequence[Preference],
    settings: RewardTraining = RewardTraining(),
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    command: str | None = None,
    progress: Stages | None = None,
) -> dict[str, Any]:
    """Train -log sigmoid(r(chosen) - r(rejected)) (Bradley and Terry; Ouyang et al. 2022, equation 1) and write the model.

    Prompts and responses are tokenised as `load_reward` tokenises them, so that the reward is asked what it was taught:
    the prompt's words as one user turn of the chat template, or prompt and response as a text pair.

    Args:
        source: a language model or classifier; its head is replaced by one new output.
        out: a new folder, for `--reward OUT`; it appears whole or not at all, with reward_model.json.

    Returns:
        The content of reward_model.json: accuracy before and after on held-out pairs, losses, settings; under "cut" how many
        pairs were cut, the share of their tokens that is gone, and how many pairs were left out.

    Raises:
        ValueError: no end-of-sequence token, no prompt that leaves room, a share out of range, a batch that is no whole
            number of micro-batches.
        CheckpointError: no model at `source`, or an occupied `out`.
    """
    settings.check()
    Machine(dtype).check()
    trl = trl_for("align reward-model")
    refuse_occupied(Path(out).absolute())
    checkpoint = open_checkpoint(source)
    model, tokenizer = _load(checkpoint.folder, dtype=dtype, device=device)
    limit = longest(model, settings.max_length)
    pairs, lost = encoded(preferences, tokenizer, limit)
    if not pairs:
        raise ValueError(
            f"preferences: expected prompts that leave room for a response within {limit} tokens, found none of "
            f"{len(preferences)}; shorten them or raise max_length"
        )
    random.Random(settings.seed).shuffle(pairs)
    cut = min(math.ceil(settings.held_out * len(pairs)), len(pairs) - 1)
    tested, learned = pairs[:cut], pairs[cut:]
    # Decoders score the last token that is not the padding's: that must be none of the text's, as its end may be.
    spare = spare_token([ids for pair in pairs for ids in pair.values()], tokenizer, model)
    pad = tokenizer.pad_token_id if spare is None else spare
    own, tokenizer.pad_token_id = (
        tokenizer.pad_token_id,
        pad,
    )  # when training begins, the model's is set to the tokenizer's
    model.config.get_text_config().pad_token_id = pad
    before = _accuracy(model, tested, pad, settings.micro_batch_size)
    with TemporaryDirectory() as scratch, quiet_libraries():
        from datasets import Dataset

        config = trl.RewardConfig(save_strategy="no", **arguments(settings, model, scratch))
        table = Dataset.from_list(learned)
        trainer = trl.RewardTrainer(
            model, args=on_own_gpu(config, model), train_dataset=table, processing_class=tokenizer
        )
        lines = train_quietly(trainer, Bar(named(progress, "reward model: steps")), "reward model")
    record = {
        "source": str(source),
        "pre": checkpoint.sha256,
        "pairs": {"given": len(preferences), "trained": len(learned), "held_out": len(tested)},
        "cut": lost,
        "accuracy": {"before": before, "after": _accuracy(model, tested, pad, settings.micro_batch_size)},
        "loss": [line["loss"] for line in lines],
        "settings": {n: settings.told[n] for n in ("epochs", "learning_rate", "batch_size", "seed")},
        "versions": versions(),
        "command": command,
    }
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id = own
    with telling(f"reward model: expected to write {out}"), staged(out) as folder, without_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "reward_model.json", record)
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]


def _load(folder: Path, *, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = with_pad_token(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        with quiet_libraries(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the new head
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, dtype=dtype, ignore_mismatched_sizes=True, trust_remote_code=False
            )
    except OSError as error:
        raise CheckpointError(f"{folder}: expected a model with its tokenizer, found: {error}") from None
    refuse_damaged(model, folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device), tokenizer


def encoded(
    preferences: Sequence[Preference], tokenizer: Any, limit: int
) -> tuple[list[dict[str, list[int]]], dict[str, Any]]:
    """Both sides of each pair as `counterpoise.evaluation.rewards.classifier` encodes them, and what was lost of them."""

    def encode(prompt: str, response: str) -> tuple[list[int], int]:
        """What fits, the prompt first, and how many tokens there are."""
        if has_template(tokenizer):
            text = render(tokenizer, (("user", prompt), ("assistant", response)))
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        elif (
            len(ids := list(tokenizer(prompt, response)["input_ids"])) > limit > len(tokenizer(prompt, "")["input_ids"])
        ):
            cut = tokenizer(prompt, response, truncation="only_second", max_length=limit)
            return list(cut["input_ids"]), len(ids)
        return ids[:limit], len(ids)

    kept, sizes = [], []
    for p in preferences:
        (chosen, long), (rejected, other) = (encode(p.prompt.text, side) for side in (p.chosen, p.rejected))
        if chosen != rejected:  # as they are where the prompt alone fills the room
            kept.append({"chosen_ids": chosen, "rejected_ids": rejected})
            if max(long, other) > limit:
                sizes.append((long + other, len(chosen) + len(rejected)))
    whole, left = map(sum, zip(*sizes, strict=True)) if sizes else (1, 1)
    return kept, {"pairs": len(sizes), "tokens": 1 - left / whole, "left_out": len(preferences) - len(kept)}


@torch.no_grad()
def _accuracy(model: Any, pairs: Sequence[dict[str, list[int]]], pad: int, batch_size: int) -> float | None:
    """Share of pairs whose chosen side scores higher; None without pairs."""
    if not pairs:
        return None
    model.eval()
    right = 0
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        rows = [torch.tensor(pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in batch]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad).to(model.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
        scores = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        right += int((scores[: len(batch)] > scores[len(batch) :]).sum())
    return right / len(pairs)
