"""Small labelled texts in which one word decides the label, and a tiny Hugging Face encoder that reads them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from counterpoise.classification import TaskData, read_tasks

NOISE = ["the", "a", "of", "and", "to", "in", "that", "it", "was", "with", "for", "on", "they", "had", "this", "from"]
SIGNS = {
    "colour": {"red": ["rose", "blood", "fire"], "blue": ["sea", "sky"]},
    "animal": {"dog": ["bark", "bone"], "cat": ["purr", "mouse"], "cow": ["milk", "moo"]},
}


def rows(task: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 4 to 12 words, one of which belongs to the label."""
    draw = random.Random(f"{task}{seed}")
    made = []
    for i in range(count):
        label = list(SIGNS[task])[i % len(SIGNS[task])]
        words = draw.choices(NOISE, k=draw.randint(3, 11))
        words.insert(draw.randrange(len(words) + 1), draw.choice(SIGNS[task][label]))
        made.append((" ".join(words), label))
    return made


def write_folder(folder: Path, colours: int = 240, animals: int = 160) -> Path:
    """A csv of two classes and a smaller jsonl of three."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{text},{label}" for text, label in rows("colour", colours)]
    (folder / "colour.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows("animal", animals)]
    (folder / "animal.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tasks(folder: Path, **sizes: int) -> list[TaskData]:
    """The two tasks as read from such a folder."""
    return read_tasks(write_folder(folder, **sizes), tasks=["colour", "animal"])


def tiny_encoder(folder: Path) -> Path:
    """A random BERT of one token a character on disk, with its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from tiny import tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=96, **sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
