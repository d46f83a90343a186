"""Times of products by quantized weights beside those of dense ones, and the bandwidth they are held against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .weight import Prepared

Clock = Callable[[], float]


class Measured(NamedTuple):
    rows: int  # of x
    dense_ms: float
    quantized_ms: float
    speedup: float  # the median of the pairs' own ratios
    dense_error: float  # relative to float64
    quantized_error: float


def measure(
    x: Tensor,
    exact: Tensor,
    dense: Sequence[Tensor],
    prepared: Sequence[Prepared],
    runs: int,
    clock: Clock = time.perf_counter,
) -> Measured:
    """x (rows, in); exact: the first weight decoded to float64. Weights are used in turn, as the layers of a model are.

    On a CPU dense and quantized products alternate, so that whatever else the machine does meets both. On a GPU each
    are timed in a CUDA graph.
    """
    reference = x.double() @ exact.T
    errors = [relative_error(functional.linear(x, dense[0]), reference)]
    errors.append(relative_error(prepared[0].linear(x), reference))
    before = [partial(functional.linear, x, weight) for weight in dense]
    after = [partial(weight.linear, x) for weight in prepared]
    if x.device.type == "cuda":
        pairs = [(graph_seconds(before), graph_seconds(after))]
    else:
        turns = [run % len(dense) for run in range(runs + 2)]
        pairs = [(timed(before[i], clock), timed(after[i], clock)) for i in turns][2:]
    return Measured(
        len(x),
        1e3 * median(pair[0] for pair in pairs),
        1e3 * median(pair[1] for pair in pairs),
        median(pair[0] / pair[1] for pair in pairs),
        *errors,
    )


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Infinite where anything is not a number."""
    error = float((found.double() - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


def timed(call: Callable[[], Tensor], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call on a CPU."""
    start = clock()
    call()
    return clock() - start


def graph_seconds(calls: Sequence[Callable[[], Tensor]], least: float = 0.2) -> float:
    """Seconds of one call on a GPU: the median of graph replays of all of them, for `least` seconds in all."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # for no two results to share memory
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    for _ in range(3):
        graph.replay()
    while sum(times) < least or len(times) < 5:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    del kept
    return sorted(times)[len(times) // 2] / len(calls)


def copy_bandwidth(device: str = "cuda", clock: Clock = time.perf_counter) -> float:
    """Bytes read and written in a second by a copy, of 1 GiB on a GPU and of 128 MiB on a CPU."""
    on_gpu = torch.device(device).type == "cuda"
    source = torch.ones(2**30 if on_gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    seconds = graph_seconds([copy]) if on_gpu else median([timed(copy, clock) for _ in range(6)][1:])
    return 2 * source.numel() / seconds
