"""--report-to: what accelerate's trackers are told of an alignment."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from typer.testing import CliRunner

from counterpoise.cli.app import app
from tiny import save_pair

WITHOUT = "tensorboard is not installed: pip install tensorboard"


class Lines(GeneralTracker):
    """A tracker of one's own: a json line for every call."""

    name = "lines"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str, **_: Any) -> None:
        super().__init__(_blank=True)
        self.file = Path(logging_dir) / f"{run_name}.jsonl"

    @property
    def tracker(self) -> Path:
        return self.file

    def start(self) -> None:
        self.put({"started": True})

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.put({"config": values})

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.put({"step": step, **values})

    def finish(self) -> None:
        self.put({"finished": True})

    def put(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def align(folder: Path, out: str, *more: str) -> Any:
    save_pair(folder)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    words = f"align {folder}/pre -o {folder}/{out} --method rsf --prompts {folder}/prompts.jsonl".split()
    words += "--reward world:early_letters --iterations 2 --n 2 --batch-size 4 --max-new-tokens 4 -q".split()
    return CliRunner().invoke(app, [*words, *more])


def test_a_tracker_is_told_the_settings_and_every_line_and_changes_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "lines", Lines)
    done = align(tmp_path, "aligned", "--report-to", "lines", "--device", "cpu")
    assert done.exit_code == 0, done.output
    started, config, *told, finished = map(
        json.loads, (tmp_path / "aligned.work/counterpoise.jsonl").read_text().split("\n")[:-1]
    )
    assert (started, finished) == ({"started": True}, {"finished": True})
    assert config["config"]["method"] == "rsf"
    lines = [json.loads(line) for line in (tmp_path / "aligned/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [1, 2]
    assert [line["reward"] for line in told] == [line["reward"] for line in lines]
    assert align(tmp_path, "plain", "--device", "cpu").exit_code == 0
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("aligned", "plain"))
    assert first == second


def test_a_tracker_that_is_not_there_is_refused_by_run_and_dry_run(tmp_path: Path) -> None:
    for name, said in (
        ("tensorbord", "--report-to: expected aim, tensorboard, wandb, "),
        ("aim", "found it missing; pip install aim"),
    ):
        for more in ((), ("--dry-run",)):
            done = align(tmp_path, "aligned", "--report-to", name, *more)
            assert done.exit_code == 1
            assert said in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason=WITHOUT)
def test_tensorboard_shows_the_reward_of_every_iteration(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert align(tmp_path, "aligned", "--report-to", "tensorboard", "--device", "cpu").exit_code == 0
    events = EventAccumulator(str(tmp_path / "aligned.work/counterpoise")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "aligned/metrics.jsonl").read_text().splitlines()]
    shown = events.Scalars("reward")
    assert [e.step for e in shown] == [1, 2]
    assert [e.value for e in shown] == pytest.approx([line["reward"] for line in lines])
