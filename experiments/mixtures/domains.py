"""Four domains of text, of sizes 100 : 30 : 10 : 3, and a tokenizer of their training texts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parent.parent / "banditmtl"))
from layouts import read_tasks

SIZES = {"films": 4000, "news": 1200, "french": 400, "maths": 120}
"""Training rows."""


def texts(data: Path) -> dict[str, list[str]]:
    """All texts of each domain: film reviews, newsgroup posts, French captions, school mathematics."""
    films = csv.DictReader(io.StringIO(gzip.decompress((data / "imdb-reviews/imdb.csv.gz").read_bytes()).decode()))
    news = read_tasks(data / "newsgroups", "newsgroups", need=("train",))
    french = gzip.decompress((data / "multi30k-fr-en/train.fr.gz").read_bytes()).decode().splitlines()
    maths = [json.loads(x) for x in (data / "benchmarks/gsm8k.jsonl").read_text().splitlines()]
    return {
        "films": [row["text"] for row in films],
        "news": [x for task in news for x in task.train.texts if len(x) > 100],
        "french": french,
        "maths": [f"{row['context']} {row['chain_of_thought']}" for row in maths],
    }


def domains(data: Path, seed: int, validation: int) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Training and validation rows of each domain, drawn by seed."""
    train, held = {}, {}
    for name, found in texts(data).items():
        order = np.random.default_rng([seed, len(found)]).permutation(len(found))
        rows = [{"text": found[i][:600]} for i in order[: SIZES[name] + validation]]
        train[name], held[name] = Dataset.from_list(rows[validation:]), Dataset.from_list(rows[:validation])
    return train, held


def tokenizer_of(train: Mapping[str, Dataset], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training texts."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<pad>", "<end>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    inner.train_from_iterator((text for rows in train.values() for text in rows["text"]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
