"""What a run will take, before it starts: anonymous memory and time.

Memory counts what cannot be dropped and read again: pages of the checkpoint's files are not in it. Every part is what
the code that needs it holds at its peak; the parts that follow one another do not add up. Time is scaled up from three
short measurements on the machine: fitting a format, a product in float32, one in the model's type. They count this
thread's time, so the estimate is that of a machine that does nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor

from llmquant.blocks import StreamedModel
from llmquant.formats import Format, Grid
from llmquant.matrices import Target, text_config
from llmquant.products import product
from llmquant.recipe import Rule
from llmquant.sampling import AT_ONCE
from llmquant.solvers import CALIBRATED, SOLVERS, TUNERS, default_of
from llmquant.stats import EXPERT_BYTES, HELD, SEEN_BYTES
from llmquant.tune import Means

BASE = 420 * 2**20  # Python, torch, transformers, and the compiler of loops
COPIES = 6  # of the weight in float32 that a calibrated solver holds: itself, target, errors, codes, indices, decoded
SQUARES = 4  # matrices (in, in) in float32: the two sums, the damped one, and its factor
JUDGED = 1 / 8  # share of the windows that are held out
CHECKED = 128  # tokens of the check that ends a run
DISK = 1e9  # bytes a second that are written, read back, hashed and compared: a third of it is the disk's
TRIED = 14 * 64  # tokens that go through a block in float32 to find where scales can be moved
EACH = 5e4  # operations of a product that take as long as what the gptq solver does to a weight besides
STEP = 1.5e-3  # seconds that a block takes for one token of all windows written at once, however small it is
SLEEP = 2.0  # how much slower a product of few rows is, when the model writes its own samples token by token


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of it, those that are free and all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    found = psutil.virtual_memory()
    return found.available, found.total


@dataclass(frozen=True)
class Row:
    """One matrix that will be quantized. block None: it lies outside the blocks."""

    block: int | None
    target: Target
    key: str  # the name of its weight in the folder, which is the checkpoint's own, but for experts
    format: Format
    rule: Rule
    kernel: str
    sources: tuple[str, ...]  # the checkpoint's tensors that it is made of; all experts of a parameter have the same

    @property
    def weights(self) -> int:
        return math.prod(self.target.shape)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.format.layout(self.target.shape).values())

    @property
    def pieces(self) -> dict[str, str]:
        """Name in the folder -> suffix, of what it is stored as."""
        return self.format.pieces(self.key, self.target.shape)

    def unpacked(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Grid]:
        """Its codes and grid, out of the tensors of a shard."""
        shape = self.target.shape
        return self.format.unpack(self.format.named(tensors, self.key, shape, self.target.expert), shape)


@dataclass(frozen=True)
class Work:
    """What is done besides reading and writing weights. tokens 0: no calibration.

    batch: tokens that go through a block at once; curvature: the share of the tokens over which a backward pass goes;
    sampled: whether the model writes the tokens; checked: tokens of text that are looked at before; tuning: steps of
    end-to-end tuning, and means, how it is done; offload: hidden states on disk; ranks: processes, which share the
    tokens.
    """

    tokens: int = 0
    batch: int = 0
    curvature: float = 0.0
    sampled: bool = False
    checked: int = 0
    tuning: int = 0
    means: Means | None = None
    offload: bool = False
    ranks: int = 1


def of_blocks(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of every block, those outside last."""
    places = sorted({row.block for row in rows if row.block is not None})
    return [*([row for row in rows if row.block == place] for place in places), [r for r in rows if r.block is None]]


def memory(model: StreamedModel, rows: Sequence[Row], outside: int, work: Work) -> int:
    """Bytes of anonymous memory at the peak. outside: bytes stored of what lies outside the blocks."""
    blocks = of_blocks(rows)
    largest = max(row.weights for row in rows)
    packed = max(sum(row.nbytes for row in block) for block in blocks)
    dense = max(sum(row.weights for row in block) for block in blocks) * model.dtype.itemsize
    codes = max(sum(row.weights for row in block) for block in blocks)
    writing = codes + packed + 8 * largest  # a block beside the one that is solved: packed, read back and unpacked
    rounding = 12 * largest + codes + (outside if blocks[-1] else 0)  # float32, searched in pieces
    check = 8 * largest + dense
    if not work.tokens:
        return BASE + max(rounding + writing, check)
    width, hidden = max(row.target.shape[1] for row in rows), text_config(model.config).hidden_size
    tokens = 4 * hidden * HELD + 2 * 4 * width * HELD  # held out of the sums: inputs of both streams, what is lacking
    passing = work.batch * (2 * 4 * width + 8 * hidden * model.dtype.itemsize)  # inputs in float32, both streams
    # While a matrix is solved the rest of its block is held as it was read, and as codes.
    solving = COPIES * 4 * largest + SQUARES * 4 * width**2 + tokens + packed + codes * (1 + 2)
    share = -(-work.tokens // work.ranks)
    # While the block runs both its weights are there, the sums over what enters it, and the last block is written.
    running = 2 * dense + 2 * 4 * width**2 + tokens + passing + _seen(model, share, width) + writing
    if any(row.target.expert is not None for row in rows):
        running += EXPERT_BYTES + 2 * 4 * width**2  # tokens sent to experts, and the sums over all of them
        solving += EXPERT_BYTES + 2 * 4 * width**2 + 2 * dense
    curves = 0
    if work.curvature:
        curves = sum(4 * 32 * row.target.shape[0] for row in rows)  # G in blocks of 32, of every matrix
    states = 0 if work.offload else 2 * share * hidden * model.dtype.itemsize
    backward = 0
    if work.curvature and not work.offload:
        backward = int(work.curvature * share) * (len(blocks) + 1) * hidden * model.dtype.itemsize
    backward += 4 * work.batch * sum(sum(row.target.shape) for row in blocks[0]) if work.curvature else 0
    tuning = outside + work.means.nbytes if work.means else 0
    together = max(_together([row for row in block if row.rule.solver in TUNERS], work.batch) for block in blocks)
    running += together + (share * hidden * model.dtype.itemsize if together else 0)  # the block's own outputs
    return BASE + curves + max(rounding + writing, check, max(solving, running) + states, backward, tuning)


def _seen(model: StreamedModel, tokens: int, width: int) -> int:
    """Of what the reference shows of a block, what is kept: all, or what leaves it, or nothing."""
    leaving = tokens * text_config(model.config).hidden_size * model.dtype.itemsize
    entering = 6 * leaving + tokens * width * model.dtype.itemsize
    kept = next((nbytes for nbytes in (entering + leaving, leaving) if nbytes <= SEEN_BYTES), 0)
    return kept + (leaving if kept + leaving <= SEEN_BYTES else 0)  # and what finished parts put out


def _together(rows: list[Row], tokens: int) -> int:
    """Of the matrices of a block that are tuned together: 11 numbers for every weight, and what the gradient of a batch
    needs of inputs and outputs.
    """
    return sum(11 * 4 * row.weights + 2 * 4 * tokens * sum(row.target.shape) for row in rows)


def means(model: StreamedModel, rows: tuple[Row, ...], work: Work, room: int) -> Means:
    """How tuning can be done within `room` bytes."""
    return Means.within(
        room,
        weights=sum(row.weights for row in rows),
        features=sum(sum(row.target.shape) for row in rows),
        blocks=max(1, len(of_blocks(rows)) - 1),
        tokens=work.batch,
        itemsize=model.dtype.itemsize,
    )


def seconds(model: StreamedModel, rows: tuple[Row, ...], nbytes: int, work: Work) -> float:
    """nbytes: read and written in all."""
    weights = sum(row.weights for row in rows)
    low = flop(model.dtype)
    total = _fitting(rows) + 2 * nbytes / DISK
    if model.causal:
        head = model.config.get_text_config().vocab_size * model.config.get_text_config().hidden_size
        total += low * 3 * 2 * CHECKED * (weights + head)
    if not work.tokens:
        return total
    blocks = max(1, len(of_blocks(rows)) - 1)
    matrices = max(1, len({row.target.listed for row in rows}) // blocks)
    passing = sum(_share(model, row) * row.weights for row in rows)  # a token comes through a few of the experts
    # Both streams are advanced once, and run about half of the block for each stage, of which most blocks have four;
    # then, on what is held out, the whole block for every matrix whose rival it judges.
    passes = 2 * (1 + 4 / 2) + JUDGED * (1 + matrices)
    # Twice forward, once back, which is as dear without gradients of weights; both ways through the head.
    passes += 3 * work.curvature
    low_operations = 2 * work.tokens * passing * passes + 2 * 3 * work.curvature * work.tokens * head
    low_operations += 2 * work.checked * (passing + head)
    if work.sampled:
        low_operations += 2 * SLEEP * work.tokens * (passing + head)
        total += STEP * work.tokens / AT_ONCE * blocks
    low_operations += 2 * 3 * work.tuning * work.batch * passing
    high_operations = sum(_share(model, row) * row.target.shape[1] ** 2 for row in rows)
    high_operations *= (1 + 2) * work.tokens / 2  # half of the Hessian, all of the cross terms; most share their input
    high_operations += sum(_solving(row, work) for row in rows if row.rule.solver in CALIBRATED)
    high_operations += 2 * TRIED * weights
    return total + (low * low_operations + flop(torch.float32, product) * high_operations) / work.ranks


def _share(model: StreamedModel, row: Row) -> float:
    """Of the tokens, those that come through a matrix."""
    if row.target.expert is None:
        return 1.0
    chosen = getattr(text_config(model.config), "num_experts_per_tok", None) or 1
    return min(1.0, chosen / len(model.model.get_parameter(row.target.parameter)))


def _solving(row: Row, work: Work) -> float:
    """Operations. Of gptq: a factor, the target's product and solution, half a product each for the sweep and
    its gradient, one for the descent, half a one for an energy, and what it does to each weight; where the curvature
    is known about a third more. Of those that iterate what an iteration takes: a product with the Hessian, or the block
    and its gradients for a batch.
    """
    rows, columns = row.target.shape
    name = row.rule.solver
    if name == "adaround" or name in TUNERS:
        solver = {**SOLVERS, **TUNERS}[name]
        iterations: int = row.rule.options.get("iterations", default_of(solver, "iterations"))
        return iterations * rows * columns * (6 * work.batch if name in TUNERS else 2 * columns)
    every = (2 + 2 + 1 + 1 + 2 + 1) * columns + EACH
    return columns**3 / 3 + every * rows * columns * (1.3 if work.curvature else 1)


def _fitting(rows: Sequence[Row]) -> float:
    """Seconds of finding all grids and rounding to them, twice where calibrated."""
    columns: dict[Any, int] = {}
    total = 0.0
    for row in rows:
        known = (row.format, row.rule.options.get("clip", "search"))
        of_weight = _fitting_one(*known, columns.setdefault(known, row.target.shape[1]))
        total += of_weight * row.weights * (2 if row.rule.solver in CALIBRATED else 1)
    return total


@cache  # a machine is measured once
def _fitting_one(fmt: Format, clip: Any, columns: int) -> float:
    """Seconds a weight."""
    w = torch.randn(max(1, 2**19 // columns), columns)
    return _timed(lambda: SOLVERS["rtn"](w, None, fmt, clip=clip), 2) / w.numel()


@cache
def flop(dtype: torch.dtype, multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm) -> float:
    """Seconds of one operation in a matrix product of this type; `multiply`: as models make it, or `product`."""
    a = torch.randn(512, 512).to(dtype)
    return _timed(lambda: multiply(a, a), 3) / (2 * 512**3)


def _timed(work: Callable[[], object], repeats: int) -> float:
    """The shortest time of a few, in seconds of this thread: the first has more to do, and others disturb."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)
