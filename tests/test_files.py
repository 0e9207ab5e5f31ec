"""Folders as files: early hashes, damaged files, staging under a lock."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from counterpoise.checkpoints.checkpoint import hash_in_background
from counterpoise.checkpoints.files import CheckpointError, hub_id, replacing, resolve, staged
from counterpoise.checkpoints.hashing import hash_early, sha256, state_of
from counterpoise.checkpoints.opening import open_checkpoint
from tiny import save_pair, tiny

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, (1 << 22) + 5])
def test_hashes_are_those_of_the_content(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "f").write_bytes(content)
    assert sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_hashing_early_gives_the_same_and_sees_a_file_that_changes(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    files = [f / "model.safetensors" for f in (pre, post)]
    hash_early(pre, post, pre, "org/hub-id", tmp_path / "absent")
    assert [sha256(f) for f in files] == [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    hash_early(pre)
    save_file({"a": torch.ones(3)}, files[0])
    assert sha256(files[0]) == hashlib.sha256(files[0].read_bytes()).hexdigest()


def test_a_file_under_two_names_is_hashed_early_once(tmp_path: Path) -> None:
    """A shard that training left alone may be a link to that of PRE, as in the hub's cache."""
    pre, post = save_pair(tmp_path, shard=("20KB", "20KB"))
    shards = sorted(f.name for f in pre.glob("*.safetensors"))
    (post / shards[0]).unlink()
    (post / shards[0]).symlink_to(pre / shards[0])
    code = (
        "import sys, pathlib, counterpoise.checkpoints.hashing as f\n"
        "f.hash_early(*sys.argv[1:])\n"
        "for folder in sys.argv[1:]:\n"
        "    for file in f.weight_files(pathlib.Path(folder)): print(f.sha256(file))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(pre), str(post)], timeout=20, check=True, text=True, stdout=subprocess.PIPE
    )
    files = [folder / name for folder in (pre, post) for name in shards]
    assert done.stdout.split() == [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


def test_whatever_goes_wrong_in_hashing_reaches_who_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not OSError alone: `result` would wait for ever."""
    from counterpoise.checkpoints import hashing

    def fail(files: object) -> None:
        raise MemoryError

    pre, post = save_pair(tmp_path)
    monkeypatch.setattr(hashing, "_hash_in_step", fail)
    hash_early(pre)
    with pytest.raises(MemoryError):
        hashing._under_way[state_of(pre / "model.safetensors")].result(timeout=10)
    with pytest.raises(MemoryError):
        hash_in_background([open_checkpoint(post)]).result(timeout=10)


def test_a_failed_run_does_not_wait_for_its_hashes(tmp_path: Path) -> None:
    """A fifo never ends: hashing it would hold up the exit, were the thread not a daemon."""
    os.mkfifo(tmp_path / "model.safetensors")
    code = (
        "import sys, threading, counterpoise.checkpoints.hashing as f\n"
        "f._hash = lambda file: open(file, 'rb').read()\n"
        "f.weight_files = lambda folder: [folder / 'model.safetensors']\n"
        "f.hash_early(sys.argv[1]); raise SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=20, check=False).returncode == 3


def header(folder: Path, content: object) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe not json", "not a whole safetensors file"),
        ([1, 2], "not a whole safetensors file"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "not a whole safetensors file"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "invalid shape, data type, or offset"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "integer `-8`, expected usize"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, content: object, message: str) -> None:
    header(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text"), [("config.json", "{"), ("config.json", "[]"), (INDEX, "{}"), (INDEX, "not json")]
)
def test_damaged_json_is_named(tmp_path: Path, name: str, text: str) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        _ = open_checkpoint(tmp_path).config


def test_a_folder_left_by_a_process_of_the_same_id_is_no_obstacle(tmp_path: Path) -> None:
    """In a container every run may have the same process id."""
    abandoned = tmp_path / f".out.partial-{os.getpid()}"
    abandoned.mkdir()
    with staged(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_somebody_holds_is_left_alone(tmp_path: Path) -> None:
    held = tmp_path / ".out.partial-of-another"
    held.mkdir()
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with staged(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    os.close(lock)
    assert held.is_dir()


def test_of_a_hub_repository_what_is_copied_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no code, no other format, no checkpoint of the training."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    def fetch(name: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        assert (name, revision) == ("org/model", "v1.0")
        there = [*wanted, "modeling_own.py", "pytorch_model.bin", "original/consolidated.safetensors", "original/params.json",
                 "checkpoint-10/model.safetensors", "checkpoint-10/config.json", "onnx/model.onnx", "model.gguf"]  # fmt: skip
        fetched.extend(filter_repo_objects(there, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "chat_template.jinja",
              "additional_chat_templates/rag.jinja", "tekken.json", "qwen.tiktoken", "tokenizer.model"]  # fmt: skip
    fetched: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("org/model@v1.0") == tmp_path
    assert fetched == wanted


def test_a_link_keeps_pointing_and_its_target_its_mode(tmp_path: Path) -> None:
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    with replacing(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(pipe) as partial:
        assert partial == pipe
        partial.write_text("told")
    assert os.read(reader, 10) == b"told"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    with replacing(tmp_path / ("a" * 250)) as partial:
        partial.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["a" * 250]


def test_a_mistyped_path_into_a_folder_that_is_here_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    (tmp_path / "runs" / "post").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    with pytest.raises(CheckpointError, match=r"runs/pots: no such folder; runs holds post .*runs/pots@main"):
        resolve("runs/pots")
    assert hub_id("runs/pots@main") == ("runs/pots", "main")
    assert hub_id("org/model") == ("org/model", None)
