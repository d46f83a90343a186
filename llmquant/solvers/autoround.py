"""AutoRound: the roundings and ranges of a block's matrices, tuned together by the signs of gradients.

The outputs of the block, on inputs that the quantized model gives it, are to be those of the original block on inputs
of the original model. Every step takes the gradient of one batch of windows; each offset, and each factor of a range,
moves by the rate in the direction that its sign says. The rate falls to zero, and in sum lets an offset go half a code
unit: to the next level up or down. What did best on its batch is kept.

Source: W. Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
arXiv:2309.05516, section 3 and algorithm 1. The defaults are those of auto-round 0.16, whose batches of 8 windows are
those of the calibration.
"""

from __future__ import annotations

import torch

from llmquant.solvers.base import Solution
from llmquant.solvers.block_tuning import Gradient, Part, Rounding


def tune(
    parts: dict[str, Part],
    gradient: Gradient,
    batches: int,
    seed: int,
    *,
    clip: str = "minmax",
    iterations: int = 200,
    rate: float = 0.0,
    ranges: bool = True,
) -> dict[str, Solution]:
    """See block_tuning.Tuner. seed: of the order of the batches.

    clip: the format's named rule for the range to start from; iterations: steps; rate: of the first step, in code
    units, 0 for one divided by the iterations; ranges: tune them too, between nothing and what they are to begin with.
    """
    generator = torch.Generator().manual_seed(seed)
    roundings = {name: Rounding(part) for name, part in parts.items()}
    order: list[int] = []
    best, least = _state(roundings), float("inf")
    for step in range(iterations):
        order = order or torch.randperm(batches, generator=generator).tolist()
        loss, found = gradient(order.pop(), {name: rounding.decode() for name, rounding in roundings.items()})
        if loss < least:
            best, least = _state(roundings), loss
        pace = (rate or 1 / iterations) * (1 - step / iterations)
        for name, rounding in roundings.items():
            offsets, low, high = rounding.gradients(found[name])
            rounding.offsets.sub_(offsets.sign_(), alpha=pace)
            if ranges:
                rounding.low.sub_(low.sign_(), alpha=pace).clamp_(0, 1)
                rounding.high.sub_(high.sign_(), alpha=pace).clamp_(0, 1)
    for name, (offsets, low, high) in best.items():
        roundings[name].offsets, roundings[name].low, roundings[name].high = offsets, low, high
    return {name: rounding.solution() for name, rounding in roundings.items()}


def _state(roundings: dict[str, Rounding]) -> dict[str, tuple[torch.Tensor, ...]]:
    return {name: (each.offsets.clone(), each.low.clone(), each.high.clone()) for name, each in roundings.items()}
