"""Places where a scale can be moved: the right ones in every architecture, and none where it would change the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, MOE, make_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmquant import equivalence
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import Checkpoint
from llmquant.equivalence import Place

LLAMA = {
    "input_layernorm": ["q_proj", "k_proj", "v_proj"],
    "v_proj": ["o_proj"],
    "post_attention_layernorm": ["gate_proj", "up_proj"],
    "up_proj": ["down_proj"],
}
EXPECTED = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma": LLAMA,
    "gemma2": {
        "pre_feedforward_layernorm" if norm == "post_attention_layernorm" else norm: readers
        for norm, readers in LLAMA.items()
    },
    "olmo2": {"v_proj": ["o_proj"], "up_proj": ["down_proj"]},  # its norms come after, none makes an input
    "phi3": {"input_layernorm": ["qkv_proj"], "post_attention_layernorm": ["gate_up_proj"]},
    "gpt2": {"ln_1": ["c_attn"], "ln_2": ["c_fc"]},
    "phi": {"input_layernorm": ["q_proj", "k_proj", "v_proj", "fc1"], "v_proj": ["dense"]},
    "mixtral": {"input_layernorm": ["q_proj", "k_proj", "v_proj"], "v_proj": ["o_proj"]},  # experts read the other norm
}


def places_of(folder: Path) -> list[list[Place]]:
    model = StreamedModel(Checkpoint(folder), dtype=torch.float32)
    with torch.no_grad():
        return list(equivalence.find_all(model))


@pytest.mark.parametrize("name", EXPECTED)
def test_places_are_found_by_running_the_block(name: str, tmp_path: Path) -> None:
    for places in places_of(make_checkpoint(tmp_path, name)):
        found = {p.source.rpartition(".")[2]: [reader.rpartition(".")[2] for reader in p.readers] for p in places}
        assert found == EXPECTED[name]


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MOE])
def test_a_scale_moved_at_every_place_at_once_leaves_the_logits(name: str, tmp_path: Path) -> None:
    """By hand, on the whole model."""
    folder = make_checkpoint(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    generator = torch.Generator().manual_seed(2)
    for place in (place for places in places_of(folder) for place in places):
        scale = torch.exp2(4 * torch.rand(place.sources, generator=generator) - 2)
        source = model.get_submodule(place.source)
        assert isinstance(source.weight, Tensor)
        if place.offset is None:
            source.weight.data /= scale[:, None]
        else:
            source.weight.data = (source.weight.data + place.offset) / scale - place.offset
        if getattr(source, "bias", None) is not None:
            assert isinstance(source.bias, Tensor)
            source.bias.data /= scale
        for reader in (model.get_submodule(name) for name in place.readers):
            assert isinstance(reader.weight, Tensor)
            columns = scale[place.rows]
            reader.weight.data *= columns if isinstance(reader, nn.Linear) else columns[:, None]
    with torch.no_grad():  # as a whole: some architectures divide by what is small for single tokens
        nearness = 1e-3 if name == "qwen3_next" else 1e-4  # whose state makes a lot of what products are rounded by
        assert (model(ids).logits - expected).norm() <= nearness * expected.norm()


def test_grouped_queries_share_the_scales_of_a_value_head(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")  # 4 heads of 16, 2 of keys and values
    place = next(place for place in places_of(folder)[0] if place.source.endswith("v_proj"))
    heads = place.rows.view(4, 16)
    assert torch.equal(heads, torch.arange(32).view(2, 1, 16).expand(2, 2, 16).reshape(4, 16))


def test_what_a_norm_adds_to_its_weight_is_found(tmp_path: Path) -> None:
    for name, offset in (("gemma", 1.0), ("llama", 0.0)):
        places = places_of(make_checkpoint(tmp_path / name, name))[0]
        assert [place.offset for place in places] == [offset, None, offset, None]


def test_a_norm_whose_output_is_read_elsewhere_is_no_place(tmp_path: Path) -> None:
    """A hidden second reader of the norm, which no hook on targets sees."""
    folder = make_checkpoint(tmp_path, "llama")
    model = StreamedModel(Checkpoint(folder), dtype=torch.float32)
    block = model.model.get_submodule(model.block_names[0])
    attention = block.get_submodule("self_attn")
    forward = attention.forward

    def leaking(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        output, *rest = forward(hidden_states, *args, **kwargs)
        return (output + 0.01 * hidden_states, *rest)

    attention.forward = leaking
    with torch.no_grad():
        first = next(equivalence.find_all(model))
    assert [place.source.rpartition(".")[2] for place in first] == ["v_proj", "post_attention_layernorm", "up_proj"]
