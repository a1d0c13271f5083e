"""The exercises of chapter 1: every planted mistake is named, and right
answers pass however they are written."""

import copy
import math

import numpy as np
import pytest
import sympy as sp
import torch

from companion.article import solve_meta_learning_ode
from companion.homework import check, exercises
from companion.homework._article import (
    _last_step_only,
    _moved,
    _reveal,
    _solver,
    _unmoved,
    article_2,
)

IDS = [f"article-{k}" for k in range(1, 7)]
a, c, alpha, theta = sp.symbols("a c alpha theta")
K, m, sigma, sigma_w, share = sp.symbols("K m sigma sigma_w share")


def test_the_chapter_has_its_six_exercises():
    assert [i for i in exercises() if i.startswith("article-")] == IDS
    assert all(exercises()[i].chapter == 1 for i in IDS)


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


@pytest.mark.parametrize(
    ("answer", "mistake"),
    [
        (c + (theta - c) * (1 - alpha * a) ** K, "adapted-parameters"),
        (a * (theta - c) ** 2 * (1 - alpha * a) ** (2 * K) / 2, "loss"),
    ],
)
def test_what_else_the_loop_computes_is_named(answer, mistake):
    assert check("article-1", answer).mistake == mistake


@pytest.mark.parametrize(
    ("number", "mistake"),
    [
        (0, "gradient-at-theta"),
        (1, "one-step"),
        (2, "one-step-objective"),
        (3, "no-K"),
    ],
)
def test_a_number_left_over_for_K_is_told(number, mistake):
    answer = a * (1 - alpha * a) ** number * (theta - c)
    verdict = check("article-1", answer)
    assert verdict.mistake == mistake
    assert "the answer has no K" in verdict.message


def test_a_mistake_that_has_K_is_not_told_of_it():
    verdict = check("article-1", -a * (1 - alpha * a) ** K * (theta - c))
    assert verdict.mistake == "sign"
    assert "no K" not in verdict.message


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


def test_the_callers_theta_must_not_require_gradients_afterwards():
    def answer(loss, theta, support, query, lr, steps):
        adapted = theta.requires_grad_()
        for _ in range(steps):
            (slope,) = torch.autograd.grad(
                loss(adapted, support), adapted, create_graph=True
            )
            adapted = adapted - lr * slope
        return torch.autograd.grad(loss(adapted, query), theta)[0]

    verdict = check("article-2", answer)
    assert verdict.mistake == "requires-grad-on-argument"


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


def count(T, dt):
    """How many steps no longer than dt are needed."""
    return math.ceil(T / dt - 1e-9)


def halfway(*, convert, steps):
    """An answer with two lines of the solver left open."""

    def solve(field, theta0, T, dt):
        theta = convert(theta0)
        thetas = [theta.copy()]
        for h in steps(T, dt):
            theta += h * field(theta)
            thetas.append(theta.copy())
        return np.array(thetas)

    return solve


def floats(x):
    return x.astype(float)


def equal(T, dt):
    return [T / count(T, dt)] * count(T, dt)


def whole(T, dt):
    return [dt for _ in np.arange(0, T, dt)]


def shortened(T, dt):
    return [min(dt, T - t) for t in np.arange(0, T, dt)]


def shortened_while(T, dt):
    t = 0
    while t < T:
        yield min(dt, T - t)
        t += dt


def unguarded(T, dt):
    return [T / math.ceil(T / dt)] * math.ceil(T / dt)


def accumulated(T, dt):
    t, h = 0, T / count(T, dt)
    while t < T:
        yield h
        t += h


@pytest.mark.parametrize(
    ("answer", "mistake"),
    [
        (halfway(convert=lambda x: x, steps=equal), "overwrites-start"),
        (halfway(convert=lambda x: x, steps=whole), "overwrites-start"),
        (halfway(convert=lambda x: x, steps=shortened), "overwrites-start"),
        (halfway(convert=np.copy, steps=equal), "integer-start"),
        (halfway(convert=np.copy, steps=whole), "overshoot"),
        (halfway(convert=floats, steps=whole), "overshoot"),
        (halfway(convert=floats, steps=shortened), "last-step-shortened"),
        (halfway(convert=floats, steps=shortened_while), "last-step-shortened"),
        (halfway(convert=floats, steps=unguarded), "rounding"),
        (halfway(convert=floats, steps=accumulated), "rounding"),
        (lambda *problem: _solver(*problem)[1:], "start-left-out"),
        (lambda *problem: _solver(*problem)[-1], "last-state-only"),
    ],
)
def test_half_mended_solvers_are_diagnosed(answer, mistake):
    assert check("article-3", answer).mistake == mistake


def test_the_rounding_traps_are_traps():
    """Each pair catches one way to count, and the other does not."""
    assert len(unguarded(2.1, 0.3)) == 8 == count(2.1, 0.3) + 1
    assert len(list(accumulated(1.0, 0.1))) == 11 == count(1.0, 0.1) + 1


def test_floor_division_stops_short():
    def solve(field, theta0, T, dt):
        states = [theta0.astype(float)]
        for _ in range(int(T / dt)):
            states.append(states[-1] + dt * field(states[-1]))
        return np.stack(states)

    assert check("article-3", solve).mistake == "stops-short"


def test_solvers_written_otherwise_pass():
    def with_linspace(field, theta0, T, dt):
        times = np.linspace(0, T, count(T, dt) + 1)
        states = [np.asarray(theta0) * 1.0]
        for h in np.diff(times):
            states.append(states[-1] + h * field(states[-1]))
        return np.stack(states)

    assert check("article-3", with_linspace)
    assert check("article-3", halfway(convert=floats, steps=equal))
    assert check("article-3", lambda *p: [row for row in _solver(*p)])


def test_the_companions_solver_passes():
    class OneTask:
        def __init__(self, field):
            self.field = field

        def grad(self, theta):
            return -self.field(theta)

    def solve(field, theta0, T, dt):
        return solve_meta_learning_ode(theta0, [OneTask(field)], T, dt)

    assert check("article-3", solve)


# article-4. -----------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        (m * sigma_w**2 + share * sigma**2) / (m * sigma_w**2 + sigma**2),
        1 - (1 - share) / (1 + m * (sigma_w / sigma) ** 2),
    ],
)
def test_best_rate_in_other_forms(answer):
    assert check("article-4", answer)


def test_best_rate_is_where_the_expected_loss_is_least():
    noise = sigma**2 / m
    fresh = (1 - alpha) ** 2 * sigma_w**2 + alpha**2 * noise
    same = (1 - alpha) ** 2 * (sigma_w**2 + noise)
    loss = (1 - share) * fresh + share * same
    (answer,) = sp.solve(loss.diff(alpha), alpha)
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
        ((1, 0, 3, 1, 0.25, 0.5), "the-books"),
        ((3, 1, 1, 0, 0.25, 0.4), "the-books"),
    ],
)
def test_flows_along_which_F_does_not_rise(answer, mistake):
    assert check("article-5", answer).mistake == mistake


@pytest.mark.parametrize(
    "answer",
    [
        (1, 0, 4, 1, 0.2, 0.5),
        [0.5, -2, 2, 3, 0.3, 1.0],
        (sp.Integer(1), 0, 4, 1, sp.Rational(1, 5), sp.Rational(1, 2)),
        torch.tensor([1.0, 0, 4, 1, 0.2, 0.5]),
    ],
)
def test_flows_along_which_F_rises(answer):
    assert check("article-5", answer)


@pytest.mark.parametrize(
    "answer",
    [
        (1, 0, 3, 1, 0.25),
        ((1, 0), (3, 1), 0.25, 0.5),
        ((1, 0), (3, 1), (0.25, 0.5), 1, 2, 3),
        {"a_1": 1, "c_1": 0, "a_2": 3, "c_2": 1, "alpha": 0.2, "theta": 0.5},
        {1: 1, 2: 0, 3: 4, 4: 1, 5: 0.2, 6: 0.5},
        "123456",
        torch.ones(2, 3),
        sp.symbols("a_1 c_1 a_2 c_2 alpha theta"),
        1.0,
        (1, 0, 3, 1, 0.25, 1j),
        _solver,
    ],
)
def test_six_numbers_are_wanted(answer):
    verdict = check("article-5", answer)
    assert verdict.mistake == "structure"
    assert "six numbers are wanted" in verdict.message
    assert "Error" not in str(verdict)


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


def test_rows_that_moved_may_be_found_in_other_ways():
    def first_that_moved(before, after):
        dW, db = (new - old for new, old in zip(after, before))
        row = db.nonzero()[0, 0]
        return dW[row] / db[row]

    def mean_of_those_that_moved(before, after):
        dW, db = (new - old for new, old in zip(after, before))
        return (dW[db != 0] / db[db != 0, None]).mean(0)

    assert check("article-6", first_that_moved)
    assert check("article-6", mean_of_those_that_moved)


def row(choose):
    def answer(before, after):
        dW, db = (new - old for new, old in zip(after, before))
        return dW[choose(db)] / db[choose(db)]

    return answer


@pytest.mark.parametrize(
    ("choose", "mistake"),
    [
        (lambda db: 0, "first-row"),
        (lambda db: -1, "last-row"),
        (lambda db: db.argmax(), "largest-without-abs"),
        (lambda db: db.argmin(), "smallest-without-abs"),
        (lambda db: 1, "row-at-rest"),
    ],
)
def test_rows_chosen_badly_are_named(choose, mistake):
    assert check("article-6", row(choose)).mistake == mistake


def test_a_mean_over_rows_that_did_not_move_is_named():
    def mean(before, after):
        dW, db = (new - old for new, old in zip(after, before))
        return (dW / db[:, None]).mean(dim=0)

    assert check("article-6", mean).mistake == "mean-of-ratios"


def test_an_update_moves_neither_its_first_nor_its_last_row():
    _, db = _moved(*_unmoved()["first and last"])
    assert db[0] == db[-1] == 0
    assert db.abs().max() == -db.min() > 0


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
