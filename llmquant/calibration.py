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
from llmquant.stats import HELD, Stats, energy

FEW = 4  # windows from which one is held out
MAX_DROPPED = 0.01  # of a linear's tokens may be non-finite before the run stops


@dataclass
class Streams:
    """The hidden states that enter the next block, batch by batch, and how the blocks are called."""

    model: StreamedModel
    reference: list[Tensor]
    quantized: list[Tensor]
    calls: list[list[Call]]  # per batch, per block
    held: list[bool]  # per batch: whether its tokens stay out of all sums, to judge solutions on
    _wanted: tuple[int, list[Tensor]] = (-1, [])  # a block, and what it puts out in the reference for held-out tokens

    @classmethod
    def start(cls, model: StreamedModel, windows: Tensor, batch: int, progress: Callable[[int, int], None]) -> Streams:
        """Embed windows (n, length) int64. Loads the parts outside the blocks, and lets go of them again.

        The last eighth of the windows is held out, and one of a few.
        """
        streams = cls(model, [], [], [], [])
        model.load_outside()
        summed = summed_windows(len(windows))
        batches = [*windows[:summed].split(batch), *(windows[summed:].split(batch) if summed < len(windows) else ())]
        streams.held = [index >= -(-summed // batch) for index in range(len(batches))]
        for tokens in batches:
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

    def held_windows(self) -> Tensor:
        """Which windows are held out, (n,) bool."""
        return torch.tensor([held for held, part in zip(self.held, self.reference, strict=True) for _ in part])

    def advance(self, block: int, swap: WeightSwap) -> None:
        """Both streams through the block: the reference with the original weights, the other with the new ones."""
        for i, calls in enumerate(self.calls):
            with swap.original():
                reference = self.model.run_block(block, self.reference[i], calls[block])
            self.quantized[i] = self.model.run_block(block, self.quantized[i], calls[block])
            self.reference[i] = reference

    def collect(self, block: int, stage: Stage, swap: WeightSwap) -> Stats:
        """Statistics of the input that the linears of a stage share."""
        stats = Stats.empty(stage.targets[0].shape[1], self.model.device)
        for i, calls in enumerate(self.calls):
            with swap.original():
                x_ref, carried_ref = self.inputs(block, stage, self.reference[i], calls[block])
            x, carried = self.inputs(block, stage, self.quantized[i], calls[block])
            if x is None or x_ref is None:
                continue
            if stage.scale is not None:
                x_ref = x_ref / stage.scale
            debt = None if carried is None or carried_ref is None else carried_ref - carried
            if self.held[i]:
                stats.hold(x, x_ref, debt, most=HELD // sum(self.held))
            else:
                stats.update(x, x_ref, debt)
        self._judge(stats, stage)
        return stats

    def inputs(self, block: int, stage: Stage, hidden: Tensor, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """What enters a stage, and the residual stream that its output is added to, where it is."""
        found: list[Tensor] = []
        carried = [hidden] if stage.carrier is BLOCK_INPUT else []

        def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _SeenEnough

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            carried.append(args[0])

        handles = [self.model.module(stage.targets[0]).register_forward_pre_hook(catch)]
        if isinstance(stage.carrier, nn.Module):
            handles.append(stage.carrier.register_forward_pre_hook(note))
        try:
            self.model.run_block(block, hidden, call)
        except _SeenEnough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return next(iter(found), None), next(iter(carried), None)

    def output(self, block: int, name: str, hidden: Tensor, call: Call) -> Tensor:
        """What the module of that name in memory puts out when the block runs; of several things, the first."""
        found: list[Tensor] = []

        def catch(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple | list) else output)
            raise _SeenEnough

        handle = self.model.model.get_submodule(name).register_forward_hook(catch)
        try:
            self.model.run_block(block, hidden, call)
        except _SeenEnough:
            pass
        finally:
            handle.remove()
        return found[0]

    def block_error(self, block: int, swap: WeightSwap, curvature: Tensor | None) -> float:
        """How far the block's outputs, as it is now, are from the reference on held-out tokens: the mean of e^T G e.

        curvature (blocks, b, b): G along the diagonal, of the loss in the block's outputs; None: the identity.
        """
        total, tokens = 0.0, 0
        held = [i for i in range(len(self.calls)) if self.held[i]]
        if self._wanted[0] != block:
            with swap.original():
                outputs = [self.model.run_block(block, self.reference[i], self.calls[i][block]) for i in held]
            self._wanted = block, outputs
        for i, wanted in zip(held, self._wanted[1], strict=True):
            found = self.model.run_block(block, self.quantized[i], self.calls[i][block])
            error = (found - wanted).flatten(0, -2).float()
            error = error[torch.isfinite(error).all(-1)]
            tokens += len(error)
            total += _in_metric(error, curvature)
        return total / max(1, tokens)

    def _judge(self, stats: Stats, stage: Stage) -> None:
        names = ", ".join(target.name for target in stage.targets)
        if stats.dropped > MAX_DROPPED * (stats.tokens + stats.dropped):
            raise DataError(
                f"{names}: {stats.dropped} of {stats.tokens + stats.dropped} calibration tokens give inputs that are "
                "NaN or Inf: the model overflows in its own type; try --dtype float32, or --quality fast, which needs "
                "no calibration"
            )


def summed_windows(count: int) -> int:
    """How many of `count` windows enter the sums: all but the last eighth, or but one of a few."""
    return count - max(count // 8, count >= FEW)


class _SeenEnough(Exception):
    """Ends a block's forward pass once the wanted input was seen."""


def _in_metric(error: Tensor, curvature: Tensor | None) -> float:
    """The sum over rows e of error (tokens, size) of e^T G e."""
    if curvature is None:
        return energy(error)
    count, width, _ = curvature.shape
    parts = nn.functional.pad(error, (0, count * width - error.shape[1])).unflatten(1, (count, width)).transpose(0, 1)
    return float(((parts @ curvature.to(error.device)) * parts).sum(dtype=torch.float64))


BLOCK_INPUT = "block input"


@dataclass
class Stage:
    """Targets that share one input tensor.

    carrier: what holds the residual stream that the output of the only target is added to: a module whose input it is,
    or the block's own input; None where the output is not simply added to one.
    scale: (in,), by which the input of the quantized stream is divided; None: by nothing.
    """

    targets: list[Target]
    carrier: nn.Module | str | None = None
    scale: Tensor | None = None


def stages(model: StreamedModel, block: int, streams: Streams) -> list[Stage]:
    """The block's targets in the order in which they are called, those that share one input tensor together.

    Found by running one batch and comparing tensors: no table of architectures. Targets that the batch did not reach
    are left out.
    """
    targets = {model.module(target): target for target in model.targets(block).values()}
    hidden = streams.reference[0]
    found: list[tuple[Tensor, Stage]] = []
    outputs: dict[str, Tensor] = {}
    inputs: list[tuple[nn.Module, Tensor]] = []  # of any module, those that look like hidden states

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape == hidden.shape:
            inputs.append((module, args[0]))
        if module not in targets:
            return
        known = next((stage for tensor, stage in found if tensor is args[0]), None)
        if known is None:
            found.append((args[0], Stage([targets[module]])))
        else:
            known.targets.append(targets[module])

    def leave(module: nn.Module, _: Any, output: Tensor) -> None:
        if output.shape == hidden.shape:
            outputs[targets[module].name] = output

    handles = [
        part.register_forward_pre_hook(enter) for part in model.model.get_submodule(model.block_names[block]).modules()
    ]
    handles += [module.register_forward_hook(leave) for module in targets]
    try:
        result = model.run_block(block, hidden, streams.calls[0][block])
    finally:
        for handle in handles:
            handle.remove()
    _find_carriers([stage for _, stage in found], outputs, hidden, inputs, result)
    return [stage for _, stage in found]


def _find_carriers(
    stages: list[Stage],
    outputs: dict[str, Tensor],
    hidden: Tensor,
    inputs: list[tuple[nn.Module, Tensor]],
    result: Tensor,
) -> None:
    """A target's output is added to a residual stream if their sum, to the last bit, is a tensor seen later on."""
    streams: list[tuple[nn.Module | str, Tensor]] = [(BLOCK_INPUT, hidden)]
    for stage in stages:
        output = outputs.get(stage.targets[0].name)
        if output is None or len(stage.targets) > 1:
            continue
        for carrier, stream in reversed(streams):
            total = stream + output
            if torch.equal(total, result):
                stage.carrier = carrier
            later = next((module for module, tensor in inputs if torch.equal(tensor, total)), None)
            if later is not None:
                stage.carrier = carrier
                streams.append((later, total))
            if stage.carrier is not None:
                break


@dataclass
class WeightSwap:
    """The original and the quantized weights of one block, either of which can be in place."""

    pairs: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = field(default_factory=dict)

    def replace(self, name: str, parameter: nn.Parameter, quantized: Tensor) -> None:
        """Put `quantized` (of the parameter's shape and type) in place of the parameter's data."""
        original = self.pairs[name][1] if name in self.pairs else parameter.data
        self.pairs[name] = (parameter, original, quantized)
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
