"""What calibration saw of the inputs of one linear: sums that stream and merge, kept apart from any solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmquant.products import product, runs

EXPERT_BYTES = 2**29  # of tokens sent to experts that are held at once; the block runs again for the experts beyond
SEEN_BYTES = 2**29  # of what the reference shows of a block that is kept, for it not to be run again and again
TERMS = 512  # columns at a time of a sum of squares
HELD = 2048  # tokens, at most, that are kept as they are, to judge a step on
SLAB = 1024  # rows of a sum that are added up at once, by whichever process


def slabs(rows: int) -> list[slice]:
    """All rows of a sum, a few at a time: the same ones, to the last bit, however many processes share them."""
    return runs(0, rows, SLAB)


@dataclass
class Held:
    """Tokens that no sum contains: x and x_ref (tokens, in), lacking (tokens, out) or None, float32: see Stats."""

    x: Tensor
    x_ref: Tensor
    lacking: Tensor | None = None

    def missed(self, w: Tensor) -> Tensor:
        """What the exact weight w (out, in) would still lack on the quantized stream, (tokens, out)."""
        return (self.x_ref - self.x) @ w.T if self.lacking is None else self.lacking


@dataclass
class Stats:
    """Sums over calibration tokens of the inputs x of one linear, which stream and merge.

    With x from the quantized stream and x_ref from the reference stream, both (tokens, in):
    hessian = sum x x^T and cross = sum (x_ref - x) x^T, (in, in) float32. Of a linear whose output is added to a
    residual stream, and that reads x alone, lacking = sum l x^T (out, in) takes the place of cross, with l (tokens,
    out) what the sum of both lacks with the exact weight W: W (x_ref - x), and what the quantized stream lacks already.
    The tokens of one call are added up in float32, and so are the calls: of a million tokens in calls of a thousand,
    the sums lose no more than the last three digits.

    share: (first, step); only those slabs of the sums are added up here whose numbers are first, first + step ..
    """

    hessian: Tensor
    cross: Tensor | None = None
    lacking: Tensor | None = None
    curvature: Tensor | None = None  # (blocks, b, b): of the loss in the outputs, along the diagonal; of one linear
    tokens: int = 0
    dropped: int = 0
    borrowed: int = 0  # tokens' worth of what the other experts of the layer saw
    pieces: list[tuple[Tensor, ...]] = field(default_factory=list)  # of held-out tokens
    shared: dict[float, Any] = field(default_factory=dict)  # what solvers made of the sums, for linears that share them
    share: tuple[int, int] = (0, 1)
    last: bool = False  # no other linear that shares the sums is still to be solved

    @classmethod
    def empty(cls, columns: int, device: torch.device | str = "cpu", share: tuple[int, int] = (0, 1)) -> Stats:
        return cls(torch.zeros(columns, columns, device=device), share=share)

    def update(self, x: Tensor, x_ref: Tensor, lacking: Tensor | None = None) -> None:
        """Add tokens; those that are not finite in either stream are left out and counted."""
        x, x_ref, *rest = self._finite(x, x_ref, lacking)
        self.tokens += len(x)
        for rows in self._own(x.shape[1]):
            own = x[:, rows]
            product(own.T, x[:, rows.start :], self.hessian[rows, rows.start :])
            self._mirror(rows)
        if rest:
            if self.lacking is None:
                self.lacking = x.new_zeros(rest[0].shape[1], x.shape[1])
            for rows in self._own(len(self.lacking)):
                product(rest[0][:, rows].T, x, self.lacking[rows])
            return
        if self.cross is None:
            self.cross = torch.zeros_like(self.hessian)
        for rows in self._own(x.shape[1]):
            product((x_ref[:, rows] - x[:, rows]).T, x, self.cross[rows])

    def _mirror(self, rows: slice) -> None:
        """Make columns of the Hessian what these rows of it are, from the diagonal on."""
        own = self.hessian[rows, rows]
        own.copy_(own.triu() + own.triu(1).T)
        self.hessian[rows.stop :, rows] = self.hessian[rows, rows.stop :].T

    def put_together(self, spread: Callable[[Tensor], None]) -> None:
        """With spread(sum): to all processes the rows that each has added up, see `share`."""
        if self.share[1] == 1:
            return
        for total in (self.hessian, self.cross, self.lacking):
            if total is not None:
                spread(total)
        for rows in slabs(len(self.hessian)):
            self._mirror(rows)

    def _own(self, rows: int) -> list[slice]:
        first, step = self.share
        return slabs(rows)[first::step]

    def hold(self, x: Tensor, x_ref: Tensor, lacking: Tensor | None = None, *, most: int = HELD) -> None:
        """Keep tokens to judge on, out of the sums; of more than `most` so many, evenly spread."""
        found = self._finite(x, x_ref, lacking)
        chosen = torch.linspace(0, len(found[0]) - 1, min(most, len(found[0]))).long().to(x.device)
        self.pieces.append(tuple(part[chosen] for part in found))

    def _finite(self, *streams: Tensor | None) -> list[Tensor]:
        """(tokens, width) float32 of every stream that there is, without the tokens that are not finite in all."""
        flat = [stream.flatten(0, -2).float() for stream in streams if stream is not None]
        finite = torch.stack([finite_rows(stream) for stream in flat]).all(0)
        if finite.all():
            return flat
        self.dropped += int((~finite).sum())
        return [stream[finite] for stream in flat]

    @property
    def held(self) -> Held | None:
        """The tokens held out; None where there are none."""
        if not self.pieces:
            return None
        if len(self.pieces) > 1:  # put together in place, once for all that share them
            self.pieces[:] = [tuple(torch.cat(parts) for parts in zip(*self.pieces, strict=True))]
        return Held(*self.pieces[0]) if len(self.pieces[0][0]) else None

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            self.hessian + other.hessian,
            _sum(self.cross, other.cross),
            _sum(self.lacking, other.lacking),
            None,
            self.tokens + other.tokens,
            self.dropped + other.dropped,
            self.borrowed + other.borrowed,
            self.pieces + other.pieces,
        )

    def blended(self, everything: Stats, least_held: int) -> Stats:
        """With what all experts of the layer saw, where this one saw fewer tokens than it has inputs.

        Then its sums have directions without any curvature, in which anything would be free. What is missing to as many
        tokens as inputs is borrowed, and so are held-out tokens up to `least_held`.
        """
        missing = max(0, len(self.hessian) - self.tokens)
        borrowed = min(missing, everything.tokens)
        if borrowed:
            share = borrowed / everything.tokens
            self.hessian.add_(everything.hessian, alpha=share)
            assert everything.cross is not None
            self.cross = torch.zeros_like(self.hessian) if self.cross is None else self.cross
            self.cross.add_(everything.cross, alpha=share)
        pieces = [*self.pieces]
        lacking = least_held - sum(len(piece[0]) for piece in pieces)
        if lacking > 0 and (held := everything.held) is not None:
            chosen = torch.linspace(0, len(held.x) - 1, min(lacking, len(held.x))).long().to(held.x.device)
            pieces.append((held.x[chosen], held.x_ref[chosen]))
        return replace(self, borrowed=borrowed, pieces=pieces, shared={})

    @property
    def worth(self) -> int:
        """The tokens that the sums are over, those borrowed included; at least 1."""
        return max(1, self.tokens + self.borrowed)

    def scaled(self, scale: Tensor) -> Stats:
        """Of inputs divided by the scale (in,)."""
        outer = scale[:, None] * scale
        return replace(
            self,
            hessian=self.hessian / outer,
            cross=None if self.cross is None else self.cross / outer,
            lacking=None if self.lacking is None else self.lacking / scale,
            pieces=[(x / scale, x_ref / scale, *rest) for x, x_ref, *rest in self.pieces],
            shared={},
        )

    def wanted(self, w: Tensor) -> Tensor:
        """sum l x^T (out, in), for the exact weight w (out, in). The last linear that shares the sums spends them."""
        found = self.lacking
        if found is None:
            found = torch.zeros_like(w) if self.cross is None else product(w, self.cross)
        if self.last:
            self.cross = self.lacking = None
        return found

    def clear(self) -> None:
        """Let go of all sums, and of what was made of them, whoever still holds this."""
        self.hessian = self.hessian.new_empty(0, 0)
        self.cross = self.lacking = None
        self.shared.clear()
        self.pieces.clear()

    def importance(self) -> Tensor:
        """Mean square of every input (in,). Inputs never active weigh a millionth of the mean."""
        squares = self.hessian.diagonal() / self.worth
        return squares.clamp_min((1e-6 * squares.mean()).clamp_min(torch.finfo(torch.float32).tiny))

    def output_energy(self, w: Tensor) -> float:
        """Mean over tokens of |w x|^2 = tr(w H w^T) / tokens, for w (out, in)."""
        return self.mean(row_energy(w, self.hessian))

    def mean(self, losses: Tensor) -> float:
        """The mean over tokens of what rows (out,) lose together of all."""
        return float(losses.sum(dtype=torch.float64) / self.worth)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def finite_rows(x: Tensor) -> Tensor:
    """Which rows of x (rows, columns) float32 are finite, and so are their squares, as sums of them must be.

    Cheaper than to ask every entry.
    """
    return torch.linalg.vecdot(x, x).isfinite()


def row_energy(w: Tensor, hessian: Tensor) -> Tensor:
    """w_r H w_r^T of every row of w (out, in) for a symmetric H: half of a product, and no copy of w."""
    total = w.new_zeros(len(w))
    for start in range(0, w.shape[1], TERMS):
        here = slice(start, start + TERMS)
        own = w[:, here]
        felt = product(own, hessian[here, here])
        product(w[:, here.stop :], hessian[here.stop :, here], felt, 2)
        total += torch.linalg.vecdot(felt, own)
    return total


def energy(w: Tensor) -> float:
    """|w|^2, the sum of the squares of w (out, in), by rows: no copy of w in another type."""
    return float(torch.linalg.vecdot(w, w).sum(dtype=torch.float64))


def ratio(error: float, signal: float) -> float:
    """Root of error energy over signal energy; 0 for nothing lost of nothing."""
    return 0.0 if error == 0 else math.sqrt(error / signal) if signal else math.inf
