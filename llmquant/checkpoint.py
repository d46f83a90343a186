"""Checkpoints on disk: a lazy reader of safetensors folders, and a writer that leaves nothing unverified.

A run writes into OUTPUT.partial: one shard per block under a temporary name, fsynced, read back, checked, renamed, and
only then noted in a journal with its SHA-256. The folder takes its final name in one rename when all of it is there,
so a folder under its final name is always complete, and a run that was cut resumes after its last noted shard.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmquant.errors import CheckpointError, OutputError, VerificationError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "llmquant.json"
JOURNAL = "journal.jsonl"
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
            and not p.name.endswith((".index.json", JOURNAL))
            and p.name not in ("config.json", MANIFEST)
        ]

    def fingerprint(self) -> dict[str, list[int]]:
        """Shard -> [bytes, time of change in ns]: a resumed run must find the checkpoint that it began with."""
        stats = {file: (self.folder / file).stat() for file in self.files()}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OutputFolder:
    """The folder a run writes. Use as a context manager; `finish` gives it its final name.

    settings: what must be equal for a cut run to be taken up again, as JSON values.
    Raises OutputError: not writable, disk full, something else's, in use, or begun with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.settings = settings
        self.records: dict[int, dict[str, Any]] = {}
        self._overwrite = overwrite

    def __enter__(self) -> OutputFolder:
        check_usable(self.output, overwrite=self._overwrite)
        with _writing(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = (self.partial / JOURNAL).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._overwrite:
                self._lock.truncate(0)
            self._read_journal()
        except BlockingIOError:
            self._lock.close()
            raise OutputError(f"{self.partial}: another run is writing here: wait for it or choose another") from None
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def _read_journal(self) -> None:
        self._lock.seek(0)
        text = self._lock.read()
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # cut in the middle of a line
            lines.pop()
        if len(lines) > 1:  # something was finished
            self._check_settings(json.loads(lines[0]))
        elif lines and json.loads(lines[0]) != json.loads(json.dumps(self.settings)):
            lines = []
            (self.partial / CALIBRATION).unlink(missing_ok=True)
        kept = lines[:1]
        for line in lines[1:]:
            record = json.loads(line)
            shard = self.partial / record["shard"]
            if not shard.is_file() or sha256(shard) != record["sha256"]:
                break  # noted, but not there as noted: from here on it is done again
            self.records[record["part"]] = record
            kept.append(line)
        with _writing(self.partial):
            self._lock.truncate(0)
            self._lock.seek(0)
            for line in kept or [json.dumps(self.settings) + "\n"]:
                self._lock.write(line)
            self._sync_journal()
        self._remove_leftovers()

    def _check_settings(self, begun: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.settings))
        for key in sorted({*begun, *now}):
            if begun.get(key) != now.get(key):
                raise OutputError(
                    f"{self.partial}: begun with {key} = {begun.get(key)!r}, now {key} = {now.get(key)!r}: "
                    "repeat the first command to resume it, or pass --overwrite to begin anew"
                )

    def _remove_leftovers(self) -> None:
        known = {record["shard"] for record in self.records.values()} | {JOURNAL}
        for path in self.partial.iterdir():
            if path.name not in known and path.suffix in (".tmp", ".safetensors") and path.name != CALIBRATION:
                path.unlink()

    def _sync_journal(self) -> None:
        self._lock.flush()
        os.fsync(self._lock.fileno())

    def write_shard(
        self, part: int, name: str, tensors: dict[str, Tensor], check: Callable[[dict[str, Tensor]], dict[str, Any]]
    ) -> None:
        """Write, sync, read back, check, rename, note.

        check: what must hold of the tensors as read back from disk; raises VerificationError; what it returns is noted.
        """
        final, temporary = self.partial / name, self.partial / (name + ".tmp")
        with _writing(self.partial, sum(t.nbytes for t in tensors.values())):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, {"format": "pt"})
            _sync(temporary)
        digest = sha256(temporary)
        noted = check(_read_back(temporary, tensors))
        with _writing(self.partial):
            temporary.rename(final)
            _sync(self.partial)
            record = {"part": part, "shard": name, "sha256": digest, "bytes": final.stat().st_size, **noted}
            record["tensors"] = sorted(tensors)
            self._lock.write(json.dumps(record) + "\n")
            self._sync_journal()
        self.records[part] = record

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        temporary = self.partial / (name + ".tmp")
        with _writing(self.partial):
            temporary.write_text(json.dumps(content, indent=2) + "\n")
            _sync(temporary)
            temporary.rename(self.partial / name)

    def finish(self, config: dict[str, Any], companions: list[Path], manifest: dict[str, Any]) -> None:
        """Index, config, companions and, last, the manifest with every file's SHA-256; then the final name."""
        records = [self.records[part] for part in sorted(self.records)]
        weight_map = {name: record["shard"] for record in records for name in record["tensors"]}
        total = sum(record["bytes"] for record in records)
        self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        self.write_json("config.json", config)
        with _writing(self.partial):
            for path in companions:
                shutil.copyfile(path, self.partial / path.name)
                _sync(self.partial / path.name)
        (self.partial / CALIBRATION).unlink(missing_ok=True)
        hashes = {record["shard"]: {"bytes": record["bytes"], "sha256": record["sha256"]} for record in records}
        for path in sorted(self.partial.iterdir()):
            if path.name not in hashes and path.name not in (JOURNAL, MANIFEST):
                hashes[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        self.write_json(MANIFEST, {**manifest, "files": dict(sorted(hashes.items()))})
        with _writing(self.partial):
            (self.partial / JOURNAL).unlink()
            if self.output.exists():
                shutil.rmtree(self.output)  # empty, or an older result that --overwrite gave up
            self.partial.rename(self.output)
            _sync(self.output.parent)


CALIBRATION = "calibration.safetensors"  # the tokens of a run under way, so that a resumed one sees the same


def check_usable(output: Path, *, overwrite: bool) -> None:
    """Raises OutputError if `output` cannot become a result: it is something else's, or its parent is not writable."""
    if output.exists():
        if not output.is_dir():
            raise OutputError(f"{output}: is a file: choose another --output")
        empty = not any(output.iterdir())
        ours = (output / MANIFEST).is_file()
        if ours and not overwrite:
            raise OutputError(f"{output}: holds a finished result: choose another --output, or pass --overwrite")
        if not ours and not empty:
            raise OutputError(f"{output}: exists and is not a result of llmquant: choose another --output")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: not writable: choose another --output")


def free_bytes(output: Path) -> int:
    """Free bytes of the disk on which `output` would lie."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _read_back(path: Path, written: dict[str, Tensor]) -> dict[str, Tensor]:
    with safe_open(path, "pt", device="cpu") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    for name, tensor in written.items():
        if name not in found or not _same_bytes(found[name], tensor):
            raise VerificationError(
                f"{path}: {name} reads back other than it was written: the disk is not to be trusted"
            )
    return found


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.numel():
        return True
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.cpu().contiguous().reshape(-1).view(torch.uint8))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _writing(folder: Path, need: int = 0) -> Iterator[None]:
    """Turn what the system says of a failed write into one line with a remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text
        if full:
            free = free_bytes(folder)
            raise OutputError(
                f"{folder}: the disk is full ({free:,} bytes free, {need:,} to write): free some space and repeat the "
                "same command, which resumes"
            ) from None
        raise OutputError(f"{folder}: cannot be written: {text}") from None
