"""Checkpoints on disk: safetensors folders, checked when they are opened and read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmquant.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "llmquant.json"
# safetensors' names of the types that checkpoints hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_JSON = 2**28  # bytes: the index of a model of a million tensors is half as large
# Keys of a config: what has to do with the shape of a tensor, and how many modules there are.
SIZES = re.compile(r"(size|dim|dims|heads|width|positions?|position_embeddings|ctx|channels|rank|inner|experts)$")
COUNTS = re.compile(r"(layers?|blocks|depths?|experts)$")
COMPANIONS = (".json", ".txt", ".model", ".jinja")  # tokenizer, generation settings, chat template


def locate(model: str) -> Path:
    """The folder of MODEL: itself, or the downloaded snapshot of a hub id. Raises CheckpointError."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", *(f"*{suffix}" for suffix in COMPANIONS), "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{model}: neither a folder here nor a model that the hub gives: {reason}") from None


class TensorSource(Protocol):
    """What is asked of a checkpoint: a folder with a config.json, and tensors that are read only when sliced."""

    @property
    def folder(self) -> Path: ...

    def names(self) -> list[str]:
        """The names of all tensors, in the checkpoint's order."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def slices(self, names: list[str]) -> AbstractContextManager[Mapping[str, Any]]:
        """{name: safetensors slice}: opened without reading data, closed at the end of the context."""


class Checkpoint:
    """The tensors of a safetensors folder, read when asked for. Opening it checks every shard's header and length."""

    untied = False  # whether it has a head of its own though its config ties it to the embedding
    notes: tuple[str, ...] = ()  # what a user should know of it before anything is done

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: not a checkpoint: it has no config.json")
        self._file_of: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        weight_map = self._weight_map()
        for file in sorted(set(weight_map.values())):
            self._read_header(file, {name for name, where in weight_map.items() if where == file})
        self._file_of = weight_map

    def _weight_map(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            found = read_json(index).get("weight_map")
            if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
                raise CheckpointError(f"{index}: not an index of shards: it has no readable weight_map")
            for file in set(found.values()):
                if not is_plain_name(file):
                    raise CheckpointError(f"{index}: {file!r} is no name of a file in this folder")
            return found
        if (self.folder / SINGLE).is_file():
            with self._open(SINGLE) as file:
                return dict.fromkeys(file.keys(), SINGLE)
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.folder}: only pickled weights ({pickles[0]}), which can run code when read: "
                "save the model once with save_pretrained, which writes safetensors"
            )
        raise CheckpointError(f"{self.folder}: no weights: neither {SINGLE} nor {INDEX} is there")

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: this shard is missing: download the checkpoint again")
        try:
            return safe_open(path, "pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or not safetensors ({error}): download this file again") from None

    def _read_header(self, file: str, names: set[str]) -> None:
        with self._open(file) as shard:
            absent = sorted(names.difference(shard.keys()))
            if absent:
                raise CheckpointError(
                    f"{self.folder / file}: the index promises {absent[0]} here"
                    f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}, the file does not have it: "
                    "index and shards are of different checkpoints"
                )
            for name in names:
                piece = shard.get_slice(name)
                if piece.get_dtype() not in DTYPES:
                    raise CheckpointError(f"{self.folder / file}: {name} has the unknown type {piece.get_dtype()}")
                self._shape[name] = tuple(piece.get_shape())
                self._dtype[name] = DTYPES[piece.get_dtype()]

    def names(self) -> list[str]:
        return list(self._file_of)

    def files(self) -> list[str]:
        return sorted(set(self._file_of.values()))

    def file(self, name: str) -> str:
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype[name]

    def nbytes(self, name: str) -> int:
        return int(torch.Size(self._shape[name]).numel()) * self._dtype[name].itemsize

    def config(self) -> dict[str, Any]:
        """config.json as a dictionary."""
        return read_json(self.folder / "config.json")

    @contextmanager
    def slices(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Handles of these tensors: their data is read when they are indexed, their files closed at the end."""
        files = {file: self._open(file) for file in {self._file_of[name] for name in names}}
        found = {name: files[self._file_of[name]].get_slice(name) for name in names}
        try:
            yield found
        finally:
            found.clear()
            files.clear()

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        """These tensors, backed by the files' pages."""
        with self.slices(names) as found:
            return {name: found[name][:] if self._shape[name] else found[name][...] for name in names}

    def prefetch(self, names: list[str]) -> None:
        """Tell the system that these tensors will be read soon. It takes no memory but pages that can be dropped."""
        if not hasattr(os, "posix_fadvise"):  # macOS, which reads ahead by itself
            return
        for file in sorted({self._file_of[name] for name in names}):
            with (self.folder / file).open("rb") as stored:
                size = int.from_bytes(stored.read(8), "little")
                header = json.loads(stored.read(size))
                for name in names:
                    if name in header:
                        start, end = header[name]["data_offsets"]
                        os.posix_fadvise(stored.fileno(), 8 + size + start, end - start, os.POSIX_FADV_WILLNEED)

    def companions(self) -> list[Path]:
        """The files beside the weights that a user of the model needs."""
        found = (p for p in sorted(self.folder.iterdir()) if p.is_file())
        return [
            p
            for p in found
            if (p.suffix in COMPANIONS or p.name.startswith(("LICENSE", "NOTICE")))
            and not p.name.endswith(".index.json")
            and p.name not in ("config.json", MANIFEST)
        ]

    def fingerprint(self) -> dict[str, list[int]]:
        """Shard -> [bytes, time of change in ns]: a resumed run must find the checkpoint that it began with."""
        stats = {file: (self.folder / file).stat() for file in self.files()}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where there is none, whatever else there is."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes of JSON: no file of a model is as large")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not JSON: byte {error.start} is no UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    except ValueError as error:  # a number of thousands of digits; LlmquantError is one, too
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {type(found).__name__}, not a JSON object")
    return found


def check_config(config: Any, folder: Path, sizes: list[int]) -> None:
    """Refuse a config that asks for what its checkpoint does not hold, or for code; sizes: elements of every tensor.

    A model is built from its config before any tensor is looked at: layers by the million would take hours, buffers of
    a forged width all memory, and an attention implementation may be the name of a repository with code to run.
    Raises CheckpointError.
    """
    most = {SIZES: max([2**24, *sizes]), COUNTS: max(2**10, len(sizes))}
    for key, value in _entries(config):
        if key.endswith("_implementation") and "/" in str(value):
            raise CheckpointError(f"{folder}: config.json: {key} {value!r} is code from elsewhere, which is not run")
        for pattern, limit in most.items():
            if pattern.search(key) and isinstance(value, int | float) and value > limit:
                raise CheckpointError(
                    f"{folder}: config.json: {key} is {value}, and the checkpoint holds no such model"
                )
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise CheckpointError(f"{folder}: config.json: architectures is no list of names")
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"{folder}: config.json: model_type is no name")


def _entries(nest: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all that is in dictionaries and lists; what is in a list has the key of the list."""
    if isinstance(nest, dict | list):
        for inner_key, value in nest.items() if isinstance(nest, dict) else ((key, value) for value in nest):
            yield from _entries(value, inner_key)
    else:
        yield key, nest


def is_plain_name(name: str) -> bool:
    """Whether it names a file in a folder, and nothing beside or below it."""
    return name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
