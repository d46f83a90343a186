"""The whole run on paper before any of it is done: every shape, format and kernel, size, memory, disk and time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

import llmquant_kernels
from llmquant import estimate, formats
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import Checkpoint
from llmquant.errors import OutputError, PlanError
from llmquant.estimate import Row, Work
from llmquant.experts import packed_name
from llmquant.matrices import Target
from llmquant.output import free_bytes
from llmquant.ranks import beside
from llmquant.recipe import Recipe, Rule
from llmquant.tune import Means

SILENT = Work()  # no calibration


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
    offload: bool = False  # whether the hidden states of calibration lie on the disk
    tuning: Means | None = None  # how blocks are trained together, if they are
    notes: tuple[str, ...] = ()  # what else there is to know
    sensitivity: str | None = None  # how formats are chosen, if they are

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
            "offload_activations": self.offload,
            "tuning": self.tuning and asdict(self.tuning),
            "sensitivity": self.sensitivity,
        }
        return {"tensors": rows, "kept": [asdict(kept) for kept in self.kept], "notes": list(self.notes), **totals}


def make_plan(
    checkpoint: Checkpoint,
    model: StreamedModel,
    recipe: Recipe,
    output: Path | None,
    work: Work = SILENT,
    max_memory: int | None = None,
) -> Plan:
    """Check everything that can be checked without reading a weight.

    output: the folder to write, whose disk has to have room; None: another process writes it.
    max_memory: bytes of anonymous memory that the run may take, by default as many as are free. Hidden states go to the
    disk where they do not fit.
    Raises PlanError (names the tensor; or more memory is needed than `max_memory`) or OutputError (not enough disk).
    """
    rows, kept, before, after = _decided(checkpoint, model, recipe, work.tokens > 0)
    if output is not None and (free := free_bytes(output)) < 1.01 * after:
        raise OutputError(f"{output}: the result needs {after:,} bytes, the disk has {free:,} free: free some space")
    outside = sum(checkpoint.nbytes(name) for name in model.outside_keys())
    # Of several processes on one machine each takes its share of what is free.
    room = psutil.virtual_memory().available // beside() if max_memory is None else max_memory
    if work.tokens and not work.offload and estimate.memory(model, rows, outside, work) > room:
        work = replace(work, offload=True)
    if work.tuning:
        work = replace(work, means=_means(model, rows, work, max_memory))
    memory = estimate.memory(model, rows, outside, work)
    if max_memory is not None and memory > max_memory:
        advice = "take fewer rows at once with --batch, or --quality fast" if work.tokens else "skip the largest matrix"
        raise PlanError(f"the run needs about {memory:,} bytes of memory, --max-memory gives {max_memory:,}: {advice}")
    seconds = estimate.seconds(model, rows, before + after, work)
    notes = tuple(checkpoint.notes)
    return Plan(rows, kept, before, after, memory, seconds, work.offload, work.means, notes)


def with_recipe(plan: Plan, checkpoint: Checkpoint, model: StreamedModel, recipe: Recipe, calibrated: bool) -> Plan:
    """The plan with other formats, which on the whole take no more than those that it was made for."""
    rows, kept, _, after = _decided(checkpoint, model, recipe, calibrated)
    return replace(plan, rows=rows, kept=kept, bytes_after=after)


def _decided(
    checkpoint: Checkpoint, model: StreamedModel, recipe: Recipe, calibrated: bool
) -> tuple[tuple[Row, ...], tuple[Kept, ...], int, int]:
    """What is quantized and what is not, and the bytes of all before and after."""
    recipe = recipe.settled(calibrated)
    _check_recipe(model, recipe, calibrated)
    kernels: dict[Any, str] = {}
    decided = [decision for block in model.places for decision in _decide(checkpoint, model, recipe, block, kernels)]
    rows = tuple(decision for decision in decided if isinstance(decision, Row))
    kept = tuple(dict.fromkeys(decision for decision in decided if isinstance(decision, Kept)))
    if not rows:
        reason = f", such as {kept[0].name}: {kept[0].reason}" if kept else ""
        raise PlanError(f"nothing is left to quantize: every module is kept dense{reason}")
    before = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    replaced = {name for row in rows for name in row.sources}
    after = before + sum(row.nbytes for row in rows) - sum(checkpoint.nbytes(name) for name in replaced)
    return rows, kept, before, after


def _means(model: StreamedModel, rows: tuple[Row, ...], work: Work, max_memory: int | None) -> Means:
    """Of tuning. By all the memory that the device has, not what is free: the same machine comes to the same result."""
    room = int(0.8 * estimate.device_memory(model.device)[1]) if max_memory is None else max_memory
    means = estimate.means(model, rows, work, room)
    if means.nbytes > room:
        raise PlanError(
            f"--quality best trains all blocks at once, which needs about {means.nbytes:,} bytes of memory, and there "
            f"are {room:,}: use --quality balanced, which needs one block at a time"
        )
    return means


def _check_recipe(model: StreamedModel, recipe: Recipe, calibrated: bool) -> None:
    """Raises PlanError where there is nothing that the rules could be about, or what they say cannot be."""
    patterns = {rule.pattern for rule in recipe.rules}
    names = [target.listed for block in model.places for target in model.targets(block).values()]
    names = [name for name in [*names, *model.embeddings()] if name not in model.reserved or name in patterns]
    names = [name for name in names if name not in model.embeddings() or name in patterns]
    for pattern in patterns:
        if (other := model.shared_with(pattern)) is not None:
            raise PlanError(
                f"{pattern} shares its weight with {other}, and a quantized one cannot be shared: save the model with "
                'both, and "tie_word_embeddings": false in its config.json, first'
            )
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
    asked = {rule.pattern for rule in recipe.rules}
    embeddings = [] if block is not None else [t for name, t in model.embeddings().items() if name in asked]
    for target in [*model.targets(block).values(), *embeddings]:
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
