"""What a device has left."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterpoise.language.memory import free_memory


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="/proc/meminfo: Linux alone has it")
def test_pages_of_files_count_as_free_memory(tmp_path: Path) -> None:
    said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(said["MemAvailable"].split()[0])
    assert free_memory("cpu") == pytest.approx(available, rel=0.2)


def test_of_a_device_that_is_not_known_nothing_is_said() -> None:
    assert free_memory("meta") is None
