"""`peak_memory` counts what is held at one time."""

import tracemalloc

import numpy as np
import pytest
import torch

from companion.memory import peak_memory

MEGABYTE = 10**6


@pytest.mark.parametrize(
    "ones",
    [np.ones, lambda n: torch.ones(n, dtype=torch.float64)],
    ids=["numpy", "torch"],
)
def test_what_is_kept_is_counted_and_what_is_dropped_is_not(ones):
    def dropped():
        for _ in range(8):
            ones(MEGABYTE)

    kept = peak_memory(lambda: [ones(MEGABYTE) for _ in range(8)])
    assert 64 * MEGABYTE < kept < 65 * MEGABYTE
    assert 8 * MEGABYTE < peak_memory(dropped) < 17 * MEGABYTE


def test_a_graph_is_counted():
    def chain(steps):
        x = torch.ones(10**5, dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            x = torch.tanh(x)
        return x

    short, long = (peak_memory(lambda n=n: chain(n)) for n in (10, 100))
    assert long / short == pytest.approx(101 / 11, rel=0.1)


def test_it_leaves_a_tracing_that_was_on():
    tracemalloc.start()
    try:
        peak_memory(lambda: np.ones(10))
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


def test_what_f_raises_comes_through_and_tracing_is_off_again():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
    assert not tracemalloc.is_tracing()
