"""`Proximal`: the inner problem, and its meta-gradient by one linear system."""

import pytest
import scipy.optimize
import sympy as sp
import torch
from torch.profiler import ProfilerActivity, profile

from companion import (
    GradientDescent,
    Proximal,
    Task,
    TaskBatch,
    adapt,
    adaptation_path,
    functional,
    gradient,
    meta_gradient,
    meta_objective,
    meta_value_and_gradient,
)
from companion.calculus import ravel
from companion.models import mlp
from companion.proximal import ConvergenceError
from companion.tasks import quadratic_loss, quadratics, sinusoids


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


A = tensor([[1.0, 0.5], [0.5, 3.0]])
B = tensor([[2.0, -0.3], [-0.3, 0.4]])
C, THETA = tensor([1.0, -1.0]), tensor([0.3, 0.7])
TASKS = [Task((A, C), (B, C + 1)), Task((B, C - 1), (A, C))]


def closed_form(theta, strength):
    """s Q (s(θ - c) + c - c_q) with s = (I + A/λ)⁻¹, averaged."""
    terms = []
    for (H, c), (Q, q) in TASKS:
        s = torch.linalg.inv(torch.eye(2, dtype=theta.dtype) + H / strength)
        terms.append(s @ Q @ (s @ (theta - c) + c - q))
    return sum(terms) / len(terms)


def quartic(theta, data):
    """½ (θ-c)ᵀA(θ-c) + Σθ⁴/4: convex, with a Hessian that varies."""
    H, c = data
    return (theta - c) @ H @ (theta - c) / 2 + (theta**4).sum() / 4


def well(theta, data):
    """The double well (θ² - 1)²/4, whose curvature at 0 is -1."""
    return ((theta**2 - 1) ** 2).sum() / 4


def network(seed=0):
    return functional(mlp((1, 6, 1), seed=seed), torch.nn.functional.mse_loss)


def close(found, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


# Against closed forms, scipy and differences. -------------------------------


@pytest.mark.parametrize("method", ["reverse", "implicit"])
@pytest.mark.parametrize("strength", [0.05, 1.0, 40.0])
def test_meta_gradient_of_quadratics_matches_closed_form(method, strength):
    inner = Proximal(strength)
    found = meta_gradient(quadratic_loss, THETA, TASKS, inner, method)
    close(found, closed_form(THETA, strength))


def test_solution_is_the_one_of_scipy():
    inner = Proximal(0.7)
    found = adapt(quartic, THETA, (A, C), inner)
    there = scipy.optimize.minimize(
        lambda x: (
            float(quartic(tensor(x), (A, C)))
            + 0.35 * ((x - THETA.numpy()) ** 2).sum()
        ),
        THETA.numpy(),
        tol=1e-12,
    )
    close(found, tensor(there.x), rtol=1e-6)
    slope = gradient(quartic)(found, (A, C)) + 0.7 * (found - THETA)
    assert slope.norm() < 1e-10


def test_path_is_start_and_solution_and_nothing_is_mutated():
    before = THETA.clone()
    path = adaptation_path(quartic, THETA, (A, C), Proximal(0.7))
    assert len(path) == 2
    assert torch.equal(path[0], before) and torch.equal(THETA, before)
    assert not path[1].requires_grad


@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_meta_gradient_in_theta_and_strength_matches_differences(strength):
    loss, theta = functional(
        mlp((1, 3, 1), seed=0), torch.nn.functional.mse_loss
    )
    tasks = sinusoids(2, 5, 5, seed=1)
    arguments = (loss, theta, tasks, Proximal(strength, tolerance=1e-13))
    wrt = ("theta", "strength")
    found = meta_gradient(*arguments, "implicit", wrt)
    referee = meta_gradient(*arguments, "finite_difference", wrt)
    for name in theta:
        close(found.theta[name], referee.theta[name], rtol=1e-6, atol=1e-8)
    close(found.strength, referee.strength, rtol=1e-6, atol=1e-8)


def test_strength_gradient_of_a_quadratic_matches_closed_form():
    # One parameter: φ* = (λθ + ac)/(λ + a), so dφ*/dλ = a(θ - c)/(λ + a)².
    a, c, theta, strength = 2.0, 1.0, tensor([0.4]), tensor(0.5)
    task = Task((tensor([[a]]), tensor([c])), (tensor([[3.0]]), tensor([0.0])))
    found = meta_gradient(
        quadratic_loss, theta, [task], Proximal(strength), wrt="strength"
    )
    end = (0.5 * 0.4 + a * c) / (0.5 + a)
    close(found, tensor(3 * end * a * (0.4 - c) / (0.5 + a) ** 2))


def test_solution_is_the_limit_of_gradient_descent_on_the_whole_problem():
    strength, lr = 0.8, 0.1
    theta = THETA.clone().requires_grad_()
    phi = theta
    for _ in range(400):
        slope = gradient(quartic)(phi, (A, C)) + strength * (phi - theta)
        phi = phi - lr * slope
    (unrolled,) = torch.autograd.grad(quartic(phi, (B, C)), theta)
    found = meta_gradient(
        quartic, THETA, [Task((A, C), (B, C))], Proximal(strength)
    )
    close(found, unrolled, rtol=1e-9)


def test_first_order_with_support_as_query_is_the_moreau_gradient():
    strength, task = 0.8, Task((A, C), (A, C))
    inner = Proximal(strength)
    found = meta_gradient(quartic, THETA, [task], inner, "first_order")
    phi = adapt(quartic, THETA, task.support, inner)
    close(found, strength * (THETA - phi), rtol=1e-9)

    def envelope(theta):
        phi = adapt(quartic, theta, task.support, inner)
        return (
            quartic(phi, task.support)
            + strength / 2 * ((phi - theta) ** 2).sum()
        )

    close(found, gradient(envelope)(THETA), rtol=1e-9)


# Derivatives from outside. --------------------------------------------------


def test_gradient_of_the_meta_objective_is_the_meta_gradient():
    inner = Proximal(0.8)
    found = gradient(
        lambda theta: meta_objective(quartic, theta, TASKS, inner)
    )(THETA)
    close(found, meta_gradient(quartic, THETA, TASKS, inner))


def test_autograd_without_transforms_gives_the_meta_gradient():
    theta = THETA.clone().requires_grad_()
    inner = Proximal(0.8)
    meta_objective(quartic, theta, TASKS, inner).backward()
    close(theta.grad, meta_gradient(quartic, THETA, TASKS, inner))


@pytest.mark.parametrize("method", ["implicit", "first_order"])
def test_second_derivatives_match_differences(method):
    inner = Proximal(0.8)

    def slope(theta):
        return meta_gradient(quartic, theta, TASKS, inner, method)

    found = torch.func.jacrev(slope)(THETA)
    steps = 1e-5 * torch.eye(2, dtype=torch.float64)
    columns = [(slope(THETA + h) - slope(THETA - h)) / 2e-5 for h in steps]
    close(found, torch.stack(columns, 1), rtol=1e-7, atol=1e-8)
    if method == "implicit":
        close(found, found.T)


def test_derivatives_by_the_data_match_closed_form():
    inner = Proximal(0.5)
    found = gradient(
        lambda c: meta_objective(
            quadratic_loss, THETA, [Task((A, c), (B, C))], inner
        )
    )(C)
    s = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + A / 0.5)
    end = s @ (THETA - C) + C
    close(found, (torch.eye(2, dtype=torch.float64) - s) @ B @ (end - C))


# A batch. -------------------------------------------------------------------


def test_a_batch_gives_what_its_list_gives(recwarn):
    loss, theta = network()
    batch = sinusoids(6, 5, 5, seed=2)
    inner = Proximal(0.5)
    wrt = ("theta", "strength")
    value, together = meta_value_and_gradient(
        loss, theta, batch, inner, "implicit", wrt
    )
    other, one_by_one = meta_value_and_gradient(
        loss, theta, list(batch), inner, "implicit", wrt
    )
    close(value, other)
    for name in theta:
        close(together.theta[name], one_by_one.theta[name], rtol=1e-8)
    close(together.strength, one_by_one.strength, rtol=1e-8)
    assert not recwarn.list


def test_a_batch_is_solved_together():
    calls = 0

    def counted(theta, data):
        nonlocal calls
        calls += 1
        return quadratic_loss(theta, data)

    batch = quadratics(50, 3, seed=0)
    meta_gradient(counted, torch.zeros_like(batch[0].support[1]), batch,
                  Proximal(0.5))  # fmt: skip
    assert calls < 50


def test_a_hard_task_does_not_change_the_answer_of_another():
    hard = Task((100 * A, C), (A, C))
    easy = Task((A, C), (B, C))
    inner = Proximal(0.5)
    alone, other = (
        meta_gradient(quartic, THETA, [task], inner) for task in (easy, hard)
    )
    both = meta_gradient(quartic, THETA, TaskBatch.of([easy, hard]), inner)
    close(both, (alone + other) / 2)


def test_a_loss_that_cannot_be_batched_goes_one_by_one():
    def stubborn(theta, data):
        float(data[1][0])  # what no batched tensor can give
        return quadratic_loss(theta, data)

    batch = TaskBatch.of(TASKS)
    with pytest.warns(UserWarning, match="one by one"):
        found = meta_gradient(stubborn, THETA, batch, Proximal(1.0))
    close(found, closed_form(THETA, 1.0))


def test_float32_stays_float32():
    tasks = [
        Task(*(tuple(x.float() for x in part) for part in task))
        for task in TASKS
    ]
    found = meta_gradient(quartic, THETA.float(), tasks, Proximal(0.8))
    assert found.dtype == torch.float32
    expected = meta_gradient(quartic, THETA, TASKS, Proximal(0.8))
    close(found.double(), expected, rtol=1e-4, atol=1e-5)


# Symbols. -------------------------------------------------------------------


def test_symbols_solve_a_quadratic_and_differentiate_it():
    theta = sp.Matrix(sp.symbols("theta_1 theta_2"))
    c = sp.Matrix(sp.symbols("c_1 c_2"))
    strength = sp.Symbol("lambda", positive=True)
    H, Q = sp.Matrix([[2, 1], [1, 3]]), sp.Matrix([[1, 0], [0, 4]])
    found = meta_gradient(
        quadratic_loss, theta, [Task((H, c), (Q, c))], Proximal(strength),
        "implicit",
    )  # fmt: skip
    s = (sp.eye(2) + H / strength).inv()
    assert (
        (found - s * Q * s * (theta - c)).applyfunc(sp.simplify).is_zero_matrix
    )


def test_symbols_of_one_parameter_give_the_strengths_gradient():
    x, c, a, s = sp.symbols("x c a lambda", positive=True)

    def bowl(x, data):
        return data[0] * (x - data[1]) ** 2 / 2

    found = meta_gradient(
        bowl, x, [Task((a, c), (a, c))], Proximal(s), wrt="strength"
    )
    expected = s * a**2 * (x - c) ** 2 / (s + a) ** 3
    assert sp.simplify(found - expected) == 0
    with pytest.raises(ValueError, match="quadratic loss"):
        adapt(lambda x, data: x**4, x, None, Proximal(s))
    with pytest.raises(TypeError, match="expression or a matrix"):
        adapt(lambda t, d: t[0] ** 2 + t[1] ** 2, (x, c), None, Proximal(s))


# What is not solved raises. -------------------------------------------------


def test_a_maximum_is_not_taken_for_a_solution():
    for weak in (0.5, 1.0):
        with pytest.raises(ConvergenceError, match="not positive definite"):
            meta_objective(
                well, tensor([0.0]), [Task(None, None)], Proximal(weak)
            )
    strong = adapt(well, tensor([0.0]), None, Proximal(1.5))
    assert float(strong) == 0


def test_a_start_beside_the_hilltop_ends_in_the_well_on_its_side():
    for side in (1.0, -1.0):
        found = adapt(well, tensor([1e-9 * side]), None, Proximal(0.5))
        close(found, tensor([side * 0.5**0.5]), rtol=1e-8)


def test_an_unfinished_inner_problem_raises_with_its_residual():
    inner = Proximal(0.01, max_steps=1)
    with pytest.raises(ConvergenceError, match="1 Newton steps") as caught:
        meta_gradient(quartic, 5 * THETA, TASKS, inner)
    assert caught.value.residual > 1e-11
    assert "tasks[0]" in "".join(caught.value.__notes__)
    with pytest.raises(ConvergenceError, match="of task 1"):
        meta_gradient(
            quartic, 5 * THETA,
            TaskBatch.of([Task((0 * A, 0 * C), (A, C)), TASKS[1]]),
            Proximal(50.0, max_steps=1, tolerance=1e-3),
        )  # fmt: skip


def test_unfinished_conjugate_gradients_raise_with_their_residual():
    eigenvalues = torch.linspace(0.01, 10, 30, dtype=torch.float64)
    center = torch.ones(30, dtype=torch.float64)
    task = Task((torch.diag(eigenvalues), center), (torch.eye(30).double(),
                                                    -center))  # fmt: skip
    inner = Proximal(0.01, max_products=5, tolerance=1e-9)
    with pytest.raises(ConvergenceError, match="5 Hessian-vector") as caught:
        meta_gradient(quadratic_loss, 0 * center, [task], inner)
    assert 1e-9 < caught.value.residual < 10


def test_a_loss_without_a_minimum_raises():
    with pytest.raises(ConvergenceError):
        adapt(
            lambda theta, data: -(theta**2).sum(), tensor([1.0]), None,
            Proximal(1.0, max_steps=20),
        )  # fmt: skip


def test_a_loss_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="not finite at theta"):
        adapt(
            lambda theta, data: torch.log(theta).sum(), tensor([-1.0]), None,
            Proximal(1.0),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"strength": 0}, ValueError, "strength must be finite and positive"),
        ({"strength": -1.0}, ValueError, "positive"),
        ({"strength": float("nan")}, ValueError, "positive"),
        ({"strength": tensor(-2.0)}, ValueError, "positive"),
        ({"strength": sp.Integer(-1)}, ValueError, "positive"),
        ({"strength": "1"}, TypeError, "strength must be a number"),
        ({"strength": 1.0, "tolerance": 0.0}, ValueError, "tolerance"),
        ({"strength": 1.0, "max_steps": 0}, ValueError, "max_steps"),
        ({"strength": 1.0, "max_products": 2.5}, ValueError, "max_products"),
    ],
)
def test_bad_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        Proximal(**arguments)


def test_methods_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="'implicit'.*Proximal"):
        meta_gradient(quadratic_loss, THETA, TASKS, Proximal(1.0), "adjoint")
    with pytest.raises(ValueError, match="GradientDescent"):
        meta_gradient(
            quadratic_loss, THETA, TASKS, GradientDescent(0.1, 1), "implicit"
        )
    with pytest.raises(TypeError, match="float\\(strength\\)"):
        adapt(quadratic_loss, THETA, (A, C), Proximal(sp.Symbol("s")))


# Memory. --------------------------------------------------------------------


def peak_bytes(f):
    """The most that ``f`` has allocated at one time, in torch's own count."""
    f()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    changes = [
        event.nbytes()
        for event in p.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert changes
    level = highest = 0
    for change in changes:
        level += change
        highest = max(highest, level)
    return highest


def test_memory_does_not_grow_with_the_inner_iterations():
    loss, theta = functional(
        mlp((1, 40, 40, 1), seed=0), torch.nn.functional.mse_loss
    )
    tasks = sinusoids(1, 10, 10, seed=1)[:1]
    calls = []

    def run(strength):
        count = 0

        def counted(theta, data):
            nonlocal count
            count += 1
            return loss(theta, data)

        peak = peak_bytes(
            lambda: meta_gradient(counted, theta, tasks, Proximal(strength))
        )
        calls.append(count)
        return peak

    short, long = run(20.0), run(0.05)
    assert calls[1] > 5 * calls[0]
    assert long < 1.1 * short
    unrolled = [
        peak_bytes(
            lambda steps=steps: meta_gradient(
                loss, theta, tasks, GradientDescent(0.01, steps)
            )
        )
        for steps in (5, 50)
    ]
    assert unrolled[1] > 3 * unrolled[0]


def test_solution_in_a_tree_has_its_structure():
    loss, theta = network()
    found = adapt(loss, theta, sinusoids(1, 5, 5, seed=0)[0].support,
                  Proximal(1.0))  # fmt: skip
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in theta.items()
    }
    assert ravel(found)[0].isfinite().all()
