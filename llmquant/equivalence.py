"""Where in a block a scale can be moved between two parts without changing what the block computes.

If a norm's weight is divided by s and the columns of all linears that read it are multiplied by s, nothing changes but
what rounding does to them; and so with a linear whose outputs reach the next one each multiplied by something, as a
value that attention averages or one side of a gate. Such places are found by running the block and comparing tensors,
and believed only when it puts out the same after a scale was moved there: no table of architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams
from llmquant.hooks import hooked
from llmquant.matrices import Target, target_of
from llmquant.stages import Stage
from llmquant.swap import WeightSwap

TOLERANCE = 1e-4  # of what the block adds to its input, in float32
ROUNDING = 1e-6  # of what the block puts out: float32 has no more to give where it adds little
TOKENS = 64  # that a block is tried on


Candidate = tuple[str, Tensor, float | None]
"""(source, rows, offset) of a Place."""


@dataclass(frozen=True)
class Place:
    """A scale s (sources,) can be moved from `source`, whose outputs are divided by it, to the columns of `readers`.

    source: the name in memory of a norm, or of a linear whose rows are meant; readers: those of all targets that read
    it. rows: (in,) int64, for each of their columns the output of the source that it scales with. offset: what a norm
    adds to its weight before it multiplies; None for a linear.
    """

    source: str
    readers: tuple[str, ...]
    rows: Tensor
    offset: float | None

    @property
    def sources(self) -> int:
        """How many outputs the source has."""
        return int(self.rows.max()) + 1

    def columns(self, scale: Tensor) -> Tensor:
        """The scale (sources,) of the readers' columns (in,)."""
        return scale[self.rows.to(scale.device)]

    def divided(self, model: StreamedModel, scale: Tensor) -> dict[str, Tensor]:
        """{name in memory: value} of the source's parameters once its outputs are divided by the scale (sources,)."""
        module = model.model.get_submodule(self.source)
        target = target_of(self.source, module)
        if target is None:
            assert self.offset is not None
            weight = (module.get_parameter("weight").float() + self.offset) / scale - self.offset
        else:
            weight = target.stored(target.matrix(module).float() / scale[:, None])
        found = {f"{self.source}.weight": weight}
        if getattr(module, "bias", None) is not None:
            found[f"{self.source}.bias"] = module.get_parameter("bias").float() / scale
        return found


def find_all(model: StreamedModel) -> Iterator[list[Place]]:
    """The places of block after block of a model in float32, found on random tokens; loaded when it is their turn."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    streams = Streams.start(
        model, torch.randint(vocabulary, (2, TOKENS // 2), generator=generator), 2, lambda done, total: None
    )
    for block in range(len(model.block_names)):
        with model.loaded(block):
            found = find(streams, block)
            streams.advance(block, WeightSwap())
        yield found


def find(streams: Streams, block: int) -> list[Place]:
    """The places of a loaded block, in the order of the forward pass, as its first batch shows them.

    streams: of a model in float32, about to enter the block.
    """
    model = streams.model
    hidden, call = streams.reference[0].to(model.device), streams.calls[0][block]
    run = partial(model.run_block, block, hidden, call)
    order = [stage for stage in streams.stages(block) if stage.targets[0].expert is None]
    name = model.block_names[block]
    norms = norms_read(model.model.get_submodule(name).named_modules(prefix=name), run)
    found = []
    for index, stage in enumerate(order):
        candidates: list[Candidate] = [norms[stage.targets[0].name]] if stage.targets[0].name in norms else []
        if not candidates:
            earlier = [target for before in order[:index] for target in before.targets]
            candidates += _linears(streams, block, stage, reversed(earlier))
        for source, rows, offset in candidates:
            place = Place(source, tuple(target.name for target in stage.targets), rows, offset)
            if _stored(model, place) and _holds(model, place, stage, hidden, run):
                found.append(place)
                break
    return found


def same(found: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Whether a block still makes of `before` what it did, but for rounding in float32."""
    allowed = TOLERANCE * (expected - before).norm() + ROUNDING * expected.norm()
    return bool((found - expected).norm() <= allowed)


@contextmanager
def in_place(model: StreamedModel, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters, by name in memory, hold these values meanwhile."""
    parameters = {name: model.model.get_parameter(name) for name in values}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(originals[name].dtype)
        yield
    finally:
        for name, original in originals.items():
            parameters[name].data = original


def norm_offset(norm: nn.Module, args: tuple[Any, ...]) -> float | None:
    """What the norm adds to its weight before it multiplies by it, 0 or 1; None where it is used in another way."""
    weight = norm.get_parameter("weight").data
    twin = deepcopy(norm)
    outputs = []
    for value in (torch.zeros_like(weight), torch.ones_like(weight), weight):
        twin.get_parameter("weight").data = value
        outputs.append(twin(*args))
    none, one, found = outputs
    bias = norm.get_parameter("bias").data if getattr(norm, "bias", None) is not None else 0.0
    normed = one - none
    for offset in (0.0, 1.0):
        expected = [normed * offset + bias, normed * (weight + offset) + bias]
        close = [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip((none, found), expected, strict=True)]
        if all(close):
            return offset
    return None


def norms_read(modules: Iterable[tuple[str, nn.Module]], run: Callable[[], Tensor]) -> dict[str, Candidate]:
    """{target: norm} of those among the modules (name, module) that read what a norm puts out, the tensor itself.

    run: makes the modules run.
    """
    made: list[tuple[str, nn.Module, tuple[Any, ...], Tensor]] = []
    reads: dict[str, Tensor] = {}
    handles = []
    for name, module in modules:
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if target_of(name, module) is not None:
            handles.append(module.register_forward_pre_hook(partial(_note_read, reads, name)))
        elif weight is not None and weight.ndim == 1:
            handles.append(module.register_forward_hook(partial(_note_made, made, name)))
    with hooked(*handles):
        run()
    found: dict[str, Candidate] = {}
    for target, read in reads.items():
        for norm, module, args, output in made:
            whole = output.data_ptr() == read.data_ptr() and output.shape == read.shape  # perhaps as a view
            if whole and len(module.get_parameter("weight")) == read.shape[-1]:
                offset = norm_offset(module, args)
                if offset is not None:
                    found[target] = norm, torch.arange(read.shape[-1]), offset
    return found


def _note_read(reads: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
    reads[name] = args[0]


def _note_made(
    made: list[tuple[str, nn.Module, tuple[Any, ...], Tensor]],
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> None:
    if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
        made.append((name, module, args, output))


def _linears(streams: Streams, block: int, stage: Stage, earlier: Iterator[Target]) -> Iterator[Candidate]:
    """Linears each of whose outputs multiplies some columns of what the stage reads.

    Every output is multiplied by another factor; the columns then say themselves which one they were multiplied by.
    """
    model = streams.model
    hidden, call = streams.reference[0], streams.calls[0][block]
    before, _ = streams.inputs(block, stage, hidden, call)
    for target in earlier:
        count, columns = target.shape[0], stage.targets[0].shape[1]
        if before is None or columns % count:
            continue
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        factors = torch.exp2(2 * shuffled / count - 1).to(model.device)
        place = Place(target.name, (), torch.arange(count), None)
        with in_place(model, place.divided(model, 1 / factors)):
            after, _ = streams.inputs(block, stage, hidden, call)
        assert after is not None
        rows = _which(before.flatten(0, -2), after.flatten(0, -2), factors)
        if rows is not None:
            yield target.name, rows.cpu(), None


def _which(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """For each column the index of the factor (n,) that takes `before` (tokens, columns) to `after`.

    None where some column has none, or some factor no column.
    """
    energy = before.square().sum(0)
    ratio = (before * after).sum(0) / energy
    ordered, order = factors.sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    rows = order[torch.bucketize(ratio, middles)]
    missed = (after - before * factors[rows]).square().sum(0)
    # A column that is zero for all tokens says nothing; one that took part in anything else misses its factor.
    if not (energy > 0).all() or not (missed <= 1e-9 * energy).all():
        return None
    return rows if len(rows.unique()) == len(factors) else None


def _stored(model: StreamedModel, place: Place) -> bool:
    """Whether the checkpoint has what would change, under names of its own."""
    module = model.model.get_submodule(place.source)
    changed = [name for name, _ in module.named_parameters(prefix=place.source, recurse=False)]
    return all(model.source_key(name) is not None for name in changed)


def _holds(model: StreamedModel, place: Place, stage: Stage, hidden: Tensor, run: Callable[[], Tensor]) -> bool:
    """Whether the block puts out the same after some scale was moved."""
    expected = run()
    generator = torch.Generator().manual_seed(1)
    scale = torch.exp2(2 * torch.rand(place.sources, generator=generator) - 1).to(model.device)
    columns = place.columns(scale)
    values = place.divided(model, scale)
    for target in stage.targets:
        matrix = target.matrix(model.module(target))
        values[f"{target.name}.weight"] = target.stored(matrix * columns)
    with in_place(model, values):
        return same(run(), expected, hidden)
