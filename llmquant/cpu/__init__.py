"""Products on a CPU by weights that stay as they are: what llmquant_kernels.cpu_compiled multiplies with.

Few rows of x are multiplied by codes as they are decoded. For more, four rows of the weight are decoded at a time, as
many columns as the first cache holds, and multiplied by x from there. In float32; in bfloat16 where DOTS.

tasks.py has that order; loops.py compiles the loop over the codes of one format, which singles.py and pairs.py write,
in terms of codes.py, vectors.py and instructions.py. What is common to all formats is compiled at the first product, a
loop at the first product of its format; all of it is kept on disk.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from llmquant.cpu.instructions import TOGETHER
from llmquant.cpu.tasks import FEW, Task, share
from llmquant.cpu.vectors import DOTS, FEATURES, LANES
from llmquant.cpu.weights import BY, Ready, prepare

__all__ = ["DOTS", "decode", "most_rows", "multiply", "prepare"]

# Rows of x up to which all of it is faster than torch's product with decoded blocks, by bytes of what is multiplied.
# With AMX, which was not at hand, that product costs next to nothing.
MOST_ROWS = {4: 128, 2: 16 if "+amx-bf16" in FEATURES else 48}
ROUNDED_UP = {3: 4, 5: 8, 6: 8, 7: 8}  # where to decode once more costs more than to multiply zeros
# Multiplications below which another thread costs more than it gains.
LEAST_WORK = 2**16
TURNS = 4  # runs of rows that each thread takes, for none to wait long for one that something disturbs


def most_rows(dtype: torch.dtype) -> int:
    """How many rows of x `multiply` is for."""
    return MOST_ROWS[2 if dtype == torch.bfloat16 and DOTS else 4]


def multiply(weight: Ready, x: Tensor) -> Tensor:
    """x (rows, in) float32, or bfloat16 where DOTS, contiguous -> (rows, out) float32."""
    rows, columns = x.shape
    if not rows:  # which have no address
        return x.new_empty(0, weight.rows, dtype=torch.float32)
    if x.dtype == torch.bfloat16 and rows <= FEW and not weight.pairs:
        x = x.float()
    size, count = x.element_size(), rows
    rows = ROUNDED_UP.get(rows, rows) if size == 2 else rows
    weight.compile(_needed(rows, size))
    # What is read behind a row; and rows that lie a power of two apart would take each other's place in the cache.
    behind = columns * size % (4 * LANES) or weight.trits or rows > 4
    if behind or rows > count:
        x = functional.pad(x, (0, -columns % (2 * LANES) + 2 * LANES if behind else 0, 0, rows - count))
    y = torch.zeros(-(-weight.rows // TOGETHER) * TOGETHER, rows)
    where = {"x": x.data_ptr(), "x_stride": size * x.shape[1], "rows": rows, "y": y.data_ptr(), "size": size}
    _in_threads(weight, 0, weight.rows, rows, where)
    return y[: weight.rows, :count].t().contiguous()


@cache
def _needed(rows: int, size: int) -> tuple[str, ...]:
    """The loops that multiply so many rows of x, in numbers of `size` bytes."""
    decoding = ("decoding", "rounding") if size == 2 else ("decoding",)
    by = [name for number, name in enumerate(BY[size]) if 2**number <= rows <= FEW]
    return (*decoding, *by)


def decode(weight: Ready, start: int, out: Tensor) -> None:
    """Write the rows of the weight from `start` on to out (rows, in), float32 or bfloat16, contiguous."""
    weight.compile(_needed(0, out.element_size()))
    where = {"x": 0, "x_stride": 0, "rows": 0, "y": out.data_ptr(), "size": out.element_size()}
    _in_threads(weight, start, start + len(out), 1, where)


def _in_threads(weight: Ready, start: int, stop: int, times: int, where: dict[str, int]) -> None:
    """A Task for as many threads as torch may use; times: how often each weight is multiplied."""
    work = (stop - start) * weight.columns * times
    threads = max(1, min(torch.get_num_threads(), work // LEAST_WORK, (stop - start) // TOGETHER))
    step = -(-(stop - start) // (threads * TURNS * TOGETHER)) * TOGETHER if threads > 1 else stop - start
    address = weight.fields.buffer_info()[0]
    task = array("q", Task(next=start, stop=stop, step=step, weight=address, first=start, **where))
    if threads > 1:
        _team()(share.address, task.buffer_info()[0], threads, 0)
    else:
        share.ctypes(task.buffer_info()[0])


@cache
def _team() -> Callable[[int, int, int, int], object]:
    """(function, its argument, threads, 0): call it in each of torch's own threads, which wait for work awake.

    It is what compilers call for a parallel region of OpenMP. Where torch has none, plain threads do it.
    """
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
    try:
        parallel = library.GOMP_parallel
    except AttributeError:
        return _in_plain_threads
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


def _in_plain_threads(function: int, given: int, threads: int, _: int) -> None:
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, [given] * threads))
