"""What each candidate format costs a model, one set of matrices at a time: measured, or estimated block by block.

kl        KL(original || with this set alone rounded), nats a token: exact, with the whole model in memory, and one pass
          through all that comes behind for every set and candidate.
fisher    tr(G D H D^T) / 2, where a weight changes by D: the same to second order (see curvature.py). One block in
          memory at a time, one backward pass.
hessian   tr(D H D^T) / tr(W H W^T): how far outputs are off, relative to themselves. No backward pass; blocks are not
          weighed against each other.

Weights are rounded to nearest for it, as `--quality fast` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmquant import formats
from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams, summed_windows
from llmquant.checkpoint import Checkpoint
from llmquant.errors import PlanError, VerificationError
from llmquant.estimate import Row
from llmquant.job import Progress
from llmquant.knapsack import Numbers
from llmquant.stages import Stage
from llmquant.stats import Stats, ratio
from llmquant.swap import WeightSwap
from llmquant.trial import rounded

CHUNK_BYTES = 2**26  # of float32 logits that exist at once
REFERENCE_BYTES = 2**30  # of the original's log-probabilities that are kept, for the head not to run twice each time


# ---- what there is to choose from


@dataclass(frozen=True)
class Fused:
    """Matrices of a block that get one format.

    options: for every candidate the rows with its format; none where it cannot hold all of them.
    """

    block: int
    rows: tuple[Row, ...]
    options: tuple[tuple[Row, ...], ...]

    @property
    def names(self) -> str:
        return ", ".join(dict.fromkeys(row.target.listed for row in self.rows))


def fused(
    checkpoint: Checkpoint, block: int, order: list[Stage], rows: list[Row], specs: tuple[str, ...]
) -> list[Fused]:
    """The sets of a block, in the order of its rows.

    One set are matrices that read the same tensor, the experts of a module, and matrices whose names differ only in the
    number of an inner list, as experts that are modules; sets that share one are one. order: the stages of the block.
    Raises PlanError where no candidate can hold a set.
    """
    stage_of = {target.name: number for number, stage in enumerate(order) for target in stage.targets}
    sets: list[tuple[set[object], list[Row]]] = []
    for row in rows:
        keys: set[object] = {_numberless(row.target.listed)}
        if row.target.expert is not None:
            keys.add(row.target.holder)
        if row.target.name in stage_of:
            keys.add(stage_of[row.target.name])
        joined = [part for part in sets if part[0] & keys]
        sets = [part for part in sets if not part[0] & keys]
        sets.append((keys.union(*(part[0] for part in joined)), [*(own for part in joined for own in part[1]), row]))
    place = {row.target.name: number for number, row in enumerate(rows)}
    members = [sorted(own, key=lambda row: place[row.target.name]) for _, own in sets]
    members.sort(key=lambda own: place[own[0].target.name])
    return [_with_options(checkpoint, block, tuple(own), specs) for own in members]


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+(?=\.\D)", ".*", name)


def _with_options(checkpoint: Checkpoint, block: int, rows: tuple[Row, ...], specs: tuple[str, ...]) -> Fused:
    options = tuple(in_format(checkpoint, rows, spec) for spec in specs)
    found = Fused(block, rows, options)
    if not any(options):
        raise PlanError(f"{found.names}: none of {', '.join(specs)} can hold them: give others, or --skip them")
    return found


def in_format(checkpoint: Checkpoint, rows: tuple[Row, ...], spec: str) -> tuple[Row, ...]:
    """The rows with another format; none where it cannot hold all of them."""
    found = []
    for row in rows:
        fmt = formats.get(spec).stored_for(checkpoint.dtype(row.sources[0]))
        try:
            fmt.layout(row.target.shape)
        except PlanError:
            return ()
        found.append(replace(row, format=fmt))
    return tuple(found)


def sizes(sets: list[Fused]) -> Numbers:
    """Bytes (sets, candidates); infinite where there is no such option."""
    found = [[sum(row.nbytes for row in option) if option else np.inf for option in part.options] for part in sets]
    return np.array(found, dtype=np.float64)


# ---- by the divergence of the predictions


class Whole:
    """A model with all of its blocks in memory: how far its predictions are from its own after weights have changed.

    windows (n, length) int64 are run `batch` at a time. A context manager: nothing of the model is loaded before or
    after. Call it without gradients.
    """

    def __init__(self, model: StreamedModel, windows: Tensor, batch: int, progress: Progress) -> None:
        self.model = model
        self._streams = Streams.start(model, windows, batch, partial(progress, "embed"))
        self._entering: list[list[Tensor]] = []  # of every block, and of what comes after the last: by batch
        self._originals: dict[str, Tensor] = {}
        self._kept: list[list[Tensor]] | None = None  # what the original predicts

    def __enter__(self) -> Whole:
        for block in range(len(self.model.block_names)):
            self.model.load_block(block)
        self.model.load_outside()
        self.settle()
        self._outputs = self._entering[-1]
        vocabulary = self.model.config.get_text_config().vocab_size
        if sum(hidden[..., 0].numel() for hidden in self._outputs) * vocabulary * 4 <= REFERENCE_BYTES:
            self._kept = [list(self._log_probabilities(i, hidden)) for i, hidden in enumerate(self._outputs)]
        return self

    def __exit__(self, *exception: object) -> None:
        for block in range(len(self.model.block_names)):
            self.model.unload_block(block)
        self.model.unload_outside()

    def sets(self, checkpoint: Checkpoint, rows: list[Row], specs: tuple[str, ...]) -> list[Fused]:
        """Of all blocks, as `fused` finds them."""
        found = []
        for block, entering in enumerate(self._entering[:-1]):
            order = replace(self._streams, reference=entering).stages(block)
            found += fused(checkpoint, block, order, [row for row in rows if row.block == block], specs)
        return found

    def put(self, rows: tuple[Row, ...]) -> None:
        """Round matrices to their formats, from the original weights whatever is in their place."""
        stacks: dict[str, Tensor] = {}
        for row in rows:
            name = row.target.parameter
            parameter = self.model.model.get_parameter(name)
            original = self._originals.setdefault(name, parameter.data)
            new = row.target.stored(rounded(row, row.target.seen(original)).to(original.dtype))
            if row.target.expert is None:
                parameter.data = new
            else:
                stacks.setdefault(name, original.clone())[row.target.expert] = new
                parameter.data = stacks[name]

    def put_back(self, rows: tuple[Row, ...]) -> None:
        for name in {row.target.parameter for row in rows} & self._originals.keys():
            self.model.model.get_parameter(name).data = self._originals[name]

    def settle(self) -> None:
        """Run all blocks as they are now: `divergence` starts from what enters a block then."""
        entering = [self._streams.reference]
        for block in range(len(self.model.block_names)):
            calls = [of_batch[block] for of_batch in self._streams.calls]
            entering.append([self.model.run_block(block, *pair) for pair in zip(entering[-1], calls, strict=True)])
        self._entering = entering

    def divergence(self, block: int = 0) -> float:
        """KL(original || now), nats a token. Nothing before the block may have changed since the last `settle`."""
        total, tokens = 0.0, 0
        for i, hidden in enumerate(self._entering[block]):
            for later in range(block, len(self.model.block_names)):
                hidden = self.model.run_block(later, hidden, self._streams.calls[i][later])
            before = self._kept[i] if self._kept is not None else self._log_probabilities(i, self._outputs[i])
            for log_p, log_q in zip(before, self._log_probabilities(i, hidden), strict=True):
                total += float((log_p.exp() * (log_p - log_q)).sum(-1).sum(dtype=torch.float64))
                tokens += log_q[..., 0].numel()
        if not np.isfinite(total):
            raise VerificationError(
                f"{self.model.block_names[block]}: the predictions are not finite once it is rounded: give formats "
                "with more bits, or --sensitivity fisher"
            )
        return total / tokens

    def _log_probabilities(self, i: int, hidden: Tensor) -> Iterator[Tensor]:
        """Of all next tokens, (windows, tokens, vocabulary) float32, of pieces of the windows of batch i."""
        length = max(1, CHUNK_BYTES // (4 * self.model.config.get_text_config().vocab_size * len(hidden)))
        for tokens, states in zip(*(part.split(length, 1) for part in (self._streams.tokens[i], hidden)), strict=True):
            yield self.model.logits(tokens.to(self.model.device), states).float().log_softmax(-1)


def measured(whole: Whole, sets: list[Fused], progress: Progress) -> Numbers:
    """Nats a token (sets, candidates): KL(original || with one set in one format), all else as it was."""
    for part in sets:
        whole.put_back(part.rows)
    whole.settle()
    found = np.full((len(sets), len(sets[0].options)), np.inf)
    for done, (place, part) in enumerate(enumerate(sets), 1):
        for pick, option in enumerate(part.options):
            if option:
                whole.put(option)
                found[place, pick] = whole.divergence(part.block)
        whole.put_back(part.rows)
        progress("sensitivity", done, len(sets))
    return found


def measured_in_context(
    whole: Whole, sets: list[Fused], picks: tuple[int, ...], wanted: NDArray[np.bool_], progress: Progress
) -> Numbers:
    """Nats a token (sets, candidates): by how much the divergence changes where one set has another format than its
    pick, and all others have theirs; not a number where it is not wanted.
    """
    for part, pick in zip(sets, picks, strict=True):
        whole.put(part.options[pick])
    whole.settle()
    base = whole.divergence(len(whole.model.block_names))
    found = np.full(wanted.shape, np.nan)
    for place, (part, own) in enumerate(zip(sets, picks, strict=True)):
        found[place, own] = 0.0
        for pick, option in enumerate(part.options):
            if option and pick != own and wanted[place, pick]:
                whole.put(option)
                found[place, pick] = whole.divergence(part.block) - base
        whole.put(part.options[own])
        progress("sensitivity in context", place + 1, len(sets))
    return found


# ---- by what is known of a block


def estimated(
    model: StreamedModel,
    checkpoint: Checkpoint,
    windows: Tensor,
    batch: int,
    rows: list[Row],
    specs: tuple[str, ...],
    curves: dict[str, Tensor] | None,
    progress: Progress,
) -> tuple[list[Fused], Numbers]:
    """The sets of all blocks, and what each candidate costs them (sets, candidates), one block in memory at a time.

    curves: of every target G in blocks along the diagonal, for Fisher's estimate, in nats a token; targets that no
    gradient reached cost nothing. None: the relative error of the outputs, summed over matrices.
    """
    streams = Streams.start(model, windows, batch, partial(progress, "embed"))
    tokens = summed_windows(len(windows)) * windows.shape[1]
    sets: list[Fused] = []
    costs: list[list[float]] = []
    for block in range(len(model.block_names)):
        with model.loaded(block):
            order = streams.stages(block)
            streams.remember(block, order)
            own = fused(checkpoint, block, order, [row for row in rows if row.block == block], specs)
            costs += _estimated_block(model, block, streams, order, own, curves, tokens)
            sets += own
            streams.advance(block, WeightSwap())
        progress("sensitivity", block + 1, len(model.block_names))
    return sets, np.array(costs)


def _estimated_block(
    model: StreamedModel,
    block: int,
    streams: Streams,
    order: list[Stage],
    sets: list[Fused],
    curves: dict[str, Tensor] | None,
    tokens: int,
) -> list[list[float]]:
    """Of every set of a block what its candidates cost. Matrices that no token reaches cost nothing."""
    options: dict[str, dict[int, Row]] = {}
    for part in sets:
        for pick, option in enumerate(part.options):
            for row in option:
                options.setdefault(row.target.name, {})[pick] = row
    cost: dict[str, dict[int, float]] = {}
    for stage in order:
        if not any(target.name in options for target in stage.targets):
            continue
        for target, stats in streams.statistics(block, stage, WeightSwap()):
            w = target.matrix(model.module(target)).detach().float()
            share = stats.tokens / tokens if target.expert is not None else 1.0
            for pick, row in options.get(target.name, {}).items():
                change = rounded(row, w).sub_(w)
                if curves is None:
                    found = ratio(stats.output_energy(change), stats.output_energy(w)) ** 2
                else:
                    found = share * fisher(change, stats, curves[target.name]) if target.name in curves else 0.0
                cost.setdefault(target.name, {})[pick] = found
    return [
        [
            math.fsum(cost.get(row.target.name, {}).get(pick, 0.0) for row in option) if option else math.inf
            for pick, option in enumerate(part.options)
        ]
        for part in sets
    ]


def fisher(change: Tensor, stats: Stats, curvature: Tensor) -> float:
    """tr(G D H D^T) / 2 of a change D (out, in) of the weight, with H the mean of x x^T: nats a token that it sees.

    curvature (blocks, b, b): G along the diagonal, whose last block may have more rows than there are.
    """
    count, width, _ = curvature.shape
    padded = nn.functional.pad(change, (0, 0, 0, count * width - len(change)))
    felt = (padded @ stats.hessian).unflatten(0, (count, width)) @ padded.unflatten(0, (count, width)).mT
    return float((felt * curvature.to(felt)).sum(dtype=torch.float64)) / (2 * stats.worth)
