"""How the loss curves in the outputs of every linear: one backward pass, with one block in memory at a time.

Let g be the gradient of the loss with respect to what a linear puts out at one token. G = E[g g^T], (out, out), is the
output side of the Kronecker-factored Fisher information (K-FAC, arXiv 1503.05671): with H = E[x x^T] of the inputs, a
change D (out, in) of the weight costs the model about tr(G D H D^T) / 2.

The loss is the cross-entropy, summed over all tokens, of labels drawn from the model's own predictions: that makes it
the true Fisher information of the model, and not the empirical one, which the errors of the text would enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmquant.blocks import Call, StreamedModel
from llmquant.calibration import Streams
from llmquant.errors import PlanError
from llmquant.experts import Watch
from llmquant.hooks import hooked
from llmquant.offload import room
from llmquant.ranks import SINGLE, Parcel, Ranks
from llmquant.stats import finite_rows

CHUNK_BYTES = 2**26  # of float32 logits that exist at once
# For float16, in which the smallest gradients would be lost; those of a thousand still fit, and few are above ten.
# A power of two, so that it changes no digit in the other types.
LOSS_SCALE = 2.0**6


@dataclass(frozen=True)
class Curvature:
    """G of one linear, as much of it as lies in square blocks along the diagonal.

    blocks: (ceil(out / b), b, b) float32: block i holds the rows and columns i b to (i + 1) b of G; rows of the last
        one that lie beyond `out` are those of the identity.
    rows: out. tokens: how many the mean is over. dropped: how many were left out because g held NaN or Inf.
    """

    blocks: Tensor
    rows: int
    tokens: int
    dropped: int


def _silent(done: int, total: int) -> None:
    """The progress of a run that nobody watches."""


@torch.no_grad()
def curvature(
    model: StreamedModel,
    windows: Tensor,
    *,
    batch: int = 8,
    seed: int = 0,
    block: int = 32,
    full_limit: int = 512,
    spill: Path | None = None,
    memory: int = 2**32,
    ranks: Ranks = SINGLE,
    progress: Callable[[int, int], None] = _silent,
) -> dict[str, Curvature]:
    """G of the output of every target and of every block, by name, in the model's order.

    A target that no gradient reaches, as an expert that is never chosen, has no entry.

    windows: (n, length) int64; batch: how many of them run at once, which does not change the labels drawn.
    block: rows of a block of G; up to full_limit rows, G is one block.
    spill: a folder for the hidden states that enter the blocks, should they need more than `memory` bytes.
    ranks: the processes that share the windows; all of them get G. progress: blocks passed, of all; every block is
    passed twice.
    Nothing of the model is loaded before, or after. Raises PlanError where blocks hand on more than hidden states, and
    OutputError where those cannot be written to `spill`.
    """
    depth = len(model.block_names)
    streams = Streams.start(model, windows, batch, _silent, ranks=ranks)
    failed = None
    try:
        states, calls = _room(streams, spill, memory)
        for index in range(depth):
            with model.loaded(index):
                _forward(model, index, states[index], states[index + 1], calls[index])
            progress(index + 1, 2 * depth)
    except PlanError as error:
        failed = str(error)
    for parcel in ranks.each(Parcel(failed)):  # by which all come to know it
        if parcel.facts is not None:
            raise PlanError(parcel.facts)
    _head(streams, states[depth], seed)
    width = max(ranks.interleaved([states[0][0].shape[-1] if states[0] else 0]))  # some may have no windows
    found: dict[str, Curvature] = {}
    for index in reversed(range(depth)):
        targets = model.targets(index).values()
        sizes = {target.name: target.shape[0] for target in targets} | {model.block_names[index]: width}
        sums = {name: _Sum(size, block, full_limit, model.device) for name, size in sizes.items()}
        with model.loaded(index):
            _backward(streams, index, states[index], states[index + 1], calls[index], sums)
        found = {**{name: total.mean() for name, total in sums.items() if total.tokens}, **found}
        progress(2 * depth - index, 2 * depth)
    return found


def save(found: dict[str, Curvature], path: Path) -> None:
    """Write what `curvature` returned as one safetensors file, which appears under its name when it is complete."""
    tensors = {name: part.blocks for name, part in found.items()}
    # Not as metadata, whose order in the file changes from run to run.
    counts = {f"{name}/counts": torch.tensor([part.rows, part.tokens, part.dropped]) for name, part in found.items()}
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors | counts, temporary, {"format": "pt"})
    temporary.replace(path)


def load(path: Path) -> dict[str, Curvature]:
    """What `save` wrote."""
    tensors = load_file(path)
    names = [name for name in tensors if f"{name}/counts" in tensors]
    return {name: Curvature(tensors[name], *tensors[f"{name}/counts"].tolist()) for name in names}


def _room(streams: Streams, spill: Path | None, memory: int) -> tuple[list[tuple[Tensor, ...]], list[list[Call]]]:
    """Room for the hidden states that enter each block and leave the last one, and how each is called: by batch.

    Those that enter the first block are in place. All are views of one tensor (blocks + 1, n, length, hidden).
    """
    depth, sizes = len(streams.model.block_names), [len(hidden) for hidden in streams.reference]
    if not sizes:
        return [()] * (depth + 1), [[]] * depth
    shape, dtype = streams.reference[0].shape, streams.reference[0].dtype
    if len(shape) != 3 or sizes != [len(tokens) for tokens in streams.tokens]:
        name = streams.model.block_names[0]
        raise PlanError(f"{name}: its hidden states, {tuple(shape)}, are not (batch, tokens, size)")
    shape = torch.Size((depth + 1, sum(sizes), *shape[1:]))
    states = [
        part.split(sizes) for part in room(shape, dtype, spill if shape.numel() * dtype.itemsize > memory else None)
    ]
    for entering, hidden in zip(states[0], streams.reference, strict=True):
        entering.copy_(hidden)
    streams.reference.clear()
    streams.quantized.clear()
    return states, [[of_batch[index] for of_batch in streams.calls] for index in range(depth)]


def _forward(
    model: StreamedModel, index: int, before: tuple[Tensor, ...], after: tuple[Tensor, ...], calls: list[Call]
) -> None:
    """Run a block on the hidden states `before` it, batch by batch, and write what leaves it to `after`."""
    for entering, leaving, call in zip(before, after, calls, strict=True):
        given = [id(tensor) for tensor in _tensors(call)]
        leaving.copy_(model.run_block(index, entering.to(model.device), call))
        if [id(tensor) for tensor in _tensors(call)] != given:
            # Some models keep keys and values for later blocks: the gradient with respect to those would be missed.
            raise PlanError(f"{model.block_names[index]} hands on more than hidden states: there is no curvature of it")


def _tensors(part: Any) -> Iterator[Tensor]:
    """All tensors in a nest of arguments."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Mapping | list | tuple):
        for inner in part.values() if isinstance(part, Mapping) else part:
            yield from _tensors(inner)


def _head(streams: Streams, states: tuple[Tensor, ...], seed: int) -> None:
    """Replace the hidden states that leave the last block by the gradients of the loss there.

    What comes after the blocks treats each token by itself, so it can run on any piece of a window.
    """
    # Drawn in advance, for all tokens: the labels then depend neither on the device nor on how tokens are batched.
    model, generator = streams.model, torch.Generator().manual_seed(seed)
    draws = 1 - torch.rand(streams.shape, dtype=torch.float64, generator=generator)
    length = max(1, CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size))
    batches = zip(streams.tokens, states, (draws[numbers] for numbers in streams.numbers()), strict=True)
    single = [window for parts in batches for window in zip(*(part.split(1) for part in parts), strict=True)]
    with model.loaded(None):
        for window in single:
            for tokens, hidden, draw in zip(*(part.split(length, dim=1) for part in window), strict=True):
                with torch.enable_grad():
                    leaf = hidden.to(model.device).detach().requires_grad_()
                    logits = model.logits(tokens, leaf).float()
                    labels = _sample(logits.detach(), draw.to(model.device))
                    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                    (gradient,) = torch.autograd.grad(LOSS_SCALE * loss, leaf)
                hidden.copy_(gradient)


def _sample(logits: Tensor, draws: Tensor) -> Tensor:
    """The tokens at which the distributions of logits (..., vocabulary) first reach draws (...), uniform in (0, 1].

    As no draw is 0 and none above 1, no token without probability is ever drawn.
    """
    distribution = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    labels = torch.searchsorted(distribution, draws[..., None] * distribution[..., -1:])[..., 0]
    return labels.clamp_max(logits.shape[-1] - 1)  # where the logits are NaN


def _backward(
    streams: Streams,
    index: int,
    before: tuple[Tensor, ...],
    after: tuple[Tensor, ...],
    calls: list[Call],
    sums: dict[str, _Sum],
) -> None:
    """Replace the hidden states `before` a block by their gradients, given those of what leaves it in `after`.

    On the way the gradients of the outputs of linears, and of the block, of all processes, are added to `sums`, {name:
    sum}, those of one batch after the other.
    """
    model = streams.model
    targets = model.targets(index).values()
    parts: dict[str, _Sum] = {}  # of one batch
    linears = {target.name: model.module(target) for target in targets if target.expert is None}
    handles = [part.register_forward_hook(partial(_watch, parts, name)) for name, part in linears.items()]
    stacks = {t.parameter: model.model.get_parameter(t.parameter) for t in targets if t.expert is not None}

    def multiplied(name: str, expert: int | None, transposed: bool, x: Tensor, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(partial(_add_experts, parts, name, expert))

    def piece(i: int) -> Parcel:
        parts.update({name: total.empty() for name, total in sums.items()})
        parts[model.block_names[index]].add(after[i])
        with torch.enable_grad():
            leaf = before[i].to(model.device).detach().requires_grad_()
            with Watch(stacks, multiplied):
                output = model.run_block(index, leaf, calls[i])
            (gradient,) = torch.autograd.grad(output, leaf, after[i].to(output))
        before[i].copy_(gradient)
        seen = {name: part for name, part in parts.items() if part.tokens or part.dropped}
        counts = {name: (part.tokens, part.dropped) for name, part in seen.items()}
        return Parcel(counts, {name: part.blocks for name, part in seen.items()})

    with hooked(*handles):
        for _, parcel in streams.in_order(piece):
            for name, blocks in parcel.tensors.items():
                sums[name].include(blocks, *parcel.facts[name])


def _watch(sums: dict[str, _Sum], name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """A forward hook: have the gradient of the output added as soon as it is known, so that it is not kept."""
    if output.requires_grad:
        output.register_hook(sums[name].add)


def _add_experts(sums: dict[str, _Sum], name: str, expert: int | None, gradient: Tensor) -> None:
    for number, own in enumerate(gradient) if expert is None else [(expert, gradient)]:
        sums[f"{name}.{number}"].add(own)


class _Sum:
    """The sum over tokens of the diagonal blocks of g g^T, for g of `rows` entries."""

    def __init__(self, rows: int, block: int, full_limit: int, device: torch.device) -> None:
        width = rows if rows <= full_limit else block
        self.rows, self.tokens, self.dropped = rows, 0, 0
        shape = math.ceil(rows / width), width, width
        self.blocks = torch.zeros(shape, dtype=torch.float64, device=device)  # float32 loses digits over many batches

    def add(self, gradient: Tensor) -> None:
        """Add the tokens of (..., rows); those that are not finite are left out and counted."""
        g = gradient.flatten(0, -2).float()
        finite = finite_rows(g)
        if not finite.all():
            self.dropped += int((~finite).sum())
            g = g[finite]
        self.tokens += len(g)
        count, width, _ = self.blocks.shape
        if short := count * width - self.rows:
            g = nn.functional.pad(g, (0, short))
        g = g.unflatten(1, (count, width)).transpose(0, 1)
        self.blocks += g.mT @ g

    def empty(self) -> _Sum:
        """Such a sum over nothing."""
        found = copy(self)
        found.tokens, found.dropped, found.blocks = 0, 0, torch.zeros_like(self.blocks)
        return found

    def include(self, blocks: Tensor, tokens: int, dropped: int) -> None:
        """Add what another sum is over."""
        self.blocks += blocks
        self.tokens += tokens
        self.dropped += dropped

    def mean(self) -> Curvature:
        blocks = (self.blocks / (self.tokens * LOSS_SCALE**2)).float()
        count, width, _ = blocks.shape
        blocks[-1].diagonal()[self.rows - (count - 1) * width :] = 1
        return Curvature(blocks.cpu(), self.rows, self.tokens, self.dropped)
