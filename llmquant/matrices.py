"""Where the matrices of a model are that can be quantized: which modules hold one, and which blocks repeat.

Nothing here knows the name of a model. A linear layer holds a matrix (out, in); a convolution holds one too, with every
position of its kernel as a column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmquant.errors import PlanError

if TYPE_CHECKING:  # this is imported while transformers is
    from transformers import PretrainedConfig, PreTrainedModel

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Target:
    """A matrix that can be quantized, seen as (out, in) however the module stores it.

    name: the module's name in memory; shape: (out, in); transposed: stored as (in, out), as GPT-2's Conv1D does;
    bias: whether the module also adds a bias; kernel: of a convolution, the sizes of its kernel: the weight
    (out, channels of a group, *kernel) is seen as (out, the product of the rest); expert: its number among those that
    a parameter (experts, ., .) holds, of which the name is that of the parameter and this number.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    bias: bool
    kernel: tuple[int, ...] = ()
    expert: int | None = None

    @property
    def listed(self) -> str:
        """What rules and configs call it: all experts of one parameter share its name."""
        return self.name if self.expert is None else self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The name of the parameter that holds it."""
        return f"{self.name}.weight" if self.expert is None else self.listed

    @property
    def holder(self) -> str:
        """The name of the module that the parameter belongs to."""
        return self.parameter.rpartition(".")[0]

    def matrix(self, module: nn.Module) -> Tensor:
        """The matrix in `module`, the holder, as an (out, in) view in its dtype."""
        return self.seen(module.get_parameter(self.parameter.rpartition(".")[2]))

    def seen(self, weight: Tensor) -> Tensor:
        """The matrix in a tensor of the parameter's shape, as an (out, in) view."""
        if self.expert is not None:
            weight = weight[self.expert]
        return weight.t() if self.transposed else weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) as the module stores its weight."""
        if self.kernel:
            return matrix.unflatten(1, (-1, *self.kernel))
        return matrix.t().contiguous() if self.transposed else matrix


def target_of(name: str, module: nn.Module) -> Target | None:
    """The matrix that a module holds; None where it holds none, or does something of its own with it."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:  # as where a parametrization makes it of others
        return None
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, Conv1D):
        return Target(name, (weight.shape[1], weight.shape[0]), transposed=True, bias=bias)
    if isinstance(module, nn.Linear):
        return Target(name, (weight.shape[0], weight.shape[1]), transposed=False, bias=bias)
    # Some models have kinds of their own, which pad the input or rescale the weight first.
    if isinstance(module, CONVOLUTIONS) and any(type(module).forward is kind.forward for kind in CONVOLUTIONS):
        shape = weight.shape[0], math.prod(weight.shape[1:])
        return Target(name, shape, transposed=False, bias=bias, kernel=tuple(module.kernel_size))
    return None


def experts_of(name: str, module: nn.Module, layouts: dict[str, bool]) -> list[Target]:
    """The experts that a module holds, given which parameters of the model hold any, and whether as (in, out)."""
    found = []
    for leaf, parameter in module.named_parameters(recurse=False):
        if (transposed := layouts.get(f"{name}.{leaf}")) is None:
            continue
        count, *shape = parameter.shape
        outputs, inputs = reversed(shape) if transposed else shape
        bias = isinstance(getattr(module, f"{leaf}_bias", None), nn.Parameter)
        found += [
            Target(f"{name}.{leaf}.{expert}", (outputs, inputs), transposed, bias, expert=expert)
            for expert in range(count)
        ]
    return found


def routers(name: str, block: nn.Module, config: PretrainedConfig, layouts: dict[str, bool]) -> set[str]:
    """The parameters of a block with one row an expert, or one row for all, in a module that holds the experts.

    name: of the block; layouts: as of `experts_of`.
    """
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = {number for count in counts if (number := getattr(text_config(config), count, None)) is not None}
    experts |= {len(value) for inner, value in block.named_parameters(name) if inner in layouts}
    holders = {
        inner
        for inner, part in block.named_modules(prefix=name)
        if part is not block and any(_holds_experts(child, experts) for child in part.modules())
    }
    return {
        inner
        for inner, value in block.named_parameters(name)
        if value.ndim == 2 and len(value) in {1, *experts} and any(inner.startswith(f"{holder}.") for holder in holders)
    }


def _holds_experts(module: nn.Module, counts: set[int]) -> bool:
    """Whether a module is a list of experts, or holds them as 3-D parameters."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module) in counts
    return any(value.ndim == 3 and len(value) in counts for value in module.parameters(recurse=False))


def decoder_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """{name: block} of a causal language model: the largest list as long as the config says the model is deep."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for root in (model.get_decoder(), model):
        lists = [part for part in root.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
        if lists:
            largest = max(lists, key=lambda part: sum(value.numel() for value in part.parameters()))
            name = next(name for name, part in model.named_modules() if part is largest)
            return {f"{name}.{index}": block for index, block in enumerate(largest)}
    raise PlanError(f"{type(model).__name__} has no list of repeated blocks as long as its num_hidden_layers, {depth}")


def all_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """{name: block} of any model: the members of all its lists; where it has none, it is one block, named ""."""
    blocks: dict[str, nn.Module] = {}
    for name, block in _members_of_lists(model, ""):
        if not any(block is known for known in blocks.values()):
            blocks[name] = block
    return blocks or {"": model}


def _members_of_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """(name, member) of every list that lies in no other one.

    Members that are no more than one layer do not count: a list of those is several heads, say.
    """
    for name, child in module.named_children():
        members = []
        if isinstance(child, nn.ModuleList):
            members = [(number, member) for number, member in child.named_children() if _is_block(member)]
        for number, member in members:
            yield f"{prefix}{name}.{number}", member
        if not members:
            yield from _members_of_lists(child, f"{prefix}{name}.")


def _is_block(module: nn.Module) -> bool:
    composite = next(module.children(), None) is not None
    return composite and any(target_of("", part) is not None for part in module.modules())


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a model's language part, which most are as a whole."""
    try:
        return config.get_text_config()
    except ValueError:  # it has several
        return config


def loader_of(config: dict[str, Any]) -> Any:
    """What has the from_pretrained for the model of a config.json: its own class, or the one for language models."""
    named = None if "auto_map" in config else class_named(config.get("architectures"))
    return named or transformers.AutoModelForCausalLM


def class_named(architectures: list[str] | None) -> type[PreTrainedModel] | None:
    """The class that a config's `architectures` name as the checkpoint's own; None where transformers has none such."""
    found = getattr(transformers, architectures[0], None) if architectures else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None
