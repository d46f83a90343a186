"""Runs: what they write is what was solved, the same each time, and a cut one ends as if it had not been cut."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant import formats, pipeline, sampling, skeleton
from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams
from llmquant.checkpoint import MANIFEST, Checkpoint
from llmquant.errors import DataError, OutputError, PlanError
from llmquant.formats import Format
from llmquant.output import CALIBRATION
from llmquant.recipe import Recipe, Rule
from llmquant.solvers import Solution, gptq
from llmquant.stats import Stats
from llmquant.swap import WeightSwap

SMALL = pipeline.Calibration("self", samples=4, length=32, batch=2)


def quantize(model: Path, output: Path, recipe: Recipe | str = "int4:g32", **job: object) -> dict:
    rules = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
    settings = {"calibration": None, **job}
    prepared = pipeline.prepare(pipeline.Job(str(model), rules, **settings), output)  # type: ignore[arg-type]
    return pipeline.quantize(prepared, output)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def dense_twin(model: Path, folder: Path, kind: Any = AutoModelForCausalLM) -> Any:
    """The original model, a `kind`, with the matrices replaced by what the folder's tensors decode to."""
    stored: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        stored |= load_file(shard)
    twin = kind.from_pretrained(model)
    source = StreamedModel(Checkpoint(model)).source_key
    for name, value in twin.state_dict().items():
        if value.ndim == 1:  # scales may have been moved out of norms
            value.copy_(stored.get(source(name) or name, value))
    for tensor in json.loads((folder / MANIFEST).read_text())["tensors"]:
        base = tensor["key"].removesuffix("weight")
        fmt, expert = formats.get(tensor["format"]), tensor.get("expert")
        named = {suffix: stored[base + suffix] for suffix in fmt.layout(tensor["shape"])}
        if expert is not None:
            named = {suffix: packed[expert] for suffix, packed in named.items()}
        decoded = fmt.decode(*fmt.unpack(named, tensor["shape"]))
        if expert is None:
            weight = twin.get_submodule(tensor["name"]).weight.data
            transposed = type(twin.get_submodule(tensor["name"])).__name__ == "Conv1D"
        else:
            weight = twin.get_parameter(tensor["name"].rpartition(".")[0]).data[expert]
            transposed = weight.shape != decoded.shape
        weight.copy_(decoded.T if transposed else decoded.view(weight.shape))
    return twin


@pytest.fixture(scope="module")
def fast(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without calibration, to be read only."""
    folder = tmp_path_factory.mktemp("fast") / "out"
    quantize(tiny, folder)
    return folder


@pytest.fixture(scope="module")
def calibrated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with calibration, to be read only."""
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    quantize(tiny, folder, calibration=SMALL)
    return folder


def test_given_tokens_give_the_bytes_that_the_same_tokens_from_elsewhere_give(
    tiny: Path, calibrated: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokens = sampling.sample_windows(model, bos_token_id=model.config.bos_token_id, count=4, length=32, seed=0)
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.cat([tokens, tokens])}, path)
    given = pipeline.Calibration(str(path), samples=4, batch=2)  # the length is that of the file
    quantize(tiny, tmp_path / "given", calibration=given)
    own, found = contents(calibrated), contents(tmp_path / "given")
    shards = [name for name in own if name.endswith(".safetensors")]
    assert len(shards) == 7
    assert all(own[name] == found[name] for name in shards)


def test_given_tokens_are_refused_before_work(pycode: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.full((4, 600), 5)}, path)
    with pytest.raises(DataError, match="windows of 600 tokens: the model takes from 2 to 512"):
        quantize(pycode, tmp_path / "out", calibration=pipeline.Calibration(str(path), samples=4))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16, torch.float32])
def test_calibration_on_a_cpu_computes_in_a_type_that_is_fast_there(
    own: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", dtype=own)
    for fast in (True, False):
        monkeypatch.setattr(skeleton, "multiplies_bfloat16", lambda fast=fast: fast)
        wanted = torch.bfloat16 if own == torch.bfloat16 and fast else torch.float32
        for shown, dtype in ((SMALL, wanted), (None, own)):
            prepared = pipeline.prepare(pipeline.Job(str(folder), Recipe.uniform("int4:g24"), shown), tmp_path / "out")
            assert prepared.model.dtype == dtype


def test_streams_are_the_original_and_the_quantized_model(tmp_path: Path) -> None:
    """Both streams against the hidden states that the whole models give."""
    folder = make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32)
    model = StreamedModel(Checkpoint(folder))
    windows = torch.randint(3, 300, (3, 16), generator=torch.Generator().manual_seed(2))
    whole = AutoModelForCausalLM.from_pretrained(folder)
    changed = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        streams = Streams.start(model, windows, batch=2, progress=lambda done, total: None)
        for block in range(3):
            module = model.load_block(block)
            swap = WeightSwap()
            for target in model.targets(block).values():
                weight = module.get_submodule(target.name.removeprefix(model.block_names[block] + ".")).weight
                assert isinstance(weight, torch.nn.Parameter)
                swap.replace(target.name, weight, weight.data * 0.9)
                changed.get_submodule(target.name).weight.data.mul_(0.9)
            streams.advance(block, swap)
            model.unload_block(block)
        for found, twin in ((streams.reference, whole), (streams.quantized, changed)):
            normed = twin.model.norm(torch.cat(found))
            expected = twin.model(windows, output_hidden_states=True).last_hidden_state
            torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-5)


def test_what_is_lacking_is_found_where_an_output_is_added_to_the_residual_stream(tmp_path: Path) -> None:
    """Against what hooks see in the whole models: the sum of stream and output, less that of the exact weight."""
    folder = make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32)
    windows = torch.randint(3, 90, (3, 16), generator=torch.Generator().manual_seed(2))
    whole, changed = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    changed.model.layers[0].mlp.up_proj.weight.data.mul_(0.9)

    def seen(model: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream before the second sum, what the down projection reads, and the stream after the sum."""
        found: list[Tensor] = []
        layer = model.model.layers[1]
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        layer.register_forward_hook(lambda _, args, output: found.append(output))
        model.model(windows)
        return tuple(each.flatten(0, 1).double() for each in found)  # type: ignore[return-value]

    model = StreamedModel(Checkpoint(folder))
    with torch.no_grad():
        (_, _, total_ref), (carried, x, _) = seen(whole), seen(changed)
        streams = Streams.start(model, windows, batch=2, progress=lambda done, total: None)
        for block in range(2):
            module, swap = model.load_block(block), WeightSwap()
            if block == 1:
                stage = next(each for each in streams.stages(1) if each.targets[0].name.endswith("down_proj"))
                _, stats = next(streams.statistics(1, stage, swap))
                w = stage.targets[0].matrix(model.module(stage.targets[0])).double()
                break
            weight = module.get_submodule("mlp.up_proj").weight
            assert isinstance(weight, torch.nn.Parameter)
            swap.replace("model.layers.0.mlp.up_proj.weight", weight, weight.data * 0.9)
            streams.advance(block, swap)
            model.unload_block(block)
    assert stats.tokens == len(x)
    assert stats.cross is None
    wanted = (total_ref - carried - x @ w.T).T @ x
    torch.testing.assert_close(
        stats.wanted(w.float()).double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
    )


def test_statistics_are_sums_over_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    x, x_ref = torch.randn(40, 8, generator=generator), torch.randn(40, 8, generator=generator)
    stats = Stats.empty(8)
    stats.update(x[:15], x_ref[:15])
    other = Stats.empty(8)
    other.update(x[15:].view(5, 5, 8), x_ref[15:].view(5, 5, 8))
    both = stats + other
    a, b = x.double(), x_ref.double()
    torch.testing.assert_close(both.hessian.double(), sum(torch.outer(t, t) for t in a), rtol=1e-5, atol=1e-5)
    cross = sum(torch.outer(s - t, t) for s, t in zip(b, a, strict=True))
    assert both.cross is not None
    torch.testing.assert_close(both.cross.double(), cross, rtol=1e-5, atol=1e-5)
    assert both.tokens == 40
    w = torch.randn(3, 8, generator=generator)
    energy = (a @ w.double().T).square().sum(1).mean().item()
    assert both.output_energy(w) == pytest.approx(energy, rel=1e-5)
    torch.testing.assert_close(both.importance().double(), a.square().mean(0), rtol=1e-5, atol=1e-7)


def test_statistics_leave_out_tokens_that_are_not_finite() -> None:
    x = torch.ones(6, 4)
    x[2, 1] = torch.nan
    x_ref = torch.ones(6, 4)
    x_ref[4, 0] = torch.inf
    stats = Stats.empty(4)
    stats.update(x, x_ref)
    assert (stats.tokens, stats.dropped) == (4, 2)
    assert torch.equal(stats.hessian, torch.full((4, 4), 4.0))


@pytest.mark.parametrize("calibration", [None, SMALL], ids=["fast", "calibrated"])
def test_same_seed_same_bytes(
    calibration: pipeline.Calibration | None, tiny: Path, fast: Path, calibrated: Path, tmp_path: Path
) -> None:
    again = tmp_path / "out"
    quantize(tiny, again, calibration=calibration)
    assert contents(again) == contents(calibrated if calibration else fast)


class Cut(Exception):
    pass


def cut_after(model: Path, output: Path, block: int, recipe: str = "int4:g32", **job: object) -> None:
    """A run that stops when it begins the given block."""

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith(f"block {block + 1} "):
            raise Cut

    settings = {"calibration": None, **job}
    prepared = pipeline.prepare(pipeline.Job(str(model), Recipe.uniform(recipe), **settings), output)  # type: ignore[arg-type]
    with pytest.raises(Cut):
        pipeline.quantize(prepared, output, progress=progress)


def test_finished_blocks_are_not_done_again(tiny: Path, fast: Path, tmp_path: Path) -> None:
    cut_after(tiny, tmp_path / "cut", 3)
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut.partial").glob("*.safetensors")}
    assert len(shards) == 3
    assert not (tmp_path / "cut").exists()
    quantize(tiny, tmp_path / "cut")
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in shards} == shards
    assert contents(tmp_path / "cut") == contents(fast)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "journal cut", "journal damaged"])
def test_resume_does_a_damaged_block_again(damage: str, tiny: Path, fast: Path, tmp_path: Path) -> None:
    cut_after(tiny, tmp_path / "cut", 3)
    shard = tmp_path / "cut.partial" / "model-00002-of-00007.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(data[:-7])
    elif damage == "delete":
        shard.unlink()
    else:
        journal = tmp_path / "cut.partial" / "journal.jsonl"
        text = journal.read_text()
        journal.write_text(text[:-40] if damage == "journal cut" else text.replace('"part": 1', '"part" 1'))
    quantize(tiny, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(fast)


def test_resume_with_other_settings_is_refused_and_names_both(tiny: Path, tmp_path: Path) -> None:
    cut_after(tiny, tmp_path / "out", 2)
    with pytest.raises(OutputError, match=r"recipe = .*int4:g32.* now recipe = .*int8:g32.*--overwrite"):
        quantize(tiny, tmp_path / "out", "int8:g32")
    with pytest.raises(OutputError, match="seed = 0, now seed = 1"):
        quantize(tiny, tmp_path / "out", seed=1)


def test_a_run_begun_anew_forgets_the_calibration_of_the_old(tiny: Path, calibrated: Path, tmp_path: Path) -> None:
    other = pipeline.Calibration("self", samples=3, length=16, batch=2)
    cut_after(tiny, tmp_path / "out", 1, calibration=other)
    job = pipeline.Job(str(tiny), Recipe.uniform("int4:g32"), SMALL)
    pipeline.quantize(pipeline.prepare(job, tmp_path / "out"), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(calibrated)


def test_a_cut_run_that_finished_nothing_binds_no_settings(tiny: Path, calibrated: Path, tmp_path: Path) -> None:
    other = pipeline.Calibration("self", samples=3, length=16, batch=2)
    cut_after(tiny, tmp_path / "out", 0, calibration=other)
    assert (tmp_path / "out.partial" / CALIBRATION).exists()
    quantize(tiny, tmp_path / "out", calibration=SMALL)
    assert contents(tmp_path / "out") == contents(calibrated)


def test_a_folder_under_the_name_of_a_cut_run_is_not_cleared(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.safetensors").write_bytes(b"kept")
    with pytest.raises(OutputError, match="is no cut run of llmquant"):
        quantize(tiny, tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine.safetensors").read_bytes() == b"kept"


def test_two_runs_on_one_folder_are_refused(tiny: Path, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        with pytest.raises(OutputError, match="another run is writing here"):
            quantize(tiny, tmp_path / "out")
        raise Cut

    prepared = pipeline.prepare(pipeline.Job(str(tiny), Recipe.uniform("int4:g32"), None), tmp_path / "out")
    with pytest.raises(Cut):
        pipeline.quantize(prepared, tmp_path / "out", progress=progress)


def test_rules_give_each_matrix_its_own(pycode: Path, tmp_path: Path) -> None:
    rules = (
        Rule("*.layers.0.*", None),
        Rule("*.down_proj", "int8:channel"),
        Rule("*.mlp.*", "int3:g64:asym", options={"clip": "mse"}),
        Rule("*", "int4:g128"),
    )
    recipe = Recipe(rules)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    manifest = quantize(pycode, tmp_path / "out", recipe)
    given = {tensor["name"]: tensor["format"] for tensor in manifest["tensors"]}
    assert given["model.layers.1.mlp.down_proj"] == "int8:channel:bf16"
    assert given["model.layers.5.mlp.up_proj"] == "int3:g64:asym:bf16"
    assert given["model.layers.3.self_attn.q_proj"] == "int4:g128:bf16"
    assert len(manifest["kept_dense"]) == 7
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        expected = dense_twin(pycode, tmp_path / "out").float()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.1)  # the twin's weights are rounded to bfloat16


def test_rules_that_cannot_hold_are_refused_before_work(pycode: Path, tmp_path: Path) -> None:
    cases = {
        "matches no module": Recipe((Rule("*.nothing", "int4:g32"), Rule("*", "int4:g32"))),
        "solver 'magic' is unknown": Recipe((Rule("*", "int4:g32", solver="magic"),)),
        "format 'int44' is unknown": Recipe.uniform("int44"),
        r"q_proj \(128, 128\): group 256 is larger": Recipe.uniform("int4:g256"),
        "nothing is left to quantize": Recipe.uniform("int4:g32", skip=("*",)),
    }
    for message, recipe in cases.items():
        with pytest.raises(PlanError, match=message):
            quantize(pycode, tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())


def test_reported_errors_are_those_of_the_stored_weights(pycode: Path, tmp_path: Path) -> None:
    manifest = quantize(pycode, tmp_path / "out", "int3:g64")
    original = load_file(pycode / "model.safetensors")
    twin = dense_twin(pycode, tmp_path / "out").state_dict()
    for tensor in manifest["tensors"][:7]:
        w = original[tensor["key"]].double()
        error = (twin[tensor["key"]].double() - w).norm() / w.norm()
        assert tensor["error"] == pytest.approx(error.item(), rel=0.01)


def test_what_is_not_quantized_is_copied_bit_by_bit(pycode: Path, tmp_path: Path) -> None:
    quantize(pycode, tmp_path / "out")
    original = load_file(pycode / "model.safetensors")
    found: dict[str, Tensor] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(shard)
    dense = [name for name in original if not name.endswith("_proj.weight")]
    assert len(dense) == 1 + 2 * 6 + 1
    assert all(torch.equal(found[name], original[name]) and found[name].dtype == original[name].dtype for name in dense)
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (pycode / "tokenizer.json").read_bytes()


def test_calibrated_importance_lowers_the_output_error(pycode: Path, held_out: Path, tmp_path: Path) -> None:
    """The same grid search, with and without weighing by what the inputs are, in three blocks."""
    rest = Rule("*.layers.[3-5].*", None)
    shown = pipeline.Calibration(str(held_out), samples=8, length=128, batch=4, curvature=0.0)
    weighed = quantize(pycode, tmp_path / "weighed", Recipe((rest, Rule("*", "int3:g64", "rtn"))), calibration=shown)
    rules = Recipe((rest, Rule("*", "int3:g64", "rtn", {"clip": "minmax"})))
    plain = quantize(pycode, tmp_path / "plain", rules, calibration=shown)
    mean = [sum(t["output_error"] for t in manifest["tensors"]) / 21 for manifest in (weighed, plain)]
    assert mean[0] < 0.9 * mean[1]
    assert all(tensor["tokens"] == 7 * 128 for tensor in weighed["tensors"])


def test_a_step_that_improves_its_own_figures_and_harms_the_block_is_taken_back(
    pycode: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding by the curvature of the loss, with rows that the loss hardly feels spent freely, as no damping holds."""
    shown = pipeline.Calibration(str(held_out), samples=8, length=128, batch=4)

    def steps(folder: str) -> list[dict]:
        rules = Recipe((Rule("*.layers.[2-5].*", None), Rule("*", "int3:g64")))
        manifest = quantize(pycode, tmp_path / folder, rules, calibration=shown)
        return [step for tensor in manifest["tensors"] for step in tensor["steps"] if step["name"] == "two-sided"]

    sound = steps("sound")
    assert len(sound) == 14
    assert sum(step["kept"] for step in sound) > 6
    assert all(step["kept"] == (step["error"] < step["before"]) for step in sound)

    def spoilt(aim: gptq.Aim, start: gptq.Rounded, fmt: Format, _: Tensor, stats: Stats, *__: Any) -> Solution:
        return gptq.solution(aim.w, fmt.encode(-aim.w, start.grid), start.grid, fmt, stats)

    monkeypatch.setattr(gptq, "two_sided", spoilt)
    assert not any(step["kept"] for step in steps("spoilt"))
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "curvature", lambda *args, **kwargs: {})
    assert steps("without") == []
    shards = [load_file(next((tmp_path / folder).glob("model-00001*"))) for folder in ("spoilt", "without")]
    assert all(torch.equal(shards[0][name], shards[1][name]) for name in shards[1])
