"""Plotly figures as svg files, drawn by a headless Chromium."""

from __future__ import annotations

import sys
import tempfile
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from report.browser import find, running


def save(figures: Mapping[str, Any], folder: Path, *, width: int = 860, height: int = 480) -> None:
    """Write folder/NAME.svg for each.

    Raises:
        SystemExit: no Chromium.
    """
    from plotly.offline import get_plotlyjs

    binary = find()
    if binary is None:
        raise SystemExit("expected a Chromium on the PATH or named by CHROMIUM, found none")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, running(binary) as browser:
        page = Path(place) / "page.html"
        page.write_text(f"<!doctype html><meta charset=utf-8><script>{get_plotlyjs()}</script>", encoding="utf-8")
        browser.open(page)
        for name, figure in figures.items():
            settings = f"{{format: 'svg', width: {width}, height: {height}}}"
            url = browser.value(f"Plotly.toImage({figure.to_json()}, {settings})")
            (folder / f"{name}.svg").write_text(urllib.parse.unquote(url.split(",", 1)[1]) + "\n", encoding="utf-8")
