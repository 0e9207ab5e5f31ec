"""Sequence-classification models as rewards: loaded whole or as a LoRA adapter, and scored in batches as each row alone."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoise.checkpoints.files import CheckpointError, first_line, hub_id, read_json, resolve
from counterpoise.checkpoints.headers import read_header
from counterpoise.checkpoints.lora import ADAPTER
from counterpoise.language.dtypes import placed
from counterpoise.language.loading import refuse_damaged, without_bars
from counterpoise.language.templates import has_template, render
from counterpoise.language.ways import context_of

Row = dict[str, list[int]]
"""One text as a tokenizer gives it, without padding."""


class AdapterReward(NamedTuple):
    """A LoRA adapter that is a reward.

    Attributes:
        base: the folder or hub id of its base model.
        labels: outputs of the head that it holds; None where the head is the base's.
        given: names of the base's tensors that it holds whole.
    """

    folder: Path
    base: str
    labels: int | None
    given: frozenset[str]


def adapter_of(source: str) -> AdapterReward | None:
    """The adapter at a folder or hub id, read from its config and its file's header; None where that is a whole model.

    Raises:
        ValueError: not of a classifier, or without its base.
        CheckpointError: its files are missing or damaged.
        ModuleNotFoundError: peft is not installed.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    name, revision = hub_id(source) or (source, None)
    if find_adapter_config_file(name, revision=revision) is None:
        return None
    if find_spec("peft") is None:
        raise ModuleNotFoundError(f"reward {source}: a LoRA adapter needs peft; pip install 'counterpoise[align]'")
    folder = resolve(source)
    settings = read_json(folder / "adapter_config.json")
    if (settings.get("peft_type"), settings.get("task_type")) != ("LORA", "SEQ_CLS"):
        found = f"peft_type {settings.get('peft_type')!r}, task_type {settings.get('task_type')!r}"
        raise ValueError(f"reward {source}: expected a LoRA adapter of a sequence classifier (SEQ_CLS), found {found}")
    base = settings.get("base_model_name_or_path")
    away = str(base).startswith((".", "/", "~")) or str(base).count("/") > 1
    if not isinstance(base, str) or not base or (away and not Path(base).expanduser().is_dir()):
        raise ValueError(
            f"reward {source}: expected its base model at {base!r} (base_model_name_or_path of adapter_config.json), found "
            "nothing there; put it back or correct the path"
        )
    if not (folder / ADAPTER).is_file():
        raise CheckpointError(f"reward {source}: expected {ADAPTER} beside adapter_config.json, found none")
    whole = {
        name.removeprefix("base_model.model."): entry.shape
        for name, entry in read_header(folder / ADAPTER).items()
        if any(f".{part}." in name for part in settings.get("modules_to_save") or ())
    }
    outputs = [shape[0] for shape in whole.values() if len(shape) == 2]  # a head's last layer is its narrowest
    return AdapterReward(folder, str(Path(base).expanduser()), min(outputs, default=None), frozenset(whole))


def refuse_labels(source: str, labels: int) -> None:
    """Raise a ValueError for a model of more outputs than two."""
    if labels not in (1, 2):
        raise ValueError(f"reward {source}: expected a model of one or two outputs, found {labels}")


def load_classifier(source: str, device: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a reward, on its device.

    Raises:
        ValueError: a head that was not trained, an adapter that does not fit its base, more than two outputs.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    adapter = adapter_of(source)
    whole = adapter.base if adapter else source
    name, revision = hub_id(whole) or (whole, None)
    settings: dict[str, Any] = {"revision": revision} if revision else {}
    settings["trust_remote_code"] = False  # unset, transformers asks at the terminal
    own = adapter is not None and (adapter.folder / "tokenizer_config.json").is_file()
    more = {"num_labels": adapter.labels, "ignore_mismatched_sizes": True} if adapter and adapter.labels else {}
    try:
        with without_bars():
            words = (str(adapter.folder), {"trust_remote_code": False}) if adapter and own else (name, settings)
            tokenizer = AutoTokenizer.from_pretrained(words[0], **words[1])
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name, output_loading_info=True, **settings, **more
            )
    except OSError as error:
        of = f"its base {name}" if adapter else "a sequence-classification model"
        raise ValueError(f"reward {source}: expected {of}, found: {first_line(error)}") from None
    lacking = {*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])}
    if missing := sorted(lacking - (adapter.given if adapter else frozenset())):
        raise ValueError(
            f"reward {source}: expected a trained sequence-classification model, found no {missing[0]} in it (a language "
            "model without a reward head?); its scores would be random"
        )
    refuse_damaged(model, f"reward {source}")
    if adapter:
        model = _merged(source, model, adapter.folder)
    refuse_labels(source, model.config.num_labels)
    return placed(model, device), tokenizer


def _merged(source: str, model: Any, folder: Path) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (RuntimeError, ValueError, UserWarning) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"reward {source}: the adapter does not fit its base model ({said})") from None


class Classifier:
    """(prompts, responses) -> the model's one output, or the log-odds of the second of two.

    Prompt and response go through the tokenizer's chat template where it has one, else as a text pair. A batch gives what
    each row gives alone: rows are filled on the right with a token that is in none of them, as decoders score the last
    token that is not the padding's (which may well be the end of the text). Where a first batch shows that an
    architecture is not scored alike even so, rows are scored one at a time.
    """

    def __init__(self, source: str, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.source, self.model, self.tokenizer, self.batch_size = source, model, tokenizer, batch_size
        self.limit = int(min(tokenizer.model_max_length, _positions(model.config.get_text_config())))
        self._alike: bool | None = None
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        values: list[float] = []
        for start in range(0, len(responses), self.batch_size):
            stop = start + self.batch_size
            logits = self._logits(self._rows(prompts[start:stop], responses[start:stop])).double()
            values += (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()
        return values

    def _rows(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Row]:
        options = {"truncation": True, "max_length": self.limit}
        if has_template(self.tokenizer):
            pairs = zip(prompts, responses, strict=True)
            try:
                texts = [render(self.tokenizer, (("user", p), ("assistant", r))) for p, r in pairs]
            except ValueError as error:
                raise ValueError(f"reward {self.source}: {error}") from None
            found = self.tokenizer(texts, add_special_tokens=False, **options)  # the template has written them
        else:
            found = self.tokenizer(list(prompts), list(responses), **options)
        if max(map(len, found["input_ids"])) >= self.limit:
            warnings.warn(
                f"reward {self.source}: some prompts with their responses fill its {self.limit} tokens, what goes beyond is "
                "cut off and not rated; shorten them or take a model of a longer context",
                stacklevel=4,
            )
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]

    def _logits(self, rows: list[Row]) -> Tensor:
        """Shape (rows, outputs)."""
        sizes = [len(row["input_ids"]) for row in rows]
        if self._alike is False:
            return torch.cat([self._forward([row]) for row in rows])
        together = self._forward(rows)
        if self._alike is None and min(sizes) < max(sizes):
            shortest = sizes.index(min(sizes))
            alone, tolerance = self._forward([rows[shortest]])[0], torch.finfo(self.model.dtype).eps ** 0.5
            self._alike = torch.allclose(alone, together[shortest], rtol=tolerance, atol=tolerance)
            if not self._alike:
                warnings.warn(
                    f"reward {self.source}: padding changes its scores, so responses are scored one at a time",
                    stacklevel=5,
                )
                return self._logits(rows)
        return together

    def _forward(self, rows: list[Row]) -> Tensor:
        text, longest = self.model.config.get_text_config(), max(len(row["input_ids"]) for row in rows)
        spare = spare_token([row["input_ids"] for row in rows], self.tokenizer, self.model)
        if spare is None and len(rows) > 1:  # every word there is stands in them
            return torch.cat([self._forward([row]) for row in rows])
        fill = {"input_ids": spare or 0, "token_type_ids": self.tokenizer.pad_token_type_id}
        batch = {
            name: torch.tensor([row[name] + [fill.get(name, 0)] * (longest - len(row[name])) for row in rows])
            for name in {**rows[0], "attention_mask": None}
            if name in rows[0]
        }
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(longest) < sizes[:, None]).long()
        device = next(self.model.parameters()).device
        with self._lock:  # a reward may be asked from several threads
            text.pad_token_id = self.model.config.pad_token_id = spare
            out: Tensor = self.model(**{name: values.to(device) for name, values in batch.items()}).logits
        return out.float()


def spare_token(rows: Sequence[Sequence[int]], tokenizer: Any, model: Any) -> int | None:
    """A token that is in no row: the tokenizer's padding, else the first of the vocabulary; None where all are."""
    used = {token for row in rows for token in row}
    words = range(getattr(model.config.get_text_config(), "vocab_size", None) or len(tokenizer))
    return next((i for i in (tokenizer.pad_token_id, *words) if i is not None and i not in used), None)


def _positions(config: Any) -> int:
    """How many tokens a model has positions for; RoBERTa's begin after the padding's."""
    positions = context_of(config) or 512
    offset = config.model_type in ("camembert", "longformer", "roberta", "xlm-roberta")
    return positions - offset * (int(getattr(config, "pad_token_id", None) or 0) + 1)
