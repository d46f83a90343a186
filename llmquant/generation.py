"""Text as a model writes it, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from llmquant.attention import of_one_query
from llmquant.errors import DataError


@dataclass(frozen=True)
class Written:
    """What was written. first: seconds until the first token, which are those of reading the prompt."""

    text: str
    prompt_tokens: int
    tokens: int
    first: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of those after the first; None where there are none."""
        return (self.tokens - 1) / (self.seconds - self.first) if self.tokens > 1 else None

    def summary(self) -> str:
        rate = self.tokens_per_second
        return f"{self.prompt_tokens} tokens read in {self.first:.2f} s, {self.tokens} written" + (
            f" at {rate:.1f} tokens per second" if rate is not None else ""
        )


class _Streamer(TextStreamer):
    """Hands finished pieces of text to `write`, and notes when the first and the last token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.pieces, self.times = write, list[str](), list[float]()

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.write(text)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    write: Callable[[str], None] = lambda text: None,
    chat: bool = False,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
) -> Written:
    """Let the model continue `prompt`; `write` gets the text piece by piece as it comes.

    chat: the prompt is put into the tokenizer's chat template first. temperature 0: always the likeliest token.
    Raises DataError for an empty prompt, or where the tokenizer has no chat template.
    """
    inputs = _inputs(tokenizer, prompt, chat).to(model.device)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise DataError("the prompt is empty: give some text to continue")
    streamer = _Streamer(tokenizer, write)
    how: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        how["temperature"] = temperature
    torch.manual_seed(seed)
    start = time.perf_counter()
    with torch.inference_mode(), of_one_query():
        model.generate(**inputs, **how, streamer=streamer)
    times = streamer.times or [time.perf_counter()]
    return Written("".join(streamer.pieces), length, len(streamer.times), times[0] - start, times[-1] - start)


def _inputs(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> Any:
    names = ["input_ids", "attention_mask"]
    if not chat:
        return _only(tokenizer(prompt, return_tensors="pt"), names)
    if not tokenizer.chat_template:
        raise DataError("this tokenizer has no chat template: leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return _only(found, names)


def _only(encoding: Any, names: list[str]) -> Any:
    """Without what some tokenizers add and no model of text takes, such as token types."""
    for name in set(encoding) - set(names):
        del encoding[name]
    return encoding
