"""Rewards: (prompts, responses) in, one number per response out, higher is better."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from counterpoise.checkpoints.hashing import sha256
from counterpoise.checkpoints.reading import read_text
from counterpoise.classification.files import table_rows
from counterpoise.evaluation.specs import RewardSpec, imported
from counterpoise.language.prompts import Prompt, encode_prompt
from counterpoise.language.sampling import Drawing, decode, sample
from counterpoise.language.scoring import Example
from counterpoise.records import Progress, digest
from counterpoise.statistics.bootstrap import Array

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def load_reward(spec: str | Reward, *, device: str = "cpu", batch_size: int = 16) -> Reward:
    """The reward that `spec` names, or that it is.

    Args:
        spec: one of
            `sentiment:FILE.csv`: log-odds of "positive" under a bag-of-words classifier fitted to FILE (columns text
            and label, 0 or 1; may be gzipped);
            `module:function`: a Python callable over (prompts, responses), importable from here;
            anything else: a sequence-classification model, a local folder or a hub id (`id@revision` allowed).
        device, batch_size: for a model.
    """
    if not isinstance(spec, str):
        return checked(spec, name_of(spec))
    match RewardSpec.read(spec):
        case RewardSpec("sentiment", _, file):
            return checked(sentiment(file), spec)
        case RewardSpec("function", module, function):
            return checked(python_reward(module, function), spec)
    return checked(classifier(spec, device=device, batch_size=batch_size), spec)


def checked(reward: Reward, name: str) -> Reward:
    """`reward`, refusing a wrong number of scores or one that is not finite."""

    def scores(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        given: Any = reward(prompts, responses)
        if hasattr(given, "detach"):  # a tensor, perhaps in bfloat16 or on a GPU
            given = given.detach().double().cpu()
        values = np.asarray(given, dtype=np.float64)
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
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    drawing: Drawing,
    *,
    progress: Progress | None = None,
) -> Rated:
    """Responses to each prompt, none selected, with their rewards."""
    encoded = [encode_prompt(tokenizer, p, chat=drawing.chat) for p in prompts]
    drawn = sample(model, tokenizer, encoded, drawing, progress=progress)
    examples = tuple(Example(p, y) for p, group in zip(encoded, drawn, strict=True) for y in group)
    return Rated(examples, rate(reward, tokenizer, prompts, drawn))


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
    records = list(table_rows(read_text(path), str(path)))
    labels = {label for _, label in records}
    if labels != {"0", "1"}:
        raise ValueError(f"{path}: expected the labels 0 and 1, found {sorted(labels)[:5]}")
    return [text for text, _ in records], [int(label) for _, label in records]


def python_reward(module: str, function: str) -> Reward:
    try:
        found: Reward | None = imported(module, function)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reward {module}:{function}: no module {error.name!r} can be imported from here; expected "
            "module:function, sentiment:FILE.csv, a model folder or a hub id"
        ) from None
    if found is None:
        raise ValueError(f"reward {module}:{function}: {module} has no callable named {function!r}")
    return found


def _positions(config: Any) -> int:
    """How many tokens a model has positions for; RoBERTa's begin after the padding's."""
    positions = int(getattr(config, "max_position_embeddings", 512))
    offset = config.model_type in ("camembert", "longformer", "roberta", "xlm-roberta")
    return positions - offset * (int(config.pad_token_id) + 1)


def classifier(source: str, *, device: str = "cpu", batch_size: int = 16) -> Reward:
    """A sequence-classification model as a reward: its one output, or the log-odds of the last of two labels.

    Prompt and response go through the model's own chat template when it has one, else as a text pair.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from counterpoise.language.dtypes import placed

    name, _, revision = source.partition("@")
    settings: dict[str, Any] = {"revision": revision or None} if not Path(source).exists() else {}
    name = name if settings else source
    settings["trust_remote_code"] = False  # unset, transformers asks at the terminal
    tokenizer = AutoTokenizer.from_pretrained(name, **settings)
    model, found = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **settings)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"reward {source}: expected a trained sequence-classification model, found no {missing[0]} in it (a language "
            "model without a reward head?); its scores would be random"
        )
    model = placed(model, device)
    if model.config.num_labels not in (1, 2):
        raise ValueError(f"reward {source}: expected a model of one or two outputs, found {model.config.num_labels}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id

    limit = min(tokenizer.model_max_length, _positions(model.config))

    def encode(prompts: Sequence[str], responses: Sequence[str]) -> Any:
        options = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
        if getattr(tokenizer, "chat_template", None):
            chats = [
                [{"role": "user", "content": p}, {"role": "assistant", "content": r}]
                for p, r in zip(prompts, responses, strict=True)
            ]
            texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in chats]
            return tokenizer(texts, add_special_tokens=False, **options)  # the template has written them
        return tokenizer(list(prompts), list(responses), **options)

    @torch.no_grad()
    def score(prompts: Sequence[str], responses: Sequence[str]) -> Sequence[float]:
        values: list[float] = []
        for start in range(0, len(responses), batch_size):
            stop = start + batch_size
            batch = encode(prompts[start:stop], responses[start:stop]).to(device)
            if batch["input_ids"].shape[1] >= limit:
                warnings.warn(
                    f"reward {source}: some prompts with their responses fill its {limit} tokens, what goes beyond is cut "
                    "off and not rated; shorten them or take a model of a longer context",
                    stacklevel=2,
                )
            logits = model(**batch).logits.double()
            values += (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()
        return values

    return score


def fingerprint(reward: str | Reward) -> str:
    """What decides a reward's numbers: its spec or name with the content of the file, folder or source behind it."""
    if not isinstance(reward, str):
        return digest([name_of(reward), _source(reward)])
    _, head, tail = RewardSpec.read(reward)
    for place in (Path(tail or "."), Path(reward)):
        if place.is_file():
            return digest([head, sha256(place)])
    if Path(reward).is_dir():
        files = sorted(f for f in Path(reward).iterdir() if f.is_file())
        return digest([[f.name, sha256(f)] for f in files])
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
