"""What the command line says when it cannot: one clear line, the documented exit code, nothing under a final name."""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmquant
from llmquant import checkpoint, cli, cli_check, cli_train, errors, folder_tuning, output, pipeline, qat

FAST = ["--quality", "fast", "--group", "32"]
STATED_TWICE: list[tuple[Any, Any]] = [
    (cli.quantize, llmquant.quantize),
    (cli_check.evaluate, llmquant.evaluate),
    (cli_train.qat, qat.Course),
    (cli_train.tune, folder_tuning.Course),
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*arguments) -> exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmquant", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of a model in several shards, to be damaged."""
    assert len(list(tiny.glob("*.safetensors"))) > 1
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def rewrite(shard: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})


def first_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[0]


def config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(model: Path) -> None:
    shard = first_shard(model)
    shard.write_bytes(shard.read_bytes()[:-1000])


def no_weights(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()


def only_pickles(model: Path) -> None:
    no_weights(model)
    (model / "pytorch_model.bin").write_bytes(b"never read")


def promise_more(model: Path) -> None:
    path = model / checkpoint.INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.self_attn.ghost.weight"] = first_shard(model).name
    path.write_text(json.dumps(index))


def forget_one(model: Path) -> None:
    path = model / checkpoint.INDEX
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.3.mlp.up_proj.weight"]
    path.write_text(json.dumps(index))


def poison(name: str, value: float) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        for shard in model.glob("*.safetensors"):

            def change(tensors: dict[str, torch.Tensor]) -> None:
                if name in tensors:
                    tensors[name].view(-1)[5] = value

            rewrite(shard, change)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "not a checkpoint": (lambda m: (m / "config.json").unlink(), 3, "not a checkpoint: it has no config.json"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), 3, "config.json"),
    "pickles only": (only_pickles, 3, "only pickled weights (pytorch_model.bin)"),
    "no weights": (no_weights, 3, "no weights"),
    "truncated shard": (truncate, 3, "truncated"),
    "missing shard": (lambda m: first_shard(m).unlink(), 3, "this shard is missing"),
    "index names absent tensors": (promise_more, 3, "the index promises model.layers.0.self_attn.ghost.weight"),
    "index is no JSON": (lambda m: (m / checkpoint.INDEX).write_text("[]"), 3, "holds list, not a JSON object"),
    "tensor missing": (forget_one, 3, "model.layers.3.mlp.up_proj.weight"),
    "NaN in a weight": (
        poison("model.layers.2.mlp.up_proj.weight", float("nan")),
        3,
        "layers.2.mlp.up_proj.weight: nan",
    ),
    "Inf in a weight": (
        poison("model.layers.4.mlp.up_proj.weight", float("inf")),
        3,
        "layers.4.mlp.up_proj.weight: inf",
    ),
    "NaN in a norm": (poison("model.norm.weight", float("nan")), 3, "model.norm.weight: holds NaN"),
    "unknown architecture": (
        lambda m: config(m, model_type="martian", architectures=["MartianForCausalLM"]),
        4,
        "martian",
    ),
    "quantized already": (lambda m: config(m, quantization_config={"quant_method": "gptq"}), 4, "gptq"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_model_is_one_line_and_its_exit_code(damage: str, run: Run, model: Path, tmp_path: Path) -> None:
    change, code, message = DAMAGES[damage]
    change(model)
    out = tmp_path / "out"
    found, _, said = run("quantize", model, *FAST, "--output", out)
    errors_said = [line for line in said.splitlines() if line.startswith("error: ")]
    assert found == code, said
    assert len(errors_said) == 1
    assert message in errors_said[0]
    assert "Traceback" not in said
    assert not out.exists()


@pytest.mark.parametrize(("command", "interface"), STATED_TWICE)
def test_a_command_has_the_defaults_of_the_interface(command: Any, interface: Any) -> None:
    """They are stated twice, so that a command line that is only read does not wait for torch."""
    own, theirs = (inspect.signature(part).parameters for part in (command, interface))
    shared = [name for name in own if name in theirs and theirs[name].default is not inspect.Parameter.empty]
    shared = [name for name in shared if name != "format"]  # of quantize: put together of --bits and --group
    assert len(shared) > 1
    for name in shared:
        default = theirs[name].default
        assert own[name].default == (str(default).removeprefix("torch.") if name == "dtype" and default else default)


def test_bad_requests(run: Run, pycode: Path, tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("\n")
    short.write_text("def short(): pass")
    out = ["--output", tmp_path / "out"]
    cases = [
        (["quantize", pycode, "--quality", "fast", "--group", "256", *out], 4, "group 256 is larger than a row of 128"),
        (["quantize", pycode, "--format", "float3", *out], 4, "format 'float3' is unknown"),
        (["quantize", pycode, "--bits", "9", *out], 4, "format 'int9:g128' is unknown"),
        (["quantize", pycode, "--group", "many", *out], 4, "no option 'many'"),
        (["quantize", pycode, *FAST, "--clip", "magic", *out], 4, "clip mode 'magic' is unknown"),
        (["quantize", pycode, "--quality", "perfect", *out], 4, "quality 'perfect' is unknown"),
        (["quantize", pycode, "--dtype", "int3", *out], 4, "dtype 'int3' is unknown"),
        (["quantize", pycode, *FAST, "--skip", "*.nothing", *out], 4, "'*.nothing' matches no module"),
        (["quantize", pycode, "--calibration", empty, *out], 6, str(empty)),
        (["quantize", pycode, "--calibration", short, *out], 6, "windows of 512"),
        (["quantize", pycode, "--calibration", tmp_path / "none.txt", *out], 6, "none.txt"),
        (["quantize", tmp_path / "nowhere", *out], 3, "no such folder"),
        (["quantize", pycode, *FAST, "--recipe", tmp_path / "none.json", *out], 4, "none.json"),
        (["quantize", pycode, *FAST, "--eval", short, *out], 6, "one window needs 512"),
        (["eval", pycode, "--text", empty], 6, str(empty)),
        (["eval", pycode, "--text", short], 6, "one window needs 512"),
        (["inspect", pycode], 3, "not a finished result"),
    ]
    for arguments, code, message in cases:
        found, _, said = run(*arguments)
        assert (found, message in said) == (code, True), (arguments, found, said)
        assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial" / "config.json").exists()


def test_output_folder_that_is_something_else_is_never_touched(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        code, _, said = run("quantize", tiny, *FAST, "--output", out, *extra)
        assert (code, "is not a result of llmquant" in said) == (5, True)
    assert (out / "thesis.txt").read_text() == "years of work"
    code, _, said = run("quantize", tiny, *FAST, "--output", out / "thesis.txt")
    assert (code, "is a file" in said) == (5, True)


def test_finished_result_is_replaced_only_when_asked(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", tiny, *FAST, "--output", out)[0] == 0
    before = (out / "llmquant.json").read_bytes()
    code, _, said = run("quantize", tiny, *FAST, "--output", out)
    assert (code, "--overwrite" in said) == (5, True)
    assert run("quantize", tiny, *FAST, "--bits", "3", "--output", out, "--overwrite")[0] == 0
    assert (out / "llmquant.json").read_bytes() != before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written(run: Run, tiny: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    code, _, said = run("quantize", tiny, *FAST, "--output", tmp_path / "out")
    tmp_path.chmod(0o700)
    assert (code, "not writable" in said) == (5, True)


def test_too_little_disk_is_refused_before_work(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmquant.plan.free_bytes", lambda output: 1000)
    code, _, said = run("quantize", tiny, *FAST, "--output", tmp_path / "out")
    assert (code, "the disk has 1,000 free" in said) == (5, True)
    assert not list(tmp_path.glob("out*"))


def test_disk_that_fills_up_during_the_run_leaves_it_resumable(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = save_file, []

    def save(*arguments: object, **options: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(output, "save_file", save)
    code, _, said = run("quantize", tiny, *FAST, "--output", tmp_path / "out")
    assert (code, "the disk is full" in said, "resumes" in said) == (5, True, True)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == 2
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["llmquant", "quantize", str(tiny), *FAST, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert (tmp_path / "out").is_dir()


def test_interrupt_says_how_to_resume(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "solve_block", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        code, _, said = run("quantize", tiny, *FAST, "--output", tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == cli.INTERRUPTED
    assert "repeat the same command to resume" in " ".join(said.split())
    assert "Traceback" not in said
    assert (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(run: Run, pycode: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run("quantize", pycode, "--bits", "3", "--group", "64", "--dry-run", "--output", out, "--json")
    assert code == 0
    plan = json.loads(printed)
    assert len(plan["tensors"]) == 42
    # 3 bits, 16 for the scale of 64 columns, and 16 bytes that tell the shape.
    row = plan["tensors"][0]
    assert row["shape"] == [128, 128]
    assert row["bits_per_weight"] == pytest.approx(3 + 16 / 64 + 128 / 128**2)
    assert row["kernel"]
    assert plan["seconds"] > 0
    assert plan["peak_memory_bytes"] > 2**28
    assert not list(tmp_path.iterdir())
    code, printed, _ = run("quantize", pycode, "--dry-run", "--output", out)
    assert "peak memory" in printed


def test_the_interface_makes_of_the_same_words_the_same_job(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[tuple[Any, Any]] = []

    def prepare(job: pipeline.Job, output: Path, **options: Any) -> None:
        prepared.append((job, {key: value for key, value in options.items() if key != "progress"}))
        raise errors.PlanError("seen")

    monkeypatch.setattr(pipeline, "prepare", prepare)
    given = ["--format", "nf4:g64", "--quality", "best", "--rotate", "value", "--samples", "9", "--length", "32"]
    given += ["--batch", "3", "--seed", "5", "--dtype", "float32", "--offload-activations", str(tmp_path)]
    assert run("quantize", "m", *given, "--max-memory", "1GiB", "--overwrite", "--trust-remote-code")[0] == 4
    with pytest.raises(errors.PlanError, match="seen"):
        llmquant.quantize(
            "m",
            "out",
            format="nf4:g64",
            quality="best",
            rotate="value",
            samples=9,
            length=32,
            batch=3,
            seed=5,
            dtype=torch.float32,
            offload=tmp_path,
            max_memory=2**30,
            overwrite=True,
            trust_remote_code=True,
        )
    assert prepared[0] == prepared[1]
    assert prepared[0][0].tuning
    assert prepared[0][0].recipe.rules[0].options["starts"] > 1
    run("quantize", "m", "--solver", "awq", "--calibration", "text.txt", "--quality", "fast")
    with pytest.raises(errors.PlanError, match="seen"):
        llmquant.quantize("m", "out", solver="awq", format="int4:g128", quality="fast", calibration="text.txt")
    assert prepared[2][0] == prepared[3][0]
    with pytest.raises(errors.PlanError, match="'awq' beside a recipe"):
        llmquant.quantize("m", "out", solver="awq", format=llmquant.Recipe.uniform("int4:g128"))


def test_evaluation_at_the_end_is_that_of_eval(run: Run, pycode: Path, held_out: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(held_out.read_text())[:2]))
    code, printed, _ = run("quantize", pycode, *FAST, "--output", tmp_path / "out", "--eval", few, "--json")
    assert code == 0
    _, alone, _ = run("eval", tmp_path / "out", "--reference", pycode, "--text", few, "--json")
    assert json.loads(printed)["evaluation"] == json.loads(alone)
    _, printed, _ = run("eval", pycode, "--text", few)
    assert "perplexity" in printed


def test_plan_tells_the_size_that_the_run_then_has(run: Run, pycode: Path, tmp_path: Path) -> None:
    _, printed, _ = run("quantize", pycode, *FAST, "--output", tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(printed)
    code, printed, _ = run("quantize", pycode, *FAST, "--output", tmp_path / "out", "--json")
    assert (code, json.loads(printed)["bits_per_weight"]) == (0, plan["bits_per_weight"])
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert plan["bytes_after"] == pytest.approx(stored, rel=0.05)  # the rest is headers


def test_inspect_finds_damage(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("quantize", tiny, *FAST, "--output", out)
    code, printed, _ = run("inspect", out, "--verify")
    assert (code, "42 tensors verified" in printed) == (0, True)
    shard = first_shard(out)
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    code, _, said = run("inspect", out, "--verify")
    assert (code, f"{shard.name}: SHA-256 differs" in said) == (7, True)


def test_formats_table(run: Run) -> None:
    code, printed, _ = run("formats", "--json")
    rows = {row["format"]: row for row in json.loads(printed)}
    assert code == 0
    assert rows["int4:g64"]["normal"] == pytest.approx(20.9, abs=0.1)
    assert rows["int2:g64"]["normal"] > 8.7
    assert rows["mx6"]["bits_per_weight"] == [6, 6]
    assert rows["mx6"]["normal"] == pytest.approx(28.3, abs=0.2)
    assert rows["nvfp4"]["normal"] == pytest.approx(21.8, abs=0.1)
    assert rows["mxfp4"]["readers"] == "vLLM, HF"


def test_every_command_has_help(run: Run) -> None:
    code, printed, _ = run("--help")
    assert code == 0
    assert "130 interrupted" in " ".join(printed.split())
    for command in ("quantize", "eval", "inspect", "formats"):
        code, printed, _ = run(command, "--help")
        assert (code, len(printed) > 200) == (0, True)


def test_exit_codes_are_distinct_and_documented() -> None:
    kinds = [errors.CheckpointError, errors.PlanError, errors.OutputError, errors.DataError, errors.VerificationError]
    assert [kind.exit_code for kind in kinds] == [3, 4, 5, 6, 7]
    assert all(f"{kind.exit_code} " in cli.EXIT_CODES and str(kind.exit_code) in str(errors.__doc__) for kind in kinds)
