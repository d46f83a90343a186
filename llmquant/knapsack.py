"""One candidate of every set, so that least is lost within a limit: the multiple-choice knapsack, solved exactly.

Source: H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", 2004, chapter 11. Own code, as solvers of integer
programmes are large packages that settle for a gap, and this is a hundred lines that need none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STATES = 2**18  # choices of some sets that are pursued at once; beyond that the best are thinned out
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """picks: the candidate of every set; cost, value: their sums; gap: how far above the least value it may be."""

    picks: tuple[int, ...]
    cost: float
    value: float
    gap: float = 0.0


def solve(costs: Numbers, values: Numbers, limit: float, *, states: int = STATES) -> Choice | None:
    """One candidate of every set, such that the values sum up to as little as costs of at most `limit` allow.

    costs, values (sets, candidates): infinite where a candidate is none. None: even the least costs exceed the limit.
    Set by set, all sums of costs and values are kept that neither another of no more cost and value makes superfluous
    nor the Lagrangian bound of what is still to come; should they be more than `states`, some are dropped, and the gap
    to the bound is told.
    """
    sets = [undominated(c, v) for c, v in zip(costs, values, strict=True)]
    least = [float(costs[i, members[0]]) for i, members in enumerate(sets)]
    if math.fsum(least) > limit:
        return None
    price = _price(costs, values, sets, limit)
    bounds = [float((values[i, members] + price * costs[i, members]).min()) for i, members in enumerate(sets)]
    known = _filled(costs, values, sets, limit, price)
    most = math.fsum(values[i, pick] for i, pick in enumerate(known))
    cost, value = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    thinned = False
    for i, members in enumerate(sets):
        c = (cost[:, None] + costs[i, members]).ravel()
        v = (value[:, None] + values[i, members]).ravel()
        bound = v + price * (c - limit) + math.fsum(bounds[i + 1 :])
        slack = 1e-9 * (abs(most) + math.fsum(map(abs, bounds)))
        kept = np.flatnonzero((c + math.fsum(least[i + 1 :]) <= limit) & (bound <= most + slack))
        kept = kept[_front(c[kept], v[kept])]
        if len(kept) > states:
            thinned, kept = True, kept[np.linspace(0, len(kept) - 1, states).astype(np.int64)]
        trail.append((kept // len(members), members[kept % len(members)]))
        cost, value = c[kept], v[kept]
    picks = known
    if len(value) and value[-1] <= most:  # the costliest that is left is the best
        place, found = len(value) - 1, []
        for before, chosen in reversed(trail):
            found.append(int(chosen[place]))
            place = int(before[place])
        picks = found[::-1]
    total = math.fsum(values[i, pick] for i, pick in enumerate(picks))
    gap = max(0.0, total - (math.fsum(bounds) - price * limit)) if thinned else 0.0
    return Choice(tuple(picks), math.fsum(costs[i, pick] for i, pick in enumerate(picks)), total, gap)


def undominated(costs: Numbers, values: Numbers) -> NDArray[np.int64]:
    """The candidates of a set for which no other has at most the cost and at most the value, by cost."""
    finite = np.flatnonzero(np.isfinite(costs) & np.isfinite(values))
    return finite[_front(costs[finite], values[finite])]


def _front(costs: Numbers, values: Numbers) -> NDArray[np.int64]:
    """The places of points that no other one is as good as in both, by cost: values fall strictly."""
    order = np.lexsort((values, costs))
    falling = values[order]
    before = np.minimum.accumulate(np.concatenate([[math.inf], falling[:-1]]))
    return order[falling < before]


def _price(costs: Numbers, values: Numbers, sets: Sequence[NDArray[np.int64]], limit: float) -> float:
    """The least value of a unit of cost at which everyone's own choice stays within the limit."""
    steps = [
        float(((values[i, m][:-1] - values[i, m][1:]) / (costs[i, m][1:] - costs[i, m][:-1])).max())
        for i, m in enumerate(sets)
        if len(m) > 1
    ]
    low, high = 0.0, 2 * max(steps, default=0.0)
    if _spent(costs, values, sets, 0.0) <= limit:
        return 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _spent(costs, values, sets, middle) <= limit else (middle, high)
    return high


def _spent(costs: Numbers, values: Numbers, sets: Sequence[NDArray[np.int64]], price: float) -> float:
    return math.fsum(float(costs[i, pick]) for i, pick in enumerate(_cheapest(costs, values, sets, price)))


def _cheapest(costs: Numbers, values: Numbers, sets: Sequence[NDArray[np.int64]], price: float) -> list[int]:
    """Of every set the candidate of least value, its cost paid at this price; the first of equals costs least."""
    return [int(m[(values[i, m] + price * costs[i, m]).argmin()]) for i, m in enumerate(sets)]


def _filled(
    costs: Numbers, values: Numbers, sets: Sequence[NDArray[np.int64]], limit: float, price: float
) -> list[int]:
    """A good choice within the limit: everyone's own at the price, and then whatever gains most and still fits."""
    picks = _cheapest(costs, values, sets, price)
    while True:
        room = limit - math.fsum(float(costs[i, pick]) for i, pick in enumerate(picks))
        gains = [
            (float(values[i, picks[i]] - values[i, other]), i, int(other))
            for i, members in enumerate(sets)
            for other in members
            if costs[i, other] - costs[i, picks[i]] <= room and values[i, other] < values[i, picks[i]]
        ]
        if not gains:
            return picks
        _, i, other = max(gains)
        picks[i] = other
