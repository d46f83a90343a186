"""Kernels against an independent float64 reference: weights are built from their codes here, not by the package."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import llmquant.formats  # noqa: F401  (brings the loops of cpu_compiled)
import llmquant_kernels as kernels
from llmquant_kernels import Facts, PackedWeight
from llmquant_kernels.cpu_compiled import product

# Around those that loops take at a time, and those from which on others serve.
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 49, 64, 129)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Case:
    """How to draw a weight. `zero`: an int, "tensor" or "row" (one for all rows); `per` "tensor": one scale row."""

    bits: int
    shape: tuple[int, int]
    group: int
    zero: int | str = 0
    per: str = "group"
    offset: bool = False
    levels: bool = False
    scale: torch.dtype = F16
    spare: int = 0  # words of padding at the end of each row

    def __str__(self) -> str:
        flags = ["offset"] * self.offset + ["levels"] * self.levels + ["spare"] * bool(self.spare)
        shape = f"{self.shape[0]}x{self.shape[1]}"
        return "-".join([f"b{self.bits}", shape, f"g{self.group}", f"z{self.zero}", self.per, *flags])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pack(codes: np.ndarray, bits: int, spare: int) -> Tensor:
    """LSB-first bit stream per row, one bit at a time."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32) + spare
    stream = np.zeros((rows, words * 32), dtype=np.uint64)
    for c in range(columns):
        for i in range(bits):
            stream[:, c * bits + i] = codes[:, c] >> i & 1
    values = (stream.reshape(rows, words, 32) << np.arange(32, dtype=np.uint64)).sum(-1)
    return torch.from_numpy(values.astype(np.uint32).view(np.int32))


def draw(case: Case, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    """A weight and what it stands for, (out, in) float64."""
    rng = np.random.default_rng(seed)
    rows, columns = case.shape
    groups = -(-columns // case.group)
    grid = (1 if case.per == "tensor" else rows, groups)
    codes = rng.integers(0, 2**case.bits, case.shape)
    scale = torch.from_numpy(rng.normal(size=grid) * 0.02).to(case.scale)
    offset = torch.from_numpy(rng.normal(size=grid) * 0.05).to(case.scale) if case.offset else None
    levels = torch.from_numpy(rng.normal(size=2**case.bits)).float() if case.levels else None
    zero: Tensor | int
    if isinstance(case.zero, str):
        zero_rows = 1 if case.zero == "row" else rows
        zero = torch.from_numpy(rng.integers(0, 2**case.bits, (zero_rows, groups)).astype(np.uint8))
    else:
        zero = case.zero
    weight = PackedWeight(
        pack(codes, case.bits, case.spare), case.bits, case.shape, case.group, scale, zero, offset, levels
    )
    exact = np.empty(case.shape)
    for c in range(columns):
        g = c // case.group
        level = codes[:, c] if levels is None else levels.double().numpy()[codes[:, c]]
        shift = zero[:, g].numpy().astype(np.int64) if isinstance(zero, Tensor) else zero
        exact[:, c] = (level - shift) * scale[:, g].double().numpy()
        if offset is not None:
            exact[:, c] += offset[:, g].double().numpy()
    return weight, torch.from_numpy(exact)


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


CASES = [
    # what the operators for few rows take
    Case(4, (64, 256), 128, 8),
    Case(4, (48, 256), 32, 8, scale=BF16),
    Case(4, (64, 256), 64, 7),
    Case(4, (64, 256), 128, "tensor"),
    Case(4, (64, 256), 128, "row", scale=F32),
    Case(4, (64, 384), 384, 8),
    Case(4, (64, 192), 96, 8),
    Case(4, (64, 160), 10**9, "tensor"),
    Case(4, (32, 128), 128, 0, offset=True),
    Case(4, (32, 128), 128, 8, per="tensor", spare=5),
    Case(4, (1024, 64), 64, 8),
    Case(3, (64, 256), 64, 4),
    Case(3, (64, 256), 64, "tensor", offset=True),
    Case(2, (64, 256), 64, 2),
    Case(2, (64, 256), 128, 1),
    Case(1, (64, 256), 64, 0, offset=True),
    Case(8, (64, 256), 256, 128),
    Case(8, (33, 80), 80, 128, per="tensor"),
    Case(5, (17, 48), 48, 16),
    Case(8, (64, 256), 64, 128),
    Case(8, (64, 256), 128, "tensor"),
    Case(8, (64, 256), 256, "tensor"),
    Case(7, (64, 256), 64, 64),
    Case(6, (64, 256), 64, 32),
    Case(5, (64, 256), 64, "tensor"),
    Case(8, (64, 256), 64, 0, offset=True),
    # what only decoding takes: ragged rows and groups, tables of levels
    *(Case(bits, (33, 172), 32, 2 ** (bits - 1), spare=bits % 3) for bits in range(1, 9)),
    *(Case(bits, (17, 100), 25, "tensor", offset=True) for bits in range(1, 9)),
    *(Case(bits, (5, 33), 33, 0, per="tensor", levels=True) for bits in range(1, 9)),
    *(Case(bits, (32, 128), 32, 0, levels=True) for bits in range(1, 9)),
    *(Case(bits, (24, 96), 24, "tensor", spare=3) for bits in range(1, 9)),
    Case(4, (3, 7), 2, 8),
    Case(8, (1, 1), 1, 0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("keep_decoded", [False, True])
def test_linear_is_as_accurate_as_dense_bfloat16(case: Case, keep_decoded: bool) -> None:
    weight, exact = draw(case)
    check_linear(weight, exact, ROWS, keep_decoded)


def check_linear(weight: PackedWeight, exact: Tensor, numbers_of_rows: tuple[int, ...], keep_decoded: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    # Activations that are not centred punish errors that the columns of a group share.
    x = torch.randn(max(numbers_of_rows), exact.shape[1], generator=generator) + 0.5
    dense = functional.linear(x.to(BF16), exact.to(BF16)).double() - x.to(BF16).double() @ exact.t()
    for dtype in (BF16, F16, F32):
        prepared = kernels.prepare(weight, dtype=dtype, keep_decoded=keep_decoded)
        error = []
        for rows in numbers_of_rows:
            y = kernels.linear(x[:rows].to(dtype), prepared)
            assert y.dtype == dtype
            assert y.shape == (rows, exact.shape[0])
            error.append(rms(y.double() - x[:rows].to(dtype).double() @ exact.t()))
        allowed = {BF16: 2.0, F16: 0.5, F32: 1e-3}[dtype] * rms(dense)
        assert max(error[2:]) <= allowed + 1e-12, (prepared.name, error, allowed)
        # One or two rows are few values to average over.
        assert max(error) <= 2 * allowed + 1e-12, (prepared.name, error, allowed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_rounds_once(case: Case) -> None:
    weight, exact = draw(case)
    assert torch.allclose(kernels.decode(weight, F32).double(), exact, rtol=1e-6, atol=1e-7)
    for dtype in (BF16, F16):
        assert torch.equal(kernels.decode(weight, dtype), kernels.decode(weight, F32).to(dtype))


@pytest.mark.parametrize("case", [case for case in CASES if case.scale != F32 and not case.offset], ids=str)
def test_backends_decode_to_the_same_bits(case: Case) -> None:
    """With 16-bit scales every product is exact in float32, so there is only one right answer."""
    weight, _ = draw(case)
    for dtype in (BF16, F16, F32):
        prepared = kernels.prepare(weight, dtype=dtype, keep_decoded=True)
        assert torch.equal(prepared.decoded, kernels.decode(weight, dtype))  # type: ignore[attr-defined]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(4, (64, 1024), 32, "tensor"),
        Case(4, (64, 1024), 32, 3, scale=BF16),
        Case(4, (64, 1024), 128, 0, offset=True, scale=F32),
        Case(2, (64, 1024), 128, 1),
        Case(6, (64, 1024), 32, 32),
        Case(8, (64, 1024), 32, "tensor"),
        Case(8, (64, 1024), 1024, 128),
    ],
    ids=str,
)
def test_activations_that_add_up_shared_errors(case: Case, positive: bool) -> None:
    weight, exact = draw(case)
    x = torch.rand(8, 1024) if positive else (torch.rand(8, 32) - 0.5).repeat_interleave(32, dim=1)
    x = x.to(BF16)
    allowed = 2 * rms(functional.linear(x, exact.to(BF16)).double() - x.double() @ exact.t())
    assert rms(kernels.linear(x, kernels.prepare(weight, dtype=BF16)).double() - x.double() @ exact.t()) <= allowed


@pytest.mark.parametrize("mean", [0, 1, 10])
@pytest.mark.parametrize("group", [64, 1024])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_centred_weights_and_uncentred_activations(bits: int, symmetric: bool, group: int, mean: int) -> None:
    """As in a model: the results are small beside the sum of what goes in, and any error of one sign is not."""
    w = torch.randn(64, 1024 // group, group, dtype=torch.float64)
    high, low, top = w.amax(-1), w.amin(-1), 2**bits - 1
    scale = ((w.abs().amax(-1) * 2 if symmetric else high - low) / top).half()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)
    codes = ((w / scale[..., None]).round() + zeros[..., None]).clamp(0, top)
    exact = ((codes - zeros[..., None]) * scale[..., None].double()).view(64, 1024)
    packed = pack(codes.view(64, 1024).long().numpy(), bits, 0)
    zero = 2 ** (bits - 1) if symmetric else zeros.to(torch.uint8)
    prepared = kernels.prepare(PackedWeight(packed, bits, (64, 1024), group, scale, zero), dtype=BF16)
    x = (torch.randn(12, 1024) + mean).to(BF16)
    allowed = 2 * rms(functional.linear(x, exact.to(BF16)).double() - x.double() @ exact.t())
    assert rms(kernels.linear(x, prepared).double() - x.double() @ exact.t()) <= allowed


@pytest.mark.parametrize("bits", range(1, 9))
def test_decode_is_exact_where_float32_is(bits: int) -> None:
    case = Case(bits, (9, 77), 16, "tensor")
    weight, _ = draw(case)
    weight = PackedWeight(weight.packed, bits, case.shape, 16, torch.full_like(weight.scale, -0.5), weight.zero)
    codes = kernels.decode(PackedWeight(weight.packed, bits, case.shape, 16, torch.ones_like(weight.scale)), F32)
    rng = np.random.default_rng(0)
    assert np.array_equal(codes.numpy(), rng.integers(0, 2**bits, case.shape))
    assert isinstance(weight.zero, Tensor)
    zeros = weight.zero.repeat_interleave(16, dim=1)[:, :77].float()
    assert torch.equal(kernels.decode(weight, F32), (codes - zeros) * -0.5)


KINDS_OF_CODES = {
    "integers": Case(4, (64, 256), 128, 8),
    "row": Case(8, (64, 256), 256, 128),
    "levels": Case(4, (64, 256), 128, 8, levels=True),
}


def test_backends_in_the_order_they_are_asked() -> None:
    assert [backend.name for backend in kernels.BACKENDS] == ["triton", "cpu_compiled", "reference"]


@pytest.mark.parametrize("name", KINDS_OF_CODES)
def test_shapes_of_activations(name: str) -> None:
    weight, exact = draw(KINDS_OF_CODES[name])
    prepared = kernels.prepare(weight, dtype=BF16)
    bias = torch.randn(64).to(BF16)
    base = torch.randn(3, 12, 256).to(BF16)
    for x in (
        base,
        base[:1, :1],
        base[0, 0],
        base[0, :0],
        base[:, :0],
        base.transpose(0, 1),
        base[:, ::5],
        base.repeat(1, 1, 2)[..., ::2][:, :3],
    ):
        y = kernels.linear(x, prepared, bias)
        assert y.shape == (*x.shape[:-1], 64)
        expected = x.double() @ exact.t() + bias.double()
        assert torch.allclose(y.double(), expected, rtol=0.02, atol=0.05 * exact.square().mean().sqrt().item() * 16)
    assert torch.equal(kernels.linear(base[0], prepared), kernels.linear(base, prepared)[0])


@pytest.mark.parametrize("name", KINDS_OF_CODES)
def test_what_is_passed_stays_unchanged(name: str) -> None:
    weight, _ = draw(KINDS_OF_CODES[name])
    x, bias = torch.randn(2, 256).to(BF16), torch.randn(64).to(BF16)
    kept = [t.clone() for t in (x, bias, weight.packed, weight.scale)]
    prepared = kernels.prepare(weight, dtype=BF16)
    first = kernels.linear(x, prepared, bias)
    assert torch.equal(first, kernels.linear(x, prepared, bias))
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, bias, weight.packed, weight.scale), strict=True))


@pytest.mark.parametrize("name", KINDS_OF_CODES)
@pytest.mark.parametrize("rows", [1, 40])
def test_wrong_activations_are_refused(name: str, rows: int) -> None:
    prepared = kernels.prepare(draw(KINDS_OF_CODES[name])[0], dtype=BF16)
    with pytest.raises(TypeError, match=r"prepared for activations of torch\.bfloat16, not torch\.float32"):
        kernels.linear(torch.zeros(rows, 256), prepared)
    for shape in ((rows, 128), (rows, 512), (rows, 2, 128), (2, rows, 512), (512,)):
        with pytest.raises(RuntimeError):
            kernels.linear(torch.zeros(shape, dtype=BF16), prepared)


def test_codes_at_the_zero_point_give_exact_zeros() -> None:
    for bits, group in ((4, 64), (8, 64), (8, 256), (3, 64)):
        zero = 2 ** (bits - 1)
        packed = pack(np.full((32, 256), zero), bits, 0)
        scale = torch.randn(32, 256 // group).half()
        prepared = kernels.prepare(PackedWeight(packed, bits, (32, 256), group, scale, zero), dtype=BF16)
        for rows in (1, 40):
            assert not kernels.linear(torch.randn(rows, 256).to(BF16), prepared).any()


def test_keep_decoded_is_used_and_counted() -> None:
    weight, exact = draw(KINDS_OF_CODES["integers"])
    x = torch.randn(129, 256).to(BF16)
    lean, kept = (kernels.prepare(weight, dtype=BF16, keep_decoded=keep) for keep in (False, True))
    assert kept.nbytes == lean.nbytes + 64 * 256 * 2
    assert torch.equal(kernels.linear(x, kept), functional.linear(x, exact.to(BF16)))
    assert torch.allclose(kernels.linear(x, lean), kernels.linear(x, kept), rtol=0.02, atol=0.02)


def test_the_compiled_loops_copy_no_codes() -> None:
    weight, _ = draw(KINDS_OF_CODES["levels"])
    prepared = kernels.prepare(weight, dtype=BF16)
    assert prepared.name == "cpu_compiled"
    assert prepared.nbytes < weight.packed.nbytes / 10


def test_without_compiled_loops_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant_kernels.cpu_compiled._where", [])
    weight, exact = draw(KINDS_OF_CODES["integers"])
    assert kernels.explain(weight, F32).splitlines()[0] == "reference: chosen"
    assert "cpu_compiled: refused, its compiled loops are not there" in kernels.explain(weight, BF16)
    x = torch.randn(3, 256)
    y = kernels.linear(x, kernels.prepare(weight, dtype=F32))
    assert torch.allclose(y.double(), x.double() @ exact.t(), atol=1e-5)


@pytest.mark.parametrize("name", ["integers", "levels"])
def test_products_are_traced(name: str) -> None:
    """By torch.compile without a break of the graph, and by torch.export, for any number of rows."""
    weight, _ = draw(KINDS_OF_CODES[name])
    prepared, bias = kernels.prepare(weight, dtype=BF16), torch.randn(64).to(BF16)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kernels.linear(x, prepared, bias)

    x = torch.randn(40, 256).to(BF16)
    exported = torch.export.export(Module(), (x[:2],)).module()
    compiled = torch.compile(Module(), backend="eager", fullgraph=True)
    for rows in (2, 40):
        assert torch.equal(compiled(x[:rows]), kernels.linear(x[:rows], prepared, bias))
    assert torch.equal(exported(x[:2]), kernels.linear(x[:2], prepared, bias))


def test_the_operator_keeps_the_rules_of_torch() -> None:
    weight, _ = draw(KINDS_OF_CODES["levels"])
    prepared: Any = kernels.prepare(weight, dtype=BF16)
    for x in (torch.randn(3, 256).to(BF16), torch.randn(2, 40, 256).to(BF16)):
        for bias in (None, torch.randn(64).to(BF16)):
            torch.library.opcheck(product, (x, bias, prepared.tensors, prepared.numbers, 256))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant.cpu.LEAST_WORK", 1)
    weight, _ = draw(Case(3, (70, 264), 24, 4))
    x = torch.randn(5, 264)
    prepared = kernels.prepare(weight, dtype=F32)
    expected, before = kernels.linear(x, prepared), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(kernels.linear(x, prepared), expected)
        assert torch.equal(kernels.prepare(weight, dtype=F32, keep_decoded=True).decoded, kernels.decode(weight, F32))  # type: ignore[attr-defined]
    finally:
        torch.set_num_threads(before)


def test_many_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant_kernels.cpu_compiled.BLOCK", 16 * 128)
    weight, exact = draw(Case(4, (72, 128), 32, "tensor", scale=F32))
    x, bias = torch.randn(40, 128), torch.randn(72)
    prepared = kernels.prepare(weight, dtype=F32)
    assert torch.allclose(kernels.linear(x, prepared, bias).double(), x.double() @ exact.t() + bias, atol=1e-4)
    kept = kernels.prepare(weight, dtype=F32, keep_decoded=True)
    assert torch.allclose(kernels.linear(x, kept, bias).double(), x.double() @ exact.t() + bias, atol=1e-4)


# ---- every kind of number, built from codes by numpy


def floats(exponent: int, mantissa: int, bias: int) -> np.ndarray:
    """What the codes sign | exponent | mantissa of so many bits stand for, no special values, float64."""
    code = np.arange(2 ** (1 + exponent + mantissa))
    e, m = code >> mantissa & 2**exponent - 1, code & 2**mantissa - 1
    size = np.where(e == 0, np.ldexp(m, 1 - bias - mantissa), np.ldexp(2**mantissa + m, e - bias - mantissa))
    return np.where(code >> (exponent + mantissa), -size, size)


def sign_magnitude(bits: int) -> np.ndarray:
    code = np.arange(2**bits)
    size = (code & 2 ** (bits - 1) - 1).astype(np.float64)
    return np.where(code >> (bits - 1), -size, size)


E2M1, E2M3, E3M2, E4M3, E5M2 = floats(2, 1, 1), floats(2, 3, 1), floats(3, 2, 3), floats(4, 3, 7), floats(5, 2, 15)
E4M3[[0x7F, 0xFF]] = np.nan
E5M2[[0x7C, 0xFC]] = [np.inf, -np.inf]
E5M2[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
NF4 = np.sort(np.random.default_rng(1).normal(size=16)).astype(np.float32).astype(np.float64)


@dataclass
class Kind:
    """A way to write numbers. scale and outer: their dtype and the shape of their grid, "group", "row" or "tensor"."""

    bits: int
    group: int
    scale: torch.dtype = F32
    per: str = "group"
    levels: np.ndarray | None = None  # a table
    tables: torch.dtype | None = None  # a drawn table for each row, of this dtype
    outer: str | None = None  # float32
    outer_value: float | None = None
    zero: int = 0
    offset: bool = False
    micro: bool = False
    signed: bool = False
    trits: bool = False
    words: bool = False


E8M0, F8 = torch.float8_e8m0fnu, torch.float8_e4m3fn
KINDS = {
    "mxfp4": Kind(4, 32, E8M0, levels=E2M1),
    "mxfp6_e2m3": Kind(6, 32, E8M0, levels=E2M3),
    "mxfp6_e3m2": Kind(6, 32, E8M0, levels=E3M2),
    "mxfp8_e4m3": Kind(8, 32, E8M0, levels=E4M3),
    "mxfp8_e5m2": Kind(8, 32, E8M0, levels=E5M2),
    "mxint8": Kind(8, 32, E8M0, outer="tensor", outer_value=1 / 64, signed=True),
    "mxint8_row": Kind(8, 10**9, E8M0, outer="tensor", outer_value=1 / 64, signed=True),
    "nvfp4": Kind(4, 16, F8, levels=E2M1, outer="tensor"),
    "mx9": Kind(8, 16, E8M0, levels=sign_magnitude(8), outer="tensor", outer_value=2**-6, micro=True),
    "mx6": Kind(5, 16, E8M0, levels=sign_magnitude(5), outer="tensor", outer_value=2**-3, micro=True),
    "mx9_one_zero": Kind(8, 16, E8M0, levels=sign_magnitude(8) + 0.0, outer="tensor", outer_value=2**-6, micro=True),
    "mx6_one_zero": Kind(5, 16, E8M0, levels=sign_magnitude(5) + 0.0, outer="tensor", outer_value=2**-3, micro=True),
    "mx4": Kind(3, 16, E8M0, levels=sign_magnitude(3), outer="tensor", outer_value=2**-1, micro=True),
    **{f"vsq{bits}": Kind(bits, 16, torch.uint8, outer="row", zero=2 ** (bits - 1)) for bits in range(3, 9)},
    "vsq4_g32": Kind(4, 32, torch.uint8, outer="row", zero=8),
    "fp8_tensor": Kind(8, 10**9, per="tensor", levels=E4M3),
    "fp8_row": Kind(8, 10**9, levels=E4M3),
    "fp8_g128": Kind(8, 128, levels=E5M2),
    "e2m1_row": Kind(4, 10**9, F16, levels=E2M1),
    "nf4": Kind(4, 64, F32, levels=NF4, words=True),
    "nf4_fp16": Kind(4, 64, F16, levels=NF4),
    "nf4_bf16": Kind(4, 64, BF16, levels=NF4),
    "few_levels": Kind(2, 64, F16, levels=np.array([-4.0, -0.5, 0.5, 1.5])),
    **{f"kmeans{bits}": Kind(bits, 10**9, per="one", tables=F16) for bits in (1, 2, 3, 4, 5, 8)},
    "kmeans4_fp32": Kind(4, 10**9, F16, tables=F32, words=True),
    "kmeans4_g64": Kind(4, 64, F16, tables=BF16),
    "ternary": Kind(2, 128, F16, zero=1, trits=True),
    "ternary_g16": Kind(2, 16, F16, zero=1, trits=True),
    "ternary_row": Kind(2, 10**9, BF16, zero=1, trits=True),
    "binary": Kind(1, 128, F16, offset=True),
    "e8m0_offset": Kind(4, 32, E8M0, offset=True),
    "e2m1_zero": Kind(4, 64, F16, levels=E2M1, zero=1),
    "signed4_zero": Kind(4, 64, F16, zero=-3, signed=True),
    "signed7_row": Kind(7, 10**9, F16, zero=5, signed=True),
    **{f"signed{bits}": Kind(bits, 64, F16, signed=True) for bits in range(1, 5)},
    **{f"signed{bits}": Kind(bits, 64, F16, signed=True) for bits in range(5, 9)},
}
SHAPES = ((64, 256), (16, 160), (33, 172), (5, 35), (1, 50), (17, 1), (1, 1))


def pack_bytes(codes: np.ndarray, bits: int, spare: int) -> Tensor:
    words = pack(codes, bits, 0).view(torch.uint8)[:, : -(-codes.shape[1] * bits // 8)]
    return functional.pad(words, (0, spare), value=0xA5)


def pack_trits(codes: np.ndarray) -> Tensor:
    fives = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 5))).reshape(len(codes), -1, 5)
    return torch.from_numpy((fives * 3 ** np.arange(5)).sum(-1).astype(np.uint8))


def draw_scale(kind: Kind, shape: tuple[int, int], reach: float, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """A scale for levels up to `reach` and its value, float64."""
    if kind.per == "one":
        return torch.ones(1, 1), np.ones((1, 1))
    if kind.scale == E8M0:
        byte = rng.integers(120, 127, shape) - int(np.log2(reach))
        return torch.from_numpy(byte.astype(np.uint8)).view(E8M0), np.exp2(byte - 127.0)
    if kind.scale == torch.uint8:
        integer = rng.integers(0, 64, shape)
        return torch.from_numpy(integer.astype(np.uint8)), integer.astype(np.float64)
    if kind.scale == F8:
        byte = rng.integers(0, 0x7F, shape)
        return torch.from_numpy(byte.astype(np.uint8)).view(F8), E4M3[byte]
    scale = torch.from_numpy(rng.normal(size=shape) / reach).to(kind.scale)
    return scale, scale.double().numpy()


def draw_kind(kind: Kind, shape: tuple[int, int], spare: int = 0) -> tuple[PackedWeight, Tensor]:
    """A weight of the kind and what it stands for, (out, in) float64. Finite numbers only."""
    rng = np.random.default_rng(0)
    rows, columns = shape
    groups = -(-columns // kind.group)
    c = np.arange(columns)
    legal = np.flatnonzero(np.isfinite(kind.levels)) if kind.levels is not None else np.arange(2**kind.bits)
    codes = rng.choice(legal[: 3 if kind.trits else None], shape)
    level = codes.astype(np.float64)
    levels: Tensor | None = None
    if kind.signed:
        level -= np.where(codes >= 2 ** (kind.bits - 1), 2**kind.bits, 0)
    elif kind.levels is not None:
        levels, level = torch.from_numpy(kind.levels).float(), kind.levels[codes]
    elif kind.tables is not None:
        levels = torch.from_numpy(rng.normal(size=(rows, 2**kind.bits))).to(kind.tables)
        level = np.take_along_axis(levels.double().numpy(), codes, axis=1)
    scale, factor = draw_scale(
        kind, (1 if kind.per in ("tensor", "one") else rows, groups), np.abs(level).max() + 1, rng
    )
    outer: Tensor | None = None
    if kind.outer is not None:
        value = np.exp2(rng.uniform(-8, -4, (rows if kind.outer == "row" else 1, 1)))
        outer = torch.from_numpy(value if kind.outer_value is None else value * 0 + kind.outer_value).float()
        factor = (factor * outer.double().numpy()).astype(np.float32).astype(np.float64)
    exact = (level - kind.zero) * factor[:, c // kind.group]
    micro: Tensor | None = None
    if kind.micro:
        stored = rng.integers(0, 256, (rows, -(-columns // 16)))
        exact = exact * np.where(stored[:, c // 16] >> (c % 16 // 2) & 1, 0.5, 1.0)
        micro = torch.from_numpy(stored.astype(np.uint8))
    offset: Tensor | None = None
    if kind.offset:
        offset = -scale.float() / 2  # the scale of -1 and 1 is twice theirs
        offset = offset if kind.scale == E8M0 else offset.to(kind.scale)
        exact = exact + offset.double().numpy()[:, c // kind.group]
    if kind.trits:
        packed = functional.pad(pack_trits(codes), (0, spare))
    else:
        packed = pack(codes, kind.bits, spare) if kind.words else pack_bytes(codes, kind.bits, spare)
    weight = PackedWeight(
        packed, kind.bits, shape, kind.group, scale, kind.zero, offset, levels, outer, micro, kind.signed, kind.trits
    )
    return weight, torch.from_numpy(exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_kinds_decode_exactly(name: str, shape: tuple[int, int]) -> None:
    for spare in (0, 3):
        weight, exact = draw_kind(KINDS[name], shape, spare)
        decoded = kernels.decode(weight, F32)
        assert torch.equal(decoded, exact.float())
        assert torch.equal(decoded.signbit(), exact.signbit()) or KINDS[name].zero or KINDS[name].offset
        for dtype in (BF16, F16):
            assert torch.equal(kernels.decode(weight, dtype), decoded.to(dtype))
        for dtype in (BF16, F16, F32):
            kept = kernels.prepare(weight, dtype=dtype, keep_decoded=True)
            assert torch.equal(kept.decoded, decoded.to(dtype))  # type: ignore[attr-defined]


@pytest.mark.parametrize("keep_decoded", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_kinds_multiply(name: str, shape: tuple[int, int], keep_decoded: bool) -> None:
    weight, exact = draw_kind(KINDS[name], shape)
    check_linear(weight, exact, (1, 2, 3, 8, 11, 16, 33, 49), keep_decoded)


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_many_blocks_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant_kernels.cpu_compiled.BLOCK", 16 * 128)
    weight, exact = draw_kind(KINDS[name], (41, 128), spare=1)
    x = torch.randn(40, 128)
    y = kernels.linear(x, kernels.prepare(weight, dtype=F32)).double()
    assert torch.allclose(y, x.double() @ exact.t(), atol=1e-5 * exact.abs().max().item() * 128)


@pytest.mark.parametrize("name", KINDS)
def test_kinds_go_to_the_backend_for_them(name: str) -> None:
    """And the same one where only the levels, which are constants, are not on meta."""
    weight, _ = draw_kind(KINDS[name], (64, 256))
    assert {kernels.choose(weight.facts(), dtype)[0] for dtype in (BF16, F16, F32)} == {"cpu_compiled"}
    constant = [] if KINDS[name].tables else ["levels"]
    meta: dict[str, Any] = {
        field: value.to("meta") if isinstance(value, Tensor) and field not in constant else value
        for field, value in vars(weight).items()
    }
    assert PackedWeight(**meta).facts() == weight.facts()
    assert hash(weight.facts()) == hash(PackedWeight(**meta).facts())


def test_every_power_of_two_is_a_scale() -> None:
    """Subnormal numbers included; the last byte is NaN."""
    scale = torch.arange(256, dtype=torch.uint8).view(16, 16).view(E8M0)
    weight = PackedWeight(torch.full((16, 16), 1, dtype=torch.uint8), 8, (16, 16), 1, scale)
    exact = torch.exp2(torch.arange(256, dtype=torch.float64) - 127).view(16, 16)
    decoded = kernels.decode(weight, F32)
    assert torch.equal(decoded.flatten()[:-1].double(), exact.flatten()[:-1])
    assert decoded[-1, -1].isnan()


def test_codes_that_are_not_numbers_spoil_only_themselves() -> None:
    codes = np.full((16, 64), 0x38)
    codes[3, 5] = 0x7F
    weight = PackedWeight(
        pack_bytes(codes, 8, 0), 8, (16, 64), 32, torch.ones(16, 2), levels=torch.from_numpy(E4M3).float()
    )
    for dtype in (BF16, F32):
        kept = kernels.prepare(weight, dtype=dtype, keep_decoded=True)
        assert kept.decoded.isnan().nonzero().tolist() == [[3, 5]]  # type: ignore[attr-defined]


def test_rows_of_bytes_may_lie_anywhere() -> None:
    weight, _ = draw_kind(KINDS["mxfp4"], (64, 256))
    storage = torch.zeros(64 * 131 + 1, dtype=torch.uint8)
    packed = storage[1:].view(64, 131)[:, :128]
    packed.copy_(weight.packed)
    moved = PackedWeight(**{**vars(weight), "packed": packed})
    x = torch.randn(3, 256)
    for dtype in (BF16, F32):
        y = kernels.linear(x.to(dtype), kernels.prepare(moved, dtype=dtype))
        assert torch.equal(y, kernels.linear(x.to(dtype), kernels.prepare(weight, dtype=dtype)))


REFUSALS: list[tuple[str, dict[str, Any], str, str]] = [
    # backend asked, facts, backend chosen, words of the reason
    ("triton", {"bits": 4, "group": 128}, "cpu_compiled", "on GPUs only, the weight is on cpu"),
    ("cpu_compiled", {"bits": 4, "group": 128, "device": "mps"}, "reference", "the weight is on mps"),
]


@pytest.mark.parametrize(("asked", "facts", "chosen", "words"), REFUSALS)
def test_refusals_say_why(asked: str, facts: dict[str, Any], chosen: str, words: str) -> None:
    name, reasons = kernels.choose(Facts(**{"shape": (64, 256), **facts}), BF16)
    assert name == chosen
    assert words in reasons[asked]


def test_no_backend_takes_float64() -> None:
    with pytest.raises(ValueError, match="reference: activations must be float16, bfloat16 or float32"):
        kernels.choose(Facts(4, (64, 256), 128), torch.float64)


def test_explain_works_on_meta() -> None:
    weight = PackedWeight(
        packed=torch.empty(64, 32, dtype=torch.int32, device="meta"),
        bits=4,
        shape=(64, 256),
        group=128,
        scale=torch.empty(64, 2, dtype=F16, device="meta"),
        zero=8,
    )
    refused = "triton: refused, runs on GPUs only, the weight is on cpu"
    assert kernels.explain(weight, BF16) == f"cpu_compiled: chosen\n{refused}"
    assert kernels.explain(weight.facts("mps"), BF16).startswith("reference: chosen\n")
    with pytest.raises(ValueError, match="meta device"):
        kernels.prepare(weight, dtype=BF16)


GOOD: dict[str, Any] = {
    "packed": torch.zeros(4, 8, dtype=torch.int32),
    "bits": 4,
    "shape": (4, 64),
    "group": 32,
    "scale": torch.ones(4, 2),
}
TRITS: dict[str, Any] = {"packed": torch.zeros(4, 13, dtype=torch.uint8), "bits": 2, "trits": True}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bits": 0}, ValueError, "bits must be 1 to 8, not 0"),
        ({"bits": 9}, ValueError, "bits must be 1 to 8, not 9"),
        ({"bits": 5}, ValueError, r"packed must be \(4, 10 or more\) for 5 bits"),
        ({"shape": (5, 64)}, ValueError, r"packed must be \(5, 8 or more\)"),
        ({"group": 0}, ValueError, "must be positive"),
        ({"group": 16}, ValueError, r"scale must be \(4 or 1, 4\), not \(4, 2\)"),
        ({"packed": torch.zeros(4, 8)}, TypeError, "packed must be int32 or uint8"),
        ({"packed": torch.zeros(4, 31, dtype=torch.uint8)}, ValueError, r"packed must be \(4, 32 or more\) for 4 bits"),
        ({**TRITS, "packed": torch.zeros(4, 12, dtype=torch.uint8)}, ValueError, r"\(4, 13 or more\) for trits"),
        ({**TRITS, "packed": GOOD["packed"]}, TypeError, "packed must be uint8 for trits, not torch.int32"),
        ({**TRITS, "bits": 4}, ValueError, "trits must have 2 bits"),
        ({**TRITS, "signed": True}, ValueError, "neither signed nor codes of levels"),
        ({**TRITS, "levels": torch.ones(4)}, ValueError, "neither signed nor codes of levels"),
        ({"signed": True, "levels": torch.ones(16)}, ValueError, "signed codes are integers"),
        ({"outer": torch.ones(4, 1).double()}, TypeError, "outer must be float16, bfloat16 or float32"),
        ({"outer": torch.ones(4, 2)}, ValueError, r"outer must be \(4 or 1, 1\), not \(4, 2\)"),
        ({"outer": torch.ones(4)}, ValueError, r"outer must be \(4 or 1, 1\), not \(4,\)"),
        ({"micro": torch.zeros(4, 4, dtype=torch.int8)}, TypeError, "micro must be uint8"),
        ({"micro": torch.zeros(4, 4, dtype=torch.uint8)}, ValueError, r"micro must be \(4, 4\) .* for groups of 32"),
        (
            {"micro": torch.zeros(1, 4, dtype=torch.uint8), "group": 16, "scale": torch.ones(4, 4)},
            ValueError,
            r"micro must be \(4, 4\) for groups of 16, not \(1, 4\)",
        ),
        ({"scale": torch.ones(4, 2).double()}, TypeError, "scale must be"),
        ({"scale": torch.ones(2, 2)}, ValueError, r"scale must be \(4 or 1, 2\)"),
        ({"zero": torch.ones(4, 2)}, TypeError, "zero must have an integer dtype"),
        ({"zero": torch.ones(4, 1, dtype=torch.uint8)}, ValueError, r"zero must be \(4 or 1, 2\)"),
        ({"offset": torch.ones(4, 2).half()}, TypeError, "offset must have the dtype of scale"),
        (
            {"scale": torch.ones(4, 2, dtype=torch.uint8), "offset": torch.ones(4, 2).half()},
            TypeError,
            "offset must be float32 where scale is torch.uint8, not torch.float16",
        ),
        ({"levels": torch.ones(8)}, ValueError, r"levels must be \(16,\) or \(4, 16\), not \(8,\)"),
        ({"levels": torch.ones(3, 16)}, ValueError, r"levels must be \(16,\) or \(4, 16\), not \(3, 16\)"),
        ({"levels": torch.ones(16).double()}, TypeError, "levels must be float16, bfloat16 or float32"),
        ({"levels": torch.ones(16, device="meta")}, ValueError, "levels is on meta but packed is on cpu"),
        ({"scale": torch.ones(4, 2, device="meta")}, ValueError, "scale is on meta but packed is on cpu"),
    ],
)
def test_malformed_weights_are_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    PackedWeight(**GOOD)
    PackedWeight(**{**GOOD, **TRITS})
    with pytest.raises(error, match=words):
        PackedWeight(**{**GOOD, **change})


def test_only_torch_is_imported() -> None:
    code = """if True:
        import sys
        import llmquant_kernels
        found = {"transformers", "llmquant", "safetensors", "accelerate"} & {m.split(".")[0] for m in sys.modules}
        assert not found, found
    """
    path = str(Path(kernels.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
