"""The exercises of "First order" know their mistakes."""

import numpy as np
import pytest
import sympy as sp
import torch

from companion import (
    GradientDescent,
    Task,
    adapt,
    dot,
    gradient,
    hessian,
    jacobian,
    meta_gradient,
)
from companion.homework import check, exercises
from companion.homework._first_order import neuron

# Right answers, found in another way. ---------------------------------------


def test_the_mixture_of_reptile_may_be_solved_for_by_sympy():
    K, x, y = sp.symbols("K x y", positive=True)
    equations = [x * K * (K - 1) / 2 - 2 * K, K * x + y - 1]
    found = sp.solve(equations, [x, y])
    assert check("first-order-1", (found[x], found[y]))
    assert check("first-order-1", [4 / (K - 1), (1 + 3 * K) / (1 - K)])


def test_a_pole_where_expressions_are_compared_is_no_verdict():
    """1/(K - 1) has one at K = 1, where the answer may be tried."""
    x, y = exercises()["first-order-1"].solution
    assert check("first-order-1", (sp.together(x), sp.together(y)))
    assert not check("first-order-1", (x, sp.together(y + 1)))


def test_the_mixture_of_reptile_is_maml_to_first_order_on_a_quartic():
    x, y = (
        float(z.subs("K", 3)) for z in exercises()["first-order-1"].solution
    )

    def loss(theta, data):
        return (theta**4).sum() / 4 + theta.prod()

    theta = torch.tensor([0.7, -0.4], dtype=torch.float64)
    tasks, errors = [Task(None, None)], []
    for lr in (1e-2, 5e-3):
        maml, reptile = (
            meta_gradient(loss, theta, tasks, GradientDescent(lr, 3), method)
            for method in ("reverse", "reptile")
        )
        mixture = x * reptile + y * gradient(loss)(theta, None)
        errors.append(float((mixture - maml).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_the_leading_terms_may_be_differentiated_in_the_rate():
    """On g·θ + ½Hθ² in one parameter, with all g = 1 and all H = 1."""

    def leading(z):
        alpha, theta, total = sp.Symbol("alpha"), sp.S.Zero, sp.S.Zero
        for weight in z:
            slope = 1 + theta
            total += weight * slope
            theta -= alpha * slope
        total = sp.expand(total)
        return total.coeff(alpha, 0), total.coeff(alpha, 1)

    assert check("first-order-2", leading)


def test_circulation_may_be_the_area_integral_of_the_curl():
    def by_green(field, center, radius, points=40):
        x, w = (
            torch.from_numpy(z) for z in np.polynomial.legendre.leggauss(points)
        )
        total = 0.0
        for r, weight in zip(radius * (x + 1) / 2, radius * w / 2):
            for k in range(points):
                angle = torch.tensor(2 * torch.pi * k / points).double()
                at = center + r * torch.stack([angle.cos(), angle.sin()])
                J = jacobian(field)(at)
                total += weight * r * (J[1, 0] - J[0, 1])
        return 2 * torch.pi * total / points

    assert check("first-order-3", by_green)


def test_the_curl_may_be_taken_of_the_companions_direction():
    def by_jacobian(loss, theta, data, lr):
        def v(theta):
            return meta_gradient(
                loss, theta, [Task(data, data)], GradientDescent(lr, 1),
                "first_order",
            )  # fmt: skip

        J = jacobian(v)(theta)
        return float(J[1, 0] - J[0, 1])

    assert check("first-order-4", by_jacobian)


def test_two_hessians_at_one_place_are_recognised_as_no_curl():
    def careless(loss, theta, data, lr):
        H = hessian(loss)(theta, data)
        return -lr * (H @ H - H @ H)[0, 1]

    assert check("first-order-4", careless).mistake == "no-curl"


def test_the_neuron_of_the_exercise_has_a_curl():
    solution = exercises()["first-order-4"]
    for arguments in solution.instances():
        assert arguments[0] is neuron
        assert abs(solution.solution(*arguments)) > 1e-6


def test_the_threshold_may_be_solved_for_or_simplified():
    a, b = sp.symbols("a b", positive=True)
    roots = sp.solve(a * (1 - a) + b * (1 - b), a)
    assert check("first-order-5", max(roots, key=lambda z: z.subs(b, 0.1)))
    assert check(
        "first-order-5", sp.Rational(1, 2) + sp.sqrt(2 - (2 * b - 1) ** 2) / 2
    )


@pytest.mark.parametrize("form", [list, tuple, sp.Matrix, sp.Array, np.array])
def test_a_pair_may_be_handed_in_as_a_list_a_column_or_an_array(form):
    assert check("first-order-1", form(exercises()["first-order-1"].solution))


def test_a_pair_of_which_one_is_a_number_is_not_called_a_number():
    K = sp.Symbol("K")
    assert "is a number" not in check("first-order-1", (1 / K, 0)).message


def test_an_answer_that_is_nearly_right_is_not_said_to_be_off_by_nothing():
    def rough(field, center, radius, points=200):
        angles = torch.linspace(0, 2 * torch.pi, points + 1).double()
        circle = torch.stack([angles.cos(), angles.sin()], 1)
        path = center + radius * circle
        moves = path[1:] - path[:-1]
        return sum(field(p) @ move for p, move in zip(path, moves))

    verdict = check("first-order-3", rough)
    assert not verdict
    assert "close" in verdict.message and "0%" not in verdict.message


def test_a_circulation_may_be_negative():
    solution = exercises()["first-order-3"]
    signs = {
        bool(solution.solution(*case) > 0) for case in solution.instances()
    }
    assert signs == {True, False}


def trust(loss, theta, task, lr, steps):
    """By the product of the factors, written out, and eigenvalues."""
    at, beta = theta, 0.0
    factors = torch.eye(len(theta), dtype=theta.dtype)
    for _ in range(steps):
        H = torch.func.hessian(loss)(at, task.support)
        beta = max(beta, float(torch.linalg.eigvalsh(H).abs().max()))
        factors = (torch.eye(len(theta)).double() - lr * H) @ factors
        at = at - lr * torch.func.grad(loss)(at, task.support)
    q = torch.func.grad(loss)(at, task.query)
    bound = (1 + lr * beta) ** steps - 1
    return float((q - factors.T @ q).norm() / q.norm()), bound, bound < 1


@pytest.mark.parametrize(
    "form", [tuple, list, lambda x: (x[0], x[1], np.bool_(x[2]))]
)
def test_trust_may_multiply_the_factors_itself(form):
    assert check("first-order-6", lambda *case: form(trust(*case)))


def test_trust_is_a_bound_and_a_certificate_on_the_exercises_instances():
    exercise = exercises()["first-order-6"]
    certified = set()
    for loss, theta, task, lr, steps in exercise.instances():
        error, bound, descends = exercise.solution(loss, theta, task, lr, steps)
        assert error <= bound
        inner = GradientDescent(lr, steps)
        exact = meta_gradient(loss, theta, [task], inner)
        end = adapt(loss, theta, task.support, inner)
        q = gradient(loss)(end, task.query)
        assert not descends or dot(q, exact) > 0
        certified.add(descends)
    assert certified == {True, False}


def test_trust_needs_all_three_of_its_values():
    verdict = check("first-order-6", lambda *case: trust(*case)[:2])
    assert verdict.mistake == "structure"
