"""Quadratic tasks: where every question has an answer in closed form."""

from __future__ import annotations

import math

import torch

from companion.calculus import dot
from companion.objective import TaskBatch
from companion.tasks._drawing import (
    Seed,
    count,
    floating,
    generator,
    normal,
    orthonormal,
    size,
    uniform,
)

__all__ = ["quadratic_loss", "quadratics"]


def quadratic_loss(theta, data):
    """The loss ½ (θ - c)ᵀ A (θ - c) of ``data = (A, c)``.

    Parameters
    ----------
    theta
        A tensor of shape (dim,) or a sympy column.
    data
        The pair ``(A, c)``: a matrix of shape (dim, dim) and a vector, both
        of the algebra of ``theta``. For a symmetric A the gradient is
        A (θ - c) and the Hessian A.

    Returns
    -------
    Tensor or sympy expression
        A scalar.

    Examples
    --------
    >>> A, c = torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2)
    >>> quadratic_loss(torch.ones(2), (A, c))
    tensor(2.)
    """
    A, c = data
    return dot(theta - c, A @ (theta - c)) / 2


def quadratics(
    n_tasks: int,
    dim: int,
    *,
    seed: Seed,
    eigenvalues: tuple[float, float] = (0.2, 1.0),
    spread: float = 1.0,
    commuting: bool = False,
    dtype: torch.dtype = torch.float64,
) -> TaskBatch:
    """Random strictly convex quadratics, for `quadratic_loss`.

    Task i is ½ (θ - c_i)ᵀ A_i (θ - c_i): A_i has independent eigenvalues,
    uniform in the given range, in a uniformly random orthonormal basis, and
    c_i is N(0, spread² I).

    Parameters
    ----------
    n_tasks
        How many tasks to draw.
    dim
        The length of θ.
    seed
        An int, or a ``torch.Generator``, which is advanced.
    eigenvalues
        The range ``(smallest, largest)`` of the curvatures, positive.
    spread
        The standard deviation of the coordinates of the centres.
    commuting
        If true, all A_i have one eigenbasis, so that they commute.
    dtype
        float64 by default.

    Returns
    -------
    TaskBatch
        ``support = query = (A, c)`` (the same tensors) with A of shape
        (n_tasks, dim, dim), symmetric, and c of shape (n_tasks, dim).

    Raises
    ------
    ValueError
        If a count is no positive integer, the range of eigenvalues is empty
        or not positive, or ``spread`` is negative.
    TypeError
        If ``seed`` or ``dtype`` is of the wrong kind.

    Notes
    -----
    K gradient steps take θ to c + (I - αA)^K (θ - c), so the meta-objective
    is quadratic with the matrices (I - αA_i)^K A_i (I - αA_i)^K: see the
    book's ``thm-filter``.

    Examples
    --------
    >>> tasks = quadratics(5, dim=2, seed=0)
    >>> A, c = tasks.support
    >>> tuple(A.shape), tuple(c.shape)
    ((5, 2, 2), (5, 2))
    """
    n_tasks, dim = count("n_tasks", n_tasks), count("dim", dim)
    try:
        low, high = eigenvalues
        proper = 0 < low <= high < math.inf
    except (TypeError, ValueError):
        proper = False
    if not proper:
        raise ValueError(
            "eigenvalues must be a range (smallest, largest) with "
            f"0 < smallest <= largest, got {eigenvalues!r}"
        )
    spread = size("spread", spread)
    dtype = floating(dtype)
    source = generator(seed)
    curvatures = uniform(low, high, (n_tasks, 1, dim), source)
    basis = orthonormal(dim, dim, 1 if commuting else n_tasks, source)
    A = (basis * curvatures) @ basis.mT
    A = (A + A.mT) / 2
    c = spread * normal((n_tasks, dim), source)
    data = A.to(dtype), c.to(dtype)
    return TaskBatch(support=data, query=data)
