"""Weighted k-means of numbers, many rows at a time: exact where that is affordable, Lloyd's iterations beyond.

On a line an optimal cluster is a run of the sorted values, so the best cut into k runs is found by dynamic programming.
With the sums of weights and of weighted values up to every place, a run's cost is known in constant time, and so is
an iteration of Lloyd for any number of values.

Source: X. Wu, "Optimal quantization by matrix searching", Journal of Algorithms 12 (1991); H. Wang and M. Song,
"Ckmeans.1d.dp", The R Journal 3/2 (2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 256  # the most values in a row that are solved exactly
PLACES = 128  # where a longer row may be cut to begin with
DENSE = 16  # levels from which cutting at so many places is as good as cutting the best way
BLOCKS = 1024  # runs of equal weight whose widths tell the density
ITERATIONS = 50
BINS = 2**16


def levels(x: Tensor, weight: Tensor | None, k: int) -> Tensor:
    """The k levels (rows, k), ascending, of least sum of weight * (x - nearest level)**2 for every row of x (rows, n).

    weight: (rows or none, n), at least 0; a row without any counts all alike. float64 inside, float32 out. With fewer
    distinct values than k the last level is repeated.
    """
    x, order = x.sort(dim=1)
    h = torch.ones_like(x) if weight is None else weight.expand_as(x).gather(1, order)
    h = h.double()
    largest = h.amax(1, keepdim=True)
    h = torch.where(largest > 0, torch.maximum(h, 1e-12 * largest), 1.0)
    sums = _sums(h), _sums(h * x)
    n = x.shape[1]
    if n <= max(k, EXACT):
        places = torch.arange(n + 1, device=x.device).expand(len(x), -1)
        return _ascending(_means(sums, _cut(sums, places, min(k, n))), k)
    # The best cut between a few places, then Lloyd moves the cuts anywhere.
    if k > DENSE:
        return _ascending(_lloyd(x, sums, _means(sums, _spread(x, sums[0], k))), k)
    return _ascending(_lloyd(x, sums, _means(sums, _cut(sums, _spread(x, sums[0], PLACES), k))), k)


def levels_of_histogram(x: Tensor, weight: Tensor | None, k: int) -> Tensor:
    """`levels` of so many values, x (1, n), that they are first gathered in bins, each at its weighted mean."""
    if x.shape[1] <= 4 * BINS:
        return levels(x, weight, k)
    low, high = x.amin(), x.amax()
    counts, sums = (torch.zeros(BINS, dtype=torch.float64, device=x.device) for _ in range(2))
    for start in range(0, x.shape[1], 2**22):
        part = x[0, start : start + 2**22]
        h = torch.ones_like(part) if weight is None else weight[0, start : start + 2**22]
        bins = ((part - low) * ((BINS - 1) / (high - low).clamp_min(1e-30))).long()
        counts += torch.bincount(bins, h.double(), BINS)
        sums += torch.bincount(bins, (h * part).double(), BINS)
    used = counts > 0
    if not used.any():
        return levels_of_histogram(x, None, k)
    return levels((sums[used] / counts[used]).float().view(1, -1), counts[used].view(1, -1), k)


Sums = tuple[Tensor, Tensor]  # (rows, n + 1) float64: of the weights, and of the weighted values, before every place


def _sums(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def _cut(sums: Sums, places: Tensor, k: int) -> Tensor:
    """The best cut into k runs that begins and ends at some of `places` (rows, p + 1): their edges (rows, k + 1).

    Least squared error is most gain, the sum over runs of (weighted sum)**2 / weight.
    """
    weight, total = (column.gather(1, places) for column in sums)
    p = places.shape[1] - 1
    mass = weight[:, None, :] - weight[:, :, None]
    gain = (total[:, None, :] - total[:, :, None]).square_().div_(mass)  # [row, from, to]
    gain.masked_fill_(~(mass > 0), -torch.inf)
    # An empty run is no gain and no loss, so that runs of no weight at the ends are no obstacle.
    gain.diagonal(dim1=1, dim2=2).fill_(0)
    best = gain[:, 0]
    froms = []
    for _ in range(k - 1):
        best, start = (best[:, :, None] + gain).max(1)
        froms.append(start)
    edge = torch.full((len(places), 1), p, dtype=torch.long, device=places.device)
    edges = [edge]
    for start in reversed(froms):
        edge = start.gather(1, edge)
        edges.append(edge)
    edges.append(torch.zeros_like(edge))
    return places.gather(1, torch.cat(edges[::-1], dim=1))


def _spread(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    """Edges (rows, parts + 1) of runs as an optimal quantizer of many levels has them: with a density of levels as the
    cube root of the weights' own (P. F. Panter and W. Dite, Proceedings of the IRE 39, 1951).
    """
    n = x.shape[1]
    share = weight[:, -1:] * torch.arange(1, BLOCKS, device=x.device) / BLOCKS
    inner = torch.searchsorted(weight[:, 1:].contiguous(), share)
    ends = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
    blocks = torch.cat([ends, inner, ends + n], dim=1)
    widths = x.gather(1, blocks.clamp(max=n - 1)).diff(dim=1).double()
    levels = _sums(widths.pow(2 / 3))  # equal weights: the density of a block is one over its width
    share = levels[:, -1:] * torch.arange(1, parts, device=x.device) / parts
    cuts = torch.searchsorted(levels, share).clamp(max=BLOCKS)
    return torch.cat([ends, blocks.gather(1, cuts), ends + n], dim=1)


def _means(sums: Sums, edges: Tensor) -> Tensor:
    """The weighted mean of every run (rows, k); NaN for empty ones."""
    weight, total = (column.gather(1, edges).diff(dim=1) for column in sums)
    return total / weight


def _lloyd(x: Tensor, sums: Sums, means: Tensor) -> Tensor:
    """x sorted. Moves the cuts to the middles of the means and the means to their runs until nothing moves."""
    edges = torch.zeros(len(x), means.shape[1] + 1, dtype=torch.long, device=x.device)
    edges[:, -1] = x.shape[1]
    for _ in range(ITERATIONS):
        means = _ascending(means, means.shape[1])
        middles = ((means[:, 1:] + means[:, :-1]) / 2).float()
        inner = torch.searchsorted(x, middles, right=True)
        if torch.equal(inner, edges[:, 1:-1]):
            break
        edges[:, 1:-1] = inner
        found = _means(sums, edges)
        means = torch.where(torch.isfinite(found), found, means)
    return means


def _ascending(means: Tensor, k: int) -> Tensor:
    """(rows, up to k) -> (rows, k) float32, ascending; NaN and what is twice there become the last level."""
    means = torch.nan_to_num(means, nan=torch.inf).float().sort(dim=1).values
    again = torch.nn.functional.pad(means[:, 1:] == means[:, :-1], (1, 0))
    means = means.masked_fill(again, torch.inf).sort(dim=1).values
    means = torch.nn.functional.pad(means, (0, k - means.shape[1]), value=torch.inf)
    last = means.masked_fill(means.isinf(), -torch.inf).amax(1, keepdim=True)
    return torch.where(means.isinf(), last, means)
