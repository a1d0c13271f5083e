"""The exercises of "Continuous-time MAML" know their mistakes."""

import numpy as np
import pytest
import sympy as sp
import torch

from companion import GradientDescent, GradientFlow, Task, meta_gradient
from companion.homework import check, exercises
from companion.homework._continuous_maml import with_bugs
from companion.tasks import quadratic_loss

# Right answers, written differently. ----------------------------------------


def test_the_closed_form_may_be_written_in_any_way():
    theta, c, T = sp.symbols("theta c T", real=True)
    z = 1 + 2 * T * theta**2
    assert check("continuous-maml-1", theta / z**2 - c / sp.sqrt(z) ** 3)


def test_the_quadratic_flow_may_be_the_companions():
    def by_companion(theta, A, c, B, q, T):
        task = Task((A, c), (B, q))
        inner = GradientFlow(T, rtol=1e-11, atol=1e-13)
        return meta_gradient(quadratic_loss, theta, [task], inner)

    def by_eigenvectors(theta, A, c, B, q, T):
        a, V = torch.linalg.eigh(A)
        decay = V @ torch.diag(torch.exp(-T * a)) @ V.T
        return decay.T @ (B @ (c - q) + B @ decay @ (theta - c))

    assert check("continuous-maml-2", by_companion)
    assert check("continuous-maml-2", by_eigenvectors)


def test_the_best_horizon_may_be_written_in_any_way():
    a, sigma_w, tau = sp.symbols("a sigma_w tau", positive=True)
    assert check(
        "continuous-maml-3", (sp.log(tau + sigma_w**2) - sp.log(tau)) / a
    )
    assert check("continuous-maml-3", -sp.log(tau / (tau + sigma_w**2)) / a)


def test_the_best_horizon_agrees_with_a_minimiser():
    from scipy.optimize import minimize_scalar

    values = {"a": 1.7, "b": 0.6, "sigma_w": 1.3, "tau": 0.4}
    a, b, s, tau = values.values()

    def expected(T):
        x = np.exp(-a * T)
        return b * ((1 - x) ** 2 * tau + x**2 * s**2) / 2

    found = minimize_scalar(expected, bounds=(0, 5), method="bounded")
    solution = exercises()["continuous-maml-3"].solution
    assert float(solution.subs(values)) == pytest.approx(found.x, rel=1e-4)


def test_the_mended_adjoint_is_the_exact_meta_gradient_of_steps():
    A = torch.tensor([[1.0, 0.4], [0.4, 2.0]], dtype=torch.float64)
    c, q = torch.ones(2).double(), torch.zeros(2).double()
    theta = torch.tensor([0.3, -0.8], dtype=torch.float64)

    def loss(theta, data):
        return quadratic_loss(theta, data) + (theta**4).sum() / 4

    found = with_bugs()(
        lambda y: A @ (y - c) + y**3,
        lambda y: A + torch.diag(3 * y**2),
        lambda y: A @ (y - q) + y**3,
        theta, 0.5, 5,
    )  # fmt: skip
    exact = meta_gradient(
        loss, theta, [Task((A, c), (A, q))], GradientDescent(0.1, 5)
    )
    torch.testing.assert_close(found, exact)


def test_the_longest_horizon_may_come_from_norms_or_numpy():
    def by_norm(A, rounding, tolerance):
        norm = torch.linalg.matrix_norm(A, 2)
        return (np.log(tolerance) - np.log(rounding)) / norm

    def by_numpy(A, rounding, tolerance):
        top = np.linalg.eigvalsh(A.numpy()).max()
        return float(np.log(tolerance / rounding) / top)

    def by_single_precision(A, rounding, tolerance):
        ratio = torch.log(torch.tensor(tolerance / rounding))
        return ratio / torch.linalg.eigvalsh(A).max()

    assert check("continuous-maml-5", by_norm)
    assert check("continuous-maml-5", by_single_precision)
    assert check("continuous-maml-5", by_numpy)


def test_the_extrapolation_may_take_the_error_away():
    def by_error(of_steps, K):
        fine = of_steps(2 * K)
        return fine - (of_steps(K) - fine)

    assert check("continuous-maml-6", by_error)
