"""Time is counted once, by phase; writing goes on beside solving, in order, one block at a time."""

from __future__ import annotations

import json
import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_pipeline import SMALL, contents, quantize

from llmquant import phases
from llmquant.checkpoint import Checkpoint
from llmquant.errors import OutputError
from llmquant.output import OutputFolder


def test_every_second_is_counted_once() -> None:
    @phases.phase("inner")
    def inner() -> None:
        time.sleep(0.02)

    start = time.perf_counter()
    with phases.timed() as seconds:
        with phases.phase("outer"):
            time.sleep(0.02)
            inner()
        with phases.phase("whole", whole=True):
            inner()
        with pytest.raises(ValueError, match="wrong"), phases.phase("failed"):
            raise ValueError("wrong")
        inner()
    took = time.perf_counter() - start
    assert set(seconds) == {"rest", "outer", "inner", "whole", "failed"}
    assert sum(seconds.values()) == pytest.approx(took, abs=0.01)
    assert seconds["inner"] >= 0.04
    assert min(seconds["outer"], seconds["whole"]) >= 0.02
    assert seconds["failed"] < 0.01
    inner()  # where nobody counts


def test_the_overhead_is_what_is_no_arithmetic() -> None:
    assert phases.overhead({"solve": 6.0, "forward": 3.0, "write": 0.5, "rest": 0.5}) == pytest.approx(0.1)
    assert phases.overhead({}) == 0.0


def test_a_run_tells_its_phases_and_the_file_does_not(tiny: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    manifest = quantize(tiny, tmp_path / "out", calibration=SMALL)
    took = time.perf_counter() - start
    spent = manifest["phases"]
    assert {"sample", "curvature", "forward", "statistics", "solve", "scales", "load", "verify"} <= set(spent)
    assert 0 < sum(spent.values()) <= took
    assert spent["solve"] > spent["load"] > 0
    assert manifest["behind"] > 0
    stored = json.loads((tmp_path / "out" / "llmquant.json").read_text())
    assert not {"phases", "behind"} & set(stored)


# ---- writing beside solving


def fail() -> None:
    raise OutputError("the disk is full")


def shard(folder: OutputFolder, part: int) -> None:
    folder.write_shard(part, f"{part}.safetensors", {"w": torch.full((4,), float(part))}, lambda read: {})


def test_parts_are_added_in_order_one_at_a_time(tmp_path: Path) -> None:
    running, seen, here = threading.Lock(), [], threading.get_ident()

    def add(part: int) -> None:
        assert running.acquire(blocking=False)
        seen.append((part, threading.get_ident() != here))
        time.sleep(0.02 if part % 2 else 0.0)
        shard(folder, part)
        running.release()

    with OutputFolder(tmp_path / "out", {}) as folder:
        for part in range(4):
            folder.later(partial(add, part))
            assert set(folder.records) >= set(range(part))  # all but the last are on the disk
        folder.settle()
        assert list(folder.records) == [0, 1, 2, 3]
    assert seen == [(part, True) for part in range(4)]
    notes = [json.loads(line) for line in (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()[1:]]
    assert [note["part"] for note in notes] == [0, 1, 2, 3]


@pytest.mark.parametrize("notices", ["later", "settle", "kept", "end"])
def test_what_goes_wrong_beside_is_raised(notices: str, tmp_path: Path) -> None:
    def run() -> None:
        with OutputFolder(tmp_path / "out", {}) as folder:
            folder.later(fail)
            if notices == "later":
                folder.later(lambda: None)
            elif notices == "settle":
                folder.settle()
            elif notices == "kept":
                folder.kept("kept-x.safetensors", lambda: {"x": torch.ones(1)})
            assert notices == "end"

    with pytest.raises(OutputError, match="the disk is full"):
        run()
    assert not (tmp_path / "out").exists()


def test_a_cut_run_keeps_what_was_being_written(tmp_path: Path) -> None:
    def slow(folder: OutputFolder) -> None:
        time.sleep(0.05)
        shard(folder, 0)

    def run() -> None:
        with OutputFolder(tmp_path / "out", {}) as folder:
            folder.later(partial(slow, folder))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    with OutputFolder(tmp_path / "out", {}) as folder:
        assert list(folder.records) == [0]


def test_a_cut_run_tells_of_both_errors(tmp_path: Path) -> None:
    def run() -> None:
        with OutputFolder(tmp_path / "out", {}) as folder:
            folder.later(fail)
            raise ValueError("first")

    with pytest.raises(ValueError, match="first") as caught:
        run()
    assert "the disk is full" in caught.value.__notes__[0]


# ---- reading ahead


def test_tensors_are_asked_for_by_their_own_bytes(
    pycode: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []

    def advise(handle: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((os.readlink(f"/proc/self/fd/{handle}"), offset, length))

    checkpoint = Checkpoint(pycode)
    names = [name for name in checkpoint.names() if ".layers.2." in name]
    monkeypatch.setattr(os, "posix_fadvise", advise)
    checkpoint.prefetch(names)
    file = pycode / "model.safetensors"
    data = file.read_bytes()
    with safe_open(file, "pt") as stored:
        expected = {bytes(stored.get_tensor(name).contiguous().view(torch.uint8).numpy()) for name in names}
    assert len(names) == 9
    assert {data[offset : offset + length] for _, offset, length in asked} == expected
    assert {Path(path) for path, _, _ in asked} == {file.resolve()}


def test_a_run_asks_for_each_block_while_the_one_before_is_solved(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    prefetch = Checkpoint.prefetch

    def noted(self: Checkpoint, names: list[str]) -> None:
        events.append(names[0].split(".")[2])
        prefetch(self, names)

    monkeypatch.setattr(Checkpoint, "prefetch", noted)
    quantize(tiny, tmp_path / "a")
    assert events == ["1", "2", "3", "4", "5"]
    monkeypatch.delattr(os, "posix_fadvise")
    quantize(tiny, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
