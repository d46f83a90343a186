"""What of a block is quantized already, in place of what it was, and the other way round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from llmquant.blocks import StreamedModel
from llmquant.matrices import Target


@dataclass
class WeightSwap:
    """The original and the quantized weights of one block, either of which can be in place."""

    pairs: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = field(default_factory=dict)

    def replace(self, name: str, parameter: nn.Parameter, quantized: Tensor, expert: int | None = None) -> None:
        """Put `quantized` (of the parameter's type) in place of the parameter's data, or of one of its experts."""
        original = self.pairs[name][1] if name in self.pairs else parameter.data
        if expert is not None:
            changed = self.pairs[name][2] if name in self.pairs else original.clone()
            changed[expert] = quantized
            quantized = changed
        self.pairs[name] = (parameter, original, quantized)
        parameter.data = quantized

    def put(self, model: StreamedModel, target: Target, matrix: Tensor) -> None:
        """Put a matrix (out, in) of any type in place of a target's."""
        parameter = model.model.get_parameter(target.parameter)
        self.replace(target.parameter, parameter, target.stored(matrix.to(model.dtype)), target.expert)

    @contextmanager
    def original(self) -> Iterator[None]:
        for parameter, original, _ in self.pairs.values():
            parameter.data = original
        try:
            yield
        finally:
            for parameter, _, quantized in self.pairs.values():
                parameter.data = quantized
