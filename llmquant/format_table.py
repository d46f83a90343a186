"""The table of formats: what each costs and keeps, measured on seeded random weights, and who can read its files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import llmquant_kernels
from llmquant import formats
from llmquant.formats import Format

SHAPE = (64, 4096)  # of the weights that are measured
SHAPES = ((4096, 4096), (4096, 14336))  # for which bits per weight are given
SPECS = [
    *("binary:g128", "ternary:g128", "ternary:g128:twn", "ternary:g128:absmean"),
    *(f"int{bits}:{rest}" for bits in (2, 3, 4) for rest in ("g32", "g64", "g128", "g64:asym")),
    *(f"int{bits}:g128" for bits in (5, 6, 7, 8)),
    *("int4:channel", "int8:channel", "int8:tensor"),
    *("kmeans2:channel", "kmeans3:channel", "kmeans4:channel", "kmeans3:g64", "kmeans4:g64"),
    *("nf4:g64", "nf4:g64:dq"),
    *("mx4", "mx6", "mx9"),
    *("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxint8", "mxfp8_e4m3", "mxfp8_e5m2"),
    "nvfp4",
    *("vsq3:s4", "vsq4:s4", "vsq4:s6", "vsq6:s6", "vsq8:s6"),
    *("fp8_e4m3:channel", "fp8_e4m3:block", "fp8_e4m3:tensor", "fp8_e5m2:channel"),
]
# Who reads the bytes of compressed-tensors, as far as their sources tell: vLLM multiplies by them as they are (mxfp8
# with activations of 8 bits too), transformers (HF) decodes them.
READERS = {
    "pack-quantized": "vLLM, HF",
    "mxfp4-pack-quantized": "vLLM, HF",
    "mxfp6-pack-quantized": "HF",
    "mxfp8-quantized": "vLLM, HF",
    "nvfp4-pack-quantized": "vLLM, HF",
    "float-quantized": "vLLM, HF",
}


@dataclass(frozen=True)
class Row:
    """What is known of one format."""

    format: str
    bits_per_weight: tuple[float, ...]  # at SHAPES
    normal: float  # signal to noise, dB, without calibration
    student_t5: float
    kernel: str  # for bfloat16 activations on a CPU
    compressed_tensors: str | None
    readers: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def measure() -> Iterator[Row]:
    """One row a format, as it is ready. A few seconds in all."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SHAPE, generator=generator)
    chi_squared = torch.randn(5, *SHAPE, generator=generator).square().sum(0)
    student_t5 = torch.randn(SHAPE, generator=generator) / (chi_squared / 5).sqrt()
    for spec in SPECS:
        fmt = formats.get(spec).stored_for(torch.bfloat16)
        yield Row(
            format=spec,
            bits_per_weight=tuple(fmt.bits_per_weight(shape) for shape in SHAPES),
            normal=_signal_to_noise(fmt, normal),
            student_t5=_signal_to_noise(fmt, student_t5),
            kernel=llmquant_kernels.choose(fmt.facts(SHAPE), torch.bfloat16)[0],
            compressed_tensors=fmt.compressed_tensors,
            readers=READERS.get(fmt.compressed_tensors or "", ""),
        )


def _signal_to_noise(fmt: Format, w: Tensor) -> float:
    error = fmt.decode(*fmt.quantize(w)).sub_(w)
    return 10 * math.log10(float(w.square().sum() / error.square().sum()))
