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

import llmquant_kernels as kernels
from llmquant_kernels import Facts, PackedWeight
from llmquant_kernels.cpu import ROWS_INT4

ROWS = (1, 2, 8, 16, 17, 31, 32, 33, 64)
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
    generator = torch.Generator().manual_seed(1)
    # Activations that are not centred punish errors that the columns of a group share.
    x = torch.randn(max(ROWS), case.shape[1], generator=generator) + 0.5
    dense = functional.linear(x.to(BF16), exact.to(BF16)).double() - x.to(BF16).double() @ exact.t()
    for dtype in (BF16, F16, F32):
        prepared = kernels.prepare(weight, dtype=dtype, keep_decoded=keep_decoded)
        error = []
        for rows in ROWS:
            y = kernels.linear(x[:rows].to(dtype), prepared)
            assert y.dtype == dtype
            assert y.shape == (rows, case.shape[0])
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
    assert prepared.name in ("cpu_int4", "cpu_int4_pair", "cpu_int8")
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


ONE_OF_EACH = {
    "cpu_int4": Case(4, (64, 256), 128, 8),
    "cpu_int8": Case(8, (64, 256), 256, 128),
    "cpu_int4_pair": Case(8, (64, 256), 128, 128),
    "cpu_decode": Case(4, (64, 256), 128, 8, levels=True),
}


def test_there_is_a_case_for_each_backend() -> None:
    assert [backend.name for backend in kernels.BACKENDS] == [*ONE_OF_EACH, "reference"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_shapes_of_activations(name: str) -> None:
    weight, exact = draw(ONE_OF_EACH[name])
    prepared = kernels.prepare(weight, dtype=BF16)
    assert prepared.name == name
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
    assert torch.equal(kernels.linear(base[0], prepared), kernels.linear(base, prepared)[0]) or name != "cpu_decode"


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_is_passed_stays_unchanged(name: str) -> None:
    weight, _ = draw(ONE_OF_EACH[name])
    x, bias = torch.randn(2, 256).to(BF16), torch.randn(64).to(BF16)
    kept = [t.clone() for t in (x, bias, weight.packed, weight.scale)]
    prepared = kernels.prepare(weight, dtype=BF16)
    first = kernels.linear(x, prepared, bias)
    assert torch.equal(first, kernels.linear(x, prepared, bias))
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, bias, weight.packed, weight.scale), strict=True))


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("rows", [1, 40])
def test_wrong_activations_are_refused(name: str, rows: int) -> None:
    prepared = kernels.prepare(draw(ONE_OF_EACH[name])[0], dtype=BF16)
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
    weight, exact = draw(ONE_OF_EACH["cpu_int4"])
    x = torch.randn(ROWS_INT4 + 1, 256).to(BF16)
    lean, kept = (kernels.prepare(weight, dtype=BF16, keep_decoded=keep) for keep in (False, True))
    assert kept.nbytes == lean.nbytes + 64 * 256 * 2
    assert 64 * 256 // 2 <= lean.nbytes <= 64 * 256
    assert torch.equal(kernels.linear(x, lean), kernels.linear(x, kept))
    assert torch.equal(kernels.linear(x, kept), functional.linear(x, exact.to(BF16)))


def test_many_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant_kernels.cpu.BLOCK", 16 * 128)
    weight, exact = draw(Case(4, (72, 128), 32, "tensor", scale=F32))
    x, bias = torch.randn(40, 128), torch.randn(72)
    prepared = kernels.prepare(weight, dtype=F32)
    assert torch.allclose(kernels.linear(x, prepared, bias).double(), x.double() @ exact.t() + bias, atol=1e-4)
    kept = kernels.prepare(weight, dtype=F32, keep_decoded=True)
    assert torch.allclose(kernels.linear(x, kept, bias).double(), x.double() @ exact.t() + bias, atol=1e-4)


REFUSALS: list[tuple[str, dict[str, Any], torch.dtype, str, str]] = [
    # backend asked, facts, dtype, backend chosen, words of the reason
    ("cpu_int4", {"bits": 4, "group": 128}, F32, "cpu_decode", "bfloat16 activations only"),
    ("cpu_int4", {"bits": 4, "group": 48}, BF16, "cpu_decode", "multiples of 32, not 256 and 48"),
    ("cpu_int4", {"bits": 4, "group": 128, "shape": (72, 256)}, BF16, "cpu_decode", "multiple of 16, not 72"),
    ("cpu_int4", {"bits": 4, "group": 128, "shape": (64, 172)}, BF16, "cpu_decode", "multiples of 32, not 172"),
    ("cpu_int4", {"bits": 4, "group": 128, "has_levels": True}, BF16, "cpu_decode", "tables of levels"),
    ("cpu_int4", {"bits": 8, "group": 128, "zero": 128}, BF16, "cpu_int4_pair", "1 to 4 bits, not 8"),
    ("cpu_int8", {"bits": 8, "group": 128, "zero": 128}, BF16, "cpu_int4_pair", "not groups of 128"),
    ("cpu_int8", {"bits": 8, "group": 256, "zero": 3}, BF16, "cpu_int4_pair", "a zero point of 3 do not fit"),
    ("cpu_int8", {"bits": 8, "group": 256, "zero": None}, BF16, "cpu_int4_pair", "zero point per row"),
    (
        "cpu_int8",
        {"bits": 8, "group": 999, "shape": (64, 100), "zero": 128},
        BF16,
        "cpu_decode",
        "multiple of 16, not 100",
    ),
    ("cpu_int4_pair", {"bits": 8, "group": 8, "zero": 128}, BF16, "cpu_decode", "multiples of 32, not 256 and 8"),
    ("cpu_decode", {"bits": 4, "group": 128, "device": "cuda"}, BF16, "reference", "the weight is on cuda"),
]


@pytest.mark.parametrize(("asked", "facts", "dtype", "chosen", "words"), REFUSALS)
def test_refusals_say_why(asked: str, facts: dict[str, Any], dtype: torch.dtype, chosen: str, words: str) -> None:
    name, reasons = kernels.choose(Facts(**{"shape": (64, 256), **facts}), dtype)
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
    assert kernels.explain(weight, BF16) == "cpu_int4: chosen"
    lines = kernels.explain(weight, F16).splitlines()
    assert lines[0] == "cpu_decode: chosen"
    assert lines[1].startswith("cpu_int4: refused, ")
    assert kernels.explain(weight.facts("cuda"), BF16).startswith("reference: chosen\n")
    with pytest.raises(ValueError, match="meta device"):
        kernels.prepare(weight, dtype=BF16)


GOOD: dict[str, Any] = {
    "packed": torch.zeros(4, 8, dtype=torch.int32),
    "bits": 4,
    "shape": (4, 64),
    "group": 32,
    "scale": torch.ones(4, 2),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bits": 0}, ValueError, "bits must be 1 to 8, not 0"),
        ({"bits": 9}, ValueError, "bits must be 1 to 8, not 9"),
        ({"bits": 5}, ValueError, r"packed must be \(4, 10 or more\) for 5 bits"),
        ({"shape": (5, 64)}, ValueError, r"packed must be \(5, 8 or more\)"),
        ({"group": 0}, ValueError, "must be positive"),
        ({"group": 16}, ValueError, r"scale must be \(4 or 1, 4\), not \(4, 2\)"),
        ({"packed": torch.zeros(4, 8)}, TypeError, "packed must be int32"),
        ({"scale": torch.ones(4, 2).double()}, TypeError, "scale must be"),
        ({"scale": torch.ones(2, 2)}, ValueError, r"scale must be \(4 or 1, 2\)"),
        ({"zero": torch.ones(4, 2)}, TypeError, "zero must have an integer dtype"),
        ({"zero": torch.ones(4, 1, dtype=torch.uint8)}, ValueError, r"zero must be \(4 or 1, 2\)"),
        ({"offset": torch.ones(4, 2).half()}, TypeError, "offset must have the dtype of scale"),
        ({"levels": torch.ones(8)}, ValueError, r"levels must be \(16,\)"),
        ({"levels": torch.ones(16).half()}, TypeError, "levels must be float32"),
        ({"scale": torch.ones(4, 2, device="meta")}, ValueError, "scale is on meta but packed is on cpu"),
    ],
)
def test_malformed_weights_are_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    PackedWeight(**GOOD)
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
