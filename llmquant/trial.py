"""Which rotation is worth it, found out by trying: every matrix is rounded to nearest, and nothing of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams, WeightSwap
from llmquant.estimate import Row
from llmquant.metrics import Tally
from llmquant.solvers import SOLVERS

WINDOWS, LENGTH = 8, 64  # of random tokens
# A rotation is taken if it leaves no more of the divergence than this. Where weights hide outliers one left a tenth,
# where they hide none one changed it by a twelfth at most, to either side.
WINS = 0.8


@torch.no_grad()
def divergence(
    model: StreamedModel,
    rows: Sequence[Row],
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """KL(model || model with its rows rounded to nearest), nats a token.

    windows (n, length) int64: what is shown to both. rows: those outside the blocks are left as they are. progress:
    blocks done, of all. Raises VerificationError where logits are not finite.
    """
    streams = Streams.start(model, windows, len(windows), lambda done, total: None)
    for block in range(len(model.block_names)):
        with model.loaded(block):
            swap = WeightSwap()
            for row in (row for row in rows if row.block == block):
                w = row.target.matrix(model.module(row.target)).detach().float()
                solution = SOLVERS["rtn"](w, None, row.format, clip=row.rule.options.get("clip", "search"))
                stored = row.target.stored(row.format.decode(solution.codes, solution.grid).to(model.dtype))
                parameter = model.model.get_parameter(row.target.parameter)
                swap.replace(row.target.parameter, parameter, stored, row.target.expert)
            streams.advance(block, swap)
        progress(block + 1, len(model.block_names))
    tally = Tally(model.config.get_text_config().vocab_size)
    sides = [torch.cat(states) for states in (streams.reference, streams.quantized)]
    with model.loaded(None):
        for window, *hidden in zip(windows.split(1), *(states.split(1) for states in sides), strict=True):
            tally.add(window[0, 1:].to(model.device), *(model.logits(window, states)[0, :-1] for states in hidden))
    return tally.divergence().mean


def decide(found: Mapping[str, float]) -> dict[str, Any]:
    """What is noted of the choice. found: the divergence of every rotation that was possible, "none" among them."""
    best = min(found, key=lambda mode: found[mode])
    return {"chosen": best if found[best] <= WINS * found["none"] else "none", "divergences": dict(found)}
