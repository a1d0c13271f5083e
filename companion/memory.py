"""How much memory a computation holds at its worst moment."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_memory"]


def peak_memory(f: Callable[[], object]) -> int:
    """The most bytes that ``f()`` has allocated at one time.

    Tensors are counted by torch's profiler, arrays and other objects by
    Python's `tracemalloc`: what ``f`` allocates, not what was there before.
    The two peaks are added, so that the sum is an upper bound where they fall
    at different moments. It is a count and not a reading of the operating
    system: it does not depend on what else the machine does.

    Parameters
    ----------
    f
        Called three times without an argument: once to warm up, since a first
        call fills caches, and once for each of the two counts.

    Examples
    --------
    >>> import torch
    >>> def twice():
    ...     return torch.zeros(10**6, dtype=torch.float64) + 1.0
    >>> 16_000_000 <= peak_memory(twice) < 16_100_000
    True
    """
    f()
    return _tensors(f) + _objects(f)


def _tensors(f):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    level = highest = 0
    for event in p.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level)
    return highest


def _objects(f):
    outer = tracemalloc.is_tracing()
    if not outer:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        f()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        if not outer:
            tracemalloc.stop()
    return peak - before
