"""What all task distributions share: their randomness and their checks."""

from __future__ import annotations

import math
import operator
from dataclasses import fields

import torch

from companion.objective import TaskBatch

Seed = int | torch.Generator


class Drawn(TaskBatch):
    """A `TaskBatch` that remembers what its tasks were drawn from.

    A slice keeps the memory; a single task is a plain `Task`, since no
    learner may look at it.
    """

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return super().__getitem__(index)
        return type(self)(
            *(self._part(getattr(self, f.name), index) for f in fields(self))
        )


def generator(seed: Seed) -> torch.Generator:
    """The source of randomness that ``seed`` names."""
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"seed must be an int or a torch.Generator, got {seed!r}"
        )
    return torch.Generator().manual_seed(seed)


def count(name: str, value: int) -> int:
    """``value`` as a positive integer, or a ValueError that names it."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number


def size(name: str, value: float) -> float:
    """``value`` as a finite number of at least 0, or an error."""
    if not isinstance(value, (int, float)) or not (0 <= value < math.inf):
        raise ValueError(
            f"{name} must be a finite number of at least 0, got {value!r}"
        )
    return float(value)


def floating(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, if it is one of real floating-point numbers."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            "dtype must be a floating-point torch.dtype such as "
            f"torch.float64, got {dtype!r}"
        )
    return dtype


def uniform(low, high, shape, source):
    """Uniform draws in double precision: rounding is the caller's last step.

    So the same seed gives the same tasks in every dtype.
    """
    draws = torch.rand(
        shape, generator=source, dtype=torch.float64, device=source.device
    )
    return low + (high - low) * draws


def normal(shape, source):
    """Standard normal draws in double precision, see `uniform`."""
    return torch.randn(
        shape, generator=source, dtype=torch.float64, device=source.device
    )


def orthonormal(rows, columns, n, source):
    """``n`` matrices with orthonormal columns, uniform (Haar) among these."""
    q, r = torch.linalg.qr(normal((n, rows, columns), source))
    # Without the signs of R's diagonal, Q would follow LAPACK's convention
    # rather than the uniform distribution.
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
