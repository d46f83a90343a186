"""What of a block is quantized already, in place of what it was, and the other way round."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmquant.blocks import StreamedModel
from llmquant.matrices import Target

HALVES = (torch.bfloat16, torch.float16)
MUCH = 2**27  # bytes that rest, from which what the C library keeps is worth the time that asking for it takes


@dataclass
class WeightSwap:
    """The original and the quantized weights of one block, either of which can be in place."""

    pairs: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = field(default_factory=dict)
    _again: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # makes the quantized one anew

    def replace(self, name: str, parameter: nn.Parameter, quantized: Tensor, expert: int | None = None) -> None:
        """Put `quantized` (of the parameter's type) in place of the parameter's data, or of one of its experts."""
        original = self.pairs[name][1] if name in self.pairs else parameter.data
        if expert is not None:
            changed = self.pairs[name][2] if name in self.pairs else original.clone()
            changed[expert] = quantized
            quantized = changed
        self.pairs[name] = (parameter, original, quantized)
        self._again.pop(name, None)
        parameter.data = quantized

    def put(
        self, model: StreamedModel, target: Target, matrix: Tensor, again: Callable[[], Tensor] | None = None
    ) -> None:
        """Put a matrix (out, in) of any type in place of a target's. again: makes the same one."""

        def stored(matrix: Tensor) -> Tensor:
            return target.stored(matrix.to(model.dtype))

        self.replace(target.parameter, model.model.get_parameter(target.parameter), stored(matrix), target.expert)
        if again is not None and target.expert is None:
            self._again[target.parameter] = lambda: stored(again())

    @contextmanager
    def original(self) -> Iterator[None]:
        for parameter, original, _ in self.pairs.values():
            parameter.data = original
        try:
            yield
        finally:
            for parameter, _, quantized in self.pairs.values():
                parameter.data = quantized

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While no block runs: without what can be made again, so that there is room for something else.

        Quantized weights are decoded again afterwards; originals are kept in the type of half the size that they were
        read from, where a file had them in one.
        """
        small = {name: self._rested(name) for name in self._again}
        much = sum(tensor.nbytes for tensor in small.values()) >= MUCH
        if much:
            give_back()
        try:
            yield
        finally:
            if much:
                give_back()
            for name, again in self._again.items():
                parameter, _, empty = self.pairs[name]
                parameter.data = again()
                self.pairs[name] = (parameter, small.pop(name).to(empty.dtype), parameter.data)

    def _rested(self, name: str) -> Tensor:
        """The original of a pair, halved; of the pair itself nothing is left, and no variable holds it."""
        parameter, original, quantized = self.pairs[name]
        parameter.data = quantized.new_empty(0)
        self.pairs[name] = (parameter, parameter.data, parameter.data)
        return _halved(original)


def give_back() -> None:
    """Let the system have what was freed between pieces in use, which the C library of Linux keeps until it is told."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _halved(tensor: Tensor) -> Tensor:
    """The same numbers in two bytes each, where they fit."""
    if tensor.dtype == torch.float32:
        for dtype in HALVES:
            half = tensor.to(dtype)
            if all(torch.equal(a.float(), b) for a, b in zip(half.split(256), tensor.split(256), strict=True)):
                return half
    return tensor
