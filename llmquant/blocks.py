"""A causal language model of any size, held one block at a time.

The model is built on the meta device, where tensors have a shape and no data. What lies outside the repeated blocks
(embeddings, final norm, head) is loaded on demand; the blocks are loaded and freed one by one. Nothing here knows the
name of a model: blocks, matrices and tensor names are found from the model itself.

This is the only file that touches the private loading API of transformers. Going through it means that every renaming
and merging that `from_pretrained` does is done here too, and that a model transformers learns to read works here as is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import set_tqdm_hook

from .errors import CheckpointError, PlanError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of one call of a block, (args, kwargs), without the hidden states that come first."""


class TensorSource(Protocol):
    """What is asked of a checkpoint: a folder with a config.json, and tensors that are read only when sliced."""

    @property
    def folder(self) -> Path: ...

    def names(self) -> list[str]:
        """The names of all tensors, in the checkpoint's order."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def slices(self, names: Iterable[str]) -> AbstractContextManager[Mapping[str, Any]]:
        """{name: safetensors slice}: opened without reading data, closed at the end of the context."""


@dataclass(frozen=True)
class Target:
    """A matrix that can be quantized, seen as (out, in) however the module stores it.

    name: the module's name in memory; shape: (out, in); transposed: stored as (in, out), as GPT-2's Conv1D does;
    bias: whether the module also adds a bias.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    bias: bool

    def matrix(self, module: nn.Module) -> Tensor:
        """The weight of `module` as an (out, in) view, in the weight's dtype."""
        weight = module.get_parameter("weight")
        return weight.t() if self.transposed else weight

    def write(self, module: nn.Module, matrix: Tensor) -> None:
        """Put `matrix` (out, in), cast to the weight's dtype, in the place of the weight of `module`.

        Raises ValueError where the shape is not the target's: copying would broadcast it.
        """
        if tuple(matrix.shape) != self.shape:
            raise ValueError(f"{self.name}: the matrix is {tuple(matrix.shape)}, the weight is {self.shape} (out, in)")
        with torch.no_grad():
            self.matrix(module).copy_(matrix)


class StreamedModel:
    """A causal language model of which the parts outside the blocks and one block at a time are in memory.

    checkpoint: where the tensors come from.
    device, dtype: where loaded parts live and what their floating tensors are cast to; dtype None keeps the dtype that
        the config names, else that of the first floating tensor stored.
    trust_remote_code: run the model code that the folder carries.

    Raises PlanError: the architecture is unknown, is not a causal language model, is quantized already, or has no
        repeated blocks. Raises CheckpointError: there is no config.json, tensors that the model needs are missing, or
        have other shapes. All of this is found before any weight is read.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.config = _read_config(checkpoint.folder, trust_remote_code)
        self.dtype = dtype or _stored_dtype(checkpoint, self.config)
        self.model = _skeleton(self.config, self.dtype, trust_remote_code)
        for module in self.model.modules():  # the buffers that are computed, such as rotary frequencies, are real
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        list_name, self._blocks = _find_blocks(self.model)
        self.block_names = [f"{list_name}.{index}" for index in range(len(self._blocks))]
        self._parameter_of, self._converted = self._map_names()
        self._check_on_meta()
        self._block_keys: list[list[str]] = [[] for _ in self.block_names]
        for key, parameter in self._parameter_of.items():
            if parameter.startswith(f"{list_name}."):
                index = parameter.removeprefix(f"{list_name}.").partition(".")[0]
                self._block_keys[int(index)].append(key)
        self._blocks_return_tuples: bool | None = None  # learned at the first run

    # ---------------------------------------------------------------------------------------- what there is

    def targets(self, block: int) -> dict[str, Target]:
        """The matrices of a block that can be quantized, by the module's name in memory, in the module's order."""
        routers = self._router_parameters(block)
        found = {}
        for name, module in self._blocks[block].named_modules():
            transposed = isinstance(module, Conv1D)
            if not (transposed or isinstance(module, nn.Linear)) or f"{name}.weight" in routers:
                continue
            rows, columns = module.weight.shape
            full_name = f"{self.block_names[block]}.{name}"
            shape = (columns, rows) if transposed else (rows, columns)
            found[full_name] = Target(full_name, shape, transposed, module.bias is not None)
        return found

    def unsupported(self, block: int) -> list[str]:
        """The parameters of a block, by name in memory, that hold matrices but are no target and no router.

        Nothing quantizes them: they stay dense. Experts held as one 3-D parameter are the usual case.
        """
        prefix = f"{self.block_names[block]}."
        handled = {f"{name}.weight" for name in self.targets(block)}
        handled |= {prefix + name for name in self._router_parameters(block)}
        parameters = self._blocks[block].named_parameters()
        return [prefix + name for name, value in parameters if value.ndim >= 2 and prefix + name not in handled]

    def block_keys(self, block: int) -> list[str]:
        """The checkpoint's own names of the tensors that belong to a block, in the checkpoint's order."""
        return list(self._block_keys[block])

    def outside_keys(self) -> list[str]:
        """All other names in the checkpoint, in its order, with those that the model does not know."""
        inside = {key for keys in self._block_keys for key in keys}
        return [key for key in self.checkpoint.names() if key not in inside]

    def source_key(self, parameter: str) -> str | None:
        """The checkpoint's name of a parameter named in memory; None where it was merged, split, tied or is unknown."""
        keys = [key for key, name in self._parameter_of.items() if name == parameter]
        return keys[0] if len(keys) == 1 and parameter not in self._converted else None

    # ---------------------------------------------------------------------------------------- loading and freeing

    def load_outside(self) -> None:
        """Load all that lies outside the blocks, and tie what the model ties."""
        info = self._load(key for key in self.outside_keys() if key in self._parameter_of)
        self.model.tie_weights(missing_keys=set(info.missing_keys), recompute_mapping=False)
        self._finish("the part outside the blocks", self._outside_modules())

    def unload_outside(self) -> None:
        """Free all that lies outside the blocks."""
        _send_to_meta(self._outside_modules())

    def load_block(self, block: int) -> nn.Module:
        """Load one block, on `device` and in `dtype`. Its parameters do not require gradients.

        Raises CheckpointError where a tensor of the block could not be filled.
        """
        self._load(self._block_keys[block])
        self._finish(self.block_names[block], self._blocks[block].modules())
        return self._blocks[block]

    def unload_block(self, block: int) -> None:
        """Free one block: its parameters go back to the meta device, so nothing written to them remains."""
        _send_to_meta(self._blocks[block].modules())

    # ---------------------------------------------------------------------------------------- running

    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden states (batch, tokens, hidden) that enter block 0, and how each block is called.

        input_ids: (batch, tokens), integers. The part outside the blocks must be loaded.
        Raises PlanError where the model does something between its blocks, which could not be streamed.
        """
        hidden: list[Tensor] = []
        calls: dict[int, Call] = {}

        def record(block: int, states: Tensor, call: Call) -> Tensor:
            same = not hidden or states is hidden[0] or torch.equal(states, hidden[0])
            if block in calls or not same:
                raise PlanError(f"{self.block_names[block]}: the model does more than call its blocks one after another")
            hidden[:] = hidden or [states]
            calls[block] = call
            return states

        def run() -> Tensor:
            hidden.clear()
            calls.clear()
            return self.model.base_model(input_ids=input_ids.to(self.device), use_cache=False)[0]

        with torch.no_grad():
            self._run_with_stand_ins(record, run)
        if len(calls) != len(self.block_names):
            raise PlanError(f"the model calls {len(calls)} of its {len(self.block_names)} blocks")
        return hidden[0], [calls[block] for block in range(len(calls))]

    def run_block(self, block: int, hidden: Tensor, call: Call) -> Tensor:
        """The hidden states (batch, tokens, hidden) that a loaded block makes of `hidden`, of the same shape."""
        args, kwargs = call
        output = self._blocks[block](hidden, *args, **kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output

    def logits(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits (batch, tokens, vocabulary), given the hidden states that leave the last block.

        The model runs with every block replaced by one that returns `hidden`: the final norm, the head and whatever
        else comes after the blocks need no names. The part outside the blocks must be loaded.
        """

        def run() -> Tensor:
            return self.model(input_ids=input_ids.to(self.device), use_cache=False).logits

        return self._run_with_stand_ins(lambda block, states, call: hidden, run)

    # ---------------------------------------------------------------------------------------- inside

    def _run_with_stand_ins(self, answer: Callable[[int, Tensor, Call], Tensor], run: Callable[[], Tensor]) -> Tensor:
        """`run()` with each block replaced by `answer`, in the form (tensor or tuple) that this model expects.

        The first run finds out which. A model that takes the first of a tuple would take the first row of a tensor;
        that loses the batch dimension, which shows in the next stand-in or in the result.
        """
        if any(value.is_meta for module in self._outside_modules() for value in module._parameters.values() if value is not None):
            raise RuntimeError("call load_outside() before the model is run")
        known = self._blocks_return_tuples
        first_error: Exception | None = None
        for as_tuple in (False, True) if known is None else (known,):
            leading: set[torch.Size] = set()
            blocks = list(self._blocks)
            try:
                for index, block in enumerate(blocks):
                    self._blocks[index] = _StandIn(block, index, answer, as_tuple, leading)
                leading.add(run().shape[:-1])
            ...
