"""A share of the fuzzing and of the kills, of fixed seeds; the long runs are by hand, see docs/explanation/reliability.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz import kills, run
from fuzz.cases import TARGETS

CASES, KILLS = 160, 15  # every target, and each command by each signal


@pytest.fixture(autouse=True)
def _back_again() -> Iterator[None]:
    """The commands run in folders and an environment of their own."""
    before, environment = os.getcwd(), dict(os.environ)
    yield
    os.chdir(before)
    os.environ.clear()
    os.environ.update(environment)


def test_broken_files_end_in_a_right_result_or_one_clear_line(tmp_path: Path) -> None:
    found: dict[str, object] = {}
    run.fuzz(run.World(tmp_path), range(CASES), 0, found)
    assert found["targets"].keys() == {t.name for t in TARGETS}  # type: ignore[union-attr]
    failures: list[dict[str, str]] = found["failures"]  # type: ignore[assignment]
    assert not failures, "\n\n".join(f"{f['case']} {f['target']}: {f['verdict']}\n{f['said'][-400:]}" for f in failures)


def test_killed_commands_leave_nothing_torn_and_are_made_up_for(tmp_path: Path) -> None:
    world = kills.World(tmp_path)
    found = [world.kill(number, 0) for number in range(KILLS)]
    assert {sign for _, sign, _ in found} == {s.name for s in kills.SIGNALS}
    assert not [f for f in found if f[2] not in ("finished", "stopped")]
