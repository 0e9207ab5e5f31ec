"""Dry runs of `align`: its memory, also of `--shard`, `--bf16` and mitigations, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from counterpoise.alignment.from_options import Alignment, Files
from counterpoise.alignment.mitigations.anchors import KD
from counterpoise.alignment.mitigations.replay import Replay
from counterpoise.alignment.training.models import Machine
from counterpoise.alignment.training.stepping import Step
from counterpoise.cli.app import app
from counterpoise.language.costs import Plan, Stage, drawing
from counterpoise.language.footprints import drawing_bytes, training_bytes
from counterpoise.language.scoring import Example, response_nll
from counterpoise.language.shapes import shape_of
from counterpoise.planning.align import plan_align
from counterpoise.planning.looking import look
from peak import Peak
from world import make


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("world"))
    pairs = [{"prompt": f"ab {n}", "chosen": "yes", "rejected": "no no"} for n in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return folder


def planned(
    world: Path,
    *,
    method: str = "ppo",
    held: dict[str, Any] | None = None,
    chosen: dict[str, Any] | None = None,
    drawing: dict[str, Any] | None = None,
    micro: int = 8,
    **more: Any,
) -> Plan:
    files = (
        Files(world / "prompts.jsonl", "world:early_letters")
        if method != "dpo"
        else Files(preferences=world / "pairs.jsonl")
    )
    draws = method != "dpo" or (held or {}).get("replay") == "self"
    settings = {
        "micro_batch_size": micro,
        **(chosen or {}),
        **({"max_new_tokens": 6, **(drawing or {})} if draws else {}),
    }
    shared = {"shared_by": more.pop("shared_by")} if "shared_by" in more else {}
    machine = Machine(**more, shard=shared.get("shared_by", 1) != 1)
    source, out = str(world / "pre"), world / "aligned"
    wanted = Alignment(source, out, method, files, settings, held or {}, machine=machine)
    return plan_align(wanted, **shared)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_weights_that_are_mapped_here_take_no_memory(world: Path, dtype: torch.dtype) -> None:
    files = Files(world / "prompts.jsonl", "world:early_letters")
    wanted = Alignment(
        str(world / "pre"), world / "aligned", "ppo", files, {"max_new_tokens": 6}, machine=Machine(dtype)
    )
    there, here = plan_align(wanted).resident, plan_align(wanted, present=True).resident
    assert there["PRE, frozen"] == there["weights"]
    assert dict(here) == {n: s for n, s in there.items() if n != "PRE, frozen" or dtype == torch.float64}


def test_with_lora_only_the_frozen_weights_are_shared_out(world: Path) -> None:
    whole, cut = planned(world, held={"lora": 2}), planned(world, held={"lora": 2}, shared_by=4)
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
        told("--shard").removeprefix("device: cpu ")
        == "error: shard: expected several processes, found one; start it with torchrun --nproc-per-node N"
    )


def test_what_the_run_would_refuse_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match="dpo: expected whole weights, for TRL's loop, found --shard"):
        planned(world, method="dpo", shared_by=None)
    with pytest.raises(ValueError, match="bf16: expected float32 weights, found bfloat16"):
        planned(world, bf16=True, dtype=torch.bfloat16)
    for anchor in ("l1", "l2", "merge"):
        with pytest.raises(ValueError, match=f"--{anchor}: .* with LoRA, whose factors are no part of PRE, use kd"):
            planned(world, held={"lora": 2, anchor: 0.1})
    with pytest.raises(ValueError, match="dpo: a reward budget needs samples, which dpo does not draw"):
        planned(world, method="dpo", held={"stop_at_reward": 1.0})
    with pytest.raises(ValueError, match=r"dpo: expected a batch size .* in micro-batches of 8, found 12"):
        planned(world, method="dpo", chosen={"batch_size": 12})
    with pytest.raises(ValueError, match="expected prompts of at most 2 tokens"):  # PRE would respond
        planned(world, method="dpo", held={"replay": "self"}, drawing={"max_new_tokens": 126})


def stage(plan: Plan, name: str) -> Stage:
    return next(s for s in plan.stages if s.name == name)


def test_replays_of_pre_are_a_stage_of_their_own_before_all_others(world: Path) -> None:
    shape = look(str(world / "pre")).shape
    for method, count, prompt in (("rsf", 120, 5), ("dpo", 20, 4.5)):
        plan, plain = planned(world, method=method, held={"replay": "self"}), planned(world, method=method)
        first, *others = plan.stages
        assert (first.name, first.what) == ("replay: PRE's responses", f"{count} responses")
        assert first.work == drawing(shape, prompt, 6, prompts=count, batch=64, itemsize=4)
        assert [s.name for s in others] == [s.name for s in plain.stages]
        assert plan.peak == plain.peak  # gradients and moments are not there yet


def test_memory_of_training_is_that_of_the_longest_replayed_text(world: Path, tmp_path: Path) -> None:
    shape, plain = look(str(world / "pre")).shape, planned(world, method="rsf")
    corpus = tmp_path / "corpus.jsonl"
    for length, told in ((4, stage(plain, "training").memory), (200, training_bytes(shape, 8, 1, 127, 4))):
        corpus.write_text(json.dumps({"text": "a" * length}) + "\n")
        assert stage(planned(world, method="rsf", held={"replay": str(corpus)}), "training").memory == told
    corpus.write_text('{"txt": "a"}\n')
    with pytest.raises(ValueError, match=r'expected \{"text": ...\}'):
        planned(world, held={"replay": str(corpus)})


def test_drawing_takes_n_responses_at_least_and_does_not_depend_on_micro_batches(world: Path) -> None:
    shape = look(str(world / "pre")).shape

    def drawn(**more: Any) -> int:
        return stage(planned(world, method="rsf", **more), "drawing and rewards").memory

    assert drawn() == drawn(micro=1) == drawing_bytes(shape, 64, 5, 6, 4)
    assert drawn(chosen={"n": 24}) == drawing_bytes(shape, 48, 5, 6, 4)
    assert drawn(chosen={"n": 100}) == drawing_bytes(shape, 100, 5, 6, 4)
    assert drawn(drawing={"draw_batch_size": 16}) == drawing_bytes(shape, 32, 5, 6, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [96, 2000])
def test_a_step_takes_no_more_than_a_quarter_above_what_is_told_with_kd_and_replay_too(
    dtype: torch.dtype, words: int
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        vocab_size=words,
        max_position_embeddings=256,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    examples = [Example(tuple(range(3, 19)), (5, 6, 7, 8) * 16)] * 4
    texts = [Example((3,), (5, 6, 7) * 85)] * 4
    kd, replay = KD(0.1), Replay(4.0, texts)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for held in (kd, replay):
        held.start(model, None)
    own = [t for p in model.parameters() for t in (p, p.grad)] + list(kd._reference.parameters())
    sizes = {KD: (16, 64), Replay: (1, 255), type(None): (16, 64)}
    peaks = {}
    for held in (None, kd, replay):
        with Peak(own) as peak:
            if held is None:
                response_nll(model, examples).backward()
            else:
                held.add_gradients(Step(model, examples, 1e-5, 4))
        told = training_bytes(shape_of(model), 4, *sizes[type(held)], dtype.itemsize)
        assert told / 2 < peak.bytes < 1.25 * told, (held, peak.bytes / told)
        peaks[held and type(held)] = peak.bytes
    assert peaks[KD] < 1.5 * peaks[None]  # the reference's logits, beside chunks that are small in bfloat16
