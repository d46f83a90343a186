"""What finished parts of a block put out is computed once, and nothing else changes for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

import llmquant
from llmquant.finished import Finished


class Twice(nn.Module):
    """A block that calls a part twice, and writes over what that gave."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.part(x).mul_(2))


def passes(finished: Finished, block: Twice, x: Tensor, batch: int = 0, see: bool = True) -> Tensor:
    with torch.no_grad(), finished.during(batch, see):
        return block(x)


def test_the_first_call_is_answered_and_others_are_computed() -> None:
    block, x = Twice(), torch.randn(3, 4)
    with torch.no_grad():
        expected = block(x)
    finished = Finished(2, 10**6, [block.part])
    for _ in range(3):
        assert torch.equal(passes(finished, block, x), expected)
    assert len(finished.kept) == 1
    assert "forward" not in vars(block.part)
    other = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(block(other), passes(finished, block, other, batch=1))


def test_nothing_is_kept_beyond_the_room() -> None:
    block, x = Twice(), torch.randn(3, 4)
    for batches, kept in ((1, 1), (2, 0)):
        finished = Finished(batches, x.nbytes, [block.part])
        passes(finished, block, x)
        assert len(finished.kept) == kept
    finished = Finished(1, x.nbytes, [block.part])
    passes(finished, block, x, see=False)
    assert not finished.kept


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_neox"])
def test_the_same_bytes_in_fewer_passes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "model", name, num_hidden_layers=2)
    save_file({"tokens": torch.randint(0, 96, (9, 16))}, tmp_path / "tokens.safetensors")
    calls = [0]
    attention = nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        return attention(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    found = []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(Finished, "_see", lambda *_: None)
        calls[0], out = 0, tmp_path / f"out-{kept}"
        shown: dict[str, Any] = {"calibration": str(tmp_path / "tokens.safetensors"), "calibration_check": False}
        shown |= {"samples": 9, "batch": 2, "verify": False, "report": False}
        llmquant.quantize(model, out, format="int4:g8", **shown)
        found.append((calls[0], [path.read_bytes() for path in sorted(out.glob("*.safetensors"))]))
    assert found[0][1] == found[1][1]
    assert found[0][0] < found[1][0]
