"""How fast this machine multiplies by quantized weights: the measurements of `llmquant bench`."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import llmquant_kernels
from llmquant import formats
from llmquant.checkpoint import Checkpoint
from llmquant.errors import PlanError
from llmquant.inspection import manifest
from llmquant_kernels import PackedWeight
from llmquant_kernels.measure import Clock, measure

BYTES_IN_TURN = 2**26  # of weights that are used one after the other, for no cache to hold them all
SAMPLE = 64  # rows that are quantized and repeated


@dataclass(frozen=True)
class Line:
    """One matrix, one number of rows."""

    name: str  # of the matrix, or its shape
    format: str
    shape: tuple[int, int]  # (out, in)
    kernel: str
    rows: int  # of activations
    milliseconds: float
    dense_milliseconds: float
    speedup: float  # over the dense product in the type of the activations, side by side
    nbytes: int  # of the quantized weight, of x and of y
    share: float  # of the bandwidth of a copy
    error: float  # of the product, relative to float64
    dense_error: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def of_shape(spec: str, shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight:
    """A random weight (out, in) in a format: the quantized rows of a smaller one, over and over.

    Raises PlanError where the format cannot hold the shape.
    """
    fmt = formats.get(spec).stored_for(dtype)
    rows = min(SAMPLE, shape[0])
    w = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    named = fmt.pack(*fmt.quantize(w))
    return fmt.packed_weight(named, (rows, shape[1])).rows(torch.arange(shape[0]) % rows)


def of_block(folder: Path) -> Iterator[tuple[str, str, PackedWeight]]:
    """Name, format and weight of the matrices in the first block of a quantized folder; of experts the first.

    Raises CheckpointError where it is none.
    """
    listed = [tensor for tensor in manifest(folder)["tensors"] if not tensor.get("expert")]
    blocks = [found.group(1) if (found := re.search(r"\.(\d+)\.", tensor["name"])) else None for tensor in listed]
    first = next((block for block in blocks if block is not None), None)
    checkpoint = Checkpoint(folder)
    for tensor, block in zip(listed, blocks, strict=True):
        if block != first:
            continue
        fmt, shape = formats.get(tensor["format"]), (tensor["shape"][0], tensor["shape"][1])
        stored = checkpoint.tensors(list(fmt.pieces(tensor["key"], shape)))
        named = fmt.named(stored, tensor["key"], shape, tensor.get("expert"))
        yield tensor["name"], tensor["format"], fmt.packed_weight(named, shape)


def lines(
    name: str,
    spec: str,
    weight: PackedWeight,
    rows: Sequence[int],
    *,
    dtype: torch.dtype,
    device: str,
    bandwidth: float,
    runs: int = 9,
    keep_decoded: bool = False,
    clock: Clock = time.perf_counter,
) -> Iterator[Line]:
    """One for each number of rows. bandwidth: bytes a second, as `copy_bandwidth` measures it."""
    moved: dict[str, Any] = {
        field: value.to(device) if isinstance(value, torch.Tensor) else value for field, value in vars(weight).items()
    }
    copies = min(16, max(2, math.ceil(BYTES_IN_TURN / weight.nbytes)))
    weights = [_copy(PackedWeight(**moved)) for _ in range(copies)]
    prepared = [llmquant_kernels.prepare(own, dtype=dtype, keep_decoded=keep_decoded) for own in weights]
    exact = llmquant_kernels.decode(weights[0], torch.float32)
    dense = [exact.to(dtype) for _ in range(min(copies, 4))]
    generator = torch.Generator().manual_seed(0)
    for count in rows:
        x = torch.randn(count, weight.shape[1], generator=generator).to(device, dtype)
        found = measure(x, exact.double(), dense, prepared, runs, clock)
        nbytes = weight.nbytes + x.nbytes + count * weight.shape[0] * x.element_size()
        yield Line(
            name,
            spec,
            weight.shape,
            prepared[0].name,
            count,
            found.quantized_ms,
            found.dense_ms,
            found.speedup,
            nbytes,
            nbytes / (found.quantized_ms / 1e3) / bandwidth,
            found.quantized_error,
            found.dense_error,
        )


def _copy(weight: PackedWeight) -> PackedWeight:
    return weight.rows(torch.arange(weight.shape[0], device=weight.packed.device))


def numbers(text: str) -> list[int]:
    """As "1,8,32". Raises PlanError."""
    found = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) < 2**20 for part in found):
        raise PlanError(f"--rows {text!r}: give numbers of rows, as 1,8,32")
    return [int(part) for part in found]
