"""`GradientFlow`: the meta-gradient of the continuous-time inner loop."""

import itertools

import pytest
import sympy as sp
import torch

from companion import (
    GradientDescent,
    GradientFlow,
    Task,
    TaskBatch,
    adapt,
    functional,
    gradient,
    meta_gradient,
    meta_objective,
)
from companion.models import mlp
from companion.tasks import quadratic_loss, sinusoids


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


A = tensor([[1.0, 0.5], [0.5, 3.0]])
B = tensor([[2.0, -0.3], [-0.3, 0.4]])
C, THETA = tensor([1.0, -1.0]), tensor([0.3, 0.7])
TASKS = [Task((A, C), (B, C + 1)), Task((B, C - 1), (A, C))]


def closed_form(time):
    """exp(-TA) Q (exp(-TA)(θ - c) + c - c_q), averaged."""
    terms = []
    for (H, c), (Q, q) in TASKS:
        decay = torch.linalg.matrix_exp(-time * H)
        terms.append(decay @ Q @ (decay @ (THETA - c) + c - q))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("method", ["reverse", "adjoint", "forward"])
@pytest.mark.parametrize("time", [0.0, 0.7, 3.0])
def test_meta_gradient_of_quadratics_is_the_matrix_exponential(method, time):
    found = meta_gradient(
        quadratic_loss, THETA, TASKS, GradientFlow(time), method
    )
    torch.testing.assert_close(found, closed_form(time), rtol=1e-8, atol=1e-9)


def test_a_batch_is_solved_task_by_task_without_a_warning(recwarn):
    batch = TaskBatch.of(TASKS)
    found = meta_gradient(quadratic_loss, THETA, batch, GradientFlow(0.7))
    torch.testing.assert_close(found, closed_form(0.7), rtol=1e-8, atol=1e-9)
    assert not recwarn.list


def test_a_stiff_task_does_not_change_the_answer_of_another():
    stiff = Task((30 * A, C), (A, C))
    inner = GradientFlow(0.7)
    alone = meta_gradient(quadratic_loss, THETA, TASKS[:1], inner)
    both = meta_gradient(quadratic_loss, THETA, [TASKS[0], stiff], inner)
    other = meta_gradient(quadratic_loss, THETA, [stiff], inner)
    assert torch.equal(2 * both, alone + other)


def test_gradient_of_the_meta_objective_is_the_adjoint():
    inner = GradientFlow(0.7)
    found = gradient(
        lambda theta: meta_objective(quadratic_loss, theta, TASKS, inner)
    )(THETA)
    torch.testing.assert_close(found, closed_form(0.7), rtol=1e-8, atol=1e-9)


def test_horizon_gradient_is_minus_the_product_of_the_two_gradients():
    found, slow, referee = (
        meta_gradient(
            quadratic_loss, THETA, TASKS, GradientFlow(0.7), method, "time"
        )
        for method in ("adjoint", "forward", "finite_difference")
    )
    terms = []
    for (H, c), (Q, q) in TASKS:
        end = torch.linalg.matrix_exp(-0.7 * H) @ (THETA - c) + c
        terms.append(-(Q @ (end - q)) @ (H @ (end - c)))
    expected = sum(terms) / 2
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(slow, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(referee, expected, rtol=1e-6, atol=1e-7)


def test_adjoint_is_forward_on_a_network_and_the_limit_of_small_steps():
    loss, theta = functional(
        mlp((1, 4, 1), seed=0), torch.nn.functional.mse_loss
    )
    tasks = sinusoids(2, 5, 5, seed=1)
    inner = GradientFlow(0.4)
    adjoint = meta_gradient(loss, theta, tasks, inner)
    forward = meta_gradient(loss, theta, tasks, inner, "forward")
    errors = []
    for steps in (32, 64):
        discrete = meta_gradient(
            loss, theta, tasks, GradientDescent(0.4 / steps, steps)
        )
        errors.append(
            sum((discrete[k] - adjoint[k]).norm() ** 2 for k in theta).sqrt()
        )
    for name in theta:
        torch.testing.assert_close(
            adjoint[name], forward[name], rtol=1e-7, atol=1e-8
        )
    slopes = [float(torch.log2(a / b)) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(1.0, abs=0.1)


def test_symbols_flow_by_the_matrix_exponential():
    x, c = sp.symbols("x c")
    a, T = sp.symbols("a T", positive=True)
    found = adapt(
        lambda x, data: data[0] * (x - data[1]) ** 2 / 2,
        x, (a, c), GradientFlow(T),
    )  # fmt: skip
    assert sp.simplify(found - (c + sp.exp(-a * T) * (x - c))) == 0
    with pytest.raises(ValueError, match="quadratic loss"):
        adapt(lambda x, data: x**4, x, None, GradientFlow(T))


def test_second_derivatives_and_derivatives_by_the_data_are_refused():
    inner = GradientFlow(0.3)
    with pytest.raises(ValueError, match="first derivative only"):
        torch.func.jacrev(
            lambda theta: meta_gradient(quadratic_loss, theta, TASKS, inner)
        )(THETA)
    with pytest.raises(ValueError, match="with respect to the data"):
        gradient(
            lambda c: meta_objective(
                quadratic_loss, THETA, [Task((A, c), (A, C))], inner
            )
        )(C)


@pytest.mark.parametrize("time", [-1.0, float("inf"), float("nan")])
def test_the_horizon_must_be_finite_and_not_negative(time):
    with pytest.raises(ValueError, match="time must be a finite"):
        GradientFlow(time)


def test_methods_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="'adjoint'.*GradientFlow"):
        meta_gradient(quadratic_loss, THETA, TASKS, GradientFlow(1), "reptile")
    with pytest.raises(ValueError, match="GradientDescent"):
        meta_gradient(
            quadratic_loss, THETA, TASKS, GradientDescent(0.1, 1), "adjoint"
        )
