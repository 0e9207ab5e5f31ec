"""Families of models: each is measured, drawn from and searched as a plain forward would have it, or refused by name.

COUNTERPOISE_FAMILIES=all tries every family that transformers builds from a small config, in some ten minutes.
"""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, T5Config
from typer.testing import CliRunner

import families
from counterpoise.cli.app import app
from counterpoise.language import sampling, scoring
from counterpoise.language.loading import UNFIT, unmeasurable
from families import CONTEXTS, FAMILIES, PROMISES, build, config_of

ALWAYS = ("llama", "bert", "gemma2", "lfm2", "mamba2", "jamba", "falcon_h1", "recurrent_gemma", "rwkv", "minimax", "openai-gpt",
          "qwen3_next")  # fmt: skip
"""One of each kind: attention, an encoder that is told to decode, windows, convolutions, states, both, experts beside them."""
TRIED = FAMILIES if os.environ.get("COUNTERPOISE_FAMILIES") == "all" else ALWAYS
DOCS = Path(__file__).parents[1] / "docs" / "families.md"


@pytest.mark.parametrize("family", TRIED)
@pytest.mark.filterwarnings("ignore")
def test_a_family_is_measured_drawn_from_and_searched_or_named_in_the_docs(family: str) -> None:
    row = families.row(family)
    assert row == documented()[family]


def documented() -> dict[str, str]:
    """The rows of the table in docs/families.md by family."""
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}
