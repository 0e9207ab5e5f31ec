"""Draw the front of one seed of the demo, for the first page of the docs.

    python experiments/demo/figure.py [SEED]

From the committed results/seed-N.json (0 unless said otherwise); writes docs/figures/demo-front.svg. Needs a Chromium on
the PATH, or named by CHROMIUM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from counterpoise.report.plots import plot_front
from counterpoise.tables import reading

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from drawing import save  # noqa: E402


def main(seed: str = "0") -> None:
    """Write the figure."""
    content = json.loads((HERE / "results" / f"seed-{seed}.json").read_text(encoding="utf-8"))
    figure = plot_front(content, reading.RETENTION, "validation")
    save({"demo-front": figure}, HERE.parent.parent / "docs" / "figures", width=760, height=440)


if __name__ == "__main__":
    main(*sys.argv[1:])
