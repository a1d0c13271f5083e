"""Vector fields, their solutions, and what linear algebra says of them."""

import numpy as np
import pytest
import scipy.linalg
import sympy as sp
import torch

from companion import (
    GradientDescent,
    GradientFlow,
    adapt,
    adaptation_path,
    functional,
    gradient,
    meta_gradient,
)
from companion.dynamics import (
    IntegrationError,
    euler,
    gradient_flow,
    linearise,
    meta_flow,
    modified_field,
    modified_loss,
    sensitivity,
    solve_flow,
    stable_step,
    variational,
)
from companion.models import mlp
from companion.tasks import quadratic_loss, quadratics, sinusoids


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


A = tensor([[2.0, 0.5], [0.5, 1.0]])
C, THETA = tensor([1.0, -1.0]), tensor([0.3, 0.7])
ROTATION = tensor([[0.0, -1.0], [1.0, 0.0]])


def cube(t, theta):
    return -(theta**3)


def of_matrix(matrix):
    return lambda t, theta: matrix @ theta


# Fields. --------------------------------------------------------------------


def test_gradient_flow_is_the_same_field_on_symbols_tensors_and_arrays():
    theta = sp.Matrix(sp.symbols("theta_1 theta_2"))
    data = sp.Matrix(A.numpy()), sp.Matrix(C.numpy())
    symbolic = gradient_flow(quadratic_loss, data)(0, theta)
    values = symbolic.subs(dict(zip(theta, THETA.tolist())))
    field = gradient_flow(quadratic_loss, (A, C))
    found = field(0.0, THETA)
    torch.testing.assert_close(found, -A @ (THETA - C))
    np.testing.assert_allclose(np.array(values, float)[:, 0], found)
    array = field(0.0, THETA.numpy())
    assert isinstance(array, np.ndarray)
    np.testing.assert_allclose(array, found)


@pytest.mark.parametrize("inner", [GradientDescent(0.2, 3), GradientFlow(0.4)])
def test_meta_flow_descends_the_meta_objective(inner):
    tasks = quadratics(3, 2, seed=0)
    found = meta_flow(quadratic_loss, tasks, inner)(0.0, THETA)
    exact = meta_gradient(quadratic_loss, THETA, tasks, inner)
    torch.testing.assert_close(found, -exact)


def test_meta_flow_of_a_network_keeps_its_tree():
    loss, weights = functional(mlp((1, 4, 1), seed=0), torch.nn.MSELoss())
    tasks, inner = sinusoids(2, 5, 5, seed=0), GradientDescent(0.1, 2)
    found = meta_flow(loss, tasks, inner)(0.0, weights)
    exact = meta_gradient(loss, weights, tasks, inner)
    for name in weights:
        torch.testing.assert_close(found[name], -exact[name])


# Solving. -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["DOP853", "Radau", "LSODA"])
@pytest.mark.parametrize("time", [0.0, 1.3, -0.4])
def test_solve_flow_of_a_quadratic_is_the_matrix_exponential(method, time):
    field = gradient_flow(quadratic_loss, (A, C))
    path = solve_flow(field, THETA, time, method=method)
    expected = C + torch.linalg.matrix_exp(-time * A) @ (THETA - C)
    torch.testing.assert_close(path.final, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(path(time), path.final)


def test_dense_output_takes_one_time_or_many_and_does_not_extrapolate():
    path = solve_flow(cube, np.array([1.0, 2.0]), 2.0)
    times = np.linspace(0, 2, 7)
    exact = np.array([1, 2]) / np.sqrt(1 + 2 * np.outer(times, [1, 4]))
    np.testing.assert_allclose(path(times), exact, rtol=1e-7)
    np.testing.assert_allclose(path(times[3]), exact[3], rtol=1e-7)
    for outside in (-0.1, 2.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 2"):
            path(outside)


def test_a_trajectory_of_no_time_can_be_asked():
    path = solve_flow(cube, np.array([1.0, 2.0]), 0.0)
    np.testing.assert_array_equal(path(0.0), [1, 2])
    np.testing.assert_array_equal(path([0.0, 0.0]), [[1, 2], [1, 2]])


def test_no_two_states_share_memory_and_the_start_stays():
    theta = {"w": tensor([1.0, 2.0]), "b": tensor([3.0])}

    def field(t, state):
        for leaf in state.values():
            leaf.mul_(-1)  # a field that works in place
        return state

    path = solve_flow(field, theta, 1.0)
    assert theta["w"].tolist() == [1, 2]
    final, states = path.final, path.states
    final["w"].zero_()
    states["w"].zero_()
    path(0.5)["w"].zero_()
    path.times[:] = 7
    assert path.times[0] == 0
    torch.testing.assert_close(
        path.final["w"], tensor([1.0, 2.0]) * np.exp(-1), rtol=1e-8, atol=0
    )
    assert path.states["w"][0].tolist() == [1, 2]


def test_a_field_may_return_the_same_buffer_every_time():
    buffer = np.zeros(2)

    def field(t, y):
        buffer[:] = -y
        return buffer

    path = solve_flow(field, np.array([1.0, 2.0]), 1.0)
    np.testing.assert_allclose(path.final, np.exp(-1) * np.array([1, 2]))


def test_trees_and_their_shapes_come_back_with_a_time_axis():
    theta = {"w": torch.ones(2, 3, dtype=torch.float64), "b": tensor(2.0)}
    path = solve_flow(lambda t, x: {"w": -x["w"], "b": -x["b"]}, theta, 1.0)
    assert path.final["w"].shape == (2, 3)
    assert path(np.linspace(0, 1, 5))["w"].shape == (5, 2, 3)
    assert path.states["b"].shape == (len(path.times),)


def test_float32_stays_float32():
    path = solve_flow(cube, torch.ones(2), 1.0)
    assert path.final.dtype == torch.float32
    torch.testing.assert_close(path.final, torch.ones(2) / 3**0.5)


def test_a_time_dependent_field_sees_the_time():
    path = solve_flow(lambda t, y: y * 0 + t, np.array([0.0]), 3.0, start=1.0)
    np.testing.assert_allclose(path.final, [4.0])


# What goes wrong, and when. -------------------------------------------------


@pytest.mark.parametrize("start", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("method", ["DOP853", "RK45", "Radau"])
def test_a_blow_up_is_reported_at_the_time_one_over_the_start(start, method):
    with pytest.raises(IntegrationError, match="blow up") as caught:
        solve_flow(lambda t, y: y**2, np.array([start]), 10.0, method=method)
    assert caught.value.time == pytest.approx(1 / start, rel=1e-3)


def test_a_field_that_is_not_finite_is_reported_with_its_time():
    def field(t, y):
        return torch.full_like(y, torch.nan) if t > 0.5 else -y

    with pytest.raises(IntegrationError, match="not finite at time") as caught:
        solve_flow(field, THETA, 2.0)
    assert 0.5 < caught.value.time < 2


def test_stiffness_is_reported_with_the_time_and_a_remedy():
    field = of_matrix(torch.diag(tensor([-1e6, -1.0])))
    with pytest.raises(IntegrationError, match="stiff.*Radau") as caught:
        solve_flow(field, THETA, 10.0, max_evaluations=2000)
    assert 0 < caught.value.time < 0.1
    path = solve_flow(field, THETA, 10.0, method="Radau")
    assert path.final[1] == pytest.approx(0.7 * np.exp(-10), rel=1e-6)


@pytest.mark.parametrize(
    ("field", "error", "words"),
    [
        (lambda t, y: y[:1], ValueError, r"shape.*\(2,\).*\(1,\) at time 0"),
        (lambda t, y: y[None], ValueError, r"shape.*\(1, 2\) at time 0"),
        (lambda t, y: {"a": y}, ValueError, "structure.*at time 0"),
        (lambda t, y: y.numpy(), TypeError, "Tensor.*ndarray at time 0"),
        (lambda t, y: None, (TypeError, ValueError), "at time 0"),
        (lambda t, y: y * 1j, TypeError, "real"),
    ],
)
def test_a_bad_field_is_reported_with_its_time(field, error, words):
    with pytest.raises(error, match=words):
        solve_flow(field, THETA, 1.0)
    with pytest.raises(error, match=words):
        euler(field, THETA, 1.0, 2)


@pytest.mark.parametrize(
    ("theta", "error"),
    [
        (np.array([1, 2]), TypeError),
        (torch.tensor([1, 2]), TypeError),
        (1.0, TypeError),
        (np.array([np.nan]), ValueError),
    ],
)
def test_a_start_that_is_not_finite_floats_is_refused(theta, error):
    with pytest.raises(error):
        solve_flow(cube, theta, 1.0)


def test_a_solution_has_no_derivative_by_transform():
    with pytest.raises(ValueError, match="sensitivity"):
        torch.func.grad(lambda x: solve_flow(cube, x, 1.0).final.sum())(THETA)


# Euler. ---------------------------------------------------------------------


def test_euler_along_a_gradient_flow_is_gradient_descent():
    field = gradient_flow(quadratic_loss, (A, C))
    path = euler(field, THETA, 0.6, 3)
    steps = adaptation_path(
        quadratic_loss, THETA, (A, C), GradientDescent(0.2, 3)
    )
    assert len(path) == 4
    for mine, theirs in zip(path, steps, strict=True):
        torch.testing.assert_close(mine, theirs)
    x, h = sp.symbols("x h")
    symbolic = euler(lambda t, x: -(x**3), x, 2 * h, 2)
    assert sp.expand(symbolic[1] - (x - h * x**3)) == 0


def test_euler_is_exact_on_rational_symbols_and_sees_the_time():
    x = sp.Symbol("x")
    path = euler(lambda t, x: t + 0 * x, x, 1, 3)
    assert path[-1] == x + sp.Rational(1, 3)


def test_euler_never_aliases_and_keeps_the_graph():
    theta = np.array([1.0, 2.0])

    def field(t, y):
        y *= -1
        return y

    path = euler(field, theta, 1.0, 4)
    assert theta.tolist() == [1, 2] and path[0] is not theta
    np.testing.assert_allclose(path[-1], 0.75**4 * theta)
    path[0][:] = 9
    np.testing.assert_allclose(path[1], 0.75 * theta)
    J = torch.func.jacrev(lambda x: euler(of_matrix(-A), x, 1.0, 4)[-1])(THETA)
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(J, torch.linalg.matrix_power(eye - A / 4, 4))


def test_euler_reports_when_it_overflows():
    with pytest.raises(IntegrationError, match="stable") as caught:
        euler(cube, tensor([1e3]), 10.0, 10)
    assert 1 < caught.value.time < 10


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_euler_wants_a_positive_number_of_steps(steps):
    with pytest.raises((TypeError, ValueError), match="steps must be"):
        euler(cube, THETA, 1.0, steps)


# Stability. -----------------------------------------------------------------


def test_stable_step_is_the_boundary_of_convergence():
    bound = stable_step(A)
    assert bound == pytest.approx(2 / np.linalg.eigvalsh(A.numpy())[-1])
    assert stable_step(A.numpy()) == pytest.approx(float(bound))
    field = gradient_flow(quadratic_loss, (A, C))
    for factor, converges in ((0.99, True), (1.01, False)):
        h = factor * float(bound)
        path = euler(field, THETA, 400 * h, 400)
        assert bool((path[-1] - C).norm() < (THETA - C).norm()) == converges


def test_stable_step_on_symbols():
    a, b = sp.symbols("a b", positive=True)
    assert stable_step(a) == 2 / a
    assert stable_step(sp.diag(a, b)) == 2 / sp.Max(a, b)
    assert stable_step(sp.Matrix([[2, 1], [1, 2]])) == sp.Rational(2, 3)
    cubic = sp.Matrix([[2, 1, 0], [1, 2, 1], [0, 1, 1]])
    exact = 2 / max(np.linalg.eigvalsh(np.array(cubic, float)))
    found = complex(stable_step(cubic).evalf())
    assert found.real == pytest.approx(exact)


@pytest.mark.parametrize(
    ("hessian", "words"),
    [
        (ROTATION, "symmetric"),
        (sp.Matrix([[0, -1], [1, 0]]), "symmetric"),
        (-A, "must be positive"),
        (torch.zeros(2, 2), "must be positive"),
        (sp.diag(-1, -2), "must be positive"),
        (sp.Symbol("a", negative=True), "must be positive"),
        (tensor([[float("nan")]]), "finite"),
        (THETA, "square"),
        (sp.Matrix([[1, 2]]), "square"),
    ],
)
def test_stable_step_refuses_what_has_no_bound(hessian, words):
    with pytest.raises(ValueError, match=words):
        stable_step(hessian)


# Linearisation. -------------------------------------------------------------


def duffing(t, theta):
    x, y = theta
    return torch.stack([y, x - x**3 - 0.3 * y])


ORIGIN = torch.zeros(2, dtype=torch.float64)
JORDAN = tensor([[0.0, 1.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("field", "theta", "verdict"),
    [
        (of_matrix(-A), ORIGIN, "stable"),
        (of_matrix(A), ORIGIN, "unstable"),
        (of_matrix(ROTATION), ORIGIN, "centre"),
        (of_matrix(JORDAN), ORIGIN, "unstable"),
        (of_matrix(0 * A), ORIGIN, "undecided"),
        (of_matrix(torch.diag(tensor([-1.0, 0.0]))), ORIGIN, "undecided"),
        (cube, ORIGIN, "undecided"),
        (lambda t, x: x**3, ORIGIN, "undecided"),
        (lambda t, x: ROTATION @ x - x * (x @ x), ORIGIN, "undecided"),
        (lambda t, x: ROTATION @ x + x * (x @ x), ORIGIN, "undecided"),
        (lambda t, x: ROTATION @ (x - C), C, "centre"),
        (duffing, ORIGIN, "unstable"),
        (duffing, tensor([1.0, 0.0]), "stable"),
    ],
)
def test_linearise_says_what_the_eigenvalues_prove_and_no_more(
    field, theta, verdict
):
    assert linearise(field, theta).verdict == verdict


def test_a_double_centre_is_a_centre_and_a_resonant_one_grows():
    zero = torch.zeros(4, dtype=torch.float64)
    double = torch.block_diag(ROTATION, ROTATION)
    assert linearise(of_matrix(double), zero).verdict == "centre"
    double[:2, 2:] = torch.eye(2)
    assert linearise(of_matrix(double), zero).verdict == "unstable"


def test_linearise_agrees_on_symbols_tensors_and_arrays():
    matrix = sp.Matrix([[-1, 2], [-2, -1]])
    symbolic = linearise(lambda t, x: matrix * x, sp.zeros(2, 1))
    assert set(symbolic.eigenvalues) == {-1 - 2 * sp.I, -1 + 2 * sp.I}
    M = np.array(matrix, float)
    numeric = linearise(lambda t, x: M @ x, np.zeros(2))
    np.testing.assert_allclose(numeric.eigenvalues, [-1 - 2j, -1 + 2j])
    assert symbolic.verdict == numeric.verdict == "stable"
    assert (
        linearise(lambda t, x: np.array([-x[1], x[0]]), np.zeros(2)).verdict
        == "centre"
    )


def test_linearise_on_symbols_is_exact():
    mu = sp.Symbol("mu", positive=True)
    free = sp.Symbol("k", real=True)
    zero = sp.Integer(0)
    assert linearise(lambda t, x: -mu * x, zero).verdict == "stable"
    assert linearise(lambda t, x: mu * x, zero).verdict == "unstable"
    assert linearise(lambda t, x: free * x, zero).verdict == "undecided"
    assert linearise(lambda t, x: -(x**3), zero).verdict == "undecided"
    pair = sp.zeros(2, 1)
    rotate = sp.Matrix([[0, -mu], [mu, 0]])
    assert linearise(lambda t, x: rotate * x, pair).verdict == "centre"
    jordan = sp.Matrix([[0, 1], [0, 0]])
    assert linearise(lambda t, x: jordan * x, pair).verdict == "unstable"
    pendulum = linearise(lambda t, x: sp.Matrix([x[1], -sp.sin(x[0])]), pair)
    assert pendulum.verdict == "undecided"


def test_linearise_takes_trees():
    theta = {"a": tensor(0.0), "b": tensor([0.0])}
    found = linearise(lambda t, x: {"a": -x["a"], "b": -2 * x["b"]}, theta)
    assert found.verdict == "stable"
    torch.testing.assert_close(found.eigenvalues.real, tensor([-2.0, -1.0]))


@pytest.mark.parametrize("point", [tensor([1.0, 1.0]), sp.Matrix([1, 1])])
def test_only_an_equilibrium_can_be_judged(point):
    with pytest.raises(ValueError, match="equilibrium"):
        linearise(lambda t, x: -x, point)


# Sensitivities and the modified loss. ---------------------------------------


def test_sensitivity_of_a_linear_field_is_the_matrix_exponential():
    M = tensor([[0.1, -2.0], [1.0, -0.3]])
    theta, S = sensitivity(of_matrix(M), THETA, 1.7)
    exact = scipy.linalg.expm(1.7 * M.numpy())
    np.testing.assert_allclose(S, exact, rtol=1e-7)
    np.testing.assert_allclose(theta, exact @ THETA.numpy(), rtol=1e-7)


def test_sensitivity_of_a_nonlinear_field_is_the_slope_of_its_closed_form():
    theta, S = sensitivity(cube, THETA, 2.0)
    np.testing.assert_allclose(theta, THETA / (1 + 4 * THETA**2) ** 0.5)
    exact = torch.diag((1 + 4 * THETA**2) ** -1.5)
    torch.testing.assert_close(S, exact, rtol=1e-7, atol=1e-9)


def test_sensitivity_of_a_network_along_directions():
    loss, weights = functional(mlp((1, 3, 1), seed=0), torch.nn.MSELoss())
    data = sinusoids(1, 5, 5, seed=0)[0].support
    generator = torch.Generator().manual_seed(0)
    directions = {
        name: torch.randn(*w.shape, 2, generator=generator).double()
        for name, w in weights.items()
    }
    _, S = sensitivity(
        gradient_flow(loss, data), weights, 0.3, directions=directions
    )
    d = 1e-5

    def moved(sign):
        start = {k: w + sign * d * directions[k][..., 1]
                 for k, w in weights.items()}  # fmt: skip
        return adapt(loss, start, data, GradientFlow(0.3))

    ahead, behind = moved(1), moved(-1)
    for name in weights:
        slope = (ahead[name] - behind[name]) / (2 * d)
        torch.testing.assert_close(S[name][..., 1], slope, rtol=1e-6, atol=1e-7)


def test_the_variational_field_on_symbols_is_solved_by_the_derivative():
    x, t, s = sp.symbols("x t s", positive=True)
    flow = x / sp.sqrt(1 + 2 * t * x**2)
    slope, along = variational(cube)(t, (x, s))
    assert slope == -(x**3) and along == -3 * x**2 * s
    S = flow.diff(x)
    carried = along.subs({x: flow, s: S}, simultaneous=True)
    assert sp.simplify(S.diff(t) - carried) == 0


def test_sensitivity_refuses_what_it_cannot_differentiate():
    with pytest.raises(TypeError, match="torch"):
        sensitivity(cube, np.ones(2), 1.0)
    with pytest.raises(ValueError, match="directions"):
        sensitivity(cube, THETA, 1.0, directions=torch.ones(3, 1).double())


def test_modified_loss_adds_a_quarter_of_the_squared_gradient():
    x, h = sp.symbols("x h")
    L = sp.Function("L")
    found = modified_loss(lambda x: L(x), h)(x)
    assert sp.simplify(found - L(x) - h * L(x).diff(x) ** 2 / 4) == 0
    value = modified_loss(quadratic_loss, 0.1)(THETA, (A, C))
    slope = gradient(quadratic_loss)(THETA, (A, C))
    expected = quadratic_loss(THETA, (A, C)) + 0.025 * slope @ slope
    torch.testing.assert_close(value, expected)


def test_descent_follows_the_flow_of_the_modified_loss_to_second_order():
    def loss(theta, data):
        return theta.cos().sum() + quadratic_loss(theta, data) / 2

    errors = {"loss": [], "modified": []}
    counts = [8, 16, 32, 64, 128]
    for steps in counts:
        end = euler(gradient_flow(loss, (A, C)), THETA, 1.0, steps)[-1]
        for name, followed in (
            ("loss", loss), ("modified", modified_loss(loss, 1 / steps)),
        ):  # fmt: skip
            path = solve_flow(gradient_flow(followed, (A, C)), THETA, 1.0)
            errors[name].append(float((path.final - end).norm()))
    for name, order in (("loss", 1), ("modified", 2)):
        slope = np.polyfit(np.log(counts), np.log(errors[name]), 1)[0]
        assert slope == pytest.approx(-order, abs=0.1)


def test_the_modified_field_of_an_undefined_field_has_the_known_terms():
    x, h = sp.symbols("x h")
    f = sp.Function("f")
    found = modified_field(lambda t, x: f(x), h)(0, x)
    slope, curvature = f(x).diff(x), f(x).diff(x, 2)
    expected = (
        f(x)
        - h * slope * f(x) / 2
        + h**2 * (slope**2 * f(x) / 3 + curvature * f(x) ** 2 / 12)
    )
    assert sp.expand(found - expected) == 0


def test_the_modified_field_of_order_two_descends_the_modified_loss():
    def loss(theta, data=None):
        return (theta[0] * theta[1] - 1) ** 2 / 2 + theta[0] ** 4

    pair, h = sp.Matrix(sp.symbols("theta_1 theta_2")), sp.Symbol("h")
    found = modified_field(gradient_flow(loss), h, 2)(0, pair)
    expected = -gradient(modified_loss(loss, h))(pair)
    assert (found - expected).expand() == sp.zeros(2, 1)
    torch.testing.assert_close(
        modified_field(gradient_flow(loss), 0.1, 2)(0.0, THETA),
        -gradient(modified_loss(loss, 0.1))(THETA),
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_modified_field_on_tensors_is_that_on_symbols(order):
    def field(t, theta):
        x, y = theta
        if isinstance(theta, sp.MatrixBase):
            return sp.Matrix([x * y - y**3, sp.sin(x) + y])
        return torch.stack([x * y - y**3, torch.sin(x) + y])

    pair = sp.Matrix(sp.symbols("theta_1 theta_2"))
    symbolic = modified_field(field, sp.Rational(1, 5), order)(0, pair)
    expected = symbolic.subs(dict(zip(pair, THETA.tolist())))
    found = modified_field(field, 0.2, order)(0.0, THETA)
    np.testing.assert_allclose(found, np.array(expected, float)[:, 0])


def test_the_modified_field_takes_trees():
    def field(t, theta):
        return {"a": theta["b"].sum() * theta["a"], "b": -(theta["b"] ** 2)}

    tree = {"a": tensor([1.0, 2.0]), "b": tensor([[0.5]])}
    found = modified_field(field, 0.1)(0.0, tree)
    b = 0.5
    assert float(found["b"]) == pytest.approx(
        -(b**2) - 0.1 * b**3 - 0.015 * b**4
    )
    assert found["a"].shape == (2,)


@pytest.mark.parametrize("order", [0, 4])
def test_the_modified_field_has_up_to_three_terms(order):
    with pytest.raises(ValueError, match="order must be 1, 2 or 3"):
        modified_field(cube, 0.1, order)
