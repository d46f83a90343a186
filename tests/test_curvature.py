"""The output-side curvature of one streamed backward pass is that of plain autograd on the whole model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, MOE, VOCABULARY, make_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, Gemma4TextConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from llmquant import curvature as room
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import Checkpoint
from llmquant.curvature import Curvature, curvature, load, save
from llmquant.errors import OutputError, PlanError

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOWS = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


def streamed(folder: Path, dtype: torch.dtype | None = None) -> StreamedModel:
    return StreamedModel(Checkpoint(folder), dtype=dtype)


def labels_of(logits: Tensor, seed: int) -> Tensor:
    """The labels that the seed draws, by counting how many tokens lie below each draw."""
    draws = 1 - torch.rand(logits.shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (logits.double().softmax(-1).cumsum(-1) < draws[..., None]).sum(-1)


class OneExpert:
    """An expert cut out of its parameter, which keeps what it puts out."""

    def __init__(self, weight: Tensor, outputs: dict[str, Tensor], name: str) -> None:
        self.weight, self.outputs, self.name = weight, outputs, name

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        x, expert = args
        output = func(x, expert.weight)
        output.retain_grad()
        expert.outputs[expert.name] = output
        return output


def by_autograd(folder: Path, names: list[str], seed: int = 0) -> dict[str, Tensor]:
    """{name: the whole G (out, out)} of the model in one piece."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: object, args: object, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output  # as some blocks have it
            output.retain_grad()
            outputs[name] = output

        return hook

    for name, stack in [(name, value) for name, value in model.named_parameters() if f"{name}.0" in names]:
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        del owner._parameters[leaf]
        owner.__dict__[leaf] = [OneExpert(stack[i], outputs, f"{name}.{i}") for i in range(len(stack))]
    modules = dict(model.named_modules())
    for name in set(names) & modules.keys():
        modules[name].register_forward_hook(keep(name))
    logits = model(input_ids=WINDOWS, use_cache=False).logits
    labels = labels_of(logits.detach(), seed)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    gradients = {name: output.grad.flatten(0, -2) for name, output in outputs.items() if output.grad is not None}
    return {name: g.T @ g / len(g) for name, g in gradients.items()}


def dense(found: Curvature) -> Tensor:
    """G (out, out) with zeros where it is not held."""
    return torch.block_diag(*found.blocks)[: found.rows, : found.rows]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def contents(found: dict[str, Curvature], path: Path) -> str:
    save(found, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *(name for name in MOE if name != "llama4")])
def test_it_is_what_autograd_finds(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, name)
    model = streamed(folder)
    found = curvature(model, WINDOWS, batch=2, seed=3)
    blocks = range(len(model.block_names))
    targets = {name: target for block in blocks for name, target in model.targets(block).items()}
    assert [name for name in found if name not in model.block_names] == list(targets)
    expected = by_autograd(folder, list(targets) + model.block_names, seed=3)
    assert expected.keys() == found.keys()
    for name, part in found.items():
        assert part.blocks.shape == (1, part.rows, part.rows)
        assert part.rows == (targets[name].shape[0] if name in targets else 64)
        routed = name in targets and targets[name].expert is not None
        assert part.dropped == 0
        assert part.tokens < WINDOWS.numel() if routed else part.tokens == WINDOWS.numel()
        assert difference(part.blocks[0], expected[name]) < 1e-4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def whole(llama: Path) -> dict[str, Curvature]:
    return curvature(streamed(llama), WINDOWS)


@pytest.mark.parametrize("block", [1, 16, 24, 100])
def test_blocks_are_those_on_the_diagonal_of_the_whole(llama: Path, whole: dict[str, Curvature], block: int) -> None:
    found = curvature(streamed(llama), WINDOWS, block=block, full_limit=32)
    for name, part in found.items():
        size = part.rows if part.rows <= 32 else block
        assert part.blocks.shape == (-(-part.rows // size), size, size)
        expected = torch.eye(len(part.blocks) * size)
        expected[: part.rows, : part.rows] = whole[name].blocks[0]
        for index, blocks in enumerate(part.blocks):
            rows = slice(index * size, (index + 1) * size)
            torch.testing.assert_close(blocks, expected[rows, rows])
    assert {part.rows for part in found.values()} == {32, 64, 128}


def test_how_tokens_are_batched_changes_nothing(
    llama: Path, whole: dict[str, Curvature], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CHUNK_BYTES", 4 * VOCABULARY * 5)  # five tokens at the head, then five, then two
    for batch in (1, 3, 5):
        for name, part in curvature(streamed(llama), WINDOWS, batch=batch).items():
            assert difference(part.blocks, whole[name].blocks) < 1e-5


def test_a_seed_gives_the_same_bytes_wherever_hidden_states_are(
    llama: Path, whole: dict[str, Curvature], tmp_path: Path
) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    expected = contents(whole, tmp_path / "a")
    assert contents(curvature(streamed(llama), WINDOWS), tmp_path / "b") == expected
    assert contents(curvature(streamed(llama), WINDOWS, spill=spill, memory=0), tmp_path / "c") == expected
    assert contents(curvature(streamed(llama), WINDOWS, seed=1), tmp_path / "d") != expected
    assert not list(spill.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "d", "spill"}


def test_a_spill_that_fails_says_so(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"nowhere: .* cannot be written"):
        curvature(streamed(llama), WINDOWS, spill=tmp_path / "nowhere", memory=0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    curvature(streamed(llama), WINDOWS, spill=tmp_path)  # there is room in memory
    with pytest.raises(OutputError, match="No space left"):
        curvature(streamed(llama), WINDOWS, spill=tmp_path, memory=1000)
    assert not list(tmp_path.iterdir())


def test_what_was_saved_is_loaded(whole: dict[str, Curvature], tmp_path: Path) -> None:
    save(whole, tmp_path / "found")
    loaded = load(tmp_path / "found")
    assert loaded.keys() == whole.keys()
    for name, part in loaded.items():
        assert torch.equal(part.blocks, whole[name].blocks)
        assert (part.rows, part.tokens, part.dropped) == (whole[name].rows, whole[name].tokens, whole[name].dropped)


def test_one_block_is_in_memory_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, passed = streamed(llama), []
    run = model.run_block

    def loaded() -> list[int]:
        blocks = enumerate(model.block_names)
        return [
            index
            for index, name in blocks
            if any(not value.is_meta for value in model.model.get_submodule(name).parameters())
        ]

    def watch(block: int, hidden: Tensor, call: Any) -> Tensor:
        assert loaded() == [block]
        assert model.model.get_input_embeddings().weight.is_meta
        return run(block, hidden, call)

    monkeypatch.setattr(model, "run_block", watch)
    curvature(model, WINDOWS, progress=lambda done, total: passed.append((done, total, loaded())))
    assert passed == [(done, 6, []) for done in range(1, 7)]
    assert all(value.is_meta for value in model.model.parameters())


def test_a_linear_that_no_gradient_reaches_has_no_entry(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(mlp: Any, hidden: Tensor) -> Tensor:
        return mlp.down_proj(mlp.up_proj(hidden) * mlp.gate_proj(torch.ones_like(hidden)))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    found = curvature(streamed(llama), WINDOWS)
    assert len(found) == 3 * (6 + 1)
    assert not [name for name in found if name.endswith("gate_proj")]


def test_blocks_that_hand_on_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    shared = {**SMALL, "head_dim": 16, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 16}
    config = Gemma4TextConfig(**shared, vocab_size_per_layer_input=VOCABULARY, layer_types=["full_attention"] * 3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "keys")
    with pytest.raises(PlanError, match=r"layers\.1 hands on more"):
        curvature(streamed(tmp_path / "keys"), WINDOWS)
    several = Gemma3nTextConfig(**SMALL, vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=0)
    AutoModelForCausalLM.from_config(several).save_pretrained(tmp_path / "several")
    with pytest.raises(PlanError, match=r"layers\.0: its hidden states, \(4, \d, 12, 64\)"):
        curvature(streamed(tmp_path / "several"), WINDOWS)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_half_the_digits_are_enough(
    llama: Path, whole: dict[str, Curvature], dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the labels of the float32 model: others would hide what is lost."""
    drawn: list[Tensor] = []
    sample = room._sample

    def note(logits: Tensor, draws: Tensor) -> Tensor:
        drawn.append(sample(logits, draws))
        return drawn[-1]

    monkeypatch.setattr(room, "_sample", note)
    curvature(streamed(llama), WINDOWS)
    monkeypatch.setattr(room, "_sample", lambda logits, draws: drawn.pop(0))
    for name, part in curvature(streamed(llama, dtype), WINDOWS).items():
        assert part.dropped == 0
        assert difference(dense(part), dense(whole[name])) < bound


def test_labels_are_drawn_from_the_distribution() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf, 2.0, -torch.inf])
    draws = 1 - torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws[:2] = torch.tensor([2**-53, 1.0])  # the ends of what rand can give
    labels = room._sample(logits.expand(len(draws), -1), draws)
    assert labels[:2].tolist() == [1, 4]
    shares = labels.bincount(minlength=6) / len(labels)
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=0.005)
    assert torch.equal(shares > 0, logits.isfinite())
    assert 0 <= room._sample(torch.full((1, 6), torch.nan), draws[:1]) < 6


def test_tokens_that_are_not_finite_are_left_out_and_counted() -> None:
    gradient = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    total = room._Sum(3, 2, 2, torch.device("cpu"))
    total.add(gradient)
    broken = gradient.clone()
    broken[0, 1, 2], broken[1, 3, 0] = torch.nan, torch.inf
    total.add(broken)
    part = total.mean()
    assert (part.tokens, part.dropped) == (14, 2)
    finite = torch.cat([gradient.flatten(0, 1), broken.flatten(0, 1)[broken.flatten(0, 1).isfinite().all(-1)]])
    expected = torch.eye(4)
    expected[:3, :3] = finite.T @ finite / 14 / room.LOSS_SCALE**2
    torch.testing.assert_close(part.blocks, torch.stack([expected[:2, :2], expected[2:, 2:]]))


def test_a_million_tokens_lose_no_digits() -> None:
    total = room._Sum(4, 4, 4, torch.device("cpu"))
    gradient = 0.1 * torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(2**13):
        total.add(gradient)
    expected = (gradient.double().T @ gradient.double() / 128 / room.LOSS_SCALE**2).float()
    assert total.tokens == 2**20
    assert difference(total.mean().blocks[0], expected) < 1e-6
