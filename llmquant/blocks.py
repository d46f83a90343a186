"""A model of any kind and size, held one block at a time.

The model is built on the meta device, where tensors have a shape and no data. What lies outside the repeated blocks
(embeddings, final norm, head) is loaded on demand; the blocks are loaded and freed one by one. Nothing here knows the
name of a model: blocks, matrices and tensor names are found from the model itself.

Of a causal language model the blocks can also be run one by one, which calibration needs. Any other model (encoders,
vision, speech, convolutional networks) is only read block by block.

This is the only file that touches the private loading API of transformers. Going through it means that every renaming
and merging that `from_pretrained` does is done here too, and that a model transformers learns to read works here as is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.logging import set_tqdm_hook

from llmquant.checkpoint import TensorSource
from llmquant.errors import CheckpointError, PlanError
from llmquant.experts import layouts, packed_name
from llmquant.matrices import Target, all_blocks, decoder_blocks, experts_of, routers, target_of, text_config
from llmquant.skeleton import is_causal, read_config, skeleton, stored_dtype

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments with which a block is called, (args, kwargs), without the hidden states that come first."""

Answer = Callable[[int, Tensor, Call], Tensor]
"""What a stand-in returns for (block, hidden states, call)."""


class StreamedModel:
    """A model of which the parts outside the blocks and one block at a time are in memory.

    A block is named by its index in `block_names`; None stands for what lies outside the blocks.

    device, dtype: where loaded parts live, and the floating dtype they are cast to; dtype None keeps the dtype that
        the config names, else that of the first floating tensor stored.
    trust_remote_code: run the model code that the folder carries.
    decoded: the folder holds a quantized model, and `checkpoint` gives its tensors as dense ones.
    untied: the head has a weight of its own, whatever the config says.

    Building one reads no weights and raises
        PlanError: the architecture is unknown, or is a causal language model without repeated blocks; or the checkpoint
            is quantized already.
        CheckpointError: there is no valid config.json; or tensors that the model needs are missing or misshapen.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        decoded: bool = False,
        untied: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        config = read_config(checkpoint, trust_remote_code, decoded)
        if untied:
            config.tie_word_embeddings = text_config(config).tie_word_embeddings = False
        self.causal = is_causal(config)
        self.dtype = dtype or stored_dtype(checkpoint, config)
        self.model = skeleton(config, self.dtype, trust_remote_code)
        self.config = self.model.config
        for module in self.model.modules():  # the buffers that are computed, such as rotary frequencies, are real
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        self._layouts = layouts(self.model, getattr(text_config(config), "hidden_size", 0))
        blocks = decoder_blocks(self.model) if self.causal else all_blocks(self.model)
        self.block_names, self._blocks = list(blocks), list(blocks.values())
        self._parameter_of, self._converted, self._split = self._map_names()
        self._keys_of: dict[str, list[str]] = {}
        self._sources: dict[str, tuple[str, ...]] = {}
        for key, parameter in self._parameter_of.items():
            self._keys_of.setdefault(parameter, []).append(key)
        self._check_on_meta()
        self._block_keys: list[list[str]] = [[] for _ in self.block_names]
        for key, parameter in self._parameter_of.items():
            parts = parameter.split(".")
            within = (".".join(parts[:depth]) for depth in range(len(parts)))
            if (name := next((name for name in within if name in blocks), None)) is not None:
                self._block_keys[self.block_names.index(name)].append(key)
        self._tied = {name for pair in self.model.all_tied_weights_keys.items() for name in pair}
        self.reserved = self._find_reserved()
        self._blocks_return_tuples: bool | None = None  # learned at the first run

    # ---------------------------------------------------------------------------------------- what there is

    @property
    def places(self) -> list[int | None]:
        """Every block, and then what lies outside them."""
        return [*range(len(self.block_names)), None]

    def targets(self, block: int | None) -> dict[str, Target]:
        """The matrices of a block that can be quantized, by their names in memory, in the modules' order.

        Convolutions count where the model is only read: nothing calibrates them. Shared weights never do.
        """
        excluded = self._routers(block) | self._tied
        found: list[Target] = []
        for name, module in self._parts(block):
            linear = target_of(name, module)
            found += [] if linear is None else [linear]
            found += experts_of(name, module, self._layouts)
        return {
            target.name: target
            for target in found
            if target.parameter not in excluded and not (self.causal and target.kernel)
        }

    def embeddings(self) -> dict[str, Target]:
        """The embeddings outside the blocks, by name in memory, as matrices (entries, size); no shared ones."""
        parts = {name: module for name, module in self._parts(None) if isinstance(module, nn.Embedding)}
        return {
            name: Target(name, (module.weight.shape[0], module.weight.shape[1]), transposed=False, bias=False)
            for name, module in parts.items()
            if f"{name}.weight" not in self._tied
        }

    def shared_with(self, name: str) -> str | None:
        """The tensor with which a module named in memory shares its weight, if it does."""
        pairs = self.model.all_tied_weights_keys.items()
        return next((b if a == f"{name}.weight" else a for a, b in pairs if f"{name}.weight" in (a, b)), None)

    def module(self, target: Target) -> nn.Module:
        """The module that holds a target's weight; on meta while its block is not loaded."""
        return self.model.get_submodule(target.holder)

    def unsupported(self, block: int) -> list[str]:
        """The parameters of a block, by name in memory, that hold matrices but are no target and no router.

        Nothing quantizes them: they stay dense.
        """
        handled = {target.parameter for target in self.targets(block).values()} | self._routers(block)
        parameters = self._blocks[block].named_parameters(self.block_names[block])
        return [name for name, value in parameters if value.ndim >= 2 and name not in handled]

    def vectors(self) -> dict[str, str]:
        """Weights of norms and biases, {name in memory: the checkpoint's name}, of those that it stores as they are."""
        found = {
            name: self.source_key(name)
            for name, value in self.model.named_parameters()
            if value.ndim == 1 and value.is_floating_point() and name not in self._tied
        }
        return {name: key for name, key in found.items() if key is not None}

    def block_keys(self, block: int) -> list[str]:
        """The checkpoint's own names of the tensors that belong to a block, in the checkpoint's order."""
        return list(self._block_keys[block])

    def outside_keys(self) -> list[str]:
        """All other names in the checkpoint, in its order, with those that the model does not know."""
        inside = {key for keys in self._block_keys for key in keys}
        return [key for key in self.checkpoint.names() if key not in inside]

    def source_key(self, parameter: str) -> str | None:
        """The checkpoint's name of a parameter named in memory; None where it was merged, split, tied or is unknown."""
        keys = self._keys_of.get(parameter, [])
        return keys[0] if len(keys) == 1 and parameter not in self._converted else None

    def source_keys(self, target: Target) -> tuple[str, ...]:
        """The checkpoint's names of what makes up the parameter of a target, and nothing else; () where none do.

        The experts of one parameter may be stored one by one, or together.
        """
        if target.parameter not in self._sources:
            keys = self._keys_of.get(target.parameter, [])
            if target.expert is None:
                usable = self.source_key(target.parameter) is not None
            else:
                stored = f"{target.holder}.{packed_name(target.parameter)}.weight_packed"
                usable = target.parameter not in self._split and self._rename(stored) == (stored, None)
            self._sources[target.parameter] = tuple(keys) if usable else ()
        return self._sources[target.parameter]

    # ---------------------------------------------------------------------------------------- loading and freeing

    def load_outside(self) -> None:
        """Load all that lies outside the blocks, and tie what the model ties."""
        info = self._load([key for key in self.outside_keys() if key in self._parameter_of])
        self.model.tie_weights(missing_keys=set(info.missing_keys), recompute_mapping=False)
        self._finish(None)

    def unload_outside(self) -> None:
        """Free all that lies outside the blocks."""
        self._send_to_meta(None)

    def load_block(self, block: int) -> nn.Module:
        """Load one block, on `device` and in `dtype`. Its parameters do not require gradients.

        Raises CheckpointError where a tensor of the block could not be filled.
        """
        self._load(self._block_keys[block])
        self._finish(block)
        return self._blocks[block]

    def unload_block(self, block: int) -> None:
        """Free one block: its parameters go back to the meta device, so nothing written to them remains."""
        self._send_to_meta(block)

    @contextmanager
    def loaded(self, block: int | None) -> Iterator[None]:
        """A block in memory, or what lies outside the blocks, until the context ends."""
        if block is None:
            self.load_outside()
        else:
            self.load_block(block)
        try:
            yield
        finally:
            if block is None:
                self.unload_outside()
            else:
                self.unload_block(block)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All of the model in memory."""
        with ExitStack() as held:
            for block in (None, *range(len(self._blocks))):
                held.enter_context(self.loaded(block))
            yield

    # ---------------------------------------------------------------------------------------- running

    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden states (batch, tokens, hidden) that enter block 0, and how each block is called.

        input_ids: (batch, tokens), integers. The part outside the blocks must be loaded.
        Raises PlanError where the model does something between its blocks, so that they cannot run one by one.
        """
        hidden: list[Tensor] = []
        calls: dict[int, Call] = {}

        def record(block: int, states: Tensor, call: Call) -> Tensor:
            same = not hidden or states is hidden[0] or torch.equal(states, hidden[0])
            if block in calls or not same:
                name = self.block_names[block]
                raise PlanError(f"{name}: the model computes something between its blocks, or runs one twice")
            hidden[:] = hidden or [states]
            calls[block] = call
            return states

        def run(tokens: Tensor) -> Tensor:
            hidden.clear()
            calls.clear()
            return self.model.base_model(input_ids=tokens, use_cache=False)[0]

        with torch.no_grad():
            self._run_with_stand_ins(input_ids, record, run)
        if len(calls) != len(self.block_names):
            raise PlanError(f"the model calls {len(calls)} of its {len(self.block_names)} blocks")
        return hidden[0], [calls[block] for block in range(len(calls))]

    def parts(self, block: int) -> list[tuple[str, nn.Module]]:
        """The modules that a block is made of, by their names in the model."""
        return [(f"{self.block_names[block]}.{name}", part) for name, part in self._blocks[block].named_children()]

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

        def run(tokens: Tensor) -> Tensor:
            return self.model(input_ids=tokens, use_cache=False).logits

        return self._run_with_stand_ins(input_ids, lambda block, states, call: hidden, run)

    # ---------------------------------------------------------------------------------------- inside

    def _run_with_stand_ins(self, input_ids: Tensor, answer: Answer, run: Callable[[Tensor], Tensor]) -> Tensor:
        """`run(input_ids)` with each block replaced by `answer`.

        Some models take a tensor from their blocks, some the first of a tuple; the first run finds out which.
        """
        if not self.causal:
            raise PlanError(f"{type(self.model).__name__} is no causal language model, whose blocks run one by one")
        if any(value.is_meta for _, module in self._parts(None) for value in module.parameters(recurse=False)):
            raise RuntimeError("call load_outside() before running the model")
        forms = (False, True) if self._blocks_return_tuples is None else (self._blocks_return_tuples,)
        errors: list[Exception] = []
        for as_tuple in forms:
            try:
                result = self._run_in_form(as_tuple, input_ids.to(self.device), answer, run)
            except (PlanError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # what a model does with the wrong form is not known
                if self._blocks_return_tuples is not None:
                    raise
                errors.append(error)
            else:
                self._blocks_return_tuples = as_tuple
                return result
        raise PlanError(f"{type(self.model).__name__} does not run with its blocks replaced: {errors}") from errors[0]

    def _run_in_form(
        self, as_tuple: bool, input_ids: Tensor, answer: Answer, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """One run with stand-ins that return a tuple or a tensor. Raises some error if that is the wrong form."""
        shapes = set()

        def forward(block: int, states: Tensor, call: Call) -> Any:
            # "The first of the tuple" of a tensor is its first row: that is no error, but the batch dimension is gone.
            shapes.add(states.shape)
            if len(shapes) > 1:
                raise ValueError(f"the hidden states change their shape from block to block: {shapes}")
            states = answer(block, states, call)
            return (states, None) if as_tuple else states

        try:
            for index, block in enumerate(self._blocks):
                self.model.set_submodule(self.block_names[index], _StandIn(block, partial(forward, index)))
            result = run(input_ids)
        finally:
            for name, block in zip(self.block_names, self._blocks, strict=True):
                self.model.set_submodule(name, block)
        if result.shape[:-1] != input_ids.shape:
            raise ValueError(f"tokens {tuple(input_ids.shape)} become {tuple(result.shape)}")
        return result

    def _map_names(self) -> tuple[dict[str, str], set[str], set[str]]:
        """({checkpoint name: name in memory}, the names in memory that are changed, and of those the ones that are
        split from what is stored), for the names known.

        Where one stored tensor is split, its first part stands for all: they are in the same block.
        """
        mapping = get_model_conversion_mapping(self.model)
        renamings = [change for change in mapping if isinstance(change, WeightRenaming)]
        converters = [change for change in mapping if isinstance(change, WeightConverter)]
        parts = {pattern: len(change.target_patterns) for change in converters for pattern in change.source_patterns}
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        self._rename = lambda key: rename_source_key(key, renamings, converters, prefix, state)
        names, converted, split = {}, set(), set()
        for key in self.checkpoint.names():
            name, pattern = self._rename(key)
            if name not in state and key in state:
                name, pattern = key, None
            if name in state:
                names[key] = name
                if pattern is not None:
                    converted.add(name)
                    if parts[pattern] > 1:
                        split.add(name)
        return names, converted, split

    def _check_on_meta(self) -> None:
        """Load the whole checkpoint as tensors without data: what is missing or misshapen shows at once."""
        stored = {
            key: torch.empty(self.checkpoint.shape(key), dtype=self.checkpoint.dtype(key), device="meta")
            for key in self._parameter_of
        }
        info = self._convert(stored, torch.device("meta"))
        missing = set(info.missing_keys)
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        optional = re.compile("|".join(self.model._keys_to_ignore_on_load_missing or ["(?!)"]))
        state = self.model.state_dict()  # an optional buffer keeps the value it was built with
        empty = {name for name in missing if state[name].is_meta and optional.search(name)}
        self._computed = set() if self.causal else empty  # by the model itself, when it is loaded as a whole
        missing = {name for name in missing if state[name].is_meta or not optional.search(name)} - self._computed
        problems = [
            f"{self.source_key(name) or name}: stored as {tuple(has)}, the model needs {tuple(needs)}"
            for name, has, needs in sorted(info.mismatched_keys)
        ]
        problems += [f"{name}: {reason}" for name, reason in sorted(info.conversion_errors.items())]
        problems += [f"{name}: missing" for name in sorted(missing - info.conversion_errors.keys())]
        if problems:
            unknown = [key for key in self.checkpoint.names() if key not in self._parameter_of]
            raise CheckpointError(
                f"{self.checkpoint.folder} does not hold what {type(self.model).__name__} needs: "
                + "; ".join(_shortened(problems))
                + (f"; the model does not know {', '.join(_shortened(unknown))}" if unknown else "")
                # Some encoders are published without what only training needs.
                + ("" if self.causal else "; if it needs none of them, save_pretrained of the loaded model adds them")
            )

    def _load(self, keys: list[str]) -> Any:
        with self.checkpoint.slices(keys) as slices:
            return self._convert(dict(slices), self.device)

    def _convert(self, tensors: dict[str, Any], device: torch.device) -> Any:
        """Put stored tensors into the model under the names and in the forms it has in memory."""
        load_config = LoadStateDictConfig(
            device_map={"": device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=get_model_conversion_mapping(self.model),  # collects tensors: a fresh one for each load
        )
        with _no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, load_config)
        return info

    def _parts(self, block: int | None) -> Iterator[tuple[str, nn.Module]]:
        """The modules of one block, by name in memory; for None, those outside the blocks."""
        if block is not None:
            yield from self._blocks[block].named_modules(prefix=self.block_names[block])
        else:
            inside = {module for block in self._blocks for module in block.modules()}
            yield from ((name, module) for name, module in self.model.named_modules() if module not in inside)

    def _routers(self, block: int | None) -> set[str]:
        """The parameters of a block that choose experts."""
        if block is None:
            return set()
        return routers(self.block_names[block], self._blocks[block], self.config, self._layouts)

    def _finish(self, block: int | None) -> None:
        """Freeze what was loaded, and see that nothing is left without data."""
        empty = []
        for name, module in self._parts(block):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            tensors = [*module.named_parameters(name, recurse=False), *module.named_buffers(name, recurse=False)]
            # What a block shares with another part is stored, and then tied, there.
            elsewhere = self._computed | (self._tied if block is not None else set())
            empty += [tensor_name for tensor_name, value in tensors if value.is_meta and tensor_name not in elsewhere]
        if empty:
            raise CheckpointError(f"{self.checkpoint.folder}: nothing was loaded for {', '.join(_shortened(empty))}")

    def _send_to_meta(self, block: int | None) -> None:
        """Drop the data of all that the checkpoint stores; computed buffers stay."""
        for _, module in self._parts(block):
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
            for name, buffer in module.named_buffers(recurse=False):
                if getattr(buffer, "_is_hf_initialized", False):  # the loading code marks what it fills
                    module._buffers[name] = torch.empty_like(buffer, device="meta")

    def _find_reserved(self) -> dict[str, str]:
        """{target: why it is left alone unless a rule names it}: heads, and the layers next to the input."""
        reserved = dict.fromkeys(self.targets(None), "it lies outside the repeated blocks")
        if self.causal:
            return reserved
        targets = {name: t for block in [None, *range(len(self._blocks))] for name, t in self.targets(block).items()}
        order = [targets[name] for name, _ in self.model.named_modules() if name in targets]
        convolutions = [target.name for target in order if target.kernel]
        ends = dict.fromkeys(convolutions[:1], "it is the first convolution, which sees the input itself")
        if self.block_names == [""]:
            ends |= {order[i].name: "it is the first or the last of a model without blocks" for i in (0, -1) if order}
        return {**ends, **reserved}


class _StandIn(nn.Module):
    """Takes the place of a block: passes its calls on, and shows the block's attributes, which some models read."""

    def __init__(self, block: nn.Module, answer: Callable[[Tensor, Call], Any]) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not as a submodule: the block is no part of the model meanwhile
        self._answer = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self._answer(args[0], (args[1:], kwargs))
        hidden = kwargs.pop("hidden_states")
        return self._answer(hidden, ((), kwargs))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for each block; the user's own hook comes back after."""
    previous = set_tqdm_hook(lambda factory, args, kwargs: args[0])
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def _shortened(lines: list[str], most: int = 5) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more"]
