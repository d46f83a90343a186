"""Numbers that go wrong end in a matrix that is rounded to nearest, and in the report."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from safetensors.torch import load_file, save_file
from test_pipeline import quantize
from torch import Tensor

from llmquant import calibration, cli, formats, recovery
from llmquant.errors import DataError
from llmquant.pipeline import Calibration
from llmquant.recipe import Recipe, Rule
from llmquant.solvers import SOLVERS, Solution, algebra, gptq, loops, recoveries
from llmquant.stats import Stats

FMT = formats.get("int4:g16:fp32")
SHOWN = Calibration("self", samples=8, length=32, batch=4)


def data(tokens: int = 400, seed: int = 0) -> tuple[Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    stats = Stats.empty(32)
    mixing = torch.randn(32, 32, generator=generator) * torch.logspace(0, -1.5, 32)
    x = torch.randn(tokens, 32, generator=generator) @ mixing.T
    stats.update(x, x)
    held = torch.randn(100, 32, generator=generator) @ mixing.T
    stats.hold(held, held)
    return torch.randn(24, 32, generator=generator), stats


def solve(w: Tensor, stats: Stats | None, name: str = "gptq") -> tuple[Solution, str, list[str]]:
    return recovery.solve(w, stats, FMT, name, {}, calibrated=True)


def assert_rounded(found: Solution, w: Tensor, stats: Stats | None) -> None:
    expected = SOLVERS["rtn"](w, stats, FMT)
    assert torch.equal(found.codes, expected.codes)
    assert found.grid.equals(expected.grid)


def test_nothing_is_noted_where_nothing_goes_wrong() -> None:
    w, stats = data()
    found, name, noted = solve(w, stats)
    assert (name, noted) == ("gptq", [])
    assert torch.equal(found.codes, SOLVERS["gptq"](w, stats, FMT).codes)


def test_a_matrix_that_no_token_reached_is_rounded() -> None:
    w, _ = data()
    found, name, noted = solve(w, None)
    assert (name, noted) == ("rtn", ["no calibration token came through it: rounded to nearest"])
    assert_rounded(found, w, None)


def test_sums_that_are_not_finite() -> None:
    w, stats = data()
    stats.hessian[3, 3] = torch.inf
    found, name, noted = solve(w, stats)
    assert (name, noted) == ("rtn", ["the squares of its inputs add up to infinity: rounded to nearest"])
    assert_rounded(found, w, None)


def test_a_solver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(w: Tensor, *args: Any, **options: Any) -> Solution:
        torch.linalg.cholesky(-torch.eye(2))
        raise AssertionError

    w, stats = data()
    monkeypatch.setitem(SOLVERS, "gptq", fail)
    found, name, noted = solve(w, stats)
    assert name == "rtn"
    assert len(noted) == 1
    assert noted[0].startswith("gptq failed (linalg.cholesky")
    assert_rounded(found, w, stats)


@pytest.mark.parametrize("damage", [1.0, float("nan")])
def test_a_solver_that_is_worse_than_rounding(damage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the solver says of itself does not count."""

    def worse(w: Tensor, stats: Stats, fmt: Any, **options: Any) -> Solution:
        solution = SOLVERS["rtn"](w, stats, fmt)
        scale = solution.grid.scale + damage
        return Solution(solution.codes, type(solution.grid)(scale, None, solution.grid.group), 0.0)

    w, stats = data()
    monkeypatch.setitem(SOLVERS, "hqq", worse)
    found, _, noted = solve(w, stats, "hqq")
    assert noted == ["hqq was worse than rounding to nearest on tokens held out: rounded to nearest"]
    assert_rounded(found, w, stats)


def test_the_own_solver_says_so_where_all_its_steps_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    w, stats = data()
    monkeypatch.setattr(gptq, "sweep", lambda w, felt, lattice: (torch.zeros_like(w, dtype=torch.uint8), w.clone()))
    monkeypatch.setattr(loops, "descend", lambda w, places, *args, **kwargs: (places, None))
    found, _, noted = solve(w, stats)
    assert noted == ["gptq was worse than rounding to nearest on tokens held out: rounded to nearest"]
    assert_rounded(found, w, stats)


def test_a_hessian_that_is_not_positive_definite() -> None:
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.04
    with recoveries() as noted:
        factor = algebra.robust_factor(hessian)
    assert noted == ["the Hessian is not positive definite: its diagonal was raised by 5%"]
    torch.testing.assert_close(factor @ factor.T, hessian + 0.05 * torch.eye(8), rtol=1e-4, atol=1e-4)
    hessian[0, 1] = hessian[1, 0] = 5.0
    with recoveries() as noted:
        factor = algebra.robust_factor(hessian)
    assert noted == ["the Hessian is not positive definite, however damped: errors are not spread"]
    assert torch.equal(factor, torch.eye(8))


@pytest.mark.parametrize(
    "case", ["dead inputs", "constant weights", "denormals", "huge outliers", "no inputs", "one row"]
)
def test_odd_numbers_have_finite_solutions(case: str) -> None:
    w, stats = data()
    if case == "dead inputs":
        stats = Stats.empty(32)
        x = torch.randn(100, 32)
        x[:, ::2] = 0
        stats.update(x, x)
    elif case == "constant weights":
        w = torch.full((24, 32), 0.37)
    elif case == "denormals":
        w = w * 1e-41
    elif case == "huge outliers":
        w[3, 5] = 1e30
    elif case == "no inputs":
        stats = Stats.empty(32)
        stats.update(torch.zeros(50, 32), torch.zeros(50, 32))
    else:
        w = w[:1]
    found, _, _ = solve(w, stats)
    decoded = FMT.decode(found.codes, found.grid)
    assert torch.isfinite(decoded).all()
    assert (decoded - w).norm() <= w.norm()


# ---- of a run


def spoilt(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """So many of the tokens of every linear's inputs hold an Inf."""
    inputs = calibration.Streams.inputs

    def spoil(self: Any, *args: Any) -> Any:
        x, carried = inputs(self, *args)
        assert x is not None
        x = x.clone()
        x.view(-1, x.shape[-1])[:tokens, 3] = torch.inf
        return x, carried

    monkeypatch.setattr(calibration.Streams, "inputs", spoil)


def test_tokens_that_are_not_finite_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=1)
    spoilt(monkeypatch, 1)  # of each of 2 batches of 128, and of one held out
    shown = Calibration("self", samples=9, length=64, batch=4)
    monkeypatch.setattr(calibration, "MAX_DROPPED", 0.02)
    manifest = quantize(model, tmp_path / "out", "int4:g16", calibration=shown)
    assert manifest["recoveries"] == [
        {"name": tensor["name"], "what": "3 calibration tokens were NaN or Inf, and were left out"}
        for tensor in manifest["tensors"]
    ]
    assert len(manifest["recoveries"]) == 7
    spoilt(monkeypatch, 100)
    with pytest.raises(DataError, match=r"q_proj.*NaN or Inf"):
        quantize(model, tmp_path / "never", "int4:g16", calibration=shown)


def test_a_block_that_overflows_in_float16_stops_the_run_with_a_remedy(
    tmp_path: Path,
) -> None:
    """Before anything is solved; and where nobody has looked at the whole model's predictions, in the next block."""
    model = make_checkpoint(tmp_path / "model", "llama", dtype=torch.float16)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].mul_(1e5).clamp_(-6e4, 6e4)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    save_file({"tokens": torch.randint(3, 300, (8, 32))}, tmp_path / "tokens.safetensors")
    shown = Calibration(str(tmp_path / "tokens.safetensors"), samples=8, batch=4)
    with pytest.raises(DataError, match=r"logits are not finite.*--dtype float32"):
        quantize(model, tmp_path / "out", "int4:g16", calibration=shown, dtype=torch.float16)
    unseen = replace(shown, curvature=0.0, check=False)
    with pytest.raises(DataError, match=r"model\.layers\.2\.self_attn\..*NaN or Inf.*--dtype float32"):
        quantize(model, tmp_path / "out", "int4:g16", calibration=unseen, dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    rounding = Recipe((Rule("*", "int4:g16", "rtn"),))
    manifest = quantize(model, tmp_path / "wide", rounding, calibration=unseen, dtype=torch.float32)
    assert all(tensor["dropped"] == 0 for tensor in manifest["tensors"])


def test_the_exit_code_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=2)

    def run(*arguments: str) -> tuple[int, str]:
        out = ["--output", str(tmp_path / "out"), "--overwrite", "--format", "int4:g16", "--samples", "8"]
        monkeypatch.setattr(sys, "argv", ["llmquant", "quantize", str(model), *out, "--length", "32", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    assert run()[0] == 0
    spoil = SOLVERS["gptq"]

    def fail(w: Tensor, *args: Any, **options: Any) -> Solution:
        if len(w) == 32:  # the keys and values
            torch.linalg.cholesky(-torch.eye(2))
        return spoil(w, *args, **options)

    monkeypatch.setitem(SOLVERS, "gptq", fail)
    code, said = run()
    assert code == 8
    assert "recovered: model.layers.*.self_attn.k_proj (2 of them): gptq failed" in " ".join(said.split())
    code, said = run("--json")
    summary = json.loads(said)
    assert (code, len(summary["recoveries"])) == (8, 4)
