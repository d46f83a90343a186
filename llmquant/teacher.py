"""Training towards an original model: what it predicts, and how far another is from that.

The original passes once, block by block, whatever its size. Of what it predicts there is kept either

All        the hidden states that leave its last block, from which norm and head make the logits again: nothing is lost,
           and what lies outside its blocks has to be there;
Likeliest  the k likeliest tokens of every position with their probabilities, and the mass of all others together: the
           divergence over these k + 1 outcomes, which is never more than that over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from llmquant.blocks import Call, StreamedModel
from llmquant.calibration import Streams
from llmquant.trained import original

CHUNK_BYTES = 2**26  # of float32 logits that exist at once
SMALLEST = 1e-8  # of the mass of the others, below which float32 sums say nothing of it


class Teacher(Protocol):
    def divergence(self, window: int, tokens: slice, logits: Tensor) -> Tensor:
        """KL(original || model) in nats, summed over some tokens of a window; logits (tokens, vocabulary) float32."""


@dataclass(frozen=True)
class All:
    """model: what lies outside its blocks is loaded; hidden: of every window, (length, hidden) that leave the last."""

    model: StreamedModel
    windows: Tensor
    hidden: Sequence[Tensor]

    def divergence(self, window: int, tokens: slice, logits: Tensor) -> Tensor:
        with torch.no_grad(), original(self.model.model):
            shown, hidden = self.windows[window : window + 1, tokens], self.hidden[window][None, tokens]
            wanted = self.model.logits(shown, hidden.to(logits.device, self.model.dtype))[0].float().log_softmax(-1)
        return kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)


@dataclass(frozen=True)
class Likeliest:
    """tokens (n, length, k) int32 and logs (n, length, k) float32, their log-probabilities."""

    tokens: Tensor
    logs: Tensor

    def divergence(self, window: int, tokens: slice, logits: Tensor) -> Tensor:
        chosen = self.tokens[window, tokens].to(logits.device, torch.int64)
        p = self.logs[window, tokens].to(logits.device)
        q = logits.log_softmax(-1).gather(-1, chosen)
        rest_p = (1 - p.exp().sum(-1)).clamp_min(0)
        rest_q = (1 - q.exp().sum(-1)).clamp_min(SMALLEST)
        known = (p.exp() * (p - q)).sum(-1)
        others = torch.where(rest_p > SMALLEST, rest_p * (rest_p.clamp_min(SMALLEST).log() - rest_q.log()), 0.0)
        return (known + others).sum()


def last_states(streams: Streams, progress: Callable[[int, int], None]) -> list[Tensor]:
    """What leaves the last block of the original, of every window (length, hidden). Its blocks are loaded in turn."""
    model = streams.model
    streams.quantized.clear()
    for block in range(len(model.block_names)):
        progress(block, len(model.block_names))
        with model.loaded(block):
            streams.forward(block)
    return [states for part in streams.reference for states in part]


def likeliest(model: StreamedModel, windows: Tensor, hidden: Sequence[Tensor], count: int) -> dict[str, Tensor]:
    """The tensors of Likeliest, window by window. What lies outside the blocks must be loaded."""
    found = []
    for tokens, states in zip(windows.split(1), hidden, strict=True):
        logits = model.logits(tokens, states[None].to(model.device))[0]
        found.append(logits.float().log_softmax(-1).topk(count, dim=-1))
    return {
        "tokens": torch.stack([best.indices.int().cpu() for best in found]),
        "logs": torch.stack([best.values.cpu() for best in found]),
    }


class Pupil(nn.Module):
    """A whole model, on some of the windows.

    windows (n, length) int64. batch: windows at a time where it is judged. recompute: on the way back every block is
    run again, instead of keeping all that happened in it. truth: what the cross-entropy of the text weighs in the loss.
    """

    def __init__(
        self,
        model: StreamedModel,
        windows: Tensor,
        teacher: Teacher,
        batch: int,
        *,
        recompute: bool = False,
        truth: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = model.model
        self.model, self.windows, self.teacher = model, windows, teacher
        self.batch, self.recompute, self.truth = batch, recompute, truth
        vocabulary = model.config.get_text_config().vocab_size
        self.tokens = max(1, CHUNK_BYTES // (4 * vocabulary))

    def forward(self, chosen: Tensor) -> Tensor:
        """The loss per token over the windows chosen."""
        return self._total(chosen, self.truth) / self.windows[chosen].numel()

    @torch.no_grad()
    def divergence(self, chosen: Tensor) -> float:
        """Mean KL(original || model) per token over the windows chosen."""
        total = sum(float(self._total(part, 0.0)) for part in chosen.split(self.batch))
        return total / self.windows[chosen].numel()

    def _total(self, chosen: Tensor, truth: float) -> Tensor:
        """Summed over the tokens of one piece after the other: not all logits exist at once."""
        hidden, total = self._hidden(chosen), torch.zeros(())
        for index, window in enumerate(chosen.tolist()):
            for piece in self._pieces():
                part = hidden[index : index + 1, piece]
                if torch.is_grad_enabled() and len(chosen) * self.windows.shape[1] > self.tokens:
                    loss = checkpoint(self._loss, window, piece, part, truth, use_reentrant=False)
                else:
                    loss = self._loss(window, piece, part, truth)
                total = total.to(loss.device) + loss
        return total

    def _pieces(self) -> Iterator[slice]:
        length = self.windows.shape[1]
        return (slice(start, min(start + self.tokens, length)) for start in range(0, length, self.tokens))

    def _loss(self, window: int, piece: slice, hidden: Tensor, truth: float) -> Tensor:
        logits = self.model.logits(self.windows[window : window + 1, piece], hidden)[0].float()
        loss = self.teacher.divergence(window, piece, logits)
        if truth:
            following = self.windows[window, piece.start + 1 : piece.stop + 1].to(logits.device)
            loss = loss + truth * cross_entropy(logits[: len(following)], following, reduction="sum")
        return loss

    def _hidden(self, chosen: Tensor) -> Tensor:
        hidden, calls = self.model.embed(self.windows[chosen].to(self.model.device))
        for block, call in enumerate(calls):
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(self._through, block, hidden, call, use_reentrant=False)
            else:
                hidden = self._through(block, hidden, call)
        return hidden

    def _through(self, block: int, hidden: Tensor, call: Call) -> Tensor:
        with parametrize.cached():  # a module may look at its parameter once for every expert
            return self.model.run_block(block, hidden, call)
