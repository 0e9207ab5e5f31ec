"""What `known` says yes to, transformers says yes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from counterpoise.checkpoints.configs import understood
from counterpoise.checkpoints.known import CLASSES, KEYS, complete, plain
from counterpoise.checkpoints.naming import Naming

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
KINDS = sorted(CLASSES)
SPELT_ANEW = ("sliding_window", "torch_dtype", "rope_theta", "rope_scaling", "_name_or_path", "transformers_version")


def saved(folder: Path, kind: str, **settings: Any) -> dict[str, Any]:
    """The config of a tiny model as transformers writes it."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**TINY, num_key_value_heads=2, architectures=[CLASSES[kind][0]], **settings)
    config.save_pretrained(folder)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def parameters(folder: Path) -> dict[str, tuple[int, ...]]:
    """What the class wants of a checkpoint: all that it holds, but for what is tied."""
    naming = Naming.of(folder)
    assert naming is not None
    tied = {name for group in naming.ties for name in group[1:]}
    return {n: tuple(t.shape) for n, t in naming.held.items() if n not in tied}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"head_dim": 6}])
def test_a_known_class_wants_what_transformers_builds(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    if kind == "qwen2":
        settings = {n: v for n, v in settings.items() if n != "head_dim"}
    config = saved(tmp_path, kind, **settings)
    wanted = parameters(tmp_path)
    assert complete(config, wanted)
    for name, shape in wanted.items():
        assert not complete(config, {n: s for n, s in wanted.items() if n != name})
        assert not complete(config, wanted | {name: (*shape, 1)})
    assert not complete(config, wanted | {"more": (1,)})
    assert complete(config, wanted | {"lm_head.weight": (32, 16)}) == (not settings.get("tie_word_embeddings"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_is_plain_is_one_that_transformers_reads_and_takes_at_its_word(tmp_path: Path, kind: str) -> None:
    """Every value below, alone: those that are taken for plain must be understood, as they stand."""
    config = saved(tmp_path, kind, dtype="bfloat16")
    assert plain(config)
    place, count = tmp_path / "config.json", 0
    values: list[Any] = [
        None,
        True,
        False,
        0,
        1,
        2,
        -1,
        3.5,
        1.0,
        "silu",
        "float16",
        "",
        [],
        [7],
        ["full_attention"] * 2,
        {},
        5,
    ]
    values += [
        {"rope_theta": 5.0, "rope_type": "default"},
        {"rope_type": "yarn", "factor": 2.0},
        float("nan"),
        "gelu",
        1 << 40,
    ]
    for key in {*KEYS, "num_labels", "to_dict", "quantization_config", "made_up"}:
        for value in values:
            changed = config | {key: value}
            if not plain(changed):
                continue
            count += 1
            place.write_text(json.dumps(changed))
            read = understood(changed, place)
            said = {k: v for k, v in changed.items() if k not in SPELT_ANEW}
            assert said == {k: read[k] for k in said}, (key, value)
            assert Naming.of(tmp_path) is not None, (key, value)
    assert count > 60, count
    for key in ("hidden_size", "tie_word_embeddings", "architectures", "model_type", "vocab_size"):
        assert not plain({k: v for k, v in config.items() if k != key})
