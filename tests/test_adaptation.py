"""Inner algorithms against closed forms."""

import itertools
import math
from dataclasses import dataclass

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import (
    GradientDescent,
    adapt,
    adaptation_path,
    gradient,
    jacobian,
)
from companion.calculus import tree_map
from companion.tasks import quadratic_loss, quadratics

f64 = torch.float64


def random(*shape, seed=0, dtype=f64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=f64).to(dtype)


def quadratic(dim=3, seed=0, dtype=f64):
    return quadratics(1, dim, seed=seed, dtype=dtype)[0].support


# Closed forms. --------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dim=st.integers(1, 5),
    steps=st.integers(0, 6),
    lr=st.floats(-0.5, 2.5),
)
def test_descent_on_a_quadratic_matches_closed_form(seed, dim, steps, lr):
    """θ_K - c = (I - αA)^K (θ - c)."""
    A, c = quadratic(dim, seed)
    theta = random(dim, seed=seed + 1)
    adapted = adapt(quadratic_loss, theta, (A, c), GradientDescent(lr, steps))
    contraction = torch.eye(dim, dtype=f64) - lr * A
    expected = c + torch.linalg.matrix_power(contraction, steps) @ (theta - c)
    torch.testing.assert_close(adapted, expected, rtol=1e-11, atol=1e-12)


def test_jacobian_of_adaptation_is_the_product_of_contractions():
    A, c = quadratic()
    inner = GradientDescent(0.7, 3)
    J = jacobian(lambda t: adapt(quadratic_loss, t, (A, c), inner))(random(3))
    contraction = torch.eye(3, dtype=f64) - 0.7 * A
    torch.testing.assert_close(J, torch.linalg.matrix_power(contraction, 3))


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_descent_on_a_symbolic_quadratic_matches_closed_form(steps):
    a, b, d, x, y, alpha = sp.symbols("a b d x y alpha")
    A, c = sp.Matrix([[a, b], [b, d]]), sp.Matrix(sp.symbols("c_1 c_2"))
    theta = sp.Matrix([x, y])
    adapted = adapt(
        quadratic_loss, theta, (A, c), GradientDescent(alpha, steps)
    )
    expected = c + (sp.eye(2) - alpha * A) ** steps * (theta - c)
    assert (adapted - expected).expand() == sp.zeros(2, 1)


def test_two_steps_on_an_unknown_loss_are_the_definition():
    theta, alpha = sp.symbols("theta alpha")
    L = sp.Function("L")
    first, second = (
        adapt(lambda t, _: L(t), theta, None, GradientDescent(alpha, steps))
        for steps in (1, 2)
    )
    assert first == theta - alpha * L(theta).diff(theta)
    # Without evaluation sympy cannot compare; on an instance it can.
    instance = second.subs(L, sp.sin).doit()
    once = theta - alpha * sp.cos(theta)
    assert sp.simplify(instance - (once - alpha * sp.cos(once))) == 0


def test_symbolic_and_numeric_adaptation_agree():
    x, y = sp.symbols("x y")

    def loss(theta, data):
        z = theta[0] * data + theta[1]
        return (z**2 - 1) ** 2 / 4 + theta[0] ** 2 / 2

    inner = GradientDescent(0.1, 2)
    symbolic = adapt(loss, sp.Matrix([x, y]), 0.5, inner)
    numbers = sp.lambdify([x, y], list(symbolic), "math")(0.3, -0.7)
    at = torch.tensor([0.3, -0.7], dtype=f64)
    torch.testing.assert_close(
        adapt(loss, at, 0.5, inner),
        torch.tensor(numbers, dtype=f64),
        rtol=1e-12,
        atol=0,
    )


# The path. ------------------------------------------------------------------


def test_path_holds_every_iterate_and_ends_where_adapt_does():
    A, c = quadratic()
    theta, inner = random(3), GradientDescent(0.5, 4)
    path = adaptation_path(quadratic_loss, theta, (A, c), inner)
    assert len(path) == 5
    assert torch.equal(path[0], theta)
    assert torch.equal(path[-1], adapt(quadratic_loss, theta, (A, c), inner))
    for before, after in itertools.pairwise(path):
        torch.testing.assert_close(after, before - 0.5 * A @ (before - c))


def test_no_two_entries_of_the_path_share_memory():
    theta, inner = {"t": random(3)}, GradientDescent(0.0, 3)
    path = adaptation_path(
        lambda t, data: quadratic_loss(t["t"], data),
        theta,
        quadratic(),
        inner,
    )
    places = {point["t"].data_ptr() for point in (theta, *path)}
    assert len(places) == 5


def test_no_step_leaves_the_parameters():
    theta = random(3)
    inner = GradientDescent(0.5, 0)
    assert torch.equal(adapt(quadratic_loss, theta, quadratic(), inner), theta)
    assert len(adaptation_path(quadratic_loss, theta, None, inner)) == 1


def test_adapt_changes_none_of_its_arguments():
    (A, c), theta, lr = quadratic(), random(3), torch.tensor(0.3, dtype=f64)
    before = [t.clone() for t in (A, c, theta, lr)]
    adapt(quadratic_loss, theta, (A, c), GradientDescent(lr, 3))
    assert all(map(torch.equal, (A, c, theta, lr), before))
    assert not any(t.requires_grad for t in (A, c, theta, lr))


# Rates. ---------------------------------------------------------------------


def test_learned_rates_multiply_elementwise():
    """Meta-SGD: θ' = θ - α ⊙ ∇L(θ), leaf by leaf."""
    theta = {"w": random(2, 3), "b": random(2, seed=1)}
    rates = {"w": random(2, 3, seed=2), "b": random(2, seed=3)}

    def loss(t, data):
        return ((t["w"] @ data + t["b"]) ** 2).sum()

    data = random(3, seed=4)
    slope = gradient(loss)(theta, data)
    expected = tree_map(lambda t, r, g: t - r * g, theta, rates, slope)
    adapted = adapt(loss, theta, data, GradientDescent(rates, 1))
    torch.testing.assert_close(adapted, expected)


def test_learned_rates_of_a_symbolic_column():
    x, y, p, q = sp.symbols("x y p q")
    adapted = adapt(
        lambda t, _: t[0] ** 2 + t[0] * t[1],
        sp.Matrix([x, y]),
        None,
        GradientDescent(sp.Matrix([p, q]), 1),
    )
    assert adapted == sp.Matrix([x - p * (2 * x + y), y - q * x])


def test_a_number_a_tensor_and_a_full_tensor_of_one_rate_agree():
    data, theta = quadratic(), random(3)
    results = [
        adapt(quadratic_loss, theta, data, GradientDescent(lr, 2))
        for lr in (0.5, torch.tensor(0.5), torch.full((3,), 0.5, dtype=f64))
    ]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_float32_stays_float32_with_a_float64_rate():
    theta = random(3, dtype=torch.float32)
    data = quadratic(dtype=torch.float32)
    lr = torch.tensor(0.5, dtype=f64)
    adapted = adapt(quadratic_loss, theta, data, GradientDescent(lr, 2))
    assert adapted.dtype == torch.float32


def test_the_derivative_with_respect_to_the_rate():
    """One step: ∂θ'/∂α = -∇L(θ)."""
    (A, c), theta = quadratic(), random(3)

    def adapted(lr):
        return adapt(quadratic_loss, theta, (A, c), GradientDescent(lr, 1))

    lr = torch.tensor(0.3, dtype=f64)
    torch.testing.assert_close(jacobian(adapted)(lr), -A @ (theta - c))


# Minibatches. ---------------------------------------------------------------


def test_every_step_sees_its_own_minibatch():
    tasks = quadratics(3, 2, seed=5)
    (A, c), theta = tasks.support, random(2)
    expected = theta
    for k in range(3):
        expected = expected - 0.4 * A[k] @ (expected - c[k])
    inner = GradientDescent(0.4, 3, minibatches=True)
    stacked = adapt(quadratic_loss, theta, (A, c), inner)
    listed = adapt(
        quadratic_loss, theta, [(A[k], c[k]) for k in range(3)], inner
    )
    torch.testing.assert_close(stacked, expected)
    torch.testing.assert_close(listed, expected)


def test_minibatches_on_symbols():
    x, p, q, alpha = sp.symbols("x p q alpha")
    inner = GradientDescent(alpha, 2, minibatches=True)
    adapted = adapt(lambda t, c: (t - c) ** 2 / 2, x, [p, q], inner)
    first = x - alpha * (x - p)
    assert sp.expand(adapted - (first - alpha * (first - q))) == 0


@pytest.mark.parametrize("data", [[1, 2], (torch.ones(2, 1, dtype=f64),), None])
def test_a_wrong_number_of_minibatches_raises(data):
    inner = GradientDescent(0.1, 3, minibatches=True)
    with pytest.raises(ValueError, match="leading axis of length steps = 3"):
        adapt(quadratic_loss, random(3), data, inner)


# The reader's own algorithm. ------------------------------------------------


@dataclass(frozen=True)
class Momentum:
    """Heavy-ball steps, as a reader would write them."""

    lr: float
    decay: float
    steps: int

    def path(self, loss, theta, data):
        yield theta
        speed = tree_map(lambda t: 0 * t, theta)
        for _ in range(self.steps):
            slope = gradient(loss)(theta, data)
            speed = tree_map(lambda v, g: self.decay * v + g, speed, slope)
            theta = tree_map(lambda t, v: t - self.lr * v, theta, speed)
            yield theta


def test_an_inner_algorithm_of_ones_own():
    data, theta = quadratic(), random(3)
    plain = adapt(quadratic_loss, theta, data, GradientDescent(0.3, 3))
    heavy = adapt(quadratic_loss, theta, data, Momentum(0.3, 0.0, 3))
    torch.testing.assert_close(plain, heavy)
    A, c = data
    torch.testing.assert_close(
        adapt(quadratic_loss, theta, data, Momentum(0.3, 0.9, 2)),
        theta
        - 0.3 * 1.9 * A @ (theta - c)
        - 0.3 * A @ (theta - 0.3 * A @ (theta - c) - c),
    )


# Bad input. -----------------------------------------------------------------


@pytest.mark.parametrize("steps", [-1, 1.5, 2.0, "two", None, True])
def test_steps_must_be_a_non_negative_integer(steps):
    with pytest.raises(
        ValueError, match="steps must be a non-negative integer, got"
    ):
        GradientDescent(0.1, steps)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -math.inf])
def test_the_rate_must_be_finite(lr):
    with pytest.raises(ValueError, match=f"lr must be finite, got {lr}"):
        GradientDescent(lr, 1)
    with pytest.raises(ValueError, match="lr must be finite"):
        GradientDescent({"w": torch.ones(1), "b": lr}, 1)


@pytest.mark.parametrize("lr", ["fast", None, {"w": "fast"}])
def test_the_rate_must_be_a_number(lr):
    with pytest.raises(TypeError, match="lr must be a number"):
        GradientDescent(lr, 1)


def test_a_rate_of_another_structure_raises():
    theta = {"w": random(2), "b": random(1)}

    def loss(t, data):
        return t["w"].sum() * t["b"].sum()

    with pytest.raises(ValueError, match="structured as theta"):
        adapt(loss, theta, None, GradientDescent({"w": 0.1}, 1))


def test_a_rate_of_another_shape_raises():
    with pytest.raises(ValueError, match=r"shape \(2,\).*shape \(3,\)"):
        adapt(
            quadratic_loss,
            random(3),
            quadratic(),
            GradientDescent(torch.ones(2, dtype=f64), 1),
        )


def test_a_rate_of_another_dtype_raises():
    with pytest.raises(ValueError, match="lr is torch.float32.*float64"):
        adapt(
            quadratic_loss,
            random(3),
            quadratic(),
            GradientDescent(torch.ones(3), 1),
        )


def test_a_rate_on_another_device_raises():
    lr = torch.tensor(0.1, dtype=f64, device="meta")
    with pytest.raises(ValueError, match="on meta but theta is .* on cpu"):
        adapt(quadratic_loss, random(3), quadratic(), GradientDescent(lr, 1))


def test_data_of_another_dtype_raise_with_the_remedy():
    with pytest.raises(ValueError, match=r"float32.*float64.*\.to\("):
        adapt(
            quadratic_loss,
            random(3),
            quadratic(dtype=torch.float32),
            GradientDescent(0.1, 1),
        )


def test_data_on_another_device_raise_with_the_remedy():
    data = tuple(t.to("meta") for t in quadratic())
    with pytest.raises(ValueError, match=r"on meta.*on cpu.*\.to\("):
        adapt(quadratic_loss, random(3), data, GradientDescent(0.1, 1))


def test_no_inner_algorithm_raises():
    with pytest.raises(TypeError, match="inner must be an inner algorithm"):
        adapt(quadratic_loss, random(3), quadratic(), 0.1)


def test_a_diverging_inner_loop_says_at_which_step():
    with pytest.raises(ValueError, match="inner step 1 of 3.*too large"):
        adapt(
            lambda t, _: (t**4).sum(),
            torch.tensor([1e60], dtype=f64),
            None,
            GradientDescent(1e100, 3),
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_support_loss_that_is_not_finite_raises(bad):
    with pytest.raises(ValueError, match="not finite .*inner step 0"):
        adapt(
            lambda t, _: t.sum() * bad,
            random(3),
            None,
            GradientDescent(0.1, 1),
        )


def test_a_vector_support_loss_raises():
    with pytest.raises(ValueError, match=r"scalar.*\(3,\)"):
        adapt(lambda t, _: t**2, random(3), None, GradientDescent(0.1, 1))


def test_integer_parameters_raise():
    with pytest.raises(TypeError, match="floating-point"):
        adapt(
            lambda t, _: (t**2).sum(),
            torch.tensor([1, 2]),
            None,
            GradientDescent(0.1, 1),
        )


def test_mismatched_shapes_raise():
    with pytest.raises((ValueError, RuntimeError), match="size|shape"):
        adapt(quadratic_loss, random(2), quadratic(3), GradientDescent(0.1, 1))


def test_a_tensor_rate_must_be_finite():
    with pytest.raises(ValueError, match="lr must be finite, got tensor"):
        GradientDescent({"w": torch.tensor([1.0, math.nan])}, 1)


def test_a_symbolic_rate_for_tensors_raises():
    with pytest.raises(TypeError, match="sympy object alpha but theta holds"):
        adapt(
            quadratic_loss,
            random(3),
            quadratic(),
            GradientDescent(sp.Symbol("alpha"), 1),
        )


def test_the_class_in_place_of_an_inner_algorithm_raises():
    with pytest.raises(TypeError, match="inner must be an inner algorithm"):
        adapt(quadratic_loss, random(3), quadratic(), GradientDescent)
