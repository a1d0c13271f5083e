"""The exercises of "The chain rule" know their mistakes."""

import pytest
import sympy as sp
import torch

from companion import (
    GradientDescent,
    adaptation_path,
    gradient,
    hessian,
    meta_gradient,
)
from companion.homework import check, exercises
from companion.homework._chain_rule import EXERCISES, with_bugs

PLANTED = [
    pytest.param(
        exercise.id, mistake, id=f"{exercise.id}-{mistake.name}-{number}"
    )
    for exercise in EXERCISES
    for number, mistake in enumerate(exercise.mistakes)
]


def test_the_exercises_of_the_chapter_are_registered():
    assert [e.id for e in EXERCISES] == [f"chain-rule-{n}" for n in range(1, 7)]
    assert {e.id for e in EXERCISES} <= set(exercises())


@pytest.mark.parametrize(("exercise", "mistake"), PLANTED)
def test_every_planted_mistake_gets_its_own_diagnosis(exercise, mistake):
    verdict = check(exercise, mistake.answer)
    assert not verdict
    assert verdict.mistake == mistake.name
    assert verdict.message == mistake.message


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_the_solution_passes_and_nothing_passes_for_everything(exercise):
    assert check(exercise.id, exercise.solution)
    assert check(exercise.id, None).mistake == "blank"
    assert not check(exercise.id, "the chain rule")


def a_cut_graph(loss, theta, tasks, lr, steps):
    """The exercise's loop with its update through .data, done by hand."""
    result = torch.zeros_like(theta)
    for task in tasks:
        start = theta.clone().requires_grad_()
        adapted = start.clone()
        for _ in range(steps):
            (slope,) = torch.autograd.grad(
                loss(adapted, task.support), adapted, create_graph=True
            )
            adapted.data.sub_(lr * slope)
        judged = loss(adapted, task.query)
        result += torch.autograd.grad(judged, start)[0] / len(tasks)
    return result


def test_an_update_through_data_is_recognised_as_a_cut_graph():
    assert check("chain-rule-3", a_cut_graph).mistake == "no-create-graph"


def test_a_start_that_is_moved_in_place_is_recognised():
    def moves_the_start(loss, theta, tasks, lr, steps):
        theta -= lr
        return with_bugs()(loss, theta, tasks, lr, steps)

    assert check("chain-rule-3", moves_the_start).mistake == "mutates"


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_sign_and_a_factor_are_recognised(number):
    right = exercises()[f"chain-rule-{number}"].solution
    minus = check(f"chain-rule-{number}", lambda *x: -right(*x))
    double = check(f"chain-rule-{number}", lambda *x: 2 * right(*x))
    assert minus.mistake == "sign"
    assert double.mistake == "factor"


# Right answers, written differently. ----------------------------------------


def by_dense_matrices(loss, theta, task, lr, steps):
    path = adaptation_path(
        loss, theta, task.support, GradientDescent(lr, steps)
    )
    result = gradient(loss)(path[-1], task.query)
    for point in path[-2::-1]:
        H = hessian(loss)(point, task.support)
        result = (torch.eye(len(theta), dtype=theta.dtype) - lr * H) @ result
    return result


def by_forward_mode(loss, theta, task, lr, steps):
    inner = GradientDescent(lr, steps)
    return meta_gradient(loss, theta, [task], inner, method="forward")


def by_float32(loss, theta, task, lr, steps):
    task = type(task)(*[tuple(x.float() for x in part) for part in task])
    return by_dense_matrices(loss, theta.float(), task, lr, steps)


def by_numpy(loss, theta, task, lr, steps):
    return by_dense_matrices(loss, theta, task, lr, steps).numpy()


@pytest.mark.parametrize(
    "answer", [by_dense_matrices, by_forward_mode, by_float32, by_numpy]
)
def test_a_reverse_sweep_may_be_any_algorithm_in_any_precision(answer):
    assert check("chain-rule-2", answer)


def test_two_minibatches_may_be_expanded_factored_or_differentiated():
    theta = sp.Matrix(sp.symbols("theta_1 theta_2", real=True))
    c, alpha = sp.Matrix(sp.symbols("c_1 c_2")), sp.Symbol("alpha")
    A, B = sp.Matrix([[2, 1], [1, 1]]), sp.Matrix([[1, 0], [0, 3]])
    first = theta - alpha * A * theta
    second = first - alpha * B * first
    objective = ((second - c).T * (second - c))[0] / 2
    differentiated = sp.Matrix([objective.diff(x) for x in theta])
    assert check("chain-rule-1", differentiated)
    assert check("chain-rule-1", differentiated.applyfunc(sp.expand))
    assert check("chain-rule-1", differentiated.applyfunc(sp.factor))


def test_the_mended_loop_may_use_the_companion():
    def mended(loss, theta, tasks, lr, steps):
        return meta_gradient(loss, theta, tasks, GradientDescent(lr, steps))

    assert check("chain-rule-3", mended)


def test_the_rate_may_be_learned_by_reverse_mode_or_as_a_number():
    def by_autograd(loss, theta, task, lr, steps):
        rate = torch.tensor(lr, dtype=theta.dtype, requires_grad=True)
        adapted = theta.clone().requires_grad_()
        for _ in range(steps):
            (slope,) = torch.autograd.grad(
                loss(adapted, task.support), adapted, create_graph=True
            )
            adapted = adapted - rate * slope
        return torch.autograd.grad(loss(adapted, task.query), rate)[0]

    assert check("chain-rule-4", by_autograd)
    assert check("chain-rule-4", lambda *x: float(by_autograd(*x)))


def test_the_head_may_be_adapted_by_an_explicit_loop():
    def by_autograd(loss, theta, task, lr, steps):
        body = theta["body"].clone().requires_grad_()
        start = theta["head"].clone().requires_grad_()
        head = start
        for _ in range(steps):
            value = loss({"body": body, "head": head}, task.support)
            (slope,) = torch.autograd.grad(value, head, create_graph=True)
            head = head - lr * slope
        value = loss({"body": body, "head": head}, task.query)
        slopes = torch.autograd.grad(value, (body, start))
        return dict(zip(("body", "head"), slopes))

    assert check("chain-rule-5", by_autograd)


def test_the_hinge_may_be_integrated_and_simplified_by_sympy():
    theta, alpha, c, b = sp.symbols("theta alpha c b", real=True)
    right = sp.integrate((theta - alpha - c) ** 2 / 4, (b, -1, theta))
    left = sp.integrate((theta - c) ** 2 / 4, (b, theta, 1))
    answer = sp.simplify((right + left).diff(theta))
    assert check("chain-rule-6", answer)
