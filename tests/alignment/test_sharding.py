"""Weights cut up among two gloo processes: the numbers of one process, half of the memory, the same after a kill."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import (
    NAMES,
    PROMPTS,
    alone,
    goes_on_after_a_kill,
    in_two,
    job,
    letters,
    lines,
    pre,  # noqa: F401  # a fixture
)
from torch.distributed.tensor import DTensor

from counterpoise.alignment.align import align
from counterpoise.alignment.distil import Sample, distil
from counterpoise.alignment.dpo import dpo
from counterpoise.alignment.from_options import Alignment, Files
from counterpoise.alignment.mitigations.ema import MovingAverage
from counterpoise.alignment.mitigations.less import FreezeLowest
from counterpoise.alignment.mitigations.lowrank import LowRank
from counterpoise.alignment.rsf import rsf
from counterpoise.alignment.settings import RSF, Distil
from counterpoise.alignment.training.models import Machine, frozen_copy, load
from counterpoise.alignment.training.processes import shared_by_length
from counterpoise.alignment.training.sharding import part_like, shard, whole, whole_weights
from counterpoise.alignment.training.stepping import Step
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import Example
from counterpoise.language.sharded import own_part
from tiny import save_pair, tiny


def tied_job(before: Path, out: Path, *, shard: bool = False) -> None:
    """A head tied to the embeddings, the mitigations that the other jobs leave out, and LoRA in rounds of drawing."""
    samples = [Sample(p, "abc"[: 1 + i % 3], 1.0, 0.5) for i, p in enumerate(PROMPTS)]
    sizes: dict[str, Any] = {"batch_size": 3, "micro_batch_size": 1, "learning_rate": 1e-2}
    held = [FreezeLowest(2), MovingAverage(0.5, 3, open_checkpoint(before))]
    how = Machine(torch.float64, shard=shard)
    learned = partial(distil, settings=Distil(epochs=2, **sizes), samples=samples)
    align(before, out / "distil", learned, mitigations=held, machine=how)
    rounds = partial(
        rsf,
        settings=RSF(drawing=Drawing(n=2, max_new_tokens=5), iterations=1, prompts_per_iteration=10, epochs=1, **sizes),
        prompts=PROMPTS,
        reward=letters,
    )
    align(before, out / "rsf", rounds, mitigations=[LowRank(2)], machine=how)


def everything(number: int, before: Path, tied: Path, folder: Path) -> None:
    """All methods, and what one process sees of a model that is cut up."""
    for name in NAMES:
        job(name, before, folder / name, shard=True)
    tied_job(tied, folder / "tied", shard=True)
    found: dict[str, Any] = {}
    model, words = load(before, Machine(torch.float64, shard=True))
    plain, _ = load(before, Machine(torch.float64))
    pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
    found["share"] = sum(own_part(p).numel() for p, _ in pairs) / sum(p.numel() for _, p in pairs)
    found["cut"] = [isinstance(p, DTensor) for p, _ in pairs]
    found["parts"] = [torch.equal(own_part(p), part_like(q, p)) for p, q in pairs]
    wholes = [whole(p) for p, _ in pairs]
    found["whole"] = [None if w is None else torch.equal(w, q) for w, (_, q) in zip(wholes, pairs, strict=True)]
    prompts = [(1, 5), (1, 6, 7), (1, 8)][: 1 + 2 * number]  # one draws more often than the other
    with whole_weights(model):
        drawn = sample(model, words, prompts, Drawing(n=2, max_new_tokens=4, batch_size=2))
    found["drawn"] = drawn == sample(plain, words, prompts, Drawing(n=2, max_new_tokens=4, batch_size=2))
    found["cut again"] = [isinstance(p, DTensor) for p in model.parameters()]
    step = Step(model, [Example((1,), (5,) * length) for length in (3, 1, 2)], 0.1, 1)
    found["rows"] = [(list(rows), rows.weight) for rows in step.batches(step.examples)]
    wrongs = {
        "copy": lambda: frozen_copy(model),
        "dpo": lambda: in_dpo(before),
        "trl": lambda: dpo(model, words, [], reference=plain),
    }
    for name, wrong in wrongs.items():
        with pytest.raises(ValueError, match="shard") as refused:
            wrong()
        found[name] = str(refused.value)
    for kind, how in {"mixed": {"bf16": True}, "full": {}}.items():
        model, words = load(before, Machine(shard=True, **how))
        samples = [Sample(p, "abc", 1.0, 0.5) for p in PROMPTS]
        losses = distil(model, words, samples, Distil(epochs=2, learning_rate=1e-2, batch_size=3, micro_batch_size=1))
        found[kind] = [losses, [str(own_part(p).dtype) for p in model.parameters()]]
    (folder / f"{number}.json").write_text(json.dumps(found))


def in_dpo(before: Path) -> None:
    Alignment(
        str(before), before.with_name("out"), "dpo", Files(preferences=before), machine=Machine(shard=True)
    ).check()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("tied"), "qwen2", tied=True, dtype=torch.float64)[0]


@pytest.fixture(scope="module")
def two(pre: Path, tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("two")
    in_two(everything, pre, tied, folder)
    return folder


def told(two: Path) -> list[dict[str, Any]]:
    return [json.loads((two / f"{number}.json").read_text()) for number in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_cut_up_it_trains_as_one_process_does(name: str, pre: Path, two: Path) -> None:  # noqa: F811
    single, _ = alone(name)
    one, both, before = (open_checkpoint(p) for p in (single, two / name, pre))
    assert set(one) == set(both)
    for tensor in one:
        torch.testing.assert_close(both[tensor], one[tensor], rtol=1e-9, atol=1e-9)
    assert max(float((one[n] - before[n]).abs().max()) for n in one) > 1e-3
    for a, b in zip(lines(single), lines(two / name), strict=True):
        for key, value in a.items():
            assert b[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6, abs=1e-7))
    assert json.loads((two / name / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_each_process_holds_half_and_no_row_twice(two: Path) -> None:
    shares = [each["share"] for each in told(two)]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.55
    for each in told(two):
        assert all(each["cut"])
        assert all(each["parts"])
        assert all(each["cut again"])
    assert all(told(two)[0]["whole"])
    assert set(told(two)[1]["whole"]) == {None}  # the host's memory holds a whole tensor once


def test_processes_draw_on_their_own(two: Path) -> None:
    assert [each["drawn"] for each in told(two)] == [True, True]


def test_a_process_without_rows_keeps_the_others_company_at_weight_0(two: Path) -> None:
    assert [each["rows"] for each in told(two)] == [[[[0], 1], [[1], 1]], [[[2], 1], [[1], 0]]]
    assert [list(r) for r in shared_by_length([3, 1, 2], 2, together=True)] == [[0, 2], [1]]


def test_mixed_precision_keeps_float32_rows_and_both_see_one_loss(two: Path, pre: Path) -> None:  # noqa: F811
    whole_model, words = load(pre, Machine(bf16=True))
    samples = [Sample(p, "abc", 1.0, 0.5) for p in PROMPTS]
    by_itself = distil(
        whole_model, words, samples, Distil(epochs=2, learning_rate=1e-2, batch_size=3, micro_batch_size=1)
    )
    first, second = told(two)
    assert first["mixed"] == second["mixed"]
    assert first["mixed"][0] != first["full"][0]
    assert first["mixed"][0] == pytest.approx(by_itself, rel=0.05)
    assert first["mixed"][0][1] < first["mixed"][0][0]
    assert set(first["mixed"][1]) == {"torch.float32"}


def test_tied_weights_are_written_once(two: Path, tied: Path, tmp_path: Path) -> None:
    tied_job(tied, tmp_path)
    for method in ("distil", "rsf"):
        one, both = open_checkpoint(tmp_path / method), open_checkpoint(two / "tied" / method)
        assert set(both) == set(one) == set(open_checkpoint(tied))
        for tensor in one:
            torch.testing.assert_close(both[tensor], one[tensor], rtol=1e-9, atol=1e-9)
        files = [sum(f.stat().st_size for f in c.files) for c in (one, both)]
        assert files[0] == files[1]


def test_what_cannot_be_is_refused(two: Path) -> None:
    for each in told(two):
        assert "give load_frozen(..., shard=True)" in each["copy"]
        assert each["dpo"].startswith("dpo: expected whole weights, for TRL's loop, found --shard")
        assert each["trl"].startswith("dpo: expected whole weights, for TRL's loop, found ones that `shard` cut up")
    with pytest.raises(ValueError, match="shard: expected several processes, found one; start it with torchrun"):
        shard(tiny("llama"), "cpu")


def test_killed_it_goes_on_with_the_same_bits_cut_up_or_whole(pre: Path, two: Path, tmp_path: Path) -> None:  # noqa: F811
    goes_on_after_a_kill("ppo", pre, two, tmp_path, shard=True)  # rsf: in test_processes, not cut up
