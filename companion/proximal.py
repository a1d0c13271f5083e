"""The inner loop as a problem: a penalty holds the parameters near θ.

`Proximal` does not follow a path; it solves φ* = argmin L(φ) + λ/2 ‖φ - θ‖².
Its derivative needs φ* and a linear system there, and nothing of the way to
it. The tasks of a batch are solved side by side, each with steps of its own.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch

from companion.adaptation import Loss
from companion.calculus import (
    Parameters,
    gradient,
    hessian,
    hessian_vector_product,
    is_symbolic,
    ravel,
    scalar,
    tree_flatten,
    tree_unflatten,
    under_transform,
)

__all__ = ["ConvergenceError", "Proximal"]


class ConvergenceError(ArithmeticError):
    """A problem that was not solved; ``residual`` says how far off it is."""

    def __init__(self, message: str, residual: float):
        super().__init__(message)
        self.residual = residual


@dataclass(frozen=True, eq=False)
class Proximal:
    """The solution φ* of: minimise L(φ) + λ/2 ‖φ - θ‖² over φ (iMAML).

    Its meta-gradient solves (λI + H) x = ∇L^q(φ*) by conjugate gradients, with
    H the support Hessian at φ*; it is λx, averaged over the tasks. The
    derivative with respect to λ is ⟨x, θ - φ*⟩.

    Parameters
    ----------
    strength
        The penalty λ: a positive number, a 0-d tensor (to be learned), or for
        a quadratic loss a sympy expression.
    tolerance
        The inner problem is solved when ‖∇L(φ) + λ(φ - θ)‖ is at most
        ``tolerance`` times ‖∇L(θ)‖ + λ‖θ‖ + λ‖φ‖, the linear system when its
        residual is at most ``tolerance`` times its right-hand side. By default
        ε^0.7 with the ε of the dtype: 1e-11 in float64, 1e-5 in float32.
    max_steps
        Newton steps for the inner problem, after which it gives up.
    max_products
        Hessian-vector products for one linear system, likewise.

    Raises
    ------
    ValueError
        If ``strength`` or ``tolerance`` is not finite and positive, or a
        limit is no positive integer.
    ConvergenceError
        When used: if the inner problem or the linear system is not solved
        within its limit, or λI + H is found not to be positive definite.
        Then φ* is no isolated minimiser, and a larger ``strength`` helps.

    Notes
    -----
    The book's ``thm-implicit``; Rajeswaran, Finn, Kakade & Levine (2019).
    Newton's method with truncated conjugate gradients and backtracking
    (see Nocedal & Wright 2006) starts at θ; where L is not convex
    it ends in a local minimum. Memory does not grow with its steps. What the
    loss closes over is a constant to the derivative; the data are not.
    """

    strength: Any
    tolerance: float | None = None
    max_steps: int = 1000
    max_products: int = 1000

    methods = ("reverse", "implicit", "first_order", "finite_difference")

    def __post_init__(self):
        if isinstance(self.strength, (numbers.Real, torch.Tensor)):
            if not under_transform(self.strength):
                _check_positive("strength", self.strength)
        elif not isinstance(self.strength, sp.Expr):
            raise TypeError(
                "strength must be a number, a 0-d tensor or a sympy "
                f"expression, got {type(self.strength).__name__}"
            )
        elif self.strength.is_nonpositive:
            raise ValueError(f"strength must be positive, got {self.strength}")
        if self.tolerance is not None:
            _check_positive("tolerance", self.tolerance)
        for name in ("max_steps", "max_products"):
            limit = getattr(self, name)
            whole = isinstance(limit, int) and not isinstance(limit, bool)
            if not whole or limit < 1:
                raise ValueError(
                    f"{name} must be a positive integer, got {limit!r}"
                )

    def path(
        self, loss: Loss, theta: Parameters, data: Any
    ) -> Iterator[Parameters]:
        """θ and φ*."""
        yield theta
        if is_symbolic(theta):
            yield _linear_proximal(loss, theta, data, self.strength)
            return
        if isinstance(self.strength, sp.Expr):
            raise TypeError(
                f"strength is the sympy object {self.strength} but theta "
                "holds tensors; convert it with float(strength)"
            )
        vector, unravel = ravel(theta)
        strength = torch.as_tensor(
            self.strength, dtype=vector.dtype, device=vector.device
        )
        leaves, structure = tree_flatten(data)
        places = [
            k for k, x in enumerate(leaves) if isinstance(x, torch.Tensor)
        ]

        def rebuild(tensors):
            filled = list(leaves)
            for k, x in zip(places, tensors):
                filled[k] = x
            return tree_unflatten(filled, structure)

        system = _System(self, loss, unravel, rebuild)
        tensors = [leaves[k] for k in places]
        yield unravel(_Minimiser.apply(system, vector, strength, *tensors))


def _check_positive(name, value):
    value = value.item() if isinstance(value, torch.Tensor) else value
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be finite and positive, got {value!r}")


# The problem of one task, as functions of flat vectors. ---------------------


@dataclass(frozen=True)
class _System:
    """The inner problem; opaque to torch, which sees its tensors beside it."""

    inner: Proximal
    loss: Loss
    unravel: Callable
    rebuild: Callable

    def value(self, phi, *tensors):
        return scalar(self.loss(self.unravel(phi), self.rebuild(tensors)))

    def slope(self, phi, *tensors):
        found = gradient(self.loss)(self.unravel(phi), self.rebuild(tensors))
        return ravel(found)[0]

    def product(self, phi, v, *tensors):
        found = hessian_vector_product(self.loss)(
            self.unravel(phi), self.unravel(v), self.rebuild(tensors)
        )
        return ravel(found)[0]

    def tolerance(self, dtype):
        if self.inner.tolerance is not None:
            return self.inner.tolerance
        return torch.finfo(dtype).eps ** 0.7


class _Minimiser(torch.autograd.Function):
    """(θ, λ, data) ↦ φ*, with the implicit function theorem's derivative."""

    @staticmethod
    def forward(system, theta, strength, *tensors):
        rows = (x.unsqueeze(0) for x in (theta, strength, *tensors))
        return _minimise(system, _alone, *rows)[0]

    @staticmethod
    def vmap(info, in_dims, system, *inputs):
        rows = _rows(info.batch_size, in_dims[1:], inputs)
        return _minimise(system, torch.func.vmap, *rows), 0

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.system, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx, covector):
        system, (phi, theta, strength, *tensors) = ctx.system, ctx.saved_tensors
        x = _LinearSolve.apply(system, covector, phi, strength, *tensors)

        def along(*tensors):
            return -(x * system.slope(phi, *tensors)).sum()

        return (
            None,
            strength * x,
            (x * (theta - phi)).sum(),
            *_slopes(along, tensors, ctx.needs_input_grad[3:]),
        )


class _LinearSolve(torch.autograd.Function):
    """(b, φ, λ, data) ↦ the x with (λI + H(φ)) x = b."""

    @staticmethod
    def forward(system, b, phi, strength, *tensors):
        rows = (x.unsqueeze(0) for x in (b, phi, strength, *tensors))
        return _solve(system, _alone, *rows)[0]

    @staticmethod
    def vmap(info, in_dims, system, *inputs):
        rows = _rows(info.batch_size, in_dims[1:], inputs)
        return _solve(system, torch.func.vmap, *rows), 0

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.system, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx, covector):
        system, (x, phi, strength, *tensors) = ctx.system, ctx.saved_tensors
        w = _LinearSolve.apply(system, covector, phi, strength, *tensors)

        def along(phi, *tensors):
            return -(w * system.product(phi, x, *tensors)).sum()

        needed = (ctx.needs_input_grad[2], *ctx.needs_input_grad[4:])
        at_phi, *at_data = _slopes(along, (phi, *tensors), needed)
        return None, w, at_phi, -(w * x).sum(), *at_data


def _slopes(f, inputs, needed):
    """The gradients of ``f`` with respect to those inputs that need one."""
    argnums = tuple(k for k, need in enumerate(needed) if need)
    found = [None] * len(inputs)
    if argnums:
        for k, slope in zip(argnums, torch.func.grad(f, argnums)(*inputs)):
            found[k] = slope
    return found


# Many problems side by side: rows of matrices. ------------------------------


def _alone(f):
    """What `torch.func.vmap` does, for a batch of one and for any ``f``."""
    return lambda *rows: f(*(x[0] for x in rows)).unsqueeze(0)


def _rows(count, in_dims, inputs):
    return [
        x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs, in_dims)
    ]


def _minimise(system, each, theta, strength, *tensors):
    """φ*, a row per problem, by Newton's method from θ."""
    if not bool((strength > 0).all()):
        raise ValueError(
            f"strength must be finite and positive, got {float(strength.min())}"
        )
    inner, eps = system.inner, torch.finfo(theta.dtype).eps
    strength = strength[:, None]

    def value(phi):
        penalty = (strength * (phi - theta) ** 2).sum(1) / 2
        return each(system.value)(phi, *tensors) + penalty

    def slope(phi):
        return each(system.slope)(phi, *tensors) + strength * (phi - theta)

    phi, height, g = theta.clone(), value(theta), slope(theta)
    if not bool(torch.isfinite(height).all() and torch.isfinite(g).all()):
        raise ValueError(
            "the support loss or its gradient is not finite at theta, where "
            "the inner problem starts"
        )
    start = g.norm(dim=1) + strength[:, 0] * theta.norm(dim=1)
    for step in range(inner.max_steps + 1):
        size = g.norm(dim=1)
        scale = start + strength[:, 0] * phi.norm(dim=1)
        left = size > system.tolerance(theta.dtype) * scale
        if not left.any():
            if step == 0:
                _look_for_negative_curvature(system, each, phi, strength[:, 0],
                                             tensors)  # fmt: skip
            return phi
        if step == inner.max_steps:
            break

        def product(v, phi=phi):
            return each(system.product)(phi, v, *tensors) + strength * v

        forcing = torch.sqrt(size / scale.clamp(min=eps)).clamp(max=0.5)
        move, _, _ = _conjugate_gradients(
            product, torch.where(left[:, None], -g, 0.0), forcing,
            inner.max_products,
        )  # fmt: skip
        rise = (g * move).sum(1)
        # Where rounding hides the descent, Newton's full step is the best.
        slack = 10 * eps * (height.abs() + 1)
        rate, searching = torch.ones_like(size), left
        while searching.any():
            height_there = value(phi + rate[:, None] * move)
            fine = height_there <= height + 1e-4 * rate * rise + slack
            searching = searching & ~fine
            rate = torch.where(searching, rate / 2, rate)
            if bool((rate < eps).any()):
                _give_up_minimising(size, scale, searching, step)
        phi = phi + rate[:, None] * move
        height, g = value(phi), slope(phi)
    _give_up_minimising(size, scale, left, inner.max_steps)


def _give_up_minimising(size, scale, left, steps):
    relative = torch.where(left, size / scale, 0.0)
    worst = int(relative.argmax())
    residual = float(relative[worst])
    raise ConvergenceError(
        f"the inner problem{_which(worst, size)} is not solved after {steps} "
        f"Newton steps: the relative gradient norm is {residual:.2g}; give it "
        "more max_steps, a larger tolerance or a larger strength",
        residual,
    )


def _look_for_negative_curvature(system, each, phi, strength, tensors):
    """θ is stationary itself: no step was made that would have shown it."""
    source = torch.Generator().manual_seed(0)
    b = torch.randn(phi.shape[1], generator=source, dtype=torch.float64)
    b = b.to(phi).expand_as(phi)
    _solve(system, each, b, phi, strength, *tensors)


def _solve(system, each, b, phi, strength, *tensors):
    """(λI + H)⁻¹ b, a row per problem."""
    inner, goal = system.inner, system.tolerance(b.dtype)

    def product(v):
        return each(system.product)(phi, v, *tensors) + strength[:, None] * v

    size = b.norm(dim=1)
    x, residual, used = torch.zeros_like(b), b, 0
    while True:
        relative = torch.where(size > 0, residual.norm(dim=1) / size, 0.0)
        left = relative > goal
        worst = int(relative.argmax())
        if not left.any():
            return x
        if used >= inner.max_products or not torch.isfinite(relative).all():
            raise ConvergenceError(
                f"conjugate gradients{_which(worst, size)} have not solved "
                f"(λI + H)x = b after {used} Hessian-vector products: the "
                f"relative residual is {float(relative[worst]):.2g}; give "
                "them more max_products, a larger tolerance or a larger "
                "strength",
                float(relative[worst]),
            )
        # A second round starts from the true residual, which rounding
        # separates from the one that the recursion carries along.
        b_left = torch.where(left[:, None], residual, 0.0)
        more, curvature, count = _conjugate_gradients(
            product, b_left, goal / relative.clamp(min=goal) / 2,
            inner.max_products - used,
        )  # fmt: skip
        used += count
        if not bool((curvature > 0).all()):
            worst = int(curvature.argmin())
            residual = (b - product(x + more)).norm(dim=1) / size
            raise ConvergenceError(
                f"λI + H{_which(worst, size)} is not positive definite: "
                "conjugate gradients met the curvature "
                f"{float(curvature[worst]):.2g} with the relative residual "
                f"{float(residual[worst]):.2g}; φ* is no isolated minimiser, "
                "give the inner problem a larger strength",
                float(residual[worst]),
            )
        x = x + more
        residual = b - product(x)


def _conjugate_gradients(product, b, rtol, limit):
    """An x with Mx ≈ b; the least curvature met; the products used.

    Row by row: where the curvature is not positive a row stops, with the x
    that it has (at the very start: b).
    """
    x, r, p = torch.zeros_like(b), b, b
    squared = (r * r).sum(1)
    goal, lowest = rtol**2 * squared, torch.full_like(squared, float("inf"))
    going = squared > goal
    for count in range(limit):
        if not going.any():
            return x, lowest, count
        image = product(p)
        curvature = (p * image).sum(1)
        relative = curvature / (p * p).sum(1)
        lowest = torch.where(going, torch.fmin(lowest, relative), lowest)
        convex = curvature > 0
        if count == 0:
            x = torch.where((going & ~convex)[:, None], b, x)
        going = going & convex
        rate = torch.where(going, squared / curvature, 0.0)[:, None]
        x, r = x + rate * p, r - rate * image
        before, squared = squared, torch.where(going, (r * r).sum(1), squared)
        p = torch.where(going[:, None], r + (squared / before)[:, None] * p, p)
        going = going & (squared > goal)
    return x, lowest, limit


def _which(row, rows):
    return f" of task {row}" if len(rows) > 1 else ""


# Symbols. -------------------------------------------------------------------


def _linear_proximal(loss, theta, data, strength):
    """φ* of a quadratic loss on symbols: one linear system."""
    if not isinstance(theta, (sp.Expr, sp.MatrixBase)):
        raise TypeError(
            "Proximal on symbols needs theta to be an expression or a matrix, "
            f"got {type(theta).__name__}"
        )
    one = not isinstance(theta, sp.MatrixBase)
    H, g = hessian(loss)(theta, data), gradient(loss)(theta, data)
    H, g = (sp.Matrix([[H]]), sp.Matrix([g])) if one else (H, g)
    if H.free_symbols & sp.Matrix([theta]).free_symbols or H.atoms(
        sp.core.function.AppliedUndef
    ):
        raise ValueError(
            "Proximal on symbols needs a quadratic loss, whose minimiser has "
            f"a closed form; here the Hessian is {H}"
        )
    moved = (H + sp.sympify(strength) * sp.eye(H.rows)).LUsolve(g)
    moved = moved.applyfunc(sp.simplify)
    return theta - (moved[0] if one else moved)
