"""What is copied beside the weights, what is left and said, and links that lead out of the folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from counterpoise.averaging.average import average
from counterpoise.averaging.merge import Merge, merge
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.opening import open_checkpoint
from tiny import save_pair, tiny

INDEX = "model.safetensors.index.json"
COPIED = [
    "video_preprocessor_config.json", "tekken.json", "qwen.tiktoken", "tokenizer.model", "source.spm", "target.spm",
    "sentencepiece.bpe.model", "vocab.txt", "NOTICE", "USE_POLICY.md", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/rag.jinja", "1_Pooling/config.json", "voices/deep/one.json", "params.json",
    "speech_config.yaml",
]  # fmt: skip
CODE_AND_WEIGHTS = [
    "modeling_x.py", "kernel.so", "run.sh", "pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "weights.gguf",
    "flax_model.msgpack", "optimizer.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin", "MODEL.ONNX",
    "adapters.zip", "events.out.tfevents.1", "additional_chat_templates/helper.py",
]  # fmt: skip
FOLDERS = [
    "checkpoint-500/config.json", "checkpoint-500/model.safetensors", "onnx/config.json", "onnx/model.onnx",
    "sub/tokenizer.json", "sub/model.bin",
]  # fmt: skip
OF_AN_EARLIER_RUN = [
    "README.md",
    "recipe.json",
    "report.html",
    "restore.json",
    "align.json",
    ".gitattributes",
    ".cache/x.json",
]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else f"content of {name}")


def names_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_all_that_is_neither_weights_nor_code_is_copied_and_the_rest_is_named(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    fill(post, [*COPIED, *CODE_AND_WEIGHTS, *FOLDERS, *OF_AN_EARLIER_RUN])
    recipe = average(pre, post, tmp_path / "out", 0.5)
    own = {"model.safetensors", "recipe.json", "README.md"}
    plain = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names_in(tmp_path / "out") == {*COPIED} | own | plain
    assert all((tmp_path / "out" / n).read_bytes() == (post / n).read_bytes() for n in COPIED)
    (line,) = recipe.warnings
    assert line.startswith(f"not copied from {post}: MODEL.ONNX, adapters.zip, additional_chat_templates/helper.py, ")
    assert set(Checkpoint(post).beside[1]) == {*CODE_AND_WEIGHTS, "checkpoint-500/", "onnx/", "sub/"}
    again = merge(pre, [post], tmp_path / "merged", Merge())
    assert names_in(tmp_path / "merged") == names_in(tmp_path / "out")
    assert line in again.warnings


def test_a_folder_of_nothing_but_its_model_says_nothing(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, shard=("1GB", "8KB"))
    assert average(pre, post, tmp_path / "out", 0.5).warnings == ()
    assert average(pre, tmp_path / "out", tmp_path / "again", 0.5).warnings == ()


@pytest.mark.parametrize("way", ["straight", "link to a link", "through ..", "linked folder", "gone"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, way: str) -> None:
    pre, post = save_pair(tmp_path)
    secret = tmp_path / "home" / "id_rsa"
    secret.parent.mkdir()
    secret.write_text("PRIVATE")
    match way:
        case "straight":
            (post / "LICENSE").symlink_to(secret)
        case "link to a link":
            (post / "NOTICE").symlink_to("LICENSE")
            (post / "LICENSE").symlink_to(secret)
        case "through ..":
            (post / "LICENSE").symlink_to(Path("../home/../home/id_rsa"))
        case "linked folder":
            (post / "additional_chat_templates").symlink_to(secret.parent)
        case "gone":
            (post / "LICENSE").symlink_to(tmp_path / "nowhere")
    recipe = average(pre, post, tmp_path / "out", 0.5)
    assert b"PRIVATE" not in b"".join((tmp_path / "out" / n).read_bytes() for n in names_in(tmp_path / "out"))
    wanted = "additional_chat_templates/" if way == "linked folder" else "LICENSE"
    assert any(line.startswith("not copied from") and wanted.rstrip("/") in line for line in recipe.warnings)


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    (post / "LICENSE.txt").write_text("free")
    (post / "LICENSE").symlink_to("LICENSE.txt")
    assert average(pre, post, tmp_path / "out", 0.5).warnings == ()
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()


def test_in_the_hubs_cache_links_lead_to_the_blobs_of_their_repository_alone(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(post.iterdir())):
        shutil.move(file, repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    (tmp_path / "other" / "blobs").mkdir(parents=True)
    (tmp_path / "other" / "blobs" / "key").write_text("PRIVATE")
    (snapshot / "LICENSE").symlink_to("../../../other/blobs/key")
    (repository / "blobs" / "link").symlink_to(tmp_path / "other" / "blobs" / "key")
    (snapshot / "NOTICE").symlink_to("../../blobs/link")
    recipe = average(pre, snapshot, tmp_path / "out", 0.5)
    assert {"config.json", "tokenizer.json"} <= names_in(tmp_path / "out")
    assert not {"LICENSE", "NOTICE"} & names_in(tmp_path / "out")
    assert [line.split(" (")[0] for line in recipe.warnings] == [f"not copied from {snapshot}: LICENSE, NOTICE"]


def test_code_that_a_config_names_is_said_to_be_missing(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    path = post / "config.json"
    config = {
        **json.loads(path.read_text()),
        "auto_map": {"AutoConfig": "configuration_x.X", "AutoModel": "org/own--model.M"},
    }
    path.write_text(json.dumps(config))
    told = average(pre, post, tmp_path / "out", 0.5).warnings
    assert [line for line in told if line.startswith("config.json names code (auto_map: configuration_x.py)")]
    assert average(pre, post, tmp_path / "of_pre", 0.5, donor="pre").warnings == ()


@pytest.mark.parametrize("name", ["/etc/passwd", "../pre/model.safetensors", "a/../../pre/model.safetensors",
                                  "linked/model.safetensors"])  # fmt: skip
def test_an_index_may_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    tiny("llama").save_pretrained(tmp_path / "pre")
    tiny("llama").save_pretrained(tmp_path / "post", max_shard_size="8KB")
    (tmp_path / "post" / "linked").symlink_to(tmp_path / "pre")
    path = tmp_path / "post" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected a weight_map of files in this folder, found "):
        open_checkpoint(tmp_path / "post")


def test_a_pipe_among_the_companions_holds_nothing_up(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    os.mkfifo(post / "notes.txt")
    assert "notes.txt" in average(pre, post, tmp_path / "out", 0.5).warnings[0]
