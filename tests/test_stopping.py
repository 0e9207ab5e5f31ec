"""Commands that are stopped, that fail, and that find no room: one clear line, a status, and nothing left behind."""

from __future__ import annotations

import csv
import fcntl
import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from counterpoise.checkpoints import files
from counterpoise.checkpoints.files import CheckpointError, refuse_occupied, replacing, staged
from counterpoise.cli.terminal import KINDS, plain_errors
from counterpoise.records import Store, write_whole
from tiny import save_pair, tokenizer

WORKING = """
import sys, time
from counterpoise.checkpoints.files import staged
from counterpoise.cli.terminal import plain_errors
with plain_errors("nothing was written"), staged(sys.argv[1]) as folder:
    for n in range(2000):
        (folder / str(n)).write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def working(out: Path) -> subprocess.Popen[str]:
    """A process that stands in the middle of writing `out`."""

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    command = [sys.executable, "-c", WORKING, str(out)]
    begun = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed)
    assert begun.stdout is not None
    assert begun.stdout.readline() == "ready\n"
    return begun


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_cleans_up_and_says_what_is_kept(tmp_path: Path, sign: signal.Signals, status: int) -> None:
    begun = working(tmp_path / "out")
    begun.send_signal(sign)
    _, said = begun.communicate(timeout=30)
    assert (begun.returncode, said) == (status, "stopped; nothing was written\n")
    assert not list(tmp_path.iterdir())


def test_more_signals_while_the_first_is_cleaned_up_change_nothing(tmp_path: Path) -> None:
    begun = working(tmp_path / "out")
    while begun.poll() is None:
        begun.send_signal(signal.SIGINT)
        time.sleep(0.0005)
    _, said = begun.communicate(timeout=30)
    assert (begun.returncode, said) == (130, "stopped; nothing was written\n")
    assert not list(tmp_path.iterdir())


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with plain_errors("nothing"):
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_another_library_is_said_in_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, name = kind.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        pytest.skip(f"{module} is not here")
    with pytest.raises(SystemExit) as ended, plain_errors("nothing"):
        raise found("it is\nbroken")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "it is" in said


def test_real_errors_of_other_libraries_are_said_too(capsys: pytest.CaptureFixture[str]) -> None:
    import jinja2
    import torch
    from tokenizers import Tokenizer

    def row_too_long() -> None:
        list(csv.reader(["a" * 200_000]))

    for work, message in (
        (lambda: jinja2.Template("{% for"), "the chat template cannot say this"),
        (lambda: torch.empty(1 << 60), "out of memory"),
        (lambda: Tokenizer.from_str('{"model": 1}'), "error: "),
        (row_too_long, "damaged or cut short"),
    ):
        with pytest.raises(SystemExit), plain_errors("nothing"):
            work()
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_what_transformers_cannot_read_is_the_files_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong types end in any kind of error: AttributeError here."""
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "a"}')
    words = tokenizer()
    words.chat_template = "{{ 1 // 0 }}"
    broken = tokenizer()
    broken.name_or_path, broken.model_max_length = "the broken one", [1]
    for work, message in (
        (lambda: AutoConfig.from_pretrained(tmp_path), f"transformers cannot read {tmp_path} (AttributeError: "),
        (lambda: broken("abc"), "transformers cannot read the broken one (TypeError: "),
        (lambda: words.apply_chat_template([{"role": "user", "content": "a"}]), "this conversation (ZeroDivisionError"),
    ):
        with pytest.raises(SystemExit), plain_errors("nothing"):
            work()
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "bug", [KeyError("a"), AttributeError("b"), TypeError("c"), AssertionError("d"), RuntimeError("e")]
)
def test_a_bug_keeps_its_traceback_and_is_called_one(bug: Exception) -> None:
    with pytest.raises(type(bug)) as raised, plain_errors("nothing"):
        raise bug
    assert "a bug in counterpoise" in raised.value.__notes__[0]


def test_a_folder_in_a_files_place_is_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), plain_errors("nothing"):
        tmp_path.read_bytes()
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory; name a file in it\n"


def test_a_full_disk_is_named_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), plain_errors("nothing"):
        write_whole(Path("/dev/full"), "x")
    assert (
        capsys.readouterr().err == "error: /dev/full: No space left on device; make room, or choose a place with more\n"
    )


@pytest.mark.parametrize("limit", [10, 20_000])
def test_a_checkpoint_that_finds_no_room_names_out_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    pre, post = save_pair(tmp_path)
    before = sorted(tmp_path.iterdir())

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [
        sys.executable,
        "-m",
        "counterpoise",
        "average",
        pre,
        post,
        "-o",
        tmp_path / "out",
        "--ratio",
        "0.5",
        "--quiet",
    ]
    done = subprocess.run(list(map(str, command)), preexec_fn=bounded, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"error: {tmp_path / 'out'}: File too large; choose a file system (or a limit, see ulimit -f) for larger files\n"
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_failed_write_of_safetensors_names_out(tmp_path: Path) -> None:
    """Its own words are "(os error 27)", of a kind of their own."""
    code = """if True:
    import resource, sys, torch
    from pathlib import Path
    from safetensors.torch import save_file
    from counterpoise.checkpoints.files import staged
    from counterpoise.cli.terminal import plain_errors
    with plain_errors("nothing"), staged(sys.argv[1]) as folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        save_file({"a": torch.ones(300)}, folder / "model.safetensors")
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.stderr.startswith(f"error: {tmp_path / 'out'}: File too large; choose")
    assert done.returncode == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_flushed_is_no_failure_and_a_file_is() -> None:
    files._fsync(Path("/proc"))  # EINVAL
    with pytest.raises(OSError, match="Invalid argument"):
        files._fsync(Path("/proc/version"))


@pytest.mark.parametrize("to", ["folder", "file", "nothing"])
def test_a_link_at_out_is_refused_before_the_work(tmp_path: Path, to: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "out").symlink_to(to)
    with pytest.raises(CheckpointError, match=f"found a link to {to}; give the folder itself"):
        refuse_occupied(tmp_path / "out")


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="expected a folder to write in, found the file"):
        refuse_occupied(tmp_path / "file" / "deep" / "out")
    if not (child := os.fork()):  # root may write anywhere
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            refuse_occupied(Path("/usr/counterpoise-out"))
        except CheckpointError as error:
            os._exit(3 if "but /usr may not be written to" in str(error) else 4)
        finally:
            os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    with pytest.raises(IsADirectoryError), replacing(tmp_path):
        pass


def test_what_killed_processes_left_is_swept_and_what_is_held_is_not(tmp_path: Path) -> None:
    """By a lock: the process of that number may live on another machine."""
    dead, held = (tmp_path / f".tax-1.json.{os.getpid()}.{n:016x}" for n in (1, 2))
    other = tmp_path / ".profile.1234"
    for file in (dead, held, other):
        file.write_text("{")
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert Store(tmp_path).once({"what": "tax"}, lambda: 3) == 3
    os.close(lock)
    assert [p.name for p in sorted(tmp_path.glob(".*"))] == sorted([other.name, held.name])


def test_out_may_have_a_long_name_and_signs_of_patterns(tmp_path: Path) -> None:
    for name in ("o" * 250, "out[1]*"):
        abandoned = tmp_path / f".{name[:50]}.partial-00000000"
        abandoned.mkdir()
        with staged(tmp_path / name) as folder:
            (folder / "a").write_text("a")
        assert (tmp_path / name / "a").is_file()
        assert not abandoned.exists()
