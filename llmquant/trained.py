"""What training puts in place of a model's tensors, and how far it has come: for `tune` and `qat` alike.

A trained tensor is a parametrization of the module that computes with it. The module's own tensor stays where it is:
with the parametrization switched off, the model is the original one, which is what it is taught by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmquant.matrices import Target

WARM_UP = 10  # steps until the rates are reached; from there they fall linearly to nothing
BETAS = (0.9, 0.95)


class Trained(nn.Module):
    """A parametrization: what a module computes with instead of its own tensor, unless it is `off`."""

    off = False

    def forward(self, original: Tensor) -> Tensor:
        return original if self.off else self.value(original)

    def value(self, original: Tensor) -> Tensor:
        raise NotImplementedError


class Weight(Trained):
    """A trained matrix; target: where it belongs."""

    target: Target


class Stack(Trained):
    """The experts of one parameter."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        super().__init__()
        self.experts = parts

    def value(self, original: Tensor) -> Tensor:
        return torch.stack([expert.value(original) for expert in self.experts])


class Moved(Trained):
    """A vector: what it was plus `delta`, rounded to the type of the file."""

    def __init__(self, original: Tensor, stored: torch.dtype) -> None:
        super().__init__()
        self.start, self.dtype, self.stored_dtype = original.detach().float(), original.dtype, stored
        self.delta = nn.Parameter(torch.zeros_like(self.start))

    def value(self, original: Tensor) -> Tensor:
        moved = self.start + self.delta
        return (moved + (moved.to(self.stored_dtype).float() - moved).detach()).to(self.dtype)

    @torch.no_grad()
    def vector(self) -> Tensor:
        """As the file will hold it."""
        return (self.start + self.delta).to(self.stored_dtype)


@contextmanager
def in_place(model: nn.Module, weights: Sequence[Weight], moved: dict[str, Moved]) -> Iterator[None]:
    """The model computes with what is trained instead of its own tensors. moved: by name in memory."""
    of_parameter: dict[str, list[Weight]] = {}
    for weight in weights:
        of_parameter.setdefault(weight.target.parameter, []).append(weight)
    trained: dict[str, Trained] = {
        name: parts[0] if parts[0].target.expert is None else Stack(parts) for name, parts in of_parameter.items()
    }
    places = []
    for full_name, part in {**trained, **moved}.items():
        owner, _, own = full_name.rpartition(".")
        places.append((model.get_submodule(owner), own, part))
    try:
        for module, name, part in places:
            parametrize.register_parametrization(module, name, part, unsafe=True)
        yield
    finally:
        for module, name, _ in places:
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)


@contextmanager
def original(model: nn.Module) -> Iterator[None]:
    """The model computes with its own tensors."""
    parts = [part for part in model.modules() if isinstance(part, Trained)]
    for part in parts:
        part.off = True
    try:
        yield
    finally:
        for part in parts:
            part.off = False


class Training:
    """Parameters in groups with a rate each, Adam, and the best of what was seen.

    divergences: (step, KL on held-out tokens, in nats), at every look; the parameters of the least are kept.
    """

    def __init__(self, groups: Iterable[tuple[list[nn.Parameter], float]], steps: int) -> None:
        self.groups = [(group, rate) for group, rate in groups if group]
        self.parameters = [parameter for group, _ in self.groups for parameter in group]
        self.optimizer = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in self.groups], betas=BETAS)
        self.steps = steps
        self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.divergences: list[tuple[int, float]] = []

    def pace(self, step: int) -> None:
        """Set the rates of a step, counted from 0."""
        factor = min(1.0, (step + 1) / WARM_UP) * (1 - step / self.steps)
        for group, (_, rate) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = rate * factor

    def judge(self, step: int, divergence: float) -> None:
        """Note what was seen after so many steps, and keep the parameters if nothing was better."""
        self.divergences.append((step, divergence))
        if divergence <= min(kl for _, kl in self.divergences):
            for kept, parameter in zip(self.best, self.parameters, strict=True):
                kept.copy_(parameter.detach())

    @torch.no_grad()
    def take_best(self) -> None:
        for kept, parameter in zip(self.best, self.parameters, strict=True):
            parameter.copy_(kept)

    # ---- to a file and back: Adam's own state would be pickled by whatever saves it elsewhere

    def tensors(self, step: int) -> dict[str, Tensor]:
        """All that decides how training goes on after so many steps."""
        found = {
            "step": torch.tensor(step),
            "looks": torch.tensor([look for look, _ in self.divergences]),
            "divergences": torch.tensor([kl for _, kl in self.divergences], dtype=torch.float64),
        }
        for number, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            state = self.optimizer.state.get(parameter, {})
            named = {"parameter": parameter.detach(), "best": best, **state}
            found |= {f"{number}.{name}": tensor.cpu().clone() for name, tensor in named.items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> int:
        """Take up what `tensors` returned. Returns the step."""
        self.divergences = list(zip(tensors["looks"].tolist(), tensors["divergences"].tolist(), strict=True))
        for number, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            prefix = f"{number}."
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            parameter.copy_(own.pop("parameter"))
            best.copy_(own.pop("best"))
            if own:  # Adam counts its steps on the CPU
                self.optimizer.state[parameter] = {
                    name: value.clone() if name == "step" else value.to(parameter.device) for name, value in own.items()
                }
        return int(tensors["step"])


def batches(indices: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of indices: all of them in random order, and again."""
    generator = torch.Generator().manual_seed(seed)
    left = indices[:0]
    for _ in range(steps):
        while len(left) < min(batch, len(indices)):
            left = torch.cat([left, indices[torch.randperm(len(indices), generator=generator)]])
        yield left[:batch]
        left = left[batch:]
