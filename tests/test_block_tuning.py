"""Roundings that are tuned by gradients: AdaRound of a matrix, AutoRound of a block; for every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from test_pipeline import SMALL, contents, quantize
from test_solvers import SPECS, calibrated, inputs, settled, weight
from torch import Tensor

from llmquant import formats, inspection
from llmquant.errors import PlanError
from llmquant.recipe import Recipe, Rule
from llmquant.solvers import SOLVERS, TUNERS, adaround, autoround
from llmquant.solvers.block_tuning import Gradient, Part, Rounding
from llmquant.stats import Stats

EVERY = [*SPECS, "fp8_e4m3:block", "kmeans2:tensor", "int3:g32:sym_gptq", "table:-1,-0.3,0,0.4,1:g32"]


def straight(x: Tensor, y: Tensor) -> Tensor:
    """y, with the gradient of x."""
    return x + (y - x).detach()


def rounded(x: Tensor) -> Tensor:
    return straight(x, x.round())


def stored(x: Tensor) -> Tensor:
    return straight(x, x.half().float())


def published(w: Tensor, grid: formats.Grid, spec: str, v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Equations 2 to 5 of arXiv:2309.05516 for groups of 32 and three bits, with autograd straight through."""
    x, offsets = w.view(len(w), -1, 32), v.view(len(w), -1, 32)
    if spec == "int3:g32":
        scale = stored(grid.scale * high).unsqueeze(2)
        return (rounded(x / scale + offsets).clamp(-4, 3) * scale).view_as(w)
    assert grid.zero is not None
    if spec == "int3:g32:asym_float":
        bottom, top = low * grid.zero, high * (grid.zero + 7 * grid.scale)
        scale, zero = stored((top - bottom) / 7).unsqueeze(2), stored(bottom).unsqueeze(2)
        return (rounded((x - zero) / scale + offsets).clamp(0, 7) * scale + zero).view_as(w)
    bottom, top = -low * grid.zero * grid.scale, high * (7 - grid.zero) * grid.scale
    scale = stored((top - bottom) / 7)
    zero = rounded(-bottom / scale).unsqueeze(2)
    scale = scale.unsqueeze(2)
    return (((rounded(x / scale + offsets) + zero).clamp(0, 7) - zero) * scale).view_as(w)


# ---- roundings


@pytest.mark.parametrize("spec", ["int3:g32", "int3:g32:asym", "int3:g32:asym_float"])
def test_gradients_are_those_of_autograd_through_the_published_equations(spec: str) -> None:
    fmt, w, generator = settled(spec), weight(6, 64), torch.Generator().manual_seed(0)
    rounding = Rounding(Part(w, fmt, fmt.fit(w, clip="minmax")))
    offsets = torch.rand(6, 64, generator=generator) - 0.5
    low, high = (0.7 + 0.3 * torch.rand(6, 2, generator=generator) for _ in range(2))
    upstream = torch.randn(6, 64, generator=generator)
    rounding.offsets, rounding.low, rounding.high = offsets.clone(), low.clone(), high.clone()
    leaves = [leaf.requires_grad_() for leaf in (offsets, low, high)]
    wanted = published(w, rounding.part.grid, spec, *leaves)
    torch.testing.assert_close(rounding.decode(), wanted.detach(), rtol=1e-4, atol=1e-7)
    gradients = torch.autograd.grad((wanted * upstream).sum(), leaves, allow_unused=True)
    for found, gradient in zip(rounding.gradients(upstream), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(found, gradient, rtol=1e-2, atol=2e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("spec", EVERY)
def test_it_starts_as_rounding_to_nearest_and_can_be_stored(spec: str) -> None:
    fmt, w = settled(spec), weight()
    codes, grid = fmt.quantize(w, clip="minmax")
    rounding = Rounding(Part(w, fmt, grid))
    torch.testing.assert_close(rounding.decode(), fmt.decode(codes, grid), rtol=1e-5, atol=1e-7)
    generator = torch.Generator().manual_seed(1)
    rounding.offsets += torch.rand(w.shape, generator=generator) - 0.5
    rounding.low -= 0.4 * torch.rand(rounding.low.shape, generator=generator)
    rounding.high -= 0.4 * torch.rand(rounding.high.shape, generator=generator)
    decoded, solution = rounding.decode(), rounding.solution()
    torch.testing.assert_close(fmt.decode(solution.codes, solution.grid), decoded, rtol=1e-5, atol=1e-7)
    codes, grid = fmt.unpack(fmt.pack(solution.codes, solution.grid), (48, 112))
    assert torch.equal(codes, solution.codes)
    assert grid.equals(solution.grid)


@pytest.mark.parametrize("spec", ["int4:g32", "nf4:g32", "mxfp4", "kmeans3:channel", "binary:g32"])
def test_an_offset_of_one_goes_to_the_next_level(spec: str) -> None:
    fmt, w = settled(spec), weight()
    grid = fmt.fit(w, clip="minmax")
    lattice, rounding = fmt.lattice(grid), Rounding(Part(w, fmt, grid))
    rounding.decode()
    before, inside = rounding.places.clone(), rounding.inside.clone()  # what lies farther out needs more than one
    rounding.offsets += 1
    rounding.decode()
    wanted = (before + 1).clamp(max=lattice.levels.shape[1] - 1)
    assert (rounding.places == wanted)[inside].float().mean() > 0.999  # ties


# ---- AutoRound


def of_a_linear(w: Tensor, batches: list[Tensor], name: str = "w") -> Any:
    """Gradient of a block that is one linear: y = w x."""

    def gradient(batch: int, weights: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        error = batches[batch] @ (weights[name] - w).T
        return float(error.square().mean()), {name: 2 * error.T @ batches[batch]}

    return gradient


@pytest.mark.parametrize("spec", ["int3:g32", "int3:g32:asym"])
def test_autoround_is_the_published_algorithm(spec: str) -> None:
    """Signs of autograd's gradients, a rate that falls from 1 / iterations to 0, the best batch seen."""
    fmt, w, iterations = settled(spec), weight(8, 64), 40
    batches = [*inputs(400, 64, seed=4)[0].split(100)]
    found = autoround.tune(
        {"w": Part(w, fmt, fmt.fit(w, clip="minmax"))}, of_a_linear(w, batches), 4, 7, iterations=iterations
    )
    grid, generator = fmt.fit(w, clip="minmax"), torch.Generator().manual_seed(7)
    leaves = [torch.zeros(8, 64), torch.ones(8, 2), torch.ones(8, 2)]
    order: list[int] = []
    best, least = w, float("inf")
    for step in range(iterations):
        order = order or torch.randperm(4, generator=generator).tolist()
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        decoded = published(w, grid, spec, *leaves)
        loss = (batches[order.pop()] @ (decoded - w).T).square().mean()
        if float(loss.detach()) < least:
            best, least = decoded.detach(), float(loss.detach())
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        pace = (1 - step / iterations) / iterations
        leaves = [
            leaf.detach() - pace * (torch.zeros(()) if gradient is None else gradient.sign())
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ]
        leaves[1:] = [leaf.clamp(0, 1) for leaf in leaves[1:]]
    solution = found["w"]
    assert torch.isclose(fmt.decode(solution.codes, solution.grid), best, rtol=1e-3, atol=1e-5).float().mean() > 0.97


@pytest.mark.parametrize("spec", EVERY)
def test_autoround_beats_where_it_started(spec: str) -> None:
    fmt, w, batches = settled(spec), weight(), [*inputs(1200, 112, seed=2, outliers=1.0)[0].split(300)]
    part = Part(w, fmt, fmt.fit(w, clip="minmax"))
    gradient = of_a_linear(w, batches)
    solution = autoround.tune({"w": part}, gradient, 4, 0, iterations=100)["w"]
    x = inputs(1000, 112, seed=77, outliers=1.0)[0]
    start = fmt.decode(fmt.encode(w, part.grid), part.grid)
    lost = [float((x @ (q - w).T).square().sum()) for q in (fmt.decode(solution.codes, solution.grid), start)]
    assert lost[0] <= lost[1]
    # With eight bits there is little to lose, and the first steps may lose all there is to gain.
    assert lost[0] < lost[1] or spec in ("mxint8", "fp8_e4m3:channel")


def test_autoround_leaves_planted_weights_alone() -> None:
    """Nothing is lost to begin with: the first iterate is the best."""
    fmt = settled("int4:g32")
    grid = fmt.fit(weight(), clip="minmax")
    planted = fmt.decode(fmt.encode(weight(), grid), grid)
    gradient = of_a_linear(planted, [*inputs(400, 112, seed=2)[0].split(100)])
    solution = autoround.tune({"w": Part(planted, fmt, grid)}, gradient, 4, 0, iterations=20)["w"]
    assert torch.equal(fmt.decode(solution.codes, solution.grid), planted)


def test_ranges_stay_where_they_are_if_asked() -> None:
    fmt, w = settled("int3:g32"), weight()
    part = Part(w, fmt, fmt.fit(w, clip="minmax"))
    gradient = of_a_linear(w, [inputs(400, 112, seed=2)[0]])
    moved, fixed = (
        autoround.tune({"w": part}, gradient, 1, 0, iterations=20, ranges=flag)["w"] for flag in (True, False)
    )
    assert fixed.grid.equals(part.grid)
    assert not moved.grid.equals(part.grid)


# ---- AutoRound in a run


def tuned(folder: Path, output: Path, *rules: Rule) -> dict[str, Any]:
    model = folder / "model"
    if not model.is_dir():
        make_checkpoint(model, "llama", dtype=torch.float32)
    return quantize(model, output, Recipe(rules), calibration=SMALL)


def test_blocks_are_tuned_in_a_run_and_judged_on_held_out_tokens(tmp_path: Path) -> None:
    rules = Rule("*.mlp.*", "int3:g32", "autoround", {"iterations": 8, "rate": 0.05}), Rule("*", "mxfp4", "gptq")
    manifest = tuned(tmp_path, tmp_path / "a", *rules)
    steps = {tensor["name"]: tensor["steps"] for tensor in manifest["tensors"]}
    assert {tensor["solver"] for tensor in manifest["tensors"]} == {"autoround", "gptq"}
    for name, found in steps.items():
        if ".mlp." in name:
            assert [step["name"] for step in found] == ["tuning"]
            assert found[0]["kept"] == (found[0]["error"] < found[0]["before"])
    assert any(found[0]["kept"] for name, found in steps.items() if ".mlp." in name)
    assert inspection.verify(tmp_path / "a") == []
    tuned(tmp_path, tmp_path / "b", *rules)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_tuning_that_loses_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuner that has gone wrong: what is kept is where it started, and the record says so."""

    def wreck(
        parts: dict[str, Part],
        gradient: Gradient,
        batches: int,
        seed: int,
        *,
        clip: str = "minmax",
        iterations: int = 1,
    ) -> Any:
        found = {name: Rounding(part) for name, part in parts.items()}
        for rounding in found.values():
            rounding.offsets += 3
            rounding.decode()
        return {name: rounding.solution() for name, rounding in found.items()}

    before = tuned(tmp_path, tmp_path / "a", Rule("*", "int4:g32", "autoround", {"iterations": 0}))
    monkeypatch.setitem(TUNERS, "autoround", wreck)
    wrecked = tuned(tmp_path, tmp_path / "b", Rule("*", "int4:g32", "autoround"))
    assert not any(tensor["steps"][0]["kept"] for tensor in wrecked["tensors"])
    assert all(tensor["steps"][0]["error"] > tensor["steps"][0]["before"] for tensor in wrecked["tensors"])
    assert [t["loss"] for t in wrecked["tensors"]] == [t["loss"] for t in before["tensors"]]


# ---- AdaRound


def adaround_reference(
    base: Tensor, step: Tensor, start: Tensor, x: Tensor, lacks: Tensor, iterations: int, strength: float
) -> Tensor:
    """Section 3 of arXiv:2004.10568 in float64 by autograd and Adam, on the tokens themselves."""
    base, step, start, x, lacks = (each.double() for each in (base, step, start, x, lacks))
    hessian = x.T @ x
    unit = float(((base + start.round() * step).square() @ hessian.diagonal()).sum()) / int(
        ((start > 0) & (start < 1)).sum()
    )
    v = torch.logit((start + 0.1) / 1.2).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.01)

    def soft() -> Tensor:
        return (1.2 * v.sigmoid() - 0.1).clamp(0, 1)

    for count in range(iterations):
        h = soft()
        loss = (x @ (base + h * step).T - lacks).square().sum() / unit
        if count >= 0.2 * iterations:
            b = 2 + 18 * (1 - (count / iterations - 0.2) / 0.8)
            loss = loss + strength * (1 - (2 * h - 1).abs() ** b).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return soft().detach()


def test_adaround_is_the_published_algorithm() -> None:
    x, x_ref = inputs(300, 32, seed=3)
    w, generator = weight(6, 32), torch.Generator().manual_seed(1)
    start = torch.rand(6, 32, generator=generator).clamp(0.02, 0.98)
    step = torch.full((6, 32), 0.02)
    base = -start * step
    lacks = (x_ref - x) @ w.T
    found = adaround.relaxed(base, step, start, lacks.T @ x, x.T @ x, 300, 0.01, 30.0)
    wanted = adaround_reference(base, step, start, x, lacks, 300, 30.0)
    assert ((found >= 0.5) == (wanted >= 0.5)).float().mean() > 0.98
    assert (found.double() - wanted).abs().median() < 0.01
    assert ((found < 0.01) | (found > 0.99)).float().mean() > 0.7  # most end at a level


@pytest.mark.parametrize("spec", EVERY)
def test_adaround_beats_rounding_and_takes_one_of_the_two_next_levels(spec: str) -> None:
    fmt, w, stats = settled(spec), weight(), calibrated()
    first, second = (SOLVERS["adaround"](w, stats, fmt, iterations=100) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    x, x_ref = inputs(1000, 112, seed=77)
    plain = fmt.encode(w, first.grid)
    lost = [float((x @ fmt.decode(codes, first.grid).T - x_ref @ w.T).square().sum()) for codes in (first.codes, plain)]
    assert lost[0] <= lost[1] * 1.001
    assert first.steps[1].kept == (first.steps[1].error < first.steps[0].error)
    assert lost[0] < lost[1] or not first.steps[1].kept
    values, found = every_value(fmt, first.grid), fmt.decode(first.codes, first.grid)
    below = (values <= w.unsqueeze(2)).sum(2) - 1
    place = (values - found.unsqueeze(2)).abs().argmin(2)
    next_ones = (place == below.clamp(min=0)) | (place == (below + 1).clamp(max=values.shape[2] - 1))
    assert next_ones.float().mean() > 0.999  # a weight may be at a level but for its last digit


def every_value(fmt: formats.Format, grid: formats.Grid) -> Tensor:
    """What each weight could be, (48, 112, levels), ascending."""
    lattice = fmt.lattice(grid)
    scale, zero, offset = (
        torch.zeros(1, 1, 1) if each is None else each.repeat_interleave(lattice.group, 1)[:, :112].unsqueeze(2)
        for each in (lattice.scale, lattice.zero, lattice.offset)
    )
    return ((lattice.levels.unsqueeze(1) - zero) * scale + offset).expand(48, 112, -1).sort(2).values


def test_adaround_leaves_planted_weights_alone() -> None:
    fmt, x = settled("int4:g32"), inputs(500, 112, seed=3)[0]
    stats = Stats.empty(112)
    stats.update(x, x)
    grid = fmt.fit(weight(), clip="minmax")
    planted = fmt.decode(fmt.encode(weight(), grid), grid)
    solution = SOLVERS["adaround"](planted, stats, fmt, clip="minmax", iterations=50)
    torch.testing.assert_close(fmt.decode(solution.codes, solution.grid), planted, rtol=1e-3, atol=1e-6)


# ---- refusals


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule("*", "int4:g32", "autoround", {"lr": 0.1}),
            "'autoround' of rule '\\*' has no option 'lr': known are clip, iterations",
        ),
        (Rule("*", "int4:g32", "autoround", {"ranges": 1}), "takes a bool as ranges, not 1"),
        (Rule("*", "int4:g32", "adaround", {"iterations": -1}), "takes a finite iterations of at least 0, not -1"),
    ],
)
def test_wrong_options_are_refused_in_the_plan(rule: Rule, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Recipe((rule,)).check(["q_proj"], calibrated=True)


@pytest.mark.parametrize("solver", ["adaround", "autoround"])
def test_without_calibration_they_are_refused(solver: str) -> None:
    with pytest.raises(PlanError, match=f"'{solver}' needs calibration"):
        Recipe((Rule("*", "int4:g32", solver),)).check(["q_proj"], calibrated=False)
