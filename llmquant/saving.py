"""What a block's shard holds: quantized matrices packed, all else as it was; and how it is read back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmquant import tune
from llmquant.blocks import StreamedModel
from llmquant.errors import NonFiniteInput, VerificationError
from llmquant.formats.base import all_finite
from llmquant.job import Prepared
from llmquant.output import OutputFolder
from llmquant.ranks import Parcel
from llmquant.solvers import Solution
from llmquant.solving import Result, put
from llmquant.swap import WeightSwap


@torch.no_grad()
def save_block(
    prepared: Prepared,
    folder: OutputFolder,
    block: int | None,
    results: list[Result],
    *,
    anew: bool = False,
    changed: dict[str, Tensor] | None = None,
    noted: dict[str, Any] | None = None,
) -> None:
    """block None: all that lies outside the blocks, as the last part.

    anew: as a part of its own, which counts instead of the first of the block; changed: what the file gets, of whatever
    blocks, in place of the checkpoint's own tensors; noted: of this part, besides the report.
    """
    model = prepared.model
    quantized = {name for result in results for name in result.row.sources}
    keys = model.outside_keys() if block is None else model.block_keys(block)
    dense = [name for name in keys if name not in quantized]
    tensors = {name: (changed or {}).get(name, own) for name, own in prepared.checkpoint.tensors(dense).items()}
    experts: dict[str, list[Tensor]] = {}
    for result in results:
        row, solution = result.row, result.solution
        names = {suffix: name for name, suffix in row.pieces.items()}
        for suffix, tensor in row.format.pack(solution.codes, solution.grid).items():
            if row.target.expert is None:
                tensors[names[suffix]] = tensor.cpu()
            else:
                experts.setdefault(names[suffix], []).append(tensor.cpu())
    tensors |= {name: torch.stack(parts) for name, parts in experts.items()}

    def check(read: dict[str, Tensor]) -> dict[str, Any]:
        _check_dense({name: read[name] for name in dense})
        for result in results:
            _check_result(result, read)
        return {"report": [result.report for result in results], **(noted or {})}

    index, count = model.places.index(block), len(model.places)
    name = f"{'tuned' if anew else 'model'}-{index + 1:05d}-of-{count:05d}.safetensors"
    folder.write_shard(part_of(model, block, anew), name, tensors, check)


def part_of(model: StreamedModel, block: int | None, anew: bool = False) -> int:
    """The number of a block's part of the folder; anew: of the one that is written when all blocks are."""
    return model.places.index(block) + (len(model.places) if anew else 0)


def _check_dense(read: dict[str, Tensor]) -> dict[str, Any]:
    for name, tensor in read.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not all_finite(tensor):
            raise NonFiniteInput(f"{name}: holds NaN or Inf: the checkpoint is damaged")
    return {}


def _check_result(result: Result, read: dict[str, Tensor]) -> None:
    """What was read back must unpack to what was solved, bit for bit: so the errors noted are those of the file."""
    row, solution = result.row, result.solution
    codes, grid = row.unpacked(read)
    if not (torch.equal(codes, solution.codes.cpu()) and grid.equals(solution.grid)):
        raise VerificationError(f"{row.key}: what was read back is not what was solved: please report this")


def written(folder: OutputFolder, part: int) -> Parcel:
    """The tensors of a shard that has been written; and the names in memory of norms and biases that it changed."""
    record = folder.records[part]
    return Parcel(record.get("changed", []), load_file(folder.partial / record["shard"]))


def matrices(prepared: Prepared, block: int | None, tensors: dict[str, Tensor]) -> list[tune.Matrix]:
    """The quantized matrices of a block, from the tensors of its shard."""
    found = []
    for row in prepared.plan.of_block(block):
        codes, grid = row.unpacked(tensors)
        device = prepared.model.device
        found.append(tune.Matrix(row.target, row.format, codes.to(device), grid.to(device)))
    return found


def moved_vectors(prepared: Prepared, shard: Parcel) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """(name in memory, parameter, value) of norms and biases from which scales were moved, from a block's shard."""
    for name in shard.facts:
        parameter, key = prepared.model.model.get_parameter(name), prepared.model.source_key(name)
        assert key is not None
        yield name, parameter, shard.tensors[key].to(parameter)


def restore(prepared: Prepared, folder: OutputFolder | None, block: int, swap: WeightSwap) -> None:
    """Put the block's quantized weights in place from the shard that an earlier run left the first process."""
    shard = prepared.ranks.alone(lambda: written(folder, block) if folder else Parcel())
    for row, matrix in zip(prepared.plan.of_block(block), matrices(prepared, block, shard.tensors), strict=True):
        put(prepared, swap, row, Solution(matrix.codes, matrix.grid, 0.0))
    for name, parameter, value in moved_vectors(prepared, shard):
        swap.replace(name, parameter, value)
