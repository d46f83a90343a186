"""Parts of a block in which nothing changes any more: what they put out is kept, and not computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

Output = Tensor | tuple[Any, ...]


@dataclass
class Finished:
    """What parts of a block put out for the batches of one stream.

    batches: how many there are; room: bytes that all of it may take, and beyond which none of it is kept.
    """

    batches: int
    room: int
    parts: list[nn.Module] = field(default_factory=list)  # neither their weights nor what enters them will change
    kept: dict[tuple[nn.Module, int], Output] = field(default_factory=dict)

    @contextmanager
    def during(self, batch: int, see: bool = True) -> Iterator[None]:
        """While the block runs on a batch: what was seen stands in for the parts; the rest is seen, if it shall be."""
        with ExitStack() as stack:
            for part in self.parts:
                if (part, batch) in self.kept:
                    stack.enter_context(_instead(part, self.kept[part, batch]))
                elif see and self.room:
                    stack.callback(part.register_forward_hook(partial(self._see, batch)).remove)
            yield

    def _see(self, batch: int, part: nn.Module, _: Any, output: Any) -> None:
        """Of a part that is called more than once the first call."""
        found = _copied(output)
        if found is None or (part, batch) in self.kept or not self.room:
            return
        self.kept[part, batch] = found
        seen = max(1, sum(part is own for own, _ in self.kept))  # batches
        if sum(map(_nbytes, self.kept.values())) * self.batches > self.room * seen:
            self.room = 0  # all batches would take more
            self.kept.clear()


@contextmanager
def _instead(part: nn.Module, output: Output) -> Iterator[None]:
    """Have the part answer its first call with a copy of `output`, which the block may write over."""
    before, first = part.__dict__.get("forward"), [output]
    compute = part.forward

    def answer(*args: Any, **kwargs: Any) -> Any:
        return _copied(first.pop()) if first else compute(*args, **kwargs)

    part.forward = answer
    try:
        yield
    finally:
        del part.forward
        if before is not None:
            part.forward = before


def _copied(output: Any) -> Output | None:
    """A tensor, or a tuple of tensors and None, copied; None where it is anything else."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple) and all(part is None or isinstance(part, Tensor) for part in output):
        return tuple(None if part is None else part.clone() for part in output)
    return None


def _nbytes(output: Output) -> int:
    parts = [output] if isinstance(output, Tensor) else output
    return sum(part.nbytes for part in parts if part is not None)
