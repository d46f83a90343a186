"""Solvers as published, against transcriptions in float64; every format; options and formats that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_solvers import SPECS, calibrated, inputs, settled, weight
from torch import Tensor

from llmquant import formats
from llmquant.errors import PlanError
from llmquant.recipe import Recipe, Rule
from llmquant.solvers import REFUSALS, SOLVERS, algebra, gptaq, gptq, hqq, refit
from llmquant.stats import Stats

LEARNED = ["kmeans3:channel", "kmeans3:g32", "kmeans2:tensor"]


def pairs(solvers: list[str], specs: list[str]) -> list[tuple[str, str]]:
    """(solver, spec) of those that go together."""
    every = [(solver, spec) for solver in solvers for spec in specs]
    return [
        (solver, spec) for solver, spec in every if solver not in REFUSALS or not REFUSALS[solver](formats.get(spec))
    ]


def decoded(fmt: formats.Format, solver: str, w: Tensor, stats: Stats | None, **options: Any) -> Tensor:
    solution = SOLVERS[solver](w, stats, fmt, **options)
    return fmt.decode(solution.codes, solution.grid)


# ---- every solver, every format


EVERY = [*SPECS, "fp8_e4m3:block", "kmeans2:tensor", "int3:g32:sym_gptq"]


@pytest.mark.parametrize(("solver", "spec"), pairs(["gptq", "gptaq", "hqq", "kmeans"], EVERY))
def test_what_a_solver_finds_can_be_stored_and_is_the_same_every_time(solver: str, spec: str) -> None:
    fmt, w, stats = settled(spec), weight(), calibrated()
    first, second = (SOLVERS[solver](w, stats, fmt) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert first.grid.equals(second.grid)
    codes, grid = fmt.unpack(fmt.pack(first.codes, first.grid), (48, 112))
    assert torch.equal(codes, first.codes)
    assert grid.equals(first.grid)
    error = fmt.decode(codes, grid) - w
    assert first.loss == pytest.approx(float(((error @ stats.hessian) * error).sum()) / stats.tokens, rel=1e-4)


@pytest.mark.parametrize(("solver", "spec"), pairs(["gptaq", "kmeans"], EVERY))
def test_they_beat_rounding_on_tokens_that_nobody_saw(solver: str, spec: str) -> None:
    fmt, w, stats = settled(spec), weight(), calibrated()
    x, x_ref = inputs(1000, 112, seed=77)

    def missed(name: str) -> float:
        return float((x @ decoded(fmt, name, w, stats).T - x_ref @ w.T).square().sum())

    # With eight bits what is lost is in the inputs, and little of it is made up for.
    assert missed(solver) < missed("rtn") * (1.002 if spec == "mxint8" else 1.0)


PLANTED = ["int4:g32", "int3:g32:asym", "mxfp4", "mx6", "nf4:g32", "kmeans3:channel", "ternary:g32", "binary:g32"]


@pytest.mark.parametrize(("solver", "spec"), pairs(["gptq", "gptaq", "hqq", "kmeans"], PLANTED))
def test_weights_on_the_grid_come_back_as_they_are(solver: str, spec: str) -> None:
    """Both streams alike: there is nothing to make up for."""
    fmt, x = settled(spec), inputs(500, 112, seed=3)[0]
    stats = Stats.empty(112)
    stats.update(x, x)
    lattice_of = fmt.fit(weight(), clip="minmax")
    codes = fmt.encode(weight() * 1.3, lattice_of)  # so that the ends of the range are taken
    planted = fmt.decode(codes, lattice_of)
    torch.testing.assert_close(decoded(fmt, solver, planted, stats), planted, rtol=1e-3, atol=1e-6)


# ---- GPTAQ


def gptaq_reference(w: np.ndarray, h: np.ndarray, dxx: np.ndarray, damp: float, alpha: float, nearest: Any) -> Any:
    """Algorithm 1 of arXiv:2504.02692 without blocks, columns by descending diagonal; nearest(column, index)."""
    n = w.shape[1]
    order = np.argsort(-np.diag(h), kind="stable")
    h = h + damp * np.diag(h).mean() * np.eye(n)
    h, dxx, rest = h[np.ix_(order, order)], dxx[np.ix_(order, order)], w[:, order].copy()
    u = np.linalg.cholesky(np.linalg.inv(h)).T  # upper, h^-1 = u^T u
    p = alpha * np.triu(dxx @ u.T, 1) @ u
    found = np.empty_like(w)
    for j in range(n):
        column = rest[:, j].copy()
        found[:, order[j]] = nearest(column, order[j])
        error = (column - found[:, order[j]]) / u[j, j]
        rest[:, j:] -= np.outer(error, u[j, j:]) - np.outer(column, p[j, j:])
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_gptaq_is_the_published_algorithm(alpha: float) -> None:
    fmt, w, stats = settled("int3:g32"), weight(12, 160), calibrated(160)  # more than one block of columns
    grid = fmt.fit(w, stats.importance())

    def nearest(column: np.ndarray, index: int) -> np.ndarray:
        here = grid.columns(index, index + 1)
        return fmt.decode(fmt.encode(torch.from_numpy(column).float()[:, None], here), here)[:, 0].numpy()

    assert stats.cross is not None
    hessian, cross = stats.hessian.double().numpy(), stats.cross.double().numpy()
    wanted = torch.from_numpy(gptaq_reference(w.double().numpy(), hessian, cross, 0.01, alpha, nearest)).float()
    found = decoded(fmt, "gptaq", w, stats, alpha=alpha)
    assert (found == wanted).float().mean() > 0.97  # a tie in one precision is none in the other


def test_gptaq_of_one_stream_is_gptq() -> None:
    fmt, w, stats = settled("int3:g32"), weight(), calibrated()
    lattice = fmt.lattice(fmt.fit(w))
    hessian = gptaq.raised(stats.hessian, 0.01)
    alone = gptaq.sweep(w, hessian, torch.zeros_like(hessian), lattice)
    found, _ = gptq.sweep(w, algebra.Metric.of(hessian, 0.0), lattice)
    assert (alone == found).float().mean() > 0.99  # a tie in one way of adding up is none in the other


# ---- HQQ


def hqq_reference(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The HQQ article for groups (groups, size): the weights found, and the mean errors on the way."""
    top, p, beta = 2**bits - 1, 0.7, 10.0
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    inverse = (top / (high - low)).astype(np.float64)
    zero, best, least, errors = -low * inverse, None, np.inf, []
    for _ in range(21):
        q = np.clip(np.rint(w * inverse + zero), 0, top)
        found = (q - zero) / inverse
        error = w - found
        errors.append(np.abs(error).mean())
        if not errors[-1] < least:
            break
        best, least = found, errors[-1]
        size = np.maximum(np.abs(error), 1e-30)
        left = np.sign(error) * np.maximum(size - size ** (p - 1) / beta, 0)
        zero = (q - (w - left) * inverse).mean(1, keepdims=True)
        beta *= 1.01
    assert best is not None
    return best, np.array(errors)


@pytest.mark.parametrize("size", [0.05, 3.0])  # weights too small for shrinkage, and not
def test_hqq_is_the_published_algorithm(size: float) -> None:
    w = torch.randn(24, 96, generator=torch.Generator().manual_seed(5)).pow(3) * size
    wanted, errors = hqq_reference(w.double().numpy().reshape(-1, 32), 3)
    assert len(errors) > 3
    found = decoded(formats.get("int3:g32:asym_float:fp32"), "hqq", w, None)
    close = torch.isclose(found, torch.from_numpy(wanted).float().view(24, 96), rtol=1e-3, atol=1e-4 * size)
    assert close.float().mean() > 0.99
    plain = decoded(formats.get("int3:g32:asym_float:fp32"), "rtn", w, None, clip="minmax")
    assert (found - w).abs().mean() < (plain - w).abs().mean()


@pytest.mark.parametrize("spec", ["int3:g32", "int2:g32", "int3:g32:asym", "mxfp4", "vsq4:s4", "nf4:g32", *LEARNED])
def test_hqq_lowers_the_mean_error_of_formats_without_a_real_zero_point(spec: str) -> None:
    fmt, w = settled(spec), weight().sign() * weight().abs().pow(1.5)
    start, found = (decoded(fmt, "hqq", w, None, iterations=count) for count in (0, 20))
    assert (found - w).abs().mean() <= (start - w).abs().mean()
    if spec not in ("mxfp4", "vsq4:s4"):  # scales that are coarse may have nowhere better to go
        assert (found - w).abs().mean() < (start - w).abs().mean()


def test_least_squares_of_a_grid_are_those_of_a_dense_solver() -> None:
    fmt, w = formats.get("int4:g32:asym_float:fp32"), weight(4, 64)
    codes, grid = fmt.quantize(w, clip="minmax")
    zero = hqq.moved(w, codes, grid, fmt).zero
    assert zero is not None
    wanted = (w.double() - codes.double() * grid.scale.double().repeat_interleave(32, 1)).view(4, 2, 32).mean(2)
    torch.testing.assert_close(zero.double(), wanted, rtol=1e-5, atol=1e-7)
    fmt = formats.get("int4:g32:fp32")
    codes, grid = fmt.quantize(w, clip="minmax")
    steps = codes.double().view(4, 2, 32)
    wanted = (steps * w.double().view(4, 2, 32)).sum(2) / steps.square().sum(2)
    torch.testing.assert_close(hqq.moved(w, codes, grid, fmt).scale.double(), wanted, rtol=1e-5, atol=1e-8)


# ---- k-means


@pytest.mark.parametrize("spec", ["kmeans3:channel:fp32", "kmeans3:tensor:fp32", "kmeans3:g16:fp32"])
def test_tables_are_what_dense_least_squares_give(spec: str) -> None:
    """|(S l - w) L|^2 with H = L L^T, one problem for each row or for all of them stacked, in float64."""
    fmt, w, stats = formats.get(spec), weight(5, 48), calibrated(48)
    hessian = algebra.damped(stats.hessian, 0.03)
    codes, grid = fmt.quantize(w, stats.importance())
    after, places = refit.refit(w, codes, grid, fmt, hessian)
    root = np.linalg.cholesky(hessian.double().numpy())
    scale = after.scale.double().repeat_interleave(after.group, 1)[:, :48].expand(5, 48).numpy()
    chosen = np.eye(8)[codes.numpy().astype(int)] * scale[:, :, None]  # (rows, in, K)
    systems = [(root.T @ chosen[row], root.T @ w[row].double().numpy()) for row in range(5)]
    if grid.levels is not None and len(grid.levels) == 1:
        systems = [(np.concatenate([a for a, _ in systems]), np.concatenate([b for _, b in systems]))]
    solved = [np.linalg.lstsq(a, b, rcond=None)[0] for a, b in systems]
    solved = solved * 5 if len(solved) == 1 else solved
    wanted = np.stack([(np.eye(8)[codes[row].numpy()] @ solved[row]) * scale[row] for row in range(5)])
    np.testing.assert_allclose(fmt.decode(places, after).numpy(), wanted, rtol=1e-3, atol=1e-6)
    assert after.levels is not None
    assert (after.levels.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("spec", LEARNED)
def test_a_refit_table_never_loses_more(spec: str) -> None:
    fmt, w = settled(spec), weight()
    hessian = algebra.damped(calibrated().hessian, 0.03)
    grid = fmt.fit(w)
    places, _ = gptq.sweep(w, algebra.Metric.of(hessian, 0.0), fmt.lattice(grid))

    def loss(places: Tensor, grid: formats.Grid) -> float:
        error = (fmt.decode(places, grid) - w).double()
        return float(((error @ hessian.double()) * error).sum())

    before = loss(places, grid)
    grid, places = refit.refit(w, places, grid, fmt, hessian)
    assert loss(places, grid) < before


@pytest.mark.parametrize("spec", LEARNED)
def test_learned_tables_are_at_least_as_good_as_fixed_ones(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, w, stats = settled(spec), weight(96, 112), calibrated()
    x, x_ref = inputs(1000, 112, seed=77)

    def missed() -> float:
        return float((x @ decoded(fmt, "gptq", w, stats).T - x_ref @ w.T).square().sum())

    learned = missed()
    monkeypatch.setattr(refit, "tables", lambda w, places, grid, fmt, hessian: (grid, places))
    assert learned < 1.005 * missed()


# ---- refusals


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule("*", "int4:g32", "gptq", {"dampp": 0.1}),
            "'gptq' of rule '\\*' has no option 'dampp': known are clip, damp",
        ),
        (Rule("*", "int4:g32", "gptaq", {"alpha": "much"}), "takes a float as alpha, not 'much'"),
        (Rule("*", "int4:g32", "gptaq", {"alpha": -1}), "takes a finite alpha of at least 0, not -1"),
        (Rule("*", "int4:g32", "hqq", {"iterations": 2.5}), "takes a int as iterations, not 2.5"),
        (Rule("*", "int4:g32", "kmeans"), "learns tables, and int4:g32 has none to learn: use solver gptq"),
        (Rule("*", "mx6", "hqq"), "has nothing to move in mx6, whose scales are bound to each other"),
        (Rule("*", "nf4:g64:dq", "hqq"), "has nothing to move in nf4:g64:dq"),
    ],
)
def test_what_makes_no_sense_is_refused_in_the_plan(rule: Rule, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Recipe((rule,)).check(["model.layers.0.q_proj"], calibrated=True)


@pytest.mark.parametrize("solver", ["gptaq", "kmeans"])
def test_without_calibration_they_are_refused(solver: str) -> None:
    with pytest.raises(PlanError, match=f"'{solver}' needs calibration"):
        Recipe((Rule("*", "kmeans3:channel", solver),)).check(["q_proj"], calibrated=False)
    with pytest.raises(ValueError, match="needs calibration"):
        SOLVERS[solver](weight(), None, settled("kmeans3:channel"))
