"""The loops of the solvers: against sums in float64 that share no code with them, and compiled against torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmquant import formats
from llmquant.formats.base import Format, Grid, Lattice
from llmquant.solvers import loops

# Every kind of lattice: offsets, zeros, tables for all or for each row, scales of each sign, one scale for all rows.
SPECS = [
    *(
        "int4:g32",
        "int2:g16",
        "int8:channel",
        "int3:g32:asym",
        "int4:g32:asym_float",
        "int5:g32:sym_gptq",
        "int4:tensor",
    ),
    *("mxfp4", "mxint8", "mx6", "nvfp4", "vsq4:s4", "nf4:g32", "nf4:g32:dq", "table:-1,-0.3,0,0.4,1:g32"),
    *("fp8_e4m3:channel", "fp8_e4m3:block", "kmeans3:channel", "kmeans3:g32", "ternary:g32", "binary:g32"),
]
ROWS, COLUMNS = 21, 75  # neither whole groups, nor whole row blocks


def definite(size: int, seed: int) -> Tensor:
    """A symmetric positive definite matrix (size, size) float32 whose rows and columns have much in common."""
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed))
    x = x * torch.linspace(0.5, 2, size) + 0.7 * x.roll(1, dims=1) + 0.5 * x[:, :1]
    return x.T @ x / len(x)


def diagonal_blocks(g: Tensor, width: int) -> Tensor:
    """The blocks (blocks, width, width) along the diagonal of g (out, out); the last is filled up with NaN."""
    blocks = torch.full((-(-len(g) // width), width, width), torch.nan)
    for block, start in zip(blocks, range(0, len(g), width), strict=True):
        own = g[start : start + width, start : start + width]
        block[: len(own), : len(own)] = own
    return blocks


def block_diagonal(g: Tensor, width: int) -> Tensor:
    """g (out, out) float64 without what lies outside of its diagonal blocks."""
    at = torch.arange(len(g)) // width
    return g.double() * (at[:, None] == at)


def problem(spec: str, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Format, Grid, Lattice]:
    fmt = formats.get(spec).stored_for(torch.float32)
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.1
    grid = fmt.fit(w)
    return w, fmt, grid, fmt.lattice(grid)


def all_values(lattice: Lattice, rows: int, columns: int) -> Tensor:
    """What every place (out, in, K) of every element stands for, float64."""
    groups = torch.arange(columns) // lattice.group

    def of_columns(x: Tensor | None) -> Tensor:
        x = torch.zeros(1, 1) if x is None else x[:, groups]
        return x.double().expand(rows, columns).unsqueeze(-1)

    levels = lattice.levels.double().unsqueeze(1)
    return (levels - of_columns(lattice.zero)) * of_columns(lattice.scale) + of_columns(lattice.offset)


def values(lattice: Lattice, places: Tensor) -> Tensor:
    return all_values(lattice, *places.shape).gather(2, places.long().unsqueeze(-1)).squeeze(-1)


def objective(w: Tensor, q: Tensor, h: Tensor, g: Tensor | None = None) -> Tensor:
    """tr(G D H D^T) in float64; G is the identity where it is None."""
    d = q - w.double()
    return (((d if g is None else g @ d) @ h.double()) * d).sum()


def rounded(w: Tensor, lattice: Lattice) -> Tensor:
    """The nearest places (out, in) uint8, from all distances."""
    return (all_values(lattice, *w.shape) - w.double().unsqueeze(-1)).abs().argmin(-1).to(torch.uint8)


def random_mix(size: int, seed: int = 5) -> Tensor:
    """R of H = R D R^T: upper, ones along the diagonal."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return torch.eye(size) + 0.1 * noise.triu(1)


def rounded_block(
    w: Tensor, mix: Tensor, lattice: Lattice, columns: Tensor, sweep: loops.Sweep | None = None
) -> tuple[Tensor, Tensor]:
    return loops.gptq_block(w, torch.zeros_like(w), mix, lattice, columns, sweep=sweep)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- GPTQ


@pytest.mark.parametrize("spec", SPECS)
def test_without_feedback_a_block_is_rounded_to_nearest(spec: str) -> None:
    w, fmt, grid, lattice = problem(spec)
    columns = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(4))
    places, errors = rounded_block(w[:, columns], torch.eye(COLUMNS), lattice, columns)
    expected = fmt.decode(fmt.encode(w, grid), grid)
    in_place = torch.empty_like(places).index_copy_(1, columns, places)
    assert torch.equal(fmt.decode(lattice.codes[in_place.long()], grid), expected)
    torch.testing.assert_close(errors, (expected - w)[:, columns], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_a_block_of_gptq_is_that_of_the_paper(spec: str) -> None:
    w, _, _, lattice = problem(spec)
    columns = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(4))[:40]
    h = definite(40, seed=5).double()
    u = torch.linalg.cholesky(h.inverse(), upper=True)
    mix = torch.linalg.inv(u / u.diagonal().unsqueeze(1))
    places, errors = rounded_block(w[:, columns], mix.float(), lattice, columns)

    table = all_values(lattice, ROWS, COLUMNS)
    paper = w[:, columns].double()
    for i in range(40):
        ladder = table[:, columns[i]]
        value = ladder.gather(1, (ladder - paper[:, i : i + 1]).abs().argmin(1, keepdim=True))
        torch.testing.assert_close(ladder.gather(1, places[:, i : i + 1].long()), value)
        lost = value - w[:, columns[i], None].double()
        torch.testing.assert_close(errors[:, i : i + 1].double(), lost, rtol=1e-4, atol=1e-5)
        paper[:, i + 1 :] -= (paper[:, i : i + 1] - value) / u[i, i] * u[i, i + 1 :]


@pytest.mark.parametrize("spec", SPECS)
def test_compiled_and_torch_agree_on_a_block_of_gptq(spec: str) -> None:
    w, _, _, lattice = problem(spec, rows=150)
    columns, mix = torch.arange(COLUMNS), random_mix(COLUMNS)
    places, errors = rounded_block(w, mix, lattice, columns, sweep=loops.sweep_compiled)
    expected, expected_errors = rounded_block(w, mix, lattice, columns, sweep=loops.sweep_torch)
    assert torch.equal(places, expected)
    torch.testing.assert_close(errors, expected_errors, rtol=1e-4, atol=1e-5)


# ---- descent


def one_by_one(w: Tensor, places: Tensor, table: Tensor, h: Tensor, g: Tensor, width: int) -> tuple[Tensor, int]:
    """A sweep that tries every level of every element, in the order that `descend` promises, in float64."""
    places, changes = places.clone(), 0
    h, d = h.double(), table.gather(2, places.long().unsqueeze(-1)).squeeze(-1) - w.double()
    for c in h.diagonal().argsort(descending=True, stable=True).tolist():
        for start in range(0, len(w), width):
            diagonal = g.diagonal()[start : start + width]
            for r in (start + diagonal.argsort(descending=True, stable=True)).tolist():
                ladder = table[r, c] - w[r, c].double()
                slope = g[r] @ d @ h[c] - g[r, r] * h[c, c] * d[r, c]
                place = int((g[r, r] * h[c, c] * ladder**2 + 2 * slope * ladder).argmin())
                changes += place != int(places[r, c])
                places[r, c], d[r, c] = place, ladder[place]
    return places, changes


@pytest.mark.parametrize("width", [1, 3, 10])
@pytest.mark.parametrize("spec", ["int3:g16", "int3:g16:asym", "nf4:g16", "kmeans3:channel"])
def test_a_sweep_is_that_of_trying_all_levels_of_one_element_after_the_other(spec: str, width: int) -> None:
    w, _, _, lattice = problem(spec, rows=10, columns=24)
    h, g = definite(24, seed=1), definite(10, seed=2)
    curvature = None if width == 1 else diagonal_blocks(g, width)
    g = torch.eye(10).double() if width == 1 else block_diagonal(g, width)
    expected, counts = rounded(w, lattice), []
    for _ in range(3):
        expected, count = one_by_one(w, expected, all_values(lattice, 10, 24), h, g, width)
        counts.append(count)
    for block in (1, 7, 128):
        places, changes = loops.descend(w, rounded(w, lattice), lattice, h, curvature, sweeps=3, block=block)
        assert torch.equal(places, expected)
        assert changes == counts


@pytest.mark.parametrize(
    ("spec", "rows", "width"),
    [
        *((spec, ROWS, 8) for spec in SPECS),
        *((spec, 150, width) for spec in ("int4:g32", "kmeans3:g32") for width in (1, 16, 80)),
    ],
)
def test_compiled_and_torch_descend_alike(spec: str, rows: int, width: int) -> None:
    w, _, _, lattice = problem(spec, rows)
    h, g = definite(COLUMNS, seed=1), definite(rows, seed=2)
    curvature = None if width == 1 else diagonal_blocks(g, width)
    start = rounded(w, lattice)
    found = loops.descend(w, start, lattice, h, curvature, block=32, sweep=loops.sweep_compiled)
    expected = loops.descend(w, start, lattice, h, curvature, block=32, sweep=loops.sweep_torch)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize("width", [1, 8, ROWS])
@pytest.mark.parametrize("spec", SPECS)
def test_every_sweep_helps_until_no_single_change_does(spec: str, width: int) -> None:
    w, _, _, lattice = problem(spec)
    h, g = definite(COLUMNS, seed=1), definite(ROWS, seed=2)
    curvature = None if width == 1 else diagonal_blocks(g, width)
    full = torch.eye(ROWS).double() if width == 1 else block_diagonal(g, width)
    table, places, changes = all_values(lattice, ROWS, COLUMNS), rounded(w, lattice), [1]
    losses = [objective(w, values(lattice, places), h, full)]
    while changes[-1]:
        places, changes = loops.descend(w, places, lattice, h, curvature, block=32)
        losses.append(objective(w, values(lattice, places), h, full))
        assert losses[-1] <= losses[-2] * (1 + 1e-6)
        assert len(losses) < 100
    assert losses[-1] < 0.9 * losses[0]

    q = values(lattice, places)
    slope = 2 * full @ (q - w.double()) @ h.double()
    bend = full.diagonal().unsqueeze(1) * h.diagonal().double()
    by = table - q.unsqueeze(-1)
    assert (slope.unsqueeze(-1) * by + bend.unsqueeze(-1) * by**2).min() >= -1e-6 * losses[-1]


def test_rows_that_are_not_free_stay_and_others_see_them_as_they_are() -> None:
    w, _, _, lattice = problem("int3:g32", rows=100)
    h, g = definite(COLUMNS, seed=1), definite(100, seed=2)
    start = rounded(w, lattice)
    free = torch.arange(100) % 3 != 0
    for curvature, full in ((None, None), (diagonal_blocks(g, 40), block_diagonal(g, 40))):
        for sweep in (loops.sweep_compiled, loops.sweep_torch):
            places, changes = loops.descend(w, start, lattice, h, curvature, rows=free, sweep=sweep)
            assert torch.equal(places[~free], start[~free])
            assert changes == [int((places != start).sum())]
            assert changes[0] > 0
            before, after = (objective(w, values(lattice, some), h, full) for some in (start, places))
            assert after < before
    alone, _ = loops.descend(w[free], start[free], replace(lattice, scale=lattice.scale[free]), h)
    assert torch.equal(loops.descend(w, start, lattice, h, rows=free)[0][free], alone)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("columns", [slice(None), slice(0, 1100), slice(40, 1500)])
def test_what_has_moved_is_spread_alike_whether_zeros_are_passed_over_or_not(share: float, columns: slice) -> None:
    generator = torch.Generator().manual_seed(6)
    moved, near = torch.randn(ROWS, 40, generator=generator), torch.randn(40, 1500, generator=generator)
    moved *= torch.rand(moved.shape, generator=generator) < share
    felt = torch.randn(ROWS, 1500, generator=generator)
    expected = felt.double()
    expected[:, columns] += moved.double() @ near.double()[:, columns]
    loops._spread(moved, near, felt, columns)
    torch.testing.assert_close(felt.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [1, 16, 300])
def test_the_number_of_threads_does_not_change_a_bit(width: int) -> None:
    w, _, _, lattice = problem("int4:g128", rows=300, columns=1100)
    h, g = definite(1100, seed=1), definite(300, seed=2)
    curvature = None if width == 1 else diagonal_blocks(g, width)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        places, errors = rounded_block(w, random_mix(1100), lattice, torch.arange(1100))
        found.append((places, errors, loops.descend(w, places, lattice, h, curvature, sweeps=2)[0]))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# ---- what should never happen, and does


@pytest.mark.parametrize("sweep", [loops.sweep_compiled, loops.sweep_torch])
@pytest.mark.parametrize("spec", ["int4:g32", "int4:g32:asym", "nf4:g32", "kmeans3:channel"])
def test_numbers_that_are_none_get_a_place_all_the_same(spec: str, sweep: loops.Sweep) -> None:
    w, _, _, lattice = problem(spec)
    w[0, 0], w[1, 1], w[2, 2] = torch.nan, torch.inf, -torch.inf
    places, _ = rounded_block(w, random_mix(COLUMNS), lattice, torch.arange(COLUMNS), sweep=sweep)
    assert places.max() < lattice.levels.shape[1]


@pytest.mark.parametrize("sweep", [loops.sweep_compiled, loops.sweep_torch])
@pytest.mark.parametrize("spec", ["int4:g32", "int3:g32:asym", "nf4:g32"])
def test_a_scale_of_zero_makes_zeros(spec: str, sweep: loops.Sweep) -> None:
    w, _, _, lattice = problem(spec)
    lattice.scale[:, 1] = 0.0
    places, _ = rounded_block(w, random_mix(COLUMNS), lattice, torch.arange(COLUMNS), sweep=sweep)
    nearest_to_zero = lattice.levels[0] if lattice.zero is None else lattice.levels[0] - lattice.zero[:, 1:2]
    assert torch.equal(places[:, 32:64].long(), nearest_to_zero.abs().argmin(-1, keepdim=True).expand(ROWS, 32))
    assert (values(lattice, places)[:, 32:64] == 0).all()


@pytest.mark.parametrize("sweep", [loops.sweep_compiled, loops.sweep_torch])
def test_what_has_no_curvature_stays(sweep: loops.Sweep) -> None:
    w, _, _, lattice = problem("int4:g32")
    h, g = definite(COLUMNS, seed=1), definite(ROWS, seed=2)
    h[5], h[:, 5], g[7], g[:, 7] = 0.0, 0.0, 0.0, 0.0
    start = torch.full(w.shape, 3, dtype=torch.uint8)
    places, _ = loops.descend(w, start, lattice, h, g.unsqueeze(0), sweep=sweep)
    assert (places[7] == 3).all()
    assert (places[:, 5] == 3).all()
    assert (places != 3).any()


def test_the_compiler_is_not_imported_before_it_is_needed() -> None:
    command = "import sys, llmquant.solvers.loops; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
