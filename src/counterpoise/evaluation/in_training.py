"""The tax while a model is trained: what every framework's callback shares."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from counterpoise.evaluation.abilities import load_abilities
from counterpoise.evaluation.measurement import BOUNDS, Measurement, at_floor
from counterpoise.evaluation.panel import Panel, primary_first
from counterpoise.evaluation.parts import Part
from counterpoise.ranks import from_first
from counterpoise.records import digest
from counterpoise.statistics.bootstrap import Studentised, paired

MEAN = "mean"
Taxes = dict[str, dict[str, float]]
"""Ability, or `MEAN` -> value, low and high of its tax in points."""


class Watch:
    """A panel's abilities, what PRE scored on them, and how far each may fall.

    Attributes:
        pre: what counts of each ability, None before the start.
        floored: abilities that PRE does not have: nothing is there to be lost, so they have no bound and no share in the mean.
        stopped: why training was stopped; "" while it was not.
        kept: path and step of the last checkpoint inside the bound, None where there is none.

    Raises:
        ValueError: no ability, one that is called "mean", a bound that is none or of an unknown ability.
    """

    def __init__(
        self, panel: Panel | Sequence[str], every: int, at_most: float | Mapping[str, float] | None, part: Part
    ) -> None:
        if not isinstance(panel, Panel):
            panel = Panel(
                (), lambda prompts, responses: [], load_abilities([panel] if isinstance(panel, str) else panel)
            )
        names = [a.name for a in panel.abilities]
        if not names or MEAN in names:
            raise ValueError(f"TaxCallback: expected abilities with names other than {MEAN!r}, found {names}")
        if not (isinstance(every, int) and every > 0):
            raise ValueError(f"TaxCallback: every: expected a number of steps above 0, found {every!r}")
        bounds = (
            dict(at_most) if isinstance(at_most, Mapping) else {} if at_most is None else dict.fromkeys(names, at_most)
        )
        for name, bound in bounds.items():
            if name not in names or not bound >= 0:
                raise ValueError(
                    f"TaxCallback: at_most: expected points of at least 0 for {' or '.join(names)}, found {bound!r} for {name!r}"
                )
        self.panel, self.every, self.bounds, self.part = panel, every, bounds, part
        self.pre: dict[str, Measurement] | None = None
        self.floored: list[str] = []
        self.stopped = ""
        self.kept: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 over all that decides the numbers."""
        how = self.panel.drawing.decides
        return digest([[[a.fingerprint, a.primary] for a in self.panel.abilities], self.panel.limit, self.part, how])

    def state(self) -> dict[str, Any]:
        """PRE's scores and the checkpoint that is kept, as plain json."""
        pre = None if self.pre is None else {name: m.to_json() for name, m in self.pre.items()}
        return {"pre": pre, "floored": self.floored, "panel": self.fingerprint if pre else None, "kept": self.kept}

    def start(self, model: nn.Module, tokenizer: Any, step: int, stored: Mapping[str, Any] | None) -> None:
        """Take PRE's scores from the checkpoint that is resumed, or measure them.

        Raises:
            ValueError: weights that are cut up among processes, no tokenizer, a checkpoint of another panel.
        """
        refuse_cut_up(model)
        if tokenizer is None:
            raise ValueError(
                "TaxCallback: expected a tokenizer, found none; give the trainer its processing_class, or tokenizer="
            )
        self.stopped, self.kept = "", None
        if step and stored and stored["pre"]:
            if stored["panel"] != self.fingerprint:
                raise ValueError(
                    "TaxCallback: expected the panel that the checkpoint was trained with, found another one; PRE's scores are "
                    "of that one"
                )
            self.pre = {name: Measurement.from_json(m) for name, m in stored["pre"].items()}
            self.floored, self.kept = stored["floored"], stored["kept"]
            return
        if step:
            warnings.warn(
                f"TaxCallback: the checkpoint holds no scores of PRE: PRE is the model at step {step}", stacklevel=3
            )
        found = from_first(lambda: self._measured(model, tokenizer))
        self.pre = {name: ms[0] for name, ms in found.items()}
        self.floored = [name for name, ms in found.items() if at_floor(ms)]
        if self.floored:
            warnings.warn(
                f"TaxCallback: {', '.join(self.floored)}: not clear of chance at the start, so kept out of the mean and without "
                "a bound; more items help",
                stacklevel=3,
            )

    def look(self, model: nn.Module, tokenizer: Any, step: int) -> Taxes:
        """Measure the model as it is now; `stopped` says which ability lies beyond its bound."""
        taxes = from_first(lambda: self._taxes(self._measured(model, tokenizer)))
        beyond = [n for n in self.bounds if n not in self.floored and taxes[n]["low"] > self.bounds[n]]
        if beyond:
            lost = (
                f"{n} lost {t['value']:.3g} points [{t['low']:.3g}, {t['high']:.3g}], at most {self.bounds[n]:.3g} were asked for"
                for n in beyond
                for t in [taxes[n]]
            )
            inside = f"step {self.kept['step']}, {self.kept['path']}" if self.kept else "none"
            self.stopped = f"stopped at step {step}: {'; '.join(lost)}; the last checkpoint inside: {inside}"
            warnings.warn(f"TaxCallback: {self.stopped}", stacklevel=3)
        return taxes

    def _measured(self, model: nn.Module, tokenizer: Any) -> dict[str, list[Measurement]]:
        how, limit = self.panel.drawing, self.panel.limit
        with undisturbed(model):
            found = [(a, a.measure(model, tokenizer, self.part, how, limit=limit)) for a in self.panel.abilities]
        return {a.name: primary_first(a, ms) if a.primary else sorted(ms, key=_in_nats) for a, ms in found}

    def _taxes(self, now: Mapping[str, list[Measurement]]) -> Taxes:
        pre, parts = self.pre or {}, {}
        for number, (name, before) in enumerate(pre.items()):
            after = next(m for m in now[name] if m.metric == before.metric)
            if not np.isfinite(after.statistics).all():  # a model that has come apart has lost all
                return {n: dict.fromkeys(("value", "low", "high"), float("inf")) for n in (*pre, MEAN)}
            parts[name] = paired(before.sampled, after.sampled, before.sampled_as, seed=number)
        scales = {name: 1.0 if m.unit in ("", *BOUNDS) else 0.01 for name, m in pre.items()}
        of = {name: [name] for name in parts} | {MEAN: [n for n in parts if n not in self.floored]}
        found = {n: Studentised.mean([parts[m] for m in ms], [scales[m] for m in ms]) for n, ms in of.items() if ms}
        return {n: dict(zip(("value", "low", "high"), s.interval(), strict=False)) for n, s in found.items()}


def _in_nats(m: Measurement) -> bool:
    """What is in points of a hundred (accuracy, exact match, BLEU) is watched before what is not."""
    return m.unit not in BOUNDS


def logged(taxes: Taxes) -> dict[str, float]:
    """What a logger is given: tax/NAME, and its ends as tax/NAME_low and tax/NAME_high."""
    ends = {"value": "", "low": "_low", "high": "_high"}
    return {f"tax/{name}{ends[key]}": value for name, t in taxes.items() for key, value in t.items()}


def refuse_cut_up(model: nn.Module) -> None:
    """Raise a ValueError where this process does not hold whole weights."""
    held = next((type(p).__name__ for p in model.parameters() if isinstance(p, DTensor)), "")
    held = held or next(
        (type(m).__name__ for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"), ""
    )
    if held or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            f"TaxCallback: expected whole weights in every process, found {held or 'those of DeepSpeed ZeRO-3'}; train with "
            "plain data parallelism (or ZeRO-2), or measure the checkpoints with counterpoise tax"
        )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, anything may be asked of a model; after it, modes, configs and all generators are what they were."""
    device = next(model.parameters()).device
    kind = "cuda" if device.type == "cpu" else device.type
    several = range(torch.get_device_module(kind).device_count()) if device.type != "cpu" else ()
    modes = [(module, module.training) for module in model.modules()]
    configs = [getattr(model, name, None) for name in ("config", "generation_config")]
    settings = [(c, dict(vars(c))) for c in configs if c is not None]
    python, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=several, device_type=kind), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)  # noqa: NPY002
        for config, before in settings:
            vars(config).clear()
            vars(config).update(before)
        for module, training in modes:
            module.training = training
