"""What lies beside the weights of a checkpoint: what is copied into an average of it, and what is left by its kind."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from counterpoise.checkpoints.reading import parse_json, read_text

# Patterns of names inside the folder; "*" also matches "/".
WEIGHTS_OF_ANY_KIND = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.h5", "*.hdf5",
                       "*.keras", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ggml", "*.ot", "*.ckpt*", "*.npy", "*.npz",
                       "*.pb", "*.nemo", "*.tflite", "*.mlmodel", "*.engine", "*.pte", "*.distcp", "*.joblib",
                       "*.params")  # fmt: skip
ARCHIVES = ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.gz", "*.bz2", "*.xz", "*.zst", "*.7z", "*.whl", "*.jar")
CODE = ("*.py", "*.pyc", "*.pyi", "*.pyx", "*.ipynb", "*.so", "*.so.*", "*.dll", "*.dylib", "*.exe", "*.wasm", "*.sh",
        "*.bat", "*.ps1", "*.js", "*.mjs", "*.ts", "*.c", "*.cc", "*.cpp", "*.cu", "*.cuh", "*.h", "*.hpp", "*.rs", "*.go",
        "*.java", "*.rb", "*.pl", "*.lua", "*.php", "*.r", "Makefile", "Dockerfile")  # fmt: skip
TRAINING = ("trainer_state.json", "training_args.*", "*_results.json", "optimizer*", "scheduler*", "rng_state*",
            "random_states*", "*events.out.tfevents.*", "latest", "checkpoint-*/*", "global_step*/*", "runs/*", "wandb/*",
            "logs/*", "original/*", "onnx/*", "openvino/*", "coreml/*", "gguf/*")  # fmt: skip
LEFT = (*WEIGHTS_OF_ANY_KIND, *ARCHIVES, *CODE, *TRAINING)
FETCHED_NOT = [p for p in LEFT if p not in ("*.safetensors", "*.index.json")] + ["*/*.safetensors", "*/*.index.json"]
"""What is not fetched of a hub repository: folders inside hold other formats, often many times the weights."""
OF_THE_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.spm",
                    "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*")  # fmt: skip
REPLACED = ("README.md", "recipe.json", "report.html", "restore.json", "align.json", "metrics.jsonl",
            "model.safetensors.index.json", "adapter_*")  # fmt: skip
"""What an average has of its own; of these nobody needs to hear that they are left."""


def beside(folder: Path, used: Collection[Path] = ()) -> tuple[dict[str, Path], list[str]]:
    """Name inside the folder -> path of what goes with the weights in `used`, and the names of what is left.

    Left are weights, archives, code, what training leaves, folders that hold other weights, and links that lead out of
    the folder (a LICENSE that points at a private key), but for those of the hub's cache to its repository's blobs.
    """
    found = {path.relative_to(folder).as_posix(): path for path in _walk(folder) if path not in used}
    homes, full = _homes(folder), {_top(n) for n in found if _matches(n, WEIGHTS_OF_ANY_KIND)} - {""}
    kept = {n: p for n, p in found.items() if _top(n) not in full and not _matches(n, LEFT) and _inside(p, homes)}
    entered = {_top(n) for n in kept}
    left = {n if _top(n) in entered | {""} else f"{_top(n)}/" for n in found.keys() - kept.keys()}
    return {n: p for n, p in kept.items() if n not in REPLACED}, sorted(n for n in left if not _matches(n, REPLACED))


def of_the_tokenizer(name: str) -> bool:
    """Whether a companion belongs to the tokenizer and its chat template."""
    return _matches(name, OF_THE_TOKENIZER)


def told(source: str, names: list[str], most: int = 5) -> list[str]:
    """A warning that names what was left, if anything was."""
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    kinds = "weights, archives, code, what training leaves, links out of the folder"
    return [f"not copied from {source}: {', '.join(names[:most])}{more} ({kinds})"]


def lost_code(companions: dict[str, Path]) -> list[str]:
    """A warning for each config that names code of its own folder (`auto_map`): code is never copied."""
    warnings = []
    for name, path in companions.items():
        if not name.endswith("config.json"):
            continue
        try:
            content = parse_json(read_text(path), str(path))
        except ValueError:  # whoever needs it says what is wrong with it
            continue
        named = _texts(content.get("auto_map")) if isinstance(content, dict) else ()
        if files := sorted({f"{n.rpartition('.')[0]}.py" for n in named if "--" not in n}):
            warnings.append(
                f"{name} names code (auto_map: {', '.join(files)}) that is not copied; transformers reads OUT with classes "
                "of its own if it has them, else copy the code where you trust it"
            )
    return warnings


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _walk(folder: Path) -> Iterator[Path]:
    """Files and links, in order; hidden ones left out, linked folders named and not entered."""
    for root, folders, files in os.walk(folder):
        visible = sorted(n for n in folders if not n.startswith("."))
        folders[:] = [n for n in visible if not Path(root, n).is_symlink()]
        yield from (Path(root, n) for n in sorted({*files, *visible} - {*folders}) if not n.startswith("."))


def _top(name: str) -> str:
    """The folder of the first level that a file lies in; "" for none."""
    return name.partition("/")[0] if "/" in name else ""


def _homes(folder: Path) -> list[Path]:
    """Where a companion's bytes may lie: the folder itself, and the blobs of a hub repository for its snapshots."""
    home = folder.resolve()
    return [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]


def _inside(path: Path, homes: list[Path]) -> bool:
    return path.is_file() and any(path.resolve().is_relative_to(home) for home in homes)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Patterns of a name without a folder also hold inside folders."""
    last = name.rpartition("/")[2]
    return any(fnmatchcase(n.lower(), p.lower()) for p in patterns for n in (name, last))
