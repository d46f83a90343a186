"""Conversations: the chat template makes text of them, and the model's own samples go as the template does."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from test_text import BOS, EOS, drawn_by_hand, ids, letters, tiny
from transformers import PreTrainedTokenizerFast

from llmquant import chats, pipeline, sampling, text
from llmquant.errors import DataError
from llmquant.recipe import Recipe
from llmquant.shown import asked_windows

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}"
    "{% if m['tool'] is defined %}[{{ m['tool'] }}]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo!"}]
SAID = [BOS, *ids("<user>Hi"), EOS, *ids("<assistant>Yo!"), EOS]


def chatty(template: str = TEMPLATE, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = letters(**options)
    tokenizer.chat_template = template
    return tokenizer


# ---- conversations as documents


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_conversations_become_text_by_the_template(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [{"messages": HELLO}, {"messages": HELLO[:1]}]
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    expected = ["<bos><user>Hi<eos><assistant>Yo!<eos>", "<bos><user>Hi<eos>"]
    assert text.read_documents(str(path), chatty()) == expected


def test_plain_text_stays_plain_beside_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["one", {"text": "two"}, {"messages": HELLO}, {"text": "three", "messages": HELLO}]))
    documents = text.read_documents(str(path), chatty())
    assert documents == ["one", "two", "<bos><user>Hi<eos><assistant>Yo!<eos>", "three"]
    stream = text.token_stream(chatty(), documents, protocol="documents").tolist()
    assert stream == [BOS, *ids("one"), BOS, *ids("two"), *SAID, BOS, *ids("three")]  # each BOS once


def test_without_bos_no_second_eos_follows_a_conversation() -> None:
    tokenizer = chatty(bos=False)
    for end in ("", "\n"):
        stream = text.token_stream(tokenizer, [f"<user>Hi<eos>{end}", "a", "b"], protocol="documents")
        assert stream.tolist() == [*ids("<user>Hi"), EOS, *ids(end), *ids("a"), EOS, *ids("b")]


def test_what_a_table_fills_in_is_not_there_for_the_template() -> None:
    message = {"role": "user", "content": "Hi", "tool": None}
    assert chats.conversation(chatty(), [message], "here") == "<bos><user>Hi<eos>"
    assert chats.conversation(chatty(), [{**message, "tool": "x"}], "here") == "<bos><user>Hi<eos>[x]"


def test_the_date_of_a_template_is_the_same_on_any_day() -> None:
    tokenizer = chatty("\n{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}")
    assert chats.conversation(tokenizer, HELLO, "here") == "\n26 Jul 2024: Hi"


def test_calibration_takes_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": HELLO}] * 4))
    found = text.calibration_windows(chatty(), str(path), count=4, length=len(SAID), seed=0)
    assert found.tolist() == [SAID] * 4


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, HELLO, "line 1: holds chats .* tokenizer has no chat template"),
        (TEMPLATE, [], "'messages' is no list of objects with 'role' and 'content', or it is empty"),
        (TEMPLATE, "Hi", "'messages' is no list"),
        (TEMPLATE, ["Hi"], "message 0 is no object with the strings 'role' and 'content'"),
        (TEMPLATE, [*HELLO, {"role": "user", "content": [{"type": "text"}]}], "message 2 is no object"),
        ("{{ raise_exception('roles must alternate') }}", HELLO, "does not take these messages: roles must alternate"),
        ("{{ messages[7]['content'] }}", HELLO, "line 1: the tokenizer's chat template does not take these messages"),
        ("{% if %}", HELLO, "does not take these messages"),
    ],
)
def test_what_the_template_does_not_take_is_refused_in_one_line(
    tmp_path: Path, template: str | None, messages: Any, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    tokenizer = letters() if template is None else chatty(template)
    with pytest.raises(DataError, match=message) as caught:
        text.read_documents(str(path), tokenizer)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the template's own words


def test_turns_are_what_the_template_puts_around_a_message() -> None:
    assert chats.turns(letters()) is None
    found = chats.turns(chatty())
    assert found == chats.Turns([BOS, *ids("<user>")], [EOS, *ids("<assistant>")])
    fixed = chatty("{{ 'Be kind. ' }}" + TEMPLATE.replace("{{ bos_token }}", ""))
    assert chats.turns(fixed) == chats.Turns(ids("Be kind. <user>"), [EOS, *ids("<assistant>")])
    with pytest.raises(DataError, match="does not write what a user says"):
        chats.turns(chatty("{{ bos_token }}"))


# ---- the model's own conversations


def conversation_by_hand(
    model: Any, uniform: list[float], opening: list[int], reply: list[int], stops: set[int]
) -> list[int]:
    """One window, token by token: whose turn it is, and what the template still has to say."""
    tokens: list[int] = []
    forced, asking = list(opening), True
    for u in uniform:
        if forced:
            tokens.append(forced.pop(0))
            continue
        tokens.append(drawn_by_hand(model, tokens, u))
        following = reply if asking else opening
        if tokens[-1] == following[0] or tokens[-1] in stops:
            forced = list(following[1:] if tokens[-1] == following[0] else following)
            asking = not asking
    return tokens


def test_every_second_window_is_a_conversation_under_the_seeds_numbers() -> None:
    model, turns, stops = tiny(eos_token_id=[1, 7, 8, 9]), chats.Turns([0, 20, 21], [1, 22, 23]), {1, 7, 8, 9}
    uniform = torch.rand(5, 40, generator=torch.Generator().manual_seed(11), dtype=torch.float64).tolist()
    found = sampling.sample_windows(model, bos_token_id=0, count=5, length=40, seed=11, turns=turns)
    plain = sampling.sample_windows(model, bos_token_id=0, count=5, length=40, seed=11)
    assert torch.equal(found[::2], plain[::2])
    expected = [conversation_by_hand(model, uniform[row], turns.opening, turns.reply, stops) for row in (1, 3)]
    assert found[1::2].tolist() == expected
    answers = [row[start - 2 : start + 1] for row in expected for start, token in enumerate(row) if token == 23]
    assert [*turns.reply] in answers  # a question ended, and the answer began
    smaller = sampling.sample_windows(model, bos_token_id=0, count=5, length=40, seed=11, turns=turns, batch=1)
    assert torch.equal(found, smaller)
    told: list[tuple[int, int]] = []
    sampling.sample_windows(
        model, bos_token_id=0, count=1, length=8, seed=1, turns=turns, progress=lambda *now: told.append(now)
    )
    assert told[-1] == (8, 8)


def test_without_stop_tokens_the_templates_next_token_ends_a_turn() -> None:
    """As the [/INST] of models that know no stop token for a question."""
    model, turns = tiny(eos_token_id=None), chats.Turns([0, 20], [3, 22])
    uniform = torch.rand(8, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64).tolist()
    found = sampling.sample_windows(model, bos_token_id=0, count=8, length=40, seed=2, turns=turns)[1::2]
    expected = [conversation_by_hand(model, uniform[row], [0, 20], [3, 22], set()) for row in (1, 3, 5, 7)]
    assert found.tolist() == expected
    assert any(pair == (3, 22) for row in expected for pair in pairwise(row))


def test_a_template_of_tokens_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(DataError, match="special token 32, the model's vocabulary ends at 31"):
        sampling.sample_windows(tiny(), bos_token_id=0, count=2, length=8, seed=0, turns=chats.Turns([0, 32], [1]))


def prepared(model: Path, output: Path, length: int) -> pipeline.Prepared:
    calibration = pipeline.Calibration("self", samples=5, length=length)
    return pipeline.prepare(pipeline.Job(str(model), Recipe.uniform("int4:g32"), calibration), output)


def test_a_run_samples_conversations_where_the_tokenizer_has_a_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint(tmp_path / "model", "llama", vocab_size=300, bos_token_id=BOS, eos_token_id=EOS)

    def windows(length: int = 48) -> torch.Tensor:
        ready = prepared(model, tmp_path / "out", length)
        assert ready.job.calibration is not None
        return asked_windows(ready, ready.job.calibration, pipeline.silent)

    letters().save_pretrained(model)
    plain = windows()
    assert plain[:, 0].eq(BOS).all()
    chatty().save_pretrained(model)
    opening = [BOS, *ids("<user>")]
    found = windows()
    assert torch.equal(found, windows())
    assert torch.equal(found[::2], plain[::2])
    assert found[1::2, : len(opening)].tolist() == [opening] * 2
    assert not caplog.records

    # Where no conversation can be held, it is said, and the samples are as without a template.
    monkeypatch.setattr(logging.getLogger("llmquant"), "propagate", True)
    assert torch.equal(windows(16)[:, 0], torch.full((5,), BOS))
    assert "the chat template's own 19 tokens fill most of 16: the model's samples are plain text" in caplog.text
    chatty("{{ raise_exception('no') }}").save_pretrained(model)
    assert torch.equal(windows(), plain)
    assert "does not take these messages: no: the model's samples are plain text" in caplog.text
