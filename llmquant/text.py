"""Text and tokens, for calibration and evaluation alike: documents in, windows of token ids out.

A source is a file (.txt, .md, .py or other text; .json, .jsonl, .parquet) or a hub dataset, `name[:config][:split]`.
A record is a string, or holds one as `text`, or a conversation as `messages`, which the tokenizer's chat template makes
text of. Two protocols make one stream of tokens of it:

    documents   each document after a BOS, unless it begins with one; without one in the vocabulary, an EOS between
                documents
    gptq        documents joined by blank lines and tokenised once, with the special tokens the tokenizer adds by
                itself: how wikitext2 perplexity is measured since GPTQ (arXiv 2210.17323, IST-DASLab/gptq)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmquant.chats import conversation
from llmquant.errors import CheckpointError, DataError, PlanError

Progress = Callable[[int, int], None]
"""Told (done, total) now and then; what is counted, the function that takes it says."""

PROTOCOLS = ("documents", "gptq")
SPLITS = ("train", "validation", "test", "dev")
FILE_TYPES = (".txt", ".md", ".py", ".json", ".jsonl", ".parquet")
LONGEST_WINDOW = 2048  # by default: longer costs more, and published figures are of this length
DOCUMENTS_AT_A_TIME = 256


# ---- documents


def read_documents(source: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The texts of a source, in its order. Blank ones are kept: the gptq protocol counts their line breaks.

    tokenizer: its chat template makes text of conversations. Raises DataError: no such file or dataset, not text, no
    text column, nothing but blanks, conversations without a template that takes them.
    """
    path = Path(source).expanduser()
    if path.is_file():
        documents = _read_file(path, tokenizer)
    elif path.is_dir():
        raise DataError(f"{source}: a folder; give one file, or the name of a dataset")
    elif path.suffix in FILE_TYPES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"{source}: no such file")
    else:
        documents = _read_dataset(source, tokenizer)
    if not any(text.strip() for text in documents):
        raise DataError(f"{source}: holds no text")
    return documents


def _read_file(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if path.suffix == ".parquet":
        return _read_parquet(path, tokenizer)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}): convert it, or give another file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix == ".json":
        rows = _parse_json(text, str(path))
        if not isinstance(rows, list):
            raise DataError(f"{path}: holds {_kind(rows)}; expected a list of strings or of objects with a 'text'")
        return [_text_of(row, f"{path}: item {index}", tokenizer) for index, row in enumerate(rows)]
    if path.suffix == ".jsonl":  # split at line feeds alone: a JSON string may hold other line separators
        lines = [(f"{path}: line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [_text_of(_parse_json(line, where), where, tokenizer) for where, line in lines]
    return [text]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nests without end
        raise DataError(f"{where}: not JSON: {error}") from None


def _text_of(row: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return str(row["text"])
        if "messages" in row:
            return _conversation(row["messages"], where, tokenizer)
        raise DataError(f"{where}: no string named 'text', but {_listed(row)}")
    raise DataError(f"{where}: holds {_kind(row)}; expected a string or an object with a 'text'")


def _conversation(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        raise DataError(
            f"{where}: holds chats ('messages'), and no tokenizer was given whose template makes text of them"
        )
    return conversation(tokenizer, messages, where)


def _read_parquet(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    try:
        from pyarrow import lib, parquet  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install datasets") from None
    try:
        file = parquet.ParquetFile(path)
        name = _column(file.schema_arrow.names, str(path))
        column = file.read(columns=[name])[name].to_pylist()
    except (lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {_first_line(error)}") from None
    return _texts(name, column, str(path), tokenizer)


def _read_dataset(source: str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    name, config, split = _dataset_parts(source)
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: no such file; to read it as a hub dataset: pip install datasets") from None
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    # What can fail is the network, the hub, and whatever code reads the dataset's own files.
    except Exception as error:
        raise DataError(
            f"{source}: neither a file here nor a dataset (config {config or 'default'}, split {split}) that the hub "
            f"gives: {_first_line(error)}. Check name and network, or give a text file"
        ) from error
    column = _column(dataset.column_names, source)
    return _texts(column, list(dataset[column]), source, tokenizer)


def _dataset_parts(source: str) -> tuple[str, str | None, str]:
    """`name[:config][:split]`; of two parts the second is a split where it is named like one. The default is train.

    >>> _dataset_parts("Salesforce/wikitext:wikitext-2-raw-v1:test")
    ('Salesforce/wikitext', 'wikitext-2-raw-v1', 'test')
    """
    name, *rest = source.split(":", 2)
    if len(rest) == 1 and rest[0] in SPLITS:
        rest = ["", rest[0]]
    config, split, *_ = [*rest, "", ""]
    return name, config or None, split or "train"


def _column(names: Iterable[str], source: str) -> str:
    """The column that is read: a text before a conversation."""
    names = list(names)
    for name in ("text", "messages"):
        if name in names:
            return name
    raise DataError(f"{source}: no column 'text', but {_listed(names)}")


def _texts(name: str, column: list[Any], source: str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The column of that name as texts, without its nulls."""
    rows = [row for row in column if row is not None]
    if name == "messages":
        return [_conversation(row, f"{source}: row {index}", tokenizer) for index, row in enumerate(rows)]
    for index, row in enumerate(rows):
        if not isinstance(row, str):
            raise DataError(f"{source}: column 'text' holds {_kind(row)} (row {index}); expected strings")
    return rows


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, list(names)[:8])) or "nothing"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# ---- tokens


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder. Raises CheckpointError if the folder has none that can be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: no tokenizer that can be loaded ({reason})") from error
    # Without its files, some classes of transformers build an empty tokenizer instead of failing.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise CheckpointError(f"{folder}: has no tokenizer files: copy them from the original model")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id plus one: rows of the logits beyond it are padding that no text can produce."""
    return max(tokenizer.get_vocab().values()) + 1


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: list[str], *, protocol: str) -> Tensor:
    """All documents as one stream of token ids (n,) int64, by one of PROTOCOLS (see the module docstring).

    Blank documents are left out of "documents". Raises PlanError for an unknown protocol.
    """
    if protocol == "gptq":
        ids = tokenizer("\n\n".join(documents), verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)
    if protocol != "documents":
        raise PlanError(f"unknown protocol {protocol!r}: there are {', '.join(PROTOCOLS)}")
    kept = [text for text in documents if text.strip()]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream: list[Tensor] = []
    last: list[int] | None = None
    for start in range(0, len(kept), DOCUMENTS_AT_A_TIME):
        # verbose=False: that a stream is longer than the model's context is no news here
        texts = kept[start : start + DOCUMENTS_AT_A_TIME]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            if bos is not None:
                first = [] if ids[:1] == [bos] else [bos]  # a chat template may have written it
            else:  # a chat template ends with an EOS, and at most a line break
                first = [] if eos is None or last is None or eos in last[-2:] else [eos]
            last = ids
            stream.append(torch.tensor([*first, *ids], dtype=torch.int64))
    return torch.cat(stream) if stream else torch.empty(0, dtype=torch.int64)


def window_length(config: PretrainedConfig, asked: int | None = None) -> int:
    """Tokens in a window: as asked, else the model's context, 2048 at most. Raises PlanError if asked for too many."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(LONGEST_WINDOW, context or LONGEST_WINDOW)
    if asked < 2 or (context is not None and asked > context):
        raise PlanError(f"windows of {asked} tokens: the model takes from 2 to {context or 'any number of'}")
    return asked


def windows(stream: Tensor, length: int) -> Tensor:
    """Cut a stream (tokens,) into windows (n, length), a view; the remainder is dropped.

    Raises DataError if not one window fits.
    """
    count = len(stream) // length
    if count == 0:
        raise DataError(
            f"the text has {len(stream)} tokens, one window needs {length}: give more text, or a shorter window"
        )
    return stream[: count * length].view(count, length)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    count: int,
    length: int,
    seed: int,
) -> Tensor:
    """`count` windows (count, length) int64 of a source, drawn without replacement; the same seed gives the same.

    Documents are taken in random order, joined by the "documents" protocol, until there are tokens enough, and windows
    are drawn from that stream: a large dataset is sampled without being tokenised whole. Raises DataError as
    read_documents does, and if the source holds fewer windows.
    """
    documents = [text for text in read_documents(source, tokenizer) if text.strip()]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    taken: list[Tensor] = []
    for start in range(0, len(order), DOCUMENTS_AT_A_TIME):
        texts = [documents[index] for index in order[start : start + DOCUMENTS_AT_A_TIME]]
        taken.append(token_stream(tokenizer, texts, protocol="documents"))
        if sum(map(len, taken)) >= count * length:
            break
    stream = torch.cat(taken)
    if len(stream) < count * length:
        raise DataError(
            f"{source}: has {len(stream)} tokens, {len(stream) // length} windows of {length}, where {count} are asked "
            "for: give more text, or ask for fewer or shorter windows"
        )
    rows = windows(stream, length)
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


# ---- tokens that are handed in


def holds_tokens(source: str) -> bool:
    """Whether a source is a file of token ids: a .safetensors with a tensor `tokens` (windows, length) int64."""
    return Path(source).suffix == ".safetensors"


def token_length(source: str, config: PretrainedConfig, asked: int | None = None) -> int:
    """Tokens in each window of a file of token ids, of which only the header is read.

    Raises DataError: no such file, not safetensors, no such tensor, windows longer than the model takes or not of the
    length that was asked for.
    """
    _, length = _token_shape(source)
    if asked not in (None, length):
        raise DataError(
            f"{source}: holds windows of {length} tokens, where {asked} are asked for: leave the length out"
        )
    try:
        return window_length(config, length)
    except PlanError as error:
        raise DataError(f"{source}: {error}") from None


def read_tokens(source: str, *, count: int, vocabulary: int) -> Tensor:
    """The first `count` windows (count, length) int64 of a file of token ids.

    Raises DataError as token_length does, where there are fewer, and for an id that is not below `vocabulary`.
    """
    there, _ = _token_shape(source)
    if there < count:
        raise DataError(
            f"{source}: holds {there} windows, where {count} are asked for: give more, or --samples {there}"
        )
    with safe_open(Path(source).expanduser(), "pt") as file:
        tokens = file.get_slice("tokens")[:count]
    outside = ((tokens < 0) | (tokens >= vocabulary)).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        raise DataError(
            f"{source}: tokens[{row}, {column}] is {tokens[row, column]}, the model's vocabulary ends at "
            f"{vocabulary - 1}: tokenize with the model's own tokenizer"
        )
    return tokens


def _token_shape(source: str) -> tuple[int, int]:
    """(windows, length), from the header."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"{source}: no such file")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if "tokens" not in names:
                raise DataError(f"{source}: no tensor 'tokens', but {_listed(names)}")
            piece = file.get_slice("tokens")
            dtype, shape = piece.get_dtype(), piece.get_shape()
    except (SafetensorError, OSError) as error:
        raise DataError(f"{source}: truncated or not safetensors ({error})") from None
    if dtype != "I64" or len(shape) != 2:
        raise DataError(f"{source}: 'tokens' is {dtype} of shape {tuple(shape)}; expected I64 of (windows, length)")
    return shape[0], shape[1]


# ---- running models on it


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Without gradients and without dropout, the models' modes as before afterwards.

    Not inference mode: what a module caches on its first call could then never take part in training.
    """
    training = [model for model in models if model.training]
    for model in training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model in training:
            model.train()
