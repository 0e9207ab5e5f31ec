"""The block Gauss-Newton (Fisher) model: K x K curvatures of both sides, and every lambda by a small quadratic program."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import lsq_linear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from counterpoise.averaging.partition import Partition
from counterpoise.averaging.resident import ResidentAverage
from counterpoise.checkpoints.checkpoint import match_name
from counterpoise.language.chunks import widened
from counterpoise.language.scoring import Example, by_length, response_tokens, score_responses
from counterpoise.records import digest
from counterpoise.search.both_sides import BothSides, cut_key
from counterpoise.search.two_sided import Found

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Quadratic:
    """A side modelled around one end: gradient . d + stretch d H d / 2, with d = r - anchor.

    Attributes:
        anchor: 0 (PRE, for retention) or 1 (POST, for alignment), for every block.
        stretch: makes the model meet the side at the other end too; 1 when the side is quadratic on the diagonal.
    """

    anchor: float
    gradient: Array
    curvature: Array
    stretch: float

    @classmethod
    def meeting_both_ends(cls, anchor: float, gradient: ArrayLike, curvature: ArrayLike, rise: float) -> Quadratic:
        """The model that is 0 at the anchor and `rise` at the other end of the diagonal.

        Curvature at one end says how the loss begins to rise; how far it rises by the other end is known from two
        forward passes, and lambda means the same here and in the path only if the model agrees. A slope that alone
        rises by more leaves no curvature (stretch 0).

        Args:
            gradient: of the side at the anchor, shape (K,).
            curvature: shape (K, K), positive semidefinite.
            rise: the side at the other end minus at the anchor, above 0.
        """
        g, h = np.asarray(gradient, dtype=np.float64), np.asarray(curvature, dtype=np.float64)
        if anchor not in (0.0, 1.0):
            raise ValueError(f"anchor: expected 0 (PRE) or 1 (POST), found {anchor}")
        bend = float(h.sum())
        if h.shape != (len(g), len(g)) or not bend > 0:
            raise ValueError(
                f"curvature: expected shape ({len(g)}, {len(g)}) and a positive sum, found {h.shape}, {bend}"
            )
        return cls(anchor, g, h, max(0.0, 2 * (rise - (1 - 2 * anchor) * float(g.sum())) / bend))

    def value(self, ratios: ArrayLike) -> float:
        """The model's loss above the anchor's."""
        d = np.asarray(ratios, dtype=np.float64) - self.anchor
        return float(self.gradient @ d + self.stretch * d @ self.curvature @ d / 2)


def fisher_path(alignment: Quadratic, retention: Quadratic, weights: ArrayLike) -> Array:
    """The minimum of alignment + lambda retention over the box for every lambda: shape (lambdas, K)."""
    found = []
    for weight in np.asarray(weights, dtype=np.float64):
        q = alignment.stretch * alignment.curvature + weight * retention.stretch * retention.curvature
        linear = np.zeros(len(q))
        for side, price in ((alignment, 1.0), (retention, weight)):
            linear += price * (side.gradient - side.anchor * side.stretch * side.curvature.sum(1))
        found.append(box_program(q, linear))
    return np.stack(found)


def block_fisher(
    resident: ResidentAverage,
    partition: Partition,
    ratios: Sequence[float] | Array,
    examples: Sequence[Example],
    *,
    batch_size: int = 2,
) -> Array:
    """The Fisher information of the ratios: H_jk = mean over response tokens of Cov_p[du_j, du_k], shape (K, K).

    u are the logits of a token, du_k = du / dr_k, p their softmax. It is the Gauss-Newton matrix of the NLL, and at PRE
    the Hessian of KL(pre || theta(r)) over these contexts exactly. K Jacobian-vector products a batch, by forward-mode
    differentiation, which needs eager attention: the model's own is put back afterwards. Memory: K x tokens of a batch x
    vocabulary numbers, hence the small batch.

    Args:
        ratios: where to take it; zeros for PRE, ones for POST.

    Returns:
        float64, symmetric, positive semidefinite, in nats per token.
    """
    resident.set(partition, ratios)
    total = np.zeros((len(partition), len(partition)))
    with _eager(resident.model), torch.no_grad():
        for rows in by_length(examples, batch_size, key=lambda e: len(e.prompt) + len(e.response)):
            total += _batch_fisher(resident, partition, [examples[i] for i in rows])
    return total / response_tokens(examples)


def _batch_fisher(resident: ResidentAverage, partition: Partition, examples: Sequence[Example]) -> Array:
    """Sum over the tokens of one batch."""
    outside, logits = _derivative(resident, partition.rest, examples)
    shares = partition.weights / partition.weights.sum()
    p_NV = torch.softmax(logits, dim=-1)
    rows = []
    for block, share in zip(partition.blocks, shares, strict=True):
        du_NV, _ = _derivative(resident, block.tensors, examples)
        if partition.rest:  # these take the mean ratio, so every block moves them by its share
            du_NV = du_NV + share * outside
        centred = du_NV - (p_NV * du_NV).sum(-1, keepdim=True)
        rows.append((centred * p_NV.sqrt()).flatten())
    jacobian = torch.stack(rows)
    found: Array = (jacobian @ jacobian.T).double().cpu().numpy()
    return found


class Moved(nn.Module):
    """A model with other tensors in the place of some of its parameters; tied ones follow."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.tensors, self.config = model, tensors, model.config

    def forward(self, **inputs: Any) -> Any:
        """The model's output."""
        return functional_call(self.model, dict(self.tensors), (), inputs)


def _derivative(resident: ResidentAverage, names: Sequence[str], examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Of the logits before response tokens along the update of some tensors, and the logits themselves."""
    model, wanted, on_disk = resident.model, set(names), dict.fromkeys(resident.pair.names)
    with forward_ad.dual_level():
        duals: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            found = match_name(name, on_disk)
            if found in wanted:
                pre, post = resident.pair.tensors(found)
                gap = (post.double() - pre.double()).to(parameter)
                duals[name] = forward_ad.make_dual(parameter.detach(), gap)  # type: ignore[no-untyped-call]
        scored = score_responses(Moved(model, duals), examples)
        logits_NV = widened(scored.logits_BCV[scored.mask_BC])
        primal, tangent = forward_ad.unpack_dual(logits_NV)  # type: ignore[no-untyped-call]
    return (torch.zeros_like(primal) if tangent is None else tangent), primal


@contextlib.contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Fused attention has no forward-mode derivative."""
    config: Any = model.config
    before = config._attn_implementation
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def box_program(curvature: ArrayLike, slope: ArrayLike) -> Array:
    """The r in [0, 1]^K that minimises r Q r / 2 + c r, for a positive semidefinite Q: bounded least squares, exact.

    A ridge of 1e-10 of the mean eigenvalue makes the minimum unique where Q is singular.

    Args:
        curvature: Q, shape (K, K), symmetric; what rounding made slightly negative counts as 0.
        slope: c, shape (K,).

    >>> box_program([[2.0, 0.0], [0.0, 2.0]], [-1.0, 4.0]).round(6) + 0.0
    array([0.5, 0. ])
    """
    q, c = np.asarray(curvature, dtype=np.float64), np.asarray(slope, dtype=np.float64)
    if q.shape != (len(c), len(c)) or not np.isfinite(q).all() or not np.isfinite(c).all():
        raise ValueError(f"box_program: expected finite Q of shape (K, K) and c of (K,), found {q.shape}, {c.shape}")
    size = max(float(np.abs(q).max()), float(np.abs(c).max()), 1e-300)
    values, vectors = np.linalg.eigh((q + q.T) / (2 * size))
    if values[0] < -1e-6 * max(values[-1], 1e-12):
        raise ValueError(f"box_program: expected a positive semidefinite Q, found the eigenvalue {values[0] * size:g}")
    ridge = 1e-10 * max(float(values.clip(0).mean()), 1e-10)
    roots = np.sqrt(values.clip(0) + ridge)
    # With B = sqrt(Q) the program is |B r - d|^2 / 2 with B d = -c.
    target = -(vectors.T @ c) / (size * roots)
    most = 100 + 20 * len(c)  # SciPy's default, one iteration a variable, ends some programs early
    solved = lsq_linear(roots[:, None] * vectors.T, target, (0.0, 1.0), method="bvls", tol=1e-14, max_iter=most)
    if not solved.success:
        raise ValueError(f"box_program: expected to converge, stopped after {most} iterations")
    return np.clip(solved.x, 0.0, 1.0)


def fisher(search: BothSides, weights: Sequence[float], *, sequences: int = 32) -> list[Found]:
    """The ratios of the block Gauss-Newton model; its values are the model's.

    The slope of each side at its own end and its rise to the other come from the diagonal, its curvature from
    `sequences` of POST's good responses and of PRE's words.
    """
    measured = curvatures(search, sequences)
    d, ones = search.diagonal, np.ones(len(search.cut))
    names = tuple(d.retention)
    slope = np.mean([m.gradient(0 * ones) for m in d.retention.values()], axis=0)
    alignment = Quadratic.meeting_both_ends(1.0, d.alignment.gradient(ones), measured["alignment"], 1.0)
    retention = Quadratic.meeting_both_ends(0.0, slope, measured["retention"], 1.0)
    found = []
    for weight, ratios in zip(weights, fisher_path(alignment, retention, weights), strict=True):
        value, shares = retention.value(ratios), dict.fromkeys(names, 1 / len(names))
        kept = dict.fromkeys(names, value)
        found.append(Found(float(weight), tuple(ratios.tolist()), alignment.value(ratios), kept, shares, 0, True))
    return found


def curvatures(search: BothSides, sequences: int = 32) -> dict[str, Array]:
    """The Fisher matrices of the ratios: at POST on its good responses, at PRE on its own words."""

    def run() -> dict[str, Any]:
        begun = time.monotonic()
        batch = max(1, search.batch // 4)
        sides = (("alignment", 1.0, search.good), ("retention", 0.0, [e for s in search.words.values() for e in s]))
        found: dict[str, Any] = {}
        for name, end, examples in sides:
            chosen = examples[:: max(1, len(examples) // sequences)][:sequences]
            ends = [end] * len(search.cut)
            found[name] = block_fisher(search.bench.resident, search.cut, ends, chosen, batch_size=batch).tolist()
        return {**found, "seconds": round(time.monotonic() - begun, 2)}

    data = digest([search.good, search.words])
    key = {"what": "fisher", "model": search.bench.inputs, "cut": cut_key(search.cut), "data": data, "of": sequences}
    kept = search.bench.store.once(key, run)
    return {name: np.array(kept[name]) for name in ("alignment", "retention")}
