"""The exercises of "The objective" know their mistakes."""

import pytest
import sympy as sp
import torch

from companion import GradientDescent, Task, gradient, meta_objective
from companion.homework import check, exercises
from companion.homework._objective import (
    best_rate_with,
    with_errors,
)
from companion.tasks import linear_regression_loss

# Right answers, written differently. ----------------------------------------


def test_a_filter_may_be_expanded_or_differentiated():
    a, e = sp.symbols("a e", real=True)
    first, second = sp.symbols("alpha_1 alpha_2", positive=True)
    adapted = e - first * a * e
    adapted = adapted - second * a * adapted
    answer = sp.diff(a * adapted**2 / 2, e, 2)
    assert check("objective-1", answer)
    assert check("objective-1", sp.expand(answer))


def by_autograd(loss, theta, tasks, lr):
    start = theta.clone().requires_grad_()
    total = 0
    for support, query in tasks:
        (slope,) = torch.autograd.grad(
            loss(start, support), start, create_graph=True
        )
        total = total + loss(start - lr * slope, query)
    value = total / len(tasks)
    (slope,) = torch.autograd.grad(value, start)
    return value.detach(), slope


def by_the_companion(loss, theta, tasks, lr):
    def F(theta):
        return meta_objective(loss, theta, tasks, GradientDescent(lr, 1))

    return [float(F(theta)), gradient(F)(theta).numpy()]


@pytest.mark.parametrize("answer", [by_autograd, by_the_companion])
def test_an_objective_may_be_differentiated_in_any_way(answer):
    assert check("objective-2", answer)


def cut(how):
    """By autograd, with a graph that the inner gradient never enters."""

    def objective(loss, theta, tasks, lr):
        start = theta.clone().requires_grad_()
        total = 0
        for support, query in tasks:
            adapted = start.clone()
            (slope,) = torch.autograd.grad(
                loss(adapted, support), adapted, create_graph=how == "data"
            )
            if how == "data":
                adapted.data.sub_(lr * slope)
            else:
                adapted = adapted - lr * slope
            total = total + loss(adapted, query)
        value = total / len(tasks)
        return value.detach(), torch.autograd.grad(value, start)[0]

    return objective


@pytest.mark.parametrize("how", ["data", "no create_graph"])
def test_a_cut_graph_is_recognised(how):
    assert check("objective-2", cut(how)).mistake == "first-order"


def test_a_start_that_is_moved_in_place_is_not_accepted():
    def moves(loss, theta, tasks, lr):
        result = with_errors()(loss, theta, tasks, lr)
        theta -= lr
        return result

    assert check("objective-2", moves).mistake == "mutates"


def test_a_rate_may_be_found_by_any_search():
    def by_min(loss, theta, tasks, rates):
        def judged(lr):
            return float(
                meta_objective(loss, theta, tasks, GradientDescent(lr, 1))
            )

        return min(rates, key=judged)

    assert check("objective-3", by_min)
    assert check("objective-3", lambda *x: torch.tensor(by_min(*x)))


def test_every_bug_of_the_search_changes_the_rate_it_finds():
    exercise = exercises()["objective-3"]
    found = [
        str([answer(*given) for given in exercise.instances()])
        for answer in (
            exercise.solution,
            *(mistake.answer for mistake in exercise.mistakes),
        )
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("extreme", [min, max])
def test_no_rate_is_the_best_or_the_worst_by_its_place(extreme):
    for loss, theta, tasks, rates in exercises()["objective-3"].instances():

        def judged(lr, loss=loss, theta=theta, tasks=tasks):
            return float(
                meta_objective(loss, theta, tasks, GradientDescent(lr, 1))
            )

        assert extreme(rates, key=judged) not in (rates[0], rates[-1])


def test_a_search_in_which_nothing_adapts_is_told_so():
    def never_adapts(loss, theta, tasks, rates):
        def judged(lr):
            return float(sum(loss(theta, task.query) for task in tasks))

        return min(rates, key=judged)

    verdict = check("objective-3", never_adapts)
    assert verdict.mistake == "first-rate"
    assert "nothing adapts" in verdict.message


def test_a_leaking_search_agrees_on_a_single_task():
    data = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    given = (
        linear_regression_loss,
        torch.zeros(2, dtype=torch.float64),
        [Task(data, data)],
        [0.5, 1.0, 2.0],
    )
    assert best_rate_with()(*given) == best_rate_with(leaks=True)(*given) == 2.0


@pytest.mark.parametrize(
    "answer",
    [
        (0.5, 0.2, 1.0, 1),
        [5, 2, 0.1, 1],
        torch.tensor([0.4, 0.15, 1.0, 2.0]),
        (sp.Rational(11, 20), sp.Rational(1, 5), 1, 1),
    ],
)
def test_a_disagreement_may_be_any_that_is_one(answer):
    assert check("objective-4", answer)


@pytest.mark.parametrize(
    ("answer", "mistake"),
    [
        ((0.55, 0.2, 1.0, 1, 1), "not-four-numbers"),
        ((0.55, 0.2, 1.0), "not-four-numbers"),
        (((0.55, 0.2), (1.0, 1)), "not-four-numbers"),
        ([[0.55, 0.2, 1.0, 1]], "not-four-numbers"),
        (0.55, "not-four-numbers"),
        (torch.ones(4, 2), "not-four-numbers"),
        (sp.symbols("a b c d"), "not-four-numbers"),
        ("1111", "not-four-numbers"),
        (lambda: (0.55, 0.2, 1.0, 1), "not-four-numbers"),
        ((0.55, 0.2, float("nan"), 1), "not-four-numbers"),
        ((0.55, 0.2, 1.0, float("inf")), "not-four-numbers"),
        ((-0.2, -0.55, -1.0, 1), "not-positive"),
    ],
)
def test_what_cannot_be_a_disagreement_is_told_what_is_wanted(answer, mistake):
    verdict = check("objective-4", answer)
    assert verdict.mistake == mistake
    assert "Error" not in verdict.message


@pytest.mark.parametrize(
    "answer", [0.5, 0.0, torch.tensor(0.7), sp.Rational(1, 3)]
)
def test_a_number_is_not_the_rate_of_k_steps(answer):
    verdict = check("objective-5", answer)
    assert verdict.mistake == "constant"
    assert "wanted is an expression" in verdict.message


def test_the_rate_of_k_steps_may_be_written_with_exponentials():
    K, m, noise, spread = sp.symbols("K m sigma sigma_w", positive=True)
    one_step = spread**2 / (spread**2 + noise**2 / m)
    assert check("objective-5", 1 - (1 - one_step) ** (1 / K))
    assert check("objective-5", 1 - sp.exp(sp.log(1 - one_step) / K))
    plain = {s: sp.Symbol(s.name) for s in (K, m, noise, spread)}
    assert check("objective-5", (1 - (1 - one_step) ** (1 / K)).subs(plain))
