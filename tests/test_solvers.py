"""Solvers: laws that must hold for every format, exact references, recoveries, and steps that are taken back."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmquant import formats
from llmquant.errors import PlanError
from llmquant.recipe import Recipe, Rule
from llmquant.solvers import SOLVERS, algebra, coarse, gptq, loops, refit
from llmquant.stats import Stats, row_energy

SPECS = [
    *("int4:g32", "int3:g32", "int2:g48", "int3:g32:asym", "int3:g32:asym_float", "int4:channel", "int3:tensor"),
    *("mxfp4", "mxfp6_e2m3", "mxint8", "nvfp4", "mx4", "vsq4:s4", "fp8_e4m3:channel", "nf4:g32", "nf4:g32:dq"),
    *("kmeans3:channel", "kmeans3:g32", "ternary:g32", "binary:g32"),
]


def inputs(tokens: int, columns: int, seed: int, outliers: float = 6.0) -> tuple[Tensor, Tensor]:
    """Correlated inputs with a few loud channels: of the quantized stream, and those of the reference."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(1)) / columns**0.5
    mix[:, :3] *= outliers
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return x, x + 0.15 * torch.randn(tokens, columns, generator=generator) @ mix


def calibrated(columns: int = 112, tokens: int = 2000, seed: int = 2) -> Stats:
    stats = Stats.empty(columns)
    stats.update(*inputs(tokens, columns, seed))
    stats.hold(*inputs(400, columns, seed + 1))
    return stats


def weight(rows: int = 48, columns: int = 112, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def settled(spec: str) -> formats.Format:
    return formats.get(spec).stored_for(torch.float32)


# ---- every format


@pytest.mark.parametrize("spec", SPECS)
def test_gptq_beats_rounding_on_tokens_that_nobody_saw(spec: str) -> None:
    fmt, w, stats = settled(spec), weight(), calibrated()
    solution, plain = SOLVERS["gptq"](w, stats, fmt), SOLVERS["rtn"](w, stats, fmt)
    x, x_ref = inputs(1000, 112, seed=77)

    def missed(codes: Tensor, grid: formats.Grid) -> float:
        return float((x @ fmt.decode(codes, grid).T - x_ref @ w.T).square().sum())

    assert missed(solution.codes, solution.grid) < missed(plain.codes, plain.grid)
    codes, grid = fmt.unpack(fmt.pack(solution.codes, solution.grid), (48, 112))
    assert torch.equal(codes, solution.codes)
    assert grid.equals(solution.grid)
    error = fmt.decode(codes, grid) - w
    assert solution.loss == pytest.approx(float(((error @ stats.hessian) * error).sum()) / stats.tokens, rel=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_kept_steps_never_lose_on_held_out_tokens(spec: str) -> None:
    solution = SOLVERS["gptq"](weight(), calibrated(), settled(spec))
    assert [step.name for step in solution.steps][:2] == ["rounding", "sweep"]
    kept = [step.error for step in solution.steps if step.kept]
    assert kept == sorted(kept, reverse=True)
    assert all(step.error >= kept[-1] for step in solution.steps)


@pytest.mark.parametrize("spec", SPECS)
def test_with_inputs_that_have_nothing_in_common_the_sweep_is_plain_rounding(spec: str) -> None:
    fmt, w = settled(spec), weight()
    grid = fmt.fit(w)
    lattice = fmt.lattice(grid)
    places, _ = gptq.sweep(w, algebra.Metric.of(torch.eye(112), 0.0), lattice)
    assert torch.equal(fmt.decode(lattice.codes[places.int()], grid), fmt.decode(fmt.encode(w, grid), grid))


@pytest.mark.parametrize("spec", SPECS)
def test_refit_and_descent_only_ever_lower_the_loss(spec: str) -> None:
    fmt, w = settled(spec), weight()
    hessian = algebra.damped(calibrated().hessian, 0.01)
    grid = fmt.fit(w)
    lattice = fmt.lattice(grid)
    places, _ = gptq.sweep(w, algebra.Metric.of(hessian, 0.0), lattice)

    def loss() -> float:
        error = (fmt.decode(fmt.lattice(grid).codes[places.int()], grid) - w).double()
        return float(((error @ hessian.double()) * error).sum())

    losses = [loss()]
    for _ in range(3):
        grid = refit.scales(w, places, grid, fmt, hessian)
        losses.append(loss())
        places, _ = loops.descend(w, places, fmt.lattice(grid), hessian)
        losses.append(loss())
        if len(grid.scale) == len(w):
            grid, places = gptq.refine(w, places, grid, fmt, hessian)
            losses.append(loss())
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


COARSE = ["mxfp4", "mxint8", "mxfp6_e2m3", "nvfp4", "mx4", "mx6", "vsq4:s4", "vsq3:s4"]


@pytest.mark.parametrize("spec", COARSE)
def test_coarse_scales_are_chosen_again_and_the_loss_only_falls(spec: str) -> None:
    fmt, w = settled(spec), weight()
    hessian = algebra.damped(calibrated().hessian, 0.01)
    grid = fmt.fit(w)
    places, _ = gptq.sweep(w, algebra.Metric.of(hessian, 0.0), fmt.lattice(grid))

    def losses(places: Tensor, grid: formats.Grid) -> Tensor:
        error = (fmt.decode(fmt.lattice(grid).codes[places.int()], grid) - w).double()
        return ((error @ hessian.double()) * error).sum(1)

    other, moved = coarse.choose(w, places, grid, fmt, hessian)
    before, after = losses(places, grid), losses(moved, other)
    assert (after <= before * (1 + 1e-4)).all()  # row by row
    assert after.sum() < before.sum() or spec == "mxint8"
    codes = fmt.lattice(other).codes[moved.int()]
    found, stored = fmt.unpack(fmt.pack(codes, other), (48, 112))
    assert torch.equal(found, codes)
    assert stored.equals(other)
    losses_of = [SOLVERS["gptq"](w, calibrated(), fmt, exponents=flag).loss for flag in (True, False)]
    assert losses_of[0] < 1.02 * losses_of[1]


@pytest.mark.parametrize("spec", COARSE)
def test_a_wrong_exponent_is_put_right(spec: str) -> None:
    """Every scale is twice or half what it should be: with inputs alike, trying the others finds the way back."""
    fmt, w = settled(spec), weight()
    grid = fmt.fit(w)
    hessian, best = torch.eye(112), (fmt.decode(fmt.encode(w, grid), grid) - w).square().sum()
    for which in (0, 1):
        wrong = fmt.alternative(grid, which)
        assert wrong is not None
        start = replace(grid, scale=wrong[1])
        places, _ = gptq.sweep(w, algebra.Metric.of(hessian, 0.0), fmt.lattice(start))
        lost = (fmt.decode(fmt.lattice(start).codes[places.int()], start) - w).square().sum()
        found, places = coarse.choose(w, places, start, fmt, hessian)
        again = (fmt.decode(fmt.lattice(found).codes[places.int()], found) - w).square().sum()
        assert lost > best
        assert again - best <= 0.25 * (lost - best)  # one step each way is not the whole search


def test_fine_scales_are_not_tried() -> None:
    for spec in ("int4:g32", "nf4:g32:dq", "kmeans3:channel", "ternary:g32", "fp8_e4m3:block"):
        fmt = settled(spec)
        assert fmt.alternative(fmt.fit(weight()), 0) is None


# ---- pieces, against references


def test_inverse_factor() -> None:
    hessian = algebra.damped(calibrated().hessian, 0.01).double()
    factor = algebra.inverse_factor(hessian)
    torch.testing.assert_close(factor.T @ factor, hessian.inverse(), rtol=1e-6, atol=1e-12)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("size", [1, 128, 300])
def test_a_factor_and_what_it_solves(size: int) -> None:
    stats = calibrated(size, 2 * size)
    felt = algebra.metric(stats, 0.03)
    assert algebra.metric(replace(stats, curvature=torch.eye(3)), 0.03) is felt  # linears that share their input
    assert algebra.metric(stats.scaled(torch.full((size,), 2.0)), 0.03) is not felt
    hessian = algebra.damped(stats.hessian, 0.03)
    ordered = hessian[felt.order][:, felt.order]
    assert torch.equal(ordered.diagonal(), ordered.diagonal().sort(descending=True).values)
    assert torch.equal(felt.factor, felt.factor.triu())
    root = felt.factor.double()
    torch.testing.assert_close(root @ root.T, ordered.double(), rtol=1e-5, atol=1e-5 * float(ordered.max()))
    right = torch.randn(7, size, generator=torch.Generator().manual_seed(9))
    wanted = torch.linalg.solve(hessian.double(), right.T.double()).T
    torch.testing.assert_close(felt.solved(right.clone()).double(), wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))


def test_the_energy_of_rows() -> None:
    w, hessian = weight(5, 1300), calibrated(1300, 100).hessian
    wanted = ((w.double() @ hessian.double()) * w.double()).sum(1)
    torch.testing.assert_close(row_energy(w, hessian).double(), wanted, rtol=1e-5, atol=0)


def test_sweep_is_the_textbook_algorithm() -> None:
    """In float64, by the inverse Hessian: round a column, make up for it, eliminate it (Optimal Brain Surgeon)."""
    fmt, w = settled("int3:g28"), weight(6, 56)
    hessian = algebra.damped(calibrated(56).hessian, 0.05)
    grid = fmt.fit(w)
    places, _ = gptq.sweep(w, algebra.Metric.of(hessian, 0.0), fmt.lattice(grid))
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    rest, inverse = w.double().clone(), hessian.double().inverse()
    wanted = torch.empty(6, 56)
    for column in order:
        here = grid.columns(column, column + 1)
        value = rest[:, column : column + 1].float()
        wanted[:, column] = fmt.decode(fmt.encode(value, here), here)[:, 0]
        error = (rest[:, column] - wanted[:, column]) / inverse[column, column]
        rest -= error[:, None] * inverse[column]
        inverse -= inverse[:, column : column + 1] * inverse[column : column + 1] / inverse[column, column]
    found = fmt.decode(fmt.lattice(grid).codes[places.int()], grid)
    assert (found == wanted).float().mean() > 0.99  # a tie in one precision is none in the other


def target(w: Tensor, stats: Stats) -> Tensor:
    assert stats.held is not None
    return gptq.aimed(w, stats, 0.03, stats.held.missed(w)).at


def test_target_is_what_least_squares_gives() -> None:
    """With held-out tokens that are those of the sums, the whole of the correction pays."""
    w, generator = weight(5, 24), torch.Generator().manual_seed(5)
    x = torch.randn(3000, 24, generator=generator)
    x_ref = x + 0.3 * x.roll(1, dims=1) + 0.1 * torch.randn(3000, 24, generator=generator)
    stats = Stats.empty(24)
    stats.update(x, x_ref)
    stats.hold(x, x_ref, most=3000)
    best = torch.linalg.lstsq(x.double(), x_ref.double() @ w.T.double()).solution.T
    assert (target(w, stats) - best).norm() < 0.05 * (best - w).norm()  # the damping keeps it short of all


def test_target_pays_what_the_residual_stream_lacks() -> None:
    w, x = weight(5, 24), torch.randn(3000, 24, generator=torch.Generator().manual_seed(5))
    lacking = torch.randn(5, 24, generator=torch.Generator().manual_seed(6)) * 0.02
    stats = Stats.empty(24)
    stats.update(x, x, x @ lacking.T)
    stats.hold(x, x, x @ lacking.T)
    torch.testing.assert_close(target(w, stats), w + lacking / 1.03, rtol=0.02, atol=0.001)


def test_noise_is_not_aimed_at() -> None:
    """Two streams that differ by chance alone: what fits the sums loses on other tokens, and is not used."""
    generator = torch.Generator().manual_seed(7)
    stats = Stats.empty(64)
    for add in (stats.update, stats.hold):
        x = torch.randn(80, 64, generator=generator)
        add(x, x + torch.randn(80, 64, generator=generator))
    w = weight(16, 64)
    assert (target(w, stats) - w).norm() < 0.15 * w.norm()


# ---- when things go wrong


@pytest.mark.parametrize("kind", ["zero", "one token", "dead inputs", "huge", "tiny"])
def test_no_hessian_breaks_it(kind: str) -> None:
    stats = Stats.empty(112)
    x, x_ref = inputs(500, 112, seed=8)
    if kind == "zero":
        x, x_ref = torch.zeros_like(x), torch.zeros_like(x)
    elif kind == "one token":
        x, x_ref = x[:1], x_ref[:1]
    elif kind == "dead inputs":
        x[:, ::2], x_ref[:, ::2] = 0, 0
    elif kind == "huge":
        x, x_ref = x * 1e12, x_ref * 1e12
    else:
        x, x_ref = x * 1e-15, x_ref * 1e-15
    stats.update(x, x_ref)
    fmt, w = settled("int4:g32"), weight()
    solution = SOLVERS["gptq"](w, stats, fmt)
    decoded = fmt.decode(solution.codes, solution.grid)
    assert torch.isfinite(decoded).all()
    assert (decoded - w).norm() < 0.5 * w.norm()


def test_a_step_that_loses_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that has gone wrong: what is kept is the rounding before it, and the record says so."""
    fmt, w, stats = settled("int4:g32"), weight(), calibrated()
    monkeypatch.setattr(gptq, "sweep", lambda aim, felt, lattice: (torch.zeros(aim.shape, dtype=torch.uint8), aim))
    solution = SOLVERS["gptq"](w, stats, fmt, rounds=0)
    plain = SOLVERS["rtn"](w, stats, fmt)
    assert [(step.name, step.kept) for step in solution.steps] == [("rounding", True), ("sweep", False)]
    assert torch.equal(solution.codes, plain.codes)


def test_same_bits_for_any_number_of_threads() -> None:
    """Statistics, factor and target too: of a width at which libraries share out sums among threads."""
    fmt, w = settled("int3:g32"), weight(96, 700)
    shown = inputs(800, 700, seed=2)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            stats = Stats.empty(700)
            stats.update(*shown)
            stats.hold(*shown, most=100)
            stats.curvature = torch.eye(32).repeat(3, 1, 1) + 0.1
            solution, felt = SOLVERS["gptq"](w, stats, fmt), algebra.metric(stats, 0.03)
            assert solution.rival is not None
            found.append((stats.hessian, stats.cross, felt.factor, solution.codes, solution.rival.codes))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("known", [True, False])
def test_the_last_linear_that_shares_sums_uses_them_up_and_finds_the_same(known: bool) -> None:
    fmt, w, stats = settled("int3:g28"), weight(), calibrated()
    if known:
        lacking = inputs(2000, 48, seed=7)[0]
        stats.cross, stats.lacking = None, 0.01 * lacking.T @ inputs(2000, 112, seed=2)[0]
        stats.pieces = [(x, x_ref, 0.01 * lacking[: len(x)]) for x, x_ref in stats.pieces]
    stats.curvature = torch.eye(16).repeat(3, 1, 1) + 0.1
    first = SOLVERS["gptq"](w, stats, fmt)
    total = stats.lacking if known else stats.cross
    assert total is not None
    assert total.shape == ((48, 112) if known else (112, 112))
    stats.last = True
    last = SOLVERS["gptq"](w, stats, fmt)
    assert first.rival is not None
    assert last.rival is not None
    for a, b in ((first, last), (first.rival, last.rival)):
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.grid.scale, b.grid.scale)
        assert a.loss == b.loss
    assert stats.cross is None
    assert stats.lacking is None
    assert not stats.shared


def test_gptq_without_calibration_is_refused_in_the_plan() -> None:
    recipe = Recipe((Rule("*", "int4:g32", "gptq"),))
    with pytest.raises(PlanError, match="'gptq' needs calibration"):
        recipe.check(["model.layers.0.q_proj"], calibrated=False)
    assert Recipe.uniform("int4:g32").settled(True).rules[0].solver == "gptq"
    assert Recipe.uniform("int4:g32").settled(False).rules[0].solver == "rtn"
