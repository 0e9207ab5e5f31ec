"""Set by importing it, before anything that reads it: no network, plain and wide output, no pools that forget about forks."""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "200",
    "TERM": "dumb",
    "NO_COLOR": "1",
}
