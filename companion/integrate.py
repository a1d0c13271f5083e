"""Solving a vector field dy/dt = f(t, y), and nothing about learning.

A thin layer over `scipy.integrate.solve_ivp`: float64 vectors in and out, and
an exception, with the time it happened, wherever the solver has no answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.integrate

__all__ = ["METHODS", "IntegrationError", "Solution", "solve"]

#: scipy's solvers; the last three are for stiff fields.
METHODS = ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")


class IntegrationError(ArithmeticError):
    """A field that could not be solved; ``time`` says how far it went."""

    def __init__(self, message: str, time: float):
        super().__init__(message)
        self.time = time


@dataclass(frozen=True)
class Solution:
    """A solved trajectory.

    ``times`` has the shape (stops,) and ``states`` (stops, n): where the
    solver stopped on its way if it was made with ``dense=True``, and then a
    call with a time in between interpolates to the solver's order; otherwise
    the two ends. ``evaluations`` counts those of the field.
    """

    times: np.ndarray
    states: np.ndarray
    evaluations: int
    interpolate: Callable | None = field(default=None, repr=False)

    @property
    def final(self) -> np.ndarray:
        """The state at the end."""
        return self.states[-1].copy()

    def __call__(self, time: float) -> np.ndarray:
        if self.interpolate is None:
            raise ValueError("solve with dense=True to interpolate")
        return self.interpolate(time)


def solve(
    f: Callable,
    state: np.ndarray,
    time: float,
    *,
    start: float = 0.0,
    method: str = "DOP853",
    rtol: float = 1e-9,
    atol: float = 1e-11,
    dense: bool = False,
    max_evaluations: int = 1_000_000,
) -> Solution:
    """Solve dy/dt = f(t, y) from ``state`` at ``start`` to ``time``.

    Parameters
    ----------
    f
        ``f(t, y)``, a vector as long as ``y``.
    state
        The initial state, shape (n,); it is not changed.
    time
        The end; it may lie before ``start``.
    method
        One of `METHODS`. ``"DOP853"`` is an explicit Runge–Kutta method of
        order 8; for a stiff field take ``"Radau"`` or ``"LSODA"``.
    rtol, atol
        Tolerances of the local error, relative and absolute.
    dense
        Whether the solution can be asked for times in between. If not, only
        its ends are kept, and memory does not grow with the solver's steps.
    max_evaluations
        Where to give up. An explicit method on a stiff field needs very many.

    Raises
    ------
    ValueError
        If the field's value has another shape than the state, or an argument
        is out of range.
    IntegrationError
        If the field is not finite, the solution blows up or the evaluations
        do not suffice; with the time reached.
    """
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}"
        )
    if not np.isfinite(time):
        raise ValueError(f"time must be finite, got {time}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    state = np.array(state, dtype=float)
    if state.ndim != 1 or not np.isfinite(state).all():
        raise ValueError(
            f"state must be a finite vector, got shape {state.shape}"
            + ("" if np.isfinite(state).all() else " with a NaN or infinity")
        )
    reached, norm = start, np.linalg.norm(state)
    count = 0

    def watched(t, y):
        nonlocal reached, norm, count
        count += 1
        if count > max_evaluations:
            raise IntegrationError(
                f"{max_evaluations} evaluations reached only time "
                f"{reached:.6g} of {time:.6g}; the field may be stiff: try "
                "method='Radau' or 'LSODA', or raise max_evaluations",
                reached,
            )
        value = np.asarray(f(t, y), dtype=float)
        if value.shape != y.shape:
            raise ValueError(
                f"the field must have the shape of the state, {y.shape}, got "
                f"{value.shape} at time {t:.6g}"
            )
        if not np.isfinite(value).all():
            raise IntegrationError(
                f"the field is not finite at time {t:.6g}, where the state "
                f"has norm {np.linalg.norm(y):.3g}; does the solution blow "
                "up?",
                t,
            )
        reached, norm = t, np.linalg.norm(y)
        return value

    if time == start:
        states = state[None]
        return Solution(np.array([start]), states, 0, (lambda t: state.copy()))
    with np.errstate(over="ignore", invalid="ignore"):
        solution = scipy.integrate.solve_ivp(
            watched,
            (start, time),
            state,
            method=method,
            rtol=max(rtol, 2.5e-14),
            atol=atol,
            dense_output=dense,
            t_eval=None if dense else (start, time),
        )
    if not solution.success or not np.isfinite(solution.y).all():
        raise IntegrationError(
            f"the solver stopped at time {reached:.6g} of {time:.6g}, where "
            f"the state has norm {norm:.3g}: {solution.message} Does the "
            "solution blow up?",
            float(reached),
        )
    return Solution(
        solution.t, solution.y.T.copy(), count, solution.sol if dense else None
    )
