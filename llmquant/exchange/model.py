"""A quantized model as other tools' formats see it: matrices by name, each with its format, and what stays dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmquant import formats, inspection
from llmquant.checkpoint import Checkpoint
from llmquant.errors import CheckpointError, PlanError
from llmquant.experts import layouts
from llmquant.formats import Format
from llmquant.matrices import Target, class_named, target_of, text_config
from llmquant.output import OutputFolder

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix. key: the checkpoint's own name of its dense weight."""

    target: Target
    key: str
    format: Format
    suffixes: tuple[str, ...] = ()  # of its tensors in the checkpoint, where that is not the format's own

    @property
    def base(self) -> str:
        """What the names of its stored tensors begin with."""
        return self.key.removesuffix("weight")

    @property
    def names(self) -> list[str]:
        return [self.base + suffix for suffix in self.suffixes or self.format.layout(self.target.shape)]

    @property
    def plain(self) -> bool:
        """Whether it is the weight of an nn.Linear, stored as (out, in)."""
        return not self.target.transposed and not self.target.kernel

    def named(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """{suffix: stored tensor} out of tensors by their names in the file; of an expert its own part of them."""
        return self.format.named(tensors, self.key, self.target.shape, self.target.expert)

    def decoded(self, tensors: dict[str, Tensor]) -> Tensor:
        """(out, in) float32"""
        return self.format.decode(*self.format.unpack(self.named(tensors), self.target.shape))


@dataclass(frozen=True)
class Model:
    """What an export is made of. Before a run `checkpoint` is the unquantized one: names and shapes are known by then.

    config: config.json without its quantization_config; skeleton: the model on meta, with dense layers.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    skeleton: nn.Module
    matrices: tuple[Matrix, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Model:
        """A finished folder. Raises CheckpointError where it is none."""
        facts, checkpoint = inspection.manifest(folder), Checkpoint(folder)
        config = checkpoint.config()
        if (config.pop("quantization_config", None) or {}).get("quant_method") != "llmquant":
            raise CheckpointError(f"{folder}: holds no model in llmquant's own format: only such a one is exported")
        skeleton = empty(config)
        modules = dict(skeleton.named_modules())
        transposed: dict[str, bool] = {}
        if any("expert" in tensor for tensor in facts["tensors"]):
            transposed = layouts(skeleton, getattr(text_config(skeleton.config), "hidden_size", 0))
        matrices = []
        for tensor in facts["tensors"]:
            target = _target(tensor, modules, transposed)
            matrices.append(Matrix(target, tensor["key"], formats.get(tensor["format"])))
        return cls(checkpoint, config, skeleton, tuple(matrices), facts)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tensors that are not quantized."""
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{self.checkpoint.folder / 'config.json'}: dtype {name!r} is no type of torch")
        return dtype

    def dense_linears(self) -> list[str]:
        """What stays dense and might be taken for a linear layer: those of the model, and by the checkpoint's names
        every two-dimensional weight that is none of its tables: other tools have linear layers for routers too.
        """
        quantized = {matrix.target.name for matrix in self.matrices}
        keys = {matrix.key for matrix in self.matrices}
        modules = dict(self.skeleton.named_modules())
        found = {name for name, part in modules.items() if isinstance(part, nn.Linear) and name not in quantized}
        for name in self.checkpoint.names():
            module = name.removesuffix(".weight")
            if module == name or name in keys or len(self.checkpoint.shape(name)) != 2:
                continue
            if not isinstance(modules.get(module), nn.Embedding):
                found.add(module)
        return sorted(found)

    def shards(self) -> Iterator[tuple[str, list[str], list[Matrix]]]:
        """(file, names of its dense tensors, its matrices); a matrix lies where the first of its tensors is."""
        stored = {name for matrix in self.matrices for name in matrix.names}
        for file in self.checkpoint.files():
            names = [name for name in self.checkpoint.names() if self.checkpoint.file(name) == file]
            matrices = [matrix for matrix in self.matrices if self.checkpoint.file(matrix.names[0]) == file]
            yield file, [name for name in names if name not in stored], matrices

    def link(
        self, folder: OutputFolder, verify: Callable[[Matrix, dict[str, Tensor]], None], progress: Progress
    ) -> None:
        """Link every shard, whose bytes stay what they are, once `verify(matrix, stored tensors)` has let them pass."""
        shards = list(self.shards())
        for part, (file, _, matrices) in enumerate(shards):
            progress(file, part, len(shards))
            if part in folder.records:
                continue
            for matrix in matrices:
                verify(matrix, self.checkpoint.tensors(matrix.names))
            names = [name for name in self.checkpoint.names() if self.checkpoint.file(name) == file]
            folder.link_shard(part, self.checkpoint.folder / file, names)

    def rewrite(
        self,
        folder: OutputFolder,
        convert: Callable[[Matrix, dict[str, Tensor]], dict[str, Tensor]],
        verify: Callable[[Matrix, dict[str, Tensor], dict[str, Tensor]], None],
        progress: Progress,
        dropped: frozenset[str] = frozenset(),
    ) -> None:
        """Write every shard with `convert(matrix, stored tensors)` in place of what the matrices are stored as.

        verify(matrix, stored tensors, tensors as read back) raises VerificationError. dropped: tensors to leave out.
        """
        shards = list(self.shards())
        for part, (file, dense, matrices) in enumerate(shards):
            progress(file, part, len(shards))
            if part in folder.records:
                continue
            stored = self.checkpoint.tensors([name for matrix in matrices for name in matrix.names])
            tensors = {name: tensor for name, tensor in self.checkpoint.tensors(dense).items() if name not in dropped}
            for matrix in matrices:
                tensors |= convert(matrix, stored)

            def check(read: dict[str, Tensor], matrices: list[Matrix] = matrices, stored: Any = stored) -> dict:
                for matrix in matrices:
                    verify(matrix, stored, read)
                return {}

            folder.write_shard(part, file, tensors, check)


def _target(tensor: dict[str, Any], modules: dict[str, nn.Module], transposed: dict[str, bool]) -> Target:
    """Where a matrix of a manifest belongs. transposed: of every parameter of experts, whether these lie as (in, out).

    Raises CheckpointError for experts of a parameter that the model does not have.
    """
    name, shape = tensor["name"], (tensor["shape"][0], tensor["shape"][1])
    if "expert" in tensor:
        parameter = name.rpartition(".")[0]
        if parameter not in transposed:
            raise CheckpointError(f"{name}: the model has no experts {parameter}: quantize it again")
        return Target(name, shape, transposed[parameter], bias=False, expert=tensor["expert"])
    return target_of(name, modules[name]) or Target(name, shape, transposed=False, bias=False)  # or an embedding


def empty(config: dict[str, Any]) -> nn.Module:
    """The dense model that config describes, on meta."""
    known = class_named(config.get("architectures"))
    parsed = AutoConfig.for_model(**{**config, "model_type": config["model_type"]})
    with init_empty_weights(include_buffers=False):
        return known._from_config(parsed) if known else AutoModelForCausalLM.from_config(parsed)


def as_float16(values: Tensor, name: str, where: str) -> Tensor:
    """Scales or offsets (out, groups) in float16. Raises PlanError naming the first that would change."""
    found = values.half()
    if not torch.equal(found.float(), values):
        row, group = (found.float() != values).nonzero()[0].tolist()
        raise PlanError(
            f"{name}: {values[row, group].item():.9g}, the scale or offset of row {row}, group {group}, is no float16, "
            f"which {where} hold: quantize with scales in fp16"
        )
    return found
