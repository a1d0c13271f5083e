"""Checks pass on what is true, and fail on what is damaged or empty."""

import html
import json
import re

import numpy as np
import pytest
import sympy as sp
import torch

from companion import verify
from companion.verify import VacuousCheckError, VerificationError

x, y, alpha = sp.symbols("x y alpha")
A, B = sp.symbols("A B", commutative=False)
L = sp.Function("L")
M = sp.Matrix(2, 2, sp.symbols("m_:4"))
N = sp.Matrix(2, 2, sp.symbols("n_:4"))
n = sp.Symbol("n", integer=True, positive=True)
P, Q = sp.MatrixSymbol("P", n, n), sp.MatrixSymbol("Q", n, n)
steps = 2.0 ** -torch.arange(8, dtype=torch.float64)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def slope_at(point):
    u = sp.Symbol("u")
    return sp.Subs(L(u).diff(u), u, point)


# identity -------------------------------------------------------------------

IDENTITIES = {
    "binomial": ((x + y) ** 2, x**2 + 2 * x * y + y**2),
    "trigonometric": (sp.sin(x) ** 2 + sp.cos(x) ** 2, sp.S.One),
    "rational": (1 / x + 1 / y, (x + y) / (x * y)),
    "zero": (sp.exp(x + y) - sp.exp(x) * sp.exp(y), sp.S.Zero),
    "derivative": (
        L(x - alpha * L(x).diff(x)).diff(x),
        (1 - alpha * L(x).diff(x, 2)) * slope_at(x - alpha * L(x).diff(x)),
    ),
    "point of a derivative": (slope_at(x * (x + 1)), slope_at(x**2 + x)),
    "noncommutative": ((A + B) ** 2, A**2 + A * B + B * A + B**2),
    "matrix": ((M * N).T, N.T * M.T),
    "matrix symbol": ((P * Q).T, Q.T * P.T),
    "tree": (
        {"a": (x + x, M + M), "b": [(x + 1) ** 2]},
        {"a": (2 * x, 2 * M), "b": [x**2 + 2 * x + 1]},
    ),
    "number": (sp.sqrt(8), 2 * sp.sqrt(2)),
}
FALSEHOODS = {
    "binomial": ((x + y) ** 2, x**2 + y**2),
    "sign of a root": (sp.sqrt(x**2), x),
    "dropped Hessian factor": (
        L(x - alpha * L(x).diff(x)).diff(x),
        slope_at(x - alpha * L(x).diff(x)),
    ),
    "derivative at another point": (slope_at(x + 1), slope_at(x)),
    "noncommutative": ((A + B) ** 2, A**2 + 2 * A * B + B**2),
    "matrix": ((M * N).T, M.T * N.T),
    "matrix symbol": ((P * Q).T, P.T * Q.T),
    "tree": ({"a": (x, y)}, {"a": (x, 2 * y)}),
    "another function": (L(x), sp.Function("K")(x)),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_proves_what_is_true(name):
    assert verify.identity("eq-x", *IDENTITIES[name]) is None


@pytest.mark.parametrize("name", FALSEHOODS)
def test_identity_rejects_what_is_false(name):
    with pytest.raises(VerificationError, match="lhs"):
        verify.identity("eq-x", *FALSEHOODS[name])


def test_identity_says_what_numbers_suggest():
    with pytest.raises(VerificationError, match="it is false"):
        verify.identity("eq-x", x + 1, x)
    # True at every number, but sympy does not see it: that is no proof.
    hidden = sp.Function("f")(sp.sqrt(x**2 + 2 * x + 1) ** 4)
    shown = sp.Function("f")((x + 1) ** 4)
    verify.identity("eq-x", hidden, shown)
    cubes = sp.cbrt(sp.sqrt(5) + 2) - sp.cbrt(sp.sqrt(5) - 2)
    with pytest.raises(VerificationError, match="suggests"):
        verify.identity("eq-x", cubes * (x**2 + 1), x**2 + 1)


def test_sides_computed_apart_may_be_structurally_equal():
    by_sympy, by_hand = sp.diff(x**3, x), 3 * x**2
    verify.identity("eq-x", by_sympy, by_hand)
    # Sympy's cache makes these one object: still computed twice.
    one, other = (x + 1) ** 2, (1 + x) ** 2
    assert one is other
    verify.identity("eq-x", one, other)


def test_identity_refuses_one_object():
    side = (x + 1) ** 2
    with pytest.raises(VacuousCheckError, match="same object"):
        verify.identity("eq-x", side, side)
    with pytest.raises(VacuousCheckError, match="same object"):
        verify.identity("eq-x", lhs=side, rhs=side)
    for tree in (M, (M, N), {"a": M}):
        with pytest.raises(VacuousCheckError, match="same object"):
            verify.identity("eq-x", *(tree, tree))


@pytest.mark.parametrize(
    ("lhs", "rhs"), [(0, sp.S.Zero), (sp.zeros(2), M - M), ((), ())]
)
def test_identity_refuses_nothing(lhs, rhs):
    with pytest.raises(VacuousCheckError):
        verify.identity("eq-x", lhs, rhs)


@pytest.mark.parametrize(
    ("lhs", "error", "words"),
    [
        (sp.Eq(x, y), TypeError, "two sides"),
        (0.1 * x, TypeError, "Rational"),
        (sp.exp(x).series(x, 0, 2), TypeError, "removeO"),
        (vector(1.0), TypeError, "agreement"),
        (x * sp.zoo, ValueError, "not finite"),
        (M, ValueError, "one shape"),
        ((x, y), ValueError, "same structure"),
    ],
)
def test_identity_refuses_what_is_no_exact_expression(lhs, error, words):
    with pytest.raises(error, match=words):
        verify.identity("eq-x", lhs, x)


# agreement ------------------------------------------------------------------


def test_agreement_over_trees_and_kinds_of_numbers():
    u = vector(1.0, 2.0)
    verify.agreement(
        "thm-x",
        {"a": (u, 0.5), "b": [u.numpy() * 2]},
        {"a": [u.numpy().copy(), sp.Rational(1, 2)], "b": (u + u,)},
    )
    verify.agreement("thm-x", u, sp.Matrix([1, 2]))
    verify.agreement("thm-x", torch.tensor(3.0).double(), 3)


def test_agreement_is_norm_wise():
    expected = vector(1.0, 1e-13)
    verify.agreement("thm-x", vector(1.0, 2e-13), expected)
    with pytest.raises(VerificationError, match="relative error"):
        verify.agreement("thm-x", vector(1.0, 2e-9), expected)


@pytest.mark.parametrize("factor", [1 + 2e-10, 1 - 2e-10, -1, 2, 0])
def test_agreement_rejects_what_is_off(factor):
    u = vector(1.0, 2.0)
    with pytest.raises(VerificationError):
        verify.agreement("thm-x", factor * u, u)


def test_agreement_refuses_one_object_and_zero():
    u = vector(1.0, 2.0)
    for same in (u, u.view(2), u.detach(), u.numpy()):
        with pytest.raises(VacuousCheckError, match="same object"):
            verify.agreement("thm-x", *(same, same))
    with pytest.raises(VacuousCheckError, match="same object"):
        verify.agreement("thm-x", u, u.detach())
    with pytest.raises(VacuousCheckError, match="zero"):
        verify.agreement("thm-x", 0 * u, 0 * u)
    symmetric = vector(1.0, 2.0, 2.0, 5.0).reshape(2, 2)
    verify.agreement("thm-x", symmetric, symmetric.T)


@pytest.mark.parametrize(
    ("computed", "error", "words"),
    [
        (torch.ones(2), TypeError, "float64"),
        (np.ones(2, dtype=np.float32), TypeError, "float64"),
        (torch.ones(2, dtype=torch.int64), TypeError, "float64"),
        (vector(1.0, float("nan")), ValueError, "NaN"),
        (vector(1.0, float("inf")), ValueError, "infinite"),
        (vector(1.0), ValueError, "one shape"),
        (1.0, ValueError, "one shape"),
        ((1.0, 1.0), ValueError, "same structure"),
        ("one", TypeError, "float64"),
    ],
)
def test_agreement_refuses_bad_numbers(computed, error, words):
    with pytest.raises(error, match=words):
        verify.agreement("thm-x", computed, vector(1.0, 1.0))


@pytest.mark.parametrize("rtol", [0, -1, 0.5, float("nan")])
def test_agreement_refuses_a_tolerance_that_forgives_all(rtol):
    with pytest.raises(ValueError, match="rtol"):
        verify.agreement("thm-x", 1.0, 1.0, rtol=rtol)


# order ----------------------------------------------------------------------


@pytest.mark.parametrize("order", [0.5, 1, 2, 4])
def test_order_is_measured(order):
    errors = 3 * steps**order * (1 + steps / 20)
    verify.order("prop-x", steps, errors, order)
    verify.order("prop-x", steps.tolist(), list(errors), order)
    for wrong in (order - 0.5, order + 0.5):
        with pytest.raises(VerificationError, match="shrink with order"):
            verify.order("prop-x", steps, errors, wrong)


def test_order_refuses_too_little():
    with pytest.raises(ValueError, match="four octaves"):
        verify.order("prop-x", steps[:4], steps[:4] ** 2, 2)
    with pytest.raises(ValueError, match="positive"):
        verify.order("prop-x", steps, 0 * steps, 2)
    with pytest.raises(ValueError, match="atol"):
        verify.order("prop-x", steps, steps**2, 2, atol=0.5)
    with pytest.raises(VacuousCheckError):
        verify.order("prop-x", steps, steps, 1)


# inequality -----------------------------------------------------------------


def test_inequality_holds_at_every_instance():
    t = torch.linspace(-1, 1, 101, dtype=torch.float64)
    verify.inequality("prop-x", t**2, t.abs())
    with pytest.raises(VerificationError, match="fails at instance"):
        verify.inequality("prop-x", t.abs(), t**2)
    with pytest.raises(VacuousCheckError, match="equality"):
        verify.inequality("prop-x", t, t * (1 + 1e-15))
    with pytest.raises(VacuousCheckError, match="same object"):
        verify.inequality("prop-x", t, t)
    with pytest.raises(ValueError, match="many instances"):
        verify.inequality("prop-x", [1.0], [2.0])


def test_inequality_says_how_tight_it_gets(capsys):
    verify.inequality("prop-x", [1.0, 3.0], [2.0, 4.0])
    assert "75%" in capsys.readouterr().out


# counterexample -------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "instance", "control"),
    [
        (lambda a: a > 0, -1, 1),
        (lambda a, b: a < b, (2, 1), (1, 2)),
        (lambda pair: pair[0] < pair[1], (2, 1), (1, 2)),
        (lambda m: m * N == N * m, M, sp.eye(2)),
        (lambda t: (t > 0).all(), vector(1.0, -1.0), vector(1.0, 2.0)),
    ],
)
def test_counterexample_is_false_here_and_true_there(claim, instance, control):
    verify.counterexample("exm-x", claim, instance, control)
    with pytest.raises(VerificationError):
        verify.counterexample("exm-x", claim, control, instance)
    with pytest.raises(VacuousCheckError):
        verify.counterexample("exm-x", claim, instance, instance)


def test_counterexample_wants_a_yes_or_no():
    with pytest.raises(TypeError, match="True or False"):
        verify.counterexample("exm-x", lambda a: a, 1, 2)
    with pytest.raises(TypeError, match="True or False"):
        verify.counterexample("exm-x", lambda a: sp.Eq(a, y), x, y)
    with pytest.raises(TypeError, match="predicate"):
        verify.counterexample("exm-x", True, 1, 2)


# What is shown and recorded. ------------------------------------------------


def test_one_line_that_is_the_same_every_time(capsys):
    for noise in (0.0, 1e-13):
        verify.agreement("thm-x", vector(1.0 + noise), vector(1.0))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["✓ thm-x: torch agrees to 1e-10"] * 2


def test_a_failed_check_shows_nothing(capsys):
    with pytest.raises(VerificationError):
        verify.identity("eq-x", x, y)
    assert capsys.readouterr().out == ""


def test_in_a_notebook_a_record_is_left(monkeypatch):
    import IPython
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(
        IPython.display, "display", lambda data, raw: shown.append(data)
    )
    monkeypatch.setattr(verify, "_count", type(verify._count)())
    assert verify.identity("eq-x", (x + 1) ** 2, x**2 + 2 * x + 1) is None
    verify.order("eq-x", steps, steps**2, 2)
    first, second = shown
    assert first["text/plain"].startswith("✓ eq-x: ")
    assert 'id="check-eq-x-1"' in first["text/html"]
    assert 'href="#equation-eq-x"' in first["text/html"]
    assert 'id="check-eq-x-2"' in second["text/html"]
    data = re.search('data-record="([^"]*)"', first["text/html"])[1]
    record = json.loads(html.unescape(data))
    assert (record["kind"], record["algebra"]) == ("identity", "sympy")
    assert record["latex"] == r"\left(x + 1\right)^{2} = x^{2} + 2 x + 1"
    data = re.search('data-record="([^"]*)"', second["text/html"])[1]
    record = json.loads(html.unescape(data))
    assert (record["order"], record["instances"]) == (2, 8)


def test_long_expressions_are_counted_and_not_shown():
    long = sp.expand((x + y + alpha) ** 20)
    with verify.recording() as checks:
        verify.identity("eq-x", long, (x + y + alpha) ** 20)
    latex = checks[0].record["latex"]
    assert len(latex) < 2000
    assert "operations" in latex
    assert r"^{20}" in latex


def test_recording_keeps_operands_as_they_were():
    u = vector(1.0, 2.0)
    with verify.recording() as checks:
        verify.agreement("thm-x", 2 * u, (w := u + u))
    verify.agreement("thm-x", 2 * u, w)
    w.zero_()
    (check,) = checks
    check.function(check.label, **check.operands)
    check.operands["expected"][0] += 1
    with pytest.raises(VerificationError):
        check.function(check.label, **check.operands)


@pytest.mark.parametrize("label", ["", None, 3])
def test_a_check_needs_a_label(label):
    with pytest.raises(TypeError, match="label"):
        verify.agreement(label, 1.0, 1.0)
