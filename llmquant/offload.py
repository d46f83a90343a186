"""Room for activations: in memory, or mapped to files, whose pages the system writes out when it needs the memory."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llmquant.errors import OutputError


def room(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """A tensor to write to: in memory, or mapped to a file in `folder` without a name, which goes when the tensor does.

    Raises OutputError where the file cannot be made, or the disk has no room for it.
    """
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            # Where the file had holes, a full disk would kill the process when a page is written.
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
    except OSError as error:
        raise OutputError(
            f"{folder}: {size * dtype.itemsize:,} bytes of hidden states cannot be written: {error}: free some space, "
            "or take fewer tokens"
        ) from None
