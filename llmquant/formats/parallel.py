"""Rows of a weight are independent: work on as many at a time as fit a core's cache, on all cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Elements of one piece: half a megabyte in float32, so that a few temporaries stay in a core's second-level cache.
# The range search, measured from 2**14 to 2**18, is fastest here and at 2**18, which costs four times the page faults.
PIECE = 2**17


def over_rows(work: Callable[[int, int], None], shape: tuple[int, int], device: torch.device) -> None:
    """Call work(start, stop) until all rows are done. On a GPU in one piece; on a CPU in pieces, one thread a core.

    The result cannot depend on the number of threads as long as `work` treats rows independently.
    """
    rows, columns = shape
    if device.type != "cpu":
        return work(0, rows)
    step = max(1, PIECE // max(1, columns))
    pieces = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    threads = torch.get_num_threads()
    try:  # one thread inside a piece: handing out parts of so little costs more than it brings
        if threads == 1 or len(pieces) == 1:
            torch.set_num_threads(1)
            for piece in pieces:
                work(*piece)
        else:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for _ in pool.map(lambda piece: work(*piece), pieces):
                    pass
    finally:
        torch.set_num_threads(threads)  # torch also notes a worker's setting as the default of threads yet to start
    return None
