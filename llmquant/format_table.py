"""The table of formats: what each costs and keeps, measured on seeded random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import llmquant_kernels
from llmquant import formats

SHAPE = (64, 4096)
SPECS = [
    *(f"int{bits}:{rest}" for bits in (2, 3, 4) for rest in ("g32", "g64", "g128", "g64:asym")),
    *(f"int{bits}:g128" for bits in (5, 6, 7, 8)),
    "int4:channel",
    "int8:channel",
    "int8:tensor",
]


def measure() -> list[dict[str, Any]]:
    """One row a format: bits per weight at SHAPE, and the signal-to-noise ratio in dB without calibration."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SHAPE, generator=generator)
    chi_squared = torch.randn(5, *SHAPE, generator=generator).square().sum(0)
    student_t5 = torch.randn(SHAPE, generator=generator) / (chi_squared / 5).sqrt()
    return [_row(spec, normal, student_t5) for spec in SPECS]


def _row(spec: str, normal: Tensor, student_t5: Tensor) -> dict[str, Any]:
    fmt = formats.get(spec)
    named = {
        suffix: torch.empty(what.shape, dtype=what.dtype, device="meta") for suffix, what in fmt.layout(SHAPE).items()
    }
    return {
        "format": spec,
        "bits_per_weight": fmt.bits_per_weight(SHAPE),
        "normal": _signal_to_noise(fmt, normal),
        "student_t5": _signal_to_noise(fmt, student_t5),
        "kernel": llmquant_kernels.choose(fmt.packed_weight(named, SHAPE).facts(), torch.bfloat16)[0],
    }


def _signal_to_noise(fmt: formats.Format, w: Tensor) -> float:
    codes, grid = fmt.quantize(w)
    error = fmt.decode(codes, grid).sub_(w)
    return float(10 * torch.log10(w.square().sum() / error.square().sum()))
