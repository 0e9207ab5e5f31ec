"""Gradient checkpointing changes what a training step keeps, not what it learns."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_align_commands import QUICK, asked, call, world  # noqa: F401  # a fixture
from torch import nn

from counterpoise.alignment.mitigations.anchors import KD
from counterpoise.alignment.mitigations.lowrank import LowRank
from counterpoise.alignment.mitigations.replay import Replay
from counterpoise.alignment.rsf import fine_tune
from counterpoise.alignment.settings import RSF
from counterpoise.alignment.training.precision import compute_in_bfloat16
from counterpoise.alignment.training.stepping import finish_all, start_all, trainable
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.language.checkpointing import as_asked, recompute_steps
from counterpoise.language.footprints import training_bytes
from counterpoise.language.scoring import Example, response_nll
from counterpoise.language.shapes import shape_of
from peak import Peak
from tiny import tiny, tokenizer

EXAMPLES = [Example((3, 4, 5 + i % 7), (6, 7 + i % 5, 8)) for i in range(8)]


def trained(model: nn.Module, *mitigations: Any) -> list[torch.Tensor]:
    start_all(mitigations, model, tokenizer())
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    torch.manual_seed(0)
    settings = RSF(epochs=2, batch_size=4, micro_batch_size=2)
    fine_tune(model, EXAMPLES, optimizer, settings, random.Random(0), mitigations)
    finish_all(mitigations, model)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("how", ["plain", "held", "lora", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_steps_that_recompute_learn_the_same_to_the_bit(family: str, how: str) -> None:
    def made() -> nn.Module:
        model = tiny(family)
        for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.3  # as drawn the first time
        return compute_in_bfloat16(model) if how == "bf16" else model

    def held() -> list[Any]:
        return {"held": [Replay(1.0, EXAMPLES), KD(0.1)], "lora": [LowRank(2)]}.get(how, [])

    before = [p.detach().clone() for p in made().parameters()]
    plain, again = trained(made(), *held()), trained(recompute_steps(made()), *held())
    assert all(map(torch.equal, plain, again))
    assert not all(map(torch.equal, plain, before))


@pytest.mark.parametrize("command", ["rsf --n 2", "ppo", "dpo"])
def test_align_writes_the_same_with_gradient_checkpointing(
    command: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:  # fmt: skip
    entered = list[bool]()
    from counterpoise.language import checkpointing

    plain = checkpointing.recomputed
    monkeypatch.setattr(checkpointing, "recomputed", lambda model: entered.append(True) or plain(model))
    method, *more = command.split()
    data = asked(world) if method != "dpo" else ["--preferences", world / "pairs.jsonl"]
    quick = QUICK if method != "dpo" else "--batch-size 8 --epochs 1 --learning-rate 1e-2 --quiet".split()
    for out, option in (("plain", []), ("again", ["--gradient-checkpointing"])):
        made = call(world / "pre", "-o", tmp_path / out, "--method", method, *data, *more, *quick, *option)
        assert made.exit_code == 0, made.output
        assert bool(entered) == bool(option)
    one, other = (open_checkpoint(tmp_path / out) for out in ("plain", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (json.loads((tmp_path / out / "align.json").read_text())["settings"] for out in ("plain", "again"))
    assert first == second  # so that either goes on from the other


def test_a_step_that_recomputes_takes_what_is_told_and_less() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=192,
        vocab_size=96, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    examples, peaks = [Example(tuple(range(3, 19)), (5, 6, 7, 8) * 16)] * 4, []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for again in (False, True):
        if again:
            recompute_steps(model)
        with Peak([t for p in model.parameters() for t in (p, p.grad)]) as peak, as_asked(model):
            response_nll(model, examples).backward()
        told = training_bytes(shape_of(model), 4, 16, 64, 4, recompute=again)
        assert told / 2 < peak.bytes < 1.25 * told
        peaks.append(peak.bytes)
    assert peaks[1] < peaks[0] / 2


def test_a_model_that_cannot_recompute_is_refused() -> None:
    with pytest.raises(ValueError, match="leave --gradient-checkpointing out"):
        recompute_steps(transformers.AutoModelForCausalLM.from_config(transformers.XLNetConfig(
            vocab_size=64, d_model=16, n_layer=2, n_head=4, d_inner=24,
        )))  # fmt: skip
