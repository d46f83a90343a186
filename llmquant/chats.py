"""Conversations as the text that a model was trained on, by the chat template of its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmquant.errors import DataError

# Before a template that writes the day's date: the same seed is to give the same bytes on any day.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"
# Two messages that begin and end differently: what lies around both is the template's own.
MESSAGES = ("Why?", "apples")


@dataclass(frozen=True)
class Turns:
    """Token ids. opening: what comes before the first message of a user; reply: between it and the answer."""

    opening: list[int]
    reply: list[int]


def conversation(tokenizer: PreTrainedTokenizerBase, messages: Any, where: str, *, reply: bool = False) -> str:
    """Messages [{"role": ..., "content": ...}, ...] as one text. reply: up to where the model would answer.

    where: what an error begins with. Raises DataError: messages of another kind, a tokenizer without a chat template,
    or messages that the template refuses.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: holds chats ('messages'), and the model's tokenizer has no chat template: give a model that has "
            "one, or the conversations as 'text'"
        )
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' is no list of objects with 'role' and 'content', or it is empty")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: message {number} is no object with the strings 'role' and 'content'")
    # Tables fill in null for what only other messages have; a template asks whether it is there.
    known = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            known,
            chat_template=FIXED_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=reply,
        )
    except Exception as error:  # whatever the template's own code raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{where}: the tokenizer's chat template does not take these messages: {reason}") from error
    return str(text)


def turns(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """What the template puts around a message, found by tokenizing two; None without a template.

    Raises DataError where the template takes no single message of a user, or does not write what it says.
    """
    if tokenizer.chat_template is None:
        return None
    texts = [
        conversation(tokenizer, [{"role": "user", "content": said}], "a question", reply=True) for said in MESSAGES
    ]
    if not all(said in text for said, text in zip(MESSAGES, texts, strict=True)):
        raise DataError("the tokenizer's chat template does not write what a user says")
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    backwards = _alike([each[::-1] for each in ids])
    return Turns(_alike(ids), backwards[::-1])


def _alike(sequences: list[list[int]]) -> list[int]:
    """What all begin with."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return [column[0] for column in columns]
