"""Rotations folded into the weights: the same model in another basis, in which no weight stands out.

Hidden states may be expressed in any orthogonal basis if all that writes to the residual stream writes in it, and all
that reads from it undoes it; the values of a head likewise. In a random one weights are near to normal, and outliers
are spread (S. Ashkboos et al., "QuaRot", arXiv:2404.00456, section 4: its R1, and the part of its attention heads). A
rotated model is an ordinary checkpoint: nothing is computed when it runs. Whether a model allows it is not looked up
but tried, block by block, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from llmquant import equivalence
from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams
from llmquant.checkpoint import Checkpoint
from llmquant.errors import PlanError
from llmquant.swap import WeightSwap

MODES = ("none", "value", "residual")
AUTO = "auto"  # the one of them that is found to be best (see trial.py)


@dataclass(frozen=True)
class Rotation:
    """A random orthogonal matrix R (size, size): random signs, then a Hadamard matrix times, where the size is no power
    of two, a small orthogonal one: the Kronecker product of both. It takes size * log(size) operations to apply.
    """

    size: int
    seed: int

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """Signs (size,), and the orthogonal matrix of the size's odd part."""
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(2, (self.size,), generator=generator) * 2.0 - 1
        odd = self.size // (self.size & -self.size)
        dense = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
        return signs, torch.linalg.qr(dense).Q.float()

    def __call__(self, x: Tensor) -> Tensor:
        """x R for x (..., n) float32; where n is a multiple of the size, every piece of that size."""
        signs, dense = (part.to(x.device) for part in self._parts)
        pieces = x.unflatten(-1, (-1, self.size)) * signs
        pieces = pieces.unflatten(-1, (-1, len(dense)))  # (..., power of two, odd part)
        power, span = pieces.shape[-2], 1
        while span < power:  # butterflies
            halves = pieces.unflatten(-2, (-1, 2, span))
            first, second = halves[..., 0, :, :], halves[..., 1, :, :]
            pieces = torch.stack([first + second, first - second], -3).flatten(-4, -2)
            span *= 2
        if len(dense) > 1:
            pieces = pieces @ dense
        return (pieces / math.sqrt(power)).reshape(x.shape)


@dataclass(frozen=True)
class Edit:
    """How one tensor of a checkpoint becomes that of the rotated model.

    columns: of a matrix (out, in), the rotation of what it reads, whose columns are first multiplied by a norm's weight
    plus an offset: gain, (the norm's own name in the checkpoint, offset). rows: the rotation of what it puts out, for
    its bias too. constant: the tensor becomes this value throughout, as the weight of that norm.
    """

    columns: Rotation | None = None
    rows: Rotation | None = None
    gain: tuple[str, float] | None = None
    constant: float | None = None
    transposed: bool = False

    def __call__(self, tensor: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """The new value, float32. read: other tensors of the checkpoint by name."""
        w = tensor.float()
        if self.constant is not None:
            return torch.full_like(w, self.constant)
        w = w.t() if self.transposed else w
        if self.gain is not None:
            name, offset = self.gain
            w = w * (read(name).to(w) + offset)
        if self.columns is not None:
            w = self.columns(w)
        if self.rows is not None:
            w = self.rows(w) if w.ndim == 1 else self.rows(w.t()).t()
        return (w.t() if self.transposed else w).contiguous()


class RotatedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are edited when they are read, in the types in which they are stored.

    copies: {new name: the tensor that it is a copy of}, of a head that is no longer the embedding.
    """

    def __init__(self, base: Checkpoint, edits: Mapping[str, Edit], copies: Mapping[str, str]) -> None:
        super().__init__(base.folder)
        self.edits, self.copies = dict(edits), dict(copies)
        self.untied = bool(copies)
        for name, source in copies.items():
            self._file_of[name] = self._file_of[source]
            self._shape[name], self._dtype[name] = self._shape[source], self._dtype[source]
        self.notes = tuple(
            f"rotating the residual stream gives the head a weight of its own, {name}, of {self.nbytes(name):,} bytes"
            for name in copies
        )

    @contextmanager
    def slices(self, names: list[str]) -> Iterator[dict[str, Any]]:
        sources = {name: self.copies.get(name, name) for name in names}
        gains = {edit.gain[0] for name in names if (edit := self.edits.get(name)) and edit.gain}
        with super().slices([*{*sources.values(), *gains}]) as found:

            def read(name: str) -> Tensor:
                return found[name][:]

            yield {name: self._slice(name, found[source], read) for name, source in sources.items()}

    def _slice(self, name: str, piece: Any, read: Callable[[str], Tensor]) -> Any:
        return _Edited(piece, self.edits[name], read) if name in self.edits else piece

    def config(self) -> dict[str, Any]:
        config = super().config()
        if self.copies:
            for part in (config, config.get("text_config", {})):
                if part is config or "tie_word_embeddings" in part:
                    part["tie_word_embeddings"] = False
        return config


@dataclass(frozen=True)
class _Edited:
    """Stands for a tensor that is read, and edited, when it is indexed."""

    piece: Any
    edit: Edit
    read: Callable[[str], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self.piece[:]
        return self.edit(tensor, self.read).to(tensor.dtype)[index]


# ---- which tensors


def opened(
    checkpoint: Checkpoint,
    mode: str,
    seed: int,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **loading: Any,
) -> tuple[Checkpoint, StreamedModel]:
    """A checkpoint, rotated where the mode is not "none", and its model. loading: what else a StreamedModel takes.

    Raises PlanError for an unknown mode, and as `rotated` does.
    """
    if mode not in MODES:
        raise PlanError(f"rotation {mode!r} is unknown: choose one of {', '.join((*MODES, AUTO))}")
    if mode != "none":
        tried = StreamedModel(checkpoint, dtype=torch.float32, **loading)
        checkpoint = rotated(checkpoint, tried, mode, seed, progress)
    return checkpoint, StreamedModel(checkpoint, dtype=dtype, untied=checkpoint.untied, **loading)


def rotated(
    checkpoint: Checkpoint, model: StreamedModel, mode: str, seed: int, progress: Callable[[int, int], None]
) -> RotatedCheckpoint:
    """The checkpoint with the values of every head rotated, and with mode "residual" the residual stream too.

    model: the checkpoint's, in float32; one block at a time is loaded and tried. progress: blocks done, of all.
    Raises PlanError where the model is another one in a rotated basis, and says why.
    """
    if not model.causal:
        raise PlanError(f"{type(model.model).__name__} is no causal language model: only those are rotated")
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, equivalence.TOKENS // 2), generator=torch.Generator().manual_seed(seed))
    streams = Streams.start(model, ids, 2, lambda done, total: None)
    residual = Rotation(streams.reference[0].shape[-1], seed) if mode == "residual" else None
    edits: dict[str, Edit] = {}
    embedded = streams.reference[0]
    for block in range(len(model.block_names)):
        with model.loaded(block):
            trial = _Trial(streams, block)
            trial.values(seed + block + 1)
            if residual is not None:
                trial.residual(residual)
            edits |= trial.edits
            streams.advance(block, WeightSwap())
        progress(block + 1, len(model.block_names))
    if not edits:
        raise PlanError(
            f"{type(model.model).__name__} has no linear that makes the values of heads and nothing else: choose "
            "--rotate none"
        )
    copies = {}
    if residual is not None:
        outside, untied = _outside(model, residual, ids, embedded, streams.reference[0])
        edits |= outside
        copies = {name: _key(model, source) for name, source in untied.items()}
    return RotatedCheckpoint(
        checkpoint, {_key(model, name): _named(model, edit) for name, edit in edits.items()}, copies
    )


def _key(model: StreamedModel, name: str) -> str:
    tied = model.model.all_tied_weights_keys
    key = model.source_key(name)
    if key is None and name in tied:
        return name  # which the checkpoint is about to get
    if key is None:
        raise PlanError(f"{name} cannot be rotated: the checkpoint stores it in pieces or merged with others")
    return key


def _named(model: StreamedModel, edit: Edit) -> Edit:
    """With the name that the checkpoint has for the norm."""
    return edit if edit.gain is None else replace(edit, gain=(_key(model, edit.gain[0]), edit.gain[1]))


class _Trial:
    """The edits of one block, by the names of parameters in memory, each kind tried on the block's own output."""

    def __init__(self, streams: Streams, block: int) -> None:
        self.model, self.block = streams.model, block
        self.hidden, self.call = streams.reference[0], streams.calls[0][block]
        self.expected = self._run(self.hidden)
        self.places = equivalence.find(streams, block)
        self.targets = self.model.targets(block)
        self.edits: dict[str, Edit] = {}

    def _run(self, hidden: Tensor) -> Tensor:
        return self.model.run_block(self.block, hidden, self.call)

    def values(self, seed: int) -> None:
        """Rotate what a head's values are averaged into, and with them the columns that read it, if that is right."""
        config = self.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for place in self.places:
            heads = place.rows.view(-1, size) if len(place.rows) % size == 0 else place.rows[:, None]
            whole = torch.equal(heads, heads[:, :1] + torch.arange(size)) and not (heads[:, 0] % size).any()
            if place.offset is not None or not whole:
                continue
            edits: dict[str, Edit] = dict(self.edits)
            rotation = Rotation(size, seed)
            self._writes(edits, place.source, rotation)
            for reader in place.readers:
                self._reads(edits, reader, rotation, None)
            with equivalence.in_place(self.model, values(self.model, edits)):
                if equivalence.same(self._run(self.hidden), self.expected, self.hidden):
                    self.edits = edits

    def residual(self, rotation: Rotation) -> None:
        """Rotate what the block reads and writes. Raises PlanError where it then does something else."""
        edits = dict(self.edits)
        norms = [place for place in self.places if place.offset is not None]
        readers = {reader for place in norms for reader in place.readers}
        for place in norms:
            assert place.offset is not None
            edits[f"{place.source}.weight"] = Edit(constant=1 - place.offset)
            for reader in place.readers:
                self._reads(edits, reader, rotation, (f"{place.source}.weight", place.offset))
        for name, target in self.targets.items():
            if name not in readers and target.shape[0] == rotation.size and target.expert is None:
                self._writes(edits, name, rotation)
        with equivalence.in_place(self.model, values(self.model, edits)):
            found = self._run(rotation(self.hidden))
        if not equivalence.same(found, rotation(self.expected), rotation(self.hidden)):
            name, reason = self.model.block_names[self.block], self._reason(rotation)
            raise PlanError(f"{name}: its residual stream cannot be rotated: {reason}: choose --rotate value or none")
        self.edits = edits

    def _reads(self, edits: dict[str, Edit], name: str, rotation: Rotation, gain: tuple[str, float] | None) -> None:
        old = edits.get(f"{name}.weight", Edit(transposed=self.targets[name].transposed))
        edits[f"{name}.weight"] = replace(old, columns=rotation, gain=gain)

    def _writes(self, edits: dict[str, Edit], name: str, rotation: Rotation) -> None:
        old = edits.get(f"{name}.weight", Edit(transposed=self.targets[name].transposed))
        edits[f"{name}.weight"] = replace(old, rows=rotation)
        if self.targets[name].bias:
            edits[f"{name}.bias"] = Edit(rows=rotation)

    def _reason(self, rotation: Rotation) -> str:
        """What stands in the way, as far as norms show it."""
        name = self.model.block_names[self.block]
        moved = {place.source for place in self.places}
        for inner, module in self.model.model.get_submodule(name).named_modules(prefix=name):
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is None or weight.shape != (rotation.size,):
                continue
            if inner not in moved:
                return f"the weight of the norm {inner} cannot be moved into what reads it"
            plain = {f"{inner}.weight": torch.ones_like(weight), f"{inner}.bias": torch.zeros_like(weight)}
            plain = {key: value for key, value in plain.items() if key.rpartition(".")[2] in module._parameters}
            with equivalence.in_place(self.model, plain):
                turned, straight = module(rotation(self.hidden)), rotation(module(self.hidden))
            if not torch.allclose(turned, straight, rtol=1e-3, atol=1e-3):
                return f"the norm {inner} subtracts a mean, or does something else that depends on the basis"
            if getattr(module, "bias", None) is not None:
                return f"the norm {inner} adds a bias"
        return "something in it reads or writes the stream that is no linear layer"


def values(model: StreamedModel, edits: Mapping[str, Edit]) -> dict[str, Tensor]:
    """What the parameters of loaded parts, by name in memory, become."""
    return {name: edit(model.model.get_parameter(name).data, model.model.get_parameter) for name, edit in edits.items()}


def _outside(
    model: StreamedModel, rotation: Rotation, ids: Tensor, embedded: Tensor, last: Tensor
) -> tuple[dict[str, Edit], dict[str, str]]:
    """(edits of embedding, last norm and head, {head: embedding} where those were tied).

    embedded: the hidden states of tokens ids that enter the first block; last: those that leave the last one.
    """
    names = {module: name for name, module in model.model.named_modules()}
    embedding, head = (f"{names[part]}.weight" for part in _ends(model))
    model.load_outside()
    with equivalence.in_place(model, values(model, {embedding: Edit(columns=rotation)})):
        found, _ = model.embed(ids)
    if not torch.allclose(found, rotation(embedded), rtol=1e-4, atol=1e-5 * float(embedded.abs().max())):
        raise PlanError(
            f"the residual stream cannot be rotated: what enters the first block is not made by {embedding} alone: "
            "choose --rotate value or none"
        )
    run = partial(model.logits, ids, last)
    expected = run()
    norm, _, offset = equivalence.norms_read(list(model.model.named_modules()), run).get(
        head.removesuffix(".weight"), ("", None, None)
    )
    edits = {embedding: Edit(columns=rotation), head: Edit(columns=rotation)}
    after = {head: edits[head]}
    if offset is not None:
        after = {
            head: replace(edits[head], gain=(f"{norm}.weight", offset)),
            f"{norm}.weight": Edit(constant=1 - offset),
        }
    with equivalence.in_place(model, values(model, after)):
        logits = model.logits(ids, rotation(last))
    model.unload_outside()
    if not bool((logits - expected).norm() <= equivalence.TOLERANCE * expected.norm()):
        raise PlanError(
            f"the residual stream cannot be rotated: what comes after the blocks is no norm without a mean and {head}: "
            "choose --rotate value or none"
        )
    tied = head in model.model.all_tied_weights_keys
    return {**edits, **after}, {head: embedding} if tied else {}


def _ends(model: StreamedModel) -> tuple[nn.Module, nn.Module]:
    """The embedding and the head."""
    head = model.model.get_output_embeddings()
    if head is None:
        raise PlanError(f"{type(model.model).__name__} has no head of its own to undo a rotation")
    return model.model.get_input_embeddings(), head
