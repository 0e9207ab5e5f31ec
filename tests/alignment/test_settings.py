"""What methods are told: records give the settings back, and what a method has not is refused."""

from __future__ import annotations

import json

import pytest

from counterpoise.alignment.settings import DPO, PPO, RSF, Distil, Settings


@pytest.mark.parametrize("kind", [RSF, PPO, DPO, Distil])
def test_a_record_of_settings_makes_them_again(kind: type[Settings]) -> None:
    changed = kind.of({"epochs": 7, "seed": 5, "chat": False, "micro_batch_size": 1})
    assert changed != kind()
    told = json.loads(json.dumps(changed.told))
    assert told.keys() == kind.options()
    assert kind.of(told) == changed


@pytest.mark.parametrize(("kind", "option"), [(PPO, "n"), (RSF, "beta"), (DPO, "temperature"), (Distil, "iterations")])
def test_an_option_that_a_method_has_not_is_refused_by_its_name(kind: type[Settings], option: str) -> None:
    with pytest.raises(ValueError, match=f"--{option}: not a setting of {kind.title}; leave it out"):
        kind.of({option: 2})
    assert kind.of({option: 2}, others=[option]) == kind()
