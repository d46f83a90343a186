"""What tests share: the bundled model, and text that it was not trained on; scripts that measure can be imported."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, here and in the processes that tests start: on small tensors threads only wait for each
# other, and on a machine that does something else too they wait long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "tests" / "assets"
sys.path[:0] = [str(ASSETS), str(ROOT / "eval"), str(ROOT / "kernels")]


@pytest.fixture(scope="session")
def pycode() -> Path:
    """The bundled model: a Llama of six blocks that has read Python's standard library."""
    return ASSETS / "pycode"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of six blocks, for what does not ask for a trained one: a run takes a third of the time."""
    from architectures import make_checkpoint

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama", max_shard_size="100KB", **sizes)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of the standard library that the bundled model was not trained on, as a JSON list of files."""
    from train_pycode import documents

    path = tmp_path_factory.mktemp("text") / "held_out.json"
    path.write_text(json.dumps(documents(held_out=True)))
    return path
