"""The inner loop in continuous time, and its meta-gradient.

`GradientFlow` follows dθ/dt = -∇L(θ) for a time T. The trajectory is solved
forward, once, and kept. What differentiates it runs along the kept trajectory:
the adjoint backward, the sensitivities forward. The state is never integrated
backward, since a flow that contracts forward blows up backward.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse.linalg
import sympy as sp
import torch

from companion.adaptation import Loss
from companion.calculus import (
    Parameters,
    differentiated,
    gradient,
    hessian,
    hessian_vector_product,
    is_symbolic,
    ravel,
    under_transform,
    value_and_gradient,
)
from companion.integrate import METHODS, IntegrationError, Solution, solve

__all__ = ["GradientFlow"]


@dataclass(frozen=True, eq=False)
class GradientFlow:
    """The flow dθ/dt = -∇L(θ), followed from 0 to ``time``.

    Parameters
    ----------
    time
        The horizon T: a non-negative number, a 0-d tensor (to be learned), or
        for a quadratic loss a sympy expression.
    rtol, atol
        Tolerances of the solver for the trajectory and for its derivatives.
    solver
        A method of `companion.integrate.solve`: ``"DOP853"``, or ``"Radau"``
        or ``"LSODA"`` where λ_max·T, largest curvature times horizon, is large.
    max_evaluations
        Where the solver gives up on a stiff task.

    Notes
    -----
    The tasks of a batch are solved one by one, each with its own steps, so a
    stiff task neither slows down the others nor changes their answers.
    """

    time: Any
    rtol: float = 1e-9
    atol: float = 1e-11
    solver: str = "DOP853"
    max_evaluations: int = 1_000_000

    methods = (
        "reverse", "adjoint", "forward", "first_order", "finite_difference",
    )  # fmt: skip
    vmappable = False

    def __post_init__(self):
        if isinstance(self.time, (numbers.Real, torch.Tensor)):
            if under_transform(self.time):
                return
            if not (0 <= float(self.time) < float("inf")):
                raise ValueError(
                    "time must be a finite non-negative number, got "
                    f"{float(self.time)}"
                )
        elif not isinstance(self.time, sp.Expr):
            raise TypeError(
                "time must be a number, a 0-d tensor or a sympy expression, "
                f"got {type(self.time).__name__}"
            )
        if self.solver not in METHODS:
            raise ValueError(
                f"solver must be one of {', '.join(METHODS)}, got "
                f"{self.solver!r}"
            )

    def path(
        self, loss: Loss, theta: Parameters, data: Any
    ) -> Iterator[Parameters]:
        """θ(0) and θ(T)."""
        yield theta
        if is_symbolic(theta):
            yield _linear_flow(loss, theta, data, self.time)
            return
        if differentiated(data):
            raise ValueError(
                "GradientFlow has no derivative with respect to the data; "
                "detach them, or use GradientDescent"
            )
        vector, unravel = ravel(theta)
        time = torch.as_tensor(self.time, dtype=vector.dtype)
        run = _Run(self, loss, data, unravel)
        yield unravel(_Flow.apply(run, vector, time))

    def solution(
        self, loss: Loss, theta: Parameters, data: Any, time: float
    ) -> Solution:
        """The trajectory, as flat vectors, with dense output."""
        vector, unravel = ravel(theta)

        def field(t, y):
            slope = gradient(loss)(unravel(_like(vector, y)), data)
            return -ravel(slope)[0].numpy()

        state = vector.numpy()
        try:
            return solve(field, state, time, dense=True, **self._settings)
        except IntegrationError as error:
            curvature = largest_curvature(loss, theta, data) * time
            raise IntegrationError(
                f"{error}; λ_max·T, the largest curvature at the start "
                f"times the horizon, is {curvature:.3g}",
                error.time,
            ) from None

    def stiffness(self, loss: Loss, theta: Parameters, data: Any) -> float:
        """The number λ_max·T: the largest curvature met, times the horizon.

        The largest eigenvalue of the Hessian of ``loss``, over the points
        where the solver stops on its way from ``theta``, times T. On a
        quadratic, gradient descent over the same horizon needs more than half
        as many steps to be stable, and an explicit solver needs evaluations
        in proportion; above a few hundred, ``solver="Radau"`` or ``"LSODA"``
        is the better choice.
        """
        _, unravel = ravel(theta)
        time = float(self.time)
        stops = self.solution(loss, theta, data, time).states
        return time * max(
            largest_curvature(loss, unravel(torch.as_tensor(y)), data)
            for y in stops
        )

    def adjoint(
        self,
        loss: Loss,
        solution: Solution,
        data: Any,
        unravel: Callable,
        covector: torch.Tensor,
    ) -> torch.Tensor:
        """Solve ȧ = H(θ(t)) a from a(T) back to a(0), along the trajectory."""

        def field(t, a):
            at, a = _like(covector, solution(t)), _like(covector, a)
            product = hessian_vector_product(loss)
            return ravel(product(unravel(at), unravel(a), data))[0].numpy()

        end = float(solution.times[-1])
        state = covector.numpy()
        found = solve(field, state, 0.0, start=end, **self._settings)
        return _like(covector, found.final)

    def sensitivity(
        self,
        loss: Loss,
        theta: Parameters,
        data: Any,
        directions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve Ṡ = -H(θ(t)) S from S(0) = ``directions``, beside θ(t).

        ``directions`` has the shape (n, r), θ being flat. The pair θ(T), S(T);
        the memory for it does not grow with the horizon.
        """
        vector, unravel = ravel(theta)
        n = len(vector)

        def field(t, y):
            y = _like(vector, y)
            at, columns = unravel(y[:n]), y[n:].reshape(directions.shape)

            def product(column):
                hvp = hessian_vector_product(loss)
                return ravel(hvp(at, unravel(column), data))[0]

            curved = torch.func.vmap(product, 1, 1)(columns)
            slope, _ = ravel(gradient(loss)(at, data))
            return -torch.cat([slope, curved.reshape(-1)]).numpy()

        state = torch.cat([vector, directions.reshape(-1)]).numpy()
        final = solve(field, state, float(self.time), **self._settings).final
        final = _like(vector, final)
        return final[:n], final[n:].reshape(directions.shape)

    @property
    def _settings(self):
        return {
            "rtol": self.rtol,
            "atol": self.atol,
            "method": self.solver,
            "max_evaluations": self.max_evaluations,
        }


def _like(vector, array):
    return torch.as_tensor(array, dtype=vector.dtype)


@dataclass
class _Run:
    """One solve, opaque to torch: the trajectory that the adjoint needs."""

    flow: GradientFlow
    loss: Loss
    data: Any
    unravel: Callable
    solution: Solution | None = None


class _Flow(torch.autograd.Function):
    """(θ, T) ↦ θ(T), with the adjoint as its derivative."""

    @staticmethod
    def forward(run, vector, time):
        theta = run.unravel(vector)
        run.solution = run.flow.solution(run.loss, theta, run.data, float(time))
        return _like(vector, run.solution.final)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.run = inputs[0]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, covector):
        return None, *_Adjoint.apply(ctx.run, covector, *ctx.saved_tensors)


class _Adjoint(torch.autograd.Function):
    """The covector at θ(T) ↦ its pull-back to θ(0), and ∂/∂T."""

    @staticmethod
    def forward(run, covector, end):
        back = run.flow.adjoint(
            run.loss, run.solution, run.data, run.unravel, covector
        )
        slope, _ = ravel(gradient(run.loss)(run.unravel(end), run.data))
        return back, -(covector * slope).sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *covectors):
        raise ValueError(
            "GradientFlow has a first derivative only; for second ones use "
            "GradientDescent with many small steps"
        )


def _forward(problem, task):
    """∇F by forward sensitivities: one column per parameter."""
    flow, loss = problem.inner, problem.loss
    vector, unravel = ravel(problem.theta)
    eye = torch.eye(len(vector), dtype=vector.dtype)
    adapted, columns = flow.sensitivity(loss, problem.theta, task.support, eye)
    value, slope = value_and_gradient(loss)(unravel(adapted), task.query)
    slope, _ = ravel(slope)
    found = {"theta": unravel(slope @ columns)}
    if "time" in problem.variables:
        speed, _ = ravel(gradient(loss)(unravel(adapted), task.support))
        found["time"] = -(slope @ speed)
    return value, {name: found[name] for name in problem.variables}


def _linear_flow(loss, theta, data, time):
    """The flow of a quadratic loss on symbols, by the matrix exponential."""
    if not isinstance(theta, (sp.Expr, sp.MatrixBase)):
        raise TypeError(
            "GradientFlow on symbols needs theta to be an expression or a "
            f"matrix, got {type(theta).__name__}"
        )
    one = not isinstance(theta, sp.MatrixBase)
    anywhere = sp.Dummy("x") if one else theta.applyfunc(lambda _: sp.Dummy())
    H = hessian(loss)(anywhere, data)
    g = gradient(loss)(theta, data)
    H, g = (sp.Matrix([[H]]), sp.Matrix([g])) if one else (H, g)
    H = H.applyfunc(sp.simplify)
    if H.free_symbols & sp.Matrix([anywhere]).free_symbols:
        raise ValueError(
            "GradientFlow on symbols needs a quadratic loss, whose flow has "
            f"a closed form; here the Hessian is {H}"
        )
    t = sp.Dummy("t", nonnegative=True)
    # θ(T) = θ - ∫₀ᵀ exp(-tH) dt ∇L(θ): holds for singular H as well.
    kernel = (
        (-t * H)
        .exp()
        .applyfunc(lambda entry: sp.integrate(sp.expand(entry), (t, 0, time)))
        .applyfunc(_generic)
    )
    moved = (kernel * g).applyfunc(sp.simplify)
    return theta - (moved[0] if one else moved)


def _generic(e):
    """Symbols that may vanish do not: a case of measure zero is no case."""
    return e.replace(sp.Piecewise, lambda *cases: cases[0][0])


def largest_curvature(loss: Loss, theta: Parameters, data: Any) -> float:
    """λ_max of the Hessian at θ, by Lanczos on Hessian-vector products."""
    vector, unravel = ravel(theta)
    n = len(vector)

    def product(v):
        v = unravel(_like(vector, v.reshape(n)))
        found = hessian_vector_product(loss)(unravel(vector), v, data)
        return ravel(found)[0].numpy()

    if n < 10:  # Lanczos needs room
        return float(np.linalg.eigvalsh([product(v) for v in np.eye(n)])[-1])
    H = scipy.sparse.linalg.LinearOperator((n, n), product, dtype=float)
    start = np.random.default_rng(0).standard_normal(n)
    (largest,) = scipy.sparse.linalg.eigsh(
        H, k=1, which="LA", v0=start, tol=1e-6, return_eigenvectors=False
    )
    return float(largest)


# Set here, since the rule needs the class.
GradientFlow.rules = {"forward": _forward}
