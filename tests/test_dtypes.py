"""Computing in float32 where the device would imitate the stored dtype: what is chosen, what is told, which bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterpoise.averaging.mix import mix
from counterpoise.averaging.partition import thirds
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.preflight import preflight
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.workbench import Workbench
from counterpoise.language import dtypes
from counterpoise.language.dtypes import computed_in, is_imitated, placed, slowdown, warning
from counterpoise.language.prompts import Prompt
from counterpoise.records import Store
from tiny import save_pair, tiny


@pytest.fixture(params=[1.2, 90.0], ids=["computes", "imitates"])
def imitates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(dtypes, "slowdown", lambda dtype: request.param)
    return bool(request.param > dtypes.SLOW)


def test_this_machines_choice_is_never_many_times_slower_than_float32() -> None:
    for stored in (torch.bfloat16, torch.float16, torch.float32):
        assert slowdown(computed_in(stored, "cpu")) <= dtypes.SLOW


def test_the_speed_is_the_cpus_whatever_surrounds_the_call() -> None:
    true = slowdown(torch.bfloat16)
    slowdown.cache_clear()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        found = slowdown(torch.bfloat16)
    slowdown.cache_clear()
    assert (found > dtypes.SLOW) == (true > dtypes.SLOW)


def test_only_narrow_dtypes_on_a_cpu_that_is_here(imitates: bool) -> None:
    assert is_imitated(torch.bfloat16, "cpu") == is_imitated(torch.float16, "cpu") == imitates
    for dtype, device in (
        (torch.float32, "cpu"),
        (torch.float64, "cpu"),
        (torch.bfloat16, "cuda"),
        (torch.bfloat16, None),
    ):
        assert not is_imitated(dtype, device)
        assert computed_in(dtype, device) == dtype


def test_an_average_is_computed_wide_but_keeps_the_bits_it_has_on_disk(tmp_path: Path, imitates: bool) -> None:
    pair = preflight(*save_pair(tmp_path, dtype=torch.bfloat16))
    resident, cut = ResidentAverage(pair), thirds(pair.names)
    resident.set(cut, [0.2, 0.5, 0.9])
    assert resident.model.dtype == (torch.float32 if imitates else torch.bfloat16)
    ratios, state = cut.ratios(pair.names, [0.2, 0.5, 0.9]), resident.model.state_dict()
    for name in pair.names:
        assert torch.equal(state[name].to(torch.bfloat16), mix(*pair.tensors(name), ratios[name])), name


def test_the_bench_records_what_it_computes_in_and_tells_why(tmp_path: Path, imitates: bool) -> None:
    pair = preflight(*save_pair(tmp_path, dtype=torch.bfloat16))
    panel = Panel([Prompt((("user", "a"),))], lambda prompts, responses: [0.0] * len(responses), ())
    chosen = Workbench(pair, panel, Store(tmp_path / "work"))
    assert chosen.inputs["dtype"] == ("torch.float32" if imitates else "torch.bfloat16")
    assert len(chosen.warnings) == imitates
    insisting = Workbench(pair, panel, Store(tmp_path / "work"), dtype=torch.bfloat16)
    assert insisting.resident.model.dtype == torch.bfloat16
    assert insisting.inputs["dtype"] == "torch.bfloat16"
    assert len(insisting.warnings) == imitates


def test_a_model_is_widened_only_where_it_must_be(imitates: bool) -> None:
    model = tiny("llama").to(torch.bfloat16)
    model.model.norm.float()  # as transformers keeps some modules
    found = placed(model, "cpu")
    wanted = {torch.float32} if imitates else {torch.float32, torch.bfloat16}
    assert {p.dtype for p in found.parameters()} == wanted
    assert not found.training


def test_a_warning_names_the_option_that_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "slowdown", lambda dtype: 90.0)
    assert "--dtype bfloat16 insists" in str(warning(torch.bfloat16, None, "cpu"))
    assert "many times slower than float32: choose that" in str(warning(torch.float32, torch.bfloat16, "cpu"))
    assert warning(torch.bfloat16, torch.float32, "cpu") is None
    assert warning(torch.bfloat16, None, "cuda") is None
