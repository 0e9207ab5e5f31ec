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

from .balance import WEIGHTINGS, weighting_for
from .classifier import Prediction, Score, TextClassifier, build_classifier, evaluate
from .data import LAYOUTS, Part, TaskData, read_tasks
from .models import BiLSTM, Design, HardSharing, Pretrained, TextCNN
from .saving import load, save
from .training import Epoch, Training, rounds_per_epoch, train
from .vectors import Vocabulary, read_vectors, tokenize, word_vectors

__all__ = [
    "LAYOUTS",
    "WEIGHTINGS",
    "BiLSTM",
    "Design",
    "Epoch",
    "HardSharing",
    "Part",
    "Prediction",
    "Pretrained",
    "Score",
    "TaskData",
    "TextCNN",
    "TextClassifier",
    "Training",
    "Vocabulary",
    "build_classifier",
    "evaluate",
    "load",
    "read_tasks",
    "read_vectors",
    "rounds_per_epoch",
    "save",
    "tokenize",
    "train",
    "weighting_for",
    "word_vectors",
]
