"""The article's programs as we have them, and as it printed them."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from companion import (
    GradientDescent,
    Task,
    gradient,
    meta_gradient,
    meta_objective,
)
from companion.article import (
    MAML,
    meta_learning_ode,
    solve_meta_learning_ode,
)
from companion.models import mlp
from companion.tasks import quadratic_loss, quadratics, sinusoids

f64 = torch.float64


class ListedMAML(nn.Module):
    """The article's listing, letter by letter."""

    def __init__(self, model, inner_lr, outer_lr):
        super().__init__()
        self.model = model
        self.inner_lr = inner_lr
        self.outer_lr = outer_lr

    def forward(self, tasks, num_updates):
        meta_grads = [0 for _ in self.model.parameters()]
        for task in tasks:
            task_params = [p.clone() for p in self.model.parameters()]
            for _ in range(num_updates):
                task_loss = task.loss(self.model, task_params)
                grads = torch.autograd.grad(
                    task_loss, task_params, create_graph=True
                )
                for i, param in enumerate(task_params):
                    param.data.sub_(self.inner_lr * grads[i])
            task_loss = task.loss(self.model, task_params)
            grads = torch.autograd.grad(task_loss, self.model.parameters())
            for i, param in enumerate(self.model.parameters()):
                meta_grads[i] += grads[i] / len(tasks)
        for i, param in enumerate(self.model.parameters()):
            param.data.sub_(self.outer_lr * meta_grads[i])
        return self.model


def listed_solve(theta0, tasks, T=1.0, dt=0.01):
    """The article's solver, letter by letter."""
    t = np.arange(0, T, dt)
    theta = theta0
    thetas = [theta0]
    for _ in t:
        dtheta_dt = 0
        for task in tasks:
            dtheta_dt += -task.grad(theta)
        theta += dt * dtheta_dt
        thetas.append(theta)
    return np.array(thetas)


class Regression:
    """A task of the article's kind: a loss of a model and its parameters."""

    def __init__(self, data):
        self.data = data

    def loss(self, model, params):
        x, y = self.data
        names = [name for name, _ in model.named_parameters()]
        output = functional_call(model, dict(zip(names, params)), (x,))
        return nn.functional.mse_loss(output, y)


class Quadratic:
    """The same for one parameter vector; also a task with a gradient."""

    def __init__(self, A, c):
        self.A, self.c = A, c

    def loss(self, model, params):
        return quadratic_loss(params[0], (self.A, self.c))

    def grad(self, theta):
        return self.A @ (theta - self.c)


class Vector(nn.Module):
    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta.clone())


def regressions(n=3):
    return [Regression(task.support) for task in sinusoids(n, 5, 1, seed=0)]


def steps_of(program, num_updates, tasks, lr=0.1):
    """The gradients by which a program steps a network of fixed weights."""
    model = mlp((1, 6, 1), seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    returned = program(model, lr, 1.0)(tasks, num_updates)
    assert returned is model
    return [b - p.detach() for b, p in zip(before, model.parameters())]


def estimate(method, num_updates, tasks, lr=0.1):
    model = mlp((1, 6, 1), seed=0)
    theta = [p.detach() for p in model.parameters()]
    return meta_gradient(
        lambda theta, task: task[0].loss(model, theta),
        theta,
        [Task([task], [task]) for task in tasks],
        GradientDescent(lr, num_updates),
        method,
    )


def close(computed, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(computed, expected, rtol=rtol, atol=atol)


# MAML. ----------------------------------------------------------------------


@pytest.mark.parametrize("num_updates", [0, 1, 2, 4])
def test_maml_steps_by_the_exact_gradient(num_updates):
    tasks = regressions()
    close(
        steps_of(MAML, num_updates, tasks),
        list(estimate("reverse", num_updates, tasks)),
    )


@pytest.mark.parametrize("num_updates", [1, 2, 4])
def test_maml_on_quadratics_matches_closed_form(num_updates):
    """∇F = mean (I - αA)^K A (I - αA)^K (θ - c)."""
    A, c = quadratics(4, 3, seed=0).support
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=f64)
    model = Vector(theta)
    MAML(model, 0.4, 0.7)([*map(Quadratic, A, c)], num_updates)
    M = torch.linalg.matrix_power(
        torch.eye(3, dtype=f64) - 0.4 * A, num_updates
    )
    slope = (M @ A @ M @ (theta - c).unsqueeze(-1)).squeeze(-1).mean(0)
    close(model.theta.detach(), theta - 0.7 * slope)


@pytest.mark.parametrize("num_updates", [1, 2, 4])
def test_the_listing_steps_by_fomaml_and_not_by_maml(num_updates):
    tasks = regressions()
    listed = steps_of(ListedMAML, num_updates, tasks)
    close(listed, list(estimate("first_order", num_updates, tasks)))
    exact = estimate("reverse", num_updates, tasks)
    distance = sum((u - v).norm() for u, v in zip(listed, exact))
    assert distance > 1e-2 * sum(v.norm() for v in exact)


def test_listing_and_maml_agree_without_inner_steps():
    tasks = regressions()
    close(steps_of(ListedMAML, 0, tasks), steps_of(MAML, 0, tasks))


def test_maml_descends_its_objective():
    tasks, model = regressions(), mlp((1, 6, 1), seed=0)

    def objective():
        return meta_objective(
            lambda theta, task: task[0].loss(model, theta),
            [p.detach() for p in model.parameters()],
            [Task([task], [task]) for task in tasks],
            GradientDescent(0.05, 2),
        )

    values = [objective()]
    program = MAML(model, 0.05, 0.01)
    for _ in range(20):
        program(tasks, 2)
        values.append(objective())
    assert all(after < before for before, after in itertools.pairwise(values))


def test_maml_leaves_frozen_parameters_and_passes_them_on():
    model = mlp((1, 6, 1), seed=0)
    model[0].weight.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    MAML(model, 0.1, 0.5)(regressions(), 2)
    moved = [not torch.equal(b, p) for b, p in zip(before, model.parameters())]
    assert moved == [False, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == moved
    assert all(p.grad is None for p in model.parameters())


def test_maml_takes_any_iterable_and_keeps_float32():
    model = mlp((1, 4, 1), seed=0, dtype=torch.float32)
    tasks = sinusoids(2, 5, 1, seed=0, dtype=torch.float32)
    MAML(model, 0.1, 0.1)((Regression(t.support) for t in tasks), 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("bad", [-1, 1.5, "two", None])
def test_num_updates_must_be_a_non_negative_integer(bad):
    with pytest.raises(ValueError, match="num_updates must be a non-negative"):
        MAML(mlp((1, 2, 1), seed=0), 0.1, 0.1)(regressions(), bad)


@pytest.mark.parametrize("name", ["inner_lr", "outer_lr"])
def test_rates_must_be_finite(name):
    rates = {"inner_lr": 0.1, "outer_lr": 0.1, name: math.nan}
    with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
        MAML(mlp((1, 2, 1), seed=0), **rates)


def test_maml_without_tasks_or_parameters_raises():
    with pytest.raises(ValueError, match="tasks must not be empty"):
        MAML(mlp((1, 2, 1), seed=0), 0.1, 0.1)([], 1)
    with pytest.raises(ValueError, match="no parameter that requires"):
        MAML(nn.Tanh(), 0.1, 0.1)(regressions(), 1)


def test_after_an_error_the_model_is_as_it_was():
    model = mlp((1, 4, 1), seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    bad = Regression((torch.ones(2, 1, dtype=f64) * math.nan,) * 2)
    with pytest.raises(ValueError, match="not finite"):
        MAML(model, 0.1, 0.1)([*regressions(), bad], 1)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_task_that_ignores_params_raises():
    class Forgetful(Regression):
        def loss(self, model, params):
            x, y = self.data
            return nn.functional.mse_loss(model(x), y)

    task = Forgetful(sinusoids(1, 3, 1, seed=0)[0].support)
    with pytest.raises(ValueError, match="does not depend on theta"):
        MAML(mlp((1, 2, 1), seed=0), 0.1, 0.1)([task], 1)


# The flow. ------------------------------------------------------------------


class Bowl:
    """½ a (θ - c)² in any number type."""

    def __init__(self, a, c):
        self.a, self.c = a, c

    def grad(self, theta):
        return self.a * (theta - self.c)


BOWLS = [Bowl(1.0, 2.0), Bowl(3.0, -1.0)]


def test_the_field_is_the_descent_of_the_joint_loss():
    A, c = quadratics(4, 3, seed=0).support
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=f64)

    def joint(theta):
        return sum(quadratic_loss(theta, data) for data in zip(A, c))

    tasks = [*map(Quadratic, A, c)]
    for t in (0, 5.0):
        close(meta_learning_ode(theta, t, tasks), -gradient(joint)(theta))


def test_the_flow_ends_at_the_joint_optimum():
    A, c = quadratics(4, 3, seed=0).support
    end = solve_meta_learning_ode(
        torch.zeros(3, dtype=f64), [*map(Quadratic, A, c)], T=40.0, dt=0.1
    )[-1]
    optimum = torch.linalg.solve(
        A.sum(0), (A @ c.unsqueeze(-1)).sum(0).squeeze(-1)
    )
    close(end, optimum)


def test_the_meta_objective_can_rise_along_the_flow():
    theta0 = torch.tensor([0.0], dtype=f64)
    steep = torch.tensor([[1.0]], dtype=f64), torch.tensor([1.0], dtype=f64)
    flat = torch.tensor([[0.1]], dtype=f64), torch.tensor([0.0], dtype=f64)
    tasks = [Task(steep, steep), Task(flat, flat)]
    path = solve_meta_learning_ode(
        theta0, [Quadratic(*task.support) for task in tasks]
    )
    inner = GradientDescent(1.0, 1)
    values = [
        meta_objective(quadratic_loss, theta, tasks, inner) for theta in path
    ]
    # The flow moves to the steep task's optimum, which one step would reach
    # from anywhere, and away from that of the flat one.
    assert all(after > before for before, after in itertools.pairwise(values))


def test_the_solution_is_eulers():
    """θ_n - θ* = (1 - hΣa)^n (θ_0 - θ*)."""
    path = solve_meta_learning_ode(1.0, BOWLS, T=1.0, dt=0.1)
    optimum = (1 * 2 + 3 * -1) / 4
    n = np.arange(11)
    np.testing.assert_allclose(
        path, optimum + (1 - 0.1 * 4) ** n * (1 - optimum), rtol=1e-12
    )


def test_the_solution_tends_to_the_flow_at_order_one():
    optimum, T = -0.25, 1.0
    exact = optimum + math.exp(-4 * T) * (1 - optimum)
    errors = [
        abs(solve_meta_learning_ode(1.0, BOWLS, T, dt)[-1] - exact)
        for dt in (2.0**-k for k in range(6, 11))
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert abs(math.log2(coarse / fine) - 1) < 0.1


@pytest.mark.parametrize(
    "T, dt, rows",
    [
        (1.0, 0.01, 101),
        (1.1, 0.1, 12),  # 1.1 / 0.1 is 11.000000000000002
        (0.3, 0.1, 4),
        (1.0, 0.3, 5),
        (0.5, 2.0, 2),
        (0.0, 0.1, 1),
    ],
)
def test_it_ends_at_T_exactly(T, dt, rows):
    class Clock:
        """dθ/dt = 1: the state is the time."""

        def grad(self, theta):
            return -1.0

    path = solve_meta_learning_ode(0.0, [Clock()], T, dt)
    assert len(path) == rows
    np.testing.assert_allclose(
        path, np.linspace(0, T, rows), rtol=1e-13, atol=0
    )


def test_rows_differ_and_the_start_is_left_alone_unlike_in_the_listing():
    start, control = np.array([1.0, 5.0]), np.array([1.0, 5.0])
    path = solve_meta_learning_ode(start, BOWLS)
    assert np.array_equal(start, control)
    assert np.array_equal(path[0], control)
    assert not np.shares_memory(path, start)
    assert (np.abs(np.diff(path, axis=0)) > 0).all()

    listed = listed_solve(start, BOWLS)
    assert np.array_equal(listed, np.tile(listed[-1], (101, 1)))
    assert np.array_equal(start, listed[-1])
    np.testing.assert_allclose(path[-1], listed[-1], rtol=1e-12)


def test_the_listing_overshoots():
    class Clock:
        def grad(self, theta):
            return -1.0

    assert listed_solve(0.0, [Clock()], 1.0, 0.3)[-1] > 1.19
    assert solve_meta_learning_ode(0.0, [Clock()], 1.0, 0.3)[-1] == 1.0


def test_any_number_type():
    expected = solve_meta_learning_ode(1.0, BOWLS)
    for start in (1, np.array(1), np.float64(1), Fraction(1)):
        path = solve_meta_learning_ode(start, BOWLS)
        np.testing.assert_allclose(path.astype(float), expected, rtol=1e-12)
    for start in ([1, 1], np.array([1, 1])):
        path = solve_meta_learning_ode(start, BOWLS)
        assert path.shape == (101, 2) and path.dtype == np.float64
    with pytest.raises(TypeError, match="Cannot cast"):
        listed_solve(np.array([1, 1]), BOWLS)


def test_arrays_and_tensors_keep_their_precision():
    bowls = [Bowl(1, 2), Bowl(3, -1)]
    start = np.array([1], dtype=np.float32)
    assert solve_meta_learning_ode(start, bowls).dtype == np.float32
    for dtype in (torch.float32, f64):
        path = solve_meta_learning_ode(torch.ones(2, dtype=dtype), bowls)
        assert isinstance(path, torch.Tensor)
        assert path.shape == (101, 2) and path.dtype == dtype
    integers = torch.tensor([1, 1])
    path = solve_meta_learning_ode(integers, bowls)
    assert path.dtype == f64
    assert torch.equal(integers, torch.tensor([1, 1]))
    start = torch.ones(2, requires_grad=True)
    assert not solve_meta_learning_ode(start, bowls).requires_grad


def test_the_price_of_the_sum_over_tasks():
    """The stable step is 2/(Na): ten tasks turn a stable step unstable."""
    one, ten = (
        solve_meta_learning_ode(1.0, [Bowl(1.0, 0.0)] * n, T=20.0, dt=0.5)
        for n in (1, 10)
    )
    assert abs(one[-1]) < 1e-5
    assert abs(ten[-1]) > 1e20
    assert (
        abs(solve_meta_learning_ode(1.0, [Bowl(1.0, 0.0)] * 10, 20.0, 0.05)[-1])
        < 1e-5
    )


def test_no_tasks_raise():
    with pytest.raises(ValueError, match="tasks must not be empty"):
        meta_learning_ode(1.0, 0, [])
    with pytest.raises(ValueError, match="tasks must not be empty"):
        solve_meta_learning_ode(1.0, [], T=0.0)


@pytest.mark.parametrize("T", [-1.0, math.nan, math.inf])
def test_T_must_be_a_time(T):
    with pytest.raises(ValueError, match="T must be a finite time"):
        solve_meta_learning_ode(1.0, BOWLS, T=T)


@pytest.mark.parametrize("dt", [0.0, -0.1, math.nan, math.inf])
def test_dt_must_be_a_step(dt):
    with pytest.raises(ValueError, match="dt must be a positive finite step"):
        solve_meta_learning_ode(1.0, BOWLS, dt=dt)


@pytest.mark.filterwarnings("ignore:overflow")
def test_an_overflow_raises_and_names_the_step():
    with pytest.raises(ValueError, match="not finite at t = .*dt = 1.0"):
        solve_meta_learning_ode(1.0, [Bowl(1e100, 0.0)], T=10.0, dt=1.0)


def test_a_gradient_of_another_shape_raises():
    class Column:
        def grad(self, theta):
            return theta[:, None]

    with pytest.raises(ValueError, match=r"shape \(2, 1\) for \(2,\)"):
        solve_meta_learning_ode(np.ones(2), [Column()])
