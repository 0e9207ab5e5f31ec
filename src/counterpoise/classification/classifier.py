"""A multi-task text classifier: texts in, labels with probabilities out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from counterpoise.checkpoints.files import resolve
from counterpoise.classification.data import SplitName, TaskData
from counterpoise.classification.models import Design, HardSharing, Pretrained, build_encoder, check_device, seeded
from counterpoise.classification.vectors import SubwordTokens, TokenIds, Vocabulary, token_ids, word_vectors
from counterpoise.language.ways import context_of
from counterpoise.multitask.losses import task_names


class Prediction(NamedTuple):
    """The likeliest label of a text and its probability."""

    label: str
    probability: float


class Score(NamedTuple):
    """How a task fares on a part.

    Attributes:
        accuracy: share of right labels.
        loss: mean cross-entropy, nats.
        examples: how many.
        macro_f1: mean F1 of the classes that occur, or are answered, in the part.
        mcc: Matthews' correlation (for several classes Gorodkin's), 0 where every answer or label is the same.
        classes: precision, recall, F1 and number of examples of each label.
    """

    accuracy: float
    loss: float
    examples: int
    macro_f1: float
    mcc: float
    classes: dict[str, dict[str, float]]


class TextClassifier:
    """One model for several tasks of labelled texts.

    Args:
        tasks: each task's name and its labels, in the order of its head's outputs.
        design: what the model was built from.
        tokens: turns a text into token ids.
        model: the network.
    """

    def __init__(
        self, tasks: dict[str, tuple[str, ...]], design: Design, tokens: Vocabulary | SubwordTokens, model: HardSharing
    ) -> None:
        self.tasks, self.design, self.tokens, self.model = tasks, design, tokens, model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def probabilities(self, task: str, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """The probability of each of the task's labels, (N, C) float64.

        Raises:
            KeyError: a task that the model does not have.
        """
        logits_NC = self.logits(self.index(task), self.encode(texts), batch_size=batch_size)
        return torch.softmax(logits_NC.double(), dim=1)

    def predict(self, task: str, texts: Sequence[str], *, batch_size: int = 64) -> list[Prediction]:
        """The likeliest label of each text, with its probability."""
        if not texts:
            return []
        best = self.probabilities(task, texts, batch_size=batch_size).max(dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Prediction(self.tasks[task][i], p) for i, p in pairs]

    def encode(self, texts: Sequence[str]) -> TokenIds:
        """Texts as the encoder reads them, on its device."""
        rows = [self.tokens.encode(t, max_tokens=self.design.max_tokens) for t in texts]
        return token_ids(rows, self.tokens.padding, self.device)

    def classes(self, task: str, labels: Sequence[str]) -> Tensor:
        """The places of labels among the task's, (N,), refusing labels that it does not have."""
        number = {label: i for i, label in enumerate(self.tasks[self.task(task)])}
        if strange := sorted(set(labels) - set(number)):
            raise ValueError(f"task {task!r}: expected the model's labels {list(number)}, found {strange}")
        return torch.tensor([number[x] for x in labels], dtype=torch.long)

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

    def score(self, task: str, texts: TokenIds, classes_N: Tensor, *, batch_size: int = 64) -> Score:
        """How the model fares on encoded texts and their classes."""
        logits_NC = self.logits(self.index(task), texts, batch_size=batch_size).double()
        loss, several = float(cross_entropy(logits_NC, classes_N)), logits_NC.shape[1]
        places_N = classes_N * several + logits_NC.argmax(dim=1)
        pairs_CC = torch.bincount(places_N, minlength=several**2).reshape(several, several).double()  # true, answered
        hits_C, true_C, said_C, n = pairs_CC.diagonal(), pairs_CC.sum(1), pairs_CC.sum(0), pairs_CC.sum()
        figures_3C = hits_C / said_C.clamp(min=1.0), hits_C / true_C.clamp(min=1.0), 2 * hits_C / (true_C + said_C)
        names = ("precision", "recall", "f1", "examples")
        rows = zip(*(x_C.nan_to_num().tolist() for x_C in (*figures_3C, true_C)), strict=True)
        classes = {label: dict(zip(names, row, strict=True)) for label, row in zip(self.tasks[task], rows, strict=True)}
        spread = ((n**2 - said_C @ said_C) * (n**2 - true_C @ true_C)).sqrt()
        mcc = float((hits_C.sum() * n - true_C @ said_C) / spread) if spread > 0 else 0.0
        return Score(float(hits_C.sum() / n), loss, len(classes_N), float(figures_3C[2].nanmean()), mcc, classes)

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
        design: or just the model: `textcnn`, `bilstm`, a folder or hub id (`id@revision`) of a Hugging Face encoder.
        vectors: a file in GloVe's format for a word model; None: random vectors of `dimension`.
        dimension, min_count: see `word_vectors`.
        seed: of every random start.
        device: where the model goes.

    Raises:
        ValueError: repeated tasks, word vectors for a Hugging Face encoder, an unreadable vector file, no such device.
    """
    check_device(device)
    design = Design(model=design) if isinstance(design, str) else design
    labels = dict(zip(task_names(t.name for t in tasks), (t.labels for t in tasks), strict=True))
    tokens: Vocabulary | SubwordTokens
    with seeded(seed):
        if design.takes_words:
            texts = (text for t in tasks for text in t.train.texts)
            words = word_vectors(texts, vectors, dimension=dimension, min_count=min_count, seed=seed)
            tokens, encoder = words.vocabulary, build_encoder(design, words.table_VD)
        elif vectors is not None:
            raise ValueError(f"vectors: {design.model} brings its own embedding; leave out {vectors}")
        else:
            tokens, encoder = _pretrained(design)
        model = HardSharing(encoder, [len(x) for x in labels.values()], dropout=design.dropout)
    return TextClassifier(labels, design, tokens, model.to(device))


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
        classes_N = classifier.classes(task.name, held.labels)
        scores[task.name] = classifier.score(task.name, classifier.encode(held.texts), classes_N, batch_size=batch_size)
    return scores


def _pretrained(design: Design) -> tuple[SubwordTokens, Pretrained]:
    from transformers import AutoModel, AutoTokenizer

    folder = resolve(design.model)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    longest = min(tokenizer.model_max_length, context_of(model.config) or math.inf)
    if design.max_tokens > longest:
        raise ValueError(f"max_tokens: {design.model} reads at most {longest} tokens, found {design.max_tokens}")
    return SubwordTokens(tokenizer), Pretrained(model)
