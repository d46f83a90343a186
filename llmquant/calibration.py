"""Calibration: two streams of activations through the model, one block at a time.

The reference stream runs through the original weights, the other through the blocks as they have been quantized, so
each linear is calibrated on the inputs it will really get. Only one block is in memory; the streams are hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.blocks import Call, StreamedModel
from llmquant.errors import DataError
from llmquant.matrices import Target
from llmquant.stats import Stats

MAX_DROPPED = 0.01  # of a linear's tokens may be non-finite before the run stops


@dataclass
class Streams:
    """The hidden states that enter the next block, batch by batch, and how the blocks are called."""

    model: StreamedModel
    reference: list[Tensor]
    quantized: list[Tensor]
    calls: list[list[Call]]  # per batch, per block

    @classmethod
    def start(cls, model: StreamedModel, windows: Tensor, batch: int, progress: Callable[[int, int], None]) -> Streams:
        """Embed windows (n, length) int64. Loads the parts outside the blocks, and lets go of them again."""
        streams = cls(model, [], [], [])
        model.load_outside()
        for tokens in windows.split(batch):
            hidden, calls = model.embed(tokens.to(model.device))
            streams.reference.append(hidden)
            streams.calls.append(streams._shared(calls))
            progress(sum(map(len, streams.reference)), len(windows))
        model.unload_outside()
        streams.quantized = list(streams.reference)  # both streams enter the first block alike
        return streams

    def _shared(self, calls: list[Call]) -> list[Call]:
        """The first batch's arguments where the new ones are equal, so that masks and positions are held once."""
        if not self.calls:
            return calls
        return [old if _equal(old, new) else new for old, new in zip(self.calls[0], calls, strict=True)]

    def advance(self, block: int, swap: WeightSwap) -> None:
        """Both streams through the block: the reference with the original weights, the other with the new ones."""
        for i, calls in enumerate(self.calls):
            with swap.original():
                reference = self.model.run_block(block, self.reference[i], calls[block])
            self.quantized[i] = self.model.run_block(block, self.quantized[i], calls[block])
            self.reference[i] = reference

    def collect(self, block: int, stage: list[Target], swap: WeightSwap) -> Stats:
        """Statistics of the input that the linears of a stage share."""
        stats = Stats.empty(stage[0].shape[1], self.model.device)
        linear = self.model.module(stage[0])
        for i, calls in enumerate(self.calls):
            with swap.original():
                references = self._inputs(block, linear, self.reference[i], calls[block])
            inputs = self._inputs(block, linear, self.quantized[i], calls[block])
            for x, x_ref in zip(inputs, references, strict=True):
                stats.update(x, x_ref)
        self._judge(stats, stage)
        return stats

    def _inputs(self, block: int, linear: nn.Module, hidden: Tensor, call: Call) -> list[Tensor]:
        found: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _SeenEnough

        handle = linear.register_forward_pre_hook(catch)
        try:
            self.model.run_block(block, hidden, call)
        except _SeenEnough:
            pass
        finally:
            handle.remove()
        return found

    def _judge(self, stats: Stats, stage: list[Target]) -> None:
        names = ", ".join(target.name for target in stage)
        if stats.dropped > MAX_DROPPED * (stats.tokens + stats.dropped):
            raise DataError(
                f"{names}: {stats.dropped} of {stats.tokens + stats.dropped} calibration tokens give inputs that are "
                "NaN or Inf: the model overflows in its own type; try --dtype float32, or --quality fast, which needs "
                "no calibration"
            )


class _SeenEnough(Exception):
    """Ends a block's forward pass once the wanted input was seen."""


def stages(model: StreamedModel, block: int, streams: Streams) -> list[list[Target]]:
    """The block's targets in the order in which they are called, those that share one input tensor together.

    Found by running one batch and comparing tensors by identity: no table of architectures. Targets that the batch did
    not reach are left out.
    """
    seen: list[tuple[Tensor, list[Target]]] = []
    handles = []
    for target in model.targets(block).values():

        def note(_: nn.Module, args: tuple[Any, ...], target: Target = target) -> None:
            for tensor, stage in seen:
                if tensor is args[0]:
                    stage.append(target)
                    return
            seen.append((args[0], [target]))

        handles.append(model.module(target).register_forward_pre_hook(note))
    try:
        model.run_block(block, streams.reference[0], streams.calls[0][block])
    finally:
        for handle in handles:
            handle.remove()
    return [stage for _, stage in seen]


@dataclass
class WeightSwap:
    """The original and the quantized weights of one block, either of which can be in place."""

    pairs: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = field(default_factory=dict)

    def replace(self, name: str, parameter: nn.Parameter, quantized: Tensor) -> None:
        """Put `quantized` (of the parameter's shape and type) in place of the parameter's data."""
        self.pairs[name] = (parameter, parameter.data, quantized)
        parameter.data = quantized

    @contextmanager
    def original(self) -> Iterator[None]:
        for parameter, original, _ in self.pairs.values():
            parameter.data = original
        try:
            yield
        finally:
            for parameter, _, quantized in self.pairs.values():
                parameter.data = quantized


def _equal(a: Any, b: Any) -> bool:
    """Whether two nests of arguments hold equal values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return bool(a is b or a == b)
