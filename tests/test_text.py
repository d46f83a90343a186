"""Text in, windows of tokens out: every kind of source, both protocols, and the model's own samples."""

from __future__ import annotations

import json
import logging
import random
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmquant import sampling, text
from llmquant.errors import CheckpointError, DataError, PlanError

BOS, EOS = 0, 1


def letters(*, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes; with a BOS it puts it first by itself, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    special = {**({"bos_token": "<bos>"} if bos else {}), **({"eos_token": "<eos>"} if eos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **special)


def ids(string: str) -> list[int]:
    """The tokens of an ASCII string, straight from the alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [2 + alphabet.index({" ": "Ġ", "\n": "Ċ"}.get(letter, letter)) for letter in string]


# ---- sources


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.unusual", "no_suffix"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("one\n\ntwo é", encoding="utf-8")
    assert text.read_documents(str(tmp_path / name)) == ["one\n\ntwo é"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '["one", "", "two"]'),
        ("a.json", '[{"text": "one", "id": 3}, {"text": ""}, {"text": "two"}]'),
        ("a.jsonl", '{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n'),
    ],
)
def test_json_holds_documents_and_blank_ones_are_kept(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert text.read_documents(str(tmp_path / name)) == ["one", "", "two"]


def test_jsonl_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\r\n{"text": "c"}', encoding="utf-8")
    assert text.read_documents(str(tmp_path / "a.jsonl")) == ["a\u2028b", "c"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "two"]}), tmp_path / "a.parquet")
    assert text.read_documents(str(tmp_path / "a.parquet")) == ["one", "two"]
    parquet.write_table(pyarrow.table({"content": ["one"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="no column 'text', but 'content'"):
        text.read_documents(str(tmp_path / "b.parquet"))
    parquet.write_table(pyarrow.table({"text": [7]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="a value of type int"):
        text.read_documents(str(tmp_path / "c.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\t ", "holds no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.txt", b"abc\xff", r"not UTF-8 text \(byte 3\)"),
        ("a.json", b'["one"', "not JSON"),
        ("a.json", b'{"text": "one"}', "holds an object; expected a list"),
        ("a.json", b'["one", 7]', "item 1: holds a value of type int"),
        ("a.json", b'[{"content": "one"}]', "item 0: no string named 'text', but 'content'"),
        ("a.jsonl", b'{"text": "one"}\nnonsense', "line 2: not JSON"),
        ("a.jsonl", b'{"messages": []}', "line 1: holds chats"),
        ("a.parquet", b"PAR1 it is not", "not a readable parquet file"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        text.read_documents(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/no/where", "a/b/c", "missing.jsonl"])
def test_a_missing_file_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"no such file$"):
        text.read_documents(source)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder"):
        text.read_documents(str(tmp_path))


class FakeDataset(dict[str, list[Any]]):
    """As much of datasets.Dataset as is used."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, answer: FakeDataset | Exception) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> FakeDataset:
        calls.append((name, config, split))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("wikitext", ("wikitext", None, "train")),
        ("Salesforce/wikitext:wikitext-2-raw-v1", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("Salesforce/wikitext:wikitext-2-raw-v1:test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("some/data:validation", ("some/data", None, "validation")),
        ("some/data::holdout", ("some/data", None, "holdout")),
        ("some/data::train[:1%]", ("some/data", None, "train[:1%]")),
    ],
)
def test_a_dataset_is_named_with_config_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, parts: tuple[Any, ...]
) -> None:
    calls = fake_datasets(monkeypatch, FakeDataset(text=["one", None, "", "two"]))
    assert text.read_documents(source) == ["one", "", "two"]
    assert calls == [parts]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ConnectionError("Couldn't reach the hub\nmore lines"), r"that the hub gives: Couldn't reach the hub\. Check"),
        (ValueError('Unknown split "test"'), "Unknown split"),
        (FakeDataset(messages=[[]]), "holds chats"),
        (FakeDataset(content=["one"]), "no column 'text', but 'content'"),
        (FakeDataset(text=[["one"]]), "holds a list"),
    ],
)
def test_a_dataset_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, answer: FakeDataset | Exception, message: str
) -> None:
    fake_datasets(monkeypatch, answer)
    with pytest.raises(DataError, match=message) as caught:
        text.read_documents("some/data")
    assert "\n" not in str(caught.value)


def test_without_datasets_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        text.read_documents("some/data")


# ---- tokens


def test_each_document_follows_a_bos() -> None:
    stream = text.token_stream(letters(), ["ab", " ", "c"], protocol="documents")
    assert stream.dtype == torch.int64
    assert stream.tolist() == [BOS, *ids("ab"), BOS, *ids("c")]


def test_every_document_of_a_long_list_follows_a_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "DOCUMENTS_AT_A_TIME", 2)
    stream = text.token_stream(letters(), ["a"] * 5, protocol="documents")
    assert stream.tolist() == [BOS, *ids("a")] * 5


def test_without_bos_an_eos_lies_between_documents() -> None:
    stream = text.token_stream(letters(bos=False), ["ab", "c", "d"], protocol="documents")
    assert stream.tolist() == [*ids("ab"), EOS, *ids("c"), EOS, *ids("d")]


def test_without_special_tokens_documents_follow_directly() -> None:
    stream = text.token_stream(letters(bos=False, eos=False), ["ab", "c"], protocol="documents")
    assert stream.tolist() == ids("abc")
    assert len(text.token_stream(letters(), [" "], protocol="documents")) == 0


def test_gptq_joins_by_blank_lines_and_tokenises_once() -> None:
    stream = text.token_stream(letters(), ["ab", "", "c"], protocol="gptq")
    assert stream.dtype == torch.int64
    assert stream.tolist() == [BOS, *ids("ab\n\n\n\nc")]


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(PlanError, match="documents, gptq"):
        text.token_stream(letters(), ["a"], protocol="sliding")


def test_long_documents_raise_no_word_about_the_context(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for protocol in text.PROTOCOLS:
        text.token_stream(letters(), ["a" * 100], protocol=protocol)
    assert not caplog.records
    letters()("a" * 100)
    assert "longer than the specified maximum" in caplog.text


def test_vocabulary_size_counts_to_the_largest_id() -> None:
    assert text.vocabulary_size(letters()) == 258


def test_windows_drop_the_remainder() -> None:
    assert text.windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match="11 tokens, one window needs 12"):
        text.windows(torch.arange(11), 12)


def test_window_length_is_the_context_but_2048_at_most() -> None:
    assert text.window_length(LlamaConfig(max_position_embeddings=512)) == 512
    assert text.window_length(LlamaConfig(max_position_embeddings=131072)) == 2048
    assert text.window_length(LlamaConfig(max_position_embeddings=131072), 4096) == 4096
    with pytest.raises(PlanError, match="windows of 513 tokens: the model takes from 2 to 512"):
        text.window_length(LlamaConfig(max_position_embeddings=512), 513)


def test_load_tokenizer(tmp_path: Path) -> None:
    letters().save_pretrained(tmp_path)
    assert text.load_tokenizer(tmp_path)("ab")["input_ids"] == [BOS, *ids("ab")]


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "qwen2"]
)  # of the last two, transformers makes up an empty one
def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match="tokenizer"):
        text.load_tokenizer(tmp_path)


# ---- calibration


def source(tmp_path: Path, documents: list[str]) -> str:
    (tmp_path / "calibration.json").write_text(json.dumps(documents))
    return str(tmp_path / "calibration.json")


def test_calibration_draws_windows_without_replacement(tmp_path: Path) -> None:
    document = "".join(random.Random(0).choices("abcdefgh", k=200))
    path = source(tmp_path, [document])
    there = {tuple(row) for row in text.windows(torch.tensor([BOS, *ids(document)]), 10).tolist()}
    assert len(there) == 20

    drawn = text.calibration_windows(letters(), path, count=12, length=10, seed=3)
    rows = [tuple(row) for row in drawn.tolist()]
    assert drawn.dtype == torch.int64
    assert len(set(rows)) == 12
    assert set(rows) <= there
    assert torch.equal(drawn, text.calibration_windows(letters(), path, count=12, length=10, seed=3))
    assert not torch.equal(drawn, text.calibration_windows(letters(), path, count=12, length=10, seed=4))
    everything = text.calibration_windows(letters(), path, count=20, length=10, seed=3)
    assert {tuple(row) for row in everything.tolist()} == there


def test_calibration_takes_documents_at_random_and_only_as_many_as_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "DOCUMENTS_AT_A_TIME", 2)
    seen: list[str] = []
    stream = text.token_stream

    def watched(tokenizer: Any, documents: list[str], *, protocol: str) -> torch.Tensor:
        seen.extend(documents)
        return stream(tokenizer, documents, protocol=protocol)

    monkeypatch.setattr(text, "token_stream", watched)
    documents = [chr(65 + i) * 9 for i in range(26)]
    text.calibration_windows(letters(), source(tmp_path, documents), count=3, length=10, seed=0)
    assert len(seen) == len(set(seen)) == 4
    assert seen != documents[:4]


def test_calibration_says_how_much_text_there_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 40 tokens, 4 windows of 10, where 5 are asked for"):
        text.calibration_windows(letters(), source(tmp_path, ["a" * 9] * 4), count=5, length=10, seed=0)


# ---- tokens that are handed in


def token_file(folder: Path, tokens: torch.Tensor, name: str = "tokens") -> str:
    path = folder / "calibration.safetensors"
    save_file({name: tokens}, path)
    return str(path)


def test_the_first_windows_of_given_tokens_are_taken(tmp_path: Path) -> None:
    tokens = torch.randint(32, (6, 10), generator=torch.Generator().manual_seed(0))
    path = token_file(tmp_path, tokens)
    assert text.holds_tokens(path)
    assert not text.holds_tokens("text.json")
    assert text.token_length(path, LlamaConfig(max_position_embeddings=64)) == 10
    assert text.token_length(path, LlamaConfig(max_position_embeddings=64), 10) == 10
    for count in (4, 6):
        assert torch.equal(text.read_tokens(path, count=count, vocabulary=32), tokens[:count])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(5, 10, dtype=torch.int64), "holds 5 windows, where 6 are asked for: give more, or --samples 5"),
        (torch.zeros(6, 10, dtype=torch.int32), r"'tokens' is I32 of shape \(6, 10\); expected I64"),
        (torch.zeros(6, 10), "'tokens' is F32"),
        (torch.zeros(60, dtype=torch.int64), r"'tokens' is I64 of shape \(60,\); expected I64 of \(windows, length\)"),
        (torch.full((6, 10), 32), r"tokens\[0, 0\] is 32, the model's vocabulary ends at 31"),
        (torch.arange(60).view(6, 10) // 50 * -1, r"tokens\[5, 0\] is -1, the model's vocabulary"),
    ],
)
def test_given_tokens_that_do_not_fit_are_refused(tmp_path: Path, tokens: torch.Tensor, message: str) -> None:
    path = token_file(tmp_path, tokens)
    with pytest.raises(DataError, match=message) as caught:
        text.read_tokens(path, count=6, vocabulary=32)
    assert path in str(caught.value)


def test_given_tokens_of_a_length_that_does_not_fit_are_refused(tmp_path: Path) -> None:
    path = token_file(tmp_path, torch.zeros(6, 10, dtype=torch.int64))
    with pytest.raises(DataError, match="windows of 10 tokens: the model takes from 2 to 8"):
        text.token_length(path, LlamaConfig(max_position_embeddings=8))
    with pytest.raises(DataError, match="windows of 10 tokens, where 6 are asked for"):
        text.token_length(path, LlamaConfig(max_position_embeddings=64), 6)


def test_files_without_tokens_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(max_position_embeddings=64)
    path = token_file(tmp_path, torch.zeros(6, 10, dtype=torch.int64), name="input_ids")
    with pytest.raises(DataError, match="no tensor 'tokens', but 'input_ids'"):
        text.token_length(path, config)
    Path(path).write_bytes(Path(path).read_bytes()[:-9])
    with pytest.raises(DataError, match="truncated or not safetensors"):
        text.token_length(path, config)
    with pytest.raises(DataError, match="no such file"):
        text.token_length(str(tmp_path / "none.safetensors"), config)


# ---- the model's own text


def tiny(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, **options},
    )
    return LlamaForCausalLM(config)


def sampled_by_hand(model: LlamaForCausalLM, uniform: np.ndarray, bos: int, stops: set[int]) -> list[int]:
    """One window token by token: no cache, no batch, the cumulative distribution added up in a loop."""
    tokens = [bos]
    for u in uniform[1:]:
        tokens.append(bos if tokens[-1] in stops else drawn_by_hand(model, tokens, u))
    return tokens


def drawn_by_hand(model: LlamaForCausalLM, tokens: list[int], u: float) -> int:
    """The token after these at which the distribution's sum goes beyond u."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].double().numpy()
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    token, reached = 0, probabilities[0]
    while reached <= u:
        token += 1
        reached += probabilities[token]
    return token


def test_samples_are_the_models_distribution_under_the_seeds_numbers() -> None:
    model = tiny(eos_token_id=[1, 7, 8, 9])
    uniform = torch.rand(3, 20, generator=torch.Generator().manual_seed(11), dtype=torch.float64).numpy()
    expected = [sampled_by_hand(model.eval(), row, 0, {1, 7, 8, 9}) for row in uniform]
    found = sampling.sample_windows(model, bos_token_id=0, count=3, length=20, seed=11)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_samples_do_not_depend_on_the_batch() -> None:
    model = tiny()
    told: list[tuple[int, int]] = []
    windows = sampling.sample_windows(
        model, bos_token_id=0, count=5, length=12, seed=1, batch=2, progress=lambda *now: told.append(now)
    )
    assert torch.equal(windows, sampling.sample_windows(model, bos_token_id=0, count=5, length=12, seed=1))
    assert not torch.equal(windows, sampling.sample_windows(model, bos_token_id=0, count=5, length=12, seed=2))
    assert told == sorted(told)
    assert told[-1] == (60, 60)


def test_a_stop_token_is_followed_by_a_new_document() -> None:
    stops = set(range(1, 16))
    windows = sampling.sample_windows(tiny(eos_token_id=sorted(stops)), bos_token_id=0, count=8, length=16, seed=0)
    pairs = [pair for row in windows.tolist() for pair in pairwise(row)]
    assert any(before in stops for before, _ in pairs)
    assert all(after == 0 for before, after in pairs if before in stops)


def test_where_bos_is_also_the_stop_token_documents_are_not_empty() -> None:
    windows = sampling.sample_windows(tiny(eos_token_id=0), bos_token_id=0, count=4, length=16, seed=0)
    assert windows[:, 0].eq(0).all()
    assert windows[:, 1:].ne(0).float().mean() > 0.5


def test_without_bos_the_first_token_is_random_and_nothing_is_forced() -> None:
    model = tiny(bos_token_id=None)
    windows = sampling.sample_windows(model, bos_token_id=None, count=64, length=2, seed=0)
    assert len(windows[:, 0].unique()) > 20
    assert ((windows >= 0) & (windows < 32)).all()


def test_sampling_leaves_the_model_and_the_global_seed_alone() -> None:
    model = tiny().train()
    before = torch.random.get_rng_state()
    sampling.sample_windows(model, bos_token_id=0, count=2, length=4, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_damaged_model_writes_nothing() -> None:
    model = tiny()
    model.lm_head.weight.data[3, 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        sampling.sample_windows(model, bos_token_id=0, count=2, length=4, seed=0)


def test_a_model_without_cache_is_refused() -> None:
    model = tiny()
    forward = model.forward
    model.forward = lambda **inputs: SimpleNamespace(logits=forward(input_ids=inputs["input_ids"]).logits)
    with pytest.raises(DataError, match="no key-value cache"):
        sampling.sample_windows(model, bos_token_id=0, count=2, length=4, seed=0)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    uniform = torch.tensor([0.0, 0.5 - 1e-12, 0.5, 1 - 1e-16], dtype=torch.float64)
    chosen, finite = sampling._draw(logits, uniform)
    assert chosen.tolist() == [1, 1, 3, 3]
    assert finite.all()
