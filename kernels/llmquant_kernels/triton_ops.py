"""The operators of torch that launch the kernels: what torch.compile and torch.export see of a product.

Nothing here waits for the device or reads it but once for its properties, so CUDA graphs can hold all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from . import triton_kernels as kernels
from .triton_layout import Spec, group_sums, pad_groups
from .triton_settings import Device, Settings, is_even, settings_for, settings_for_experts

FUSED = {"enable_fp_fusion": True}  # triton 3.9 warns where it is left to a default that will change
ROWS_REDUCED = 128  # columns of the result that one program of `reduce` adds up


@torch.library.custom_op("llmquant::triton_linear", mutates_args=())
def linear(x: Tensor, parts: list[Tensor | None], bias: Tensor | None, spec: str) -> Tensor:
    """``x @ w.T + bias``: x (..., columns) -> (..., rows). parts: of a Layout, for numbers of x's type."""
    shape = Spec.of(spec)
    flat = x.reshape(-1, shape.columns)
    settings = settings_for(len(flat), shape, device_of(x.device))
    y = launch(flat, parts, bias, shape, settings)
    return y.view(*x.shape[:-1], shape.rows)


@linear.register_fake
def _(x: Tensor, parts: list[Tensor | None], bias: Tensor | None, spec: str) -> Tensor:
    shape = Spec.of(spec)
    if x.shape[-1] != shape.columns:
        raise RuntimeError(f"x must be (..., {shape.columns}), not {tuple(x.shape)}")
    return x.new_empty(*x.shape[:-1], shape.rows)


@torch.library.custom_op("llmquant::triton_dequantize", mutates_args=())
def dequantize(parts: list[Tensor | None], spec: str, dtype: torch.dtype, f16: bool) -> Tensor:
    """The weight (rows, columns) of `dtype`. f16: it was laid out for float16."""
    return decode(parts, Spec.of(spec), dtype, f16)


@dequantize.register_fake
def _(parts: list[Tensor | None], spec: str, dtype: torch.dtype, f16: bool) -> Tensor:
    shape = Spec.of(spec)
    assert parts[0] is not None
    return parts[0].new_empty(shape.rows, shape.columns, dtype=dtype)


@torch.library.custom_op("llmquant::triton_grouped", mutates_args=())
def grouped(x: Tensor, ends: Tensor, parts: list[Tensor | None], bias: Tensor | None, spec: str) -> Tensor:
    """Rows of x (M, columns) times the weights that they are sorted by -> (M, rows).

    ends (experts,) int32: where the rows of each expert end; what comes after the last end is left as it was in memory.
    parts: of the Layout of all experts, one after the other; bias (experts, rows); spec: of one of them.
    """
    shape = Spec.of(spec)
    settings = settings_for_experts(len(x), len(ends), shape, device_of(x.device))
    return launch(x, parts, bias, shape, settings, ends=ends)


@grouped.register_fake
def _(x: Tensor, ends: Tensor, parts: list[Tensor | None], bias: Tensor | None, spec: str) -> Tensor:
    shape = Spec.of(spec)
    if x.dim() != 2 or x.shape[1] != shape.columns:
        raise RuntimeError(f"x must be (tokens, {shape.columns}), not {tuple(x.shape)}")
    return x.new_empty(x.shape[0], shape.rows)


def launch(
    x: Tensor,
    parts: Sequence[Tensor | None],
    bias: Tensor | None,
    spec: Spec,
    settings: Settings,
    out: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """x (M, columns) -> (M, rows), written to `out` if given, with these settings. ends: as `grouped` has it."""
    low, high, scale, zero, table, row, offset = parts
    assert low is not None
    assert row is not None
    m = len(x)
    if ends is None and (settings.kernel == "dense" or m == 0):
        y = functional.linear(x, decode(parts, spec, x.dtype, x.dtype == torch.float16), bias)
        return y if out is None else out.copy_(y)
    if out is None:
        out = x.new_empty(m, spec.rows)
    if m == 0:
        return out
    sums = None
    if offset is not None and ends is None:  # a rank of one for each group: a product beside the kernel's own
        added = functional.linear(group_sums(x, spec), offset)
        bias = added if bias is None else added.add_(bias)
    elif offset is not None:
        sums = group_sums(x, spec)
    if spec.group != spec.padded:
        x = pad_groups(x, spec)
    if x.stride(1) != 1:
        x = x.contiguous()
    numbers = _numbers(spec, settings, zero, x.dtype)
    ends_of_rows: dict[str, Any] = {"HAS_BIAS": bias is not None, "BOOST": numbers.pop("BOOST")}
    stride_bias = 0 if bias is None or bias.dim() == 1 or ends is not None else bias.stride(0)
    stride_table = 0 if table is None or len(table) == 1 else table.stride(0)
    bias = row if bias is None else bias
    experts = 0 if ends is None else len(ends)
    # Each expert has at most one tile that is not full.
    tiles = triton.cdiv(m, settings.bm) if ends is None else m // settings.bm + min(m, experts)
    grouping = (row, row, row) if sums is None else (row, sums, offset)
    grouping = grouping if ends is None else (ends, *grouping[1:])
    common = (x, low, *_or(low, high, scale, zero, table), row, bias, out, *grouping)
    strips = low.shape[0] // max(1, experts)
    groups = 0 if sums is None else sums.shape[1]
    sizes = (m, spec.rows, spec.layout_columns, x.stride(0), stride_bias, stride_table, strips, spec.steps, groups)
    tuning = {"num_warps": settings.warps, "num_stages": settings.stages, "STAGES": settings.stages}
    tuning |= FUSED
    numbers |= {"EVEN": is_even(settings, spec), "EXPERTS": experts, "HAS_OFFSET": sums is not None}
    numbers |= {**ends_of_rows, **tuning}
    with _on(x.device):
        if settings.kernel == "gemv":
            s = settings.bn // 16
            kernels.gemv[(triton.cdiv(strips, s), 1 if ends is None else tiles, 1)](
                *common, *sizes, BM=settings.bm, S=s, T=settings.warps, **numbers
            )
            return out
        split = settings.split
        work = row if split == 1 else torch.empty(split, m, spec.rows, dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(spec.rows, settings.bn), split, tiles)
        tile = {"BM": settings.bm, "BN": settings.bn, "SPLIT": split}
        kernels.gemm[grid](*common, work, *sizes, triton.cdiv(spec.steps, split), **tile, **numbers)
        if split > 1:
            grid = (triton.cdiv(spec.rows, ROWS_REDUCED), m, 1)
            ends_of_rows |= {"SPLIT": split, "BLOCK": ROWS_REDUCED, **FUSED}
            kernels.reduce[grid](work, row, bias, out, m, spec.rows, stride_bias, **ends_of_rows)
    return out


def decode(parts: Sequence[Tensor | None], spec: Spec, dtype: torch.dtype, f16: bool) -> Tensor:
    """The weight (rows, columns)."""
    low, high, scale, zero, table, row, offset = parts
    assert low is not None
    assert row is not None
    columns = spec.layout_columns
    out = torch.empty(spec.rows, columns, dtype=dtype, device=low.device)
    stride_table = 0 if table is None or len(table) == 1 else table.stride(0)
    groups = -(-spec.columns // spec.group)
    with _on(low.device):
        kernels.dequantize[(low.shape[0], spec.steps, 1)](
            low, *_or(low, high, scale, zero, table), row, row if offset is None else offset, out,
            spec.rows, columns, spec.padded, groups, stride_table, spec.steps,
            NUMBERS=spec.numbers, SCALE=spec.scale, UNITS=spec.units, ZERO=0.0 if spec.zero != spec.zero else spec.zero,
            HAS_ZERO=zero is not None,
            HAS_OFFSET=offset is not None, ASM=not _interpreted(), F16=f16, num_warps=1, **FUSED,
        )  # fmt: skip
    if spec.group != spec.padded:
        out = out.unflatten(1, (groups, spec.padded))[..., : spec.group].flatten(1)[:, : spec.columns].contiguous()
    return out


def _or(low: Tensor, high: Tensor | None, scale: Tensor | None, zero: Tensor | None, table: Tensor | None) -> Any:
    """Something of the right type in place of what a format has no use for: it is not read."""
    grid = low if scale is None else scale
    return (low if high is None else high, grid, grid if zero is None else zero, grid if table is None else table)


def _numbers(spec: Spec, settings: Settings, zero: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels know of the numbers when they are compiled."""
    exact = spec.scale == {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype] or spec.scale in ("e8m0", "e4m3", "u8")
    return {
        "NUMBERS": spec.numbers,
        "SCALE": spec.scale,
        "UNITS": spec.units,
        "ZERO": 0.0 if zero is not None else spec.zero,
        "HAS_ZERO": zero is not None,
        "SCALED": settings.scaled,
        "EXACT": exact,
        "BOOST": 2.0**spec.boost if settings.scaled else 1.0,
        "ASM": not _interpreted(),
    }


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were defined: then they run on the CPU, without assembly."""
    return not isinstance(kernels.gemv, triton.JITFunction)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device, whatever their tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def device_of(device: torch.device) -> Device:
    return _cuda(device.index or 0) if device.type == "cuda" else Device()


@lru_cache(maxsize=64)
def _cuda(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    capability = 10 * found.major + found.minor
    return Device(found.name, found.multi_processor_count, capability, shared)
