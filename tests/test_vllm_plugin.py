"""vLLM's plugin, against a stand-in for the few classes of vLLM that it uses, which behave as those of vLLM 0.33."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmquant import formats
from llmquant.errors import PlanError, VerificationError

SPECS = ["int4:g32", "int3:g32:asym", "mxfp4", "nvfp4", "nf4:g32", "kmeans3:channel", "ternary:g32", "mx6", "vsq4:s4"]
ROWS, COLUMNS = (48, 16, 16), 160
METHODS: dict[str, type] = {}


class LinearBase(nn.Module):
    """A layer of vLLM, `rows` and `columns` being this rank's share."""

    def __init__(
        self, config: Any, prefix: str, rows: list[int], columns: int, of_rows: int, of_columns: int, **own: Any
    ) -> None:
        super().__init__()
        for name, value in own.items():
            setattr(self, name, value)
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self, columns, rows, of_columns, of_rows, torch.bfloat16, weight_loader=lambda *_: None
        )

    def load(self, named: dict[str, Tensor], *part: Any) -> None:
        for suffix, tensor in named.items():
            parameter: Any = getattr(self, suffix)
            parameter.weight_loader(parameter, tensor, *part)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        found: Tensor = self.quant_method.apply(self, x, bias)
        return found


@pytest.fixture(scope="module")
def plugin() -> Iterator[ModuleType]:
    class QuantizationConfig:
        def __init__(self) -> None:
            self.packed_modules_mapping: dict[str, list[str]] = {}

    def register(name: str) -> Any:
        return lambda config: METHODS.setdefault(name, config)

    layers = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": type("LinearMethodBase", (), {}),
            "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {}),
        },
        f"{layers}.quantization": {"register_quantization_config": register},
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig, "QuantizeMethodBase": object},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in contents.items():
            module = ModuleType(name)
            module.__dict__.update(members)
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("llmquant.vllm_plugin")
    del sys.modules["llmquant.vllm_plugin"]


def stored(spec: str, rows: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a file, and the weight (rows, COLUMNS) float32 that they stand for."""
    fmt = formats.get(spec).stored_for(torch.bfloat16)
    w = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    codes, grid = fmt.quantize(w)
    return fmt.pack(codes, grid), fmt.decode(codes, grid)


def configured(plugin: ModuleType, listed: dict[str, list[str]]) -> Any:
    settled = {formats.get(spec).stored_for(torch.bfloat16).spec: names for spec, names in listed.items()}
    config = plugin.VllmConfig.from_config({"quant_method": "llmquant", "formats": settled})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def near(found: Tensor, x: Tensor, w: Tensor) -> None:
    """As near to the product in float64 as one in bfloat16 can be."""
    wanted = x.double() @ w.bfloat16().double().T
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


X = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(9)).bfloat16()
NAMES = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (3, 4)])
def test_side_by_side(plugin: ModuleType, spec: str, rank: int, ranks: int) -> None:
    """q, k and v in one layer; of 4 ranks, two have the same keys and values."""
    config = configured(plugin, {spec: NAMES})
    copies = ranks // 2 if ranks > 2 else 1
    own = [ROWS[0] // ranks, *(rows * copies // ranks for rows in ROWS[1:])]
    share = {"tp_rank": rank, "tp_size": ranks, "num_kv_head_replicas": copies}
    layer = LinearBase(config, "model.layers.0.self_attn.qkv_proj", own, COLUMNS, sum(own) * ranks, COLUMNS, **share)
    wanted: list[Tensor] = []
    for seed, (part, rows) in enumerate(zip("qkv", ROWS, strict=True)):
        named, w = stored(spec, rows, seed)
        layer.load(named, part)
        first = (rank if part == "q" else rank // copies) * own[seed]
        wanted.append(w[first : first + own[seed]])
    layer.quant_method.process_weights_after_loading(layer)
    near(layer(X), X, torch.cat(wanted))
    if spec == "int4:g32":
        assert len(vars(layer)["prepared"]) == 1, "matrices of one format are multiplied at once"


def test_side_by_side_in_different_formats(plugin: ModuleType) -> None:
    config = configured(plugin, {"int4:g32": NAMES[:1], "nvfp4": NAMES[1:2], "int8:channel": NAMES[2:]})
    layer = LinearBase(config, "model.layers.0.self_attn.qkv_proj", list(ROWS), COLUMNS, sum(ROWS), COLUMNS)
    wanted: list[Tensor] = []
    for part, spec, rows in zip("vkq", ("int8:channel", "nvfp4", "int4:g32"), reversed(ROWS), strict=True):
        named, w = stored(spec, rows)
        layer.load(named, part)
        wanted.insert(0, w)
    layer.quant_method.process_weights_after_loading(layer)
    bias = torch.randn(sum(ROWS), generator=torch.Generator().manual_seed(1)).bfloat16()
    near(layer(X, bias) - bias, X, torch.cat(wanted))


def test_fused_in_the_checkpoint(plugin: ModuleType) -> None:
    """As Phi-3 has it: one matrix in the file, of which each of two ranks has rows from three places."""
    config = configured(plugin, {"int4:g32": ["qkv"]})
    share = {"tp_rank": 1, "tp_size": 2}
    layer = LinearBase(config, "qkv", [rows // 2 for rows in ROWS], COLUMNS, sum(ROWS), COLUMNS, **share)
    named, w = stored("int4:g32", sum(ROWS))
    layer.load(named)
    layer.quant_method.process_weights_after_loading(layer)
    near(layer(X), X, torch.cat([part[len(part) // 2 :] for part in w.split(list(ROWS))]))


@pytest.mark.parametrize(
    "spec", ["int4:g16", "int3:g16", "int8:channel", "mx6", "mxfp4", "ternary:g16", "kmeans4:channel"]
)
def test_shared_out_by_columns(plugin: ModuleType, spec: str) -> None:
    rank, ranks = 1, 5 if spec == "mxfp4" else 2  # 160 columns are five blocks of 32
    own = COLUMNS // ranks
    layer = LinearBase(configured(plugin, {spec: ["o"]}), "o", [48], own, 48, COLUMNS, tp_rank=rank, tp_size=ranks)
    named, w = stored(spec, 48)
    layer.load(named)
    if spec == "int3:g16":  # 80 codes of 3 bits are seven and a half words
        with pytest.raises(PlanError, match=r"o \(int3:g16:bf16\): 80 columns a rank do not end with"):
            layer.quant_method.process_weights_after_loading(layer)
        return
    layer.quant_method.process_weights_after_loading(layer)
    mine = slice(rank * own, (rank + 1) * own)
    near(layer(X[:, mine]), X[:, mine], w[:, mine])


def test_what_it_leaves_alone_and_what_it_refuses(plugin: ModuleType) -> None:
    config = configured(plugin, {"int4:g32": [*NAMES[:2], "lm_head", "model.layers.0.mlp.experts.gate_up_proj"]})
    linear = LinearBase.__new__(LinearBase)
    assert type(config.get_quant_method(linear, "model.layers.1.mlp.down_proj")).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(nn.Module(), "model.layers.0.self_attn.attn") is None
    with pytest.raises(PlanError, match=r"not quantized is model\.layers\.0\.self_attn\.v_proj"):
        config.get_quant_method(linear, "model.layers.0.self_attn.qkv_proj")
    with pytest.raises(PlanError, match=r"experts\.gate_up_proj: is quantized, and vLLM has a Module there"):
        config.get_quant_method(nn.Module(), "model.layers.0.mlp.experts")
    with pytest.raises(PlanError, match="lm_head: is quantized"):
        config.get_quant_method(nn.Module(), "lm_head")


def test_incomplete_checkpoints(plugin: ModuleType) -> None:
    def layer() -> LinearBase:
        config = configured(plugin, {"int4:g32": NAMES})
        return LinearBase(config, "model.layers.0.self_attn.qkv_proj", list(ROWS), COLUMNS, sum(ROWS), COLUMNS)

    def finish(layer: LinearBase) -> None:
        layer.quant_method.process_weights_after_loading(layer)

    some = layer()
    some.load(stored("int4:g32", ROWS[0])[0], "q")
    with pytest.raises(VerificationError, match="1 of its 3 matrices"):
        finish(some)
    short = layer()
    for part, rows in zip("qkv", ROWS, strict=True):
        named = stored("int4:g32", rows)[0]
        short.load({k: v for k, v in named.items() if (part, k) != ("k", "weight_scale")}, part)
    with pytest.raises(VerificationError, match="weight_scale of int4:g32:bf16 is missing"):
        finish(short)


def test_names_follow_the_model_and_loading_anew_replaces(plugin: ModuleType) -> None:
    class Mapper:
        def get_rename_mapper(self) -> Mapper:
            return self

        def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
            return {name.replace("model.language_model.", "language_model.model."): v for name, v in values.items()}

    config = configured(plugin, {"int4:g32": ["model.language_model.o"]})
    config.apply_vllm_mapper(Mapper())
    layer = LinearBase(config, "language_model.model.o", [48], COLUMNS, 48, COLUMNS)
    for seed in (0, 1):
        named, w = stored("int4:g32", 48, seed)
        layer.load(named)
        for _ in range(2):  # vLLM may do so more than once
            layer.quant_method.process_weights_after_loading(layer)
        near(layer(X), X, w)


def test_vllm_finds_it(plugin: ModuleType) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"llmquant": "llmquant.vllm_plugin:register"}
    plugin.register()
    plugin.register()
    assert METHODS["llmquant"] is plugin.VllmConfig
