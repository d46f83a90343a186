"""The backend for GPUs: any weight, by Triton. Imports triton only when a weight is prepared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from .triton_layout import STRIP, Spec, lay_out, packed_again, tensors_of
from .weight import DTYPES, Facts, PackedWeight, Prepared


class Triton(Prepared):
    """Multiplies by the codes as they are decoded in registers; many rows of x by the weight decoded for the call.

    float32 activations are multiplied by the decoded weight always. Holds a Layout: a copy of the codes in another
    order, with what goes with them; with `keep_decoded` the decoded weight too, for many rows. Not the PackedWeight.
    """

    name = "triton"

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, keep_decoded: bool = False) -> None:
        super().__init__(weight, dtype)
        from .triton_ops import dequantize, linear
        from .triton_settings import ROWS_DENSE

        self._linear, self._dequantize, self.many = linear, dequantize, ROWS_DENSE
        self.f16 = dtype == torch.float16
        layout = lay_out(weight, dtype)
        self.spec = layout.spec.text
        self.low, self.high, self.scale, self.zero = layout.low, layout.high, layout.scale, layout.zero
        self.table, self.row, self.offset, self.origin = layout.table, layout.row, layout.offset, layout.origin
        self.decoded = self.decode() if keep_decoded else None

    @classmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if facts.device != "cuda" and not (interpreted and facts.device == "cpu"):
            return f"runs on GPUs only, the weight is on {facts.device}"
        if dtype not in DTYPES:
            return f"activations must be float16, bfloat16 or float32, not {dtype}"
        if torch.version.hip is not None:
            return "written for GPUs of NVIDIA only"
        if find_spec("triton") is None:
            return "triton is not installed"
        if not interpreted and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "needs a GPU of compute capability 8.0"
        if facts.has_micro and facts.has_levels and facts.integer_bits is None:
            return "takes micro-exponents on integers only"
        if facts.has_micro and facts.zero is None:
            return "takes micro-exponents on integers less one zero point only"
        return None

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != self.dtype:
            raise self.wrong_dtype(x)
        if x.shape[-1] != self.shape[1]:
            raise RuntimeError(f"x must be (..., {self.shape[1]}), not {tuple(x.shape)}")
        if self.decoded is not None and x.numel() > self.many * self.shape[1]:
            return functional.linear(x, self.decoded, bias)
        if self.dtype == torch.float32:
            return functional.linear(x, self.decode() if self.decoded is None else self.decoded, bias)
        return self._linear(x, tensors_of(self), bias, self.spec)

    def packed(self) -> Tensor | None:
        return self.origin and packed_again(self.low, self.high, Spec.of(self.spec), self.origin)

    def decode(self) -> Tensor:
        """The weight (out, in) of ``self.dtype``."""
        return self._dequantize(tensors_of(self), self.spec, self.dtype, self.f16)


class TritonExperts:
    """Several weights of one format and shape, for rows of activations that are sorted by them.

    Holds the Layout of all of them, one after the other, and none of the PackedWeights.
    """

    name = "triton"

    def __init__(self, weights: Sequence[PackedWeight], dtype: torch.dtype) -> None:
        from .triton_ops import grouped

        self._grouped, self.dtype, self.shape = grouped, dtype, weights[0].shape
        rows = -(-self.shape[0] // STRIP) * STRIP
        layout = lay_out(PackedWeight.stack(weights, rows), dtype)
        self.spec = layout.spec._replace(rows=self.shape[0]).text
        self.low, self.high, self.scale, self.zero = layout.low, layout.high, layout.scale, layout.zero
        self.table, self.row, self.offset, self.origin = layout.table, layout.row, layout.offset, layout.origin

    @classmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        if dtype == torch.float32:
            return "experts are multiplied together in float16 and bfloat16 only"
        return Triton.refuses(facts, dtype)

    def linear(self, x: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, in), sorted by expert; ends (experts,) int32; bias (experts, out); result (tokens, out)."""
        if x.dtype != self.dtype:
            raise TypeError(f"the experts were prepared for activations of {self.dtype}, not {x.dtype}")
        if x.dim() != 2 or x.shape[1] != self.shape[1]:
            raise RuntimeError(f"x must be (tokens, {self.shape[1]}), not {tuple(x.shape)}")
        return self._grouped(x, ends, tensors_of(self), bias, self.spec)

    def packed(self, expert: int | None = None) -> Tensor | None:
        """As `Prepared.packed`, of one expert or, stacked, of all."""
        if self.origin is None:
            return None
        strips = -(-self.shape[0] // STRIP)
        experts = len(self.low) // strips
        start, stop = (0, experts) if expert is None else (expert, expert + 1)
        spec = Spec.of(self.spec)._replace(rows=experts * strips * STRIP)
        found = packed_again(self.low, self.high, spec, self.origin, start * strips, stop * strips)
        found = found.unflatten(0, (stop - start, -1))[:, : self.shape[0]]
        return found if expert is None else found[0]
