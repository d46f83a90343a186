"""One product for all experts, in triton's interpreter, against a float64 product for each."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from architectures import make_checkpoint
from interpreter import INTERPRETED, everywhere
from test_kernels import BF16, F16, KINDS, Case, draw, draw_kind
from torch import Tensor

import llmquant
import llmquant_kernels as kernels
from llmquant import formats
from llmquant.linear import QuantLinear
from llmquant.recipe import Recipe, Rule
from llmquant_kernels import PackedWeight, TritonExperts

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.skipif(INTERPRETED, reason="these are the tests that run there")
def test_in_the_interpreter() -> None:
    interpreter.run_marked(__file__)


if INTERPRETED:
    interpreter.repair_bfloat16()
    interpreter.hurry()
    from llmquant_kernels import triton_ops
    from llmquant_kernels.triton_layout import Spec, tensors_of
    from llmquant_kernels.triton_settings import Device, Settings, legal

GEMV = ("gemv", 8, 32, 1, 4)
GEMM = ("gemm", 16, 64, 1, 4)
TOKENS = {  # of each expert
    "some": [3, 0, 5],
    "all to one": [0, 19, 0],
    "more than a tile": [17, 1, 18],
    "none": [0, 0, 0],
}


def apart(weight: PackedWeight, exact: Tensor, count: int) -> tuple[list[PackedWeight], Tensor]:
    """The rows of a weight as experts (count, rows, columns)."""
    rows = len(exact) // count
    return [weight.rows(torch.arange(e * rows, (e + 1) * rows)) for e in range(count)], exact.unflatten(0, (count, -1))


def check(weight: PackedWeight, exact: Tensor, dtype: torch.dtype, tokens: list[int], settings: Any) -> None:
    """With a bias, into a result full of NaN: the error is at most twice what dense weights of the type lose."""
    experts, exacts = apart(weight, exact, len(tokens))
    prepared = TritonExperts(experts, dtype)
    spec = Spec.of(prepared.spec)
    x = (torch.randn(sum(tokens) + 2, exact.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)
    bias = torch.randn(len(tokens), spec.rows, generator=torch.Generator().manual_seed(2)).to(dtype)
    ends = torch.tensor(tokens).cumsum(0, dtype=torch.int32)
    out = torch.full((len(x), spec.rows), torch.nan, dtype=dtype)
    one = legal(Settings(*settings, 2), spec, Device())  # type: ignore[call-arg]
    y = triton_ops.launch(x, tensors_of(prepared), bias, spec, one, out, ends)
    assert y[int(ends[-1]) :].isnan().all()  # of no expert
    start = 0
    for expert, end in enumerate(ends.tolist()):
        own = x[start:end]
        reference = own.double() @ exacts[expert].t() + bias[expert].double()
        dense = (own.float() @ exacts[expert].to(dtype).float().t() + bias[expert].float()).to(dtype)
        lost = (dense.double() - reference).norm()
        assert (y[start:end].double() - reference).norm() <= 2 * lost + 1e-7 * reference.norm(), (expert, spec)
        start = end


KIND_NAMES = sorted({*KINDS} - {f"signed{bits}" for bits in (1, 2, 3, 5, 6, 7)} - {"vsq3", "vsq5", "vsq6", "vsq7"})


@everywhere
@pytest.mark.parametrize(("name", "turn"), [(name, i % 2) for i, name in enumerate(KIND_NAMES)])
def test_every_kind(name: str, turn: int) -> None:
    weight, exact = draw_kind(KINDS[name], (3 * 17, 172))
    check(weight, exact, (F16, BF16)[turn], TOKENS["some"], (GEMV, GEMM)[turn])


@everywhere
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("settings", [GEMV, GEMM])
def test_tokens_however_they_are_shared_out(tokens: list[int], settings: Any) -> None:
    for case in (Case(4, (3 * 40, 300), 128, 8), Case(3, (3 * 16, 100), 25, "tensor", offset=True)):
        check(*draw(case), F16, tokens, settings)


@everywhere
def test_tables_and_scales_of_their_own() -> None:
    """Of a matrix as a whole, hence different for each expert."""
    drawn = [draw(Case(4, (20, 64), 32, 0, per="tensor", levels=True), seed) for seed in range(2)]
    prepared = TritonExperts([weight for weight, _ in drawn], F16)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).half()
    y = prepared.linear(x, torch.tensor([2, 5], dtype=torch.int32))
    for rows, (_, exact) in zip((x[:2], x[2:]), drawn, strict=True):
        found = y[:2] if len(rows) == 2 else y[2:]
        torch.testing.assert_close(found.double(), rows.double() @ exact.t(), rtol=1e-2, atol=2e-3)
    with pytest.raises(ValueError, match="different formats"):
        TritonExperts([drawn[0][0], draw(Case(4, (20, 96), 32))[0]], F16)
    with pytest.raises(TypeError, match=r"float16, not torch\.float32"):
        prepared.linear(x.float(), torch.tensor([2, 5], dtype=torch.int32))


@everywhere
def test_the_operator_keeps_torchs_rules() -> None:
    experts, _ = apart(*draw(Case(4, (2 * 16, 64), 32, 8)), 2)
    prepared = TritonExperts(experts, F16)
    x, ends = torch.randn(5, 64).half(), torch.tensor([2, 5], dtype=torch.int32)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (x, ends, tensors_of(prepared), torch.randn(2, 16).half(), prepared.spec)
    torch.library.opcheck(torch.ops.llmquant.triton_grouped.default, arguments, test_utils=checks)


@everywhere
@pytest.mark.parametrize(("name", "count"), [("gpt_oss", "num_local_experts"), ("qwen3_moe", "num_experts")])
def test_models_answer_as_with_each_expert_decoded(
    name: str, count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = {"num_hidden_layers": 1, count: 2, "num_experts_per_tok": 1}
    folder = make_checkpoint(tmp_path / "model", name, **small)
    recipe = Recipe((Rule("*.experts.*", "int4:g16"),))
    llmquant.quantize(folder, tmp_path / "out", format=recipe, quality="fast", verify=False, report=False)
    model: Any = llmquant.load(tmp_path / "out", dtype=F16)
    tokens = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    calls = []
    linear = TritonExperts.linear
    monkeypatch.setattr(TritonExperts, "linear", lambda self, *args: calls.append(args) or linear(self, *args))  # type: ignore[func-returns-value]
    with torch.no_grad():
        together = model(tokens).logits
        model.set_experts_implementation("eager")
        made = len(calls)
        decoded = model(tokens).logits
    assert made
    assert len(calls) == made
    torch.testing.assert_close(together, decoded, rtol=2e-2, atol=2e-2)
    assert any("one product for all experts" in line for line in str(llmquant.explain(model)).splitlines())


def test_experts_on_a_cpu_are_decoded_one_by_one() -> None:
    facts = draw(Case(4, (16, 64), 32, 8))[0].facts()
    for dtype, words in ((torch.float32, "float16 and bfloat16 only"), (F16, "runs on GPUs only")):
        if INTERPRETED and dtype == F16:
            continue
        assert words in str(TritonExperts.refuses(facts, dtype))
    assert kernels.choose(facts, F16)[0] != ("" if INTERPRETED else "triton")


@everywhere
@pytest.mark.parametrize("spec", ["int4:g16", "nf4:g64", "fp8_e4m3:channel", "int4:g40"])
def test_codes_are_held_once_and_saved_as_they_were(spec: str) -> None:
    fmt = formats.get(spec).stored_for(F16)
    layer = QuantLinear(fmt, 128, 32, bias=False, dtype=F16)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    codes, grid = fmt.quantize(weight)
    layer.load_state_dict(fmt.pack(codes, grid))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).half()
    y = layer(x)
    held = [name for name, value in layer._buffers.items() if value is not None and value.is_meta]
    assert held == ([] if spec == "int4:g40" else [name for name in ("weight", "weight_packed") if name in before])
    for again in (layer, copy.deepcopy(layer)):
        after = again.state_dict()
        assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)
        torch.testing.assert_close(again(x), y)
        torch.testing.assert_close(again.dequantize(), fmt.decode(codes, grid))
    layer.keep_decoded = True
    torch.testing.assert_close(layer(x), y, rtol=1e-2, atol=1e-2)
    layer.float()
    assert layer(x.float()).dtype == torch.float32
    other, other_grid = fmt.quantize(-weight)
    layer.load_state_dict(fmt.pack(other, other_grid))
    torch.testing.assert_close(layer.dequantize(), fmt.decode(other, other_grid))
