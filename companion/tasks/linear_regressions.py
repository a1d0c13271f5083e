"""Linear regressions: tasks with a Bayes-optimal answer to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from companion.calculus import dot
from companion.tasks._drawing import (
    Drawn,
    Seed,
    count,
    floating,
    generator,
    normal,
    orthonormal,
    size,
)

__all__ = [
    "LinearRegressions",
    "linear_regression_loss",
    "linear_regressions",
]

_DESIGNS = ("gaussian", "orthonormal")


@dataclass(frozen=True, eq=False)
class LinearRegressions(Drawn):
    """Tasks of `linear_regressions`, with the weights that made them.

    ``weights`` has the shape (n_tasks, dim). For Gaussian inputs, task i's
    population loss is ½‖θ - weights[i]‖² plus half the noise variance.
    """

    weights: torch.Tensor


def linear_regression_loss(theta, data):
    """The loss ½ mean_j (x_jᵀ θ - y_j)² of ``data = (X, y)``.

    Parameters
    ----------
    theta
        A tensor of shape (dim,) or a sympy column.
    data
        The pair ``(X, y)``: the design of shape (m, dim) and the m targets,
        both of the algebra of ``theta``. The gradient is Xᵀ(Xθ - y)/m and the
        Hessian XᵀX/m.

    Returns
    -------
    Tensor or sympy expression
        A scalar.

    Examples
    --------
    >>> X, y = torch.eye(2), torch.tensor([0.0, 2.0])
    >>> linear_regression_loss(torch.zeros(2), (X, y))
    tensor(1.)
    """
    X, y = data
    residual = X @ theta - y
    return dot(residual, residual) / (2 * len(y))


def linear_regressions(
    n_tasks: int,
    shots: int,
    query_shots: int,
    dim: int,
    *,
    spread: float = 1.0,
    noise: float = 0.1,
    design: str = "gaussian",
    seed: Seed,
    dtype: torch.dtype = torch.float64,
) -> LinearRegressions:
    """Linear regressions y = X w_i + noise, for `linear_regression_loss`.

    Parameters
    ----------
    n_tasks
        How many tasks to draw.
    shots
        m, the number of examples that each task adapts on.
    query_shots
        q, the number of examples that it is judged on.
    dim
        The length of w.
    spread
        The standard deviation σ_w of the weights' coordinates: w_i is
        N(0, spread² I).
    noise
        The standard deviation σ of the noise on y, independent and normal.
    design
        ``"gaussian"``: standard normal rows. ``"orthonormal"``: uniform among
        the designs with XᵀX/m = I (for the query XᵀX/q = I), which needs at
        least ``dim`` shots.
    seed
        An int, or a ``torch.Generator``, which is advanced.
    dtype
        float64 by default.

    Returns
    -------
    LinearRegressions
        A `TaskBatch`: ``support = (X, y)`` of shapes (n_tasks, shots, dim) and
        (n_tasks, shots), the same for ``query``; besides, ``weights`` of shape
        (n_tasks, dim), for closed forms.

    Raises
    ------
    ValueError
        If a count is no positive integer, ``spread`` or ``noise`` is negative,
        the design is unknown, or an orthonormal one has too few shots.
    TypeError
        If ``seed`` or ``dtype`` is of the wrong kind.

    Notes
    -----
    The tasks of the book's chapter "The objective" on the best inner rate.

    Examples
    --------
    >>> tasks = linear_regressions(
    ...     5, shots=4, query_shots=8, dim=2, design="orthonormal", seed=0
    ... )
    >>> X, y = tasks.support
    >>> torch.allclose(X[0].T @ X[0] / 4, torch.eye(2, dtype=X.dtype))
    True
    """
    n_tasks, dim = count("n_tasks", n_tasks), count("dim", dim)
    shots = count("shots", shots)
    query_shots = count("query_shots", query_shots)
    spread, noise = size("spread", spread), size("noise", noise)
    dtype = floating(dtype)
    if design not in _DESIGNS:
        raise ValueError(
            f"design must be one of {', '.join(map(repr, _DESIGNS))}, "
            f"got {design!r}"
        )
    for name, rows in (("shots", shots), ("query_shots", query_shots)):
        if design == "orthonormal" and rows < dim:
            raise ValueError(
                f"an orthonormal design needs {name} >= dim, got "
                f"{name}={rows} for dim={dim}; take more {name} or "
                "design='gaussian'"
            )
    source = generator(seed)
    weights = spread * normal((n_tasks, dim), source)

    def examples(rows):
        if design == "orthonormal":
            X = math.sqrt(rows) * orthonormal(rows, dim, n_tasks, source)
        else:
            X = normal((n_tasks, rows, dim), source)
        y = (X @ weights.unsqueeze(-1)).squeeze(-1)
        return X.to(dtype), (y + noise * normal(y.shape, source)).to(dtype)

    return LinearRegressions(
        support=examples(shots),
        query=examples(query_shots),
        weights=weights.to(dtype),
    )
