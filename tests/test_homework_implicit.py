"""The exercises of "Implicit" know their mistakes."""

import numpy as np
import pytest
import sympy as sp
import torch

from companion import Proximal, gradient, hessian, meta_gradient
from companion.homework import check, exercises
from companion.homework._implicit import damped, with_bugs

# Right answers, written differently. ----------------------------------------


def by_the_companion(loss, theta, phi, task, strength):
    return meta_gradient(loss, theta, [task], Proximal(strength), "implicit")


def by_the_companion_in_the_strength(loss, theta, phi, task, strength):
    inner = Proximal(strength)
    return meta_gradient(loss, theta, [task], inner, wrt="strength")


def by_an_inverse(loss, theta, phi, task, strength):
    H = hessian(loss)(phi, task.support)
    S = torch.linalg.inv(
        torch.eye(len(theta), dtype=theta.dtype) + H / strength
    )
    return S @ gradient(loss)(phi, task.query)


def by_the_support_gradient(loss, theta, phi, task, strength):
    whole = by_an_inverse(loss, theta, phi, task, strength)
    return whole @ gradient(loss)(phi, task.support) / strength**2


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("answer", [by_the_companion, by_an_inverse])
def test_the_meta_gradient_may_be_any_algorithm(number, answer):
    assert check(f"implicit-{number}", answer)


@pytest.mark.parametrize(
    "answer", [by_the_companion_in_the_strength, by_the_support_gradient]
)
def test_the_strengths_gradient_may_be_any_algorithm(answer):
    assert check("implicit-3", answer)


def test_the_hand_calculation_may_be_written_out():
    t1, t2, c1, c2 = sp.symbols("theta_1 theta_2 c_1 c_2", real=True)
    S = sp.Matrix([[6, -2], [-2, 8]]) / 11
    answer = S * (S * sp.Matrix([t1, t2]) - sp.Matrix([c1, c2]))
    assert check("implicit-1", answer.expand())


def test_the_jump_may_be_written_with_two_roots():
    a, b, strength = sp.symbols("a b lambda", positive=True)
    assert check("implicit-5", 2 * sp.sqrt(b - strength) / sp.sqrt(a))


def test_the_bugs_of_the_page_are_all_there():
    verdict = check(
        "implicit-4", with_bugs(damping=damped, start=True, short=True)
    )
    assert verdict.mistake == "damping+hessian-at-theta+unfinished"


@pytest.mark.parametrize("number", [2, 3])
def test_a_factor_is_recognised(number):
    right = exercises()[f"implicit-{number}"].solution
    verdict = check(f"implicit-{number}", lambda *x: 3 * right(*x))
    assert not verdict
    assert number == 3 or verdict.mistake == "factor"


@pytest.mark.parametrize("form", [list, tuple, sp.Array, np.array])
def test_the_column_may_be_handed_in_as_a_list_or_an_array(form):
    column = exercises()["implicit-1"].solution
    assert check("implicit-1", form([sp.expand(x) for x in column]))
    assert check("implicit-1", [[x] for x in column])
    assert not check("implicit-1", form([*column, column[0]]))
    assert not check("implicit-1", form([column[1], column[0]]))


def test_one_iteration_too_many_is_a_division_by_zero():
    def too_long(*case):
        return torch.full_like(case[1], torch.nan)

    verdict = check("implicit-4", too_long)
    assert verdict.mistake == "not-finite"
    assert "division by zero" in verdict.message
