"""What calibration saw of the inputs of one linear: sums that stream and merge, kept apart from any solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Stats:
    """Sums over calibration tokens of the inputs x of one linear, which stream and merge.

    With x from the quantized stream and x_ref from the reference stream, both (tokens, in):
    hessian = sum x x^T and cross = sum (x_ref - x) x^T, (in, in) float32.
    """

    hessian: Tensor
    cross: Tensor
    tokens: int = 0
    dropped: int = 0

    @classmethod
    def empty(cls, columns: int, device: torch.device | str = "cpu") -> Stats:
        zeros = torch.zeros(columns, columns, device=device)
        return cls(zeros, zeros.clone())

    def update(self, x: Tensor, x_ref: Tensor) -> None:
        """Add tokens; those that are not finite in either stream are left out and counted."""
        x, x_ref = x.flatten(0, -2).float(), x_ref.flatten(0, -2).float()
        finite = torch.isfinite(x).all(-1) & torch.isfinite(x_ref).all(-1)
        if not finite.all():
            self.dropped += int((~finite).sum())
            x, x_ref = x[finite], x_ref[finite]
        self.tokens += len(x)
        self.hessian.addmm_(x.T, x)
        self.cross.addmm_((x_ref - x).T, x)

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            self.hessian + other.hessian,
            self.cross + other.cross,
            self.tokens + other.tokens,
            self.dropped + other.dropped,
        )

    def importance(self) -> Tensor:
        """Mean square of every input (in,). Inputs never active weigh a millionth of the mean."""
        squares = self.hessian.diagonal() / max(1, self.tokens)
        return squares.clamp_min((1e-6 * squares.mean()).clamp_min(torch.finfo(torch.float32).tiny))

    def output_energy(self, w: Tensor) -> float:
        """Mean over tokens of |w x|^2 = tr(w H w^T) / tokens, for w (out, in)."""
        return float(torch.linalg.vecdot(w @ self.hessian, w).sum(dtype=torch.float64) / max(1, self.tokens))


def energy(w: Tensor) -> float:
    """|w|^2, the sum of the squares of w (out, in), by rows: no copy of w in another type."""
    return float(torch.linalg.vecdot(w, w).sum(dtype=torch.float64))
