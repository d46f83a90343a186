"""Multiplication by quantized weights. Knows tensors, not formats; does nothing on import but define.

weight = PackedWeight(packed, bits=4, shape=(out, in), group=128, scale=scale, zero=8)
prepared = prepare(weight, dtype=torch.bfloat16)
y = linear(x, prepared, bias)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_compiled import CpuCompiled
from .reference import Reference, decode
from .triton_backend import Triton, TritonExperts
from .weight import Facts, PackedWeight, Prepared

__all__ = [
    "BACKENDS",
    "Facts",
    "PackedWeight",
    "Prepared",
    "TritonExperts",
    "choose",
    "decode",
    "explain",
    "linear",
    "prepare",
]

# The first that does not refuse is taken. The last one refuses nothing but dtypes.
BACKENDS: tuple[type[Prepared], ...] = (Triton, CpuCompiled, Reference)


def choose(facts: Facts, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The name of the backend that takes such a weight, and the reason of each one that refused before it.

    Raises ValueError where all refuse.
    """
    reasons: dict[str, str] = {}
    for backend in BACKENDS:
        reason = backend.refuses(facts, dtype)
        if reason is None:
            return backend.name, reasons
        reasons[backend.name] = reason
    raise ValueError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def explain(weight: PackedWeight | Facts, dtype: torch.dtype) -> str:
    """One line for the backend chosen and one for each that refused before it. Reads no value but a table of levels."""
    name, reasons = choose(weight if isinstance(weight, Facts) else weight.facts(), dtype)
    return "\n".join([f"{name}: chosen", *(f"{refused}: refused, {reason}" for refused, reason in reasons.items())])


def prepare(weight: PackedWeight, *, dtype: torch.dtype, keep_decoded: bool = False) -> Prepared:
    """Make the weight ready for activations of `dtype`, on the device it is on.

    `keep_decoded` also holds the weight decoded to `dtype`: the memory of an unquantized weight for its speed, where x
    has many rows.

    Raises ValueError where no backend takes the weight or it is on the meta device.
    """
    if weight.packed.is_meta:
        raise ValueError("the weight is on the meta device: it holds no codes to prepare")
    name, _ = choose(weight.facts(), dtype)
    backend = next(backend for backend in BACKENDS if backend.name == name)
    return backend(weight, dtype, keep_decoded)


def linear(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """``x @ w.T + bias`` for x (..., in), bias (out,), result (..., out), all of the dtype the weight was prepared for.

    Raises TypeError where x has another dtype, RuntimeError (from torch) where its last dimension is not `in`.
    """
    return prepared.linear(x, bias)
