"""The whole run on paper before any of it is done: every shape, format and kernel, size, memory, disk and time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import llmquant_kernels
from llmquant import formats
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import Checkpoint
from llmquant.errors import OutputError, PlanError
from llmquant.experts import packed_name
from llmquant.formats import Format
from llmquant.matrices import Target
from llmquant.output import free_bytes
from llmquant.recipe import Recipe, Rule
from llmquant.solvers import CALIBRATED, SOLVERS, TUNERS, default_of

BATCH_TOKENS = 8 * 512  # that go through a block at once, by default


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


@dataclass(frozen=True)
class Kept:
    """A matrix that stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    kept: tuple[Kept, ...]
    bytes_before: int
    bytes_after: int
    peak_memory: int  # bytes of anonymous memory, estimated
    seconds: float  # estimated from a short measurement on this machine

    @property
    def weights(self) -> int:
        return sum(row.weights for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized matrices, all metadata counted."""
        return 8 * sum(row.nbytes for row in self.rows) / self.weights

    def of_block(self, block: int | None) -> list[Row]:
        return [row for row in self.rows if row.block == block]

    def modules(self) -> dict[str, list[str]]:
        """Format spec -> names of the modules that have it: what the folder's config tells the loader."""
        found: dict[str, dict[str, None]] = {}
        for row in self.rows:
            found.setdefault(row.format.spec, {})[row.target.listed] = None
        return {spec: list(names) for spec, names in found.items()}

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "name": row.target.name,
                "shape": list(row.target.shape),
                "format": row.format.spec,
                "bits_per_weight": row.format.bits_per_weight(row.target.shape),
                "solver": row.rule.solver,
                "kernel": row.kernel,
            }
            for row in self.rows
        ]
        totals = {
            "bits_per_weight": self.bits_per_weight,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "peak_memory_bytes": self.peak_memory,
            "seconds": self.seconds,
        }
        return {"tensors": rows, "kept": [asdict(kept) for kept in self.kept], **totals}


def make_plan(
    checkpoint: Checkpoint, model: StreamedModel, recipe: Recipe, output: Path, calibration_tokens: int
) -> Plan:
    """Check everything that can be checked without reading a weight. calibration_tokens 0: no calibration.

    Raises PlanError (names the tensor) or OutputError (not enough disk).
    """
    blocks = [*range(len(model.block_names)), None]
    recipe = recipe.settled(calibration_tokens > 0)
    _check_recipe(model, recipe, calibration_tokens > 0)
    kernels: dict[Any, str] = {}
    decided = [decision for block in blocks for decision in _decide(checkpoint, model, recipe, block, kernels)]
    rows = tuple(decision for decision in decided if isinstance(decision, Row))
    kept = tuple(dict.fromkeys(decision for decision in decided if isinstance(decision, Kept)))
    if not rows:
        reason = f", such as {kept[0].name}: {kept[0].reason}" if kept else ""
        raise PlanError(f"nothing is left to quantize: every module is kept dense{reason}")
    before = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    replaced = {name for row in rows for name in row.sources}
    after = before + sum(row.nbytes for row in rows) - sum(checkpoint.nbytes(name) for name in replaced)
    free = free_bytes(output)
    if free < 1.01 * after:
        raise OutputError(f"{output}: the result needs {after:,} bytes, the disk has {free:,} free: free some space")
    memory = _peak_memory(checkpoint, model, rows, calibration_tokens)
    return Plan(rows, kept, before, after, memory, _seconds(rows, calibration_tokens))


def _check_recipe(model: StreamedModel, recipe: Recipe, calibrated: bool) -> None:
    """Raises PlanError where there is nothing that the rules could be about, or what they say cannot be."""
    patterns = {rule.pattern for rule in recipe.rules}
    blocks = [*range(len(model.block_names)), None]
    names = [target.listed for block in blocks for target in model.targets(block).values()]
    names = [name for name in names if name not in model.reserved or name in patterns]
    if not names:
        example = next(iter(model.reserved), None)
        raise PlanError(
            f"{type(model.model).__name__} has no linear layer and no plain convolution in repeated blocks"
            + (f": name others in full in the rules of a recipe, such as {example}" if example else "")
        )
    recipe.check(names, calibrated)


def _decide(
    checkpoint: Checkpoint, model: StreamedModel, recipe: Recipe, block: int | None, kernels: dict[Any, str]
) -> Iterator[Row | Kept]:
    for target in model.targets(block).values():
        name, rule = target.listed, recipe.rule_for(target.listed)
        sources = model.source_keys(target)
        named = rule is not None and rule.pattern == name
        if name in model.reserved and not named:
            if not model.causal:  # of a causal language model it is the head, as everybody knows
                yield Kept(name, f"{model.reserved[name]}: only a rule with its full name changes it")
        elif rule is None or rule.format is None:
            yield Kept(name, "no rule matches it" if rule is None else f"rule {rule.pattern!r} keeps it dense")
        elif not sources:
            yield Kept(name, "the checkpoint stores it in pieces or merged with others")
        # The matrices of a causal language model are about as wide as it is: a format that does not fit one is a
        # mistake. Those of others differ much, down to the nine columns of a depthwise convolution.
        elif not (model.causal or named) and (misfit := _misfit(rule.format, target)):
            yield Kept(name, misfit)
        else:
            yield _row(checkpoint, model, target, block, sources, rule, kernels)
    if block is None:
        return  # embeddings are no surprise
    for name in model.unsupported(block):
        yield Kept(name, "no solver quantizes a parameter of this kind yet")


def _misfit(spec: str, target: Target) -> str | None:
    """Why the format cannot hold the matrix, if so."""
    try:
        formats.get(spec).layout(target.shape)
    except PlanError as error:
        return str(error)
    return None


def _row(
    checkpoint: Checkpoint,
    model: StreamedModel,
    target: Target,
    block: int | None,
    sources: tuple[str, ...],
    rule: Rule,
    kernels: dict[Any, str],
) -> Row:
    assert rule.format is not None
    key, dtype = sources[0], checkpoint.dtype(sources[0])
    if target.expert is not None:
        key = f"{target.holder}.{packed_name(target.parameter)}.weight"
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise PlanError(f"{key}: holds {dtype}, not float16, bfloat16 or float32: give the unquantized checkpoint")
    fmt = formats.get(rule.format).stored_for(dtype)
    try:
        fmt.layout(target.shape)
    except PlanError as error:
        raise PlanError(f"{target.name} {target.shape}: {error}, or keep it dense with --skip") from None
    known = (fmt, target.shape)
    if known not in kernels:
        kernels[known] = llmquant_kernels.choose(fmt.facts(target.shape), model.dtype)[0]
    return Row(block, target, key, fmt, rule, kernels[known], sources)


def _peak_memory(checkpoint: Checkpoint, model: StreamedModel, rows: tuple[Row, ...], tokens: int) -> int:
    """What are not pages of files: float32 copies of the largest matrix, one block's result, statistics."""
    largest = max(row.weights for row in rows)
    of_blocks = [[row for row in rows if row.block == block] for block in [*range(len(model.block_names)), None]]
    packed = max(sum(row.nbytes for row in block) for block in of_blocks)
    outside = sum(checkpoint.nbytes(name) for name in model.outside_keys())
    base = 350 * 2**20  # Python, torch, transformers
    if not tokens:
        return base + 12 * largest + packed + (outside if of_blocks[-1] else 0)
    width = max(row.target.shape[1] for row in rows)
    decoded = max(sum(row.weights for row in block) for block in of_blocks) * model.dtype.itemsize
    streams = 3 * tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize
    solving = 8 * 4 * largest + 7 * 4 * width**2  # the weight, its target, errors and gradients; the Hessian's factors
    tuning = max(_tuning_memory([row for row in block if row.rule.solver in TUNERS]) for block in of_blocks)
    tuning += streams // 3 if tuning else 0  # the block's own outputs
    return base + max(outside, max(solving, tuning) + packed + decoded) + streams


def _tuning_memory(rows: list[Row]) -> int:
    """Of the matrices of a block that are tuned together: 11 numbers for every weight, and what the gradient of a batch
    needs of inputs and outputs.
    """
    return sum(11 * 4 * row.weights + 2 * 4 * BATCH_TOKENS * sum(row.target.shape) for row in rows)


def _operations(row: Row) -> float:
    """Of the gptq solver: three targets, each a Cholesky factor and two solutions, the factor of the sweep, and eight
    products of the weight with the Hessian. Of those that iterate what an iteration takes: a product with the Hessian,
    or the block and its gradients for a batch.
    """
    rows, columns = row.target.shape
    name = row.rule.solver
    if name == "adaround" or name in TUNERS:
        iterations: int = row.rule.options.get("iterations", default_of({**SOLVERS, **TUNERS}[name], "iterations"))
        return iterations * rows * columns * (6 * BATCH_TOKENS if name in TUNERS else 2 * columns)
    return (3 / 3 + 2 / 3) * columns**3 + (3 * 4 + 8 * 2) * rows * columns**2


def _seconds(rows: tuple[Row, ...], tokens: int) -> float:
    """Scaled up from quantizing a small random matrix and, with calibration, from one matrix product."""
    total = 0.0
    measured: dict[Any, float] = {}
    for row in rows:
        clip = row.rule.options.get("clip", "search")
        known = (row.format, clip)
        if known not in measured:
            columns = row.target.shape[1]
            w = torch.randn(max(1, 2**19 // columns), columns)
            start = time.perf_counter()
            SOLVERS["rtn"](w, None, row.format, clip=clip)
            measured[known] = (time.perf_counter() - start) / w.numel()
        total += measured[known] * row.weights * (2 if row.rule.solver in CALIBRATED else 1)
    if tokens:
        a = torch.randn(512, 512)
        start = time.perf_counter()
        torch.mm(a, a)
        flop = (time.perf_counter() - start) / (2 * 512**3)
        # Two streams through the block about three times (stages, then advance), and two outer products of every input.
        forward = 3 * 2 * 2 * tokens * sum(row.weights for row in rows)
        statistics = 2 * 2 * tokens * sum(row.target.shape[1] ** 2 for row in rows)
        solving = sum(_operations(row) for row in rows if row.rule.solver in CALIBRATED)
        total += flop * (forward + statistics + solving)
    return total
