"""--report-to: what accelerate's trackers are told of an alignment."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from typer.testing import CliRunner

from counterpoise.cli.app import app
from tiny import save_pair


def needs(tracker: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(tracker) is None
    return pytest.mark.skipif(absent, reason=f"{tracker} is not installed: pip install {tracker}")


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
        print("as trackio does")
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
    done = align(tmp_path, "aligned", "--report-to", "lines", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["iterations"] == 2  # and nothing else
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


@needs("wandb")
def test_wandb_offline_keeps_the_reward_of_every_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    done = align(tmp_path, "aligned", "--report-to", "wandb", "--device", "cpu", "--json")
    assert json.loads(done.stdout)["iterations"] == 2
    importlib.import_module("wandb").teardown()  # its service writes to the end
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    lines = [json.loads(line) for line in (tmp_path / "aligned/metrics.jsonl").read_text().splitlines()]
    assert all(json.dumps(line["reward"]).encode() in file.read_bytes() for line in lines)


@needs("trackio")
def test_trackio_keeps_every_number_of_every_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    done = align(tmp_path, "aligned", "--report-to", "trackio", "--device", "cpu", "--json")
    assert json.loads(done.stdout)["iterations"] == 2
    with closing(sqlite3.connect(tmp_path / "trackio/counterpoise.db")) as kept:
        rows = kept.execute("select step, metrics from metrics order by step").fetchall()
    lines = [json.loads(line) for line in (tmp_path / "aligned/metrics.jsonl").read_text().splitlines()]
    assert [(step, json.loads(told)["reward"]) for step, told in rows] == [(n["iteration"], n["reward"]) for n in lines]


@needs("tensorboard")
def test_tensorboard_shows_the_reward_of_every_iteration(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert align(tmp_path, "aligned", "--report-to", "tensorboard", "--device", "cpu").exit_code == 0
    events = EventAccumulator(str(tmp_path / "aligned.work/counterpoise")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "aligned/metrics.jsonl").read_text().splitlines()]
    shown = events.Scalars("reward")
    assert [e.step for e in shown] == [1, 2]
    assert [e.value for e in shown] == pytest.approx([line["reward"] for line in lines])
