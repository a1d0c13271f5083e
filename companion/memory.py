"""How much memory a computation holds at its worst moment."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

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
        Called twice without an argument, once for each count: tensors first,
        since what a first call puts into caches are objects.

    Examples
    --------
    >>> def twice():
    ...     return torch.zeros(10**6, dtype=torch.float64) + 1.0
    >>> 16_000_000 <= peak_memory(twice) < 16_100_000
    True
    """
    with _Tensors() as tensors:
        f()
    return tensors.peak + _objects(f)


class _Tensors(TorchDispatchMode):
    """Counts the bytes of all tensors that were made and are still alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.level, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages(args)}
        for storage in _storages(made):
            place = storage.data_ptr()
            if place not in given:  # neither a view nor changed in place
                self.alive[place] = StorageWeakRef(storage), storage.nbytes()
                self.level += storage.nbytes()
        if self.level > self.peak:
            self.alive = {
                place: held
                for place, held in self.alive.items()
                if not held[0].expired()
            }
            self.level = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.level)
        return made


def _storages(values):
    if isinstance(values, torch.Tensor):
        yield values.untyped_storage()
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _storages(value)


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
