"""Whatever happens to a run, what comes of it is the same folder, byte by byte, or a refusal: never another folder.

`LLMQUANT_FAULTS=50 pytest tests/test_faults.py` kills and fails as many runs instead of a few.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmquant import inspection, output, pipeline
from llmquant.checkpoint import INDEX, MANIFEST
from llmquant.errors import LlmquantError, OutputError
from llmquant.recipe import Recipe

FAULTS = int(os.environ.get("LLMQUANT_FAULTS", "3"))
SMALL = pipeline.Calibration("self", samples=4, length=32, batch=2)


def quantize(model: Path, folder: Path, calibration: pipeline.Calibration | None = None, **options: Any) -> dict:
    job = pipeline.Job(str(model), Recipe.uniform("int4:g32"), calibration)
    return pipeline.quantize(pipeline.prepare(job, folder, **options), folder)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a calibrated run leaves that nothing happens to; to be read only."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    quantize(tiny, folder, SMALL)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# ---- killed

KILLED = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path
    import torch
    from llmquant import pipeline
    from llmquant.recipe import Recipe

    torch.set_num_threads(1)  # so that a fork finds no threads
    model, moments = sys.argv[1], sys.argv[3:]

    def start(job, output):
        child = os.fork()
        if child == 0:
            pipeline.quantize(pipeline.prepare(job, output), output)
            os._exit(0)
        return child

    for kind, shown in ("fast", None), ("calibrated", pipeline.Calibration("self", samples=8, length=64, batch=4)):
        folder, job = Path(sys.argv[2]) / kind, pipeline.Job(model, Recipe.uniform("int4:g32"), shown)
        folder.mkdir()
        began = time.monotonic()
        os.waitpid(start(job, folder / "whole"), 0)
        duration = time.monotonic() - began
        for i, moment in enumerate(moments):
            child = start(job, folder / f"cut{i}")
            time.sleep(float(moment) * duration)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                print(f"killed while {kind}")
                os.waitpid(start(job, folder / f"cut{i}"), 0)
""")


def test_killed_at_random_moments_and_resumed_the_bytes_are_the_same(tiny: Path, tmp_path: Path) -> None:
    generator = random.Random(4)
    moments = [str(generator.random()) for _ in range(FAULTS)]
    command = [sys.executable, "-c", KILLED, str(tiny), str(tmp_path), *moments]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for kind in ("fast", "calibrated"):
        assert said.count(f"killed while {kind}") > FAULTS / 2  # a run may be done before its moment comes
        whole = contents(tmp_path / kind / "whole")
        assert all(contents(tmp_path / kind / f"cut{i}") == whole for i in range(FAULTS))
        assert not list((tmp_path / kind).glob("*.partial"))


# ---- failing writes


class Disk:
    """Counts the calls by which a run writes, and fails one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.failing, self.code = 0, -1, errno.EIO
        for place, name in ((output, "save_file"), (os, "fsync"), (shutil, "copyfile"), (Path, "rename")):
            monkeypatch.setattr(place, name, self._counted(getattr(place, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.failing:
                raise OSError(self.code, os.strerror(self.code))
            return call(*arguments, **options)

        return counted

    def fail(self, call: int, code: int) -> None:
        self.calls, self.failing, self.code = 0, call, code


def test_a_write_that_fails_ends_in_one_line_and_the_run_resumes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    quantize(tiny, tmp_path / "whole", SMALL)
    whole, calls, generator = contents(tmp_path / "whole"), disk.calls, random.Random(5)
    assert calls > 50
    for index in range(FAULTS):
        folder = tmp_path / f"out{index}"
        code = generator.choice([errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
        disk.fail(generator.randrange(calls), code)
        with pytest.raises(OutputError, match=r"disk is full|cannot be written"):
            quantize(tiny, folder, SMALL)
        disk.fail(-1, 0)
        if not folder.exists():  # the very last call tells the disk of the new name
            quantize(tiny, folder, SMALL)
        assert contents(folder) == whole
        shutil.rmtree(folder)


# ---- damage between two runs


def cut(model: Path, folder: Path, calibration: pipeline.Calibration | None = None) -> Path:
    """What a run leaves that is interrupted in the third block."""

    class Cut(Exception):
        pass

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("block 3 "):
            raise Cut

    job = pipeline.Job(str(model), Recipe.uniform("int4:g32"), calibration)
    with pytest.raises(Cut):
        pipeline.quantize(pipeline.prepare(job, folder), folder, progress=progress)
    return folder.with_name(folder.name + ".partial")


@pytest.mark.parametrize("name", ["kept-calibration.safetensors", "kept-curvature.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_what_a_run_keeps_for_itself_is_not_believed_when_damaged(
    name: str, damage: str, tiny: Path, whole: Path, tmp_path: Path
) -> None:
    kept = cut(tiny, tmp_path / "cut", SMALL) / name
    data = bytearray(kept.read_bytes())
    data[-3] ^= 1
    kept.write_bytes(data if damage == "flip" else data[:-3])
    quantize(tiny, tmp_path / "cut", SMALL)
    assert contents(tmp_path / "cut") == contents(whole)


def test_a_checkpoint_that_changed_between_two_runs_is_refused(tiny: Path, tmp_path: Path) -> None:
    tiny = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    cut(tiny, tmp_path / "out")
    shard = next(tiny.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(OutputError, match=r"begun with source = .*--overwrite"):
        quantize(tiny, tmp_path / "out")


@pytest.mark.parametrize("fault", range(FAULTS))
def test_a_finished_folder_with_any_bit_flipped_or_any_file_cut_does_not_verify(
    fault: int, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    assert inspection.verify(folder) == []
    generator = random.Random(fault)
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    for path in generator.sample(files, min(6, len(files))):
        before = path.read_bytes()
        data = bytearray(before)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        for damaged in (bytes(data), before[: generator.randrange(len(before))]):
            path.write_bytes(damaged)
            with contextlib.suppress(LlmquantError):
                assert inspection.verify(folder), path.name
        path.write_bytes(before)
    (folder / files[0].name).unlink()
    assert inspection.verify(folder)


BOTH = textwrap.dedent("""
    import os, sys
    import torch
    from transformers.models.llama import modeling_llama
    from llmquant import cli, pipeline

    torch.set_num_threads(1)  # so that a fork finds no threads
    folder, *sys.argv = sys.argv[1:]
    children = []
    for number in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.dup2(os.open(f"{folder}/said{number}", os.O_WRONLY | os.O_CREAT), 2)
            try:
                cli.main()
            except SystemExit as ended:
                sys.stderr.flush()
                os._exit(ended.code or 0)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
""")


def test_two_processes_on_one_folder(tiny: Path, tmp_path: Path) -> None:
    """One of them writes; the other is told so, and leaves it alone."""
    command = ["llmquant", "quantize", str(tiny), "--group", "32", "--quality", "fast", "-o", str(tmp_path / "out")]
    both = [sys.executable, "-c", BOTH, str(tmp_path), *command]
    codes = subprocess.run(both, check=True, capture_output=True, text=True).stdout.split()[-2:]
    ended = [((tmp_path / f"said{number}").read_text(), int(code)) for number, code in enumerate(codes)]
    assert sorted(codes) == ["0", "5"], ended
    said = next(text for text, code in ended if code == 5)
    assert "another run is writing here" in said or "holds a finished result" in said
    assert inspection.verify(tmp_path / "out") == []
    assert set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values()) <= set(
        path.name for path in (tmp_path / "out").iterdir()
    )


# ---- memory


def test_hidden_states_on_disk_change_no_byte(tiny: Path, whole: Path, tmp_path: Path) -> None:
    states = tmp_path / "states"
    with pytest.raises(OutputError, match="no such folder"):
        quantize(tiny, tmp_path / "disk", SMALL, offload=states)
    states.mkdir()
    quantize(tiny, tmp_path / "disk", SMALL, offload=states)
    assert not list(states.iterdir())
    assert contents(tmp_path / "disk") == contents(whole)


def test_a_plan_that_needs_more_memory_than_it_may_take_is_refused(pycode: Path, tmp_path: Path) -> None:
    many = pipeline.Calibration("self", samples=20_000, length=512)
    job = pipeline.Job(str(pycode), Recipe.uniform("int4:g32"), many)
    roomy = pipeline.prepare(job, tmp_path / "out", max_memory=2**40).plan
    assert not roomy.offload
    assert roomy.peak_memory > 2 * 20_000 * 512 * 128 * 2  # both streams, bfloat16
    tight = pipeline.prepare(job, tmp_path / "out", max_memory=2**30).plan
    assert tight.offload
    assert tight.peak_memory < 2**30
    with pytest.raises(LlmquantError, match="--max-memory gives 100,000,000"):
        pipeline.prepare(job, tmp_path / "out", max_memory=100_000_000)
    assert not list(tmp_path.iterdir())
