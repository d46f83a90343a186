"""Dense: every matrix decoded into the type of the rest, an ordinary checkpoint that any tool reads."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from llmquant.errors import VerificationError
from llmquant.exchange.model import Matrix, Model, Progress
from llmquant.experts import packed_name
from llmquant.output import OutputFolder


def check(model: Model) -> list[str]:
    """Nothing is beyond it. Returns what a user should know, line by line."""
    return []


def write(model: Model, folder: OutputFolder, progress: Progress) -> dict[str, Any]:
    """Decode shard by shard. Returns config.json."""

    # Experts are put together in the one tensor that the model has of them, which the shard holds on to.
    experts: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def decoded(matrix: Matrix, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        weight, key = matrix.target.stored(matrix.decoded(stored).to(model.dtype)), _key(matrix)
        if matrix.target.expert is None:
            return {key: weight}
        if (together := experts.get(key)) is None:
            together = experts[key] = torch.empty(len(stored[matrix.names[0]]), *weight.shape, dtype=weight.dtype)
        together[matrix.target.expert] = weight
        return {key: together}

    def verify(matrix: Matrix, stored: dict[str, Tensor], read: dict[str, Tensor]) -> None:
        key, expert = _key(matrix), matrix.target.expert
        expected = tuple(model.skeleton.get_parameter(matrix.target.parameter).shape)
        found = read[key] if expert is None else read[key][expert]
        if tuple(read[key].shape) != expected or not torch.isfinite(found).all():
            raise VerificationError(
                f"{key}: {tuple(read[key].shape)}, should be {expected} and finite in {model.dtype}"
            )

    model.rewrite(folder, decoded, verify, progress)
    return model.config


def _key(matrix: Matrix) -> str:
    """The name of the tensor that a matrix is, or lies in, once it is dense."""
    if matrix.target.expert is None:
        return matrix.key
    leaf = matrix.target.parameter.rpartition(".")[2]
    return matrix.base.removesuffix(f"{packed_name(leaf)}.") + leaf
