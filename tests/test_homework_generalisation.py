"""The exercises of "Generalisation" know their mistakes."""

import numpy as np
import pytest
import sympy as sp
import torch
from scipy.optimize import linprog

from companion.generalization import meta_ridge
from companion.homework import check
from companion.tasks import linear_regression_loss, linear_regressions

# Right answers, written differently. ----------------------------------------


def test_the_best_rate_may_be_found_by_calculus():
    sigma, sigma_w, m = sp.symbols("sigma sigma_w m", positive=True)
    alpha = sp.Symbol("alpha")
    risk = (1 - alpha) ** 2 * sigma_w**2 + alpha**2 * sigma**2 / m
    (best,) = sp.solve(risk.diff(alpha), alpha)
    assert check("generalisation-1", best)
    assert check("generalisation-1", 1 / (1 + sigma**2 / (m * sigma_w**2)))


def test_tasks_may_be_left_out_by_fitting_again():
    def refit(Z, t):
        residuals = []
        for j in range(len(Z)):
            kept = [i for i in range(len(Z)) if i != j]
            rows, targets = Z[kept].flatten(0, 1), t[kept].flatten()
            theta = torch.linalg.pinv(rows) @ targets
            residuals.append(t[j] - Z[j] @ theta)
        return torch.stack(residuals)

    assert check("generalisation-2", refit)
    assert check("generalisation-2", lambda Z, t: list(refit(Z, t)))


def test_the_gap_may_be_written_as_a_loop_over_tasks():
    def loop(theta, training, fresh, inner):
        def risk(tasks):
            losses = []
            for task in tasks:
                phi, (X, y) = theta, task.support
                for _ in range(inner.steps):
                    phi = phi - inner.lr * X.T @ (X @ phi - y) / len(y)
                losses.append(linear_regression_loss(phi, task.query))
            return sum(losses) / len(losses)

        return float(risk(fresh) - risk(training))

    assert check("generalisation-3", loop)


def test_the_honest_report_may_be_written_with_numpy():
    def honest(validation, test):
        best = np.argmin(np.mean(validation.numpy(), 1))
        return np.mean(test.numpy()[best])

    assert check("generalisation-4", honest)


def test_the_work_may_be_a_linear_program_or_an_area():
    def program(x, y):
        x, y = x.numpy(), y.numpy()
        rows = [np.kron(e, np.ones(len(y))) for e in np.eye(len(x))]
        rows += [np.kron(np.ones(len(x)), e) for e in np.eye(len(y))]
        mass = [1 / len(x)] * len(x) + [1 / len(y)] * len(y)
        cost = abs(x[:, None] - y).ravel()
        return linprog(cost, A_eq=np.array(rows), b_eq=mass).fun

    def area(x, y):
        points = torch.cat([x, y]).sort().values
        P, Q = ((z[:, None] <= points).double().mean(0) for z in (x, y))
        return ((P - Q).abs()[:-1] * points.diff()).sum()

    assert check("generalisation-5", program)
    assert check("generalisation-5", area)


def test_the_rate_for_the_centre_may_be_found_by_calculus():
    m, q, sigma, sigma_q = sp.symbols("m q sigma sigma_q", positive=True)
    alpha = sp.Symbol("alpha")
    error = sigma_q**2 / q + alpha**2 * sigma**2 / m
    slope = sp.together((error / (1 - alpha) ** 2).diff(alpha))
    (best,) = set(sp.solve(sp.numer(slope), alpha)) - {1}
    assert check("generalisation-6", best)


def test_the_hole_is_no_limit():
    N, d, m, q, sigma = sp.symbols("N d m q sigma")
    alpha, sigma_w = sp.symbols("alpha sigma_w")
    excess = (
        (1 - alpha) ** 2 * sigma_w**2
        + sigma**2 / q
        + alpha**2 * sigma**2 / m
    ) * d / (2 * N)  # fmt: skip
    assert check("generalisation-7", (sp.limit(excess, alpha, 1), 0))
    assert check("generalisation-7", [excess.subs(alpha, 1), 0.0])


def test_at_the_hole_there_is_no_single_minimiser():
    tasks = linear_regressions(4, 3, 3, 2, design="orthonormal", seed=0)
    with pytest.raises(ValueError, match="not unique"):
        meta_ridge(tasks, 1.0)
