"""Quantized checkpoints of other tools: which of their matrices is stored how, in our formats' names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llmquant import formats
from llmquant.checkpoint import Checkpoint
from llmquant.errors import CheckpointError, PlanError
from llmquant.exchange import compressed_tensors, gptq
from llmquant.exchange.model import Matrix, Model, empty
from llmquant.formats import options
from llmquant.matrices import Target, target_of
from llmquant.version import __version__


def read(checkpoint: Checkpoint) -> tuple[str, Model]:
    """The tool's quant_method, and the model. Headers and zero points are read, weights are not.

    Raises PlanError, naming the module, for what no format here can hold; CheckpointError for what is damaged.
    """
    config = checkpoint.config()
    quantization = config.pop("quantization_config", None) or config.pop("compression_config", None)
    method = (quantization or {}).get("quant_method")
    readers = {compressed_tensors.METHOD: _compressed_tensors, "gptq": _gptq}
    if method not in readers:
        found = f"its quant_method is {method}" if method else "it is not quantized"
        raise PlanError(f"{checkpoint.folder}: {found}: what is read are {' and '.join(readers)}")
    skeleton = empty(config)
    matrices = tuple(readers[method](checkpoint, quantization, skeleton))
    if not matrices:
        raise CheckpointError(f"{checkpoint.folder}: config.json says {method}, but no quantized tensor is there")
    return method, Model(checkpoint, config, skeleton, matrices)


def quantization_config(model: Model) -> dict[str, Any]:
    """What our config.json says of it."""
    listed: dict[str, list[str]] = {}
    for matrix in model.matrices:
        listed.setdefault(matrix.format.spec, []).append(matrix.target.name)
    return {"quant_method": "llmquant", "version": __version__, "formats": listed}


def _target(name: str, skeleton: nn.Module) -> Target:
    module = dict(skeleton.named_modules()).get(name)
    target = None if module is None else target_of(name, module)
    if target is None or target.transposed or target.kernel:
        raise PlanError(f"{name}: is quantized, but {type(skeleton).__name__} has no linear layer of this name")
    return target


# ---- compressed-tensors


def _compressed_tensors(checkpoint: Checkpoint, quantization: dict[str, Any], skeleton: nn.Module) -> Iterator[Matrix]:
    names = set(checkpoint.names())
    packed = {name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")}
    cast = {name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}
    for name in sorted(packed | cast):
        target = _target(name, skeleton)
        group = _group(name, skeleton.get_submodule(name), quantization)
        fmt = compressed_tensors.format_of(group["weights"], checkpoint.dtype(f"{name}.weight_scale"))
        matrix = Matrix(target, f"{name}.weight", fmt)
        _check_layout(checkpoint, matrix)
        yield matrix


def notes(model: Model) -> list[str]:
    """What a user should know of a model that was read."""
    groups = (model.checkpoint.config().get("quantization_config") or {}).get("config_groups", {}).values()
    if any(group.get("input_activations") for group in groups):
        return ["the checkpoint also asks for quantized activations, which stay as they are here"]
    return []


def _group(name: str, module: nn.Module, quantization: dict[str, Any]) -> dict[str, Any]:
    for group in quantization["config_groups"].values():
        if any(_matches(name, module, target) for target in group["targets"]):
            return dict(group)
    raise CheckpointError(f"{name}: is quantized, but no group of config.json is about it")


def _matches(name: str, module: nn.Module, target: str) -> bool:
    """A target is the name of a module, a regular expression after `re:`, or the name of a class."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, type(module).__name__)


def _check_layout(checkpoint: Checkpoint, matrix: Matrix) -> None:
    """The tensors of the checkpoint must be those of the format, and no more."""
    prefix, layout = matrix.base, matrix.format.layout(matrix.target.shape)
    for suffix, spec in layout.items():
        name = prefix + suffix
        if name not in checkpoint.names():
            raise CheckpointError(f"{name}: is missing, which {matrix.format.spec} needs")
        if (checkpoint.shape(name), checkpoint.dtype(name)) != (spec.shape, spec.dtype):
            raise PlanError(
                f"{name}: is {checkpoint.dtype(name)} {checkpoint.shape(name)}, and {spec.dtype} {spec.shape} in "
                f"{matrix.format.spec}"
            )
    known = {prefix + suffix for suffix in (*layout, "bias")}
    others = [name for name in checkpoint.names() if name.startswith(prefix) and name not in known]
    if others:
        raise PlanError(f"{others[0]}: has no place in {matrix.format.spec}: columns in another order, or activations")


# ---- GPTQ


def _gptq(checkpoint: Checkpoint, quantization: dict[str, Any], skeleton: nn.Module) -> Iterator[Matrix]:
    for key in sorted(name for name in checkpoint.names() if name.endswith(".qweight")):
        name = key.removesuffix(".qweight")
        target = _target(name, skeleton)
        outputs, inputs = target.shape
        named = {suffix: f"{name}.{suffix}" for suffix in gptq.SUFFIXES}
        missing = [stored for suffix, stored in named.items() if stored not in checkpoint.names() and suffix != "g_idx"]
        if missing:
            raise CheckpointError(f"{missing[0]}: is missing")
        groups, bits = checkpoint.shape(named["scales"])[0], 32 * checkpoint.shape(key)[0] // inputs
        if bits not in gptq.BITS or checkpoint.shape(key) != (inputs * bits // 32, outputs) or inputs % groups:
            raise PlanError(f"{key}: {checkpoint.shape(key)} with {groups} groups is no matrix of {outputs}x{inputs}")
        suffixes = tuple(suffix for suffix in gptq.SUFFIXES if named[suffix] in checkpoint.names())
        stored = checkpoint.tensors([named[suffix] for suffix in suffixes if suffix != "qweight"])
        small = {suffix: stored[named[suffix]] for suffix in suffixes if suffix != "qweight"}
        if "g_idx" in small and not torch.equal(small["g_idx"].long(), torch.arange(inputs) // (inputs // groups)):
            raise PlanError(f"{name}: its columns are in an order of their own (desc_act), which no format here has")
        zeros = gptq.zero_points(small, bits, first_version=first_version(quantization))
        if zeros.max() >= 2**bits:
            raise PlanError(f"{name}: a zero point of {int(zeros.max())} is no code of {bits} bits")
        convention = None if bool((zeros == 2 ** (bits - 1)).all()) else "asym"
        granularity = "channel" if groups == 1 else inputs // groups
        spec = options.spec(f"int{bits}", granularity, convention, checkpoint.dtype(named["scales"]))
        yield Matrix(target, f"{name}.weight", formats.get(spec), suffixes)


def first_version(quantization: dict[str, Any]) -> bool:
    return quantization.get("checkpoint_format", "gptq") != "gptq_v2"
