"""Draw the figures of a results file as svg, from committed json: the front, the ratios, the tax.

    python experiments/figures.py experiments/hma/results/real_run.json experiments/hma/figures

Needs a Chromium on the PATH (or named by CHROMIUM); the figures are those of report.html.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.parse
from pathlib import Path

from counterpoise.records import write_whole
from counterpoise.report.html import report_page

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from report.browser import find, running

SIZES = {"front": (860, 560), "ratios": (860, 360), "taxes": (860, 420)}


def main(results: str, folder: str) -> None:
    """Write one svg a figure."""
    binary = find()
    if binary is None:
        raise SystemExit("expected a Chromium on the PATH or named by CHROMIUM, found none")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, running(binary) as browser:
        page = Path(place) / "report.html"
        write_whole(page, report_page(json.loads(Path(results).read_text(encoding="utf-8"))))
        browser.open(page)
        for name, (width, height) in SIZES.items():
            place_of = f"document.querySelector('[data-figure={name}]')"
            if not browser.value(f"!!{place_of}"):
                continue
            url = browser.value(f"Plotly.toImage({place_of}, {{format: 'svg', width: {width}, height: {height}}})")
            drawing = urllib.parse.unquote(url.split(",", 1)[1])
            Path(folder, f"{name}.svg").write_text(drawing + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
