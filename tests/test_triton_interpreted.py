"""The Triton kernels in triton's interpreter, against float64: numerics without a GPU.

The interpreter is chosen when triton is imported, so these tests run in a process of their own, which the one test that
other processes see here starts. Products are judged by what a dense weight of the type of the activations loses.
"""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec
from typing import Any

import interpreter
import pytest
import torch
from interpreter import INTERPRETED, everywhere
from test_kernels import BF16, F16, F32, KINDS, Case, draw, draw_kind
from torch import Tensor

import llmquant_kernels as kernels
from llmquant_kernels import PackedWeight, Prepared

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.skipif(INTERPRETED, reason="these are the tests that run there")
def test_in_the_interpreter() -> None:
    interpreter.run_marked(__file__)


if INTERPRETED:
    interpreter.repair_bfloat16()
    interpreter.hurry()
    from llmquant_kernels import triton_ops
    from llmquant_kernels.triton_layout import Spec, tensors_of
    from llmquant_kernels.triton_settings import Device, Settings, heuristic, legal

GEMV = ("gemv", 8, 16, 1, 4)
GEMV_WIDE = ("gemv", 16, 32, 1, 8)
SKINNY = ("gemm", 16, 64, 1, 4)
SPLIT = ("gemm", 32, 128, 3, 4)
ROWS = (1, 2, 8, 16, 17, 31, 32, 33)


def multiply(
    prepared: Prepared, x: Tensor, settings: Any = None, bias: Tensor | None = None, scaled: bool = False
) -> Tensor:
    """With these settings or those of the heuristic, into a result full of NaN."""
    spec = Spec.of(prepared.spec)  # type: ignore[attr-defined]
    settings = heuristic(len(x), spec, Device()) if settings is None else Settings(*settings)
    settings = legal(settings._replace(stages=2, scaled=settings.scaled or scaled), spec, Device())
    out = torch.full((len(x), spec.rows), torch.nan, dtype=x.dtype)
    return triton_ops.launch(x, tensors_of(prepared), bias, spec, settings, out)


def check(weight: PackedWeight, exact: Tensor, dtype: torch.dtype, rows: int, settings: Any, **options: Any) -> None:
    prepared = kernels.prepare(weight, dtype=dtype)
    assert prepared.name == "triton"
    # Activations that are not centred punish errors that columns share.
    x = (torch.randn(rows, exact.shape[1], generator=torch.Generator().manual_seed(rows)) + 0.5).to(dtype)
    y = multiply(prepared, x, settings, **options)
    reference = x.double() @ exact.t()
    dense = (x.float() @ exact.to(dtype).float().t()).to(dtype)
    lost = (dense.double() - reference).norm()
    assert (y.double() - reference).norm() <= 2 * lost + 1e-7 * reference.norm(), (prepared.spec, settings)  # type: ignore[attr-defined]


# Kinds whose codes or scales other ones, or integers below, have too.
SAME = {f"signed{bits}" for bits in (1, 2, 3, 5, 6, 7)}
SAME |= {"vsq3", "vsq5", "vsq6", "vsq7", "kmeans1", "kmeans2", "nf4_fp16"}


@everywhere
@pytest.mark.parametrize(("name", "turn"), [(name, i % 2) for i, name in enumerate(sorted({*KINDS} - SAME))])
def test_every_kind(name: str, turn: int) -> None:
    weight, exact = draw_kind(KINDS[name], (17, 172))
    first, second = (F16, BF16) if turn else (BF16, F16)
    for dtype in (first, second):
        decoded = kernels.prepare(weight, dtype=dtype).decode()  # type: ignore[attr-defined]
        assert torch.equal(decoded, kernels.decode(weight, dtype)) or not exact.to(dtype).isfinite().all(), dtype
    check(weight, exact, first, 3, GEMV_WIDE)
    check(weight, exact, second, 17, SKINNY)


INTEGERS = [
    Case(4, (48, 1024), 128, 8),
    Case(4, (40, 1000), 128, "tensor", scale=BF16),
    Case(4, (33, 520), 64, "row", scale=F32),
    Case(4, (33, 200), 10**9, 8),
    Case(4, (33, 200), 10**9, "tensor", scale=BF16),
    Case(4, (17, 300), 256, 5, per="tensor"),
    Case(3, (40, 520), 512, "tensor", offset=True),
    Case(8, (48, 776), 128, "tensor", scale=BF16),
    *(Case(bits, (17, 100), 25, "tensor", offset=True) for bits in range(1, 9)),
    *(Case(bits, (33, 172), 32, 2 ** (bits - 1)) for bits in range(1, 9)),
    *(Case(bits, (5, 33), 16, 0, per="tensor", levels=True) for bits in (1, 3, 4, 8)),
    Case(4, (3, 7), 2, 8),
    Case(8, (1, 1), 1, 0),
]


@everywhere
@pytest.mark.parametrize("case", INTEGERS, ids=str)
def test_integers_of_any_shape(case: Case) -> None:
    weight, exact = draw(case)
    decoded = kernels.prepare(weight, dtype=F16).decode()  # type: ignore[attr-defined]
    if case.offset:
        assert torch.allclose(decoded.double(), exact, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(decoded, kernels.decode(weight, F16))
    check(weight, exact, BF16, 1, GEMV)
    check(weight, exact, F16, 16, SPLIT, scaled=case.bits % 2 == 0)


@everywhere
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_numbers_of_rows(rows: int, dtype: torch.dtype) -> None:
    """With the settings that the heuristic gives, and a bias."""
    weight, exact = draw(Case(4, (80, 776), 128, 8, scale=dtype))
    check(weight, exact, dtype, rows, None)
    bias = torch.randn(80).to(dtype)
    prepared = kernels.prepare(weight, dtype=dtype)
    x = torch.randn(rows, 776).to(dtype)
    exactly = x.double() @ exact.t() + bias.double()
    assert torch.allclose(multiply(prepared, x, bias=bias).double(), exactly, rtol=2e-2, atol=5e-2)
    assert torch.equal(kernels.linear(x, prepared, bias), multiply(prepared, x, bias=bias))


@everywhere
def test_shapes_and_strides_of_activations() -> None:
    weight, exact = draw(Case(4, (48, 300), 60, "tensor", offset=True))
    prepared = kernels.prepare(weight, dtype=F16)
    bias = torch.randn(48).half()
    base = torch.randn(2, 3, 600).half()
    for x in (base[..., :300], base[..., ::2], base[:, 1, 300:], base[0, 0, :300], base[:0, :, :300]):
        y = kernels.linear(x, prepared, bias)
        assert y.shape == (*x.shape[:-1], 48)
        assert torch.allclose(y.double(), x.double() @ exact.t() + bias.double(), rtol=2e-2, atol=5e-2)
    with pytest.raises(RuntimeError):
        kernels.linear(base[..., :299], prepared)
    with pytest.raises(TypeError):
        kernels.linear(base[..., :300].float(), prepared)


@everywhere
def test_the_same_twice_and_nothing_else_written() -> None:
    weight, _ = draw(Case(4, (33, 520), 128, 8))
    prepared = kernels.prepare(weight, dtype=F16)
    x = torch.randn(9, 520).half()
    for settings in (GEMV_WIDE, SPLIT):
        assert torch.equal(multiply(prepared, x, settings), multiply(prepared, x, settings))
        storage = torch.full((9 * 33 + 64,), torch.nan, dtype=F16)
        spec = Spec.of(prepared.spec)  # type: ignore[attr-defined]
        out = storage[32:-32].view(9, 33)
        triton_ops.launch(x, tensors_of(prepared), None, spec, legal(Settings(*settings), spec, Device()), out)
        assert out.isfinite().all()
        assert storage[:32].isnan().all()
        assert storage[-32:].isnan().all()


@everywhere
def test_the_bench_checks_and_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the clock, which needs a GPU."""
    import bench_gpu

    def seconds(calls: list[Any]) -> float:
        assert all(call().isfinite().all() for call in calls[:1])
        return 1e-6

    monkeypatch.setattr(bench_gpu, "graph_seconds", seconds)
    args = Namespace(dtype="float16", device="cpu")
    subject = bench_gpu.Subject(args, "mxfp4", (32, 64))
    case = bench_gpu.Case("mxfp4", (32, 64), 2)
    record = bench_gpu.measure(subject, case, 1e12)
    assert record["bytes"] == subject.weight_bytes + 2 * 2 * (64 + 32)
    assert record["share"] == pytest.approx(record["bytes"] / 1e-6 / 1e12)
    assert record["others"]["cublas"] == pytest.approx(1.0)
    assert record["errors_of_others"]["cublas"] < 1e-3
    assert record["others"]["tinygemm"] == "skipped: has no mxfp4"
    assert all(isinstance(said, float) or said.startswith("skipped: ") for said in record["others"].values())
    settings = [heuristic(2, subject.spec, Device()), Settings("gemv", 8, 32, warps=2)]
    monkeypatch.setattr(bench_gpu, "candidates", lambda *_: iter(settings))
    assert bench_gpu.tune(subject, case)["settings"] in [one._asdict() for one in settings]
    subject.exact += 1
    with pytest.raises(ValueError, match="error"):
        bench_gpu.check(subject, subject.activations(2), settings[0])


class Layer(torch.nn.Module):
    def __init__(self, prepared: Prepared, bias: Tensor | None) -> None:
        super().__init__()
        self.prepared, self.bias = prepared, bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(kernels.linear(x, self.prepared, self.bias))


@everywhere
@pytest.mark.parametrize("case", [Case(4, (16, 64), 32, 8), Case(3, (17, 40), 20, "tensor", offset=True)], ids=str)
def test_the_operators_keep_torchs_rules(case: Case) -> None:
    prepared: Any = kernels.prepare(draw(case)[0], dtype=F16)
    x, bias = torch.randn(2, 3, case.shape[1]).half(), torch.randn(case.shape[0]).half()
    # Without its test of autograd: none of what is passed asks for gradients.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for arguments in ((x, tensors_of(prepared), bias), (x[0, 0], tensors_of(prepared), None)):
        torch.library.opcheck(torch.ops.llmquant.triton_linear.default, (*arguments, prepared.spec), test_utils=checks)
    decoding = (tensors_of(prepared), prepared.spec, F16, True)
    torch.library.opcheck(torch.ops.llmquant.triton_dequantize.default, decoding, test_utils=checks)


@everywhere
def test_compiled_and_exported_in_one_graph() -> None:
    case = Case(4, (16, 64), 32, 8)
    layer = Layer(kernels.prepare(draw(case)[0], dtype=F16), torch.randn(16).half())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 64), (5, 64), (2, 3, 64)):
        x = torch.randn(shape).half()
        assert torch.equal(compiled(x), layer(x))
    x = torch.randn(4, 64).half()
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert names == ["llmquant.triton_linear.default", "aten.relu.default"]
    y = torch.randn(7, 64).half()
    assert torch.equal(exported.module()(y), layer(y))


@everywhere
@pytest.mark.parametrize("name", sorted({*KINDS} - SAME))
def test_codes_come_back_as_they_were_packed(name: str) -> None:
    """Bit for bit: so the file's order of them need not stay in memory."""
    weight, _ = draw_kind(KINDS[name], (37, 160))
    again = kernels.prepare(weight, dtype=F16).packed()
    assert (again is None) == (weight.micro is not None)
    if again is not None:
        assert again.dtype == weight.packed.dtype
        assert torch.equal(again, weight.packed) or name == "few_levels"
    for case in (Case(3, (20, 60), 20, 4, spare=2), Case(5, (16, 40), 25, "tensor", offset=True)):
        weight = draw(case)[0]
        assert torch.equal(kernels.prepare(weight, dtype=F16).packed(), weight.packed)  # type: ignore[arg-type]
