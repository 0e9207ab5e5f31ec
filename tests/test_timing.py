"""A device's speed at a plan's own model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from counterpoise.language.costs import Lengths, Plan, Stage
from counterpoise.language.work import Work
from counterpoise.planning import timing
from families import config_of
from tiny import CAUSAL, tiny

AT = Lengths(prompt=6, longest=9, response=4, batch=2, itemsize=4)
ALL = Work(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
OTHERS = ("mamba2", "rwkv", "xlstm", "openai-gpt", "recurrent_gemma", "jamba", "qwen3_moe", "gemma2")
"""States in the place of attention, caches by other names or none, experts, windows."""


def planned(family: str, work: Work = ALL, at: Lengths = AT) -> Plan:
    with torch.device("meta"):
        model = tiny(family) if family in CAUSAL else AutoModelForCausalLM.from_config(config_of(family))
    return Plan((Stage("all", "", work),), {}, "float32", model=model, at=at)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2", "gemma", *OTHERS])
@pytest.mark.filterwarnings("ignore")
def test_all_that_a_plan_has_work_for_is_timed_at_its_model(family: str) -> None:
    speed, how = timing.speed_at(planned(family), "cpu")
    layers = timing.shape_of(planned(family).model).layers  # type: ignore[arg-type]
    assert how == f"{layers} of the model's {layers} layers in float32, timed just now"
    assert all(x is not None and 0 < x < math.inf for x in (speed.flops, speed.drawn, speed.trained, speed.update))
    assert 0 <= speed.step < 5


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


def test_texts_longer_than_the_context_are_timed_up_to_it() -> None:
    long = Lengths(prompt=900, longest=1000, response=600, batch=1, itemsize=4)
    assert " layers in float32, timed just now" in timing.speed_at(planned("gpt2", at=long), "cpu")[1]


def test_a_model_that_cannot_be_timed_is_told_of_and_a_product_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> torch.nn.Module:
        raise RuntimeError("no kernel for it\nand advice")

    monkeypatch.setattr(timing, "_built", fails)
    speed, how = timing.speed_at(planned("llama"), "cpu")
    assert speed.flops > 0
    assert how == (
        "a matrix product in float32, timed just now; the model itself could not be timed: RuntimeError: no kernel for it"
    )
