"""The exercises of "From steps to flows and back" know their mistakes."""

import numpy as np
import scipy.linalg
import sympy as sp
import torch

from companion.adaptation import GradientDescent
from companion.calculus import gradient, hessian, jacobian
from companion.dynamics import (
    gradient_flow,
    modified_field,
    modified_loss,
    solve_flow,
)
from companion.homework import check, exercises
from companion.metagradient import meta_gradient
from companion.objective import Task

# Right answers, written differently. ----------------------------------------


def test_the_modified_equation_of_growth_is_the_companions():
    x, h = sp.symbols("x h")
    assert check(
        "steps-and-flows-1", modified_field(lambda t, x: x**2, h)(0, x)
    )
    assert check("steps-and-flows-1", x**2 * (1 - h * x + 3 * (h * x) ** 2 / 2))


def test_the_exact_matrix_is_a_logarithm():
    def by_scipy(A, h):
        return scipy.linalg.logm(np.eye(len(A)) - h * A.numpy()).real / h

    assert check("steps-and-flows-2", by_scipy)


def test_the_exact_matrix_carries_descent():
    A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    B = exercises()["steps-and-flows-2"].solution(A, 0.3)
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    flowed = solve_flow(lambda t, y: B @ y, start, 0.9).final
    stepped = torch.linalg.matrix_power(torch.eye(2) - 0.3 * A, 3) @ start
    torch.testing.assert_close(flowed, stepped)


def test_the_modified_slope_may_be_the_companions_or_multiplied_out():
    assert check(
        "steps-and-flows-3",
        lambda loss, theta, h: gradient(modified_loss(loss, h))(theta),
    )
    assert check(
        "steps-and-flows-3",
        lambda loss, theta, h: (
            gradient(loss)(theta)
            + h / 2 * hessian(loss)(theta) @ gradient(loss)(theta)
        ),
    )


def test_detached_whatever_the_factor_is_detached():
    def detached(loss, theta, h):
        return gradient(loss)(theta)

    assert check("steps-and-flows-3", detached).mistake == "detached"


def test_the_balance_of_reptile_may_be_written_in_any_way():
    K = sp.Symbol("K")
    assert check("steps-and-flows-4", (K - 1) / K)


def test_reptile_in_balance_matches_the_flow_up_to_the_second_order():
    x, a = sp.symbols("x a")
    L = sp.Function("L")
    task = [Task(L, L)]
    for K in (2, 3):
        inner = GradientDescent(a, K)
        v = meta_gradient(lambda y, L: L(y), x, task, inner, "reptile")
        epsilon = exercises()["steps-and-flows-4"].solution.subs("K", K)
        time = epsilon * K * a
        slope = L(x).diff(x)
        flow = -time * slope + time**2 / 2 * slope * slope.diff(x)
        off = -epsilon * a * v - flow
        for k in range(3):
            assert sp.simplify(off.diff(a, k).subs(a, 0).doit()) == 0


def test_the_corrected_step_may_be_a_taylor_series():
    # A step on L - (h/4)‖∇L‖² is this exactly.
    assert check(
        "steps-and-flows-5",
        lambda loss, theta, h: (
            theta
            - h * gradient(loss)(theta)
            + h**2 / 2 * hessian(loss)(theta) @ gradient(loss)(theta)
        ),
    )


def test_the_third_curl_is_that_of_the_modified_field():
    def by_definition(loss, theta):
        field = gradient_flow(lambda theta, data: loss(theta))

        def third(theta):
            ahead, at, behind = (
                modified_field(field, h)(0.0, theta) for h in (1.0, 0.0, -1.0)
            )
            return (ahead - 2 * at + behind) / 2

        J = jacobian(third)(theta)
        return J[1, 0] - J[0, 1]

    assert check("steps-and-flows-6", by_definition)


def test_the_third_curl_takes_the_flow_of_a_loss_as_the_page_does():
    def by_the_page(loss, theta):
        def third(theta):
            ahead, at, behind = (
                modified_field(gradient_flow(loss), h)(0.0, theta)
                for h in (1.0, 0.0, -1.0)
            )
            return (ahead - 2 * at + behind) / 2

        J = jacobian(third)(theta)
        return J[1, 0] - J[0, 1]

    assert check("steps-and-flows-6", by_the_page)


def test_the_third_curl_may_be_a_difference_quotient():
    def third(loss, theta):
        H, g = hessian(loss)(theta), gradient(loss)(theta)
        M = jacobian(lambda y: hessian(loss)(y) @ g)(theta)
        return -H @ H @ g / 3 - M @ g / 12

    def by_differences(loss, theta):
        d = 1e-5 * torch.eye(2, dtype=torch.float64)
        one, two = (
            (third(loss, theta + e) - third(loss, theta - e)) / 2e-5 for e in d
        )
        return one[1] - two[0]

    assert check("steps-and-flows-6", by_differences)


def test_the_exact_matrix_may_be_a_long_series():
    def series(A, h):
        power, total = torch.eye(len(A), dtype=A.dtype), torch.zeros_like(A)
        for k in range(1, 500):
            power = h * power @ A
            total = total - power / k / h
        return total

    assert check("steps-and-flows-2", series)
