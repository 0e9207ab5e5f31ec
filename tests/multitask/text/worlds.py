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


def write_kinds(folder: Path, count: int = 120) -> Path:
    """A task of pairs (do both texts show the same sign?), one of numbers (how many signs) and one of several labels."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, signs = random.Random(0), {"red": "rose", "blue": "sea", "dog": "bone"}

    def text(*words: str) -> str:
        made = draw.choices(NOISE, k=4) + list(words)
        draw.shuffle(made)
        return " ".join(made)

    pairs, stars, topics = ["index\tpremise\thypothesis\tlabel"], ["sentence,score"], []
    for i in range(count):
        a, b = draw.choice([*signs.values()]), draw.choice([*signs.values()])
        pairs.append(f"{i}\t{text(a)}\t{text(b)}\t{'same' if a == b else 'other'}")
        held = [label for label in signs if draw.random() < 0.5]
        stars.append(f"{text(*(signs[x] for x in held))},{len(held) + 0.5}")
        topics.append(json.dumps({"text": text(*(signs[x] for x in held)), "labels": held}))
    for name, lines in (("pairs.tsv", pairs), ("stars.csv", stars), ("topics.jsonl", topics)):
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def encoder_of_pairs(folder: Path, family: str) -> Path:
    """A random model of a family on disk, with a tokenizer that marks where texts end and, for BERT, which is second."""
    import torch
    import transformers as t
    from tokenizers.processors import TemplateProcessing

    from tiny import nudge, tokenizer

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 140}
    made = {
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**sizes)),
        "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**sizes, type_vocab_size=1, pad_token_id=0)),
        "modernbert": lambda: t.ModernBertForMaskedLM(
            t.ModernBertConfig(**sizes, pad_token_id=0, classifier_pooling="mean", local_attention=8)
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_key_value_heads=2)),
    }
    nudge(made[family](), scale=0.6).save_pretrained(folder)  # answers differ from text to text
    plain = tokenizer()
    raw = plain.backend_tokenizer
    raw.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if family == "bert" else [])
    pad = {} if family == "llama" else {"pad_token": "<pad>"}
    t.PreTrainedTokenizerFast(
        tokenizer_object=raw, **pad, eos_token="</s>", unk_token="<unk>", model_input_names=names
    ).save_pretrained(folder)
    return folder
