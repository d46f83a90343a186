"""How far a group's grid reaches: named rules that pick the range (low, high) the levels cover.

Every rule takes x (rows, groups, columns) float32 and returns low, high (rows, groups). Whether a range that excludes
zero is legal, and what becomes of it, is the format's affair.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HISTOGRAM_BINS = 2048  # as in the calibrators of TensorRT, from which the KL rule comes


def minmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """The whole range."""
    return x.amin(-1), x.amax(-1)  # aminmax of a dimension takes three times as long


def percentile(x: Tensor, fraction: float = 0.999) -> tuple[Tensor, Tensor]:
    """The central `fraction` quantiles at both ends, interpolated. Groups are too small for it."""
    ordered = x.sort(dim=-1).values
    last = x.shape[-1] - 1
    return _interpolated(ordered, (1 - fraction) * last), _interpolated(ordered, fraction * last)


def _interpolated(ordered: Tensor, position: float) -> Tensor:
    below = int(position)
    above = min(below + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], position - below)


def kl(x: Tensor, levels: int, step: int = 16) -> tuple[Tensor, Tensor]:
    """The threshold t whose histogram of min(|x|, t), coarsened to `levels` bins, is nearest to that of |x| by KL.

    S. Migacz, "8-bit inference with TensorRT" (GTC 2017), with thresholds at every `step`-th of 2048 bins. Both ends
    are shrunk by the same factor.
    """
    low, high = minmax(x)
    reach = torch.maximum(high, -low)
    magnitudes = x.abs() / reach.clamp_min(torch.finfo(x.dtype).tiny).unsqueeze(-1)
    bins = (magnitudes * HISTOGRAM_BINS).long().clamp_(max=HISTOGRAM_BINS - 1)
    counts = torch.zeros(*x.shape[:-1], HISTOGRAM_BINS, device=x.device)
    counts.scatter_add_(-1, bins, torch.ones_like(magnitudes))
    best = torch.full_like(reach, torch.inf)
    factor = torch.ones_like(reach)
    for stop in range(max(levels, step), HISTOGRAM_BINS + 1, step):
        divergence = coarsening_divergence(counts, stop, levels)
        better = divergence < best
        best = torch.where(better, divergence, best)
        factor = torch.where(better, stop / HISTOGRAM_BINS, factor)
    return low * factor, high * factor


def coarsening_divergence(counts: Tensor, stop: int, levels: int) -> Tensor:
    """KL(p || q): p the first `stop` bins with all that lies beyond added to the last, q its coarsening."""
    p = counts[..., :stop].clone()
    occupied = (p > 0).float()
    p[..., -1] += counts[..., stop:].sum(-1)
    coarse = torch.arange(stop, device=counts.device) * levels // stop
    index = coarse.expand_as(p)
    sums = torch.zeros(*p.shape[:-1], levels, device=p.device).scatter_add_(-1, index, counts[..., :stop])
    used = torch.zeros_like(sums).scatter_add_(-1, index, occupied)
    q = (sums / used.clamp_min(1)).gather(-1, index) * occupied
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True).clamp_min(1)
    # A bin that holds only what was clipped has q = 0: charge it as if it held a millionth.
    terms = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-6).log()), 0)
    return terms.sum(-1)


Levels = Callable[[float | Tensor], tuple[Tensor, Tensor | None]]


def search(
    x: Tensor,
    importance: Tensor | None,
    levels: Levels,
    factors: list[float],
    error: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    *,
    stride: int = 1,
    norm: float = 2.0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scale, zero and loss (rows, groups) of the factor with the least sum of importance * |error|**norm, by group.

    levels(factor): scale and zero of the grid whose range is that many times the plain one; error(x, scale, zero): a
    fresh tensor of x's shape. factors are evenly spaced. With a stride only every stride-th is tried, and then those
    between the best and its neighbours. Of equals the plain range wins, then the first tried; what does not fit its
    stored type never wins.
    """
    scale, zero = levels(1.0)
    loss = weighted_loss(error(x, scale, zero), importance, norm)
    factor = torch.ones_like(loss)

    def consider(candidate: float | Tensor) -> None:
        nonlocal scale, zero, loss, factor
        new_scale, new_zero = levels(candidate)
        new_loss = weighted_loss(error(x, new_scale, new_zero), importance, norm)
        better = new_loss < loss
        scale, loss = torch.where(better, new_scale, scale), torch.where(better, new_loss, loss)
        factor = torch.where(better, candidate, factor)
        if zero is not None and new_zero is not None:
            zero = torch.where(better, new_zero, zero)

    for candidate in factors[::stride]:
        if candidate != 1.0:
            consider(candidate)
    coarse, step = factor, factors[1] - factors[0]
    for offset in range(1, stride):
        consider(coarse + offset * step)
        consider(coarse - offset * step)
    return scale, zero, loss


def weighted_loss(error: Tensor, importance: Tensor | None, norm: float = 2.0) -> Tensor:
    """sum over columns of importance * |error|**norm; overwrites error."""
    powers = error.square_() if norm == 2.0 else error.abs_().pow_(norm)
    return (powers if importance is None else powers.mul_(importance)).sum(-1)
