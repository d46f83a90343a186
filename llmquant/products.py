"""Products in float32 whose bits do not depend on the number of threads.

How a long sum is cut up among threads would change its bits. So a product is added up in runs of terms that no library
cuts, with whole sixteens of columns. On AMD's processors with AVX-512, for which MKL keeps to AVX2, long sums are
oneDNN's: twice as fast on Zen 5.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

TERMS = 256  # of a product that are added up in one go: MKL does not cut up to 512
WIDTH = 16  # columns of a product, whole ones: threads would share out others so that some come to another loop
LONG = 4096  # the same of oneDNN, which does not cut those
PART = 2**22  # numbers of a product of oneDNN's, which is added to what there is only when it is done


def runs(start: int, stop: int, most: int) -> list[slice]:
    """From start to stop, at most so many at a time."""
    return [slice(first, min(first + most, stop)) for first in range(start, stop, most)]


def product(a: Tensor, b: Tensor, out: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """alpha a @ b, added to `out` in place where that is given."""
    out = a.new_zeros(len(a), b.shape[1]) if out is None else out
    if (odd := b.shape[1] % WIDTH) and a.device.type == "cpu":
        return out.add_(product(a, functional.pad(b, (0, WIDTH - odd)))[:, : b.shape[1]], alpha=alpha)
    if a.shape[1] < TERMS or a.device.type != "cpu" or a.dtype != torch.float32 or not _onednn_is_faster():
        for left, right in zip(a.split(TERMS, dim=1), b.split(TERMS), strict=True):
            out.addmm_(left, right, alpha=alpha)
        return out
    for left, right in zip(a.split(LONG, dim=1), b.split(LONG), strict=True):
        # What linear layers become when torch.compile puts them together. A weight with gaps between its rows has no
        # fast loop.
        weight = right.T if right.is_contiguous() or right.T.is_contiguous() else right.T.contiguous()
        height = max(TERMS, PART // max(1, out.shape[1]))
        for rows, some in zip(out.split(height), left.split(height), strict=True):
            rows.add_(torch.ops.mkldnn._linear_pointwise(some, weight, None, "none", [], ""), alpha=alpha)
    return out


@cache
def _onednn_is_faster() -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    facts = Path("/proc/cpuinfo")
    said = facts.read_text() if facts.exists() else platform.processor()
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in said
