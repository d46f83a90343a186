"""Convert: a quantized checkpoint of another tool becomes a folder of llmquant's, value for value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint import Checkpoint, locate
from llmquant.errors import VerificationError
from llmquant.exchange import compressed_tensors, foreign, gptq
from llmquant.exchange.model import Matrix, Model, Progress
from llmquant.formats.base import all_finite
from llmquant.formats.integer import Integer
from llmquant.output import OutputFolder, check_usable
from llmquant.version import __version__


def convert(
    source: str,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write the model of `source`, a folder or hub id with compressed-tensors or GPTQ files, to `output`.

    Returns the manifest. Raises PlanError, naming the module, for what no format here can hold, before anything is
    written.
    """
    check_usable(output, overwrite=overwrite)
    checkpoint = Checkpoint(locate(source))
    method, model = foreign.read(checkpoint)
    settings = {"llmquant": __version__, "convert": method, "source": checkpoint.fingerprint()}
    with OutputFolder(output, settings, overwrite=overwrite) as folder:
        if method == compressed_tensors.METHOD:
            model.link(folder, _check_finite, progress)
        else:
            _repack(model, folder, progress)
        manifest = _manifest(model, method, source)
        config = {**model.config, "quantization_config": foreign.quantization_config(model)}
        folder.assemble(config, checkpoint.companions())
        folder.finish(manifest)
    return manifest


def _check_finite(matrix: Matrix, stored: dict[str, Tensor]) -> None:
    if not all_finite(matrix.decoded(stored)):
        raise VerificationError(f"{matrix.target.name}: decodes to NaN or Inf: the checkpoint is damaged")


def _repack(model: Model, folder: OutputFolder, progress: Progress) -> None:
    quantization = model.checkpoint.config()["quantization_config"]
    first = foreign.first_version(quantization)

    def read(matrix: Matrix, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(matrix.format, Integer)
        named = {suffix: stored[matrix.base + suffix] for suffix in matrix.suffixes}
        return gptq.unpack(named, matrix.format.bits, first_version=first)

    def converted(matrix: Matrix, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(matrix.format, Integer)
        named = gptq.repacked(matrix.format, *read(matrix, stored))
        return {matrix.base + suffix: tensor for suffix, tensor in named.items()}

    def verify(matrix: Matrix, stored: dict[str, Tensor], written: dict[str, Tensor]) -> None:
        codes, zeros, scales = read(matrix, stored)
        group = codes.shape[1] // scales.shape[1]
        zeros, scales = zeros.repeat_interleave(group, 1), scales.repeat_interleave(group, 1)
        if not torch.equal((codes - zeros) * scales, matrix.decoded(written)):
            raise VerificationError(f"{matrix.target.name}: decodes to other values than GPTQ's: please report this")

    model.rewrite(folder, converted, verify, progress, _empty_biases(model))


def _empty_biases(model: Model) -> frozenset[str]:
    """Biases of zeros that some tools write for layers that have none."""
    names = {f"{matrix.target.name}.bias" for matrix in model.matrices if not matrix.target.bias}
    found = model.checkpoint.tensors([name for name in names if name in model.checkpoint.names()])
    wrong = [name for name, bias in found.items() if bias.count_nonzero()]
    if wrong:
        raise VerificationError(f"{wrong[0]}: the model has no bias there, and this one is not zero")
    return frozenset(found)


def _manifest(model: Model, method: str, source: str) -> dict[str, Any]:
    before = sum(model.checkpoint.nbytes(name) for name in model.checkpoint.names())
    old = {name for matrix in model.matrices for name in matrix.names}
    layouts = [matrix.format.layout(matrix.target.shape).values() for matrix in model.matrices]
    stored = sum(spec.nbytes for layout in layouts for spec in layout)
    weights = sum(matrix.target.shape[0] * matrix.target.shape[1] for matrix in model.matrices)
    tensors = [
        {
            "name": matrix.target.name,
            "key": matrix.key,
            "format": matrix.format.spec,
            "shape": list(matrix.target.shape),
            "bits_per_weight": matrix.format.bits_per_weight(matrix.target.shape),
        }
        for matrix in model.matrices
    ]
    return {
        "versions": {"llmquant": __version__, "torch": torch.__version__},
        "model": Path(source).name if Path(source).is_dir() else source,
        "settings": {"convert": method},
        "notes": foreign.notes(model),
        "bits_per_weight": 8 * stored / weights,
        "bytes_before": before,
        "bytes_after": before - sum(model.checkpoint.nbytes(name) for name in old) + stored,
        "kept_dense": [],
        "tensors": tensors,
    }
