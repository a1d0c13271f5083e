"""Derivatives on symbols and on tensors, against closed forms."""

import math

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import (
    dot,
    gradient,
    hessian,
    hessian_vector_product,
    jacobian,
)
from companion.calculus import tree_leaves, tree_map, value_and_gradient

x, y, a, b = sp.symbols("x y a b")
f64 = torch.float64


def tensor(*values, dtype=f64):
    return torch.tensor(values, dtype=dtype)


def cubic(theta, A):
    """½ θᵀAθ + (Σθ)³/6, in the operations that both algebras have."""
    total = dot(theta, 0 * theta + _ones_like(theta))
    return dot(theta, A @ theta) / 2 + total**3 / 6


def _ones_like(theta):
    if isinstance(theta, sp.MatrixBase):
        return sp.ones(*theta.shape)
    return torch.ones_like(theta)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=f64)


def central_differences(f, theta, step=1e-6):
    columns = []
    for unit in torch.eye(theta.numel(), dtype=theta.dtype):
        unit = step * unit.reshape(theta.shape)
        columns.append((f(theta + unit) - f(theta - unit)) / (2 * step))
    return torch.stack(columns, -1)


# Symbols. -------------------------------------------------------------------


def test_gradient_of_an_expression():
    assert gradient(lambda x: x**3)(x) == 3 * x**2


def test_gradient_at_a_composite_expression_is_evaluated_there():
    at = a * x + 1
    assert sp.expand(gradient(lambda t: t**3)(at) - 3 * at**2) == 0


def test_gradient_at_a_number_needs_a_sympy_number():
    assert gradient(lambda t: t**3)(sp.Integer(2)) == 12


def test_gradient_of_an_undefined_function():
    L = sp.Function("L")
    assert gradient(L)(x) == L(x).diff(x)
    slope = gradient(L)(a * b)
    t = sp.Dummy()
    # L'(ab): the derivative is taken first, and the product put in after.
    assert slope == sp.Subs(L(t).diff(t), t, a * b)
    assert slope.subs(L, sp.sin).doit() == sp.cos(a * b)


def test_second_derivative_of_an_undefined_function():
    L = sp.Function("L")
    assert hessian(L)(x) == L(x).diff(x, 2)


def test_gradient_of_a_column_is_a_column():
    theta = sp.Matrix([x, y])
    A = sp.Matrix([[a, b], [b, 2]])
    result = gradient(lambda t: dot(t, A @ t) / 2)(theta)
    assert (result - A @ theta).expand() == sp.zeros(2, 1)


def test_a_one_by_one_matrix_counts_as_a_scalar():
    theta = sp.Matrix([x, y])
    assert gradient(lambda t: t.T * t)(theta) == 2 * theta


def test_gradient_is_partial_when_theta_is_also_in_the_arguments():
    # d/dt [t·s] at t = s = x is x, not 2x: the second x is held fixed.
    assert gradient(lambda t, s: t * s)(x, x) == x
    at = tensor(3.0)[0]
    assert gradient(lambda t, s: t * s)(at, at) == 3


def test_symbolic_jacobian_and_hessian_shapes():
    theta = sp.Matrix([x, y])
    J = jacobian(lambda t: sp.Matrix([t[0] * t[1], t[0], t[1] ** 2]))(theta)
    assert J == sp.Matrix([[y, x], [1, 0], [0, 2 * y]])
    H = hessian(lambda t: t[0] ** 2 * t[1])(theta)
    assert H == sp.Matrix([[2 * y, 2 * x], [2 * x, 0]])
    assert jacobian(lambda t: t[0] * t[1])(theta) == sp.Matrix([y, x])
    assert jacobian(lambda t: t**2)(x) == 2 * x
    J = jacobian(lambda t: sp.Matrix([t, t**2]))(x)
    assert list(J) == [1, 2 * x]


def test_symbolic_hessian_vector_product():
    A, theta = sp.Matrix([[a, b], [b, 2]]), sp.Matrix([x, y])
    v = sp.Matrix(sp.symbols("v w"))
    product = hessian_vector_product(cubic)(theta, v, A)
    assert (product - hessian(cubic)(theta, A) @ v).expand() == sp.zeros(2, 1)


def test_symbolic_trees_keep_their_structure():
    theta = {"w": sp.Matrix([x, y]), "b": (a,)}
    result = gradient(lambda t: dot(t["w"], t["w"]) * t["b"][0])(theta)
    assert result == {
        "w": 2 * a * sp.Matrix([x, y]),
        "b": (x**2 + y**2,),
    }


def test_an_unexpanded_matrix_symbol_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match="as_explicit"):
        gradient(lambda t: (t.T * t)[0])(sp.MatrixSymbol("t", 2, 1))


def test_assumptions_of_a_symbol_survive():
    p = sp.Symbol("p", positive=True)
    assert gradient(lambda t: sp.sqrt(t**2))(p) == 1


# One program, two algebras. -------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-2, 2), min_size=2, max_size=2),
    st.lists(st.floats(-2, 2), min_size=3, max_size=3),
)
def test_symbols_filled_with_numbers_agree_with_tensors(at, entries):
    symbols = sp.Matrix([x, y])
    p, q, r = entries
    A_s = sp.Matrix([[p, q], [q, r]])
    A_t = torch.tensor([[p, q], [q, r]], dtype=f64)
    theta = torch.tensor(at, dtype=f64)
    for operator in (gradient, hessian):
        symbolic = operator(cubic)(symbols, A_s)
        numbers = sp.lambdify([x, y], symbolic, "numpy")(*at)
        expected = torch.tensor(numbers, dtype=f64)
        computed = operator(cubic)(theta, A_t)
        torch.testing.assert_close(
            computed.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12
        )


# Tensors. -------------------------------------------------------------------


def test_gradient_matches_central_differences():
    theta, A = random(4), random(4, 4, seed=1)
    expected = central_differences(lambda t: cubic(t, A), theta)
    torch.testing.assert_close(
        gradient(cubic)(theta, A), expected, rtol=1e-7, atol=1e-7
    )


def test_hessian_of_a_form_is_its_symmetric_part():
    theta, A = random(4), random(4, 4, seed=1)
    H = hessian(lambda t: dot(t, A @ t) / 2)(theta)
    torch.testing.assert_close(H, (A + A.T) / 2, rtol=1e-12, atol=1e-12)


def test_hessian_vector_product_is_the_hessian_times_the_vector():
    theta, A, v = random(4), random(4, 4, seed=1), random(4, seed=2)
    torch.testing.assert_close(
        hessian_vector_product(cubic)(theta, v, A),
        hessian(cubic)(theta, A) @ v,
        rtol=1e-12,
        atol=1e-12,
    )


def test_hessian_vector_product_on_trees():
    theta = {"w": random(2, 3), "b": (random(2, seed=1),)}
    v = {"w": random(2, 3, seed=2), "b": (random(2, seed=3),)}

    def f(t):
        return (torch.tanh(t["w"].sum(1) + t["b"][0]) ** 2).sum()

    step = 1e-5
    right = gradient(f)(tree_map(lambda t, u: t + step * u, theta, v))
    left = gradient(f)(tree_map(lambda t, u: t - step * u, theta, v))
    expected = tree_map(lambda r, s: (r - s) / (2 * step), right, left)
    torch.testing.assert_close(
        hessian_vector_product(f)(theta, v), expected, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_jacobian_of_a_linear_map_is_its_matrix(mode):
    A = random(3, 5)
    J = jacobian(lambda t: A @ t, mode=mode)(random(5, seed=1))
    torch.testing.assert_close(J, A)


def test_forward_and_reverse_jacobians_agree_on_trees():
    theta = {"w": random(2, 3), "b": random(2, seed=1)}
    data = random(3, seed=2)

    def f(t, data):
        z = torch.tanh(t["w"] @ data + t["b"])
        return {"z": z, "loss": (z**2).mean()}

    torch.testing.assert_close(
        jacobian(f, mode="forward")(theta, data),
        jacobian(f, mode="reverse")(theta, data),
        rtol=1e-12,
        atol=1e-14,
    )


def test_forward_mode_passes_through_mse_loss():
    # torch.func.jacfwd alone stops at this (pytorch #123996).
    A, target = random(3, 2), random(3, seed=1)

    def f(t, target):
        return torch.nn.functional.mse_loss(A @ t, target)

    theta = random(2, seed=2)
    torch.testing.assert_close(
        jacobian(f, mode="forward")(theta, target), gradient(f)(theta, target)
    )


def test_unknown_jacobian_mode():
    with pytest.raises(ValueError, match="mode must be .* got 'sideways'"):
        jacobian(lambda t: t, mode="sideways")


def test_nested_trees_keep_their_structure_and_dtype():
    theta = {"w": random(2, 2), "rest": [(random(1),), random(1, seed=1)]}
    result = gradient(lambda t: sum(x.pow(2).sum() for x in tree_leaves(t)))(
        theta
    )
    assert isinstance(result["rest"], list)
    assert isinstance(result["rest"][0], tuple)
    torch.testing.assert_close(result, tree_map(lambda t: 2 * t, theta))


def test_an_unused_part_of_theta_has_gradient_zero():
    theta = {"used": random(2), "unused": random(3)}
    result = gradient(lambda t: t["used"].sum())(theta)
    assert torch.equal(result["unused"], torch.zeros(3, dtype=f64))


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_dtype_is_kept(dtype):
    theta = random(3).to(dtype)
    value, slope = value_and_gradient(lambda t: (t**2).sum())(theta)
    assert value.dtype == slope.dtype == dtype
    assert hessian(lambda t: (t**2).sum())(theta).dtype == dtype


def test_requires_grad_makes_no_difference_and_theta_is_left_alone():
    theta = random(3).requires_grad_()
    before = theta.detach().clone()
    slope = gradient(lambda t: (t**2).sum())(theta)
    torch.testing.assert_close(slope.detach(), 2 * before)
    assert theta.grad is None
    assert torch.equal(theta.detach(), before)


def test_gradient_of_a_gradient():
    t = tensor(0.7)[0]
    third = gradient(gradient(gradient(torch.sin)))(t)
    assert math.isclose(third, -math.cos(0.7), rel_tol=1e-12)


# The scalar product. --------------------------------------------------------


def test_dot_on_all_kinds():
    assert dot(tensor(1.0, 2.0), tensor(3.0, 4.0)) == 11
    assert dot(sp.Matrix([x, y]), sp.Matrix([a, b])) == a * x + b * y
    assert dot(x, y) == x * y
    trees = {"w": tensor(1.0, 2.0), "b": (tensor(3.0),)}
    assert dot(trees, trees) == 14


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_dot_is_bilinear_and_symmetric(seed, s):
    u, v, w = random(3, 4, seed=seed)
    torch.testing.assert_close(dot(u, v), dot(v, u))
    torch.testing.assert_close(dot(s * u + v, w), s * dot(u, w) + dot(v, w))


@pytest.mark.parametrize(
    "u, v",
    [
        (tensor(1.0, 2.0), tensor(1.0)),
        (sp.Matrix([x, y]), sp.Matrix([x])),
        (sp.Matrix([x, y]), sp.Matrix([[x, y]])),
        (torch.ones(2, 1), torch.ones(2)),
    ],
)
def test_dot_refuses_different_shapes(u, v):
    with pytest.raises(ValueError, match="one shape"):
        dot(u, v)


def test_dot_refuses_different_structures():
    with pytest.raises(ValueError, match="same structure"):
        dot({"w": tensor(1.0)}, {"v": tensor(1.0)})


# Bad input. -----------------------------------------------------------------


def test_integer_parameters_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"int64.*to\(torch.float64\)"):
        gradient(lambda t: (t**2).sum())(torch.tensor([1, 2]))


def test_a_python_number_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"got float.*torch.tensor"):
        gradient(lambda t: t**2)(1.0)


def test_empty_parameters_are_refused():
    with pytest.raises(ValueError, match="at least one tensor"):
        gradient(lambda t: 0)({})


def test_mixed_dtypes_are_refused():
    theta = {"w": torch.ones(1), "b": torch.ones(1, dtype=f64)}
    with pytest.raises(ValueError, match="one dtype.*float32.*float64"):
        gradient(lambda t: t["w"].sum())(theta)


def test_mixed_devices_are_refused():
    theta = {"w": torch.ones(1), "b": torch.ones(1, device="meta")}
    with pytest.raises(ValueError, match="one device.*cpu.*meta"):
        gradient(lambda t: t["w"].sum())(theta)


def test_a_vector_valued_loss_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"scalar.*\(3,\).*mean"):
        gradient(lambda t: t**2)(random(3))
    with pytest.raises(ValueError, match=r"scalar.*\(2, 1\).*dot"):
        gradient(lambda t: t)(sp.Matrix([x, y]))


def test_a_loss_that_returns_something_else_is_refused():
    with pytest.raises(TypeError, match="0-d tensor.*got str"):
        gradient(lambda t: "low")(random(3))


@pytest.mark.parametrize(
    "cut",
    [
        lambda t: torch.tensor(1.0, dtype=f64),
        lambda t: (t.detach() ** 2).sum(),
        lambda t: (t.data**2).sum(),
    ],
)
def test_a_loss_that_ignores_its_parameters_raises(cut):
    with pytest.raises(ValueError, match="does not depend on theta"):
        gradient(cut)(random(3))


def test_a_loss_computed_without_grad_raises():
    def f(t):
        with torch.no_grad():
            return (t**2).sum()

    with pytest.raises(ValueError, match="does not depend on theta"):
        gradient(f)(random(3))


def test_equal_entries_of_a_symbolic_point_are_different_variables():
    x, y = sp.symbols("x y")
    point = sp.Matrix([0, 0])
    assert gradient(lambda v: dot(v, sp.Matrix([x, y])))(point) == sp.Matrix(
        [x, y]
    )
    assert jacobian(lambda v: v)(point) == sp.eye(2)


def test_a_loss_that_is_a_plain_number_raises():
    for f in (lambda t: 1.0, lambda t: (t**2).sum().detach().item()):
        with pytest.raises(ValueError, match="does not depend on theta"):
            gradient(f)(random(3))


def test_a_complex_loss_raises():
    with pytest.raises(TypeError, match="real number, got torch.complex128"):
        gradient(lambda t: t.sum() * 1j)(random(3))
