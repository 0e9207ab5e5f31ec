"""Colours and marks, one truth for the page and the figures: distinct under the common colour-vision deficiencies, and
methods differ in shape as well."""

from __future__ import annotations

from dataclasses import dataclass

# role -> (light, dark); figures are drawn in the light ones, and the page swaps them where dark is preferred
_COLOURS = {
    "surface": ("#ffffff", "#14171b"),
    "raised": ("#f6f7f8", "#1c2025"),
    "ink": ("#1b2026", "#e9ebee"),
    "muted": ("#5b6570", "#9ea7b1"),
    "rule": ("#d3d8dd", "#3a414a"),
    "faint": ("#e9ecef", "#272c33"),
    "blue": ("#0069a8", "#58aee8"),
    "vermilion": ("#cc5500", "#f58a42"),
    "green": ("#00896a", "#35c09a"),
    "pink": ("#b5659d", "#dd97c6"),
    "ochre": ("#8f7000", "#d8b741"),
    "grey": ("#868d95", "#7d858e"),
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    symbol: str


_LOOKS = {
    "PRE": ("ink", "square"),
    "POST": ("ink", "diamond"),
    "MA": ("blue", "circle"),
    "HMA": ("vermilion", "triangle-up"),
    "LiNeS": ("green", "cross"),
    "slope 2": ("green", "hexagram"),
    "step": ("green", "square-x"),
    "two-sided path": ("ochre", "star"),
    "two-sided exact": ("ochre", "pentagon"),
    "healed": ("vermilion", "star"),
    "reversed": ("pink", "triangle-down"),
    "random": ("grey", "x"),
}
SERIES = ("blue", "vermilion", "green", "pink", "ochre", "grey")


def light(role: str) -> str:
    """The light colour of a role."""
    return _COLOURS[role][0]


def look_of(method: str) -> Look:
    """How a method is drawn; one that is not known here gets the spare colour."""
    role, symbol = _LOOKS.get(method, ("ochre", "hexagon"))
    return Look(light(role), symbol)


def css(*, dark: bool) -> str:
    """The colours as custom properties."""
    return " ".join(f"--{role}: {pair[dark]};" for role, pair in _COLOURS.items())


def dark_of() -> dict[str, str]:
    """Light colour -> dark colour."""
    return dict(_COLOURS.values())
