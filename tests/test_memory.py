"""What a device has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from counterpoise.language import generating, scoring
from counterpoise.language.memory import as_fits, free_memory
from counterpoise.language.sampling import Drawing, sample
from counterpoise.language.scoring import continuation_logprobs
from counterpoise.language.ways import out_of_memory, succeeds
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
