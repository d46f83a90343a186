"""Checkpoints on disk: safetensors folders, checked when they are opened and read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


class Checkpoint:
    """The tensors of a safetensors folder, read when asked for. Opening it checks every shard's header and length."""

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
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
                raise CheckpointError(f"{index}: not an index of shards: it has no readable weight_map") from None
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
        try:
            return dict(json.loads((self.folder / "config.json").read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: not JSON: {error}") from None

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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
