"""The exercises of chapter 1: every planted mistake is named, and right
answers pass however they are written."""

import copy

import numpy as np
import pytest
import sympy as sp
import torch

from companion.homework import check, exercises
from companion.homework._article import (
    _last_step_only,
    _reveal,
    _solver,
    article_2,
)

IDS = [f"article-{k}" for k in range(1, 7)]
a, c, alpha, theta = sp.symbols("a c alpha theta")
K, m, sigma, sigma_w = sp.symbols("K m sigma sigma_w")


def test_the_chapter_has_its_six_exercises():
    assert [i for i in exercises() if i.startswith("article-")] == IDS
    assert all(exercises()[i].chapter == 1 for i in IDS)


@pytest.mark.parametrize(
    ("exercise", "mistake"),
    [
        pytest.param(i, mistake, id=f"{i}-{mistake.name}-{k}")
        for i in IDS
        for k, mistake in enumerate(exercises()[i].mistakes)
    ],
)
def test_listed_mistakes_are_told_apart(exercise, mistake):
    verdict = check(exercise, mistake.answer)
    assert not verdict
    assert verdict.mistake == mistake.name


# article-1. -----------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        (theta - c) * a * sp.exp(K * sp.log(1 - alpha * a)),
        a * (1 - a * alpha) ** (K - 1) * (theta - c - alpha * a * (theta - c)),
        (a * theta - a * c) * (1 - alpha * a) ** K,
    ],
)
def test_gradient_on_a_quadratic_in_other_forms(answer):
    assert check("article-1", answer)


def test_gradient_with_positive_symbols_passes():
    a, alpha = sp.symbols("a alpha", positive=True)
    assert check("article-1", a * (1 - alpha * a) ** K * (theta - c))


# article-2, with answers as a student writes them. --------------------------


def inner_loop(*, update, create_graph=True, outer="theta", clone=True):
    """An answer with one line of the inner loop left open."""

    def answer(loss, theta, support, query, lr, steps):
        theta = theta.clone().requires_grad_()
        params = [theta.clone() if clone else theta]
        for _ in range(steps):
            grads = torch.autograd.grad(
                loss(params[0], support), params, create_graph=create_graph
            )
            update(params, lr * grads[0])
        wrt = theta if outer == "theta" else params[0]
        return torch.autograd.grad(loss(params[0], query), wrt)[0]

    return answer


def assigned(params, step):
    params[0] = params[0] - step


def through_data(params, step):
    params[0].data.sub_(step)


def detached(params, step):
    params[0] = (params[0] - step).detach().requires_grad_()


def recorded(params, step):
    params[0].sub_(step)


def rebound(params, step):
    param = params[0]
    param = param - step


def test_functional_update_passes():
    assert check("article-2", inner_loop(update=assigned))
    assert check("article-2", inner_loop(update=assigned, clone=False))


def test_update_by_torch_func_passes():
    def answer(loss, theta, support, query, lr, steps):
        def F(theta):
            for _ in range(steps):
                theta = theta - lr * torch.func.grad(loss)(theta, support)
            return loss(theta, query)

        return torch.func.grad(F)(theta)

    assert check("article-2", answer)


@pytest.mark.parametrize(
    "answer",
    [
        inner_loop(update=through_data),
        inner_loop(update=assigned, create_graph=False),
        inner_loop(update=assigned, outer="adapted"),
        inner_loop(update=detached, outer="adapted"),
    ],
    ids=["data", "no-create-graph", "wrt-adapted", "detach"],
)
def test_ways_to_cut_the_graph_are_first_order(answer):
    assert check("article-2", answer).mistake == "first-order"


def test_rebinding_adapts_nothing():
    verdict = check("article-2", inner_loop(update=rebound))
    assert verdict.mistake == "adapts-nothing"


def test_recorded_in_place_update_says_that_it_raises():
    verdict = check("article-2", inner_loop(update=recorded))
    assert verdict.mistake == "raises"
    assert "in" in verdict.message and "Traceback" not in verdict.message


def test_detaching_between_steps_is_told_from_first_order():
    def answer(loss, theta, support, query, lr, steps):
        adapted = theta
        for _ in range(steps):
            start = adapted.detach().requires_grad_()
            (slope,) = torch.autograd.grad(
                loss(start, support), start, create_graph=True
            )
            adapted = start - lr * slope
        return torch.autograd.grad(loss(adapted, query), start)[0]

    assert check("article-2", answer).mistake == "last-step-only"


def test_solutions_of_article_2_differ_pairwise():
    """Else one diagnosis would hide another."""
    problem = article_2.instances()[0]
    values = [mistake.answer(*problem) for mistake in article_2.mistakes]
    values.append(article_2.solution(*problem))
    for i, x in enumerate(values):
        for y in values[:i]:
            assert (x - y).norm() > 1e-4 * x.norm()
    one_step = article_2.instances()[2]
    assert torch.allclose(
        _last_step_only(*one_step), article_2.solution(*one_step)
    )


# article-3. -----------------------------------------------------------------


def test_listing_is_told_that_its_rows_are_one():
    def solve(field, theta0, T, dt):
        theta = theta0
        thetas = [theta0]
        for _ in np.arange(0, T, dt):
            theta += dt * field(theta)
            thetas.append(theta)
        return np.array(thetas)

    assert check("article-3", solve).mistake == "in-place-aliasing"


def halfway(*, convert, shorten):
    def solve(field, theta0, T, dt):
        theta = convert(theta0)
        thetas = [theta.copy()]
        for t in np.arange(0, T, dt):
            theta += (min(dt, T - t) if shorten else dt) * field(theta)
            thetas.append(theta.copy())
        return np.array(thetas)

    return solve


@pytest.mark.parametrize(
    ("answer", "mistake"),
    [
        (halfway(convert=lambda x: x, shorten=True), "overwrites-start"),
        (halfway(convert=lambda x: x, shorten=False), "overwrites-start"),
        (halfway(convert=np.copy, shorten=True), "integer-start"),
        (halfway(convert=np.copy, shorten=False), "overshoot"),
        (
            halfway(convert=lambda x: x.astype(float), shorten=False),
            "overshoot",
        ),
        (lambda *problem: _solver(*problem)[1:], "start-left-out"),
        (lambda *problem: _solver(*problem)[-1], "last-state-only"),
    ],
)
def test_half_mended_solvers_are_diagnosed(answer, mistake):
    assert check("article-3", answer).mistake == mistake


def test_floor_division_stops_short():
    def solve(field, theta0, T, dt):
        states = [theta0.astype(float)]
        for _ in range(int(T / dt)):
            states.append(states[-1] + dt * field(states[-1]))
        return np.stack(states)

    assert check("article-3", solve).mistake == "stops-short"


def test_solvers_written_otherwise_pass():
    def with_while(field, theta0, T, dt):
        t, states = 0.0, [np.asarray(theta0) * 1.0]
        while t < T:
            step = min(dt, T - t)
            states.append(states[-1] + step * field(states[-1]))
            t += step
        return np.stack(states)

    assert check("article-3", with_while)
    assert check(
        "article-3", halfway(convert=lambda x: x.astype(float), shorten=True)
    )
    assert check("article-3", lambda *p: [row for row in _solver(*p)])


# article-4. -----------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        1 - (sigma**2 / (m * sigma_w**2 + sigma**2)) ** (1 / K),
        1 - sp.root(1 / (1 + m * (sigma_w / sigma) ** 2), K),
    ],
)
def test_best_rate_in_other_forms(answer):
    assert check("article-4", answer)


def test_a_plain_number_may_answer_where_an_expression_is_wanted():
    assert check("article-4", 1).mistake == "support-for-query"
    assert check("article-4", 1.0).mistake == "support-for-query"
    assert not check("article-4", 0.5)


# article-5. -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "mistake"),
    [
        ((1, 0, 3, 1, 0.25, 0.1), "outside"),
        ((1, 0, 3, 1, 0.25, 0.9), "outside"),
        ((1, 0, 3, 1, 0.25, 0.75), "at-rest"),
        ((1, 0, 3, 1, 0.25, 0.25), "at-minimum"),
        ((2, 0, 2, 1, 0.25, 0.4), "equal-curvatures"),
        ((1, 1, 3, 1, 0.25, 0.4), "one-centre"),
        ((1, 0, 3, 1, 0.0, 0.4), "no-adaptation"),
        ((1, 0, -3, 1, 0.25, 0.4), "no-minimum"),
        ((1, 0, 3, 1, 0.25, float("nan")), "not-finite"),
        ((1, 0, 3, 1, 0.25), "structure"),
    ],
)
def test_flows_along_which_F_does_not_rise(answer, mistake):
    assert check("article-5", answer).mistake == mistake


@pytest.mark.parametrize(
    "answer",
    [
        (1, 0, 3, 1, 0.25, 0.5),
        [0.5, -2, 2, 3, 0.3, 1.0],
        (sp.Integer(1), 0, 3, 1, sp.Rational(1, 4), sp.Rational(1, 2)),
        torch.tensor([1.0, 0, 3, 1, 0.25, 0.5]),
    ],
)
def test_flows_along_which_F_rises(answer):
    assert check("article-5", answer)


# article-6. -----------------------------------------------------------------


def test_examples_revealed_in_other_ways():
    def least_squares(before, after):
        dW, db = (new - old for new, old in zip(after, before))
        return dW.T @ db / (db @ db)

    def by_singular_vector(before, after):
        dW, db = (new - old for new, old in zip(after, before))
        u, s, v = torch.linalg.svd(dW)
        return v[0] * s[0] / (u[:, 0] @ db)

    assert check("article-6", least_squares)
    assert check("article-6", by_singular_vector)


def test_sign_and_scale_of_an_update_are_not_the_example():
    assert check("article-6", lambda *p: -_reveal(*p)).mistake == "sign"
    assert check("article-6", lambda *p: 2 * _reveal(*p)).mistake == "factor"


# All of them. ---------------------------------------------------------------


@pytest.mark.parametrize("exercise", IDS)
@pytest.mark.parametrize("answer", [None, ..., "", object(), lambda: 1])
def test_nonsense_is_refused_without_a_traceback(exercise, answer):
    verdict = check(exercise, copy.copy(answer))
    assert not verdict
    assert "Traceback" not in str(verdict)
