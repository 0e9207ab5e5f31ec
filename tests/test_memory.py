"""What a device has left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from counterpoise.language import generating, scoring
from counterpoise.language.costs import Lengths
from counterpoise.language.footprints import drawing_bytes, scoring_bytes
from counterpoise.language.memory import MOST, SHARE, USUAL, as_fits, free_memory, rows_that_fit
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import continuation_logprobs
from counterpoise.language.shapes import Items, shape_of
from counterpoise.language.ways import out_of_memory, succeeds
from peak import Peak
from tiny import tiny, tokenizer


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="/proc/meminfo: Linux alone has it")
def test_pages_of_files_count_as_free_memory(tmp_path: Path) -> None:
    said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(said["MemAvailable"].split()[0])
    assert free_memory("cpu") == pytest.approx(available, rel=0.2)


def test_of_a_device_that_is_not_known_nothing_is_said() -> None:
    assert free_memory("meta") is None


def test_what_does_not_fit_is_done_by_halves_with_the_same_numbers_and_that_is_remembered() -> None:
    models, sizes = (tiny("llama", dtype=torch.float64), tiny("llama", dtype=torch.float64)), list[int]()
    prompts, choices = [(1, 5 + i, 9) for i in range(12)], [[(7, 8, 9 + i), (20, 21)] for i in range(12)]

    def small(module: torch.nn.Module, given: Any, named: Any) -> None:
        sizes.append(len(named["input_ids"]))
        torch.empty(1 << (50 if sizes[-1] > 7 else 5))

    for model in models:
        scoring.way_of(model), generating.way_of(model)
    models[1].register_forward_pre_hook(small, with_kwargs=True)
    how = Drawing(n=2, max_new_tokens=5, batch_size=24)
    with pytest.warns(UserWarning, match="drawing 2 a prompt: no memory for 6 at once, 3 are taken"):
        found = sample(models[1], tokenizer(), prompts, how)
    assert found == sample(models[0], tokenizer(), prompts, how)
    sizes.clear()
    assert sample(models[1], tokenizer(), prompts, how) == found
    assert max(sizes) == 6  # at once
    with pytest.warns(UserWarning, match="scoring: no memory for 6 at once, 3 are taken"):
        sums = continuation_logprobs(models[1], prompts, choices)
    for some, wanted in zip(sums, continuation_logprobs(models[0], prompts, choices), strict=True):
        assert some == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        sample(models[1], tokenizer(), prompts, Drawing(n=8, max_new_tokens=5))


SAID = (
    "[enforce fail at alloc_cpu.cpp:130] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    "MPS backend out of memory (MPS allocated: 1 GB)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
)


@pytest.mark.parametrize("error", [*map(RuntimeError, SAID), torch.OutOfMemoryError("CUDA"), MemoryError()])
def test_a_lack_of_memory_is_known_as_one_and_does_not_rule_out_a_way(error: Exception) -> None:
    def check() -> bool:
        raise error

    assert out_of_memory(error)
    with pytest.raises(type(error)):
        succeeds(check)
    assert not out_of_memory(RuntimeError("shapes"))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def fails(rows: Any) -> Any:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        as_fits(tiny("llama"), "failing", [1, 2], fails)


def halves(rows: int) -> float:
    return 100.0 * rows


def test_rows_that_fit_are_those_asked_for_or_a_half_of_a_half_of_them() -> None:
    assert [rows_that_fit(48, halves, free) for free in (4800, 4799, 2399, 1)] == [48, 24, 12, 1]
    assert rows_that_fit(48, halves, 1, least=4) == 4
    assert rows_that_fit(3, halves, None, least=4) == 4
    assert [rows_that_fit("auto", halves, free) for free in (1e9, 1000, 999, 1)] == [MOST, 8, 4, 1]  # a fifth is left
    assert rows_that_fit("auto", halves, None) == USUAL


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_auto_takes_the_rows_that_the_dry_run_tells_and_its_numbers_are_those_of_any_batch(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family, dtype=torch.float64)
    prompts = [(1, 5 + i % 9, *range(9, 9 + i % 5)) for i in range(40)]
    choices = [[(7, 8, 9 + i % 9), (20, 21)] for i in range(40)]
    how, shape, sizes = Drawing(n=2, max_new_tokens=5), shape_of(model), list[int]()
    fixed = sample(model, tokenizer(), prompts, how), continuation_logprobs(model, prompts, choices)
    at = Lengths(3.5, 6, 5, 1, 8, auto=True, room=drawing_bytes(shape, 30, 6, 5, 8) / SHARE)
    items = Items("", 1, 6, 2, 3, shared=scoring.way_of(model).shares)
    model.register_forward_pre_hook(lambda m, a, named: sizes.append(len(named["input_ids"])), with_kwargs=True)
    monkeypatch.setattr("counterpoise.language.memory.free_memory", lambda device: at.room)
    found = sample(model, tokenizer(), prompts, replace(how, batch_size="auto"))
    assert (max(sizes), at.drawn_at_once(shape, 2)) == (16, 16)
    sizes.clear()
    sums = continuation_logprobs(model, prompts, choices, batch_size="auto")
    rows = at.scored_at_once(shape, items)
    assert max(sizes) in (rows, 2 * rows)  # with the choices of each
    assert found == fixed[0]
    for some, wanted in zip(sums, fixed[1], strict=True):
        assert some == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [500, 8000])
def test_drawing_and_scoring_take_no_more_than_is_told(dtype: torch.dtype, words: int) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=192,
        vocab_size=words, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    shape = shape_of(model)
    scoring.way_of(model), generating.way_of(model)
    for n, prompt, new in ((1, 200, 10), (4, 60, 10), (1, 10, 40)):
        with Peak(model.parameters()) as peak:
            sample(model, tokenizer(), [(5,) * prompt] * (16 // n), Drawing(n=n, max_new_tokens=new))
        assert 0.2 < peak.bytes / drawing_bytes(shape, 16, prompt, new, dtype.itemsize) < 1.1
    for prompt, count, new in ((100, 4, 5), (20, 4, 40), (100, 1, 60)):
        with Peak(model.parameters()) as peak:
            continuation_logprobs(model, [(5,) * prompt] * 16, [[(6,) * new] * count] * 16)
        told = scoring_bytes(shape, Items("", 1, prompt, count, new), batch=16, itemsize=dtype.itemsize)
        assert 0.3 < peak.bytes / told < 1.1
