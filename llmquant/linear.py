"""The modules that hold a quantized weight as the file has it, and compute with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

import llmquant_kernels
from llmquant.errors import PlanError
from llmquant.formats import Format
from llmquant_kernels import PackedWeight, Prepared, TritonExperts


class QuantModule(nn.Module):
    """A weight (out, ...), seen as a matrix (out, in), in a number format.

    Its buffers are those that `fmt.layout((out, in))` names, created empty for a checkpoint to fill. Casting the
    module casts the bias alone: the buffers keep the types of the file, whatever the model computes in.
    """

    bias: nn.Parameter | None
    filling = False  # while transformers loads the tensors

    def __init__(
        self, fmt: Format, dense: tuple[int, ...], *, bias: bool, dtype: torch.dtype | None, count: int | None = None
    ) -> None:
        """dense: the shape of the weight; dtype: what the model computes in, by default torch's default; count: of such
        weights, if the buffers are to hold several.

        Raises PlanError where fmt cannot hold this shape.
        """
        super().__init__()
        self.format = fmt
        self.dense_shape = dense
        self.matrix_shape = dense[0], math.prod(dense[1:])
        self.dtype = dtype or torch.get_default_dtype()
        self.keep_decoded = False  # trade memory for speed: hold the weight decoded, too
        for suffix, spec in fmt.layout(self.matrix_shape).items():
            # What register_buffer does, but it would refuse the name `weight`, which __getattr__ answers to.
            shape = spec.shape if count is None else (count, *spec.shape)
            self._buffers[suffix] = torch.empty(shape, dtype=spec.dtype)
        self.bias = nn.Parameter(torch.empty(dense[0], dtype=dtype), requires_grad=False) if bias else None
        self._prepared: dict[torch.dtype, Any] = {}
        self._prepared_from: tuple[object, ...] = ()
        self._released: tuple[str, Tensor, Any] | None = None

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight (out, in) as the kernels take it, a view of the buffers wherever the format allows."""
        return self.format.packed_weight(self._stored(), self.matrix_shape)

    @property
    def device(self) -> torch.device:
        devices = [buffer.device for buffer in self._buffers.values() if buffer is not None]
        return next((device for device in devices if device.type != "meta"), devices[0])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (out, in) that the stored one stands for."""
        return llmquant_kernels.decode(self.packed_weight, dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as the unquantized module has it."""
        return self.dequantize(dtype).view(self.dense_shape)

    def explain(self, dtype: torch.dtype) -> str:
        """Which kernel serves inputs of `dtype` here, and why."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """`weight`, which some models read to learn its type, and a few compute with: decoded only for the latter.

        While it is filled, the stored tensor of that name, if any: other times that one is of no use to a model.
        """
        if name != "weight":
            return super().__getattr__(name)
        if not self.filling:
            return _DecodedOnUse(self)
        stored = self._buffers.get("weight")
        return _initialized(self.dense_shape) if stored is None else stored

    # ---- what was made of the buffers to compute with: never saved, never copied, made again when needed

    def _prepare(self, dtype: torch.dtype) -> Any:
        """What `forward` needs of the weight for inputs of `dtype`."""
        raise NotImplementedError

    def _prepared_for(self, dtype: torch.dtype) -> Any:
        source = (self.keep_decoded, *self._buffers.values())
        # By identity: offloading puts fresh tensors in place for each call, and load_state_dict(assign=True) does too.
        if len(source) != len(self._prepared_from) or any(
            now is not then for now, then in zip(source, self._prepared_from, strict=True)
        ):
            self._forget_prepared()
            self._prepared_from = (self.keep_decoded, *self._buffers.values())
        if dtype not in self._prepared:
            # What inference mode makes could not be used outside it, and this outlives the call.
            with torch.inference_mode(False), torch.no_grad():
                weight = self._prepare(dtype)
            if getattr(getattr(self, "_hf_hook", None), "offload_buffers", False):
                self._forget_prepared()  # keeping it would keep in memory what accelerate is about to offload
                return weight
            self._prepared[dtype] = weight
            with torch.inference_mode(False):
                self._release(weight)
        return self._prepared[dtype]

    def _forget_prepared(self) -> None:
        self._buffers.update(self._stored())
        self._prepared, self._prepared_from, self._released = {}, (), None

    # ---- codes that what was prepared holds too, in another order: not kept as the file has them, but made again

    def _release(self, prepared: Any) -> None:
        """Give up the buffer of codes, if `prepared` makes the very same again, for one on the meta device."""
        if self._released is not None or not isinstance(prepared, Prepared | TritonExperts):
            return
        again = prepared.packed()
        if again is None:
            return
        for suffix in ("weight", "weight_packed"):
            buffer = self._buffers.get(suffix)
            if buffer is not None and _same_bytes(again, buffer):
                stand_in = torch.empty_like(buffer, device="meta")
                self._buffers[suffix], self._released = stand_in, (suffix, stand_in, prepared)
        self._prepared_from = (self.keep_decoded, *self._buffers.values())

    def _stored(self) -> dict[str, Tensor]:
        """The buffers as the file has them."""
        named = {suffix: buffer for suffix, buffer in self._buffers.items() if buffer is not None}
        if self._released is not None:
            suffix, stand_in, prepared = self._released
            if named.get(suffix) is stand_in:  # else other tensors were put in place since
                with torch.inference_mode(False):
                    named[suffix] = prepared.packed().view(stand_in.dtype).view(stand_in.shape)
        return named

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._released is not None:
            destination.update({prefix + suffix: tensor for suffix, tensor in self._stored().items()})

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy: the copy prepares its own weight."""
        own = {"_buffers": self._stored(), "_prepared": {}, "_prepared_from": (), "_released": None}
        return {**self.__dict__, **own}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_prepared()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        """All of to, half, cuda, ... come through here. A buffer follows to another device, never to another type."""

        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is buffer for buffer in self._buffers.values()):
                return tensor.to(moved.device)
            return moved

        self._forget_prepared()
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(keep_type, recurse)


class QuantLinear(QuantModule):
    """y = x W^T + bias. It stands for nn.Linear and GPT-2's Conv1D alike."""

    def __init__(
        self, fmt: Format, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype | None = None
    ) -> None:
        """dtype: of the bias, by default torch's default. Raises PlanError where fmt cannot hold this shape."""
        super().__init__(fmt, (out_features, in_features), bias=bias, dtype=dtype)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's type."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Frozen.apply(x, self)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)  # autocast changes x alone
        return llmquant_kernels.linear(x, self._prepared_for(x.dtype), bias)

    def explain(self, dtype: torch.dtype) -> str:
        said = llmquant_kernels.explain(self.packed_weight, dtype)
        if not self.keep_decoded:
            return said
        size = math.prod(self.matrix_shape) * dtype.itemsize / 2**20
        return f"{said}\nkeep_decoded: many rows by the decoded weight, which takes {size:.1f} MiB more"

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, format={self.format.spec}"
        )

    def _prepare(self, dtype: torch.dtype) -> Any:
        return llmquant_kernels.prepare(self.packed_weight, dtype=dtype, keep_decoded=self.keep_decoded)


class _Frozen(torch.autograd.Function):
    """The product of a frozen layer, with a derivative by x alone: the kernels have none of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer._product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantize(gradient.dtype), None


class QuantExperts(QuantModule):
    """Experts that a model holds as one parameter (experts, ., .), each a matrix (out, in) in one number format.

    It takes the place of the parameter in the module that computes with it: that module keeps its own forward pass, and
    what it does with the parameter it does with this. Cutting out an expert decodes that one; anything else, all.
    `together` multiplies by all of them at once, without decoding, where there is a kernel for it.
    The buffers are those of `fmt.layout((out, in))` for every expert, stacked.
    """

    _is_hf_initialized = True  # or some models would fill the parameter with random numbers when they are loaded

    def __init__(self, fmt: Format, dense: tuple[int, int, int], *, transposed: bool, dtype: torch.dtype) -> None:
        """dense: the shape of the parameter; transposed: whether that is (experts, in, out). Raises as QuantModule."""
        count, *shape = dense
        outputs, inputs = reversed(shape) if transposed else shape
        super().__init__(fmt, (outputs, inputs), bias=False, dtype=dtype, count=count)
        self.dense_shape = dense
        self.transposed = transposed
        self._reasons: dict[tuple[str, torch.dtype], str | None] = {}

    def forward(self, index: Any) -> Tensor:
        """What indexing the parameter gives. Called as a module, so that the buffers are fetched if they are offloaded.

        An expert by its number, or by a tensor with its number: (., .). Several experts: (several, ., .).
        """
        if isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.long:
            chosen, places = index.unique(return_inverse=True)
            return torch.stack([self._expert(expert) for expert in chosen.tolist()])[places]
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            return self._expert(int(index))
        return self.dense(self.dtype)[index]

    def __getitem__(self, index: Any) -> Tensor:
        return self(index)

    def __len__(self) -> int:
        return self.dense_shape[0]

    def __getattr__(self, name: str) -> Any:
        """What a parameter has and a module has not, such as its shape."""
        if name.startswith("_") or name == "weight" or not hasattr(Tensor, name):
            return super().__getattr__(name)
        return getattr(_DecodedOnUse(self), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch's functions do with the parameter."""
        args, kwargs = tree_map_only(QuantExperts, _DecodedOnUse, (args, kwargs or {}))
        return func(*args, **kwargs)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.stack([self._decoded(expert, dtype) for expert in range(len(self))])

    def alone(self, dtype: torch.dtype) -> str | None:
        """Why inputs of `dtype` are not multiplied by all experts in one go; None where `together` does that."""
        if self.keep_decoded:
            return "their decoded weights are held"
        device = self.device.type
        if (device, dtype) not in self._reasons:
            facts = replace(self.format.facts(self.matrix_shape), device="cpu" if device == "meta" else device)
            self._reasons[device, dtype] = TritonExperts.refuses(facts, dtype)
        return self._reasons[device, dtype]

    def together(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (tokens, in), sorted by expert; ends (experts,) int32: where the tokens of each end -> (tokens, out)."""
        return self._prepared_for(x.dtype).linear(x, ends)

    def explain(self, dtype: torch.dtype) -> str:
        reason = self.alone(dtype)
        if reason is None:
            return f"{TritonExperts.name}: chosen, one product for all experts"
        decoded = "every expert that a token is sent to is decoded for each call"
        return f"{decoded}\n{TritonExperts.name}: refused, {reason}"

    def extra_repr(self) -> str:
        return f"{len(self)} of {self.matrix_shape}, transposed={self.transposed}, format={self.format.spec}"

    def _expert(self, expert: int) -> Tensor:
        if not self.keep_decoded:
            return self._decoded(expert, self.dtype)
        return self._prepared_for(self.dtype)[expert]

    def _packed(self, expert: int) -> PackedWeight:
        named = {suffix: buffer for suffix, buffer in self._buffers.items() if buffer is not None}
        if self._released is not None and named[self._released[0]] is self._released[1]:
            suffix, stand_in, prepared = self._released
            named |= {suffix: prepared.packed(expert).view(stand_in.dtype).view(stand_in.shape[1:])[None]}
            named = {key: buffer if key == suffix else buffer[expert : expert + 1] for key, buffer in named.items()}
            expert = 0
        return self.format.packed_weight({key: buffer[expert] for key, buffer in named.items()}, self.matrix_shape)

    def _decoded(self, expert: int, dtype: torch.dtype) -> Tensor:
        weight = llmquant_kernels.decode(self._packed(expert), dtype)
        return weight.t() if self.transposed else weight

    def _prepare(self, dtype: torch.dtype) -> Any:
        if self.keep_decoded:
            return self.dense(dtype)
        return TritonExperts([self._packed(expert) for expert in range(len(self))], dtype)


class QuantEmbedding(QuantModule):
    """An embedding, of which the rows asked for are decoded. The dense module looks them up as it always did."""

    _is_hf_initialized = True  # or it would be filled with random numbers when a model is loaded

    def __init__(self, fmt: Format, dense: nn.Embedding) -> None:
        """Stands for `dense`, whose weight it takes away. Raises PlanError as QuantModule does."""
        if dense.max_norm is not None:
            raise PlanError("an embedding with max_norm changes its own weight")
        super().__init__(fmt, tuple(dense.weight.shape), bias=False, dtype=dense.weight.dtype)
        del dense._parameters["weight"]
        dense.__dict__["weight"] = self
        self.lookup = dense

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the dense module gives: ids (...) -> (..., size), as a rule."""
        return self.lookup(*args, **kwargs)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows ids (...) -> (..., size)."""
        if not ids.numel():
            return torch.empty(*ids.shape, self.matrix_shape[1], dtype=self.dtype, device=ids.device)
        chosen, places = ids.unique(return_inverse=True)
        return llmquant_kernels.decode(self._prepared_for(self.dtype).rows(chosen.long()), self.dtype)[places]

    def __getattr__(self, name: str) -> Any:
        """What an embedding has beside its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "lookup":
                raise
            return getattr(self.lookup, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch's functions do with the weight."""
        if func is functional.embedding:
            return args[1].rows(args[0])
        args, kwargs = tree_map_only(QuantEmbedding, _DecodedOnUse, (args, kwargs or {}))
        return func(*args, **kwargs)

    def explain(self, dtype: torch.dtype) -> str:
        return "the rows that are looked up are decoded"

    def extra_repr(self) -> str:
        return f"{self.matrix_shape[0]}, {self.matrix_shape[1]}, format={self.format.spec}"

    def _prepare(self, dtype: torch.dtype) -> Any:
        return self.packed_weight


class QuantConv(QuantModule):
    """A convolution in one to three dimensions, whose weight (out, channels of a group, *kernel) is decoded for use."""

    def __init__(self, fmt: Format, dense: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        """Stands for `dense`, of which only the weight is not taken over. Raises PlanError as QuantModule does."""
        weight = dense.weight
        super().__init__(fmt, tuple(weight.shape), bias=dense.bias is not None, dtype=weight.dtype)
        self.in_channels, self.out_channels, self.groups = dense.in_channels, dense.out_channels, dense.groups
        self.kernel_size, self.stride, self.dilation = dense.kernel_size, dense.stride, dense.dilation
        self.padding, self.padding_mode = dense.padding, dense.padding_mode
        self._pad = dense._reversed_padding_repeated_twice  # as functional.pad takes it

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, *positions) -> (batch, out, *positions) in x's type, as the dense module has it."""
        weight = self._prepared_for(x.dtype) if self.keep_decoded else self._prepare(x.dtype)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._pad, mode=self.padding_mode), (0,) * len(self.kernel_size)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.kernel_size) - 1]
        return convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def explain(self, dtype: torch.dtype) -> str:
        return "decoded for each call: there are no kernels for quantized convolutions"

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, bias={self.bias is not None}, format={self.format.spec}"
        )

    def _prepare(self, dtype: torch.dtype) -> Any:
        return self.dense(dtype)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Of two tensors, whatever their types."""
    return a.nbytes == b.nbytes and torch.equal(a.view(torch.uint8).flatten(), b.view(torch.uint8).flatten())


def _initialized(shape: tuple[int, ...]) -> Tensor:
    """Stands for the weight while the model is filled: some models initialize the weights of modules inside others.

    It says that this is done already. They do so for every module, found in the file or not, to get at their buffers.
    """
    weight = torch.empty(shape, device="meta")
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight


class _DecodedOnUse(Tensor):
    """Stands for the dense weight of a module: its type, shape and device cost nothing, any use of it decodes."""

    _module: QuantModule
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, module: QuantModule) -> _DecodedOnUse:
        device = module.device
        made = Tensor._make_wrapper_subclass(cls, module.dense_shape, dtype=module.dtype, device=device)
        made._module = module
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def decode(weight: _DecodedOnUse) -> Tensor:
            return weight._module.dense(weight.dtype)

        args, kwargs = tree_map_only(_DecodedOnUse, decode, (args, kwargs or {}))
        return func(*args, **kwargs)
