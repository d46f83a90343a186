"""Experts that are held as one parameter (experts, ., .): which of its axes are outputs, and what each expert is given.

Neither is asked of names. A module's own forward pass is watched: a matrix that it multiplies by is known by the place
in memory where it lies, however it was cut out of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# product -> whether its second operand is (out, in), and the name under which that may be given.
PRODUCTS: dict[Any, tuple[bool, str]] = {
    functional.linear: (True, "weight"),
    torch.matmul: (False, "other"),
    torch.mm: (False, "mat2"),
    torch.bmm: (False, "mat2"),
    Tensor.matmul: (False, "other"),
    Tensor.mm: (False, "mat2"),
    Tensor.bmm: (False, "mat2"),
    Tensor.__matmul__: (False, "other"),
}


def packed_name(parameter: str) -> str:
    """The name of the module that holds the experts of a parameter when they are quantized.

    None that the parameter's own is part of: what transformers does to the parameter, as to cut it up when a model is
    saved, it would do to the packed tensors too.
    """
    return f"quantized_{parameter.rpartition('.')[2]}"


# seen(name of the parameter, expert, transposed, x, y): x (..., in) was multiplied, which gave y (..., out).
# transposed: whether the expert lies there as (in, out). Expert None: all at once, x (experts, tokens, in).
Seen = Callable[[str, int | None, bool, Tensor, Tensor], None]


class Watch(TorchFunctionMode):
    """While it is entered, `seen` is called for every product with an expert of one of the parameters, in order.

    parameters: {name: parameter (experts, ., .)}; with a step of 0 from expert to expert, all pass for the first.
    """

    def __init__(self, parameters: Mapping[str, Tensor], seen: Seen) -> None:
        super().__init__()
        self._parameters = parameters
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in PRODUCTS and args:
            outputs_first, name = PRODUCTS[func]
            matrix = args[1] if len(args) > 1 else kwargs.get(name)
            if isinstance(matrix, Tensor) and matrix.ndim in (2, 3) and not matrix.is_meta:
                self._look(args[0], matrix, result, outputs_first)
        return result

    def _look(self, x: Tensor, matrix: Tensor, y: Tensor, outputs_first: bool) -> None:
        for name, parameter in self._parameters.items():
            if matrix.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
                continue
            count, a, b = parameter.shape
            expert, rest = divmod(int(matrix.storage_offset()) - int(parameter.storage_offset()), a * b)
            as_stored = matrix.shape[-2:] == (a, b) and matrix.stride()[-2:] == (b, 1)
            if rest or not (as_stored or (matrix.shape[-2:] == (b, a) and matrix.stride()[-2:] == (1, b))):
                continue
            transposed = as_stored != outputs_first
            if matrix.ndim == 2 and 0 <= expert < count:
                self._seen(name, expert, transposed, x, y)
            elif matrix.ndim == 3 and expert == 0 and len(matrix) == len(x) == count:
                self._seen(name, None, transposed, x, y)


def layouts(model: Any, width: int) -> dict[str, bool]:
    """{name of a parameter that holds experts: whether it holds them transposed, as (in, out)}, of a model on meta.

    width: the size of its hidden states. From now on the model runs each expert by itself, on its own tokens.
    """
    model.set_experts_implementation("eager")
    known: dict[Any, dict[str, bool]] = {}  # of modules that are alike
    found: dict[str, bool] = {}
    for name, module in model.named_modules():
        shapes = tuple((leaf, value.shape) for leaf, value in module.named_parameters(recurse=False))
        if any(len(shape) == 3 for _, shape in shapes):
            kind = type(module), shapes
            if kind not in known:
                known[kind] = layout(module, width)
            found |= {f"{name}.{leaf}": transposed for leaf, transposed in known[kind].items()}
    return found


def layout(module: nn.Module, width: int) -> dict[str, bool]:
    """{name of a parameter of `module` that holds experts: whether it holds them transposed, as (in, out)}.

    The module, on the meta device, is shown one token for each expert, all of which choose the first one. Its
    parameters are zeros meanwhile, of which one expert is in memory. width: the size of a token. What the module does
    not multiply by as a whole, or what is not called as experts are, is left out.
    """
    held = {name: value for name, value in module.named_parameters(recurse=False) if value.ndim == 3}
    for count in sorted({len(value) for value in held.values()}):
        with _zeros(module), torch.no_grad(), torch.device("cpu"):
            tokens, chosen = torch.zeros(count, width), torch.zeros(count, 1, dtype=torch.long)
            own = {name: value for name, value in module.named_parameters(recurse=False) if name in held}
            for args in ((tokens, chosen, torch.ones(count, 1)), (tokens,)):
                seen: dict[str, bool] = {}

                def note(name: str, expert: int | None, transposed: bool, x: Tensor, y: Tensor) -> None:
                    seen[name] = transposed  # noqa: B023 (called below, and never again)

                try:
                    with Watch(own, note):
                        module(*args)
                except Exception:
                    continue
                if seen:
                    return seen
    return {}


@contextmanager
def _zeros(module: nn.Module) -> Iterator[None]:
    """A module whose parameters, and buffers without data, are zeros in float32, of which the first entry is held."""
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    for part in module.modules():
        own: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for values in own:
            for name, value in values.items():
                if value is None or not value.is_meta:
                    continue
                before.append((values, name, value))
                zeros = torch.zeros(value.shape[1:], device="cpu").expand(value.shape)
                values[name] = nn.Parameter(zeros, requires_grad=False) if isinstance(value, nn.Parameter) else zeros
    try:
        yield
    finally:
        for values, name, value in before:
            values[name] = value
