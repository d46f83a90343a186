"""The text that `generate` streams is what the model's own generate writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmquant import cli, generation
from llmquant.errors import DataError

PROMPT = "def __init__(self, name"


@pytest.fixture(scope="module")
def model(pycode: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(pycode)


@pytest.fixture
def tokenizer(pycode: Path) -> Any:
    return AutoTokenizer.from_pretrained(pycode)


def test_pieces_make_the_text_and_tokens_are_counted(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    written = generation.stream(model, tokenizer, PROMPT, write=pieces.append, max_new_tokens=12)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert written.text == "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert (written.prompt_tokens, written.tokens) == (prompt["input_ids"].shape[1], len(expected))
    assert 0 < written.first < written.seconds
    assert written.tokens_per_second == pytest.approx((len(expected) - 1) / (written.seconds - written.first))
    assert "tokens per second" in written.summary()


def test_a_seed_decides_what_is_drawn(model: Any, tokenizer: Any) -> None:
    def drawn(seed: int) -> str:
        return generation.stream(model, tokenizer, PROMPT, max_new_tokens=24, temperature=1.0, seed=seed).text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(3)}) > 1


def test_chat_puts_the_prompt_into_the_template(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no chat template"):
        generation.stream(model, tokenizer, PROMPT, chat=True)
    tokenizer.chat_template = "{% for m in messages %}# {{ m.content }}\n{% endfor %}"
    asked = generation.stream(model, tokenizer, "print it", chat=True, max_new_tokens=6)
    plain = tokenizer("# print it\n", add_special_tokens=False, return_tensors="pt")
    expected = model.generate(**plain, max_new_tokens=6, do_sample=False)[0, plain["input_ids"].shape[1] :]
    assert asked.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_command(pycode: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["llmquant", "generate", str(pycode), PROMPT, "--max-new-tokens", "5"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert not ended.value.code
    assert said.out.strip()
    assert "5 written at" in said.err
    assert torch.is_inference_mode_enabled() is False
