"""Whether text is of the kind that a model was made for, seen from the model alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmquant.blocks import StreamedModel
from llmquant.errors import DataError

# Nats a token. Of text that a model was made for the excess is near 0, of other text it was above 1: the bundled model
# has .04 on code and 1.3 to 3.6 on stories.
MOST = 0.5
TOKENS = 4096  # that are looked at: the mean is then known to a twentieth of a nat
CHUNK_BYTES = 2**26  # of float32 logits that exist at once


@torch.no_grad()
def excess(
    model: StreamedModel,
    windows: Tensor,
    *,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Cross-entropy of the tokens under the model, less the entropy of its own predictions at them, nats a token.

    How much the model is surprised beyond what it expects to be: 0 in the mean for all that it writes by itself, easy
    or hard, so unlike a perplexity it needs no other text to be compared with.

    windows (n, length) int64, of which about TOKENS tokens are shown, spread evenly; batch: windows at a time;
    progress: blocks passed, of all. One block at a time is loaded, and none is left. Tokens whose logits are not finite
    are left out. Raises DataError where all of them are such.
    """
    shown = windows[torch.linspace(0, len(windows) - 1, min(len(windows), -(-TOKENS // windows.shape[1]))).long()]
    with model.loaded(None):
        entered = [(tokens, *model.embed(tokens.to(model.device))) for tokens in shown.split(batch)]
    states = [hidden for _, hidden, _ in entered]
    for block in range(len(model.block_names)):
        with model.loaded(block):
            states = [
                model.run_block(block, hidden, calls[block])
                for hidden, (_, _, calls) in zip(states, entered, strict=True)
            ]
        progress(block + 1, len(model.block_names))
    length = max(1, CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size))
    found: list[Tensor] = []
    with model.loaded(None):
        for (tokens, _, _), hidden in zip(entered, states, strict=True):
            for row, of_row in zip(tokens.split(1), hidden.split(1), strict=True):
                # What comes after the blocks treats each token by itself, so it can run on any piece of a window.
                pieces = (row[:, :-1], of_row[:, :-1], row[0, 1:].to(model.device)[None])
                for ids, piece, true in zip(*(part.split(length, dim=1) for part in pieces), strict=True):
                    found.append(_excess(model.logits(ids, piece)[0].float(), true[0]))
    each = torch.cat(found)
    finite = each[each.isfinite()]
    if not len(finite):
        raise DataError("the model's logits are not finite on the calibration text: try --dtype float32")
    return float(finite.double().mean())


def _excess(logits: Tensor, true: Tensor) -> Tensor:
    """Of each token (n,), given logits (n, vocabulary) float32 and what it is, (n,)."""
    expected = logits.log_softmax(-1)
    entropy = -(expected.exp() * expected.clamp(min=torch.finfo(expected.dtype).min)).sum(-1)
    return -expected.gather(-1, true[:, None])[:, 0] - entropy
