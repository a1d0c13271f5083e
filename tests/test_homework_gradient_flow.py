"""The exercises of "Gradient flow" know their mistakes."""

import numpy as np
import sympy as sp
import torch

from companion.calculus import gradient
from companion.dynamics import euler, gradient_flow, linearise, stable_step
from companion.homework import check, exercises
from companion.tasks import quadratic_loss

# Right answers, written differently. ----------------------------------------


def test_the_time_of_the_end_may_be_written_in_any_way():
    start, p = sp.symbols("theta_0 p")
    assert check("gradient-flow-1", 1 / ((p - 1) * start ** (p - 1)))
    assert check("gradient-flow-1", -start / (start**p * (1 - p)))


def test_the_time_of_the_end_agrees_with_an_integral():
    y = sp.Symbol("y", positive=True)
    solution = exercises()["gradient-flow-1"].solution
    found = sp.integrate(y**-3, (y, 2, sp.oo))
    values = {sp.Symbol("theta_0"): 2, sp.Symbol("p"): 3}
    assert found == solution.subs(values)


def test_the_largest_step_may_be_computed_by_any_eigenvalue_solver():
    def by_power_iteration(hessians):
        matrix = hessians.mean(0)
        v = torch.ones(len(matrix), dtype=matrix.dtype)
        for _ in range(3000):
            v = matrix @ v / (matrix @ v).norm()
        return float(2 / (v @ matrix @ v))

    assert check("gradient-flow-2", by_power_iteration)
    assert check(
        "gradient-flow-2", lambda hessians: stable_step(hessians.mean(0))
    )


def test_the_implicit_step_may_be_a_fixed_point_or_numpy():
    def by_newton(theta, A, c, h):
        def off(y):
            return y - theta + h * gradient(quadratic_loss)(y, (A, c))

        J = torch.func.jacrev(off)(theta)
        return theta - torch.linalg.solve(J, off(theta))

    def by_numpy(theta, A, c, h):
        theta, A, c = theta.numpy(), A.numpy(), c.numpy()
        inverse = np.linalg.inv(np.eye(len(theta)) / h + A)
        return inverse @ (theta / h + A @ c)

    assert check("gradient-flow-3", by_newton)
    assert check("gradient-flow-3", by_numpy)


def test_the_verdicts_are_those_of_linearise():
    fields = {
        "a": lambda t, y: torch.stack([y[1] - y[0], y[0] ** 2 - y[1]]),
        "b": lambda t, y: torch.stack([y[1], -torch.sin(y[0])]),
        "c": lambda t, y: torch.stack([y[1], -4 * y[0]]),
        "d": gradient_flow(lambda y, data: (y**4).sum() / 4),
        "e": gradient_flow(lambda y, data: y[0] * y[1]),
    }
    origin = torch.zeros(2, dtype=torch.float64)
    found = {k: linearise(f, origin).verdict for k, f in fields.items()}
    assert check("gradient-flow-4", found)
    assert check(
        "gradient-flow-4",
        {k.upper(): w.replace("centre", "Center") for k, w in found.items()},
    )


def test_several_wrong_verdicts_are_wrong():
    for word in ("stable", "unstable", "centre", "undecided"):
        assert not check("gradient-flow-4", dict.fromkeys("abcde", word))


def test_the_mended_solver_may_be_the_companions():
    def by_companion(field, theta, time, steps):
        return np.stack(euler(field, theta, time, steps))

    assert check("gradient-flow-5", by_companion)
    assert check("gradient-flow-5", lambda *a: euler(*a))


def test_the_pl_constant_may_come_from_singular_values_or_the_pseudoinverse():
    def by_rank(X):
        values = torch.linalg.svdvals(X)
        return values[torch.linalg.matrix_rank(X) - 1] ** 2 / len(X)

    def by_pseudoinverse(X):
        return (
            1 / torch.linalg.matrix_norm(torch.linalg.pinv(X), 2) ** 2 / len(X)
        )

    assert check("gradient-flow-6", by_rank)
    assert check("gradient-flow-6", by_pseudoinverse)
