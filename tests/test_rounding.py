"""narrow: one of the two neighbours, right in the mean, the same however it is cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from counterpoise.averaging.mix import mix
from counterpoise.checkpoints.rounding import NARROW, PERIOD, PIECE, key_of, narrow

HALVES = sorted(NARROW, key=str)


def neighbours(wide: torch.Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of `dtype` next below and above, found among all 65536 of them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).double()
    every = every[every.isfinite()].unique()
    x = wide.double()
    above = torch.searchsorted(every, x)
    below = torch.searchsorted(every, x, right=True) - 1
    return every[below].numpy(), every[above].numpy()


@pytest.mark.parametrize("dtype", HALVES)
@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_each_element_becomes_one_of_its_two_neighbours(dtype: torch.dtype, numbers: list[float], key: int) -> None:
    wide = torch.tensor(numbers)
    below, above = neighbours(wide, dtype)
    found = narrow(wide, dtype, key=key)
    assert found.dtype == dtype
    value = found.double().numpy()
    assert ((value == below) | (value == above)).all()  # of what the type holds, both are the number itself


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e-7, 1e-5, 0.02, 3.0])  # the first two reach float16's subnormals
def test_the_chance_of_the_upper_neighbour_is_the_part_cut_off(dtype: torch.dtype, scale: float) -> None:
    wide = scale * torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    below, above = neighbours(wide, dtype)
    between = above > below
    chance = ((wide.double().numpy() - below)[between]) / (above - below)[between]
    rose = narrow(wide, dtype, key=1).double().numpy()[between] == above[between]
    for low in np.arange(0, 1, 0.1):
        inside = (chance >= low) & (chance < low + 0.1)
        spread = np.sqrt((chance[inside] * (1 - chance[inside])).sum()) / inside.sum()
        assert abs(rose[inside].mean() - chance[inside].mean()) < 5 * spread


@pytest.mark.parametrize("dtype", HALVES)
@given(st.lists(st.integers(1, 3 * PIECE), min_size=1, max_size=3), st.integers(0, 3 * PERIOD))
@settings(max_examples=20, deadline=None)
def test_cut_up_in_any_way_the_bits_are_the_same(dtype: torch.dtype, lengths: list[int], start: int) -> None:
    wide = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(1))
    whole = narrow(wide, dtype, key=1, start=start)
    places = [start + sum(lengths[:i]) for i in range(len(lengths))]
    parts = [narrow(part, dtype, key=1, start=at) for part, at in zip(wide.split(lengths), places, strict=True)]
    assert torch.equal(torch.cat(parts), whole)


def test_keys_shapes_and_what_is_not_narrower() -> None:
    wide = torch.randn(300, 7).T
    first, second = (narrow(wide, torch.bfloat16, key=k) for k in (5, 6))
    assert first.shape == wide.shape
    assert torch.equal(first, narrow(wide.contiguous(), torch.bfloat16, key=5))
    assert 0.2 < (first != second).double().mean() < 0.5  # of two independent draws a third differs
    assert torch.equal(narrow(wide.double(), torch.float32, key=0), wide)
    strange = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    for dtype in HALVES:
        found = narrow(strange, dtype, key=0)
        assert torch.equal(found[:4].float(), strange[:4])
        assert found[1].signbit()
        assert found[4].isnan()


def test_another_default_dtype_and_other_strides_change_nothing() -> None:
    a, b = (torch.randn(3, 4, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    wanted = mix(a, b, 0.4)
    assert torch.equal(mix(a.T.contiguous().T, b.T.contiguous().T, 0.4, key=key_of(a, b)), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(narrow(wanted.float(), torch.bfloat16, key=0), wanted)
        assert torch.equal(mix(a, b, 0.4), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
