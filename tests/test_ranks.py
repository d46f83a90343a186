"""Several processes at one job write what one writes, byte by byte; and none waits for one that is gone.

The processes are forks of one that has imported everything, with the environment that torchrun would give them; the
last test starts torchrun itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from safetensors.torch import save_file
from test_faults import contents

from llmquant import inspection, stats
from llmquant.errors import PlanError
from llmquant.ranks import Parcel, Ranks, _packed, _unpacked
from llmquant.stats import Stats

FORKS = textwrap.dedent("""
    import json, os, signal, socket, sys, time
    from pathlib import Path
    import torch
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3_moe import modeling_qwen3_moe
    from llmquant import pipeline, ranks, stats
    from llmquant.errors import LlmquantError
    from llmquant.recipe import Recipe
    from llmquant.solvers import loops

    for loop in (loops._sweep_rows, loops.SWEEP), (loops._spread_rows, loops.SPREAD):
        loops._compiled(*loop)  # once, and not in every fork

    torch.set_num_threads(1)  # so that a fork finds no threads
    stats.SLAB = 24  # so that small matrices have several

    def quantize(case, output):
        rules = Recipe.from_json(case["recipe"])
        shown = case.get("calibration") and pipeline.Calibration(**case["calibration"])
        more = {"dtype": torch.bfloat16} if case.get("odd") == os.environ.get("RANK") else {}
        job = pipeline.Job(case["model"], rules, shown, tuning=case.get("tuning", 0), **more)
        offload = Path(case["offload"]) if "offload" in case else None

        if "killed" in case and os.environ["RANK"] == "1":
            solve, send = pipeline.solve_block, ranks.Ranks.each

            def solve_block(prepared, block, *rest):
                if block == 1:  # in which it dies in the middle of a sum
                    calls = iter(range(5))
                    ranks.Ranks.each = lambda self, own: (
                        os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 4 else send(self, own)
                    )
                return solve(prepared, block, *rest)

            pipeline.solve_block = solve_block
        pipeline.quantize(pipeline.prepare(job, output, offload=offload), output)

    def start(case, output, count):
        port = socket.create_server(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "LLMQUANT_TIMEOUT": "120"}
        port.close()
        children = []
        for rank in range(count):
            children.append(os.fork())
            if children[-1] == 0:
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                os.environ.update(where, **{name: str(value) for name, value in own.items()})
                try:
                    quantize(case, output)
                    ranks.leave()
                except LlmquantError as error:
                    print(f"{rank}: {error}", file=sys.stderr, flush=True)
                    os._exit(error.exit_code)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    folder = Path(sys.argv[1])
    for name, case in json.loads(sys.stdin.read()).items():
        for run, count, *more in case["runs"]:
            codes = start({**case, **dict.fromkeys(more, "1")}, folder / f"{name}-{run}", count)
            left = sorted(path.name for path in (folder / f"{name}-{run}.partial").glob("model-*"))
            print(json.dumps([codes, left]), flush=True)
""")


def forked(folder: Path, cases: dict[str, Any]) -> tuple[list[tuple[list[int], list[str]]], str]:
    """Of every run of every case the exit codes of its processes, and the shards of a cut one; what they said."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(folder)], input=json.dumps(cases), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()], plain(done.stderr)


def plain(said: str) -> str:
    """Without the frames of C++ that torch prints."""
    return "\n".join(line for line in said.splitlines() if "frame #" not in line)


def windows(count: int = 11, length: int = 12, vocabulary: int = 96) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(3))


ONE_TWO_FOUR = [("one", 1), ("two", 2), ("four", 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


Runs = tuple[dict[str, list[tuple[list[int], list[str]]]], str]


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    """Of every case what its runs ended with, and what all said: all in children of one process.

    Of windows that do not come out even, of experts, of scales that move, of tuning, of matrices outside blocks; and of
    one that is killed.
    """
    dense = make_checkpoint(folder / "dense", "llama", num_hidden_layers=2)
    mixture = make_checkpoint(folder / "mixture", "qwen3_moe", num_hidden_layers=2)
    text = folder / "tokens.safetensors"
    save_file({"tokens": windows()}, text)
    shown = {"source": str(text), "samples": 11, "batch": 2, "check": False}
    (folder / "states").mkdir()
    many = [
        {"pattern": "*.self_attn.*", "format": "int4:g24", "solver": "awq"},
        {"pattern": "*.gate_proj", "format": "int4:g24", "solver": "autoround", "options": {"iterations": 3}},
        {"pattern": "lm_head", "format": "int8:g24"},
        {"pattern": "*", "format": "nvfp4", "solver": "gptq"},
    ]
    every = [{"pattern": "*", "format": "int3:g24", "options": {"lean": True, "clip": "minmax"}}]
    plain = [{"pattern": "*", "format": "int4:g24"}]
    cases: dict[str, Any] = {
        "dense": {"model": str(dense), "recipe": every, "calibration": shown, "tuning": 2, "runs": ONE_TWO_FOUR},
        "mixed": {"model": str(dense), "recipe": many, "calibration": shown, "offload": str(folder / "states"),
                  "runs": [("one", 1), ("three", 3)]},
        "mixture": {"model": str(mixture), "recipe": every, "calibration": shown, "runs": [("one", 1), ("two", 2)]},
        "fast": {"model": str(mixture), "recipe": plain, "runs": [("one", 1), ("two", 2)]},
    }  # fmt: skip
    own = {"source": "self", "samples": 8, "length": 12, "batch": 2, "curvature": 0.0}
    tries = [("odd", 2, "odd"), ("one", 1), ("cut", 2, "killed"), ("cut", 2)]
    cases["job"] = {"model": str(dense), "recipe": plain, "calibration": own, "runs": tries}
    found, said = forked(folder, cases)
    return {name: [found.pop(0) for _ in case["runs"]] for name, case in cases.items()}, said


@pytest.mark.parametrize(
    ("name", "others"), [("dense", ["two", "four"]), ("mixed", ["three"]), ("mixture", ["two"]), ("fast", ["two"])]
)
def test_any_number_of_processes_writes_the_same_bytes(name: str, others: list[str], runs: Runs, folder: Path) -> None:
    ended, said = runs
    assert not any(code for codes, _ in ended[name] for code in codes), said
    assert all(contents(folder / f"{name}-{other}") == contents(folder / f"{name}-one") for other in others)
    assert not list((folder / "states").iterdir())


def test_a_process_that_is_gone_or_differs_ends_the_others_and_the_job_resumes(runs: Runs, folder: Path) -> None:
    ended, said = runs
    odd, one, killed, resumed = ended["job"]
    assert odd[0] == [PlanError.exit_code] * 2
    assert "process 1 has dtype = 'torch.bfloat16', the first one 'None'" in said
    assert killed == ([9, -signal.SIGKILL], ["model-00001-of-00003.safetensors"]), said
    assert (one[0], resumed) == ([0], ([0, 0], [])), said
    assert "0: another process of the job is gone" in said
    assert "repeat the same command, which resumes" in said
    assert contents(folder / "job-cut") == contents(folder / "job-one")


def test_torchrun_runs_the_command_line(tmp_path: Path) -> None:
    """What there is to say is said once."""
    model = make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmquant"]
    command += ["quantize", str(model), "--group", "24", "--quality", "fast", "-o", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per quantized weight") == 1
    assert inspection.verify(tmp_path / "out") == []


# ---- who does what, and what is sent


def test_shares_are_even() -> None:
    ranks = Ranks(0, 3)
    costs = [4, 1, 7, 3, 2, 9, 1]
    owners = ranks.shares(costs)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)]
    assert sorted(loads) == [9, 9, 9]
    assert Ranks(1, 3).shares(costs) == owners
    assert Ranks().shares(costs) == [0] * 7


def test_what_is_packed_is_unpacked() -> None:
    tensors = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "odd": torch.arange(7, dtype=torch.uint8),
        "halves": torch.randn(3, 5).bfloat16().T,
        "flags": torch.tensor([True, False]),
    }
    facts = {"nan": float("inf"), "third": 1 / 3, "list": [1, None, "ä"]}
    header, parts = _packed(Parcel(facts, tensors))
    found = _unpacked(header, torch.cat(parts))
    assert found.facts == facts
    assert list(found.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_shares_of_sums_make_up_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "SLAB", 5)
    x, lacking = torch.randn(40, 12), torch.randn(40, 7)
    x_ref = x + 0.1 * torch.randn(40, 12)
    parts = [Stats.empty(12, share=(first, 3)) for first in range(3)]
    for part in parts:
        part.update(x, x_ref)
        part.update(x, x_ref, lacking)
    for name, wanted in (("hessian", 2 * x.T @ x), ("cross", (x_ref - x).T @ x), ("lacking", lacking.T @ x)):
        sums = [getattr(part, name) for part in parts]
        torch.testing.assert_close(sums[0] + sums[1] + sums[2], wanted)
        assert all(torch.count_nonzero(torch.stack(sums), dim=0).flatten() <= 1)
