"""Binary: -s or s, with s the mean magnitude of a group: one bit an element.

Source: M. Rastegari et al., "XNOR-Net", arXiv:1603.05279, section 3.1; with importance the mean is a weighted one,
which is again the least squared error that signs can have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.formats import options
from llmquant.formats.base import Granularity
from llmquant.formats.elements import Element, Whole
from llmquant.formats.scalar import Scalar


class Sign(Whole):
    """-1 and 1; zeros of either sign are 1."""

    def round(self, x: Tensor) -> Tensor:
        return x.ge(0).float().mul_(2).sub_(1)

    def codes(self, x: Tensor) -> Tensor:
        return x.ge(0).to(torch.int8).mul_(2).sub_(1)

    def all_codes(self) -> Tensor:
        return torch.tensor([-1, 1], dtype=torch.int8)

    def stored(self, codes: Tensor) -> Tensor:
        return codes.gt(0).view(torch.uint8)

    def unstored(self, stored: Tensor) -> Tensor:
        return stored.view(torch.int8).mul(2).sub_(1)


@dataclass(frozen=True)
class Binary(Scalar):
    """clip changes nothing: there is one best scale."""

    granularity: Granularity = 128
    scale_dtype: torch.dtype | None = None

    @property
    def spec(self) -> str:
        return options.spec("binary", self.granularity, self.scale_dtype)

    @property
    def element(self) -> Element:
        return Sign(1, -1, 1, "offset")

    def _fit_groups(self, x: Tensor, importance: Tensor | None, clip: str) -> tuple[Tensor, Tensor | None]:
        magnitude = x.abs()
        if importance is None:
            scale = magnitude.mean(-1, dtype=torch.float64)
        else:
            h = importance.expand_as(x).double()
            scale = torch.nan_to_num((h * magnitude).sum(-1) / h.sum(-1))
        return scale.to(self._stored_scale).float(), None


def parse(name: str, tokens: list[str]) -> Binary:
    """`binary`; g<columns> | channel | tensor; fp16 | bf16 | fp32."""
    words = (options.granularities("channel", "tensor"), options.scale_types())
    return Binary(**options.read(name, tokens, *words))
