"""How numbers are written: as many digits as their interval earns, a true minus sign, p values with a floor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"


def places(low: float | None, high: float | None) -> int:
    """Decimals that show two digits of the interval's half width, between 0 and 3.

    >>> places(58.1, 64.4), places(-2.15, -2.09), places(0.0, 0.0)
    (1, 3, 2)
    """
    if low is None or high is None:
        return 2
    half = (high - low) / 2
    if not math.isfinite(half) or half <= 0:
        return 2
    return min(3, max(0, 1 - math.floor(math.log10(half))))


def number(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """A number with thousands separators and a minus sign; a dash when there is none.

    >>> number(-0.04, 1), number(1234.5, 0), number(0.5, 2, signed=True), number(None, 2)
    ('0.0', '1,234', '+0.50', '–')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    value = round(value, decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    text = f"{value:{'+' if signed and value else ''},.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def with_interval(found: Mapping[str, Any], *, signed: bool = False, decimals: int | None = None) -> tuple[str, str]:
    """Value and "[low, high]" of a dict with these keys, in matching decimals; "" where the interval is nil or absent.

    >>> with_interval({"value": -2.12, "low": -2.15, "high": -2.09})
    ('−2.120', '[−2.150, −2.090]')
    >>> with_interval({"value": 0.5, "low": None, "high": None})
    ('0.50', '')
    """
    low, high = found.get("low"), found.get("high")
    digits = places(low, high) if decimals is None else decimals
    value = number(found.get("value"), digits, signed=signed)
    if low is None or high is None or low == high or not math.isfinite(high - low):
        return value, ""
    return value, f"[{number(low, digits, signed=signed)}, {number(high, digits, signed=signed)}]"


def spoken(found: Mapping[str, Any] | None, *, signed: bool = False, decimals: int | None = None) -> str:
    """Value and interval in one string.

    >>> spoken({"value": 61.3, "low": 58.1, "high": 64.4})
    '61.3 [58.1, 64.4]'
    """
    return " ".join(filter(None, with_interval(found, signed=signed, decimals=decimals))) if found else MISSING


def span(values: Sequence[float], decimals: int, *, signed: bool = False) -> str:
    """The least and the largest of some values.

    >>> span([0.44, 0.0, 0.76], 2)
    '0.00 to 0.76'
    """
    return " to ".join(number(v, decimals, signed=signed) for v in (min(values), max(values)))


def p_value(p: float | None) -> str:
    """Three decimals below 0.1, two above, and a floor: a bootstrap cannot resolve less.

    >>> p_value(0.0004), p_value(0.0314), p_value(0.42)
    ('< 0.001', '0.031', '0.42')
    """
    if p is None or not math.isfinite(p):
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def ratio_list(ratios: list[float]) -> str:
    """Ratios as "0.00 · 0.44 · 0.76", or their number and range when there are more than six."""
    if len(ratios) > 6:
        return f"{len(ratios)} ratios, {span(ratios, 2)}"
    return " · ".join(number(r, 2) for r in ratios)
