"""The examples in the docstrings of the Python interface run as they stand."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import llmquant
import llmquant.api
from llmquant.formats import packing

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


EXAMPLES = {
    **{name: getattr(llmquant, name) for name in ("quantize", "load", "export", "convert", "evaluate", "Recipe")},
    "formats.get": llmquant.formats.get,
    "metrics.divergence": llmquant.metrics.divergence,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_the_interface(name: str, pycode: Path, tmp_path: Path) -> None:
    """MODEL: the bundled model; OUTPUT: an empty folder; TEXT: a file to be written."""
    if name in ("export", "convert"):
        pytest.importorskip("compressed_tensors")
    known = {"llmquant": llmquant, "Path": Path, "MODEL": pycode, "OUTPUT": tmp_path, "TEXT": tmp_path / "text.txt"}
    (example,) = doctest.DocTestFinder(recurse=False).find(EXAMPLES[name], name, globs=known)
    assert example.examples
    report: list[str] = []
    failed = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append).failed
    assert not failed, "".join(report)


def test_examples_of_packing() -> None:
    assert doctest.testmod(packing).failed == 0


def test_public_names_are_there_and_documented() -> None:
    assert sorted(llmquant.__all__) == llmquant.__all__
    for name in llmquant.__all__:
        assert getattr(llmquant, name).__doc__, name
    assert dir(llmquant) == llmquant.__all__
