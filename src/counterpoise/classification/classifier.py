"""A multi-task text classifier: texts in, labels with probabilities out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoise.checkpoints.files import resolve
from counterpoise.classification.data import TaskData
from counterpoise.classification.models import (
    OUTPUTS,
    Design,
    HardSharing,
    Pretrained,
    build_encoder,
    check_device,
    head_of,
    seeded,
)
from counterpoise.classification.parts import SplitName
from counterpoise.classification.targets import Label, Score, Target
from counterpoise.classification.vectors import SubwordTokens, Text, TokenIds, Vocabulary, token_ids, word_vectors
from counterpoise.language.ways import context_of
from counterpoise.multitask.losses import task_names


class Prediction(NamedTuple):
    """The likeliest label of a text, all that hold (separated by commas), or the number; and how probable.

    Of several labels that of the least probable; of none, that of the most probable one not to hold; of a number None.
    """

    label: str
    probability: float | None


class TextClassifier:
    """One model for several tasks of labelled texts.

    Args:
        tasks: each task's name and its `Target`, or just its labels, in the order of its head's outputs.
        design: what the model was built from.
        tokens: turns a text into token ids.
        model: the network.
    """

    def __init__(
        self,
        tasks: Mapping[str, Target | tuple[str, ...]],
        design: Design,
        tokens: Vocabulary | SubwordTokens,
        model: HardSharing,
    ) -> None:
        self.targets = {n: t if isinstance(t, Target) else Target(tuple(t)) for n, t in tasks.items()}
        self.tasks = {name: target.labels for name, target in self.targets.items()}
        self.design, self.tokens, self.model = design, tokens, model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def probabilities(self, task: str, texts: Sequence[Text], *, batch_size: int = 64) -> Tensor:
        """The probability of each of the task's labels, or the number, (N, C) float64.

        Raises:
            KeyError: a task that the model does not have.
            ValueError: pairs of texts for a task of single ones, or the reverse.
        """
        self.check_texts(task, texts)
        logits_NC = self.logits(self.index(task), self.encode(texts), batch_size=batch_size)
        return self.targets[task].answers(logits_NC.double())

    def predict(self, task: str, texts: Sequence[Text], *, batch_size: int = 64) -> list[Prediction]:
        """The answer to each text."""
        return [self.prediction(task, row) for row in self.probabilities(task, texts, batch_size=batch_size).tolist()]

    def prediction(self, task: str, row: Sequence[float]) -> Prediction:
        """The answer that a row of `probabilities` comes to."""
        labels, kind = self.tasks[self.task(task)], self.targets[task].kind
        if kind == "number":
            unit = self.targets[task].deviation or self.targets[task].scale
            digits = 6 + max(0, math.ceil(math.log10(max(abs(row[0]) / unit, 1.0))))
            return Prediction(f"{row[0]:.{digits}g}", None)
        if kind == "labels":
            held = [(p, label) for p, label in zip(row, labels, strict=True) if p > 0.5]
            return Prediction(",".join(x for _, x in held), min(p for p, _ in held) if held else 1.0 - max(row))
        probability, label = max(zip(row, labels, strict=True), key=lambda pair: pair[0])
        return Prediction(label, probability)

    def check_texts(self, task: str, texts: Sequence[Text]) -> None:
        """Raise where single texts are given for pairs, or the reverse."""
        pair = self.targets[self.task(task)].pair
        if isinstance(texts, str):
            raise ValueError(f"texts: expected several, in a list, found one text, {texts[:60]!r}")
        for x in texts:
            parts = x if pair and isinstance(x, tuple) and len(x) == 2 else (x,)
            if len(parts) != 1 + pair or not all(isinstance(y, str) and _encodes(y) for y in parts):
                expected = (
                    "two texts at a time, a tuple (in a line, a tab between them)" if pair else "one text at a time"
                )
                raise ValueError(f"task {task!r}: expected {expected}, found {str(x)[:60]!r}")

    def encode(self, texts: Sequence[Text]) -> TokenIds:
        """Texts as the encoder reads them, on its device."""
        rows = [self.tokens.encode(t, max_tokens=self.design.max_tokens) for t in texts]
        return token_ids(rows, self.tokens.padding, self.device)

    def classes(self, task: str, labels: Sequence[Label]) -> Tensor:
        """Labels as the task's loss reads them, (N,) places among its classes or (N, C), refusing labels it lacks."""
        return self.targets[self.task(task)].encode(task, labels)

    @torch.no_grad()
    def logits(self, task: int, texts: TokenIds, *, batch_size: int = 64) -> Tensor:
        """One task's logits, (N, C) on the CPU, without dropout. Texts of like length share a batch."""
        was_training = self.model.training
        self.model.eval()
        order_N = torch.argsort(texts.lengths_N, stable=True)
        logits_NC = torch.empty(len(order_N), len(list(self.tasks.values())[task]))
        for chosen_B in torch.split(order_N, batch_size):
            if len(chosen_B):
                logits_NC[chosen_B] = self.model.logits(self.model(*texts.batch(chosen_B)), task).float().cpu()
        self.model.train(was_training)
        return logits_NC

    def score(self, task: str, texts: TokenIds, truth: Tensor, *, batch_size: int = 64) -> Score:
        """How the model fares on encoded texts and their `classes`."""
        logits_NC = self.logits(self.index(task), texts, batch_size=batch_size).double()
        return self.targets[task].score(logits_NC, truth)

    def task(self, name: str) -> str:
        """`name`, if the model has such a task."""
        if name not in self.tasks:
            raise KeyError(f"the model's tasks are {list(self.tasks)}, found {name!r}")
        return name

    def index(self, name: str) -> int:
        """The place of a task among the heads."""
        return list(self.tasks).index(self.task(name))


def build_classifier(
    tasks: Sequence[TaskData],
    design: Design | str = "textcnn",
    *,
    vectors: str | Path | None = None,
    dimension: int = 100,
    min_count: int = 2,
    seed: int = 0,
    device: str = "cpu",
) -> TextClassifier:
    """An untrained classifier for these tasks.

    Args:
        tasks: the data; a word model's vocabulary is that of their training texts.
        design: or just the model: `textcnn`, a folder or hub id (`id@revision`) of a Hugging Face encoder.
        vectors: a file in GloVe's format for a word model; None: random vectors of `dimension`.
        dimension, min_count: see `word_vectors`.
        seed: of every random start.
        device: where the model goes.

    Raises:
        ValueError: repeated tasks, word vectors for a Hugging Face encoder, an unreadable vector file, no such device.
    """
    check_device(device)
    design = Design(model=design) if isinstance(design, str) else design
    targets = dict(zip(task_names(t.name for t in tasks), (t.target() for t in tasks), strict=True))
    tokens: Vocabulary | SubwordTokens
    with seeded(seed):
        if design.takes_words:
            texts = (text for t in tasks for text in t.train.texts)
            words = word_vectors(texts, vectors, dimension=dimension, min_count=min_count, seed=seed)
            tokens, encoder = words.vocabulary, build_encoder(design, words.table_VD)
        elif vectors is not None:
            raise ValueError(f"vectors: {design.model} brings its own embedding; leave out {vectors}")
        else:
            tokens, encoder, design = _pretrained(design, any(t.pair for t in targets.values()))
        model = HardSharing(encoder, [len(x.labels) for x in targets.values()], dropout=design.dropout)
    targets = {t.name: targets[t.name].fitted(t.name, t.train.labels, centred=encoder.bias) for t in tasks}
    return TextClassifier(targets, design, tokens, model.to(device))


def evaluate(
    classifier: TextClassifier, tasks: Sequence[TaskData], part: SplitName = "test", *, batch_size: int = 64
) -> dict[str, Score]:
    """The score of every task on one part of its data.

    Raises:
        KeyError: a task that the model does not have.
        ValueError: an empty part, or labels that the model does not know.
    """
    scores = {}
    for task in tasks:
        held = task.split(part)
        if not len(held):
            raise ValueError(f"task {task.name!r}: expected examples for {part}, found none")
        truth = classifier.classes(task.name, held.labels)
        classifier.check_texts(task.name, held.texts)
        scores[task.name] = classifier.score(task.name, classifier.encode(held.texts), truth, batch_size=batch_size)
    return scores


def _encodes(text: str) -> bool:
    """Whether it can be UTF-8: an argument or a json file may hold what cannot."""
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _pretrained(design: Design, pairs: bool) -> tuple[SubwordTokens, Pretrained, Design]:
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    folder = resolve(design.model)
    safe: dict[str, Any] = {"trust_remote_code": False}  # unset, transformers asks at the terminal
    config, tokenizer = AutoConfig.from_pretrained(folder, **safe), AutoTokenizer.from_pretrained(folder, **safe)
    longest = min(tokenizer.model_max_length, context_of(config) or math.inf)
    if design.max_tokens > longest:
        raise ValueError(f"max_tokens: {design.model} reads at most {longest} tokens, found {design.max_tokens}")
    if design.max_tokens <= (own_tokens := tokenizer.num_special_tokens_to_add(pairs)):
        raise ValueError(
            f"max_tokens: expected more than the {own_tokens} that {design.model} adds to a text, found {design.max_tokens}"
        )
    own = type(config) in AutoModelForSequenceClassification._model_mapping and not config.is_encoder_decoder
    kind: Any = AutoModelForSequenceClassification if own else AutoModel
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the head is new, and says so at length
    try:
        more = safe | ({"num_labels": OUTPUTS, "ignore_mismatched_sizes": True} if own else {})
        model = kind.from_pretrained(folder, dtype=torch.float32, **more)
    finally:
        logging.set_verbosity(level)
    tokens = SubwordTokens(tokenizer)
    reads_padding = getattr(config, "summary_type", None) == "last"  # XLNet's, whose last token may be a filler
    if own and (head_of(model) is None or reads_padding):
        model, own = model.base_model, False
    return tokens, Pretrained(model, tokens.padding), replace(design, pooling="own" if own else "mean")
