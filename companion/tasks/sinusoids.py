"""The regression benchmark of the MAML paper: sine curves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from companion.tasks._drawing import (
    Drawn,
    Seed,
    count,
    floating,
    generator,
    uniform,
)

__all__ = ["Sinusoids", "sinusoids"]


@dataclass(frozen=True, eq=False)
class Sinusoids(Drawn):
    """Tasks of `sinusoids`, with the curves that they were drawn from.

    ``amplitude`` and ``phase`` have the shape (n_tasks,): the curve of task i
    is ``amplitude[i] * torch.sin(x - phase[i])``.
    """

    amplitude: torch.Tensor
    phase: torch.Tensor


def sinusoids(
    n_tasks: int,
    shots: int,
    query_shots: int,
    *,
    seed: Seed,
    dtype: torch.dtype = torch.float64,
) -> Sinusoids:
    """Sine curves y = a sin(x - b) to be learned from a few points.

    The amplitude a is uniform in [0.1, 5], the phase b in [0, π], and every
    x, of support and query alike, in [-5, 5]; there is no noise.

    Parameters
    ----------
    n_tasks
        How many tasks to draw.
    shots
        How many points each task adapts on.
    query_shots
        How many points it is judged on.
    seed
        An int, or a ``torch.Generator``, which is advanced. The same seed
        gives the same tasks, rounded to ``dtype``.
    dtype
        float64 by default.

    Returns
    -------
    Sinusoids
        A `TaskBatch`: ``support = (x, y)``, each of shape (n_tasks, shots, 1),
        ``query = (x, y)``, each of shape (n_tasks, query_shots, 1); besides,
        ``amplitude`` and ``phase``, each of shape (n_tasks,).

    Raises
    ------
    ValueError
        If a count is no positive integer.
    TypeError
        If ``seed`` or ``dtype`` is of the wrong kind.

    Notes
    -----
    The running example of the book's chapter "The objective". Finn, Abbeel &
    Levine (2017), section 5.1, give the ranges but do not say how the phase
    enters; their published code computes ``amp * sin(x - phase)``, and so do
    we.

    Examples
    --------
    >>> tasks = sinusoids(25, shots=10, query_shots=10, seed=0)
    >>> x, y = tasks.support
    >>> tuple(x.shape)
    (25, 10, 1)
    """
    n_tasks = count("n_tasks", n_tasks)
    shots = count("shots", shots)
    query_shots = count("query_shots", query_shots)
    dtype = floating(dtype)
    source = generator(seed)
    amplitude = uniform(0.1, 5.0, n_tasks, source)
    phase = uniform(0.0, math.pi, n_tasks, source)
    x = uniform(-5.0, 5.0, (n_tasks, shots + query_shots, 1), source)
    y = amplitude[:, None, None] * torch.sin(x - phase[:, None, None])
    x, y = x.to(dtype), y.to(dtype)
    return Sinusoids(
        support=(x[:, :shots], y[:, :shots]),
        query=(x[:, shots:], y[:, shots:]),
        amplitude=amplitude.to(dtype),
        phase=phase.to(dtype),
    )
