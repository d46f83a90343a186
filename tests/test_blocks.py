"""The streamed model computes what the whole model computes, and holds one block at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, MOE, VOCABULARY, make_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, LlamaForCausalLM, PretrainedConfig, T5Config
from transformers.core_model_loading import Chunk, WeightConverter

from llmquant import blocks
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import TensorSource
from llmquant.errors import CheckpointError, PlanError
from llmquant.matrices import Target

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALL = [*ARCHITECTURES, *MOE]


class Folder:
    """A checkpoint folder, read with safetensors alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.read: list[str] = []  # the names that were ever asked for
        self._kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    self.files[name] = path
                    self._kinds[name] = tuple(part.get_shape()), DTYPES[part.get_dtype()]

    def names(self) -> list[str]:
        return list(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._kinds[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._kinds[name][1]

    @contextmanager
    def slices(self, names: list[str]) -> Iterator[dict[str, Any]]:
        self.read += names
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, "pt")) for path in {self.files[name] for name in names}}
            yield {name: opened[self.files[name]].get_slice(name) for name in names}


def text(batch: int = 2, tokens: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


def streamed_logits(model: StreamedModel, input_ids: Tensor) -> Tensor:
    model.load_outside()
    hidden, calls = model.embed(input_ids)
    for block, call in enumerate(calls):
        model.load_block(block)
        hidden = model.run_block(block, hidden, call)
        model.unload_block(block)
    return model.logits(input_ids, hidden)


def whole_logits(folder: Path, input_ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model.set_experts_implementation("eager")  # the others add up in another order
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_config(folder: Path, config: PretrainedConfig, **changes: Any) -> Path:
    config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


# ------------------------------------------------------------------------------------------------ the same logits


@pytest.mark.parametrize("name", ALL)
def test_logits_untied_sharded_float32(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, name, tied=False, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    logits = streamed_logits(StreamedModel(Folder(folder)), text())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, whole_logits(folder, text()), rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.1


@pytest.mark.parametrize("name", ALL)
def test_logits_tied_bfloat16(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, name, tied=True, dtype=torch.bfloat16)
    model = StreamedModel(Folder(folder))
    logits = streamed_logits(model, text())
    expected = whole_logits(folder, text())
    assert (model.dtype, logits.dtype) == (torch.bfloat16, expected.dtype)
    assert torch.equal(logits, expected)
    if model.model.all_tied_weights_keys:  # a few kinds of model never tie
        assert model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_logits_float16_of_one_row(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, name, dtype=torch.float16)
    input_ids = text(batch=1, tokens=5)
    logits = streamed_logits(StreamedModel(Folder(folder)), input_ids)
    assert torch.equal(logits, whole_logits(folder, input_ids))


def test_logits_of_a_single_block(tmp_path: Path) -> None:
    """Whether blocks return tuples must show without a second block."""
    for folder in (
        make_checkpoint(tmp_path / "llama", "llama", num_hidden_layers=1),
        make_checkpoint(tmp_path / "bloom", "bloom", n_layer=1),
    ):
        assert torch.equal(streamed_logits(StreamedModel(Folder(folder)), text()), whole_logits(folder, text()))


def test_logits_with_biases(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    model = StreamedModel(Folder(folder))
    assert all(target.bias for target in model.targets(0).values())
    assert torch.equal(streamed_logits(model, text()), whole_logits(folder, text()))


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_logits_need_no_embed_before(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, name)
    model = StreamedModel(Folder(folder))
    model.load_outside()
    hidden, calls = model.embed(text())
    for block, call in enumerate(calls):
        model.load_block(block)
        hidden = model.run_block(block, hidden, call)
    fresh = StreamedModel(Folder(folder))
    fresh.load_outside()
    assert torch.equal(fresh.logits(text(), hidden), whole_logits(folder, text()))


def test_dtype_can_be_chosen(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    model = StreamedModel(Folder(folder), dtype=torch.float32)
    logits = streamed_logits(model, text())
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(logits, whole(text(), use_cache=False).logits)


def test_dtype_comes_from_the_tensors_where_the_config_has_none(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    stored = json.loads((folder / "config.json").read_text())
    del stored["dtype"]
    (folder / "config.json").write_text(json.dumps(stored))
    assert StreamedModel(Folder(folder)).dtype == torch.bfloat16


def test_base_model_without_prefix(tmp_path: Path) -> None:
    """GPT-2 was published without the prefix `transformer.` and with mask buffers that no model knows any more."""
    folder = make_checkpoint(tmp_path, "gpt2")
    expected = whole_logits(folder, text())

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    rewrite(folder, strip)
    model = StreamedModel(Folder(folder))
    assert torch.equal(streamed_logits(model, text()), expected)
    assert model.source_key("transformer.h.0.attn.c_attn.weight") == "h.0.attn.c_attn.weight"
    assert "h.0.attn.bias" in model.outside_keys()


def test_stored_matrices_can_be_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    expected = whole_logits(folder, text())

    def fuse(tensors: dict[str, Tensor]) -> None:
        for block in range(3):
            mlp = f"model.layers.{block}.mlp."
            parts = [tensors.pop(f"{mlp}{part}_proj.weight") for part in ("gate", "up")]
            tensors[f"{mlp}both.weight"] = torch.cat(parts)

    def mapping(model: torch.nn.Module) -> list[WeightConverter]:
        parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
        return [WeightConverter("mlp.both.weight", parts, operations=[Chunk(dim=0)])]

    rewrite(folder, fuse)
    monkeypatch.setattr(blocks, "get_model_conversion_mapping", mapping)
    model = StreamedModel(Folder(folder))
    assert torch.equal(streamed_logits(model, text()), expected)
    assert "model.layers.1.mlp.both.weight" in model.block_keys(1)
    assert model.source_key("model.layers.1.mlp.gate_proj.weight") is None
    assert model.source_key("model.layers.1.mlp.up_proj.weight") is None
    assert model.source_key("model.layers.1.mlp.down_proj.weight") == "model.layers.1.mlp.down_proj.weight"


def test_head_stored_in_the_place_of_the_embeddings(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", tied=True)
    expected = whole_logits(folder, text())
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert torch.equal(streamed_logits(StreamedModel(Folder(folder)), text()), expected)


def test_both_stored_though_tied(tmp_path: Path) -> None:
    """Where they differ they are not tied, as transformers does."""
    folder = make_checkpoint(tmp_path, "llama", tied=True)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}))
    model = StreamedModel(Folder(folder))
    expected = whole_logits(folder, text())
    assert torch.equal(streamed_logits(model, text()), expected)
    model.unload_outside()
    assert torch.equal(streamed_logits(model, text()), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon"])
def test_logits_on_a_gpu(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, name)
    model = StreamedModel(Folder(folder), device="cuda")
    logits = streamed_logits(model, text())
    assert logits.device.type == "cuda"
    torch.testing.assert_close(logits.cpu(), whole_logits(folder, text()), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ memory


def test_a_block_is_freed(tmp_path: Path) -> None:
    source = Folder(make_checkpoint(tmp_path, "qwen2", max_shard_size="100KB"))
    model = StreamedModel(source)
    assert source.read == []
    module = model.load_block(1)
    assert source.read == model.block_keys(1)
    held = [weakref.ref(parameter) for parameter in module.parameters()]
    assert len(held) == len(source.read) > 0
    assert all(parameter.is_meta for parameter in model.model.get_submodule(model.block_names[0]).parameters())
    model.unload_block(1)
    assert all(reference() is None for reference in held)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_the_outside_is_freed(tmp_path: Path) -> None:
    model = StreamedModel(Folder(make_checkpoint(tmp_path, "llama", tied=True)))
    expected = streamed_logits(model, text())
    held = [weakref.ref(model.model.lm_head.weight), weakref.ref(model.model.model.norm.weight)]
    model.unload_outside()
    assert all(reference() is None for reference in held)
    assert all(parameter.is_meta for parameter in model.model.parameters())
    assert torch.equal(streamed_logits(model, text()), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_no_file_stays_open_or_mapped(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mixtral", max_shard_size="200KB")
    model = StreamedModel(Folder(folder))
    streamed_logits(model, text())
    model.unload_outside()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert not [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and str(folder) in str(fd.readlink())]


def test_writing_does_not_reach_the_file_and_unloading_forgets_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt2")
    before = (folder / "model.safetensors").read_bytes()
    model = StreamedModel(Folder(folder))
    target = model.targets(0)["transformer.h.0.mlp.c_fc"]
    module = model.load_block(0).get_submodule("mlp.c_fc")
    original = target.matrix(module).clone()
    target.matrix(module).zero_()
    assert not target.matrix(module).any()
    assert (folder / "model.safetensors").read_bytes() == before
    model.load_block(0)
    assert torch.equal(target.matrix(module), original)


def test_loading_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = Folder(make_checkpoint(tmp_path, "mixtral"))
    capfd.readouterr()
    streamed_logits(StreamedModel(source), text())
    assert capfd.readouterr() == ("", "")


def test_no_gradients_unless_asked_for(tmp_path: Path) -> None:
    model = StreamedModel(Folder(make_checkpoint(tmp_path, "llama")))
    assert not streamed_logits(model, text()).requires_grad
    hidden, calls = model.embed(text())
    block = model.load_block(0)
    block.get_parameter("mlp.down_proj.weight").requires_grad_(True)
    assert model.run_block(0, hidden, calls[0]).requires_grad


# ------------------------------------------------------------------------------------------------ what is in a block


def test_targets_of_llama(tmp_path: Path) -> None:
    model = StreamedModel(Folder(make_checkpoint(tmp_path, "llama")))
    assert model.block_names == ["model.layers.0", "model.layers.1", "model.layers.2"]
    shapes = {name.removeprefix("model.layers.1."): target.shape for name, target in model.targets(1).items()}
    assert shapes == {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }
    assert next(iter(shapes)) == "self_attn.q_proj"
    assert not any(target.bias or target.transposed for target in model.targets(1).values())


def test_targets_of_gpt2_are_transposed(tmp_path: Path) -> None:
    model = StreamedModel(Folder(make_checkpoint(tmp_path, "gpt2")))
    name = "transformer.h.2.mlp.c_fc"
    target = model.targets(2)[name]
    assert target == Target(name, shape=(128, 64), transposed=True, bias=True)
    module = model.load_block(2).get_submodule("mlp.c_fc")
    assert target.matrix(module).shape == (128, 64)
    matrix = torch.arange(128 * 64.0).reshape(128, 64)
    module.get_parameter("weight").data = target.stored(matrix)
    assert torch.equal(target.matrix(module), matrix)
    x = torch.ones(1, 64)
    assert torch.allclose(module(x), x @ matrix.t() + module.get_parameter("bias"))


@pytest.mark.parametrize("name", ALL)
def test_every_matrix_is_a_target_or_reported(tmp_path: Path, name: str) -> None:
    model = StreamedModel(Folder(make_checkpoint(tmp_path, name, max_shard_size="100KB")))
    routers = 0
    for block, block_name in enumerate(model.block_names):
        module = model.model.get_submodule(block_name)
        matrices = [f"{block_name}.{n}" for n, p in module.named_parameters() if p.ndim >= 2]
        found = {target.parameter for target in model.targets(block).values()} | {*model.unsupported(block)}
        left = {part for part in {*matrices} - found if not part.endswith("_bias")}  # of experts, one row each
        assert found <= {*matrices}
        assert all(part.rsplit(".", 2)[1] in ("gate", "router", "shared_expert_gate") for part in left)
        assert all("conv1d" in part for part in model.unsupported(block))
        routers += len(left)
    assert bool(routers) == (name in MOE)
    blocks = range(len(model.block_names))
    keys = [*model.outside_keys(), *(key for block in blocks for key in model.block_keys(block))]
    assert sorted(keys) == sorted(model.checkpoint.names())
    assert all(f".{block}." in key for block in blocks for key in model.block_keys(block))


@pytest.mark.parametrize("name", MOE)
def test_experts_are_targets(tmp_path: Path, name: str) -> None:
    """Every expert of every parameter that holds some, as (out, in) whichever way it lies there."""
    folder = make_checkpoint(tmp_path, name, dtype=torch.float32)
    model = StreamedModel(Folder(folder))
    whole = AutoModelForCausalLM.from_pretrained(folder)
    held = {name: value for name, value in whole.named_parameters() if value.ndim == 3 and "conv1d" not in name}
    found: dict[str, list[Target]] = {}
    for block in range(len(model.block_names)):
        module = model.load_block(block)
        for target in model.targets(block).values():
            if target.expert is not None:
                found.setdefault(target.parameter, []).append(target)
                inner = module.get_submodule(target.holder.removeprefix(f"{model.block_names[block]}."))
                stored = held[target.parameter][target.expert]
                assert target.matrix(inner).shape == target.shape
                assert torch.equal(target.matrix(inner), stored.T if target.transposed else stored)
                assert torch.equal(target.stored(target.matrix(inner)), stored)
                # One side of every first matrix is the hidden size, and it is the inner one; of every last, the outer.
                first = "down" not in target.parameter
                assert target.shape[1 if first else 0] == 64
        model.unload_block(block)
    assert found.keys() == held.keys()
    assert all([target.expert for target in targets] == [0, 1, 2, 3] for targets in found.values())


def test_a_linear_router_is_no_target() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(8, 4)
            self.shared_gate = torch.nn.Linear(8, 1)
            self.shared = torch.nn.Linear(8, 16)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    model = StreamedModel.__new__(StreamedModel)
    block = torch.nn.ModuleDict({"attention": torch.nn.Linear(8, 4), "mlp": Experts()})
    model.config = MOE["mixtral"]()
    model.block_names = ["layers.0"]
    model._blocks, model._tied, model.causal, model._layouts = [block], set(), True, {}
    assert [name.removeprefix("layers.0.") for name in model.targets(0)] == [
        "attention",
        "mlp.shared",
        *(f"mlp.experts.{expert}" for expert in range(4)),
    ]
    assert model.unsupported(0) == []


def test_source_keys(tmp_path: Path) -> None:
    llama = StreamedModel(Folder(make_checkpoint(tmp_path / "llama", "llama", tied=True)))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert llama.source_key(name) == name
    assert name in llama.block_keys(1)
    assert llama.source_key("lm_head.weight") is None
    assert llama.source_key("model.layers.9.self_attn.q_proj.weight") is None
    assert llama.outside_keys() == ["model.embed_tokens.weight", "model.norm.weight"]
    gpt2 = StreamedModel(Folder(make_checkpoint(tmp_path / "gpt2", "gpt2")))
    name = "transformer.h.0.attn.c_attn.weight"
    assert gpt2.source_key(name) == name
    mixtral = StreamedModel(Folder(make_checkpoint(tmp_path / "mixtral", "mixtral")))
    assert mixtral.source_key("model.layers.0.mlp.experts.gate_up_proj") is None
    names = "model.layers.0.block_sparse_moe.experts.{}.w{}.weight"
    expert = mixtral.targets(0)["model.layers.0.mlp.experts.gate_up_proj.2"]
    assert {*mixtral.source_keys(expert)} == {names.format(number, w) for number in range(4) for w in (1, 3)}
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in mixtral.block_keys(0)
    assert mixtral.source_key("model.layers.0.mlp.gate.weight") == "model.layers.0.block_sparse_moe.gate.weight"


# ------------------------------------------------------------------------------------------------ refusals


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.other.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
        del tensors["model.norm.weight"]

    rewrite(folder, damage)
    source = Folder(folder)
    with pytest.raises(CheckpointError) as failure:
        StreamedModel(source)
    for part in ("layers.1.mlp.up_proj.weight: missing", "model.norm.weight: missing", "layers.1.mlp.other.weight"):
        assert part in str(failure.value)
    assert source.read == []


def test_missing_head_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", tied=False)
    rewrite(folder, lambda tensors: tensors.update({"head": tensors.pop("lm_head.weight")}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        StreamedModel(Folder(folder))


def test_missing_embeddings_are_named_though_tied(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", tied=True)
    rewrite(folder, lambda tensors: tensors.update({"other": tensors.pop("model.embed_tokens.weight")}))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: missing"):
        StreamedModel(Folder(folder))


def test_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    rewrite(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(127, 64)}))
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight.*\(127, 64\).*\(128, 64\)"):
        StreamedModel(Folder(folder))


@pytest.mark.parametrize("change", ["drop", "reshape"])
def test_damaged_experts_are_named(tmp_path: Path, change: str) -> None:
    folder = make_checkpoint(tmp_path, "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"

    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[name]
        if change == "reshape":
            tensors[name] = torch.zeros(100, 64)

    rewrite(folder, damage)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        StreamedModel(Folder(folder))


def test_unknown_architecture(tmp_path: Path) -> None:
    save_config(tmp_path, ARCHITECTURES["llama"](), model_type="llama_of_2040")
    with pytest.raises(PlanError, match=r"'llama_of_2040'.*upgrade"):
        StreamedModel(Folder(tmp_path))


def test_own_code_is_refused_by_default(tmp_path: Path) -> None:
    changes = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    save_config(tmp_path, ARCHITECTURES["llama"](), **changes)
    (tmp_path / "mine.py").write_text("raise RuntimeError('this must not run')")
    with pytest.raises(PlanError, match=r"'mine'.*remote code"):
        StreamedModel(Folder(tmp_path))


@pytest.mark.parametrize("config", [BertConfig, T5Config])
def test_other_kinds_of_models_are_refused(tmp_path: Path, config: type[PretrainedConfig]) -> None:
    save_config(tmp_path, config())
    with pytest.raises(PlanError, match=f"'{config.model_type}' is not a causal language model"):
        StreamedModel(Folder(tmp_path))


def test_a_config_without_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match="'vit'"):
        StreamedModel(Folder(tmp_path))


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    save_config(tmp_path, ARCHITECTURES["llama"](), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(PlanError, match=r"quantized already \(gptq\)"):
        StreamedModel(Folder(tmp_path))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "llama", "hidden_size": "many"}'])
def test_a_broken_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        StreamedModel(Folder(tmp_path))


def test_a_model_without_blocks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    build = LlamaForCausalLM._from_config

    def flatten(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        model.model.layers = torch.nn.Sequential(*model.model.layers)
        return model

    monkeypatch.setattr(LlamaForCausalLM, "_from_config", flatten)
    with pytest.raises(PlanError, match="LlamaForCausalLM has no list of repeated blocks"):
        StreamedModel(Folder(folder))


def test_a_model_that_works_between_its_blocks_is_refused(tmp_path: Path) -> None:
    model = StreamedModel(Folder(make_checkpoint(tmp_path, "llama")))
    model.load_outside()

    def forward(input_ids: Tensor, use_cache: bool) -> tuple[Tensor]:
        hidden = model.model.model.embed_tokens(input_ids)
        for block in model.model.model.layers:
            hidden = block(hidden) * 2
        return (hidden,)

    model.model.model.forward = forward
    with pytest.raises(PlanError, match=r"model\.layers\.1"):
        model.embed(text())
    assert [type(block).__name__ for block in model.model.model.layers] == ["LlamaDecoderLayer"] * 3


def test_blocks_with_another_form_of_result_are_refused(tmp_path: Path) -> None:
    """RWKV's blocks return their state too."""
    model = StreamedModel(Folder(make_checkpoint(tmp_path, "llama")))
    model.load_outside()

    def forward(input_ids: Tensor, use_cache: bool) -> tuple[Tensor]:
        hidden = model.model.model.embed_tokens(input_ids)
        for block in model.model.model.layers:
            hidden, _, _ = block(hidden)
        return (hidden,)

    model.model.model.forward = forward
    with pytest.raises(PlanError, match="LlamaForCausalLM does not run with its blocks replaced"):
        model.embed(text())


def test_running_before_loading_is_an_error(tmp_path: Path) -> None:
    model = StreamedModel(Folder(make_checkpoint(tmp_path, "llama")))
    with pytest.raises(RuntimeError, match="load_outside"):
        model.embed(text())


def test_a_source_needs_no_base_class(tmp_path: Path) -> None:
    source: TensorSource = Folder(make_checkpoint(tmp_path, "llama"))
    assert StreamedModel(source).checkpoint is source
