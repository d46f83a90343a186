"""Dense: every matrix decoded into the type of the rest, an ordinary checkpoint that any tool reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmquant.errors import VerificationError
from llmquant.exchange.model import Matrix, Model, Progress
from llmquant.output import OutputFolder


def check(model: Model) -> list[str]:
    """Nothing is beyond it. Returns what a user should know, line by line."""
    return []


def write(model: Model, folder: OutputFolder, progress: Progress) -> dict[str, Any]:
    """Decode shard by shard. Returns config.json."""

    def decoded(matrix: Matrix, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {matrix.key: matrix.target.stored(matrix.decoded(stored).to(model.dtype))}

    def verify(matrix: Matrix, stored: dict[str, Tensor], read: dict[str, Tensor]) -> None:
        expected = tuple(model.skeleton.get_submodule(matrix.target.name).get_parameter("weight").shape)
        if tuple(read[matrix.key].shape) != expected or not torch.isfinite(read[matrix.key]).all():
            raise VerificationError(
                f"{matrix.key}: {tuple(read[matrix.key].shape)}, should be {expected} and finite in {model.dtype}"
            )

    model.rewrite(folder, decoded, verify, progress)
    return model.config
