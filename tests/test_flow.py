"""`GradientFlow`: the meta-gradient of the continuous-time inner loop."""

import itertools
from functools import partial

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
from companion.calculus import ravel
from companion.integrate import IntegrationError
from companion.memory import peak_memory
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


NETWORK = functional(mlp((1, 40, 40, 1), seed=0), torch.nn.functional.mse_loss)
SINE = sinusoids(1, 10, 10, seed=1)[:1]


@pytest.mark.parametrize("time", [0.1, 0.5, 1.0, 2.0])
def test_adjoint_is_forward_along_directions_on_the_sinusoid_network(time):
    loss, theta = NETWORK
    inner = GradientFlow(time, rtol=1e-10, atol=1e-12)
    vector, unravel = ravel(theta)
    directions = torch.randn(
        len(vector), 20,
        generator=torch.Generator().manual_seed(0), dtype=vector.dtype,
    )  # fmt: skip
    adjoint, _ = ravel(meta_gradient(loss, theta, SINE, inner))
    end, columns = inner.sensitivity(loss, theta, SINE[0].support, directions)
    slope, _ = ravel(gradient(loss)(unravel(end), SINE[0].query))
    torch.testing.assert_close(
        adjoint @ directions, slope @ columns, rtol=1e-7, atol=0.0
    )


def test_memory_of_sensitivities_is_constant_that_of_the_adjoint_its_states():
    loss, theta = NETWORK
    support, calls, sizes, stops = SINE[0].support, [], [], []
    vector, _ = ravel(theta)
    column = torch.ones(len(vector), 1, dtype=vector.dtype)

    for time in (0.02, 2.0):
        count = 0

        def counted(theta, data):
            nonlocal count
            count += 1
            return loss(theta, data)

        inner = GradientFlow(time)
        inner.sensitivity(counted, theta, support, column)
        calls.append(count)
        measured = (
            partial(inner.sensitivity, loss, theta, support, column),
            partial(meta_gradient, loss, theta, SINE, inner),
        )
        sizes.append([peak_memory(f) for f in measured])
        stops.append(len(inner.solution(loss, theta, support, time).times))
    assert calls[1] > 10 * calls[0]
    (forward, adjoint), (forward_long, adjoint_long) = sizes
    assert forward_long == pytest.approx(forward, rel=0.1)
    # DOP853 keeps eight vectors a step, and scipy copies the stops twice.
    vectors = (adjoint_long - adjoint) / (vector.nbytes * (stops[1] - stops[0]))
    assert 8 <= vectors <= 12


def test_stiffness_is_the_largest_curvature_times_the_horizon():
    inner = GradientFlow(0.7)
    found = inner.stiffness(quadratic_loss, THETA, (A, C))
    assert found == pytest.approx(0.7 * float(torch.linalg.eigvalsh(A)[-1]))

    def quartic(theta, data):
        return (theta**4).sum() / 4 + theta.square().sum() / 2

    start = torch.linspace(0.1, 2.0, 12, dtype=torch.float64)
    found = inner.stiffness(quartic, start, None)
    assert found == pytest.approx(0.7 * (3 * 2.0**2 + 1), rel=1e-6)


def test_a_flow_that_is_too_stiff_says_how_stiff():
    inner = GradientFlow(1.0, max_evaluations=200)
    with pytest.raises(IntegrationError, match=r"λ_max·T.*is 3\.12e\+06"):
        adapt(quadratic_loss, THETA, (1e6 * A, C), inner)


def test_a_batch_inside_a_transform_is_its_list():
    batch, inner = TaskBatch.of(TASKS), GradientFlow(0.7)
    found = gradient(
        lambda theta: meta_objective(quadratic_loss, theta, batch, inner)
    )(THETA)
    torch.testing.assert_close(found, closed_form(0.7), rtol=1e-8, atol=1e-9)


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


def test_the_start_may_hold_the_symbols_of_the_loss():
    x, c = sp.symbols("x c")
    a, T = sp.symbols("a T", positive=True)

    def loss(x, data):
        return a * (x - c) ** 2 / 2

    twice = adapt(loss, adapt(loss, x, None, GradientFlow(T)), None,
                  GradientFlow(T))  # fmt: skip
    once = adapt(loss, x, None, GradientFlow(2 * T))
    assert sp.simplify(twice - once) == 0


def test_a_matrix_of_symbols_without_a_sign_flows_too():
    a, b, x, y, T = sp.symbols("a b x y T", real=True)
    H, theta = sp.Matrix([[a, b], [b, a]]), sp.Matrix([x, y])
    found = adapt(
        lambda theta, data: (theta.T * H * theta)[0] / 2,
        theta, None, GradientFlow(T),
    )  # fmt: skip
    rotated = sp.Matrix([x + y, x - y]) / 2
    slow, fast = sp.exp(-T * (a + b)), sp.exp(-T * (a - b))
    expected = sp.Matrix(
        [slow * rotated[0] + fast * rotated[1],
         slow * rotated[0] - fast * rotated[1]]
    )  # fmt: skip
    assert (found - expected).applyfunc(sp.simplify).is_zero_matrix


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
