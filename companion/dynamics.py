"""Vector fields dθ/dt = f(t, θ) and what can be said about them.

Fields are plain functions ``field(t, theta)`` that return what ``theta`` is: a
tensor, a tree of tensors, a numpy array, or (where a solver is not needed) a
sympy expression or column. A field that is not finite, has the wrong shape,
blows up or is too stiff for its solver is an error that tells the time; it is
never returned as numbers. Derived in the chapter "Gradient flow".
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import sympy as sp
import torch

from companion.calculus import (
    Parameters,
    check_parameters,
    dot,
    gradient,
    is_finite,
    is_symbolic,
    jacobian,
    ravel,
    scalar,
    tree_leaves,
    tree_map,
    tree_structure,
    under_transform,
)
from companion.integrate import IntegrationError, Solution, solve
from companion.objective import meta_objective

__all__ = [
    "Field",
    "IntegrationError",
    "Linearisation",
    "Trajectory",
    "euler",
    "gradient_flow",
    "linearise",
    "meta_flow",
    "modified_field",
    "modified_loss",
    "sensitivity",
    "solve_flow",
    "stable_step",
    "variational",
]

Field = Callable[[Any, Parameters], Parameters]
Verdict = Literal["stable", "unstable", "centre", "undecided"]


# Fields. --------------------------------------------------------------------


def gradient_flow(loss: Callable, data: Any = None) -> Field:
    """The field f(t, θ) = -∇L(θ) of gradient descent with tiny steps.

    Parameters
    ----------
    loss
        ``loss(theta, data)``, a scalar.
    data
        What the loss needs beside θ.

    Returns
    -------
    Callable
        ``field(t, theta)``, structured as ``theta``: symbols, tensors, trees
        of tensors, or a numpy array (the loss then sees a tensor). The time
        is not used. `eq-gradient-flow` in the book.

    Examples
    --------
    >>> x, t = sp.symbols("x t")
    >>> gradient_flow(lambda x, data: x**4 / 4)(t, x)
    -x**3
    """

    def descend(t, theta):
        return _through_torch(
            lambda theta: tree_map(
                lambda slope: -slope, gradient(loss)(theta, data)
            ),
            theta,
        )

    return descend


def meta_flow(loss: Callable, tasks: Any, inner: Any) -> Field:
    """The field f(t, θ) = -∇F(θ) of the meta-objective.

    Parameters
    ----------
    loss, tasks, inner
        As for `companion.meta_objective`, whose gradient is taken exactly,
        through the adaptation. This is the flow of meta-learning; that of the
        source article (``article.meta_learning_ode``) is joint training.

    Returns
    -------
    Callable
        ``field(t, theta)``, as `gradient_flow`.
    """

    def objective(theta, data):
        return meta_objective(loss, theta, tasks, inner)

    return gradient_flow(objective)


def variational(field: Field) -> Field:
    """The field of the pair (θ, S): f(t, θ) and f_θ(t, θ) S.

    Its solution from (θ, I) carries ∂θ(t)/∂θ(0) in S. On symbols S is a sympy
    matrix; on tensors its last axis runs over the directions, after the axes
    of θ. `prop-variational` in the book.

    Examples
    --------
    >>> x, s, t = sp.symbols("x s t")
    >>> variational(lambda t, x: -(x**3))(t, (x, s))
    (-x**3, -3*s*x**2)
    """

    def paired(t, state):
        theta, columns = state
        if is_symbolic(theta):
            J = jacobian(lambda theta: field(t, theta))(theta)
            return field(t, theta), J * columns

        def along(column):
            return _directional(lambda x: field(t, x), theta, column)

        return field(t, theta), torch.func.vmap(along, -1, -1)(columns)

    return paired


# Solving. -------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectory:
    """A solved flow: states of the kind that went in, at any time.

    Whatever is read from it is a fresh copy, so changing one state changes no
    other. ``times`` are the solver's own, and ``evaluations`` counts those of
    the field.
    """

    solution: Solution = field(repr=False)
    restore: Callable = field(repr=False)

    @property
    def times(self) -> np.ndarray:
        """The times at which the solver stopped, shape (steps + 1,)."""
        return self.solution.times.copy()

    @property
    def states(self) -> Parameters:
        """The states at ``times``, with a leading time axis."""
        return self.restore(self.solution.states)

    @property
    def final(self) -> Parameters:
        """The state at the end."""
        return self.restore(self.solution.states[-1])

    @property
    def evaluations(self) -> int:
        """How often the field was evaluated."""
        return self.solution.evaluations

    def __call__(self, time: Any) -> Parameters:
        """The state at a time, or with a leading axis at a vector of times.

        Between the solver's own times by its dense output.

        Raises
        ------
        ValueError
            If a time is outside the solved span: nothing is extrapolated.
        """
        if isinstance(time, torch.Tensor):
            time = time.detach().numpy()
        time = np.asarray(time, dtype=float)
        ends = self.solution.times[[0, -1]]
        if (
            time.ndim > 1
            or not ((ends.min() <= time) & (time <= ends.max())).all()
        ):
            raise ValueError(
                "time must be a number or a vector of numbers between "
                f"{ends.min():.6g} and {ends.max():.6g}, got {time}"
            )
        if len(self.solution.times) == 1:
            found = np.multiply.outer(
                self.solution.states[0], np.ones_like(time)
            )
        else:
            found = np.asarray(self.solution(time))
        return self.restore(found.T)


def solve_flow(
    field: Field,
    theta: Parameters,
    time: float,
    *,
    start: float = 0.0,
    method: str = "DOP853",
    rtol: float | None = None,
    atol: float | None = None,
    max_evaluations: int = 100_000,
) -> Trajectory:
    """Solve dθ/dt = field(t, θ) from ``theta`` at ``start`` to ``time``.

    Parameters
    ----------
    field
        ``field(t, theta)``, of the kind, structure and shapes of ``theta``.
    theta
        A float tensor, a tree of them, or a numpy array. It is not changed,
        and nothing that is returned shares memory with it.
    time
        The end; it may lie before ``start``.
    method
        One of `companion.integrate.METHODS`. ``"DOP853"`` is explicit and of
        order 8; for a stiff field take ``"Radau"``, ``"BDF"`` or ``"LSODA"``.
    rtol, atol
        Tolerances of the local error, by default 1e-9 and 1e-11, and in
        float32 1e-5 and 1e-7.
    max_evaluations
        Where to give up, which an explicit method on a stiff field will.

    Returns
    -------
    Trajectory
        Call it with a time, or read ``.times``, ``.states`` and ``.final``.

    Raises
    ------
    ValueError, TypeError
        If the field's value is of another kind, structure or shape than the
        state (with the time), or an argument is out of range.
    IntegrationError
        If the field is not finite, the solution blows up or the evaluations
        do not suffice; ``.time`` says how far it went.

    Notes
    -----
    The result carries no graph. Derivatives of a solution are `sensitivity`,
    and for gradient flows ``GradientFlow`` with ``meta_gradient``.

    Examples
    --------
    >>> path = solve_flow(lambda t, y: -y, np.array([1.0]), 1.0)
    >>> bool(abs(path.final[0] - np.exp(-1)) < 1e-9)
    True
    """
    leaves, restore, flatten = _as_vectors(theta)
    single = any(x.dtype.itemsize < 8 for x in leaves)
    rtol = (1e-5 if single else 1e-9) if rtol is None else rtol
    atol = (1e-7 if single else 1e-11) if atol is None else atol

    def f(t, y):
        return flatten(field(t, restore(y)), f"time {t:.6g}")

    solution = solve(
        f,
        flatten(theta, "the start"),
        float(time),
        start=float(start),
        method=method,
        rtol=rtol,
        atol=atol,
        dense=True,
        max_evaluations=max_evaluations,
    )
    return Trajectory(solution, restore)


def euler(
    field: Field, theta: Parameters, time: Any, steps: int
) -> list[Parameters]:
    """Euler's method: θ_{k+1} = θ_k + h f(kh, θ_k) with h = time / steps.

    Along a `gradient_flow` it is gradient descent with the rate h, and
    ``GradientDescent(lr=h, steps=steps)`` takes the same steps.

    Parameters
    ----------
    field, theta
        As for `solve_flow`, or both on symbols.
    time
        The end, a number or a sympy expression.
    steps
        How many steps, at least one.

    Returns
    -------
    list
        The ``steps + 1`` states, none sharing memory with another or with
        ``theta``. On tensors the graph is kept, so that they can be
        differentiated.

    Raises
    ------
    IntegrationError
        If a state or the field is not finite, with the time.

    Examples
    --------
    >>> x, h = sp.symbols("x h")
    >>> euler(lambda t, x: -x, x, 2 * h, 2)[-1].factor()
    x*(h - 1)**2
    """
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
        raise TypeError(f"steps must be an integer, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps}")
    symbolic = is_symbolic(theta)
    if not symbolic:
        _check_numbers(theta)
    h = sp.sympify(time) / int(steps) if symbolic else time / int(steps)
    state, path = tree_map(_fresh, theta), []
    for k in range(steps):
        path.append(state)
        speed = field(k * h, tree_map(_fresh, state))
        if not symbolic:
            when = f"time {float(k * h):.6g}"
            _check_value(speed, state, when)
            _check_finite(
                speed,
                f"the field is not finite at {when}; is the step "
                f"{float(h):.3g} stable?",
                k * h,
            )
        state = tree_map(lambda x, v: x + h * v, state, speed)
        if not symbolic:
            at = (k + 1) * h
            _check_finite(
                state,
                f"the state overflows at time {float(at):.6g}; is the step "
                f"{float(h):.3g} stable?",
                at,
            )
    return [*path, state]


def sensitivity(
    field: Field,
    theta: Parameters,
    time: float,
    *,
    directions: Parameters | None = None,
    start: float = 0.0,
    method: str = "DOP853",
    rtol: float = 1e-9,
    atol: float = 1e-11,
    max_evaluations: int = 100_000,
) -> tuple[Parameters, Parameters]:
    """θ(T) and S(T) = ∂θ(T)/∂θ(0), by the variational equation.

    Solves Ṡ = f_θ(t, θ(t)) S beside the flow. `prop-variational` in the book.

    Parameters
    ----------
    field, theta, time, start, method, rtol, atol, max_evaluations
        As for `solve_flow`; tensors only, and the field is differentiated by
        torch. For symbols see `variational`.
    directions
        S(0), by default the identity: structured as ``theta``, with one more
        axis at the end of every leaf, over the directions.

    Returns
    -------
    tuple
        θ(T), and S(T) structured as ``directions``. For a vector ``theta``
        without ``directions``, S(T) is the n×n Jacobian of the flow map.
    """
    if any(not isinstance(x, torch.Tensor) for x in tree_leaves(theta)):
        raise TypeError(
            "sensitivity needs a field of torch tensors, which can be "
            "differentiated; for symbols see companion.dynamics.variational"
        )
    check_parameters(theta)
    if directions is None:
        vector, unravel = ravel(theta)
        eye = torch.eye(len(vector), dtype=vector.dtype)
        directions = torch.func.vmap(unravel, -1, -1)(eye)
    for leaf, column in zip(
        tree_leaves(theta), _same_structure(directions, theta), strict=True
    ):
        if column.shape[:-1] != leaf.shape:
            raise ValueError(
                "directions must have the shape of theta and one axis more, "
                f"got {tuple(column.shape)} for {tuple(leaf.shape)}"
            )
    return solve_flow(
        variational(field),
        (theta, directions),
        time,
        start=start,
        method=method,
        rtol=rtol,
        atol=atol,
        max_evaluations=max_evaluations,
    ).final


# Analysis. ------------------------------------------------------------------


def stable_step(hessian: Any) -> Any:
    """The step 2/λ_max below which gradient descent on a quadratic is stable.

    Parameters
    ----------
    hessian
        A symmetric matrix (tensor, numpy array or sympy matrix), or the
        second derivative of a function of one variable.

    Returns
    -------
    Tensor, float or sympy expression
        2/λ_max. Gradient descent with a step h converges from every start
        if and only if 0 < h < 2/λ_max, provided all eigenvalues are positive;
        along directions of eigenvalue 0 it stands still, and along negative
        ones no step is stable. `prop-euler-stability` in the book.

    Raises
    ------
    ValueError
        If the matrix is not symmetric or not finite, or if λ_max ≤ 0: then
        there is no bound to give.

    Examples
    --------
    >>> a, b = sp.symbols("a b", positive=True)
    >>> stable_step(sp.diag(a, b))
    2/Max(a, b)
    """
    if is_symbolic(hessian):
        largest = _largest_symbolic(hessian)
        if largest.is_nonpositive:
            raise ValueError(_NO_BOUND.format(largest))
        return 2 / largest
    as_numpy = not isinstance(hessian, torch.Tensor)
    H = torch.as_tensor(hessian)
    if not H.is_floating_point():
        raise TypeError(f"hessian must hold floats, got {H.dtype}")
    H = H.reshape(1, 1) if H.ndim == 0 else H
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(
            f"hessian must be a square matrix, got shape {tuple(H.shape)}"
        )
    if not torch.isfinite(H).all():
        raise ValueError("hessian must be finite, got a NaN or an infinity")
    if (H - H.T).abs().max() > 1e3 * torch.finfo(H.dtype).eps * H.abs().max():
        raise ValueError(
            "hessian must be symmetric; for the field of a rotation see "
            "companion.dynamics.linearise"
        )
    largest = torch.linalg.eigvalsh(H)[-1]
    if not largest > 0:
        raise ValueError(_NO_BOUND.format(f"{float(largest):.3g}"))
    return float(2 / largest) if as_numpy else 2 / largest


_NO_BOUND = (
    "the largest eigenvalue must be positive, got {}: with no direction in "
    "which the loss curves up, no step size is the limit of stability"
)


@dataclass(frozen=True)
class Linearisation:
    """The eigenvalues of f_θ at an equilibrium, and what they prove.

    ``verdict`` is ``"stable"`` (asymptotically), ``"unstable"``, ``"centre"``
    or ``"undecided"``; ``reason`` says why in a sentence.
    """

    eigenvalues: Any
    verdict: Verdict
    reason: str
    jacobian: Any = field(repr=False)


def linearise(
    field: Field,
    theta: Parameters,
    *,
    linear: bool | None = None,
    atol: float = 1e-6,
) -> Linearisation:
    """Judge an equilibrium by the eigenvalues of the field's Jacobian there.

    - ``"stable"``: all real parts are negative, so the equilibrium is
      asymptotically (even exponentially) stable.
    - ``"unstable"``: some real part is positive; or the field is linear and
      an eigenvalue on the imaginary axis has too few eigenvectors.
    - ``"centre"``: the field is *linear*, all eigenvalues are imaginary and
      not 0, with a full set of eigenvectors. Solutions circle.
    - ``"undecided"``: anything else. For a nonlinear field with an eigenvalue
      on the imaginary axis and none to the right of it, the linear part
      decides nothing; ``-θ³`` and ``θ³`` have the same one.

    Parameters
    ----------
    field
        An autonomous field: ``field(0.0, theta)`` is what is judged.
    theta
        An equilibrium: on symbols, an expression or a column; otherwise a
        tensor, a tree of tensors, or a numpy array (whose Jacobian is taken
        by central differences).
    linear
        Whether the field is linear. By default that is found out: on symbols
        exactly, on numbers by comparing the field with its linear part at
        sixteen points near and far, to rounding. That is evidence, not proof.
    atol
        How large the norm of the field may be at an equilibrium.

    Raises
    ------
    ValueError
        If ``theta`` is no equilibrium, or if the field is not finite there.

    Notes
    -----
    Real parts below 1e-8 of the Jacobian's norm (1e-12 if it is symmetric,
    1e-6 for numpy) count as 0. `thm-linearisation` in the book.

    Examples
    --------
    >>> linearise(lambda t, x: -(x**3), sp.Integer(0)).verdict
    'undecided'
    """
    if is_symbolic(theta):
        return _linearise_symbolic(field, theta, linear)
    _, restore, flatten = _as_vectors(theta)
    point = flatten(theta, "the equilibrium")

    def f(y):
        return flatten(field(0.0, restore(y)), "the equilibrium")

    speed = f(point)
    _check_finite(speed, "the field is not finite at theta", 0.0)
    if np.linalg.norm(speed) > atol:
        raise ValueError(
            "theta must be an equilibrium, got a point where the field has "
            f"norm {np.linalg.norm(speed):.3g}; elsewhere the eigenvalues "
            "prove nothing"
        )
    numeric = isinstance(tree_leaves(theta)[0], np.ndarray)
    if numeric:
        J, rtol = _difference_jacobian(f, point), 1e-6
    else:
        J, rtol = _torch_jacobian(field, theta), 1e-8
    if not np.isfinite(J).all():
        raise ValueError("the Jacobian of the field is not finite at theta")
    size = np.linalg.norm(J, 2)
    if not numeric and np.abs(J - J.T).max() <= 1e-13 * size:
        eigenvalues, rtol = np.linalg.eigvalsh((J + J.T) / 2) + 0j, 1e-12
    else:
        eigenvalues = np.linalg.eigvals(J) + 0j
    eigenvalues = eigenvalues[np.lexsort((eigenvalues.imag, eigenvalues.real))]
    zero = rtol * size
    if linear is None:
        linear = _looks_linear(f, point, speed, J, 1e-5 if numeric else 1e-10)
    verdict, reason = _judge(
        [_sign(x.real, zero) for x in eigenvalues],
        [bool(abs(x) > zero) for x in eigenvalues],
        linear,
        lambda: _full_numeric(J, eigenvalues, zero),
    )
    as_given = torch.as_tensor if not numeric else (lambda x: x)
    return Linearisation(as_given(eigenvalues), verdict, reason, as_given(J))


def modified_loss(loss: Callable, step: Any) -> Callable:
    """The loss L + (h/4)‖∇L‖² whose flow gradient descent follows more nearly.

    Parameters
    ----------
    loss
        ``loss(theta, *data)``, a scalar.
    step
        The rate h of gradient descent: a number or a sympy symbol.

    Returns
    -------
    Callable
        ``modified(theta, *data)``, on symbols and on tensors. K steps of size
        h are off the flow of L by O(h), and off that of this loss by O(h²),
        over a fixed time Kh (Barrett and Dherin 2021).

    Examples
    --------
    >>> x, h = sp.symbols("x h")
    >>> sp.factor(modified_loss(lambda x: x**2 / 2, h)(x))
    x**2*(h + 2)/4
    """

    def modified(theta, *data):
        slope = gradient(loss)(theta, *data)
        return scalar(loss(theta, *data)) + step * dot(slope, slope) / 4

    return modified


def modified_field(field: Field, step: Any, order: int = 3) -> Field:
    """The field f + h f₂ + h² f₃ whose flow Euler's method follows.

    With Df the derivative of f along f, f₂ = -½ Df and f₃ = D²f/12 + f'Df/4,
    which is f''(f, f)/12 + f'f'f/3.

    Parameters
    ----------
    field
        An autonomous field, of symbols or of tensors (the time is handed on
        and not differentiated).
    step
        The step h of Euler's method, a number or a sympy symbol; with the
        other sign, that of implicit Euler.
    order
        How many terms: 1 is the field itself, 2 and 3 add f₂ and f₃.

    Returns
    -------
    Callable
        ``field(t, theta)``. Over a fixed time Euler's method is off its flow
        by O(h^order). For a `gradient_flow` and order 2 it is that of
        `modified_loss`; with order 3 it is no gradient in general.
        `thm-modified-flow` in the book; Hairer, Lubich and Wanner (2006).

    Raises
    ------
    ValueError
        If ``order`` is not 1, 2 or 3.

    Examples
    --------
    >>> x, h, t = sp.symbols("x h t")
    >>> modified_field(lambda t, x: x**2, h)(t, x)
    3*h**2*x**4/2 - h*x**3 + x**2
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")

    def modified(t, theta):
        def f(theta):
            return field(t, theta)

        def Df(theta):
            return _directional(f, theta, f(theta))

        total = speed = f(theta)
        if order > 1:
            total = _plus(total, -step / 2, Df(theta))
        if order > 2:
            curved = _directional(Df, theta, speed)
            turned = _directional(f, theta, Df(theta))
            total = _plus(total, step**2 / 12, curved)
            total = _plus(total, step**2 / 4, turned)
        return total

    return modified


# Behind the scenes. ---------------------------------------------------------


def _through_torch(f, theta):
    """f of tensors, on a numpy array too."""
    if isinstance(theta, np.ndarray):
        return f(torch.as_tensor(np.array(theta))).detach().numpy()
    return f(theta)


def _fresh(leaf):
    if isinstance(leaf, torch.Tensor):
        return leaf.clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _check_numbers(theta):
    """Raise unless theta is float tensors, or float numpy arrays."""
    leaves = tree_leaves(theta)
    if leaves and all(isinstance(x, np.ndarray) for x in leaves):
        for x in leaves:
            if x.dtype.kind != "f":
                raise TypeError(
                    f"theta must hold floats, got {x.dtype}; convert it with "
                    ".astype(float)"
                )
    elif any(isinstance(x, numbers.Number) for x in leaves):
        raise TypeError(
            "theta must be a tensor, a tree of tensors or a numpy array, got "
            "a number; write np.array(...) or torch.tensor(...)"
        )
    else:
        check_parameters(theta)


def _same_structure(value, theta, when=None):
    """The leaves of ``value``, which must be a tree like ``theta``."""
    if tree_structure(value) != tree_structure(theta):
        raise ValueError(
            ("directions" if when is None else "the field")
            + " must have the structure of the state, "
            f"{tree_structure(theta)}, got {tree_structure(value)}"
            + (f" at {when}" if when else "")
        )
    return tree_leaves(value)


def _check_value(value, theta, when):
    leaves = _same_structure(value, theta, when)
    for x, y in zip(leaves, tree_leaves(theta), strict=True):
        kind = torch.Tensor if isinstance(y, torch.Tensor) else np.ndarray
        # An operation on a 0-d array gives a numpy scalar.
        if not isinstance(x, (kind, np.floating)) or (
            kind is torch.Tensor and isinstance(x, np.floating)
        ):
            raise TypeError(
                f"the field must return a {kind.__name__} as the state is, "
                f"got a {type(x).__name__} at {when}"
            )
        if tuple(x.shape) != tuple(y.shape):
            raise ValueError(
                "the field must have the shape of the state, "
                f"{tuple(y.shape)}, got {tuple(x.shape)} at {when}"
            )
        if x.is_complex() if kind is torch.Tensor else np.iscomplexobj(x):
            raise TypeError(f"the field must be real, got {x.dtype} at {when}")


def _check_finite(tree, message, time):
    leaves = tree_leaves(tree)
    arrays = [x for x in leaves if isinstance(x, (np.ndarray, np.floating))]
    if not is_finite(tree) or not all(np.isfinite(x).all() for x in arrays):
        raise IntegrationError(message, float(time))


def _as_vectors(theta):
    """Leaves, vector → tree (a fresh copy), tree → vector (checked)."""
    _check_numbers(theta)
    if under_transform(theta):
        raise ValueError(
            "solve_flow has no derivative; use sensitivity, or GradientFlow "
            "with meta_gradient"
        )
    leaves = tree_leaves(theta)
    splits = np.cumsum([math.prod(x.shape) for x in leaves])[:-1]
    like = tree_map(
        lambda x: x.detach() if isinstance(x, torch.Tensor) else x, theta
    )

    def restore(y):
        """From (n,), or from (times, n) to a leading time axis."""
        lead = y.shape[:-1]
        parts = iter(np.split(y, splits, axis=-1))

        def leaf(x):
            part = np.array(next(parts)).reshape((*lead, *x.shape))
            if isinstance(x, torch.Tensor):
                return torch.from_numpy(part).to(x)
            return part.astype(x.dtype)

        return tree_map(leaf, like)

    def flatten(tree, when):
        _check_value(tree, like, when)
        parts = [
            x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
            for x in tree_leaves(tree)
        ]
        return np.concatenate([np.array(x, float).reshape(-1) for x in parts])

    return leaves, restore, flatten


def _plus(tree, factor, other):
    return tree_map(lambda x, y: x + factor * y, tree, other)


def _directional(f, theta, v):
    """f'(θ) v; on tensors by two reverse modes, which all of torch supports."""
    if is_symbolic(theta):
        return jacobian(f)(theta) * v
    value, pull = torch.func.vjp(f, theta)
    zero = tree_map(torch.zeros_like, value)
    return torch.func.vjp(pull, zero)[1]((v,))[0]


def _torch_jacobian(field, theta):
    theta = tree_map(lambda x: x.detach(), theta)
    vector, unravel = ravel(theta)
    J = torch.func.jacrev(lambda y: ravel(field(0.0, unravel(y)))[0])(vector)
    return J.detach().double().numpy()


def _difference_jacobian(f, point):
    def column(k):
        step = 6e-6 * max(1.0, abs(point[k]))
        move = np.zeros_like(point)
        move[k] = step
        return (f(point + move) - f(point - move)) / (2 * step)

    return np.stack([column(k) for k in range(len(point))], axis=1)


def _looks_linear(f, point, speed, J, rtol):
    generator = np.random.default_rng(0)
    for scale in np.repeat([1e-2, 1.0, 10.0, 1e3], 4):
        move = scale * generator.standard_normal(len(point))
        predicted = speed + J @ move
        with np.errstate(all="ignore"):
            off = np.linalg.norm(f(point + move) - predicted)
        size = np.linalg.norm(J, 2) * np.linalg.norm(move + np.abs(point))
        if not off <= rtol * size:
            return False
    return True


def _sign(x, zero):
    return 0 if abs(x) <= zero else (1 if x > 0 else -1)


def _judge(signs: Sequence, nonzero: Sequence, linear, full) -> tuple:
    """The verdict; a sign that nobody knows is None."""
    if 1 in signs:
        return "unstable", "an eigenvalue has a positive real part"
    if None in signs:
        return "undecided", "the sign of a real part depends on the symbols"
    if all(sign == -1 for sign in signs):
        return "stable", "all eigenvalues have negative real parts"
    if not linear:
        return "undecided", (
            "an eigenvalue lies on the imaginary axis, and the field is not "
            "linear: its higher terms decide"
        )
    if not full():
        return "unstable", (
            "the field is linear, and an eigenvalue on the imaginary axis "
            "has too few eigenvectors: solutions grow like a power of t"
        )
    if all(sign == 0 for sign in signs) and all(nonzero):
        return "centre", (
            "the field is linear, and its eigenvalues are imaginary with a "
            "full set of eigenvectors: solutions circle"
        )
    return "undecided", (
        "the field is linear: solutions stay near, and do not all come back, "
        "which is neither asymptotic stability nor a centre"
    )


def _full_numeric(J, eigenvalues, zero):
    """Whether eigenvalues on the imaginary axis have all their eigenvectors."""
    n, wide = len(J), math.sqrt(zero * max(np.linalg.norm(J, 2), zero))
    for x in eigenvalues[np.abs(eigenvalues.real) <= zero]:
        multiplicity = int((np.abs(eigenvalues - x) <= wide).sum())
        values = np.linalg.svd(J - x * np.eye(n), compute_uv=False)
        if int((values <= wide).sum()) < multiplicity:
            return False
    return True


def _linearise_symbolic(field, theta, linear):
    zero = sp.Integer(0)
    column = isinstance(theta, sp.MatrixBase)
    theta = theta if column else sp.sympify(theta)
    speed = field(zero, theta)
    entries = list(speed) if column else [sp.sympify(speed)]
    if any(sp.simplify(x) != 0 for x in entries):
        raise ValueError(
            f"theta must be an equilibrium, got {theta} with the field "
            f"{speed}; elsewhere the eigenvalues prove nothing"
        )

    def at(point):
        J = jacobian(lambda theta: field(zero, theta))(point)
        return J if column else sp.Matrix([[J]])

    J = at(theta).applyfunc(sp.simplify)
    if linear is None:
        fresh = [sp.Dummy("x", real=True) for _ in entries]
        point = type(theta)(*theta.shape, fresh) if column else fresh[0]
        found = at(point).applyfunc(sp.simplify)
        linear = not found.free_symbols & set(fresh)
    multiplicities = J.eigenvals()
    eigenvalues = [x for x, m in multiplicities.items() for _ in range(m)]
    eigenvalues.sort(key=sp.default_sort_key)

    def sign(x):
        real = sp.simplify(sp.re(x))
        if real.is_zero:
            return 0
        if real.is_positive:
            return 1
        return -1 if real.is_negative else None

    def full():
        return all(
            len((J - x * sp.eye(len(entries))).nullspace()) == m
            for x, m in multiplicities.items()
            if sign(x) == 0
        )

    verdict, reason = _judge(
        [sign(x) for x in eigenvalues],
        [x.is_zero is False for x in eigenvalues],
        linear,
        full,
    )
    return Linearisation(
        tuple(eigenvalues), verdict, reason, J if column else J[0]
    )


def _largest_symbolic(hessian):
    if not isinstance(hessian, sp.MatrixBase):
        return sp.sympify(hessian)
    if hessian.rows != hessian.cols:
        raise ValueError(
            f"hessian must be a square matrix, got shape {hessian.shape}"
        )
    if any(sp.simplify(x) != 0 for x in hessian - hessian.T):
        raise ValueError(
            "hessian must be symmetric; for the field of a rotation see "
            "companion.dynamics.linearise"
        )
    eigenvalues = list(hessian.eigenvals())
    if all(x.is_number for x in eigenvalues):
        # Roots of a cubic look complex to Max.
        return max(eigenvalues, key=lambda x: sp.re(sp.N(x, 30)))
    return sp.Max(*eigenvalues)
