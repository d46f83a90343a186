"""The folder a run writes: nothing gets its final name before it has been read back and checked.

A run writes into OUTPUT.partial: one shard per block under a temporary name, fsynced, read back, checked, renamed, and
only then noted in a journal with its SHA-256. The folder takes its final name in one rename when all of it is there,
so a folder under its final name is always complete, and a run that was cut resumes after its last noted shard.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.checkpoint import INDEX, MANIFEST, is_plain_name, sha256
from llmquant.errors import OutputError, VerificationError
from llmquant.phases import phase

JOURNAL = "journal.jsonl"
# Of a run under way, so that a resumed one sees the same: tokens, how the loss curves, where a block's weights lean,
# which formats were chosen.
KEPT = "kept-"
STATE = f"{KEPT}state-"  # of training, with the step
TEACHER = f"{KEPT}teacher.safetensors"
CALIBRATION, CURVATURE, LEAN, ALLOCATION = (
    f"{KEPT}{name}.safetensors" for name in ("calibration", "curvature", "lean-{}", "allocation")
)


class OutputFolder:
    """The folder a run writes. Use as a context manager; `finish` gives it its final name.

    settings: what must be equal for a cut run to be taken up again, as JSON values.
    behind: seconds of what `later` did beside its caller.
    Raises OutputError: not writable, disk full, something else's, in use, or begun with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.records: dict[int, dict[str, Any]] = {}
        self._kept: dict[str, str] = {}
        self._overwrite = overwrite
        self._writer = ThreadPoolExecutor(1, "writer")
        self._pending: Future[None] | None = None
        self.behind = 0.0

    def __enter__(self) -> OutputFolder:
        check_usable(self.output, overwrite=self._overwrite)
        self._check_partial()
        with _writing(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._journal = (self.partial / JOURNAL).open("a+")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._take_up()
        except BlockingIOError:
            self._journal.close()
            raise OutputError(f"{self.partial}: another run is writing here: wait for it or choose another") from None
        except BaseException:
            self._journal.close()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """What is being written is finished first, so that a run that was cut keeps it."""
        try:
            self.settle()
        except Exception as own:
            if error is None:
                raise
            error.add_note(f"and what was being written beside it failed: {own}")
        finally:
            self._writer.shutdown()
            self._journal.close()

    def later(self, add: Callable[[], None]) -> None:
        """Have `add` add a part in a thread, beside what the caller goes on with.

        One at a time, so that the journal stays in order and no more than one waits in memory: the part before is
        waited for, and what went wrong with it is raised here, or by `settle`.
        """
        self.settle()
        self._pending = self._writer.submit(self._timed, add)

    def _timed(self, add: Callable[[], None]) -> None:
        start = time.perf_counter()
        add()
        self.behind += time.perf_counter() - start

    def settle(self) -> None:
        """Wait until all that was handed to `later` is on the disk. Raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with phase("write"):
                pending.result()

    def _check_partial(self) -> None:
        """What lies under the name of a cut run must be one: leftovers in it are deleted."""
        if not self.partial.is_dir() or not any(self.partial.iterdir()):
            return
        if not (self.partial / JOURNAL).is_file() and not (self.partial / MANIFEST).is_file():
            raise OutputError(f"{self.partial}: exists and is no cut run of llmquant: choose another --output")

    def _take_up(self) -> None:
        """Read the journal of an earlier run that may be resumed, and drop all that it does not note."""
        begun, kept, records = (None, {}, []) if self._overwrite else self._read_journal()
        if records:
            self._check_settings(begun or {})
        for record in records:
            if not self._is_there(record["shard"], record["sha256"]):
                break  # noted, but not there as noted: from here on it is done again
            self.records[record["part"]] = record
        if begun == self.settings:
            self._kept = {name: digest for name, digest in kept.items() if self._is_kept(name, digest)}
        known = {JOURNAL, *self._kept, *(record["shard"] for record in self.records.values())}
        with _writing(self.partial):
            for path in self.partial.iterdir():
                if path.name not in known:
                    path.unlink()
            self._journal.truncate(0)
            self._note(self.settings)
            for name, digest in self._kept.items():
                self._note({"kept": name, "sha256": digest})
            for record in self.records.values():
                self._note(record)

    def _is_there(self, name: str, digest: str) -> bool:
        path = self.partial / name
        return path.is_file() and sha256(path) == digest

    def _is_kept(self, name: str, digest: str) -> bool:
        return name.startswith(KEPT) and is_plain_name(name) and self._is_there(name, digest)

    def _read_journal(self) -> tuple[dict[str, Any] | None, dict[str, str], list[dict[str, Any]]]:
        """Settings, {kept file: hash} and shards; a line that was cut or damaged, and what follows, is not read."""
        begun: dict[str, Any] | None = None
        kept: dict[str, str] = {}
        records: list[dict[str, Any]] = []
        self._journal.seek(0)
        try:
            for line in self._journal:
                note = json.loads(line)
                if not isinstance(note, dict):
                    break
                if begun is None:
                    begun = note
                elif isinstance(note.get("kept"), str) and isinstance(note.get("sha256"), str):
                    kept[note["kept"]] = note["sha256"]
                elif _is_record(note):
                    records.append(note)
                else:
                    break
        except (ValueError, RecursionError):  # no UTF-8, no JSON, or numbers and nests without end
            pass
        return begun, kept, records

    def _note(self, line: dict[str, Any]) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _check_settings(self, begun: dict[str, Any]) -> None:
        for key in sorted({*begun, *self.settings}):
            if begun.get(key) != self.settings.get(key):
                raise OutputError(
                    f"{self.partial}: begun with {key} = {begun.get(key)!r}, now {key} = {self.settings.get(key)!r}: "
                    "repeat the first command to resume it, or pass --overwrite to begin anew"
                )

    def write_shard(
        self, part: int, name: str, tensors: dict[str, Tensor], check: Callable[[dict[str, Tensor]], dict[str, Any]]
    ) -> None:
        """Write, sync, read back, check, rename, note.

        check: what must hold of the tensors as read back from disk; raises VerificationError; what it returns is noted.
        """

        def write(temporary: Path) -> None:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, {"format": "pt"})
            shutil.copymode(self.partial / JOURNAL, temporary)  # safetensors writes for its owner's eyes only

        need = sum(t.nbytes for t in tensors.values())
        self.add(part, name, sorted(tensors), write, lambda path: check(_read_back(path, tensors)), need)

    def link_shard(self, part: int, source: Path, names: list[str]) -> None:
        """A shard whose bytes do not change: a hard link to `source`, or where the disk has none a copy.

        names: of the tensors in it.
        """

        def write(temporary: Path) -> None:
            temporary.unlink(missing_ok=True)
            try:
                os.link(source.resolve(), temporary)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(source, temporary)

        def check(temporary: Path) -> dict[str, Any]:
            if not temporary.samefile(source) and sha256(temporary) != sha256(source):
                raise VerificationError(f"{temporary}: is not what {source} is: the disk is not to be trusted")
            return {}

        self.add(part, source.name, sorted(names), write, check, source.stat().st_size)

    def add(
        self,
        part: int,
        name: str,
        tensors: list[str],
        write: Callable[[Path], None],
        check: Callable[[Path], dict[str, Any]],
        need: int,
    ) -> None:
        """Let `write` write a file under a temporary name; sync, check, rename, note.

        tensors: their names, for the index. check: raises VerificationError; what it returns is noted. need: bytes.
        """
        final, temporary = self.partial / name, self.partial / (name + ".tmp")
        with _writing(self.partial, need):
            write(temporary)
            _sync(temporary)
        digest = sha256(temporary)
        noted = check(temporary)
        with _writing(self.partial):
            temporary.rename(final)
            _sync(self.partial)
            record = {"part": part, "shard": name, "sha256": digest, "bytes": final.stat().st_size, **noted}
            record["tensors"] = tensors
            self._note(record)
        self.records[part] = record

    def keeps(self, name: str) -> bool:
        """Whether an earlier run has left what `kept` would return."""
        return name in self._kept

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns; in a run that is taken up again, what it returned the first time. name: KEPT + ..."""
        self.settle()  # there is one journal
        if name in self._kept:
            return load_file(self.partial / name)
        tensors = make()
        self._keep(name, tensors)
        return tensors

    def _keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        kept = self.partial / name
        temporary = kept.with_suffix(".tmp")
        with _writing(self.partial, sum(tensor.nbytes for tensor in tensors.values())):
            save_file(tensors, temporary)
            _sync(temporary)
            temporary.rename(kept)
            self._kept[name] = sha256(kept)
            self._note({"kept": name, "sha256": self._kept[name]})

    def keep_state(self, step: int, tensors: dict[str, Tensor]) -> None:
        """How far training has come, in place of what was kept before: that goes when this is there."""
        before = [name for name in self._kept if name.startswith(STATE)]
        self._keep(f"{STATE}{step:08d}.safetensors", tensors)
        for name in before:
            del self._kept[name]
            (self.partial / name).unlink()

    def state(self) -> dict[str, Tensor] | None:
        """The last that `keep_state` was given, in a run that is taken up again."""
        names = sorted(name for name in self._kept if name.startswith(STATE))
        return load_file(self.partial / names[-1]) if names else None

    def kept_json(self, name: str, make: Callable[[], Any]) -> Any:
        """As `kept`, for a JSON value."""

        def packed() -> dict[str, Tensor]:
            return {"json": torch.frombuffer(bytearray(json.dumps(make()).encode()), dtype=torch.uint8)}

        return json.loads(self.kept(name, packed)["json"].numpy().tobytes())

    def write_json(self, name: str, content: dict[str, Any] | list[Any]) -> None:
        replace_text(self.partial / name, json.dumps(content, indent=2) + "\n")

    def assemble(self, config: dict[str, Any] | None, companions: list[Path]) -> None:
        """Index, config and companions: what is under way can then be read as a model.

        config None: the files say all themselves, and neither config nor index is written.
        """
        self.settle()
        weight_map, records, _ = self._final()
        total = sum(record["bytes"] for record in records)
        if config is not None:
            self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
            self.write_json("config.json", config)
        with _writing(self.partial):
            for path in companions:
                shutil.copyfile(path, self.partial / path.name)
                _sync(self.partial / path.name)

    def _final(self) -> tuple[dict[str, str], list[dict[str, Any]], list[str]]:
        """{tensor: its shard}, the records of those shards, and the shards of which nothing is left in the result."""
        records = [self.records[part] for part in sorted(self.records)]
        weight_map = {name: record["shard"] for record in records for name in record["tensors"]}  # the last one counts
        replaced = [
            record["shard"] for record in records if record["tensors"] and record["shard"] not in weight_map.values()
        ]
        return weight_map, [record for record in records if record["shard"] not in replaced], replaced

    def finish(self, manifest: dict[str, Any]) -> None:
        """Last, the manifest with every file's SHA-256; then the final name."""
        _, records, replaced = self._final()
        for path in (*self.partial.glob(f"{KEPT}*"), *(self.partial / name for name in replaced)):
            path.unlink(missing_ok=True)
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


def _is_record(note: dict[str, Any]) -> bool:
    """Whether a line of the journal is one that write_shard notes."""
    kinds = {"part": int, "shard": str, "sha256": str, "bytes": int, "tensors": list}
    if not all(isinstance(note.get(key), kind) for key, kind in kinds.items()):
        return False
    report = note.get("report", [])
    return (
        is_plain_name(note["shard"])
        and note["part"] >= 0
        and all(isinstance(name, str) for name in note["tensors"])
        and isinstance(report, list)
        and all(isinstance(entry, dict) for entry in report)
    )


def replace_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name; sync; rename. Raises OutputError."""
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path.parent):
        temporary.write_text(text)
        _sync(temporary)
        temporary.rename(path)
        _sync(path.parent)


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
    parent = _existing(output.absolute().parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: not writable: choose another --output")


def free_bytes(output: Path) -> int:
    """Free bytes of the disk on which `output` would lie."""
    return shutil.disk_usage(_existing(output.absolute())).free


def _existing(place: Path) -> Path:
    """The place itself, or the nearest folder above it that is there."""
    while not place.exists():
        place = place.parent
    return place


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
