"""DPO through TRL: it learns the preferences, and the mitigations act in it as in the plain loops."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._subclasses.fake_tensor import FakeTensorMode

from counterpoise.alignment.dpo import dpo, rows
from counterpoise.alignment.mitigations.anchors import KD, L1, L2, OnlineMerging
from counterpoise.alignment.mitigations.ema import MovingAverage
from counterpoise.alignment.mitigations.less import FreezeLowest, RewardBudget
from counterpoise.alignment.mitigations.lowrank import LowRank
from counterpoise.alignment.mitigations.replay import Replay
from counterpoise.alignment.preferences import Preference
from counterpoise.alignment.settings import DPO
from counterpoise.alignment.training.stepping import Mitigation
from counterpoise.alignment.training.trainers import on_own_gpu
from counterpoise.language.prompts import Prompt
from counterpoise.language.scoring import Example, continuation_logprobs
from tiny import tiny, tokenizer


def word(draw: random.Random, letters: str) -> str:
    return "".join(draw.choice(letters) for _ in range(5))


DRAW = random.Random(0)
PAIRS = [
    Preference(Prompt((("user", word(DRAW, "qrstuvwxyz")),)), word(DRAW, "abcdefgh"), word(DRAW, "ijklmnop"))
    for _ in range(16)
]
SIZES: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3}
CORPUS = [Example((1,), (40, 41, 42))]


def trained(*held: Mitigation, **settings: Any) -> torch.nn.Module:
    model = tiny("llama")
    dpo(model, tokenizer(), PAIRS, DPO(**{**SIZES, **settings}), mitigations=held)
    return model


def gap(a: torch.nn.Module, b: torch.nn.Module) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def margin(model: torch.nn.Module) -> float:
    words = tokenizer()
    prompts = [words(p.prompt.text)["input_ids"] for p in PAIRS]
    pairs = [[words(p.chosen)["input_ids"], words(p.rejected)["input_ids"]] for p in PAIRS]
    return sum(a - b for a, b in continuation_logprobs(model, prompts, pairs)) / len(PAIRS)


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    return trained()


def test_dpo_learns_the_preferences_of_an_in_memory_model() -> None:
    model = tiny("llama")
    lines = dpo(model, tokenizer(), PAIRS, DPO(epochs=4, batch_size=8, learning_rate=3e-3))
    assert len(lines) == 8
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["rewards/accuracies"] > 0.9
    assert margin(model) > margin(tiny("llama")) + 1
    assert "forward" not in model.__dict__


def test_a_mitigated_step_of_dpo_without_strength_is_an_unmitigated_one(plain: torch.nn.Module) -> None:
    assert gap(plain, trained(L2(0.0), L1(0.0), KD(0.0))) < 1e-6  # our clipping is TRL's
    assert gap(plain, tiny("llama")) > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda: [L1(0.5), MovingAverage(0.5), FreezeLowest(2)],
        lambda: [KD(3.0), Replay(1.0, CORPUS)],
        lambda: [L2(10.0), OnlineMerging(0.2)],
    ],
)
def test_mitigations_do_not_depend_on_micro_batches(make: Any, plain: torch.nn.Module) -> None:
    one, eight = trained(*make(), micro_batch_size=8), trained(*make(), micro_batch_size=1)
    assert gap(one, eight) < 2e-5
    assert gap(one, plain) > 1e-4


def test_lora_leaves_a_plain_model_of_low_rank_change() -> None:
    model, pre = trained(LowRank(1), learning_rate=1e-2), tiny("llama")
    changed = [
        (a - b).detach() for a, b in zip(model.parameters(), pre.parameters(), strict=True) if not torch.equal(a, b)
    ]
    assert changed
    assert {int(torch.linalg.matrix_rank(c, atol=1e-5)) for c in changed} == {1}


def test_without_a_chat_template_prompt_and_response_do_not_run_together() -> None:
    pairs = [Preference(Prompt((("user", asked),)), "yes", "no") for asked in ("Is it so?", "Is it so? ")]
    assert [row["prompt"] + row["chosen"] for row in rows(pairs, tokenizer(), chat=True)] == ["Is it so? yes"] * 2


def test_a_tokenizer_without_pad_token_takes_its_end_and_stays_as_it_was() -> None:
    words = tokenizer()
    words.pad_token = None
    model = tiny("llama")
    dpo(model, words, PAIRS[:8], DPO(**SIZES))
    assert words.pad_token is None
    assert gap(model, tiny("llama")) > 0


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer()
    words.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected an end-of-sequence token"):
        dpo(tiny("llama"), words, PAIRS, DPO(**SIZES))
    with pytest.raises(ValueError, match="a reward budget needs samples"):
        trained(RewardBudget(1.0))
    long = [Preference(Prompt((("user", "a" * 200),)), "b", "c")]
    with pytest.raises(ValueError, match="expected prompts shorter than 128 tokens, found none of 1"):
        dpo(tiny("llama"), tokenizer(), long, DPO(**SIZES))
    with pytest.raises(ValueError, match="micro-batches of 8, found 12"):
        trained(batch_size=12)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="expected whole weights in every process, found FSDP"):
        trained()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="KD adds a loss of its own, which is not shared among 2 processes"):
        trained(KD(1.0))


def rank(number: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in place.items()}
    model = trained(L2(1.0), MovingAverage(0.5))
    torch.save([p.detach() for p in model.parameters()], f"{folder}/{number}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    one = trained(L2(1.0), MovingAverage(0.5))
    for number in range(2):
        for a, b in zip(torch.load(tmp_path / f"{number}.pt"), one.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=2e-5)


def test_a_trainer_is_on_the_gpu_of_its_model_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL refuses one process that sees several GPUs, and transformers would take the first. No GPU is needed here."""
    import trl

    model = torch.nn.Module()
    with FakeTensorMode():
        model.weight = torch.nn.Parameter(torch.empty(1, device="cuda:1"))
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    config = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    vars(config)["_setup_devices"], config._n_gpu = torch.device("cuda:0"), 2  # as where there are two
    told = on_own_gpu(config, model)
    assert (told.device, told.n_gpu, told.train_batch_size) == (
        torch.device("cuda:1"),
        1,
        config.per_device_train_batch_size,
    )
    assert current == [torch.device("cuda:1")]
    assert on_own_gpu(config, torch.nn.Linear(1, 1)).device == torch.device(
        "cuda:1"
    )  # of a model on the CPU nothing changes
