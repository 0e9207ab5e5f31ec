"""Run torchjd's own tests of its scalarizers on the weightings here, through adapters.

    python experiments/banditmtl/torchjd_tests.py CHECKOUT COMMIT    # a checkout of github.com/SimplexLab/TorchJD, at COMMIT

The adapters take values of any shape as torchjd's do, and forget a window that no `step()` closed. Scalarizers that have
no counterpart here (Constant, COSMOS, GeometricMean, PBI) are left out. What fails goes, with the reason, into
results/torchjd-tests.json beside this file; a failure without a known reason is one of ours, and ends the script with 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torchjd.scalarization as theirs
from torch import Tensor, nn

from counterpoise.multitask import DWA, FAMO, IMTLL, RLW, SmoothTchebycheff, UncertaintyWeighting, Uniform, Weighting

FILES = ("mean", "sum", "random", "stch", "uw", "imtl_l", "dwa", "famo")
PRIVATE = "looks at private attributes of torchjd's class"
REASONS = {
    "test_representations": "expects torchjd's class names and arguments in repr",
    "test_dwa.py::test_reset": PRIVATE,
    "test_dwa.py::test_step_without_forward_is_noop": PRIVATE,
    "test_famo.py::test_reset": PRIVATE,
    "test_imtl_l.py::test_equivalent_to_uw_up_to_factor_and_sign": "sets the parameter with the sign of torchjd's: IMTLL here "
    "keeps s as the log variance that UncertaintyWeighting keeps, minus torchjd's log_scale",
}
"""Why a test fails, by how its name ends."""


class Adapter(nn.Module):
    """A weighting as a scalarizer: built for as many tasks as there are values, at the latest by the first call."""

    def __init__(self, build: Callable[[int], Weighting], shape: Any = None) -> None:
        super().__init__()
        self.build, self.shape = (
            build,
            None if shape is None else torch.Size([shape] if isinstance(shape, int) else shape),
        )
        self.inner = None if self.shape is None else build(self.shape.numel())

    def forward(self, values: Tensor) -> Tensor:
        """The weighting's scalar."""
        if self.inner is None:
            self.inner = self.build(values.numel())
        if self.shape is not None and values.shape != self.shape:
            raise ValueError(f"expected the shape {tuple(self.shape)}, found {tuple(values.shape)}")
        self.before_call()
        return self.inner(values.reshape(-1))

    def before_call(self) -> None:
        """Forget the window that is open."""
        self.inner.discard()

    def reset(self) -> None:
        """The weighting's."""
        self.inner.reset()


class Epochs(Adapter):
    """DWA: torchjd's `step` closes an epoch of as many batches as there were."""

    def __init__(self, temperature: float = 2.0) -> None:
        if not temperature > 0:
            raise ValueError(temperature)
        super().__init__(lambda n: DWA(n, steps_per_epoch=10**9, temperature=temperature))

    def before_call(self) -> None:
        """A batch ends where the next begins."""
        if self.inner._window.calls:
            self.inner.step()

    def step(self) -> None:
        """The last batch, and the epoch with it."""
        if self.inner is not None:
            self.inner.steps_per_epoch = self.inner._steps + 1
            self.inner.step()
            self.inner.steps_per_epoch = 10**9


class Famo(Adapter):
    """FAMO, with the losses after the step."""

    def __init__(
        self, shape: Any, lr: float = 0.025, weight_decay: float = 1e-3, min_losses: Tensor | None = None
    ) -> None:
        least = None if min_losses is None else min_losses.reshape(-1).tolist()
        super().__init__(lambda n: FAMO(n, lr=lr, weight_decay=weight_decay, min_losses=least), shape)

    def update(self, values: Tensor) -> None:
        """Close the window with the losses after the step."""
        if not self.inner._window.calls:
            raise ValueError("update() before forward()")
        self.inner.step(values.reshape(-1))

    @property
    def _w(self) -> Tensor:
        return self.inner._logits_M.reshape(self.shape).to(torch.get_default_dtype())

    @property
    def min_losses(self) -> Tensor:
        return torch.tensor(self.inner.min_losses).reshape(self.shape)


class Learned(Adapter):
    """A weighting with one parameter a task, under torchjd's name and sign."""

    def __init__(self, method: type[Weighting], shape: Any) -> None:
        super().__init__(lambda n: method(n), shape)

    @property
    def log_var(self) -> Tensor:
        """The parameter."""
        return self.inner.log_variance_M

    log_scale = log_var


class Smooth(Adapter):
    """STCH, whose weights need not add up to 1: S times that of weights / S and mu / S is the same."""

    def __init__(self, mu: float, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        if not mu > 0:
            raise ValueError(mu)
        total = 1.0 if weights is None else float(weights.sum())
        given = {"preferences": None if weights is None else weights / total, "ideal": reference}
        lists = {k: None if x is None else x.reshape(-1).tolist() for k, x in given.items()}
        shape = next((x.shape for x in given.values() if x is not None), None)
        super().__init__(lambda n: SmoothTchebycheff(n, smoothing=mu / total, **lists), shape)
        self.total = total

    def forward(self, values: Tensor) -> Tensor:
        """The scalar."""
        return self.total * super().forward(values)


class Scaled(Adapter):
    """Sum: as many times the mean as there are values."""

    def forward(self, values: Tensor) -> Tensor:
        """The sum."""
        return values.numel() * super().forward(values)


class Said:
    """Keeps what became of each test."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test that ended, or failed before it began."""
        name = report.nodeid.split("/")[-1]
        if report.failed:
            self.failed[name] = next((why for end, why in REASONS.items() if name.endswith(end)), "unexplained")
        elif report.when == "call":
            self.passed.append(name)


def main() -> int:
    """Put the adapters in torchjd's place, and run its tests."""
    theirs.Mean = lambda: Adapter(lambda n: Uniform(n))
    theirs.Sum = lambda: Scaled(lambda n: Uniform(n))
    theirs.Random = lambda: Adapter(lambda n: RLW(n, seed=int(torch.randint(2**20, ()))))
    theirs.STCH, theirs.DWA, theirs.FAMO = Smooth, Epochs, Famo
    theirs.UW = lambda shape: Learned(UncertaintyWeighting, shape)
    theirs.IMTLL = lambda shape: Learned(IMTLL, shape)
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))  # its shared helpers import it
    tests = Path(sys.argv[1]) / "tests"
    sys.path.insert(0, str(tests))
    files = [str(tests / "unit" / "scalarization" / f"test_{name}.py") for name in FILES]
    settings = ["-q", "--tb=short", "--no-header", "-p", "no:cacheprovider", "--noconftest", "--rootdir", str(tests)]
    said = Said()
    if pytest.main([*settings, *files], plugins=[said]) > pytest.ExitCode.TESTS_FAILED:
        return 1  # it says itself what is missing, and no result was made
    here = Path(__file__).parent
    commit = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    told = {
        "command": "python experiments/banditmtl/torchjd_tests.py CHECKOUT",
        "commit": commit.stdout.strip(),
        "torchjd_commit": sys.argv[2] if len(sys.argv) > 2 else "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"torch": version("torch"), "torchjd": version("torchjd"), "pytest": version("pytest")},
        "left_out": "Constant, COSMOS, GeometricMean, PBI: no counterpart here",
        "tests": len(said.passed) + len(said.failed),
        "passed": len(said.passed),
        "failed": said.failed,
    }
    (here / "results" / "torchjd-tests.json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{told['passed']} of {told['tests']} passed; the others:", *said.failed.items(), sep="\n")
    return int("unexplained" in said.failed.values())


if __name__ == "__main__":
    sys.exit(main())
