"""What can be done after training, with PRE and POST alone: every average that the front compares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from adamerging import adamerging

from counterpoise.averaging.partition import Partition, layerwise, thirds
from counterpoise.evaluation.workbench import Workbench
from counterpoise.search.hma import linear_ramp
from counterpoise.search.on_bench import answers, hma_ratios, proxies
from counterpoise.search.proxies import ProxySet

AFTER = ("MA", "ExPO", "HMA", "LiNeS", "part-wise", "AdaMerging")
BEYOND = 1.2
"""The ratio of ExPO."""
PART = 0.4
"""The ratio of the third that part-wise averaging gives back."""


class Average(NamedTuple):
    """Ratios to be measured."""

    name: str
    method: str
    cut: Partition
    ratios: tuple[float, ...]
    settings: dict[str, Any]


def averages(bench: Workbench, methods: Sequence[str], means: Sequence[float], *, size: int) -> Iterator[Average]:
    """The averages of some methods, each searched once.

    Args:
        methods: of AFTER.
        size: good responses of POST that HMA and AdaMerging see; AdaMerging also sees a quarter as many right answers
            of validation items of each ability, which count as much in all.
    """
    names = bench.pair.names
    deep, three, whole = layerwise(names), thirds(names), bench.whole
    for mean in means:
        if "MA" in methods:
            yield Average(f"MA {mean:g}", "MA", whole, (mean,), {})
        if "LiNeS" in methods:
            yield Average(f"LiNeS {mean:g}", "LiNeS", deep, tuple(linear_ramp(deep, mean).tolist()), {})
        if "HMA" in methods:
            found = hma_ratios(bench, three, proxies(bench, size), mean)
            yield Average(f"HMA {mean:g}", "HMA", three, found.ratios, {"passes": found.passes})
    if "ExPO" in methods:
        yield Average(f"ExPO {BEYOND:g}", "ExPO", whole, (BEYOND,), {})
    if "part-wise" in methods:
        for index, name in enumerate(("input", "middle", "output")):
            ratios = tuple(PART if i == index else 1.0 for i in range(3))
            yield Average(f"{name} third {PART:g}", "part-wise", three, ratios, {})
    if "AdaMerging" in methods:
        yield adamerged(bench, deep, size)


def adamerged(bench: Workbench, cut: Partition, size: int) -> Average:
    """Ratios for the likelihood of POST's good responses and of right answers, half and half."""
    good = ProxySet(tuple(proxies(bench, size)), bench.panel.drawing.rows // 2)
    right = ProxySet(
        tuple(e for rows in answers(bench, size // 4).values() for e in rows), bench.panel.drawing.rows // 2
    )

    def run() -> dict[str, Any]:
        found = adamerging(
            bench.resident, cut, lambda model: good.backward(model) + right.backward(model), max_passes=8
        )
        return {"ratios": list(found.ratios), "passes": found.passes, "converged": found.converged}

    key = {"what": "adamerging", "model": bench.inputs, "cut": cut.name, "size": size, "panel": bench.panel.fingerprint}
    found = bench.store.once(key, run)
    ratios = tuple(found.pop("ratios"))
    return Average("AdaMerging", "AdaMerging", cut, ratios, found)
