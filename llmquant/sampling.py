"""Text that a model writes by itself, for calibration without data."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from llmquant.attention import of_one_query
from llmquant.chats import Turns
from llmquant.errors import DataError
from llmquant.text import Progress, evaluating

AT_ONCE = 32  # windows
FREE = -1  # in a script of token ids: here the model writes


def sample_windows(
    model: PreTrainedModel,
    *,
    bos_token_id: int | None,
    count: int,
    length: int,
    seed: int,
    turns: Turns | None = None,
    batch: int = AT_ONCE,
    progress: Progress | None = None,
) -> Tensor:
    """What the model writes by itself: windows (count, length) int64 on the CPU, for calibration without data.

    Ancestral sampling at temperature 1 from BOS, or from a random token where the model has none; data-free calibration
    is the idea of LLM-QAT (arXiv 2305.17888). A stop token does not end a window: BOS follows, and a new document.
    turns: every second window is a conversation instead, after the template's opening of a user's turn (Magpie, arXiv
    2406.08464, section 2): the model writes a question, the template goes on to the answer, the model writes it, and so
    on.
    The randomness is one number a token, drawn before anything runs, so the windows do not depend on `batch` beyond
    rounding; the same seed on the same machine gives the same windows. progress: tokens done, of count * length.

    Raises DataError: the logits are not finite, the model keeps no cache to sample with, or has not all tokens of
    the template.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, length, generator=generator, dtype=torch.float64)
    scripts = [[FREE] if bos_token_id is None else [bos_token_id, FREE]]
    if turns is not None:
        scripts.append([*(turns.opening or scripts[0][:-1]), FREE, *turns.reply, FREE])
    windows = torch.zeros(count, length, dtype=torch.int64)
    done = 0
    with evaluating(model), of_one_query():
        for first, script in enumerate(scripts):
            rows = torch.arange(count)[first :: len(scripts)]
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                uniform = draws[part].to(model.device)
                tokens = torch.zeros_like(uniform, dtype=torch.int64)
                for columns in _fill(model, tokens, uniform, script):
                    if progress is not None:
                        progress(done + columns * len(part), count * length)
                done += part.numel() * length
                windows[part] = tokens.cpu()
    return windows


def _fill(model: PreTrainedModel, tokens: Tensor, draws: Tensor, script: list[int]) -> Iterator[int]:
    """Sample tokens (rows, length) in place, by uniform numbers draws (rows, length); yields the columns filled.

    script: what each row repeats: tokens as they are, and FREE for as many as the model writes up to a stop token, or
    to the script's next, which is then not repeated.
    """
    vocabulary = model.config.get_text_config().vocab_size
    if max(script) >= vocabulary:
        raise DataError(
            f"the tokenizer has a special token {max(script)}, the model's vocabulary ends at {vocabulary - 1}"
        )
    parts, stops = (torch.tensor(ids, dtype=torch.int64, device=tokens.device) for ids in (script, _stop_tokens(model)))
    place = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    finite = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    chosen = (draws[:, 0] * vocabulary).long()
    cache, word = None, cache_word(model)
    for column in range(tokens.shape[1]):
        if column:
            answer = model(input_ids=tokens[:, column - 1, None], use_cache=True, **{word: cache})
            if column == 1:
                cache = getattr(answer, word, None)
                if cache is None:
                    kind = type(model).__name__
                    raise DataError(f"{kind} keeps no key-value cache to sample with: calibrate on a text file")
                _reserve(cache, tokens.shape[1])
            chosen, sane = _draw(answer.logits[:, -1].to(tokens.device), draws[:, column])
            finite &= sane
        free = parts[place] == FREE
        token = tokens[:, column] = torch.where(free, chosen, parts[place])
        repeated = free & (token == parts[(place + 1) % len(parts)])
        place = (place + (~free | repeated | torch.isin(token, stops)).long() + repeated.long()) % len(parts)
        yield column + 1
    if not finite.all():  # asked once, at the end: each look at the device costs a stop
        raise DataError("the model's logits are not finite, so it cannot write calibration text: try --dtype float32")


def cache_word(model: PreTrainedModel) -> str:
    """What a model calls its key-value cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Reserved(DynamicLayer):
    """Keys and values in memory that is taken once: the ordinary layer copies all there is at each token."""

    def __init__(self, layer: DynamicLayer, length: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.room = [part.new_empty(*part.shape[:-2], length, part.shape[-1]) for part in (layer.keys, layer.values)]
        self.update(layer.keys, layer.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[..., start:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values


def _reserve(cache: Any, length: int) -> None:
    """Make room for `length` tokens in the layers of a cache that keep all; others stay as they are."""
    layers = getattr(cache, "layers", [])
    for index, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[index] = Reserved(layer, length)


def _draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (rows, vocabulary), uniform numbers (rows,) in [0, 1) -> tokens of the softmax, and which rows are finite.

    The inverse of the cumulative distribution, in float64: a token of probability 0 is never drawn.
    """
    reached = logits.double().softmax(-1).cumsum(-1)
    total = reached[:, -1:]
    chosen = torch.searchsorted(reached, uniform[:, None] * total, right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1), torch.isfinite(total[:, 0])


def _stop_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens at which the model's generation ends."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        stops = getattr(config, "eos_token_id", None)
        if stops is not None:
            return list(stops) if isinstance(stops, list | tuple) else [stops]
    return []
