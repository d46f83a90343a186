"""Rules of the code base that no single file can hold: what may import what, and what must never appear."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "llmquant").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SOURCES = [*PACKAGE, *KERNELS, *sorted((ROOT / "eval").rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside a function; relative ones with their dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield "." * node.level + base
            yield from (f"{'.' * node.level}{base}.{alias.name}" for alias in node.names)


def test_folders_of_scripts_and_kernels_are_no_packages() -> None:
    """transformers imports a distribution named `kernels`: a package of that name at the root would hide it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "eval" / "__init__.py").exists()


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    scripts = {"bench", "bench_gpu", "bench_rivals", "llmquant"} if path.name.startswith("bench") else set()
    allowed = {*sys.stdlib_module_names, "torch", "triton", "llmquant_kernels", "", *scripts}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


# Room -> the rooms of llmquant it must not know. Loading a model never imports what quantizes one.
WRITING = [
    "solvers",
    "calibration",
    "stats",
    "pipeline",
    "plan",
    "recipe",
    "blocks",
    "output",
    "cli",
    "exchange",
    "api",
]
FORBIDDEN = {
    "errors": ["*"],
    "formats": [*WRITING, "checkpoint", "hf", "linear", "text", "metrics"],
    "stats": [*WRITING[3:], "solvers", "calibration", "formats", "hf", "linear"],
    "solvers": ["calibration", "pipeline", "plan", "recipe", "blocks", "cli", "checkpoint", "hf", "linear"],
    "recovery": ["calibration", "pipeline", "plan", "blocks", "output", "cli", "checkpoint", "hf", "linear"],
    "checkpoint": [*WRITING, "output", "hf", "linear", "formats", "metrics"],
    "output": [*sorted({*WRITING} - {"output"}), "hf", "linear", "formats", "metrics"],
    "skeleton": [*WRITING, "formats", "hf", "linear", "text", "metrics"],
    "blocks": ["solvers", "calibration", "stats", "pipeline", "plan", "recipe", "cli", "hf", "linear", "formats"],
    "experts": [*WRITING, "matrices", "checkpoint", "formats", "hf", "linear", "text", "metrics"],
    "matrices": [*WRITING, "checkpoint", "formats", "hf", "linear", "text", "metrics"],
    "hooks": ["*"],
    "products": ["*"],
    "attention": ["*"],
    "finished": ["*"],
    "stages": ["solvers", "calibration", "pipeline", "plan", "recipe", "output", "cli", "hf", "linear", "formats"],
    "swap": ["solvers", "calibration", "pipeline", "plan", "recipe", "output", "cli", "hf", "linear", "formats"],
    "calibration": ["solvers", "pipeline", "plan", "recipe", "cli", "hf", "linear", "formats"],
    "tune": ["solvers", "calibration", "stats", "pipeline", "plan", "recipe", "output", "cli", "hf", "linear"],
    "domain": ["solvers", "pipeline", "plan", "recipe", "output", "cli", "hf", "linear", "formats"],
    "equivalence": ["solvers", "pipeline", "plan", "recipe", "output", "cli", "hf", "linear", "formats"],
    "rotation": ["solvers", "pipeline", "plan", "recipe", "output", "cli", "hf", "linear", "formats"],
    "trial": ["pipeline", "plan", "recipe", "output", "cli", "hf", "linear"],
    "scaling": ["solvers", "pipeline", "plan", "recipe", "output", "cli", "hf", "linear"],
    "curvature": ["solvers", "pipeline", "plan", "recipe", "output", "cli", "hf", "linear", "formats"],
    "cpu": sorted({*WRITING, "hf", "linear", "checkpoint", "formats", "metrics", "text"}),
    "benchmark": [*WRITING, "hf", "metrics", "text"],
    "ranks": sorted({*WRITING, "hf", "linear", "checkpoint", "formats", "metrics", "text"} - {"stats"}),
    "linear": [*WRITING, "hf", "checkpoint"],
    "offload": sorted({*WRITING, "hf", "linear", "checkpoint", "formats", "metrics", "text"}),
    "phases": ["*"],
    "hf": [room for room in WRITING if room != "exchange"],
    "metrics": [*WRITING, "hf", "linear"],
    "chats": [*WRITING, "checkpoint", "hf", "linear", "formats", "metrics", "text"],
    "text": [*WRITING, "hf", "linear", "formats"],
    "sampling": [*WRITING, "checkpoint", "hf", "linear", "formats", "metrics"],
    "inspection": [*WRITING, "verification", "hf", "linear"],
    "verification": sorted({*WRITING, "hf", "linear"} - {"stats", "blocks"}),
    "estimate": ["pipeline", "plan", "output", "calibration", "cli", "hf", "linear", "checkpoint"],
    "plan": ["pipeline", "calibration", "cli", "hf", "linear"],
    "recipe": ["pipeline", "plan", "calibration", "blocks", "cli", "hf", "linear"],
    "knapsack": [*WRITING, "checkpoint", "hf", "linear", "formats", "metrics", "text"],
    "sensitivity": ["allocate", "pipeline", "plan", "output", "cli", "hf", "linear"],
    "allocate": ["pipeline", "output", "solvers", "cli", "hf", "linear"],
    "job": ["pipeline", "solving", "saving", "endtoend", "calibration", "solvers", "output", "cli", "hf", "linear"],
    "solving": ["pipeline", "saving", "endtoend", "plan", "output", "cli", "hf", "linear"],
    "saving": ["pipeline", "endtoend", "plan", "recipe", "cli", "hf", "linear"],
    "shown": ["pipeline", "plan", "solving", "saving", "finishing", "cli", "api", "exchange", "hf", "linear"],
    "finishing": ["pipeline", "endtoend", "plan", "recipe", "solvers", "cli", "api", "exchange", "hf", "linear"],
    "endtoend": ["pipeline", "plan", "recipe", "cli", "hf", "linear"],
    "pipeline": ["cli", "api", "exchange", "hf", "linear"],
    "trained": sorted({*WRITING, "hf", "linear", "checkpoint", "formats", "metrics", "text"}),
    "teacher": [room for room in WRITING if room not in ("blocks", "calibration", "stats")],
    "fake_quantize": [*WRITING, "checkpoint", "hf", "linear", "text", "metrics"],
    "folder_tuning": ["cli", "api", "exchange", "hf", "linear"],
    "activations": sorted({*WRITING, "hf", "checkpoint", "text", "metrics"}),
    "qat": ["cli", "api", "exchange", "hf", "linear"],
    "exchange": ["cli", "api", "pipeline", "plan", "blocks", "calibration", "solvers", "hf", "linear"],
    "generation": [*WRITING, "exchange", "hf", "linear"],
    "adapters": [room for room in WRITING if room != "exchange"],
    "api": ["cli"],
    "card": [*(room for room in WRITING if room != "recipe"), "checkpoint", "formats", "hf", "linear"],
    "charts": [room for room in WRITING if room != "exchange"],
    "report": [*WRITING, "checkpoint", "formats", "hf", "linear"],
    "hub": [*WRITING, "checkpoint", "formats", "hf", "linear"],
    "vllm_plugin": [*WRITING, "checkpoint", "hf", "linear"],
    "description": [*(room for room in WRITING if room != "output"), "hf", "linear"],
    "comparison": [*WRITING, "hf", "linear"],
    "cli_common": [*WRITING, "hf", "linear"],
    "cli_budget": [*WRITING, "hf", "linear"],
}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_run_one_way(room: str) -> None:
    place = ROOT / "llmquant" / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    known = {name.split(".")[1] for path in files for name in imports(path) if name.startswith("llmquant.")}
    known.discard(room)
    forbidden = known if FORBIDDEN[room] == ["*"] else known & set(FORBIDDEN[room])
    assert not forbidden


def test_every_room_has_its_rule() -> None:
    rooms = {path.relative_to(ROOT / "llmquant").parts[0].removesuffix(".py") for path in PACKAGE}
    assert rooms - set(FORBIDDEN) == {
        "__init__",
        "__main__",
        "cli",
        "cli_check",
        "cli_bench",
        "cli_exchange",
        "cli_train",
        "format_table",
        "version",
    }


def test_only_one_room_touches_the_private_loading_api() -> None:
    private = ("transformers.core_model_loading", "transformers.conversion_mapping")
    users = {path.name for path in SOURCES if any(name.startswith(private) for name in imports(path))}
    assert users == {"blocks.py"}


def test_only_one_room_knows_of_other_processes() -> None:
    assert {path.name for path in SOURCES if "torch.distributed" in path.read_text()} == {"ranks.py"}


def test_nothing_unpickles() -> None:
    for path in SOURCES:
        assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve"} & {
            name.split(".")[0] for name in imports(path)
        }
        assert "torch.load(" not in path.read_text()


def test_nothing_prints_below_the_command_line_and_the_scripts() -> None:
    for path in [*PACKAGE, *(ROOT / "kernels" / "llmquant_kernels").rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert not prints or path.name.startswith("cli")


def test_importing_is_light_and_loading_needs_no_solver(pycode: Path) -> None:
    """In a process of its own: what is imported, and when."""
    code = f"""
import sys
import llmquant
assert "torch" not in sys.modules and "transformers" not in sys.modules
import llmquant.hf
writing = {[f"llmquant.{room}" for room in WRITING]}
assert not [name for name in writing if name in sys.modules], sys.modules.keys()
"""
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:llmquant", "-c", code], check=True, timeout=120)


def test_the_bundled_model_is_small_and_its_matrices_divide_by_128(pycode: Path) -> None:
    from safetensors import safe_open

    assert sum(path.stat().st_size for path in pycode.glob("*.safetensors")) <= 3_000_000
    with safe_open(pycode / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dictionary)
            assert file.get_slice(name).get_dtype() == "BF16"
            assert all(size % 128 == 0 for size in file.get_slice(name).get_shape())
