"""Parts by content hash."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

from hypothesis import given, strategies as st

from counterpoise.evaluation.items import Item
from counterpoise.evaluation.likelihood import Continuation
from counterpoise.evaluation.parts import PARTS, part_of


@given(st.text())
def test_a_part_is_the_range_that_the_hash_falls_into(content: str) -> None:
    percent = 100 * int(hashlib.sha256(content.encode()).hexdigest()[:16], 16) // 16**16
    assert part_of(content) == ("proxy" if percent < 40 else "validation" if percent < 70 else "held-out")


def test_known_items_stay_where_they_are() -> None:
    """Stored experiments are void when one of these moves; the digests are sha256sum's."""
    assert part_of("hello") == "proxy"  # 2cf2...: 0.18
    assert part_of("password") == "proxy"  # 5e88...: 0.37
    assert part_of("test") == "validation"  # 9f86...: 0.62
    assert part_of("abc") == "held-out"  # ba78...: 0.73
    assert part_of("") == "held-out"  # e3b0...: 0.89


def test_shares_are_near_40_30_30_also_for_items_that_are_alike() -> None:
    counts = Counter(part_of(f"item {n}") for n in range(20_000))
    for part, share in zip(PARTS, (0.4, 0.3, 0.3), strict=True):
        assert abs(counts[part] / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5


def test_parts_are_disjoint_and_do_not_see_order_or_new_items() -> None:
    items = [Item({"context": f"number {n}", "continuation": str(n)}) for n in range(100)]
    old = Continuation("numbers", tuple(items[:60]))
    shuffled = Continuation("numbers", tuple(random.Random(0).sample(items, 100)))
    parts = {part: [item.key for item in shuffled.items_of(part)] for part in PARTS}
    assert sorted(key for keys in parts.values() for key in keys) == sorted(item.key for item in items)
    for part in PARTS:
        before = [item.key for item in old.items_of(part)]
        assert [key for key in parts[part] if key in before] == before
        assert {part_of(key) for key in parts[part]} == {part}
