"""Calibration: two streams of activations through the model, one block at a time.

The reference stream runs through the original weights, the other through the blocks as they have been quantized, so
each linear is calibrated on the inputs it will really get. Only one block is in memory; the streams are hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.blocks import Call, StreamedModel
from llmquant.errors import DataError
from llmquant.experts import Watch
from llmquant.finished import Finished
from llmquant.hooks import SeenEnough, hooked
from llmquant.matrices import Target
from llmquant.offload import room
from llmquant.phases import phase
from llmquant.products import product
from llmquant.ranks import SINGLE, Parcel, Ranks
from llmquant.stages import BLOCK_INPUT, Discovery, Stage
from llmquant.stats import EXPERT_BYTES, HELD, SEEN_BYTES, Stats, energy
from llmquant.swap import WeightSwap

FEW = 4  # windows from which one is held out
MAX_DROPPED = 0.01  # of a linear's tokens may be non-finite before the run stops
LOUD = 4.0  # times as large as the median token of a window: beyond that errors count relative to the size
FEW_HELD = 256  # held-out tokens of an expert below which those of the other experts judge it too


@dataclass
class Streams:
    """The hidden states that enter the next block, batch by batch, and how the blocks are called.

    Of many processes each has its own batches, every count-th of all: so all goes in turns.
    """

    model: StreamedModel
    reference: list[Tensor]
    quantized: list[Tensor]
    tokens: list[Tensor]
    calls: list[list[Call]]  # per batch, per block
    held: list[bool]  # per batch: whether its tokens stay out of all sums, to judge solutions on
    batches: list[Tensor]  # of all processes: the numbers of their windows
    summed: int  # of those batches, the first, that are not held out
    shape: torch.Size  # of the windows of all
    ranks: Ranks = SINGLE
    _in_place: bool = False  # hidden states are written over, where they lie
    _seen: Seen | None = None  # of the block at hand
    _finished: Finished | None = None  # of the block at hand, on the quantized stream

    @classmethod
    @phase("forward")
    def start(
        cls,
        model: StreamedModel,
        windows: Tensor,
        batch: int,
        progress: Callable[[int, int], None],
        offload: Path | None = None,
        ranks: Ranks = SINGLE,
    ) -> Streams:
        """Embed windows (n, length) int64. Loads the parts outside the blocks, and lets go of them again.

        The last eighth of the windows is held out, and one of a few. offload: a folder in which the hidden states of
        both streams lie, on the CPU whatever the model's device, instead of in memory.
        """
        numbers, summed = torch.arange(len(windows)), summed_windows(len(windows))
        batches = [*numbers[:summed].split(batch), *(numbers[summed:].split(batch) if summed < len(windows) else ())]
        streams = cls(model, [], [], [], [], [], batches, -(-summed // batch), windows.shape, ranks)
        with model.loaded(None):
            for numbers in streams.numbers():
                tokens = windows[numbers]
                streams.held.append(int(numbers[0]) >= summed)
                streams.tokens.append(tokens)
                hidden, calls = model.embed(tokens.to(model.device))
                streams.reference.append(hidden if offload is None else _written(hidden, offload))
                streams.calls.append(streams._shared(calls))
                progress(int(numbers[-1]) + 1, len(windows))
        # Both streams enter the first block alike.
        streams.quantized = [hidden if offload is None else _written(hidden, offload) for hidden in streams.reference]
        streams._in_place = offload is not None
        return streams

    def _shared(self, calls: list[Call]) -> list[Call]:
        """The first batch's arguments where the new ones are equal, so that masks and positions are held once."""
        if not self.calls:
            return calls
        return [old if _equal(old, new) else new for old, new in zip(self.calls[0], calls, strict=True)]

    def held_windows(self) -> Tensor:
        """Which windows are held out, (n,) bool."""
        return torch.tensor([index >= self.summed for index, part in enumerate(self.batches) for _ in part])

    def in_order(self, piece: Callable[[int], Parcel]) -> Iterator[tuple[bool, Parcel]]:
        """(held out, what `piece` makes of it) for every batch of all processes. piece: of one of this process's own.

        All processes have to go through all of it.
        """
        for start in range(0, len(self.batches), self.ranks.count):
            turn = start // self.ranks.count
            own = piece(turn) if turn < len(self.calls) else Parcel()
            found = self.ranks.each(own)[: len(self.batches) - start]
            yield from ((start + number >= self.summed, parcel) for number, parcel in enumerate(found))

    def gathered(self) -> list[Tensor]:
        """The hidden states of the reference of every window (length, hidden), those of all processes."""
        parcels = self.in_order(lambda i: Parcel(None, {"states": self.reference[i]}))
        return [states for _, parcel in parcels for states in parcel.tensors["states"]]

    def numbers(self) -> list[Tensor]:
        """The numbers of the windows in each of this process's batches."""
        return self.batches[self.ranks.rank :: self.ranks.count]

    @phase("forward")
    def advance(self, block: int, swap: WeightSwap) -> None:
        """Both streams through the block: the reference with the original weights, the other with the new ones."""
        seen = self._seen_of(block)
        for i, calls in enumerate(self.calls):
            if i in seen.outputs:
                reference = seen.outputs[i]
            else:
                with swap.original():
                    reference = self._run(block, self.reference[i], calls)
            with self._with_finished(i, see=False):
                quantized = self._run(block, self.quantized[i], calls)
            if self._in_place:
                self.reference[i].copy_(reference)
                self.quantized[i].copy_(quantized)
            else:
                self.reference[i], self.quantized[i] = reference, quantized
        self._finished = None

    def forward(self, block: int) -> None:
        """The reference alone through the block as it is loaded, of a model that nothing is done to."""
        for i, calls in enumerate(self.calls):
            found = self._run(block, self.reference[i], calls)
            if self._in_place:
                self.reference[i].copy_(found)
            else:
                self.reference[i] = found

    @phase("forward")
    def remember(self, block: int, order: list[Stage]) -> None:
        """Keep what enters the stages of a block, and leaves it, in the reference, if that is not too much.

        Otherwise what leaves it alone, and if that is too much, nothing: the block runs again each time something of it
        is wanted. No weight of it may have been replaced yet.
        """
        seen = self._seen = Seen(block)
        stages = {id(stage): stage for stage in order if stage.targets[0].expert is None}
        for i, calls in enumerate(self.calls):
            hidden = self.reference[i].to(self.model.device)
            inputs: dict[nn.Module, Tensor] = {}

            def note(module: nn.Module, args: tuple[Any, ...], inputs: dict[nn.Module, Tensor] = inputs) -> None:
                inputs.setdefault(module, args[0])

            watched = [self.model.module(stage.targets[0]) for stage in stages.values()]
            watched += [stage.carrier for stage in stages.values() if isinstance(stage.carrier, nn.Module)]
            handles = [module.register_forward_pre_hook(note) for module in watched]
            with hooked(*handles):
                seen.outputs[i] = self.model.run_block(block, hidden, calls[block])
            for key, stage in stages.items():
                own = hidden if stage.carrier == BLOCK_INPUT else None
                carried = inputs.get(stage.carrier) if isinstance(stage.carrier, nn.Module) else own
                seen.inputs[key, i] = inputs.get(self.model.module(stage.targets[0])), carried
            if seen.nbytes() * len(self.calls) > SEEN_BYTES * (i + 1):
                stages.clear()
                seen.inputs.clear()
                if seen.nbytes() * len(self.calls) > SEEN_BYTES * (i + 1):
                    seen.outputs.clear()
                    return

    @phase("forward")
    def stages(self, block: int) -> list[Stage]:
        """The block's targets in the order in which they are called, those that share one input tensor together.

        Where a batch does not reach all targets, others follow; targets that none reaches are left out.
        """
        run = Discovery(self.model, block)
        for index in range(len(self.batches)):
            batch, process = divmod(index, self.ranks.count)
            if mine := process == self.ranks.rank:
                run.batch(self.reference[batch].to(self.model.device), self.calls[batch][block])
            told = self.ranks.sent(process, Parcel([run.named(stage) for stage in run.found] if mine else None))
            run.found = [run.stage(*named) for named in told.facts]
            if not run.missing:
                break
        return run.found

    def _seen_of(self, block: int) -> Seen:
        if self._seen is None or self._seen.block != block:
            self._seen = Seen(block)
        return self._seen

    def finish(self, block: int, parts: list[nn.Module]) -> None:
        """Tell in which parts of the block at hand nothing will change until the streams have left it."""
        if self._finished is None:
            left = SEEN_BYTES - self._seen_of(block).nbytes()
            self._finished = Finished(len(self.calls), max(0, left))
        self._finished.parts = parts

    def _with_finished(self, i: int, see: bool = True) -> AbstractContextManager[None]:
        return nullcontext() if self._finished is None else self._finished.during(i, see)

    def _run(self, block: int, hidden: Tensor, calls: list[Call]) -> Tensor:
        return self.model.run_block(block, hidden.to(self.model.device), calls[block])

    def statistics(
        self, block: int, stage: Stage, swap: WeightSwap, wanted: Container[str] | None = None
    ) -> Iterator[tuple[Target, Stats]]:
        """Every target of a stage, or those whose names are wanted, with the statistics of its input, in order.

        All processes have to go through all of it, whatever each wants.
        """
        mine = {target.name for target in stage.targets} if wanted is None else wanted
        if stage.targets[0].expert is not None:
            yield from self._of_experts(block, stage, swap, mine)
        else:
            stats = self._of_linears(block, stage, swap)
            yield from ((target, stats) for target in stage.targets if target.name in mine)

    @phase("statistics")
    def _of_linears(self, block: int, stage: Stage, swap: WeightSwap) -> Stats:
        """Statistics of the input that the linears of a stage share."""
        stats = self._empty(stage.targets[0])
        for held, parcel in self.in_order(lambda i: self._into_linears(block, stage, swap, i)):
            self._add(stats, held, parcel.tensors)
        return self._judged(stats, stage)

    def _into_linears(self, block: int, stage: Stage, swap: WeightSwap, i: int) -> Parcel:
        """What enters the linears of a stage in a batch: x and x_ref (.., in); lacking (.., out), where what comes out
        is added to a residual stream: see Stats.

        Where what they put out is added to a residual stream, tokens count as `quieted` says of the sum.
        """
        seen = self._seen_of(block)
        if (id(stage), i) in seen.inputs:
            x_ref, carried_ref = seen.inputs[id(stage), i]
        else:
            reference = self.reference[i].to(self.model.device)
            with swap.original():
                x_ref, carried_ref = self.inputs(block, stage, reference, self.calls[i][block])
        with self._with_finished(i):
            x, carried = self.inputs(block, stage, self.quantized[i].to(self.model.device), self.calls[i][block])
        if x is None or x_ref is None:
            return Parcel()
        if x[..., 0].numel() != self.quantized[i][..., 0].numel():
            return Parcel(None, {"x": x, "x_ref": x})  # an expert as a module: other tokens may be sent to it in either
        unscaled, scale = x_ref, 1.0 if stage.scale is None else stage.scale
        x_ref = x_ref / scale
        if carried is None or carried_ref is None:
            return Parcel(None, {"x": x, "x_ref": x_ref})
        linear = self.model.module(stage.targets[0])
        with swap.original():
            weights = quieted(carried_ref + linear(unscaled))
            w = stage.targets[0].matrix(linear)
        found = {"x": x, "x_ref": x_ref}
        if not stage.crossed:
            moved = (unscaled - x * scale).float()
            found["lacking"] = product(moved.flatten(0, -2), w.float().T).unflatten(0, moved.shape[:-1])
            found["lacking"] += carried_ref - carried
        if (weights < 1).any():
            found = {name: part * weights.to(part.dtype) for name, part in found.items()}
        return Parcel(None, found)

    @phase("forward")
    def inputs(self, block: int, stage: Stage, hidden: Tensor, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """What enters a stage, and the residual stream that its output is added to, where it is."""
        found: list[Tensor] = []
        carried = [hidden] if stage.carrier == BLOCK_INPUT else []

        def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise SeenEnough

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            carried.append(args[0])

        handles = [self.model.module(stage.targets[0]).register_forward_pre_hook(catch)]
        if isinstance(stage.carrier, nn.Module):
            handles.append(stage.carrier.register_forward_pre_hook(note))
        with hooked(*handles):
            self.model.run_block(block, hidden, call)
        return next(iter(found), None), next(iter(carried), None)

    @phase("forward")
    def behind_blocks(self, target: Target) -> Stats | None:
        """Statistics of the input of a linear outside the blocks, once the streams have left the last of them.

        What lies outside must be loaded. None where text does not come through it.
        """

        def piece(i: int) -> Parcel:
            found: list[Tensor] = []

            def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
                found.append(args[0])
                raise SeenEnough

            for stream in (self.reference, self.quantized):
                with hooked(self.model.module(target).register_forward_pre_hook(catch)):
                    self.model.logits(self.tokens[i], stream[i].to(self.model.device))
            return Parcel(None, dict(zip(("x_ref", "x"), found, strict=True)) if len(found) == 2 else {})

        stats = self._empty(target)
        for held, parcel in self.in_order(piece):
            if not parcel.tensors:
                return None
            self._add(stats, held, parcel.tensors)
        return self._judged(stats, Stage([target]))

    def _of_experts(
        self, block: int, stage: Stage, swap: WeightSwap, mine: Container[str]
    ) -> Iterator[tuple[Target, Stats]]:
        """Each expert with the statistics of the tokens sent to it, and of all where those are few.

        As many experts at a time as their tokens may take memory.
        """
        columns, device = stage.targets[0].shape[1], self.model.device
        rest = {target.expert or 0: target for target in stage.targets}
        everything = self._empty(stage.targets[0])
        first = True
        while rest:
            tokens: dict[int, list[tuple[bool, dict[str, Tensor]]]] = {expert: [] for expert in rest}
            for held, parcel in self.in_order(lambda i: self._into_experts(block, stage, swap, i)):
                for expert in parcel.facts:
                    found = {name: parcel.tensors[f"{expert} {name}"] for name in ("x", "x_ref")}
                    if first:
                        self._add(everything, held, found)
                    if expert in tokens:
                        tokens[expert].append((held, found))
                while len(tokens) > 1 and _nbytes(tokens) > EXPERT_BYTES:
                    del tokens[max(tokens)]
            if first:
                self._judged(everything, stage)
            first = False
            for expert in list(tokens):
                pieces, target = tokens.pop(expert), rest.pop(expert)
                if target.name not in mine:
                    continue
                own = Stats.empty(columns, device)
                for held, found in pieces:
                    self._add(own, held, found)
                yield target, own.blended(everything, FEW_HELD)

    def _empty(self, target: Target) -> Stats:
        return Stats.empty(target.shape[1], self.model.device, (self.ranks.rank, self.ranks.count))

    @phase("statistics")
    def _add(self, stats: Stats, held: bool, found: dict[str, Tensor]) -> None:
        """Tokens of a batch to the sums, or to those held out. found: x, x_ref and lacking, as far as there are any."""
        if found and held:
            stats.hold(**found, most=HELD // (len(self.batches) - self.summed))
        elif found:
            stats.update(**found)

    @phase("forward")
    def _into_experts(self, block: int, stage: Stage, swap: WeightSwap, i: int) -> Parcel:
        """What enters each expert of a parameter in batch i, in both streams: the experts, and "expert x" and
        "expert x_ref" (tokens, in).

        In the reference every expert is shown the tokens that the quantized stream sends to it: its router is not
        asked, which would send some elsewhere.
        """
        holder = self.model.module(stage.targets[0])
        leaf = stage.targets[0].parameter.rpartition(".")[2]
        routed: list[Call] = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routed.append((args, kwargs))

        def repeat(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            then_args, then_kwargs = routed[0]
            if args:
                return (args[0], *then_args[1:]), then_kwargs
            hidden = next(iter(kwargs))
            return (), {**then_kwargs, hidden: kwargs[hidden]}

        def enough(*_: Any) -> None:
            raise SeenEnough

        def run(stream: list[Tensor], before: Any) -> dict[int, Tensor]:
            found: dict[int, Tensor] = {}

            def seen(_: str, expert: int | None, transposed: bool, x: Tensor, y: Tensor) -> None:
                found.update(enumerate(x) if expert is None else {expert: x})

            handles = [
                holder.register_forward_pre_hook(before, with_kwargs=True),
                holder.register_forward_hook(enough),
            ]
            with hooked(*handles), Watch({"": holder.get_parameter(leaf)}, seen):
                self._run(block, stream[i], self.calls[i])
            return found

        with self._with_finished(i):
            found = run(self.quantized, remember)
        with swap.original():
            reference = run(self.reference, repeat)
        pairs = {"x": found, "x_ref": reference}
        tensors = {f"{expert} {name}": xs[expert] for expert in found for name, xs in pairs.items()}
        return Parcel(list(found), tensors)

    @phase("forward")
    def output(self, block: int, name: str, hidden: Tensor, call: Call) -> Tensor:
        """What the module of that name in memory puts out when the block runs; of several things, the first."""
        found: list[Tensor] = []

        def catch(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple | list) else output)
            raise SeenEnough

        with hooked(self.model.model.get_submodule(name).register_forward_hook(catch)):
            self.model.run_block(block, hidden.to(self.model.device), call)
        return found[0]

    @phase("forward")
    def block_error(self, block: int, swap: WeightSwap, curvature: Tensor | None) -> float:
        """How far the block's outputs, as it is now, are from the reference on held-out tokens: the mean of e^T G e.

        curvature (blocks, b, b): G along the diagonal, of the loss in the block's outputs; None: the identity.
        """
        own: list[tuple[float, int]] = []
        outputs = self._seen_of(block).outputs
        for i in range(len(self.calls)):
            if not self.held[i]:
                own.append((0.0, 0))
                continue
            if i not in outputs:
                with swap.original():
                    outputs[i] = self._run(block, self.reference[i], self.calls[i])
            with self._with_finished(i):
                found = self._run(block, self.quantized[i], self.calls[i])
            error = ((found - outputs[i]).float() * quieted(outputs[i])).flatten(0, -2)
            error = error[torch.isfinite(error).all(-1)]
            own.append((_in_metric(error, curvature), len(error)))
        totals, tokens = zip(*self.ranks.interleaved(own), strict=True)
        return sum(totals) / max(1, sum(tokens))

    @phase("forward")
    def outputs(self, block: int, swap: WeightSwap) -> list[Tensor]:
        """What the block puts out in the reference, for the batches that are not held out."""
        with swap.original():
            return [
                self._run(block, self.reference[i], calls) for i, calls in enumerate(self.calls) if not self.held[i]
            ]

    @phase("forward")
    def gradient(
        self, block: int, batch: int, wanted: Tensor, targets: list[Target]
    ) -> tuple[float, dict[str, Tensor]]:
        """Of one of this process's batches that is not held out: the mean square of what the block's outputs, as it is
        now, lack of `wanted`, and the gradient of its sum in the weights (out, in) of `targets`, by name.
        """
        weights = [self.model.model.get_parameter(target.parameter) for target in targets]
        try:
            for weight in weights:
                weight.requires_grad_()
            with torch.enable_grad():
                found = self._run(block, self.quantized[batch], self.calls[batch])
                error = (found - wanted.to(found.device)).float()
                error = error[torch.isfinite(error.detach()).all(-1)]
                loss = error.square().sum()
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        by_name = {
            target.name: target.seen(torch.zeros_like(weight) if gradient is None else gradient).float()
            for target, weight, gradient in zip(targets, weights, gradients, strict=True)
        }
        return float(loss.detach()) / max(1, error.numel()), by_name

    def _judged(self, stats: Stats, stage: Stage) -> Stats:
        """The sums of all processes, if not too many tokens had to be left out of them."""
        names = ", ".join(target.name for target in stage.targets)
        if stats.dropped > MAX_DROPPED * (stats.tokens + stats.dropped):
            raise DataError(
                f"{names}: {stats.dropped} of {stats.tokens + stats.dropped} calibration tokens give inputs that are "
                "NaN or Inf: the model overflows in its own type; try --dtype float32, or --quality fast, which needs "
                "no calibration"
            )
        stats.put_together(self.ranks.spread)
        return stats


def quieted(hidden: Tensor) -> Tensor:
    """By what errors of hidden states (windows, length, width) count, (windows, length, 1) float32, at most 1.

    What reads the residual stream divides each token by its size. In large models some tokens, mostly the first, are a
    hundred times as large as the others between two blocks (arXiv:2402.17762): by their size their errors would drown
    all that the loss feels. Beyond LOUD times the median of their window errors count relative to the size.
    """
    size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    median = size.nanmedian(dim=-2, keepdim=True).values
    return torch.where(size > LOUD * median, (LOUD * median / size), 1.0).where(median > 0, 1.0)


def summed_windows(count: int) -> int:
    """How many of `count` windows enter the sums: all but the last eighth, or but one of a few."""
    return count - max(count // 8, count >= FEW)


def _written(hidden: Tensor, folder: Path) -> Tensor:
    """A copy in a file of the folder."""
    return room(tuple(hidden.shape), hidden.dtype, folder).copy_(hidden)


@dataclass
class Seen:
    """What the reference shows of a block: by stage (its id) and batch its input and residual stream; and outputs."""

    block: int
    inputs: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def nbytes(self) -> int:
        held = [tensor for pair in self.inputs.values() for tensor in pair] + [*self.outputs.values()]
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def _nbytes(tokens: dict[int, list[tuple[bool, dict[str, Tensor]]]]) -> int:
    return sum(x.nbytes for pieces in tokens.values() for _, found in pieces for x in found.values())


def _in_metric(error: Tensor, curvature: Tensor | None) -> float:
    """The sum over rows e of error (tokens, size) of e^T G e."""
    if curvature is None:
        return energy(error)
    count, width, _ = curvature.shape
    parts = nn.functional.pad(error, (0, count * width - error.shape[1])).unflatten(1, (count, width)).transpose(0, 1)
    return float(((parts @ curvature.to(error.device)) * parts).sum(dtype=torch.float64))


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
