"""The two-sided search on a tiny pair in float64, and on sides given as formulas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from counterpoise.search.proxies import ProxySet
from counterpoise.search.sides import Likelihood, Scale, Slopes
from counterpoise.search.two_sided import POINTS, Diagonal, exact, measure, path
from search.pairs import resident, said

LAMBDAS = (0.25, 1.0, 4.0)


class Formula:
    """A side given by its value and gradient."""

    fixed = True

    def __init__(self, loss) -> None:  # type: ignore[no-untyped-def]
        self.loss, self.calls = loss, 0

    def along(self, points: Sequence[float]) -> Slopes:
        found = [self._at(np.full(3, t)) for t in points]
        return Slopes(np.array(points), np.array([v for v, _ in found]), np.stack([g for _, g in found]), len(found))

    def near(self, ratios: np.ndarray):  # type: ignore[no-untyped-def]
        return self._at

    def _at(self, r: np.ndarray) -> tuple[float, np.ndarray]:
        self.calls += 1
        return self.loss(r)


def bowl(centre: float, bends: np.ndarray) -> Formula:
    return Formula(lambda r: (float((r - centre) @ bends @ (r - centre)), 2 * bends @ (r - centre)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Likelihood, dict[str, Likelihood]]:
    model, cut = resident(tmp_path_factory.mktemp("pair"))
    post, pre = (ProxySet(tuple(said(model, cut, ratio, count=24, seed=4)), 12) for ratio in (1.0, 0.0))
    return Likelihood(model, cut, post.backward), {"text": Likelihood(model, cut, pre.backward)}


def scaled(pair, diagonal: Diagonal, ratios: np.ndarray) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Both sides at some ratios, forward passes alone."""
    alignment, retention = pair
    found = []
    for side, scale in ((alignment, diagonal.alignment_scale), (retention["text"], diagonal.retention_scales["text"])):
        side.resident.set(side.partition, ratios)
        found.append((side.objective.__self__.nll(side.resident.model) - scale.best) / scale.gap)
    return found[0], found[1]


def test_ten_passes_give_both_sides_at_both_ends(pair) -> None:  # type: ignore[no-untyped-def]
    alignment, retention = pair
    diagonal = measure(alignment, retention)
    assert diagonal.passes == 10
    k = len(diagonal.alignment)
    # Exact at PRE; at the other points up to the cubic through five slopes.
    assert diagonal.alignment.value(np.zeros(k)) == pytest.approx(1.0, abs=1e-12)
    assert diagonal.retention["text"].value(np.zeros(k)) == pytest.approx(0.0, abs=1e-12)
    misfits = []
    for t in POINTS:
        a, r = scaled(pair, diagonal, np.full(k, t))
        misfits += [
            diagonal.alignment.value(np.full(k, t)) - a,
            diagonal.retention["text"].value(np.full(k, t)) - r,
        ]
    assert np.abs(misfits).max() == pytest.approx(diagonal.misfit, abs=1e-9)
    assert 0 < diagonal.misfit < 0.05


def test_the_exact_search_is_nowhere_worse_than_ma_or_the_path(pair) -> None:  # type: ignore[no-untyped-def]
    alignment, retention = pair
    diagonal = measure(alignment, retention)
    k = len(diagonal.alignment)
    found = exact(diagonal, alignment, retention, LAMBDAS, max_passes=15, tolerance=1e-5)
    ma = np.array([scaled(pair, diagonal, np.full(k, t)) for t in np.linspace(0, 1, 21)])
    for f, started in zip(found, path(diagonal, LAMBDAS), strict=True):
        a, r = scaled(pair, diagonal, np.array(started.ratios))
        assert f.value <= a + f.weight * r + 1e-9
        assert f.value <= (ma[:, 0] + f.weight * ma[:, 1]).min() + 1e-9
        # At the same alignment MA, a member of the box, cannot retain more than the minimiser does.
        same = np.interp(f.alignment, ma[::-1, 0], ma[::-1, 1])
        assert f.retention["text"] <= same + 1e-4
        assert all(0 <= r <= 1 for r in f.ratios)
    gained = [(ma[:, 0] + f.weight * ma[:, 1]).min() - f.value for f in found]
    assert max(gained) > 0.002  # there is something to find


def test_the_same_inputs_give_the_same_ratios(pair) -> None:  # type: ignore[no-untyped-def]
    alignment, retention = pair
    runs = [exact(measure(alignment, retention), alignment, retention, [1.0], max_passes=3) for _ in range(2)]
    assert runs[0] == runs[1]


def test_on_separable_sides_the_path_is_the_exact_search() -> None:
    a, b = np.diag([3.0, 1.0, 0.2]), np.diag([0.5, 1.0, 4.0])
    alignment, retention = bowl(1.0, a), {"text": bowl(0.0, b)}
    diagonal = measure(alignment, retention)
    assert (alignment.calls, retention["text"].calls) == (5, 5)
    scale = b.sum() / a.sum()
    drawn = path(diagonal, LAMBDAS)
    for f, lam in zip(drawn, LAMBDAS, strict=True):
        wanted = np.diag(a) * scale / (np.diag(a) * scale + lam * np.diag(b))
        np.testing.assert_allclose(f.ratios, wanted, atol=1e-9)
        assert f.passes == 0
    searched = exact(diagonal, alignment, retention, LAMBDAS, tolerance=1e-10)
    for f, g in zip(drawn, searched, strict=True):
        np.testing.assert_allclose(f.ratios, g.ratios, atol=1e-5)
        assert f.value == pytest.approx(g.value, abs=1e-9)


def test_cross_terms_are_found_by_the_exact_search_alone() -> None:
    cross = np.array([[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 1.0]])
    alignment, retention = bowl(1.0, cross), {"text": bowl(0.0, np.diag([0.9, 0.6, 1.0]))}
    diagonal = measure(alignment, retention)
    [drawn], [searched] = path(diagonal, [1.0]), exact(diagonal, alignment, retention, [1.0], tolerance=1e-9)
    q = cross / cross.sum() + np.diag([0.9, 0.6, 1.0]) / 2.5
    wanted = np.linalg.solve(q, cross.sum(1) / cross.sum())
    assert ((wanted > 0) & (wanted < 1)).all()
    np.testing.assert_allclose(searched.ratios, wanted, atol=1e-3)
    assert np.abs(np.array(drawn.ratios) - wanted).max() > 0.05  # the row sums are not the diagonal


def test_the_adversary_raises_what_the_sum_leaves_behind() -> None:
    a = np.eye(3)
    retention = {"reading": bowl(0.0, np.diag([3.0, 0.1, 0.1])), "arithmetic": bowl(0.0, np.diag([0.1, 0.1, 0.5]))}
    retention["writing"] = bowl(0.0, np.diag([2.0, 1.0, 0.1]))
    alignment = bowl(1.0, a)
    diagonal = measure(alignment, retention)
    for search in (path, None):
        plain, guarded = (
            path(diagonal, [2.0], rho=rho)[0]
            if search
            else exact(diagonal, alignment, retention, [2.0], rho=rho, max_passes=60, tolerance=1e-8)[0]
            for rho in (0.0, 0.5)
        )
        assert list(plain.shares.values()) == pytest.approx([1 / 3] * 3)
        assert max(guarded.retention.values()) < max(plain.retention.values()) - 0.01
        worst_set = max(guarded.retention, key=guarded.retention.__getitem__)
        assert guarded.shares[worst_set] == max(guarded.shares.values())


def test_the_worst_mixture_is_minimised_as_scipy_minimises_it() -> None:
    from scipy.optimize import minimize

    from counterpoise.search.worst import worst

    retention = {"a": bowl(0.0, np.diag([3.0, 0.2, 0.1])), "b": bowl(0.0, np.diag([0.1, 0.3, 1.5]))}
    alignment = bowl(1.0, np.eye(3))
    diagonal = measure(alignment, retention)

    def sides(r: np.ndarray) -> list[float]:
        return [diagonal.retention_scales[t].of(s.near(r))(r)[0] for t, s in retention.items()]

    def objective(r: np.ndarray) -> float:
        return diagonal.alignment_scale.of(alignment.near(r))(r)[0] + worst(sides(r), np.zeros((2, 1)), 0.2).value

    starts = np.random.default_rng(0).uniform(size=(12, 3))
    simplex = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    wanted = min(minimize(objective, r, method="Nelder-Mead", bounds=[(0, 1)] * 3, options=simplex).fun for r in starts)
    for found in (
        path(diagonal, [1.0], rho=0.2)[0],
        exact(diagonal, alignment, retention, [1.0], rho=0.2, max_passes=60, tolerance=1e-9)[0],
    ):
        assert found.value == pytest.approx(objective(np.array(found.ratios)), abs=1e-9)
        assert found.value == pytest.approx(wanted, abs=1e-5)
        assert abs(np.subtract(*sides(np.array(found.ratios)))) < 1e-2  # the kink, where a gradient step stalls


def test_sides_with_nothing_to_keep_are_refused() -> None:
    good, backwards = bowl(1.0, np.eye(3)), bowl(0.0, np.eye(3))
    with pytest.raises(ValueError, match="alignment: expected a loss that falls from PRE to POST, found 0 and 3"):
        measure(backwards, {"text": backwards})
    with pytest.raises(ValueError, match="retention text: expected a loss that rises from PRE to POST"):
        measure(good, {"text": good})
    with pytest.raises(ValueError, match="at least one set"):
        measure(good, {})


def test_a_diagonal_is_data() -> None:
    diagonal = measure(bowl(1.0, np.eye(3)), {"text": bowl(0.0, np.eye(3))})
    assert isinstance(diagonal, Diagonal)
    assert diagonal.alignment_scale == Scale(0.0, 3.0)
