"""Loading models without noise, and refusing those that write no text before anything of them is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterpoise.checkpoints.configs import understood
from counterpoise.checkpoints.files import CheckpointError, first_line, hub_id, read_json
from counterpoise.checkpoints.naming import writer_of

POSITIONS = "whose positions transformers counts in another way when it generates"
UNFIT = {
    "cpmant": "which reads in both directions",
    "reformer": "which takes no gradients outside training",
    "xlnet": "which reads in both directions",
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm", "xlm-roberta", "xlm-roberta-xl",
                     "xmod"), POSITIONS),
}  # fmt: skip
"""Families with a causal class that do not pass tests/families.py; docs/explanation/families.md has the whole table."""


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """transformers draws no progress bars of its own inside, which would tear ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def refuse_damaged(model: Any, source: str | Path) -> None:
    """Raise a CheckpointError for weights that are NaN or infinite: what such a model says may be numbers all the same."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            low, high = parameter.detach().aminmax()  # a NaN is both; nothing of the tensor's size is made
            if not (low.isfinite() and high.isfinite()):
                raise CheckpointError(
                    f"{source}: expected finite weights, found NaN or Inf in {name}; the file is damaged, or training diverged"
                )


def refuse_unmeasurable(*sources: str | Path) -> None:
    """Raise for a model that cannot be sampled from and scored, by its config alone.

    What is no checkpoint at all, and an adapter, whose base is the model, pass: others speak of them.

    Raises:
        CheckpointError: an encoder-decoder, a masked language model, a family that writes no text, one of `UNFIT`.
    """
    from transformers import AutoConfig

    for source in sources:
        name, revision = hub_id(source) or ("", None)
        if (place := Path(source).expanduser() / "config.json").is_file():
            name = str(place.parent)
            understood(read_json(place), place)  # values of the wrong type are refused in one place
        if not name:
            continue
        try:
            config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
        except OSError:
            continue
        except (ValueError, KeyError) as error:
            said = first_line(error).rstrip(".")
            raise CheckpointError(f"{source}: expected the config of a causal language model, found: {said}") from None
        writer_of(config, str(source))
        if (why := unfit(config)) is not None:
            raise CheckpointError(
                f"{source}: expected a causal language model, found {config.model_type}, {why}; such models can be averaged, "
                "merged and diffed, not measured, searched or aligned"
            )


def unfit(config: Any) -> str | None:
    """Why a model with a head that writes text cannot be sampled from and scored all the same; None where it can."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    one_way = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if (type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "bert-generation") and not one_way:
        return "a masked language model: its config does not say is_decoder"
    return UNFIT.get(config.model_type)
