"""Generalisation over tasks and shots: closed forms, estimates and bounds.

Derived in the book's chapter "Generalisation". The closed forms take sympy
symbols and numbers alike; what is drawn, refitted or enumerated takes tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sympy as sp
import torch
from scipy import stats

from companion.calculus import Parameters, ravel
from companion.objective import Task, TaskBatch, Tasks, check_tasks
from companion.tasks import linear_regressions
from companion.tasks._drawing import Seed, count

__all__ = [
    "Estimate",
    "MonteCarlo",
    "Stability",
    "confidence_interval",
    "excess_risk",
    "generalization_gap",
    "leave_one_out",
    "meta_regression",
    "meta_ridge",
    "monte_carlo",
    "rademacher_bound",
    "rademacher_complexity",
    "replace_one",
    "stability_bound",
    "wasserstein_bound",
]

_ENUMERABLE = 20
_ROUNDING = 1e-10


class Estimate(NamedTuple):
    """A mean of draws, with a confidence interval for what it estimates.

    ``low`` and ``high`` are in the units of ``value``; ``level`` is the
    coverage, such as 0.95.
    """

    value: float
    low: float
    high: float
    level: float

    def covers(self, number: float) -> bool:
        """Whether ``number`` is in the interval."""
        return bool(self.low <= number <= self.high)


def confidence_interval(samples, level: float = 0.95) -> Estimate:
    """The mean of independent draws, with Student's confidence interval.

    Parameters
    ----------
    samples
        At least two independent draws of one distribution with a variance.
    level
        The coverage, between 0 and 1. Exact for normal draws, and by the
        central limit theorem approximate for many others.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        If there are fewer than two samples, one is not finite, or the level
        is not between 0 and 1.

    Examples
    --------
    >>> confidence_interval([1.0, 2.0, 3.0]).covers(2.5)
    True
    """
    samples = np.asarray(samples, dtype=float).ravel()
    if len(samples) < 2 or not np.isfinite(samples).all():
        raise ValueError(
            "samples must be at least two finite numbers, got "
            f"{len(samples)} with {np.isfinite(samples).sum()} finite ones"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    middle, error = samples.mean(), stats.sem(samples)
    reach = error * stats.t.ppf((1 + level) / 2, len(samples) - 1)
    return Estimate(
        *map(float, (middle, middle - reach, middle + reach, level))
    )


# The Gaussian linear model, exactly. ----------------------------------------


def excess_risk(
    n_tasks, shots, query_shots, dim, *, lr, steps=1, spread, noise
):
    """The expected excess risk of MAML's linear model over N tasks.

    With r = (1 - α)^K, the excess of the empirical minimiser is

        E F(θ̂) - min F = d/(2N) [r² σ_w² + σ²/q + (1 - r)² σ²/m].

    Parameters
    ----------
    n_tasks, shots, query_shots, dim
        N tasks, m support and q query examples each, d weights.
    lr, steps
        Of the inner gradient descent on the loss ½ mean (xᵀ θ - y)²; the
        query loss is the same.
    spread, noise
        The standard deviations σ_w of a task's weights, per coordinate, and σ
        of the noise on y, in the units of the weights and of y.

    Returns
    -------
    float or sympy expression
        In the squared units of y; of the algebra of the arguments (an array
        where one of them is an array).

    Raises
    ------
    ValueError
        If r = 0: then F and its empirical version are constant in θ, every θ
        is a minimiser, and the excess is zero, which is not the limit of the
        formula. If a number of shots is less than the dimension.

    Notes
    -----
    The book's ``thm-excess-risk``; own. The hypotheses: weights of mean c̄ and
    covariance σ_w² I, noise of mean 0 and variance σ², all independent of each
    other and of the designs; orthonormal designs, Xᵀ X = m I for the support
    and q I for the query; r ≠ 0. Normality is not needed. θ̂ is the minimiser
    of the empirical meta-objective F̂, the mean of the N tasks' query losses
    after adapting: the mean over tasks of c_i + (ξ^q_i - (1 - r) ξ_i)/r, where
    ξ_i and ξ^q_i, of covariances σ²/m I and σ²/q I, are the noises as the
    parameters see them. F is F̂ on a new task: ½ r² ‖θ - c̄‖² and a constant.

    Examples
    --------
    >>> N, d, sigma = sp.symbols("N d sigma", positive=True)
    >>> excess_risk(N, 4, 4, d, lr=0, spread=0, noise=sigma)
    d*sigma**2/(8*N)
    """
    shrink = (1 - lr) ** steps
    if np.any(np.asarray(shrink == 0)):
        raise ValueError(
            "lr = 1 adapts to the support alone: the meta-objective is "
            "constant in theta and has no single minimiser; take lr != 1"
        )
    for name, rows in (("shots", shots), ("query_shots", query_shots)):
        numbers = isinstance(rows, int) and isinstance(dim, int)
        if numbers and rows < dim:
            raise ValueError(
                f"an orthonormal design needs {name} >= dim, got "
                f"{name}={rows} for dim={dim}"
            )
    variance = (
        shrink**2 * spread**2
        + noise**2 / query_shots
        + (1 - shrink) ** 2 * noise**2 / shots
    )
    return dim * variance / (2 * n_tasks)


def generalization_gap(
    n_tasks, shots, query_shots, dim, *, lr, steps=1, spread, noise
):
    """The expected gap E [F(θ̂) - F̂(θ̂)] between new and training tasks.

    It is twice the `excess_risk`, under the same hypotheses and with the same
    arguments: in a least-squares problem the training tasks look as much too
    easy as new tasks are too hard.

    Returns
    -------
    float or sympy expression

    Raises
    ------
    ValueError
        As `excess_risk`.

    Notes
    -----
    The book's ``cor-gap``; own. The N tasks of F̂ are seen with the very
    support and query on which θ̂ was fitted; F draws task, support and query
    anew.
    """
    return 2 * excess_risk(
        n_tasks, shots, query_shots, dim,
        lr=lr, steps=steps, spread=spread, noise=noise,
    )  # fmt: skip


# The linear model, fitted. --------------------------------------------------


def meta_regression(
    tasks: Tasks, lr, steps: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """MAML with a linear model, as the least-squares problem that it is.

    Adapting on (X, y) is affine, θ' = Mθ + b with M = (I - α Xᵀ X/m)^K, so the
    query residuals are Zθ - t with Z = X_q M and t = y_q - X_q b.

    Parameters
    ----------
    tasks
        `linear_regressions`, or other tasks of this form and one shape.
    lr, steps
        Of the inner gradient descent on `linear_regression_loss`.

    Returns
    -------
    Z : Tensor
        Of shape (n_tasks, query_shots, dim).
    t : Tensor
        Of shape (n_tasks, query_shots). The meta-objective is
        F̂(θ) = ½ mean (Zθ - t)².

    Raises
    ------
    ValueError, TypeError
        If the tasks are empty, or of different shapes.

    Notes
    -----
    The book's chapter "Generalisation"; nothing is assumed of the designs.
    """
    tasks = _stacked(tasks)
    (X, y), (X_query, y_query) = tasks.support, tasks.query
    second_moment = X.mT @ X / X.shape[-2]
    target = (X.mT @ y.unsqueeze(-1)) / X.shape[-2]
    M = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    b = torch.zeros_like(target)
    for _ in range(steps):
        M = M - lr * second_moment @ M
        b = b - lr * (second_moment @ b - target)
    return X_query @ M, y_query - (X_query @ b).squeeze(-1)


def _stacked(tasks):
    tasks = check_tasks(tasks)
    return tasks if isinstance(tasks, TaskBatch) else TaskBatch.of(tasks)


def meta_ridge(
    tasks: Tasks, lr, steps: int = 1, *, strength: float = 0.0
) -> torch.Tensor:
    """The minimiser of F̂(θ) + strength/2 ‖θ‖² for a linear model.

    Parameters
    ----------
    tasks, lr, steps
        As for `meta_regression`.
    strength
        λ, at least 0.

    Returns
    -------
    Tensor
        θ̂, of shape (dim,).

    Raises
    ------
    ValueError
        If the strength is negative, or the minimiser is not unique.
    """
    tasks = _stacked(tasks)
    Z, t = meta_regression(tasks, lr, steps)
    Z, t = Z.flatten(0, -2), t.flatten()
    # At the rate 1 an orthonormal design leaves rounding errors in Z.
    scale = float(torch.linalg.matrix_norm(tasks.query[0].flatten(0, -2)))
    return _ridge(Z, t, strength * len(t), floor=_ROUNDING * scale)


def _ridge(Z, t, penalty, floor=0.0):
    """The minimiser of ½‖Zθ - t‖² + penalty/2 ‖θ‖², if there is one."""
    if not penalty >= 0:
        raise ValueError(f"strength must be at least 0, got {float(penalty)}")
    root = math.sqrt(penalty) * torch.eye(Z.shape[-1], dtype=Z.dtype)
    Z, t = torch.cat([Z, root]), torch.cat([t, t.new_zeros(len(root))])
    if torch.linalg.matrix_rank(Z, atol=floor) < Z.shape[-1]:
        raise ValueError(
            "the least-squares solution is not unique: there are fewer "
            "independent examples than weights; take strength > 0"
        )
    return torch.linalg.lstsq(Z, t).solution


class MonteCarlo(NamedTuple):
    """What `monte_carlo` returns: `Estimate` s in the squared units of y.

    ``excess`` is of `excess_risk`, ``gap`` of `generalization_gap`.
    """

    excess: Estimate
    gap: Estimate


def monte_carlo(
    n_tasks: int,
    shots: int,
    query_shots: int,
    dim: int,
    *,
    lr: float,
    steps: int = 1,
    spread: float,
    noise: float,
    design: str = "orthonormal",
    repeats: int,
    level: float = 0.95,
    seed: Seed,
) -> MonteCarlo:
    """Excess risk and gap by drawing tasks, fitting, and testing on others.

    Each repeat fits θ̂ by least squares on N tasks of `linear_regressions`, and
    judges it on N fresh ones. The means over repeats are unbiased.

    Parameters
    ----------
    n_tasks, shots, query_shots, dim, lr, steps, spread, noise
        As for `excess_risk`, numbers only.
    design
        As for `linear_regressions`. With ``"gaussian"`` there is no closed
        form here to compare with.
    repeats
        How often to draw and fit, at least 2.
    level
        Of the confidence intervals, see `confidence_interval`.
    seed
        An int, or a ``torch.Generator``, which is advanced.

    Returns
    -------
    MonteCarlo

    Raises
    ------
    ValueError
        If the draws cannot be made, or the least-squares problem has no
        unique solution.

    Notes
    -----
    No formula of the excess enters: the mean weight is zero, where F is
    smallest for either design, and F(θ̂) - F(0) is measured on the fresh tasks.

    Examples
    --------
    >>> model = dict(lr=0.5, spread=1.0, noise=0.5)
    >>> drawn = monte_carlo(5, 4, 4, 2, **model, repeats=500, seed=0)
    >>> drawn.excess.covers(excess_risk(5, 4, 4, 2, **model))
    True
    """
    n_tasks, repeats = count("n_tasks", n_tasks), count("repeats", repeats)
    drawn = linear_regressions(
        2 * repeats * n_tasks, shots, query_shots, dim,
        spread=spread, noise=noise, design=design, seed=seed,
    )  # fmt: skip
    Z, t = meta_regression(drawn, lr, steps)
    rows = n_tasks * query_shots
    Z, fresh_Z = Z.reshape(2, repeats, rows, dim)
    t, fresh_t = t.reshape(2, repeats, rows)
    # The designs are of the size of 1, and Z too where it is not rounding.
    if (torch.linalg.matrix_rank(Z, atol=_ROUNDING) < dim).any():
        raise ValueError(
            "the meta-objective has no single minimiser for lr="
            f"{lr}, n_tasks={n_tasks}, query_shots={query_shots}, dim={dim}; "
            "take another lr or more query_shots"
        )
    theta = torch.linalg.lstsq(Z, t.unsqueeze(-1)).solution

    def risk(Z, t, theta):
        return ((Z @ theta).squeeze(-1) - t).square().mean(-1) / 2

    tested = risk(fresh_Z, fresh_t, theta)
    excess = tested - risk(fresh_Z, fresh_t, torch.zeros_like(theta))
    return MonteCarlo(
        confidence_interval(excess, level),
        confidence_interval(tested - risk(Z, t, theta), level),
    )


# Leaving out and replacing. -------------------------------------------------


def leave_one_out(X, y, *, strength=0.0, method: str = "shortcut"):
    """What each example's residual would be, had it been left out of the fit.

    For the θ̂ that minimises ½‖y - Xθ‖² + strength/2 ‖θ‖² (sums, not means), no
    refit is needed: with the hat matrix H = X (Xᵀ X + λI)⁻¹ Xᵀ,

        y_j - x_jᵀ θ̂_{-j} = (y_j - x_jᵀ θ̂) / (1 - H_jj).

    Parameters
    ----------
    X
        The design, a tensor or sympy matrix of shape (n, d); or a tensor of
        shape (N, q, d), N blocks of q examples that are left out together (the
        tasks Z, t of `meta_regression`), where 1 - H_jj becomes a matrix.
    y
        The targets, of shape (n,) or (N, q); a column for sympy.
    strength
        λ, the same in all fits.
    method
        ``"shortcut"``, or ``"refit"``: a fit for each, the slow referee.

    Returns
    -------
    Tensor or sympy expression
        The left-out residuals, of the shape of ``y`` (a column for sympy); the
        mean of their squares estimates the squared error on a new example.

    Raises
    ------
    ValueError
        If the method is unknown, the strength negative, or a fit without one
        example has no unique solution.

    Notes
    -----
    The book's ``thm-leave-one-out``: Sherman, Morrison and Woodbury's formula.

    Examples
    --------
    >>> X, y = sp.Matrix([1, 1, 1]), sp.Matrix([0, 3, 6])
    >>> leave_one_out(X, y).T
    Matrix([[-9/2, 0, 9/2]])
    """
    if method not in ("shortcut", "refit"):
        raise ValueError(
            f"method must be 'shortcut' or 'refit', got {method!r}"
        )
    if isinstance(X, sp.MatrixBase):
        return _symbolic_leave_one_out(X, y, strength, method)
    if X.ndim == 2:
        blocks = leave_one_out(
            X.unsqueeze(1), y.unsqueeze(1), strength=strength, method=method
        )
        return blocks.squeeze(1)
    rows = X.flatten(0, 1)
    if method == "refit":
        return torch.stack([
            y[j] - X[j] @ _ridge(
                torch.cat([X[:j], X[j + 1 :]]).flatten(0, 1),
                torch.cat([y[:j], y[j + 1 :]]).flatten(),
                strength,
            )
            for j in range(len(X))
        ])  # fmt: skip
    residual = y - X @ _ridge(rows, y.flatten(), strength)
    moment = rows.T @ rows
    moment.diagonal().add_(strength)
    hat = X @ torch.linalg.solve(moment, X.mT)
    kept = torch.eye(X.shape[1], dtype=X.dtype, device=X.device) - hat
    if (torch.linalg.matrix_rank(kept, hermitian=True) < len(kept[0])).any():
        raise ValueError(
            "the least-squares solution without some example is not unique; "
            "take strength > 0"
        )
    return torch.linalg.solve(kept, residual.unsqueeze(-1)).squeeze(-1)


def _symbolic_leave_one_out(X, y, strength, method):
    def fit(X, y):
        return (X.T * X + strength * sp.eye(X.cols)).LUsolve(X.T * y)

    if method == "refit":
        left_out = []
        for j in range(X.rows):
            others, targets = X.copy(), y.copy()
            others.row_del(j)
            targets.row_del(j)
            left_out.append(y[j] - (X[j, :] * fit(others, targets))[0])
        return sp.Matrix(left_out)
    residual, hat = y - X * fit(X, y), X * fit(X, sp.eye(X.rows))
    return sp.Matrix([residual[j] / (1 - hat[j, j]) for j in range(X.rows)])


class Stability(NamedTuple):
    """What `replace_one` returns, with θ̂⁽ⁱ⁾ the fit with task i replaced.

    ``changes`` (n_tasks,) has the loss of task i at θ̂⁽ⁱ⁾ minus that at θ̂: its
    mean is an unbiased estimate of the generalisation gap. ``moves``
    (n_tasks,) are the distances ‖θ̂⁽ⁱ⁾ - θ̂‖. ``largest`` is the largest change
    of the loss of any task at hand by any replacement: a lower estimate of the
    uniform stability.
    """

    changes: torch.Tensor
    moves: torch.Tensor
    largest: torch.Tensor


def replace_one(
    fit: Callable[[Tasks], Parameters],
    risk: Callable[[Parameters, Task], Any],
    tasks: Tasks,
    others: Tasks,
) -> Stability:
    """Replace each task by another, fit again, and see what changes.

    Parameters
    ----------
    fit
        ``fit(tasks)``, the parameters learned from tasks. Deterministic.
    risk
        ``risk(theta, task)``, one task's query loss, a number.
    tasks
        The N tasks of the fit.
    others
        As many independent tasks; ``others[i]`` replaces ``tasks[i]``.

    Returns
    -------
    Stability

    Raises
    ------
    ValueError
        If there are not as many others as tasks.

    Notes
    -----
    The book's ``thm-replace-one``. For tasks drawn independently,
    E [F(θ̂) - F̂(θ̂)] is the mean over i of
    E [risk(θ̂⁽ⁱ⁾, task i) - risk(θ̂, task i)], since task i is to θ̂⁽ⁱ⁾ what a
    new task is to θ̂. The uniform stability of Bousquet & Elisseeff (2002) is
    the supremum of such changes over all tasks.
    It costs N + 1 fits and 2N (N + 1) risks.
    """
    tasks, others = check_tasks(tasks), check_tasks(others)
    if len(tasks) != len(others):
        raise ValueError(
            f"others must be as many as tasks, {len(tasks)}, got {len(others)}"
        )
    stack = TaskBatch.of if isinstance(tasks, TaskBatch) else tuple
    tasks, others = list(tasks), list(others)

    def risks(theta, of: Sequence[Task]):
        with torch.no_grad():
            return torch.stack([
                torch.as_tensor(risk(theta, task)) for task in of
            ])  # fmt: skip

    theta = fit(stack(tasks))
    before, start = risks(theta, tasks + others), ravel(theta)[0]
    changes, moves = [], []
    for i, other in enumerate(others):
        without = fit(stack([*tasks[:i], other, *tasks[i + 1 :]]))
        changes.append(risks(without, tasks + others) - before)
        moves.append((ravel(without)[0] - start).norm())
    table = torch.stack(changes)
    return Stability(
        table.diagonal().clone(), torch.stack(moves), table.abs().max()
    )


def stability_bound(lipschitz, strength, n_tasks):
    """The uniform stability 2G²/(λN) of a regularised fit.

    If every task's risk is convex and G-Lipschitz in θ, the minimiser of
    mean risk + λ/2 ‖θ‖² moves by at most 2G/(λN) when one of N tasks is
    replaced, so every risk changes by at most 2G²/(λN); and the expected gap
    is at most that.

    Parameters
    ----------
    lipschitz, strength, n_tasks
        G, λ > 0 and N: numbers or symbols.

    Returns
    -------
    float or sympy expression

    Raises
    ------
    ValueError
        If ``lipschitz`` is negative, or another is not positive.

    Notes
    -----
    The book's ``thm-replace-one``. Convexity may be given up where the sum of
    mean risk and penalty is λ-strongly convex. The risks need to be G-Lipschitz
    only where the two minimisers are.

    Examples
    --------
    >>> stability_bound(1.0, 0.5, 100)
    0.04
    """
    for name, value, fits in (
        ("lipschitz of at least 0", lipschitz, lipschitz >= 0),
        ("strength above 0", strength, strength > 0),
        ("n_tasks above 0", n_tasks, n_tasks > 0),
    ):
        # A symbol of unknown sign gives a relation, which is not False.
        if fits == False:
            raise ValueError(f"the bound needs {name}, got {value!r}")
    return 2 * lipschitz**2 / (strength * n_tasks)


# Classes and distances. -----------------------------------------------------


def rademacher_complexity(X: torch.Tensor, radius: float = 1.0) -> float:
    """The empirical Rademacher complexity of linear functions, exactly.

    For the functions x ↦ wᵀ x with ‖w‖ ≤ B it is
    E_s (1/n) sup_w Σ_j s_j wᵀ x_j = (B/n) E_s ‖Σ_j s_j x_j‖, the mean over
    all 2^n signs s.

    Parameters
    ----------
    X
        The n points, of shape (n, d).
    radius
        B, at least 0.

    Returns
    -------
    float
        In the units of wᵀ x.

    Raises
    ------
    ValueError
        If there is no point or more than 20, or the radius is negative.

    Notes
    -----
    The book's ``prop-rademacher``; `rademacher_bound` is above it, and by a
    factor of at most √2 R √n / √(Σ‖x_j‖²): the √2 is the constant of
    Khintchine's inequality, attained by two points at one place.

    Examples
    --------
    >>> rademacher_complexity(torch.eye(4))
    0.5
    """
    n = len(_points(X, radius))
    if n > _ENUMERABLE:
        raise ValueError(
            f"X must have at most {_ENUMERABLE} points to go through all "
            f"signs, got {n}, that is 2^{n} sums; see rademacher_bound"
        )
    # A sum and its mirror image have one norm: the first sign can stay.
    sums = X[:1].double()
    for x in X[1:].double():
        sums = torch.cat([sums + x, sums - x])
    return float(radius * sums.norm(dim=1).mean() / n)


def rademacher_bound(X: torch.Tensor, radius: float = 1.0) -> float:
    """The bound BR/√n on `rademacher_complexity`, R the largest ‖x_j‖.

    Parameters
    ----------
    X, radius
        As there, with any number of points.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If there is no point, or the radius is negative.

    Notes
    -----
    By Jensen's inequality the complexity is at most (B/n) √(Σ‖x_j‖²), with
    equality for orthogonal points, and this at most BR/√n, with equality for
    points of one length.

    Examples
    --------
    >>> rademacher_bound(torch.eye(4))
    0.5
    """
    n = len(_points(X, radius))
    return float(radius * X.double().norm(dim=1).max() / math.sqrt(n))


def _points(X, radius):
    if X.ndim != 2 or not len(X):
        raise ValueError(
            f"X must hold points, of shape (n, d), got {tuple(X.shape)}"
        )
    if not radius >= 0:
        raise ValueError(f"radius must be at least 0, got {radius!r}")
    return X


def wasserstein_bound(
    lipschitz: float,
    source,
    target,
    source_weights=None,
    target_weights=None,
) -> float:
    """The bound Lip(f) W₁(P, Q) on the gap E_P f - E_Q f, in 1-D.

    What a Lipschitz constant does say about new data: how fast a risk can
    change when their distribution does.

    Parameters
    ----------
    lipschitz
        Lip(f), at least 0, in units of f per unit of x.
    source, target
        The points of P and of Q, on a line.
    source_weights, target_weights
        Their probabilities, up to a factor; equal ones by default.

    Returns
    -------
    float
        In the units of f.

    Raises
    ------
    ValueError
        If ``lipschitz`` is negative, or scipy refuses points or weights.

    Notes
    -----
    The book's ``thm-wasserstein``: the easy half of the duality of Kantorovich
    and Rubinstein; its other half says that some f attains the bound.
    `scipy.stats.wasserstein_distance` computes W₁ of the two samples as they
    are: for samples *from* P and Q it is an estimate only.

    Examples
    --------
    >>> wasserstein_bound(2.0, [0.0, 1.0], [0.5, 1.5])
    1.0
    """
    if not lipschitz >= 0:
        raise ValueError(f"lipschitz must be at least 0, got {lipschitz!r}")
    return float(
        lipschitz
        * stats.wasserstein_distance(
            source, target, source_weights, target_weights
        )
    )
