"""Rewards: (prompts, responses) in, one number per response out, higher is better."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from counterpoise.checkpoints.hashing import sha256
from counterpoise.checkpoints.reading import read_text, table
from counterpoise.evaluation.grader import Grader
from counterpoise.evaluation.specs import RewardSpec, imported
from counterpoise.language.engine import LanguageModel
from counterpoise.language.prompts import Prompt, encode_prompt
from counterpoise.language.sampling import Drawing, decode, sample_together
from counterpoise.language.scoring import Example
from counterpoise.ranks import from_first
from counterpoise.records import Progress, digest
from counterpoise.statistics.bootstrap import Array

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def load_reward(spec: str | Reward, *, device: str = "cpu", batch_size: int = 16) -> Reward:
    """The reward that `spec` names, or that it is.

    Args:
        spec: one of
            `sentiment:FILE.csv`: log-odds of "positive" under a bag-of-words classifier fitted to FILE (columns text
            and label, 0 or 1; may be gzipped);
            `FILE.py:function` or `module:function`: a Python callable over (prompts, responses), the module importable
            from here;
            `http(s)://HOST/v1?model=NAME&rubric=FILE`: grades of an OpenAI-compatible endpoint, see `grader.Grader`;
            anything else: a sequence-classification model or a LoRA adapter on one, a local folder or a hub id
            (`id@revision` allowed).
        device, batch_size: for a model.
    """
    if not isinstance(spec, str):
        return checked(spec, name_of(spec))
    match RewardSpec.read(spec):
        case RewardSpec("sentiment", _, file):
            return checked(sentiment(file), spec)
        case RewardSpec("function", module, function):
            return checked(python_reward(module, function), spec)
        case RewardSpec("endpoint", _, _):
            return checked(Grader.read(spec), spec)
    return checked(classifier(spec, device=device, batch_size=batch_size), spec)


def checked(reward: Reward, name: str) -> Reward:
    """`reward`, refusing a wrong number of scores or one that is not finite."""

    def scores(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        given: Any = reward(prompts, responses)
        if hasattr(given, "detach"):  # a tensor, perhaps in bfloat16 or on a GPU
            given = given.detach().double().cpu()
        try:
            values = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward {name}: expected a list of numbers, found {given!r:.80} ({error})") from None
        if values.shape != (len(responses),):
            raise ValueError(
                f"reward {name}: expected {len(responses)} numbers, one per response, "
                f"found an array of shape {values.shape}"
            )
        if not np.isfinite(values).all():
            worst = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(
                f"reward {name}: expected finite numbers, found {values[worst]} for the response "
                f"{responses[worst][:80]!r}; clip or repair the reward"
            )
        return [float(v) for v in values]

    return scores


def rate(
    reward: Reward, tokenizer: Any, prompts: Sequence[Prompt], responses: Sequence[Sequence[tuple[int, ...]]]
) -> Array:
    """The rewards of n responses to each prompt, given as token ids: shape (prompts, n)."""
    asked = [p.text for p, group in zip(prompts, responses, strict=True) for _ in group]
    scores = reward(asked, decode(tokenizer, [ids for group in responses for ids in group]))
    return np.asarray(scores, dtype=np.float64).reshape(len(prompts), -1)


@dataclass(frozen=True)
class Rated:
    """Responses with rewards, n of each prompt in a row.

    Attributes:
        rewards: shape (prompts, n).
    """

    examples: tuple[Example, ...]
    rewards: Array


def draw_rated(
    model: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    drawing: Drawing,
    *,
    progress: Progress | None = None,
) -> Rated:
    """Responses to each prompt, none selected, with their rewards; processes that have met share the drawing."""
    encoded = [encode_prompt(tokenizer, p, chat=drawing.chat) for p in prompts]
    drawn = sample_together(model, tokenizer, encoded, drawing, progress=progress)
    examples = tuple(Example(p, y) for p, group in zip(encoded, drawn, strict=True) for y in group)
    return Rated(examples, from_first(lambda: rate(reward, tokenizer, prompts, drawn)))


def sentiment(path: str | Path) -> Reward:
    """Log-odds of a positive text: TF-IDF of words and word pairs, logistic regression, fitted to `path` at each load.

    Needs scikit-learn. The fit is deterministic. The prompt is not looked at.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the reward sentiment: needs scikit-learn; pip install 'counterpoise[eval]'"
        ) from error
    texts, labels = read_labelled(Path(path))
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=100_000, sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    model.fit(texts, labels)

    def log_odds(prompts: Sequence[str], responses: Sequence[str]) -> Sequence[float]:
        return model.decision_function(list(responses)).tolist() if responses else []

    return log_odds


def read_labelled(path: Path) -> tuple[list[str], list[int]]:
    records = [(row["text"], row["label"].strip()) for _, row in table(read_text(path), str(path), "text", "label")]
    labels = {label for _, label in records}
    if labels != {"0", "1"}:
        raise ValueError(f"{path}: expected the labels 0 and 1, found {sorted(labels)[:5]}")
    return [text for text, _ in records], [int(label) for _, label in records]


def python_reward(module: str, function: str) -> Reward:
    try:
        found: Reward | None = imported(module, function)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reward {module}:{function}: no module {error.name!r} can be imported from here; expected FILE.py:function, "
            "module:function, sentiment:FILE.csv, an endpoint's URL, a model folder or a hub id"
        ) from None
    if found is None:
        raise ValueError(f"reward {module}:{function}: {module} has no callable named {function!r}")
    return found


def classifier(source: str, *, device: str = "cpu", batch_size: int = 16) -> Reward:
    """A sequence-classification model, or a LoRA adapter on one, as a reward; see `classifiers`."""
    from counterpoise.evaluation.classifiers import Classifier, load_classifier

    return Classifier(source, *load_classifier(source, device), batch_size)


def fingerprint(reward: str | Reward) -> str:
    """What decides a reward's numbers: its spec or name with the content of the file, folder or source behind it."""
    if not isinstance(reward, str):
        return digest([name_of(reward), _source(reward)])
    kind, head, tail = RewardSpec.read(reward)
    if kind == "endpoint":
        return Grader.read(reward).fingerprint
    if kind == "function" and head.endswith(".py"):
        return digest([tail, sha256(Path(head))])
    for place in (Path(tail or "."), Path(reward)):
        if place.is_file():
            return digest([head, sha256(place)])
    if Path(reward).is_dir():
        from counterpoise.evaluation.classifiers import adapter_of

        files = sorted(f for f in Path(reward).iterdir() if f.is_file())
        found = [[f.name, sha256(f)] for f in files]
        adapter = adapter_of(reward)
        return digest(found if adapter is None else [*found, fingerprint(adapter.base)])
    module = sys.modules.get(head) if tail else None
    return reward if module is None else digest([reward, _source(module)])


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def name_of(reward: str | Reward) -> str:
    """What results call a reward: its spec, or where its function stands."""
    if isinstance(reward, str):
        return reward
    return f"{getattr(reward, '__module__', '')}:{getattr(reward, '__qualname__', 'reward')}"
