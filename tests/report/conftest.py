"""What the tests of pages share: no plotly.js where nothing draws, and one browser a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from counterpoise.report import page
from report import browser


@pytest.fixture(autouse=True)
def _without_plotly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """plotly.js has 5 MB; only a browser needs it."""
    if "tab" not in request.fixturenames:
        monkeypatch.setattr(page, "plotly_script", lambda: ("", ""))


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Browser]:
    binary = browser.find()
    if binary is None:
        pytest.skip(f"no browser found: put one of {', '.join(browser.NAMES)} on PATH, or its path into CHROMIUM")
    with browser.running(binary) as found:
        yield found
