"""Products in float32 by either library: against float64, in any layout; the same bits for any number of threads."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmquant import products
from llmquant.products import product

SIZES = [(1, 300, 1), (5, 0, 7), (5, 40, 0), (70, 256, 130), (300, 700, 33), (130, 5000, 64)]


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: request.param)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def laid_out(rows: int, columns: int, how: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if how == "whole":
        return torch.randn(rows, columns, generator=generator)
    if how == "turned":
        return torch.randn(columns, rows, generator=generator).T
    if how == "part":
        return torch.randn(rows + 2, columns + 9, generator=generator)[1 : rows + 1, 5 : columns + 5]
    return torch.randn(columns + 3, rows + 4, generator=generator)[2 : columns + 2, 1 : rows + 1].T


@pytest.mark.parametrize("second", ["whole", "turned", "part", "turned part"])
@pytest.mark.parametrize("first", ["whole", "turned", "part", "turned part"])
@pytest.mark.parametrize("size", SIZES)
def test_a_product_of_any_layout(size: tuple[int, int, int], first: str, second: str) -> None:
    rows, terms, columns = size
    a, b = laid_out(rows, terms, first, 1), laid_out(terms, columns, second, 2)
    room = torch.ones(rows, columns + 6)
    out = room[:, 3 : columns + 3]
    wanted = a.double() @ b.double()
    torch.testing.assert_close(product(a, b).double(), wanted, rtol=1e-4, atol=1e-3)
    assert product(a, b, out, -2) is out
    torch.testing.assert_close(out.double(), 1 - 2 * wanted, rtol=1e-4, atol=1e-3)
    assert (room[:, :3] == 1).all()
    assert (room[:, columns + 3 :] == 1).all()


@pytest.mark.parametrize("size", [(70, 256, 130), (300, 4096, 33), (64, 6000, 64), (150, 128, 200)])
def test_the_number_of_threads_does_not_change_a_bit(size: tuple[int, int, int]) -> None:
    rows, terms, columns = size
    a, b = laid_out(rows, terms, "part", 1), laid_out(terms, columns, "part", 2)
    found = []
    for threads in (1, 2, 3, 4, 7, 16):
        torch.set_num_threads(threads)
        found.append(product(a, b))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_no_layout_falls_into_a_loop_that_is_a_hundred_times_as_slow() -> None:
    """As a weight with gaps between its rows does in oneDNN."""
    torch.set_num_threads(1)
    spent = {}
    for first in ("whole", "turned part"):
        for second in ("whole", "part", "turned", "turned part"):
            a, b = laid_out(256, 512, first, 1), laid_out(512, 512, second, 2)
            times = []
            for _ in range(4):
                start = time.thread_time()
                product(a, b)
                times.append(time.thread_time() - start)
            spent[first, second] = min(times)
    assert max(spent.values()) < 20 * min(spent.values())
