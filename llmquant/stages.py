"""The stages of a block: which of its matrices share an input, found by running it: no table of architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.blocks import Call, StreamedModel
from llmquant.experts import Watch
from llmquant.hooks import hooked
from llmquant.matrices import Target

BLOCK_INPUT = "block input"


@dataclass
class Stage:
    """Targets that share one input tensor, or the experts of one parameter.

    carrier: what holds the residual stream that the output of the only target is added to: a module whose input it is,
    or the block's own input; None where the output is not simply added to one.
    scale: (in,), by which the input of the quantized stream is divided; None: by nothing.
    crossed: whether a solver wants the cross terms of its inputs: see Stats.
    """

    targets: list[Target]
    carrier: nn.Module | str | None = None
    scale: Tensor | None = None
    crossed: bool = False


class Discovery:
    """The stages of a loaded block that some batches reach, in the order in which they are called."""

    def __init__(self, model: StreamedModel, block: int) -> None:
        self.model, self.block = model, block
        self.found: list[Stage] = []
        self.targets = model.targets(block)
        every = self.targets.values()
        self.modules = {model.module(target): target for target in every if target.expert is None}
        self.stacks: dict[str, list[Target]] = {}
        for target in every:
            if target.expert is not None:
                self.stacks.setdefault(target.parameter, []).append(target)

    @property
    def missing(self) -> int:
        """How many linears, and parameters with experts, no stage has yet."""
        reached = {target.parameter for stage in self.found for target in stage.targets}
        return len(self.modules) + len(self.stacks) - len(reached)

    def named(self, stage: Stage) -> tuple[list[str], str | None]:
        """A stage in words that every process understands: its targets, and what carries its residual stream."""
        names = {module: name for name, module in self.model.model.named_modules()}
        carrier = names[stage.carrier] if isinstance(stage.carrier, nn.Module) else stage.carrier
        return [target.name for target in stage.targets], carrier

    def stage(self, targets: list[str], carrier: str | None) -> Stage:
        """The stage that was named so."""
        parts = [self.targets[name] for name in targets]
        known = carrier is None or carrier == BLOCK_INPUT
        return Stage(parts, carrier if known else self.model.model.get_submodule(str(carrier)))

    def batch(self, hidden: Tensor, call: Call) -> None:
        """Run a batch, and add the stages that none before reached. Tensors are compared: who reads the same one?"""
        known = {target.name for stage in self.found for target in stage.targets}
        stacks = {name: targets for name, targets in self.stacks.items() if targets[0].name not in known}
        new: list[tuple[Tensor, Stage]] = []
        outputs: dict[str, Tensor] = {}
        inputs: list[tuple[nn.Module, Tensor]] = []  # of any module, those that look like hidden states

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape == hidden.shape:
                inputs.append((module, args[0]))
            if module not in self.modules or self.modules[module].name in known:
                return
            stage = next((stage for tensor, stage in new if tensor is args[0]), None)
            if stage is None:
                new.append((args[0], Stage([self.modules[module]])))
            else:
                stage.targets.append(self.modules[module])

        def leave(module: nn.Module, _: Any, output: Tensor) -> None:
            if output.shape == hidden.shape:
                outputs[self.modules[module].name] = output

        def multiplied(name: str, expert: int | None, transposed: bool, x: Tensor, y: Tensor) -> None:
            if name in stacks:
                new.append((x, Stage(stacks.pop(name))))

        parts = self.model.model.get_submodule(self.model.block_names[self.block]).modules()
        handles = [part.register_forward_pre_hook(enter) for part in parts]
        handles += [module.register_forward_hook(leave) for module in self.modules]
        parameters = {name: self.model.model.get_parameter(name) for name in stacks}
        with hooked(*handles), Watch(parameters, multiplied):
            result = self.model.run_block(self.block, hidden, call)
        stages = [stage for _, stage in new]
        _find_carriers(stages, outputs, hidden, inputs, result)
        self.found += stages


def _find_carriers(
    stages: list[Stage],
    outputs: dict[str, Tensor],
    hidden: Tensor,
    inputs: list[tuple[nn.Module, Tensor]],
    result: Tensor,
) -> None:
    """A target's output is added to a residual stream if their sum, to the last bit, is a tensor seen later on."""
    streams: list[tuple[nn.Module | str, Tensor]] = [(BLOCK_INPUT, hidden)]
    for stage in stages:
        output = outputs.get(stage.targets[0].name)
        if output is None or len(stage.targets) > 1:
            continue
        for carrier, stream in reversed(streams):
            total = stream + output
            if torch.equal(total, result):
                stage.carrier = carrier
            later = next((module for module, tensor in inputs if torch.equal(tensor, total)), None)
            if later is not None:
                stage.carrier = carrier
                streams.append((later, total))
            if stage.carrier is not None:
                break
