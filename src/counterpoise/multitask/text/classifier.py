"""A multi-task text classifier: texts in, labels with probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoise.checkpoint import resolve
from counterpoise.multitask.losses import task_names

from .data import Part, PartName, TaskData
from .models import Design, HardSharing, Pretrained, build_encoder, pad
from .vectors import Vocabulary, word_vectors


class Prediction(NamedTuple):
    """The likeliest label of a text and its probability."""

    label: str
    probability: float


class Score(NamedTuple):
    """How a task fares on a part: share of right labels, mean cross-entropy in nats, number of examples."""

    accuracy: float
    loss: float
    examples: int


class Encoded(NamedTuple):
    """A part as numbers: token ids and classes, one entry per example."""

    rows: list[list[int]]
    labels_N: Tensor


class SubwordTokens:
    """A Hugging Face tokenizer with the calls of a `Vocabulary`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.padding = 0 if filler is None else int(filler)

    def encode(self, text: str, *, max_tokens: int) -> list[int]:
        """The ids of the first `max_tokens` tokens, with the tokenizer's own first and last ones; at least one."""
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
        return ids or [self.padding]


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
        rows = [self.tokens.encode(t, max_tokens=self.design.max_tokens) for t in texts]
        return torch.softmax(self.logits(self.index(task), rows, batch_size=batch_size).double(), dim=1)

    def predict(self, task: str, texts: Sequence[str], *, batch_size: int = 64) -> list[Prediction]:
        """The likeliest label of each text, with its probability."""
        if not texts:
            return []
        best = self.probabilities(task, texts, batch_size=batch_size).max(dim=1)
        labels = self.tasks[task]
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Prediction(labels[i], p) for i, p in pairs]

    def encode(self, task: str, part: Part, where: str = "") -> Encoded:
        """A part as numbers, refusing labels that the task does not have."""
        labels = self.tasks[self.task(task)]
        number = {label: i for i, label in enumerate(labels)}
        if strange := sorted(set(part.labels) - set(number)):
            raise ValueError(f"task {task!r}{where}: expected the model's labels {list(labels)}, found {strange}")
        rows = [self.tokens.encode(t, max_tokens=self.design.max_tokens) for t in part.texts]
        return Encoded(rows, torch.tensor([number[x] for x in part.labels], dtype=torch.long))

    @torch.no_grad()
    def logits(self, task: int, rows: Sequence[list[int]], *, batch_size: int = 64) -> Tensor:
        """One task's logits, (N, C) on the CPU, without dropout. Texts of like length share a batch."""
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        logits_NC = torch.empty(len(rows), len(self.tasks[list(self.tasks)[task]]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids_BT, mask_BT = pad([rows[i] for i in chosen], self.tokens.padding, self.device)
            logits_NC[chosen] = self.model.logits(self.model(ids_BT, mask_BT), task).float().cpu()
        self.model.train(was_training)
        return logits_NC

    def score(self, task: str, part: Encoded, *, batch_size: int = 64) -> Score:
        """Accuracy and mean cross-entropy on an encoded part."""
        logits_NC = self.logits(self.index(task), part.rows, batch_size=batch_size).double()
        right = (logits_NC.argmax(dim=1) == part.labels_N).double().mean()
        loss = torch.nn.functional.cross_entropy(logits_NC, part.labels_N)
        return Score(float(right), float(loss), len(part.rows))

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
        ValueError: repeated tasks, word vectors for a Hugging Face encoder, an unreadable vector file.
    """
    design = Design(model=design) if isinstance(design, str) else design
    names = task_names(t.name for t in tasks)
    labels = dict(zip(names, (t.labels for t in tasks), strict=True))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens: Vocabulary | SubwordTokens
        if design.takes_words:
            texts = (text for t in tasks for text in t.train.texts)
            words = word_vectors(texts, vectors, dimension=dimension, min_count=min_count, seed=seed)
            tokens, encoder = words.vocabulary, build_encoder(design, words.table_VD)
        else:
            if vectors is not None:
                raise ValueError(f"vectors: {design.model} brings its own embedding; leave out {vectors}")
            tokens, encoder = _pretrained(design)
        model = HardSharing(encoder, [len(x) for x in labels.values()], dropout=design.dropout)
    return TextClassifier(labels, design, tokens, model.to(device))


def evaluate(
    classifier: TextClassifier, tasks: Sequence[TaskData], part: PartName = "test", *, batch_size: int = 64
) -> dict[str, Score]:
    """The score of every task on one part of its data.

    Raises:
        KeyError: a task that the model does not have.
        ValueError: an empty part, or labels that the model does not know.
    """
    scores = {}
    for task in tasks:
        if not len(task.part(part)):
            raise ValueError(f"task {task.name!r}: expected examples for {part}, found none")
        encoded = classifier.encode(task.name, task.part(part), f", {part}")
        scores[task.name] = classifier.score(task.name, encoded, batch_size=batch_size)
    return scores


def _pretrained(design: Design) -> tuple[SubwordTokens, Pretrained]:
    from transformers import AutoModel, AutoTokenizer

    folder = resolve(design.model)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return SubwordTokens(AutoTokenizer.from_pretrained(folder)), Pretrained(model)
