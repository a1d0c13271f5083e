"""How much memory a computation holds at its worst moment."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_memory"]


def peak_memory(f: Callable[[], object]) -> int:
    """The most bytes that ``f()`` has allocated at one time.

    Tensors are counted as torch makes them, arrays and other objects by
    Python's `tracemalloc`: what ``f`` allocates, not what was there before,
    nor what an operation of torch uses only while it runs. The two peaks are
    added, so that the sum is an upper bound where they fall at different
    moments. It is a count and not a reading of the operating system: it does
    not depend on what else the machine does.

    Parameters
    ----------
    f
        Called three times without an argument: once to warm up, since a first
        call fills caches, and once for each of the two counts.

    Examples
    --------
    >>> def twice():
    ...     return torch.zeros(10**6, dtype=torch.float64) + 1.0
    >>> 16_000_000 <= peak_memory(twice) < 16_100_000
    True
    """
    f()
    with _Tensors() as tensors:
        f()
    return tensors.peak + _objects(f)


class _Tensors(TorchDispatchMode):
    """Counts the bytes of all tensors that were made and are still alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = operation(*args, **kwargs)
        given = {place for place, _ in _storages((args, kwargs))}
        for place, storage in _storages(made):
            if place not in given:  # neither a view nor changed in place
                self.alive[place] = StorageWeakRef(storage), storage.nbytes()
        if self._level() > self.peak:
            self.alive = {
                place: held
                for place, held in self.alive.items()
                if not held[0].expired()
            }
            self.peak = max(self.peak, self._level())
        return made

    def _level(self):
        return sum(size for _, size in self.alive.values())


def _storages(tree):
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            yield storage.data_ptr(), storage


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
