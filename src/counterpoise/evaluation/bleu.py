"""BLEU, sentence by sentence, so that it can be resampled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def bleu(answers: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Sufficient statistics of corpus BLEU from sacrebleu, shape (sentences, 10); see `counterpoise.statistics.bootstrap`."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("BLEU needs sacrebleu; pip install 'counterpoise[eval]'") from error
    metric = BLEU()
    rows = []
    for answer, reference in zip(answers, references, strict=True):
        found = metric.corpus_score([answer], [[reference]])
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
    return np.array(rows, dtype=np.float64)
