"""Reading checkpoint folders, refusing broken ones, and writing new ones whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from counterpoise.averaging.average import average
from counterpoise.checkpoints.checkpoint import Checkpoint, copy_companions, hash_in_background, match_name
from counterpoise.checkpoints.files import CheckpointError, staged
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.checkpoints.rounding import as_array
from counterpoise.checkpoints.writing import TensorFile
from tiny import tiny, tokenizer

INDEX = "model.safetensors.index.json"


def save(folder: Path, shard: str = "1GB", **settings) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """A tiny Llama in `folder`; what safetensors itself reads back."""
    tiny("llama", **settings).save_pretrained(folder, max_shard_size=shard)
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# Reading


@pytest.mark.parametrize("shard", ["1GB", "8KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_reads_as_safetensors_reads_it(tmp_path: Path, shard: str, dtype: torch.dtype) -> None:
    wanted = save(tmp_path, shard, dtype=dtype)
    found = open_checkpoint(tmp_path)
    assert (len(found.files) > 2) == (shard == "8KB")
    assert set(found) == set(wanted)
    assert len(found) == len(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
        assert found.dtype(name) == tensor.dtype == dtype
        assert found.shape(name) == tuple(tensor.shape)
    assert {n: f for f, names in found.layout.items() for n in names} == (
        json.loads((tmp_path / INDEX).read_text())["weight_map"]
        if shard == "8KB"
        else dict.fromkeys(wanted, "model.safetensors")
    )
    assert found.config["num_hidden_layers"] == 6


def test_every_dtype_scalars_and_empty_tensors(tmp_path: Path) -> None:
    wanted = {
        str(dtype): torch.arange(4).to(dtype)
        for dtype in (
            torch.float64,
            torch.float16,
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.float8_e4m3fn,
        )
    }
    wanted |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    save_file(wanted, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tolist() == tensor.tolist()
    assert found.config == {}


def test_writing_into_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    Checkpoint(tmp_path)["model.norm.weight"].zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    save(tmp_path, "8KB")
    found = Checkpoint(tmp_path)
    hash_in_background([found]).result()
    names = [*(file.name for file in found.files), "config.json"]
    assert found.sha256 == {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in names}


def hub_cache(cache: Path, shard: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The layout of the hub cache: a snapshot of relative links into blobs that are named by content."""
    wanted = save(cache / "plain", shard)
    tokenizer().save_pretrained(cache / "plain")
    repository = cache / "models--org--tiny"
    commit = "0123456789" * 4
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in sorted((cache / "plain").iterdir()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (cache / "plain").rmdir()
    return snapshot, wanted


@pytest.mark.parametrize("shard", ["1GB", "8KB"])
def test_a_hub_snapshot_of_links_reads_and_is_copied_as_files(tmp_path: Path, shard: str) -> None:
    snapshot, wanted = hub_cache(tmp_path / "cache", shard)
    found = open_checkpoint(snapshot)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    (tmp_path / "out").mkdir()
    copy_companions(found, tmp_path / "out")
    shutil.rmtree(tmp_path / "cache")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["vocab"]["a"] == 4


def test_a_hub_id_is_found_in_the_cache_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot, wanted = hub_cache(tmp_path, "1GB")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("org/tiny", "org/tiny@main"):
        found = open_checkpoint(name)
        assert found.folder == snapshot
        assert found.source == name
        assert set(found) == set(wanted)
    commit = found.revision
    assert commit == "0123456789" * 4
    recipe = average("org/tiny", "org/tiny@main", tmp_path / "out", 0.5)
    assert [recipe.inputs[side]["revision"] for side in ("pre", "post")] == [commit, commit]
    assert f"POST is `org/tiny` at commit `{commit}`" in (tmp_path / "out" / "README.md").read_text()
    assert open_checkpoint(tmp_path / "out").revision is None
    for absent in ("org/other", "org/tiny@v2"):
        with pytest.raises(CheckpointError, match=f"{absent}: no such folder here, and the hub did not give it"):
            open_checkpoint(absent)


def test_base_models_lack_their_task_models_prefix() -> None:
    names = {"h.0.attn": 0, "wte": 1}
    assert match_name("wte", names) == "wte"
    assert match_name("transformer.h.0.attn", names) == "h.0.attn"
    assert match_name("h.0.attn", {"transformer.h.0.attn": 0}) == "transformer.h.0.attn"
    assert match_name("lm_head.weight", {"embed_out.weight": 0}) == "embed_out.weight"
    assert match_name("h.1.attn", names) is None
    assert match_name("norm", {"a.norm": 0, "b.norm": 1}) is None


# Refusals


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_pickles_are_refused_with_advice(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    refuses(tmp_path, r"expected safetensors, found the pickle pytorch_model\.bin.*save_pretrained\(new_folder\)")
    save(tmp_path)
    assert len(open_checkpoint(tmp_path)) > 0  # beside safetensors a pickle is just not looked at


def test_what_is_no_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    refuses(tmp_path, r"expected model\.safetensors or model\.safetensors\.index\.json, found neither")
    refuses(tmp_path / "absent", r"absent: no such folder, and not a hub id \(org/name or org/name@revision\)")
    save(tmp_path)
    refuses(tmp_path / "model.safetensors", "expected a checkpoint folder, found a file")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path, "8KB")
    gone, total = sorted(tmp_path.glob("*.safetensors"))[1], len(list(tmp_path.glob("*.safetensors")))
    gone.unlink()
    refuses(tmp_path, rf"the shard {gone.name} is missing \(1 of {total}\); fetch it again")


def test_an_index_that_promises_more_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "8KB")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.extra"] = index["weight_map"]["model.norm.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    refuses(tmp_path, r"lists 1 tensors that its files do not hold, first model\.extra; the copy is incomplete")


def test_both_a_single_file_and_an_index_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "8KB")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    refuses(tmp_path, r"both model\.safetensors and .* remove the stale one")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "8KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: torch.zeros(1)}, second)
    refuses(tmp_path, rf"the tensor {name} stands in both {first.name} and {second.name}; expected each once")


@pytest.mark.parametrize(("kept", "message"), [
    (lambda size: size - 1, r"not a whole safetensors file, but \d+ bytes that are cut short .*; fetch it again"),
    (lambda size: size // 2, "not a whole safetensors file, .* cut short"),
    (lambda size: 100, "not a whole safetensors file, but 100 bytes"),
    (lambda size: 8, "not a whole safetensors file"),
    (lambda size: 3, "not a whole safetensors file"),
    (lambda size: 0, "not a whole safetensors file"),
])  # fmt: skip
def test_a_truncated_file_is_refused(tmp_path: Path, kept, message: str) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, kept(file.stat().st_size))
    refuses(tmp_path, rf"model\.safetensors: {message}")


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"q": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    refuses(tmp_path, "the tensor q has the dtype F4, which is a quantised or unknown one")


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refuses(tmp_path, "a LoRA adapter, expected a whole checkpoint here; only POST may be an adapter")


# Writing


def test_a_written_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    wanted = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "é": torch.arange(6), "none": torch.empty(0, 2)}
    kinds = {"b": "F32", "a": "BF16", "é": "I64", "none": "F32"}
    file = TensorFile(tmp_path / "x.safetensors", {n: (kinds[n], tuple(t.shape)) for n, t in wanted.items()})
    for tensor in wanted.values():
        for piece in as_array(tensor).reshape(-1, 1):
            file.write(piece)
    file.close()
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in wanted.items())
    with pytest.raises(FileExistsError):
        TensorFile(tmp_path / "x.safetensors", {})


def test_a_folder_appears_in_one_step_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not out.exists()
        assert folder.parent == out.parent  # the same file system, so that the rename is one step
    assert (out / "sub" / "a").read_text() == "a"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with staged(tmp_path / "out") as folder:
            (folder / "a").write_text("a")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_out_and_the_next_one_sweeps_up(tmp_path: Path) -> None:
    script = (
        "import sys, time; from counterpoise.checkpoints.files import staged\n"
        "with staged(sys.argv[1]) as folder:\n"
        "    (folder / 'a').write_text('a'); print('go', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE, env=environment
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"go\n"
        with staged(tmp_path / "out") as folder:  # another process that still lives is left alone
            assert len(list(tmp_path.iterdir())) == 2
            (folder / "b").write_text("b")
        shutil.rmtree(tmp_path / "out")
        run.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    with staged(tmp_path / "out") as folder:
        (folder / "c").write_text("c")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_out_is_used_and_an_occupied_one_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
    with (
        pytest.raises(CheckpointError, match=r"out: expected a new or empty folder, found a folder with content"),
        staged(tmp_path / "out"),
    ):
        pytest.fail("the block ran")
    with pytest.raises(CheckpointError, match="found a file"), staged(tmp_path / "out" / "a"):
        pytest.fail("the block ran")
    assert (tmp_path / "out" / "a").read_text() == "first"


def test_an_out_that_fills_up_meanwhile_is_not_touched(tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "out") as folder:
            (folder / "a").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a").write_text("theirs")

    with pytest.raises(CheckpointError, match="found a folder with content"):
        write()
    assert (tmp_path / "out" / "a").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_companions_are_the_config_and_tokenizer_and_nothing_that_runs(tmp_path: Path) -> None:
    save(tmp_path / "pre")
    tokenizer().save_pretrained(tmp_path / "pre")
    kept = {
        "chat_template.jinja",
        "merges.txt",
        "vocab.json",
        "spiece.model",
        "LICENSE.txt",
        "preprocessor_config.json",
    }
    for name in (*kept, "modeling_x.py", "training_args.bin", "optimizer.pt", "trainer_state.json", "README.md"):
        (tmp_path / "pre" / name).write_text(name)
    (tmp_path / "pre" / "tokenizer_parts").mkdir()
    (tmp_path / "out").mkdir()
    copy_companions(Checkpoint(tmp_path / "pre"), tmp_path / "out")
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found == kept | {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "pre" / n).read_bytes() for n in found)
