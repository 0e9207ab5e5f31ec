"""Training through TRL without its own bars, tables and printed log lines: ours are in one place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from counterpoise.language.loading import without_bars


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars of datasets and transformers, no reports of loading, no deprecations of settings that TRL sets."""
    import datasets
    from transformers.utils import logging

    shown, level = datasets.is_progress_bar_enabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with without_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def without_printing(trainer: Any) -> Any:
    """The trainer, its log lines kept in `trainer.state.log_history` and not printed."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer
