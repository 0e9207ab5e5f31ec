"""Memory of `align --shard` and `--bf16` before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from counterpoise.alignment.dry_run import plan_align
from counterpoise.cli import app
from counterpoise.planning.rehearsing import look
from counterpoise.planning.work import Plan
from world import make

MITIGATIONS = "l1 l2 kd lora freeze sma merge replay reset_every stop_at_reward merge_base"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("world"))


def planned(world: Path, *, lora: int | None = None, method: str = "ppo", **more: Any) -> Plan:
    how = {"prompts": world / "prompts.jsonl", "reward": "world:early_letters", "preferences": None, "samples": None}
    held = {**dict.fromkeys(MITIGATIONS.split()), "replay_ratio": 1.0, "merge_keep": 1.0, "lora": lora}
    common = {"micro_batch_size": 8, "chat": True, "seed": 0}
    new = {"max_new_tokens": 6, "temperature": 1.0}
    places = (str(world / "pre"), world / "aligned", method)
    return plan_align(*places, {}, common, new, held, **how, **{"dtype": torch.float32, **more})


def added(plan: Plan, more: Plan) -> list[int]:
    """Bytes that each stage takes more: drawing, log-probabilities, training."""
    return [b.memory - a.memory for a, b in zip(plan.stages, more.stages, strict=True)]


def test_of_n_processes_each_holds_its_share_and_what_is_gathered(world: Path) -> None:
    whole, cut = planned(world), planned(world, shared_by=4)
    assert {n: s // 4 for n, s in whole.resident.items()} == dict(cut.resident)
    shape = look(str(world / "pre")).shape
    outside, block = shape.parameters - shape.body, shape.body // shape.layers
    assert added(whole, cut)[:2] == [4 * shape.parameters, 4 * (outside + 2 * block)]
    both = planned(world, shared_by=4, bf16=True)
    assert added(whole, both)[:2] == [2 * shape.parameters, 2 * (outside + 2 * block)]
    training = added(whole, cut)[2]
    assert training == 4 * (2 * outside + 3 * block)


def test_with_lora_only_the_frozen_weights_are_shared_out(world: Path) -> None:
    whole, cut = planned(world, lora=2), planned(world, lora=2, shared_by=4)
    shared = {"weights", "PRE, frozen"}
    assert {n: s // (4 if n in shared else 1) for n, s in whole.resident.items()} == dict(cut.resident)


def test_bfloat16_takes_copies_of_the_matrices_and_leaves_the_rest(world: Path) -> None:
    whole, mixed = planned(world), planned(world, bf16=True)
    shape = look(str(world / "pre")).shape
    assert added(whole, mixed) == [2 * (shape.body + shape.head)] * 3
    assert mixed.resident == whole.resident
    assert (whole.dtype, mixed.dtype) == ("float32", "bfloat16")


def test_the_number_of_processes_is_torchruns_or_said_to_be_assumed(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*more: str) -> str:
        words = f"align {world}/pre -o {world}/aligned --method ppo --prompts {world}/prompts.jsonl --max-new-tokens 6"
        words += " --reward world:early_letters --speed 1e12,1e11 --dry-run"
        return " ".join(CliRunner().invoke(app, [*words.split(), *more]).output.split())

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "assumed: 8 processes, as torchrun has not said how many" in told("--shard")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "memory is that of one of 8 processes" in told()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "memory is that of one of 2 processes" in told()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (
        told("--shard")
        == "error: shard: expected several processes, found one; start it with torchrun --nproc-per-node N"
    )


def test_what_the_run_would_refuse_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match="dpo: expected whole weights, for TRL's loop, found --shard"):
        planned(world, method="dpo", shared_by=None)
    with pytest.raises(ValueError, match="bf16: expected float32 weights, found bfloat16"):
        planned(world, bf16=True, dtype=torch.bfloat16)
