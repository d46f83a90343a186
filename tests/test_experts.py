"""Experts held as one parameter: what each is calibrated on, how each is decoded, and what of it is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import MOE, make_checkpoint
from safetensors.torch import load_file, save_file
from test_pipeline import SMALL, contents, cut_after, dense_twin, quantize
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import llmquant
from llmquant import calibration, formats, pipeline, verification
from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams
from llmquant.checkpoint import Checkpoint
from llmquant.errors import CheckpointError, VerificationError
from llmquant.experts import Watch, layout
from llmquant.hf import swap
from llmquant.linear import QuantExperts
from llmquant.metrics import stored_size
from llmquant.recipe import Recipe, Rule
from llmquant.solvers import gptq
from llmquant.stats import Stats
from llmquant.swap import WeightSwap

TOKENS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(2))


def streamed(folder: Path) -> StreamedModel:
    return StreamedModel(Checkpoint(folder))


# ---- which way they lie


class Twisted(nn.Module):
    """Experts that are multiplied by in ways of their own: only the first is a matrix for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.empty(4, 8, 16))
        self.halves = nn.Parameter(torch.empty(4, 8, 16))
        self.summed = nn.Parameter(torch.empty(4, 16, 16))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        for expert in index.unique():
            y = functional.linear(x, self.plain[expert])
            top, bottom = self.halves[expert].chunk(2)
            y = y + torch.cat([functional.linear(x, top), functional.linear(x, bottom)], -1)
            x = x + torch.einsum("tb,cb->tc", x, self.summed[expert])
        return y


def test_what_is_not_multiplied_by_as_a_whole_is_left_out() -> None:
    with torch.device("meta"):
        module = Twisted()
    assert layout(module, 16) == {"plain": False}
    assert layout(module, 8) == {}
    assert all(value.is_meta for value in module.parameters())
    with torch.device("meta"):
        assert layout(nn.Conv1d(16, 16, 3), 16) == {}


def test_matrices_are_known_however_they_are_cut_out() -> None:
    stack, other = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    seen: list[tuple[str, int | None, bool]] = []
    x, z = torch.randn(5, 6), torch.randn(5, 4)
    with Watch(
        {"a": stack, "b": other}, lambda name, expert, transposed, x, y: seen.append((name, expert, transposed))
    ):
        functional.linear(x, stack[torch.tensor(2)])
        x @ other.unbind()[1].t()
        z @ stack.transpose(1, 2)[0].t()
        torch.bmm(z.expand(3, 5, 4), other)
        torch.matmul(x, torch.randn(6, 4))
        functional.linear(x, stack[1, :2])
        functional.linear(x, stack[1] * 1)
    assert seen == [("a", 2, False), ("b", 1, False), ("a", 0, True), ("b", None, True)]


# ---- what they are calibrated on


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_each_expert_is_calibrated_on_the_tokens_sent_to_it(name: str, tmp_path: Path) -> None:
    """Against the routing of the whole model, whose experts are asked for what they are given."""
    folder = make_checkpoint(tmp_path, name, num_hidden_layers=1, moe_intermediate_size=48)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    given: list[tuple[Tensor, Tensor]] = []
    whole.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((args[0], args[1] if len(args) > 1 else kwargs["router_indices"])),
        with_kwargs=True,
    )
    model = streamed(folder)
    with torch.no_grad():
        whole(WINDOWS[:7], use_cache=False)
        streams = Streams.start(model, WINDOWS, 4, lambda done, total: None)
        model.load_block(0)
        found: dict[str, Stats] = {}
        for stage in streams.stages(0):
            if stage.targets[0].expert is not None:
                found |= {target.name: stats for target, stats in streams.statistics(0, stage, WeightSwap())}
    hidden, chosen = given[0]
    hidden = hidden.flatten(0, -2)
    for expert in range(4):
        x = hidden[(chosen.view(len(hidden), -1) == expert).any(1)]
        stats = found[f"model.layers.0.mlp.experts.gate_up_proj.{expert}"]
        assert stats.tokens == len(x) == found[f"model.layers.0.mlp.experts.down_proj.{expert}"].tokens
        wanted = x.T @ x
        if len(x) < 64:  # what is missing comes from all tokens, each as often as it was sent somewhere
            everything = sum(hidden[(chosen.view(len(hidden), -1) == e).any(1)].T
                             @ hidden[(chosen.view(len(hidden), -1) == e).any(1)] for e in range(4))  # fmt: skip
            wanted = wanted + everything * (64 - len(x)) / chosen.numel()
        torch.testing.assert_close(stats.hessian, wanted, rtol=1e-4, atol=1e-4)
        assert stats.borrowed == max(0, 64 - len(x))
        assert stats.cross is not None
        assert torch.equal(stats.cross, torch.zeros(64, 64))  # both streams enter the first block alike


def test_few_experts_at_a_time_have_the_same_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=1))

    def collect() -> list[tuple[str, Stats]]:
        streams = Streams.start(model, WINDOWS, 4, lambda done, total: None)
        model.load_block(0)
        stage = next(stage for stage in streams.stages(0) if "down_proj" in stage.targets[0].name)
        module = model.module(stage.targets[0])
        swap = WeightSwap()
        swap.replace("gate", module.get_parameter("gate_up_proj"), module.get_parameter("gate_up_proj").data * 0.9)
        found = [(target.name, stats) for target, stats in streams.statistics(0, stage, swap)]
        model.unload_block(0)
        return found

    with torch.no_grad():
        together = collect()
        monkeypatch.setattr(calibration, "EXPERT_BYTES", 1)
        apart = collect()
    assert [name for name, _ in together] == [name for name, _ in apart]
    for (_, a), (_, b) in zip(together, apart, strict=True):
        assert torch.equal(a.hessian, b.hessian)
        assert a.cross is not None
        assert b.cross is not None
        assert torch.equal(a.cross, b.cross)
        assert a.cross.abs().max() > 0
        assert a.held is not None
        assert b.held is not None
        assert torch.equal(a.held.x, b.held.x)


def test_borrowing_is_for_the_better_where_tokens_are_few() -> None:
    """An expert that saw 12 tokens of 64 inputs, judged on ten thousand more of its own."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -1.5, 64)
    x = torch.randn(12000, 64, generator=generator) @ mixing.T
    w, fmt = torch.randn(48, 64, generator=generator), formats.get("int3:g32:fp32")
    own, everything = Stats.empty(64), Stats.empty(64)
    own.update(x[:12], x[:12])
    everything.update(x[12:2000], x[12:2000])

    def error(stats: Stats) -> float:
        solution = gptq.solve(w, stats, fmt)
        return float((x[2000:] @ (fmt.decode(solution.codes, solution.grid) - w).T).norm())

    alone = Stats.empty(64)
    alone.update(x[:12], x[:12])
    blended = own.blended(everything, 0)
    assert (blended.tokens, blended.borrowed) == (12, 52)
    assert error(blended) < 0.9 * error(alone)
    enough = Stats.empty(64)
    enough.update(x[:64], x[:64])
    assert torch.equal(enough.blended(everything, 0).hessian, enough.hessian)


# ---- how they are served


def quant_experts(spec: str = "int4:g16", transposed: bool = False) -> tuple[QuantExperts, Tensor]:
    """Three experts of 32 x 48, and their decoded values as the parameter holds them."""
    fmt = formats.get(spec).stored_for(torch.float32)
    weights = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(4))
    solved = [fmt.quantize(w) for w in weights]
    decoded = torch.stack([fmt.decode(codes, grid) for codes, grid in solved])
    packed = [fmt.pack(codes, grid) for codes, grid in solved]
    dense = (3, 48, 32) if transposed else (3, 32, 48)
    experts = QuantExperts(fmt, dense, transposed=transposed, dtype=torch.float32)
    experts.load_state_dict({suffix: torch.stack([each[suffix] for each in packed]) for suffix in packed[0]})
    return experts, decoded.transpose(1, 2).contiguous() if transposed else decoded


@pytest.mark.parametrize("spec", ["int4:g16", "int3:g20:asym", "nvfp4", "fp8_e4m3:channel", "mx6", "kmeans3:channel"])
@pytest.mark.parametrize("transposed", [False, True])
def test_it_answers_as_the_parameter_does(spec: str, transposed: bool) -> None:
    experts, dense = quant_experts(spec, transposed)
    for index in (1, torch.tensor(2), torch.tensor([2, 0, 2]), slice(0, 2), (0, 3), torch.tensor([[1], [2]])):
        torch.testing.assert_close(experts[index], dense[index], rtol=1e-6, atol=1e-6)
    assert (experts.shape, experts.dtype, experts.ndim, len(experts)) == (dense.shape, torch.float32, 3, 3)
    x = torch.randn(3, 5, dense.shape[1])
    torch.testing.assert_close(torch.bmm(x, experts), torch.bmm(x, dense))  # type: ignore[call-overload]
    torch.testing.assert_close(experts.transpose(1, 2), dense.transpose(1, 2))
    experts.keep_decoded = True
    torch.testing.assert_close(experts[1], dense[1], rtol=1e-6, atol=1e-6)
    assert experts.bfloat16()[1].dtype == torch.bfloat16


def test_experts_that_no_token_chose_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3_moe")
    quantize(model, tmp_path / "out", "int4:g16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    chosen, decoded = [], []
    for block in loaded.model.layers:
        block.mlp.gate.register_forward_hook(
            lambda module, args, output: chosen.append({*output[2].flatten().tolist()})
        )
    decode = QuantExperts._decoded

    def note(self: QuantExperts, expert: int, dtype: torch.dtype) -> Tensor:
        decoded.append(expert)
        return decode(self, expert, dtype)

    monkeypatch.setattr(QuantExperts, "_decoded", note)
    with torch.no_grad():
        loaded(TOKENS[:1, :1])
    assert sorted(decoded) == sorted(2 * [expert for experts in chosen for expert in experts])
    assert len(decoded) == 3 * 2 * 2


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts_can_be_asked_for(implementation: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "gpt_oss")
    quantize(model, tmp_path / "out", "int4:g16")
    loaded = llmquant.load(tmp_path / "out")
    loaded.set_experts_implementation(implementation)
    with torch.no_grad():
        expected = dense_twin(model, tmp_path / "out")(TOKENS).logits
        torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe", "nemotron_h"])
def test_all_at_once_is_what_the_model_does_one_by_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a product in plain torch in place of the kernel, which runs on GPUs."""
    quantize(make_checkpoint(tmp_path / "model", name), tmp_path / "out", "int4:g16")
    model = llmquant.load(tmp_path / "out")
    calls: list[QuantExperts] = []

    def together(self: QuantExperts, x: Tensor, ends: Tensor) -> Tensor:
        calls.append(self)
        pieces = x.tensor_split(ends[:-1].tolist())
        weights = [self[e].t() if self.transposed else self[e] for e in range(len(self))]
        return torch.cat([functional.linear(piece, w) for piece, w in zip(pieces, weights, strict=True)])

    with torch.no_grad():
        one_by_one = model(TOKENS).logits
        assert not calls
        monkeypatch.setattr(QuantExperts, "together", together)
        monkeypatch.setattr(QuantExperts, "alone", lambda self, dtype: None)
        torch.testing.assert_close(model(TOKENS).logits, one_by_one, rtol=1e-5, atol=1e-5)
        assert calls
        model.set_experts_implementation("eager")
        calls.clear()
        assert torch.equal(model(TOKENS).logits, one_by_one)
        assert not calls
    parts = [layer for layer in model.modules() if isinstance(layer, QuantExperts)]
    with torch.enable_grad():  # the kernels have no derivative
        model.set_experts_implementation("llmquant")
        model(inputs_embeds=model.get_input_embeddings()(TOKENS).detach().requires_grad_())
    assert parts
    assert not calls


def test_a_folder_whose_experts_are_misshapen_is_refused(tmp_path: Path) -> None:
    quantize(make_checkpoint(tmp_path / "model", "mixtral"), tmp_path / "out", "int4:g16")
    shard = next((tmp_path / "out").glob("model-00002*"))
    tensors = load_file(shard)
    name = "model.layers.1.mlp.experts.quantized_down_proj.weight_packed"
    save_file({**tensors, name: tensors[name][:3].contiguous()}, shard, {"format": "pt"})
    with pytest.raises(VerificationError, match=f"{name} is .* should be"):
        llmquant.load(tmp_path / "out")
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        llmquant.load(tmp_path / "out")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MOE["mixtral"]())
    with pytest.raises(CheckpointError, match=r"gate_up_proj cannot be .* group 512 is larger"):
        swap(model, {"model.layers.0.mlp.experts.gate_up_proj": formats.get("int4:g512")})


# ---- runs


def test_a_cut_run_ends_as_if_it_had_not_been_cut(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3_moe")
    quantize(model, tmp_path / "whole", "int3:g16", calibration=SMALL)
    cut_after(model, tmp_path / "cut", 2, "int3:g16", calibration=SMALL)
    quantize(model, tmp_path / "cut", "int3:g16", calibration=SMALL)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_what_is_reported_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a router that sends every token to experts 1 and 2."""
    model = make_checkpoint(tmp_path / "model", "qwen3_moe", num_hidden_layers=1)
    monkeypatch.setattr(
        "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter.forward",
        lambda self, x: (x, torch.full((x[..., 0].numel(), 2), 0.5), torch.tensor([1, 2]).repeat(x[..., 0].numel(), 1)),
    )
    manifest = quantize(model, tmp_path / "out", "int4:g16", calibration=SMALL)
    assert manifest["experts"] == {
        "matrices": 8,
        "unreached": 4,
        "blended": 4,
        "least_tokens": 0,
        "median_tokens": 96,
        "most_tokens": 96,
    }
    unreached = [found["name"] for found in manifest["recoveries"] if "no calibration token was sent" in found["what"]]
    names = [
        f"model.layers.0.mlp.experts.{leaf}.{expert}" for leaf in ("gate_up_proj", "down_proj") for expert in (0, 3)
    ]
    assert sorted(unreached) == sorted(names)


def test_rules_name_all_experts_of_a_parameter_at_once(tmp_path: Path) -> None:
    rules = (Rule("*.down_proj", None), Rule("*.experts.*", "int3:g16"), Rule("*", "int8:channel"))
    model = make_checkpoint(tmp_path / "model", "gpt_oss")
    manifest = quantize(model, tmp_path / "out", Recipe(rules))
    assert [kept["name"] for kept in manifest["kept_dense"]] == [
        f"model.layers.{block}.mlp.experts.down_proj" for block in range(3)
    ]
    formats_of = {tensor["name"]: tensor["format"] for tensor in manifest["tensors"]}
    assert formats_of["model.layers.0.mlp.experts.gate_up_proj.3"] == "int3:g16:fp16"
    assert formats_of["model.layers.0.self_attn.q_proj"] == "int8:channel:fp16"
    with torch.no_grad():
        expected = dense_twin(model, tmp_path / "out")(TOKENS).logits
        found = llmquant.load(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    size = stored_size(tmp_path / "out")
    plan = pipeline.prepare(pipeline.Job(str(model), Recipe(rules), None), tmp_path / "never").plan
    assert size.quantized_weights == plan.weights
    assert size.quantized_bytes == sum(row.nbytes for row in plan.rows)


def test_a_wrong_expert_is_found_by_verification(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "qwen3_moe")
    manifest = quantize(source, tmp_path / "out", "int4:g16")
    shard = next((tmp_path / "out").glob("model-00002*"))
    tensors = load_file(shard)
    name = "model.layers.1.mlp.experts.quantized_down_proj.weight_packed"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, shard, {"format": "pt"})
    model = streamed(source)
    found = verification.verify(tmp_path / "out", model, TOKENS, manifest=manifest)
    assert any("model.layers.1.mlp.experts.down_proj.0: its error is" in problem for problem in found.problems)
