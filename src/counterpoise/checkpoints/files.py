"""Checkpoint folders as files: found, and written in one step. Nothing here needs torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from counterpoise.checkpoints.companions import FETCHED_NOT
from counterpoise.checkpoints.locks import hold
from counterpoise.checkpoints.reading import parse_json, read_text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint, or a pair of them, that cannot be used; the message says what was expected, found, and what to do."""


# Finding


def hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """The repository and the revision that `org/name` or `org/name@revision` names; None for what is here, or no such id.

    Where a folder `org` is here, `org/name` is a path into it: a mistyped one is not asked of the hub. With a revision it
    is the hub's all the same.

    >>> hub_id("org/name@refs/pr/1"), hub_id("./org/name")
    (('org/name', 'refs/pr/1'), None)
    """
    found = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", str(source))
    path = Path(source)
    here = found is None or path.exists() or (found[2] is None and path.parent.is_dir())
    return None if here else (found[1], found[2])  # type: ignore[index]


def resolve(source: str | Path, *, weights: bool = True) -> Path:
    """The local folder of `source`; a hub id is fetched (`weights` and all that goes with them; never code)."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (packed := sorted(path.glob("*.gguf"))) and not any(path.glob("*.safetensors")):
            raise CheckpointError(_converting(source, packed[0]))
        return path
    if path.suffix == ".gguf" and path.is_file():
        raise CheckpointError(_converting(source, path))
    if path.is_file():
        raise CheckpointError(f"{source}: expected a checkpoint folder, found a file; give the folder that holds it")
    if (found := hub_id(source)) is None:
        if hub_id(f"{source}@main") is None or path.parent == Path():
            raise CheckpointError(f"{source}: no such folder, and not a hub id (org/name or org/name@revision)")
        there = sorted(p.name for p in path.parent.iterdir() if p.is_dir())[:8]
        raise CheckpointError(
            f"{source}: no such folder; {path.parent} holds {', '.join(there) or 'no folders'} (a repository of the hub "
            f"that is called so needs its revision here: {source}@main)"
        )
    from huggingface_hub import snapshot_download

    try:
        unwanted = FETCHED_NOT if weights else [*FETCHED_NOT, "*.safetensors*"]
        return Path(snapshot_download(found[0], revision=found[1], ignore_patterns=unwanted))
    except Exception as error:
        raise CheckpointError(
            f"{source}: no such folder here, and the hub did not give it ({type(error).__name__}: {first_line(error)})"
        ) from None


def look(*sources: str | Path, out: Path | None = None) -> None:
    """Refuse what is seen of paths alone, before anything heavy is imported: nothing there, an `out` that is taken.

    Raises:
        CheckpointError: see `resolve` and `refuse_occupied`.
    """
    if out is not None:
        refuse_occupied(out.absolute())
    for source in sources:
        if hub_id(source) is None:
            resolve(source)


def _converting(source: str | Path, file: Path) -> str:
    """What is said of a GGUF file: the command that makes it a checkpoint."""
    place, name, out = (
        json.dumps(str(part)) for part in (file.parent, file.name, f"{file.with_suffix('')}-safetensors")
    )
    command = (
        f"import transformers as t; at, out, how = {place}, {out}, dict(gguf_file={name}); t.AutoModelForCausalLM."
        "from_pretrained(at, quantization_config=t.GgufConfig(dequantize=True), **how).save_pretrained(out); "
        "t.AutoTokenizer.from_pretrained(at, **how).save_pretrained(out)"
    )
    return (
        f"{source}: expected safetensors, found the GGUF file {file.name}; take the checkpoint that it was made from, or convert "
        f"it (pip install gguf accelerate): python -c {shlex.quote(command)}"
    )


def first_line(error: Exception) -> str:
    """What an error of another library says, without its advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def pickles(folder: Path) -> list[str]:
    """Names of the files in a folder that may hold pickled weights."""
    return sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights.

    Raises:
        CheckpointError: none, pickles alone, a missing shard, or two answers.
    """
    index, single = folder / INDEX, folder / WEIGHTS
    if index.is_file() and single.is_file():
        raise CheckpointError(
            f"{folder}: both {WEIGHTS} and {INDEX} are there, so which weights are meant is not known "
            "(transformers would load the single file); remove the stale one"
        )
    if single.is_file():
        return [single]
    if index.is_file():
        files = sorted({folder / name for name in weight_map(folder).values()})
        if absent := [f.name for f in files if not f.is_file()]:
            raise CheckpointError(
                f"{folder}: the shard {absent[0]} is missing ({len(absent)} of {len(files)}); fetch it again"
            )
        return files
    if found := pickles(folder):
        raise CheckpointError(
            f"{folder}: expected safetensors, found the pickle {found[0]}, which can run code when opened. Convert it once "
            "where you trust it: AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
        )
    if named := sorted(p.parent.name for p in folder.glob("*/adapter_config.json")):
        raise CheckpointError(f"{folder}: expected a checkpoint or an adapter, found a folder of named adapters "
                              f"({', '.join(named)}); give one of them: {folder / named[0]}")  # fmt: skip
    raise CheckpointError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither")


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(f, str) for f in found.values()):
        raise CheckpointError(f"{folder / INDEX}: expected a weight_map of tensor and file names; fetch it again")
    home = folder.resolve()
    for name in sorted(set(found.values())):
        try:  # also through a linked folder; a shard that is itself a link is the user's own
            inside = ".." not in Path(name).parts and (folder / name).parent.resolve().is_relative_to(home)
        except (OSError, ValueError):
            inside = False
        if not inside:
            raise CheckpointError(
                f"{folder / INDEX}: expected a weight_map of files in this folder, found {name[:200]!r}; fetch it again"
            )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a json file.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        content = parse_json(read_text(path), str(path))
    except ValueError as error:
        raise CheckpointError(f"{error}; fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a json object, found a {type(content).__name__}; fetch it again")
    return content


# Writing


LOST = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of writing (the last one of reading too); who raises them often names no file, and shutil the one it reads."""
UNSYNCED = (errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
"""What file systems answer that cannot flush a folder."""
TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{16}")
"""A name that `replacing` writes under."""


@contextlib.contextmanager
def staged(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` in one step when the block ends, and vanishes when it fails.

    Raises:
        CheckpointError: `out` exists and is not an empty folder, or nothing can be written there.
        OSError: a failed write, with `out` as its filename.
    """
    target = Path(out).absolute()
    refuse_occupied(target)
    with _named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep_abandoned(target.parent.glob(f".{glob.escape(target.name[:50])}.partial-*"))
        folder, lock = _locked_folder(target)
        try:
            yield folder
            for path in (*sorted(folder.rglob("*")), folder):
                _fsync(path)
            refuse_occupied(target)
            if target.is_dir():
                target.rmdir()
            folder.rename(target)
            _fsync(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(lock)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes its place in one step when the block ends, or vanishes.

    A link stays and its target is replaced, with the mode that it had; to a device or a pipe (/dev/stdout) is written directly.
    It is locked until then; what killed processes left in the folder is removed, once a process.

    Raises:
        OSError: no such folder, a folder at `path`, or a failed write, with `path` as its filename.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file to write, found a folder", str(path))
    if path.exists() and (not path.is_file() or path.absolute().is_relative_to("/dev")):
        with _named(path):
            yield path
        return
    path = path.resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder, make it first", str(path.parent))
    if path.parent not in _swept:
        _swept.add(path.parent)
        _sweep_abandoned(p for p in path.parent.glob(".*") if TEMPORARY.fullmatch(p.name))
    partial = path.with_name(f".{path.name[:50]}.{os.getpid()}.{secrets.token_hex(8)}")
    lock = None
    with _named(path):
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o666)
            hold(lock)
            yield partial
            if path.exists():
                shutil.copymode(path, partial)
            _fsync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
            if lock is not None:
                os.close(lock)


_swept: set[Path] = set()


def refuse_occupied(out: Path) -> None:
    """Raise when something stands at `out` that writing there would destroy, or when nothing can be written there."""
    if out.is_symlink():
        raise CheckpointError(
            f"{out}: expected a new or empty folder, found a link to {os.readlink(out)}; give the folder itself, or remove "
            "the link"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(
            f"{out}: expected a new or empty folder, found a {'folder with content' if out.is_dir() else 'file'}; "
            "choose another name or remove it"
        )
    folder = _standing(out)
    if not folder.is_dir():
        raise CheckpointError(f"{out}: expected a folder to write in, found the file {folder}; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{out}: expected a folder to write in, but {folder} may not be written to; choose another"
        )


def free_bytes(out: Path) -> int:
    """Free space on the disk that `out` will lie on."""
    return shutil.disk_usage(_standing(out)).free


def _standing(out: Path) -> Path:
    """The nearest thing above `out` that exists."""
    return next(p for p in out.absolute().parents if p.exists())


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """A failed write says where; safetensors and tokenizers tell of it in words of their own."""
    try:
        yield
    except OSError as error:
        if error.errno in LOST and (error.errno != errno.EIO or error.filename is None):
            raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(target)) from error
        raise


def _locked_folder(target: Path) -> tuple[Path, int]:
    """A new folder beside `target`, locked for as long as the descriptor is open: also a killed process lets go of it."""
    while True:
        folder = target.parent / f".{target.name[:50]}.partial-{secrets.token_hex(4)}"
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):  # swept up before it was locked
            lock = os.open(folder, os.O_RDONLY)
            hold(lock)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _sweep_abandoned(paths: Iterable[Path]) -> None:
    """Remove what killed processes left: those of `paths` that nobody, of this machine or another, holds locked."""
    for path in paths:
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            finally:
                os.close(lock)


def _fsync(path: Path) -> None:
    """Flush a file to the disk, and a folder where its file system can."""
    folder = path.is_dir()
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if not folder or error.errno not in UNSYNCED:
            raise
