"""vLLM serves llmquant's own folders through this plugin, with the kernels of this package.

vLLM loads it by itself: it is the entry point `llmquant` of the group `vllm.general_plugins`. Written against the
interface of vLLM 0.33 (`register_quantization_config`, `QuantizationConfig`, `LinearMethodBase`); no other module
imports vllm.

A layer of vLLM may be several of the checkpoint's side by side (q, k and v), and a share of them under tensor
parallelism. Every matrix is collected as the file has it, cut to this rank's share once all of it is there, and those
of one format are joined to be multiplied at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

import llmquant_kernels
from llmquant import formats as registry
from llmquant.errors import PlanError, VerificationError
from llmquant.formats import Format
from llmquant_kernels import PackedWeight

METHOD = "llmquant"
ONLY = None  # what a layer that is one matrix of the checkpoint calls it


def register() -> None:
    """What vLLM calls in each of its processes, perhaps more than once."""
    register_quantization_config(METHOD)(VllmConfig)


class VllmConfig(QuantizationConfig):
    """The `quantization_config` of config.json: which modules are stored in which format."""

    def __init__(self, modules: dict[str, Format]) -> None:
        """modules: {name of a matrix in the checkpoint: its format}."""
        super().__init__()
        self.modules = modules

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        """Raises CheckpointError where `formats` is malformed, PlanError for an unknown format."""
        return cls(registry.listed_modules(config.get("formats")))

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json has it

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """From the checkpoint's names to those of vLLM's modules, before it puts matrices side by side."""
        renamed = getattr(hf_to_vllm_mapper, "get_rename_mapper", lambda: hf_to_vllm_mapper)()
        self.modules = renamed.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How vLLM's layer of this name is computed; None: as any other. Raises PlanError, naming what it cannot do."""
        if isinstance(layer, LinearBase):
            parts = {name: self.modules.get(name) for name in self._parts(prefix)}
            found = [fmt for fmt in parts.values() if fmt is not None]
            if not found:
                return UnquantizedLinearMethod()
            if len(found) < len(parts):
                dense = ", ".join(name for name, fmt in parts.items() if fmt is None)
                raise PlanError(
                    f"{prefix}: vLLM computes {', '.join(parts)} as one layer, and not quantized is {dense}: quantize "
                    "all of them, or none"
                )
            return Method(prefix, found)
        # Embeddings, heads, and what computes with all experts, whose parameters have names below its own.
        for name in self.modules:
            if name == prefix or name.startswith(f"{prefix}."):
                raise PlanError(
                    f"{name}: is quantized, and vLLM has a {type(layer).__name__} there, which this plugin does not "
                    "serve: keep it dense with --skip"
                )
        return None

    def _parts(self, prefix: str) -> list[str]:
        """The checkpoint's names of what vLLM puts side by side in a layer."""
        owner, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{owner}.{part}" if owner else part for part in leaves]


class Method(LinearMethodBase):
    """A linear layer whose matrices are stored in these formats, in the order in which they lie side by side."""

    def __init__(self, name: str, formats: list[Format]) -> None:
        self.name, self.formats = name, formats

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """A parameter of every stored tensor's name, empty: its loader collects what the file has for each matrix."""
        layer.columns, layer.own_columns = input_size, input_size_per_partition
        layer.own_rows, layer.rows, layer.activations = list(output_partition_sizes), output_size, params_dtype
        layer.collected = {}
        for fmt in self.formats:
            for suffix, spec in fmt.layout((output_partition_sizes[0], input_size)).items():
                if suffix not in layer._parameters:
                    parameter: Any = nn.Parameter(torch.empty(0, dtype=spec.dtype), requires_grad=False)
                    parameter.weight_loader = partial(_collect, layer.collected, suffix)
                    layer.register_parameter(suffix, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Cut, join and prepare. Raises VerificationError for what is missing, PlanError for what cannot be cut."""
        if not layer.collected:
            return  # nothing new since the last time
        ids = sorted(layer.collected, key=_place)
        if len(ids) != len(self.formats):
            raise VerificationError(
                f"{self.name}: {len(ids)} of its {len(self.formats)} matrices are in the checkpoint: copy it again"
            )
        pieces = _pieces(layer)
        # The checkpoint, too, may hold side by side what vLLM does.
        shares = [pieces] if len(ids) == 1 else [[piece] for piece in pieces]
        weights = [self._share(layer, *each) for each in zip(ids, self.formats, shares, strict=True)]
        layer.prepared = [llmquant_kernels.prepare(weight, dtype=layer.activations) for weight in joined(weights)]
        layer.collected.clear()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out)"""
        if len(layer.prepared) == 1:
            return llmquant_kernels.linear(x, layer.prepared[0], bias)
        found = torch.cat([llmquant_kernels.linear(x, weight) for weight in layer.prepared], dim=-1)
        return found if bias is None else found + bias

    def _share(self, layer: Any, part: Any, fmt: Format, pieces: list[tuple[int, int]]) -> PackedWeight:
        """Of one matrix, what this rank computes with. pieces: rows of its own, and how many ranks have the same."""
        rank, ranks = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        if sum(layer.own_rows) == layer.rows:  # it is no layer whose rows are shared out
            ranks = 1
        sizes = [rows * ranks // copies for rows, copies in pieces]
        shape = (sum(sizes), layer.columns)
        named = layer.collected[part]
        for suffix, spec in fmt.layout(shape).items():
            found = named.get(suffix)
            if found is None or (tuple(found.shape), found.dtype) != (spec.shape, spec.dtype):
                said = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise VerificationError(
                    f"{self.name}: {suffix} of {fmt.spec} is {said}, and should be {spec.dtype} {list(spec.shape)}"
                )
        weight = fmt.packed_weight(named, shape)
        if layer.own_columns != layer.columns:
            return columns(weight, rank * layer.own_columns, layer.own_columns, f"{self.name} ({fmt.spec})")
        if ranks == 1:
            return weight
        own, before = [], 0
        for (rows, copies), size in zip(pieces, sizes, strict=True):
            start = before + rank // copies * rows
            own.append(torch.arange(start, start + rows, device=weight.packed.device))
            before += size
        return weight.rows(torch.cat(own))


def _pieces(layer: Any) -> list[tuple[int, int]]:
    """Of every matrix in a layer, its rows on this rank, and how many ranks have the same.

    Where there are fewer heads of keys and values than ranks, each goes to several.
    """
    copies = getattr(layer, "num_kv_head_replicas", 1)
    return [(rows, 1 if place == 0 else copies) for place, rows in enumerate(layer.own_rows)]


def _collect(
    collected: dict[Any, dict[str, Tensor]], suffix: str, parameter: Tensor, loaded: Tensor, *part: Any
) -> None:
    """A weight_loader. part: which of the matrices side by side it is of, where there are several."""
    collected.setdefault(part[0] if part else ONLY, {})[suffix] = loaded.to(parameter.device)


def _place(part: Any) -> int:
    """Where a matrix lies among those of its layer, by what vLLM calls it."""
    return "qkv".index(part) if isinstance(part, str) else part or 0


def columns(weight: PackedWeight, start: int, count: int, name: str) -> PackedWeight:
    """Columns start .. start + count of a weight, `count` being a whole share of its columns. Copies.

    Raises PlanError, with the name, where these begin within a group or within a word of codes.
    """
    word = 8 * weight.packed.element_size()
    per_word = 5 if weight.trits else word
    bits = 1 if weight.trits else weight.bits
    single = weight.groups == 1
    if (
        (start * bits) % per_word
        or (count * bits) % per_word
        or (not single and (start % weight.group or count % weight.group))
    ):
        raise PlanError(
            f"{name}: {count} columns a rank do not end with a group of {weight.group} and a word of {word} bits: "
            "serve with fewer ranks, or quantize with smaller groups"
        )
    first, last = start * bits // per_word, -(-(start + count) * bits // per_word)
    groups = slice(None) if single else slice(start // weight.group, -(-(start + count) // weight.group))

    def cut(tensor: Tensor | int | None) -> Any:
        return tensor[:, groups].contiguous() if isinstance(tensor, Tensor) else tensor

    return replace(
        weight,
        packed=weight.packed[:, first:last].contiguous(),
        shape=(weight.shape[0], count),
        scale=cut(weight.scale),
        zero=cut(weight.zero),
        offset=cut(weight.offset),
        micro=cut(weight.micro),
    )


def joined(weights: Iterable[PackedWeight]) -> list[PackedWeight]:
    """Weights with as many columns, those that follow each other as one where they agree in all that rows share."""
    found: list[PackedWeight] = []
    for weight in weights:
        if found and _alike(found[-1], weight):
            found[-1] = _below(found[-1], weight)
        else:
            found.append(weight)
    return found


def _rows_own(weight: PackedWeight) -> dict[str, bool]:
    """Of every tensor, whether each row has an entry of its own."""
    tensors = {name: value for name, value in vars(weight).items() if isinstance(value, Tensor)}
    return {name: value.dim() == 2 and len(value) == weight.shape[0] for name, value in tensors.items()}


def _alike(one: PackedWeight, other: PackedWeight) -> bool:
    if (own := _rows_own(one)) != _rows_own(other):
        return False
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        if isinstance(value, Tensor):
            if value.dtype != theirs.dtype or not (own[name] or torch.equal(value, theirs)):
                return False
        elif name != "shape" and value != theirs:
            return False
    return one.shape[1] == other.shape[1]


def _below(one: PackedWeight, other: PackedWeight) -> PackedWeight:
    rows: dict[str, Any] = {
        name: torch.cat([getattr(one, name), getattr(other, name)]) for name, own in _rows_own(one).items() if own
    }
    return replace(one, **rows, shape=(one.shape[0] + other.shape[0], one.shape[1]))
