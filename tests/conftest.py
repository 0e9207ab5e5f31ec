"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("shared machines", deadline=None)  # time says nothing of a property where others compute too
settings.load_profile("shared machines")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models and data."""
    folder = os.environ.get("COUNTERPOISE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("COUNTERPOISE_DATA names no folder of real models and data")
    return Path(folder)
