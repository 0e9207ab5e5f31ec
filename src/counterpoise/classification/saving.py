"""A trained text classifier as a folder, and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
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
from counterpoise.classification.targets import PROBLEM, Target
from counterpoise.classification.vectors import SPLITTING, SubwordTokens, Vocabulary, splits_anew
from counterpoise.language.loading import refuse_damaged
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
    config: dict[str, Any] = {
        "format": _FORMAT,
        "tasks": [{"name": name, **asdict(target)} for name, target in classifier.targets.items()],
        "design": asdict(classifier.design),
        "versions": versions(),
    }
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in classifier.model.state_dict().items()}
    with staged(out) as folder:
        (folder / WEIGHTS).write_bytes(to_bytes(weights, metadata={"format": "pt"}))
        tokens, encoder = classifier.tokens, classifier.model.encoder
        if isinstance(tokens, Vocabulary):
            config["dimension"] = weights["encoder.embedding.weight"].shape[1]
            config["splitting"] = SPLITTING
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
    tasks = {t.pop("name"): Target(**t | {"labels": tuple(t["labels"])}) for t in config["tasks"]}
    design = Design(**{**config["design"], "kernels": tuple(config["design"]["kernels"])})
    tokens: Vocabulary | SubwordTokens
    with seeded(0):  # the starting values are drawn and thrown away
        if design.takes_words:
            tokens = Vocabulary(_read(path / WORDS))
            if config.get("splitting", 1) < SPLITTING and any(splits_anew(word) for word in tokens.words):
                warnings.warn(
                    f"{folder}: trained by an earlier version, which split words of some scripts otherwise; its answers on "
                    "them are not what they were. Train it again.",
                    stacklevel=2,
                )
            encoder = build_encoder(design, torch.zeros(len(tokens), int(config["dimension"])))
        else:
            tokens, encoder = _pretrained(path, design.pooling == "own")
        model = HardSharing(encoder, [len(x.labels) for x in tasks.values()], dropout=design.dropout)
    try:
        model.load_state_dict(load_file(path / WEIGHTS))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"{path / WEIGHTS}: expected the weights that {CONFIG} describes, found: {error}") from None
    refuse_damaged(model, str(path / WEIGHTS))
    return TextClassifier(tasks, design, tokens, model.to(device).eval())


def recorded(folder: str | Path) -> dict[str, Any]:
    """What `save` was told of how the classifier came about; nothing where it was told nothing."""
    path = Path(folder).expanduser() / RECORD
    return dict(_read(path)) if path.is_file() else {}


def export(classifier: TextClassifier, out: str | Path, tasks: Sequence[str] = ()) -> list[Path]:
    """Write a folder a task that `AutoModelForSequenceClassification` and `AutoTokenizer` load, with the same answers.

    Each holds the shared encoder with the task's head on it, its labels (`id2label`) and its `problem_type`. A number's
    mean and spread are in the head.

    Args:
        classifier: on a transformers encoder.
        out: a new or empty folder, for folders by the names of the tasks.
        tasks: which; all by default.

    Raises:
        KeyError: a task that the model does not have.
        ValueError: a model without such a class, or something stands at `out`.
    """
    encoder, tokens, design = classifier.model.encoder, classifier.tokens, classifier.design
    if not isinstance(encoder, Pretrained) or encoder.head is None or isinstance(tokens, Vocabulary):
        why = (
            ""
            if design.takes_words
            else " with the mean of its last states (an encoder-decoder, or trained before 0.2)"
        )
        raise ValueError(
            f"export: expected a model on a transformers encoder that has a class for sequence classification, found "
            f"{design.model}{why}; train with --model ENCODER, such as a BERT"
        )
    names = [classifier.task(name) for name in tasks or classifier.tasks]
    tokenizer = copy.deepcopy(tokens.tokenizer)
    tokenizer.padding_side, tokenizer.model_max_length = "right", design.max_tokens  # as it was trained
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(tokens.padding)
    model = copy.deepcopy(encoder.model).cpu().eval()
    with staged(out) as folder:
        for name in names:
            target = classifier.targets[name]
            head: Any = copy.deepcopy(classifier.model.heads[classifier.index(name)]).cpu()
            with torch.no_grad():
                head.weight *= target.scale
                if head.bias is not None:
                    head.bias.mul_(target.scale).add_(target.mean)
            model.set_submodule(encoder.head, head)
            config = model.config
            config.num_labels, config.problem_type = len(target.labels), PROBLEM[target.kind]
            config.id2label = dict(enumerate(target.labels))
            config.label2id = {label: i for i, label in enumerate(target.labels)}
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    return [Path(out) / name for name in names]


def _pretrained(path: Path, own: bool) -> tuple[SubwordTokens, Pretrained]:
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    kind: Any = AutoModelForSequenceClassification if own else AutoModel
    model = kind.from_config(AutoConfig.from_pretrained(path / ENCODER), dtype=torch.float32)
    tokens = SubwordTokens(AutoTokenizer.from_pretrained(path / TOKENIZER))
    return tokens, Pretrained(model, tokens.padding)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected this file beside {CONFIG}, found none; copy the whole folder")
    return parse_json(read_text(path), str(path))
