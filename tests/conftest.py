"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("shared machines", deadline=None)  # time says nothing of a property where others compute too
settings.load_profile("shared machines")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """Each worker begins with a part of the files and takes from another when it is done: dealt out test by test, nearly
    every fixture of a file would be made by all of them."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models and data."""
    folder = os.environ.get("COUNTERPOISE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("COUNTERPOISE_DATA names no folder of real models and data")
    return Path(folder)
