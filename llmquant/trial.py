"""What rounding costs a model, found out by trying: matrices are rounded to nearest, and nothing of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams
from llmquant.estimate import Row
from llmquant.metrics import Tally
from llmquant.swap import WeightSwap

WINDOWS, LENGTH = 8, 64  # of random tokens
# A rotation is taken if it leaves no more of the divergence than this. Where weights hide outliers one left a tenth,
# where they hide none one changed it by a twelfth at most, to either side.
WINS = 0.8


def rounded(row: Row, weight: Tensor) -> Tensor:
    """weight (out, in) -> what it is in the row's format, rounded to nearest, float32."""
    codes, grid = row.format.quantize(weight.float(), clip=row.rule.options.get("clip", "search"))
    return row.format.decode(codes, grid)


@torch.no_grad()
def divergence(
    model: StreamedModel,
    rows: Sequence[Row],
    windows: Tensor,
    batch: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """KL(model || model with its rows rounded to nearest), nats a token, with one block in memory at a time.

    windows (n, length) int64: what is shown to both, `batch` at once. rows: those outside the blocks are left as they
    are. progress: blocks done, of all. Raises VerificationError where logits are not finite.
    """
    streams = Streams.start(model, windows, batch, lambda done, total: None)
    for block in range(len(model.block_names)):
        with model.loaded(block):
            swap = WeightSwap()
            for row in (row for row in rows if row.block == block):
                swap.put(model, row.target, rounded(row, row.target.matrix(model.module(row.target)).detach()))
            streams.advance(block, swap)
        progress(block + 1, len(model.block_names))
    tally = Tally(model.config.get_text_config().vocab_size)
    sides = [[states for part in parts for states in part.split(1)] for parts in (streams.reference, streams.quantized)]
    with model.loaded(None):
        for window, *hidden in zip(windows.split(1), *sides, strict=True):
            logits = [model.logits(window, states.to(model.device))[0, :-1] for states in hidden]
            tally.add(window[0, 1:].to(model.device), *logits)
    return tally.divergence().mean


def decide(found: Mapping[str, float]) -> dict[str, Any]:
    """What is noted of the choice. found: the divergence of every rotation that was possible, "none" among them."""
    best = min(found, key=lambda mode: found[mode])
    return {"chosen": best if found[best] <= WINS * found["none"] else "none", "divergences": dict(found)}
