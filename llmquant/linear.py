"""The module that holds a quantized weight as the file has it, and multiplies by it with one kernel call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import llmquant_kernels
from llmquant.formats import Format
from llmquant_kernels import PackedWeight, Prepared


class QuantLinear(nn.Module):
    """y = x W^T + bias, with W (out, in) stored in a number format. It stands for nn.Linear and GPT-2's Conv1D alike.

    Its buffers are those that `fmt.layout((out, in))` names, created empty for a checkpoint to fill. Casting the
    module casts the bias alone: the buffers keep the types of the file, whatever the model computes in.
    """

    bias: nn.Parameter | None

    def __init__(
        self, fmt: Format, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype | None = None
    ) -> None:
        """dtype: of the bias, by default torch's default. Raises PlanError where fmt cannot hold this shape."""
        super().__init__()
        self.format = fmt
        self.in_features = in_features
        self.out_features = out_features
        self.keep_decoded = False  # passed on to the kernels: trade memory for speed on large inputs
        for suffix, spec in fmt.layout((out_features, in_features)).items():
            self.register_buffer(suffix, torch.empty(spec.shape, dtype=spec.dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self._prepared: dict[torch.dtype, Prepared] = {}
        self._prepared_from: tuple[object, ...] = ()

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight (out, in) as the kernels take it, a view of the buffers wherever the format allows."""
        named = {suffix: buffer for suffix, buffer in self._buffers.items() if buffer is not None}
        return self.format.packed_weight(named, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's type."""
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)  # autocast changes x alone
        return llmquant_kernels.linear(x, self._prepared_for(x.dtype), bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (out, in) that the stored one stands for."""
        return llmquant_kernels.decode(self.packed_weight, dtype)

    def explain(self, dtype: torch.dtype) -> str:
        """Which kernel serves inputs of `dtype` here, and why."""
        return llmquant_kernels.explain(self.packed_weight, dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, format={self.format.spec}"
        )

    # ---- what the kernels made of the buffers: never saved, never copied, made again when needed

    def _prepared_for(self, dtype: torch.dtype) -> Prepared:
        source = (self.keep_decoded, *self._buffers.values())
        # By identity: offloading puts fresh tensors in place for each call, and load_state_dict(assign=True) does too.
        if len(source) != len(self._prepared_from) or any(
            now is not then for now, then in zip(source, self._prepared_from, strict=True)
        ):
            self._prepared, self._prepared_from = {}, source
        if dtype not in self._prepared:
            weight = self._prepare(dtype)
            if getattr(getattr(self, "_hf_hook", None), "offload_buffers", False):
                self._forget_prepared()  # keeping it would keep in memory what accelerate is about to offload
                return weight
            self._prepared[dtype] = weight
        return self._prepared[dtype]

    def _prepare(self, dtype: torch.dtype) -> Prepared:
        # What inference mode makes could not be used outside it, and this outlives the call.
        with torch.inference_mode(False), torch.no_grad():
            return llmquant_kernels.prepare(self.packed_weight, dtype=dtype, keep_decoded=self.keep_decoded)

    def _forget_prepared(self) -> None:
        self._prepared, self._prepared_from = {}, ()

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy: the copy prepares its own weight."""
        return {**self.__dict__, "_prepared": {}, "_prepared_from": ()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_prepared()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """All of to, half, cuda, ... come through here. A buffer follows to another device, never to another type."""

        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is buffer for buffer in self._buffers.values()):
                return tensor.to(moved.device)
            return moved

        self._forget_prepared()
        return super()._apply(keep_type, recurse)
