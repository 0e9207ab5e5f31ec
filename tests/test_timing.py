"""A device's speed at a plan's own model."""

from __future__ import annotations

import math

import pytest
import torch

from counterpoise.language.costs import Lengths, Plan, Stage, Work
from counterpoise.planning import timing
from tiny import tiny

AT = Lengths(prompt=6, longest=9, response=4, batch=2, itemsize=4)
ALL = Work(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def planned(family: str, work: Work = ALL) -> Plan:
    with torch.device("meta"):
        model = tiny(family)
    return Plan((Stage("all", "", work),), {}, "float32", model=model, at=AT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2", "gemma"])
def test_all_that_a_plan_has_work_for_is_timed_at_its_model(family: str) -> None:
    speed, how = timing.speed_at(planned(family), "cpu")
    assert how.startswith("6 of the model's 6 layers in float32")
    assert all(x is not None and 0 < x < math.inf for x in (speed.flops, speed.drawn, speed.trained, speed.update))
    assert 0 <= speed.step < 5
    seconds = [Work(**{what: 1e6}).seconds(speed) for what in ("flops", "steps", "update")]
    assert all(s >= 0 for s in seconds)


def test_what_a_plan_has_no_work_for_is_not_timed() -> None:
    speed, _ = timing.speed_at(planned("llama", Work(flops=1.0)), "cpu")
    assert (speed.drawn, speed.trained, speed.step) == (None, None, 0.0)


def test_a_model_too_large_for_the_memory_is_timed_at_two_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "free_memory", lambda device: 0)
    built: list[int] = []
    real = timing._times

    def times(model: torch.nn.Module, *rest: object) -> timing.Times:
        built.append(len(model.model.layers))  # type: ignore[union-attr,arg-type]
        real(model, *rest)  # type: ignore[arg-type]
        return timing.Times(*(float(built[-1]) + 1.0,) * 4)  # a second a layer, and one beside

    monkeypatch.setattr(timing, "_times", times)
    speed, how = timing.speed_at(planned("llama"), "cpu")
    assert built == [1, 3]
    assert how.startswith("3 of the model's 6 layers")
    whole = timing.forward(timing.shape_of(planned("llama").model), 10, sequences=2, logits=4).flops  # type: ignore[arg-type]
    assert speed.flops == pytest.approx(whole / 7.0)


def test_a_plan_without_a_model_is_timed_by_a_product() -> None:
    speed, how = timing.speed_at(Plan((), {}, "float32"), "cpu")
    assert speed.flops > 0
    assert "matrix product" in how
