"""A trained text classifier as a folder, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save as to_bytes

from counterpoise.checkpoints.files import staged
from counterpoise.checkpoints.reading import parse_json, read_text
from counterpoise.classification.classifier import TextClassifier
from counterpoise.classification.models import Design, HardSharing, Pretrained, build_encoder, check_device, seeded
from counterpoise.classification.vectors import SubwordTokens, Vocabulary
from counterpoise.records import versions, write_json

_FORMAT = "counterpoise-multitask-text-1"
CONFIG, WEIGHTS, WORDS, RECORD = "config.json", "model.safetensors", "vocabulary.json", "training.json"
TOKENIZER, ENCODER = "tokenizer", "encoder"
REPORT = "report.html"
"""The page of the run, which `counterpoise.report.multitask` draws from training.json."""


def save(
    classifier: TextClassifier,
    out: str | Path,
    record: Mapping[str, Any] | None = None,
    *,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write a classifier that `load` gives back with the same predictions, bit for bit.

    The folder appears whole or not at all. It holds config.json (tasks, labels, settings), model.safetensors, and a
    word model's vocabulary.json or the tokenizer and the encoder's own config; with `record`, also training.json.

    Args:
        classifier: what to save.
        out: a new or empty folder.
        record: how it came about, for instance settings and history; anything json takes.
        also: writes more files into the folder before it appears.

    Raises:
        ValueError: something stands at `out`.
    """
    config = {
        "format": _FORMAT,
        "tasks": [{"name": n, "labels": list(labels)} for n, labels in classifier.tasks.items()],
        "design": asdict(classifier.design),
        "versions": versions(),
    }
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in classifier.model.state_dict().items()}
    with staged(out) as folder:
        (folder / WEIGHTS).write_bytes(to_bytes(weights, metadata={"format": "pt"}))
        tokens, encoder = classifier.tokens, classifier.model.encoder
        if isinstance(tokens, Vocabulary):
            config["dimension"] = weights["encoder.embedding.weight"].shape[1]
            write_json(folder / WORDS, list(tokens.words))
        elif isinstance(encoder, Pretrained):
            tokens.tokenizer.save_pretrained(folder / TOKENIZER)
            encoder.config.save_pretrained(folder / ENCODER)
        if record is not None:
            write_json(folder / RECORD, dict(record))
        write_json(folder / CONFIG, config)
        if also is not None:
            also(folder)
    return Path(out)


def load(folder: str | Path, *, device: str = "cpu") -> TextClassifier:
    """The classifier that `save` wrote.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: a folder of something else, files that do not belong together, or no such device.
    """
    check_device(device)
    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: expected a folder that `counterpoise multitask train` wrote, found none")
    config = _read(path / CONFIG)
    found = config.get("format") if isinstance(config, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{path / CONFIG}: expected the format {_FORMAT}, found {found!r}; give another folder")
    tasks = {t["name"]: tuple(t["labels"]) for t in config["tasks"]}
    design = Design(**{**config["design"], "kernels": tuple(config["design"]["kernels"])})
    tokens: Vocabulary | SubwordTokens
    with seeded(0):  # the starting values are drawn and thrown away
        if design.takes_words:
            tokens = Vocabulary(_read(path / WORDS))
            encoder = build_encoder(design, torch.zeros(len(tokens), int(config["dimension"])))
        else:
            tokens, encoder = _pretrained(path)
        model = HardSharing(encoder, [len(x) for x in tasks.values()], dropout=design.dropout)
    try:
        model.load_state_dict(load_file(path / WEIGHTS))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"{path / WEIGHTS}: expected the weights that {CONFIG} describes, found: {error}") from None
    return TextClassifier(tasks, design, tokens, model.to(device).eval())


def read_record(folder: str | Path) -> dict[str, Any]:
    """The content of training.json: how a saved classifier came about.

    Raises:
        FileNotFoundError: no such folder, or a classifier saved without a record.
        ValueError: something else than a record in the file.
    """
    path = Path(folder).expanduser() / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the record that `counterpoise multitask train` writes, found none")
    record = _read(path)
    if not isinstance(record, dict) or not isinstance(record.get("epochs"), list):
        raise ValueError(f"{path}: expected a record of training with its epochs, found something else; train again")
    return record


def _pretrained(path: Path) -> tuple[SubwordTokens, Pretrained]:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(path / ENCODER)
    model = AutoModel.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return SubwordTokens(AutoTokenizer.from_pretrained(path / TOKENIZER)), Pretrained(model)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected this file beside {CONFIG}, found none; copy the whole folder")
    return parse_json(read_text(path), str(path))
