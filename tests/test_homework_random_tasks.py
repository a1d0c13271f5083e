"""The exercises of "Random tasks" know their mistakes."""

import numpy as np
import pytest
import sympy as sp
import torch
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import brentq

from companion import GradientDescent, Task, meta_gradient
from companion.homework import check, exercises
from companion.homework._random_tasks import _draws


def test_a_standard_deviation_is_known_in_the_symbols_of_the_page():
    a, alpha, eta, n, sigma = sp.symbols("a alpha eta n sigma", positive=True)
    w = a * (1 - alpha * a) ** 2
    floor = eta * w / (2 - eta * w) * sigma**2 / n
    assert check("random-tasks-1", sp.sqrt(floor)).mistake == "deviation"


# Right answers, written differently. ----------------------------------------


def test_the_floor_is_the_fixed_point_of_the_mean_squares():
    a, alpha, eta, n, sigma, v = sp.symbols("a alpha eta n sigma v")
    c, x = sp.symbols("c x")

    def loss(theta, center):
        return a * (theta - center) ** 2 / 2

    slope = meta_gradient(
        loss, x, [Task(c, c)], GradientDescent(lr=alpha, steps=1)
    )
    w = sp.diff(slope, x)
    fixed = sp.solve(
        (1 - eta * w) ** 2 * v + eta**2 * w**2 * sigma**2 / n - v, v
    )[0]
    assert check("random-tasks-1", fixed)


def test_the_largest_rate_makes_the_mean_square_factor_one():
    def by_enumeration(weights, n):
        grid = torch.cartesian_prod(*[weights] * n).reshape(-1, n).mean(1)
        return brentq(
            lambda lr: float(((1 - lr * grid) ** 2).mean()) - 1, 1e-3, 100
        )

    assert check("random-tasks-2", by_enumeration)


def test_the_loop_may_keep_a_list():
    def by_list(directions, theta, integers, outer_lr, steps, n):
        path = [theta]
        for _ in range(steps):
            slopes = [
                directions[i](path[-1]) for i in integers(len(directions), n)
            ]
            path.append(path[-1] - outer_lr * np.mean(slopes, axis=0))
        return path[-1], np.mean(path[:-1], axis=0)

    assert check("random-tasks-3", by_list)


def test_the_loop_may_draw_one_by_one_and_shorten_the_rate():
    def one_by_one(directions, theta, integers, outer_lr, steps, n):
        total = np.zeros_like(theta)
        for _ in range(steps):
            total = total + theta
            chosen = [integers(len(directions), 1)[0] for _ in range(n)]
            slope = sum(directions[i](theta) for i in chosen)
            theta = theta - outer_lr / n * slope
        return theta, total / steps

    assert check("random-tasks-3", one_by_one)


def test_the_draws_of_the_loop_are_made_afresh_and_reach_every_task():
    first, second = _draws(1), _draws(1)
    assert [list(first(3, 2)) for _ in range(4)] == [
        list(second(3, 2)) for _ in range(4)
    ]
    exercise = exercises()["random-tasks-3"]
    for directions, _, integers, _, steps, n in exercise.instances():
        drawn = [integers(len(directions), n) for _ in range(steps)]
        assert len(directions) - 1 in np.concatenate(drawn)


def test_the_covariance_may_come_from_scipy_or_from_iterating():
    def by_scipy(A, C, outer_lr):
        left = np.eye(len(A)) - outer_lr * A.numpy()
        return solve_discrete_lyapunov(left, outer_lr**2 * C.numpy())

    def by_iterating(A, C, outer_lr):
        left = torch.eye(len(A), dtype=A.dtype) - outer_lr * A
        found = torch.zeros_like(C)
        for _ in range(2000):
            found = left @ found @ left + outer_lr**2 * C
        return found

    assert check("random-tasks-4", by_scipy)
    assert check("random-tasks-4", by_iterating)


def test_the_clipped_loop_ends_where_the_mean_of_clipped_gradients_vanishes():
    p, r, b = sp.symbols("p r b")
    solution = exercises()["random-tasks-5"].solution
    values = {p: sp.Rational(1, 4), r: 1, b: 4}

    def pull(theta):
        clipped = np.clip(theta - np.array([0.0, 4.0]), -1, 1)
        return clipped @ np.array([0.75, 0.25])

    assert float(solution.subs(values)) == pytest.approx(brentq(pull, -1, 5))
    assert check("random-tasks-5", r / (1 / p - 1))


def test_the_factor_agrees_with_two_minibatches():
    a, alpha, v, x, c = sp.symbols("a alpha v x c")

    def loss(theta, data):
        return data * (theta - c) ** 2 / 2

    tasks = [Task(a + s * sp.sqrt(v), a) for s in (1, -1)]
    slope = meta_gradient(loss, x, tasks, GradientDescent(lr=alpha, steps=1))
    assert check("random-tasks-6", sp.expand(sp.simplify(slope / (x - c))))
