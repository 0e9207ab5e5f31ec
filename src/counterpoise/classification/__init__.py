"""Multi-task text classification: from labelled files to a saved model that answers.

```python
tasks = read_tasks("reviews/")                        # one csv, tsv or jsonl a task
classifier = build_classifier(tasks, "textcnn", vectors="glove.6B.50d.txt.gz")
run = train(tasks, classifier, "bandit")
print(evaluate(classifier, tasks))
save(classifier, "model/")
load("model/").predict("books", ["what a read"])
```
"""

from __future__ import annotations

from counterpoise.classification.balance import WEIGHTINGS, weighting_for
from counterpoise.classification.classifier import Prediction, TextClassifier, build_classifier, evaluate
from counterpoise.classification.data import LAYOUTS, Split, TaskData, read_tasks, weighted
from counterpoise.classification.models import Design, HardSharing, Pretrained, TextCNN
from counterpoise.classification.saving import export, load, save
from counterpoise.classification.targets import Score, Target
from counterpoise.classification.training import Epoch, Training, rounds_per_epoch, train
from counterpoise.classification.vectors import Vocabulary, read_vectors, tokenize, word_vectors

__all__ = [
    "LAYOUTS", "WEIGHTINGS", "Design", "Epoch", "HardSharing", "Prediction", "Pretrained", "Score", "Split",
    "Target", "TaskData", "TextCNN", "TextClassifier", "Training", "Vocabulary", "build_classifier", "evaluate", "export",
    "load", "read_tasks", "read_vectors", "rounds_per_epoch", "save", "tokenize", "train", "weighted", "weighting_for",
    "word_vectors",
]  # fmt: skip
