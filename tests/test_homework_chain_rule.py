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
from companion.homework._chain_rule import with_bugs


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


def by_dense_matrices(loss, theta, task, lr):
    path = adaptation_path(
        loss,
        theta,
        task.support,
        GradientDescent(lr, len(task.support), minibatches=True),
    )
    result = gradient(loss)(path[-1], task.query)
    for point, batch in zip(path[-2::-1], task.support[::-1]):
        H = hessian(loss)(point, batch)
        result = (torch.eye(len(theta), dtype=theta.dtype) - lr * H) @ result
    return result


def by_forward_mode(loss, theta, task, lr):
    inner = GradientDescent(lr, len(task.support), minibatches=True)
    return meta_gradient(loss, theta, [task], inner, method="forward")


def by_float32(loss, theta, task, lr):
    task = type(task)(
        [tuple(x.float() for x in batch) for batch in task.support],
        tuple(x.float() for x in task.query),
    )
    return by_dense_matrices(loss, theta.float(), task, lr)


def by_numpy(loss, theta, task, lr):
    return by_dense_matrices(loss, theta, task, lr).numpy()


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


def test_the_blocks_may_be_adapted_by_an_explicit_loop():
    def by_autograd(loss, theta, task, lr, steps):
        start = {k: x.clone().requires_grad_() for k, x in theta.items()}
        now = dict(start)
        for _ in range(steps):
            value = loss(now, task.support)
            slopes = torch.autograd.grad(
                value, [now[k] for k in lr], create_graph=True
            )
            now = {
                **now,
                **{k: now[k] - lr[k] * g for k, g in zip(lr, slopes)},
            }
        slopes = torch.autograd.grad(
            loss(now, task.query), list(start.values())
        )
        return dict(zip(start, slopes))

    assert check("chain-rule-5", by_autograd)


def test_the_hinge_may_be_integrated_and_simplified_by_sympy():
    theta, alpha, c, b = sp.symbols("theta alpha c b", real=True)
    right = sp.integrate((theta - alpha - c) ** 2 / 4, (b, -1, theta))
    left = sp.integrate((theta - c) ** 2 / 4, (b, theta, 1))
    answer = sp.simplify((right + left).diff(theta))
    assert check("chain-rule-6", answer)


# What students hand in, written out as they would. ---------------------------


def test_theta_2_with_its_steps_exchanged_is_told_from_the_outer_order():
    theta = sp.Matrix(sp.symbols("theta_1 theta_2"))
    c, alpha = sp.Matrix(sp.symbols("c_1 c_2")), sp.Symbol("alpha")
    first = sp.eye(2) - alpha * sp.Matrix([[2, 1], [1, 1]])
    second = sp.eye(2) - alpha * sp.diag(1, 3)

    def mistake(answer):
        return check("chain-rule-1", answer).mistake

    right = second * first * theta - c
    exchanged = first * second * theta - c
    assert check("chain-rule-1", first * second * right)
    assert mistake(first * second * exchanged) == "path-order"
    assert mistake(second * first * right) == "order"
    assert mistake(second * first * exchanged) == "minibatches-swapped"
    assert mistake(first**2 * (first**2 * theta - c)) == "one-minibatch"
    assert mistake(-first * second * right) == "sign"


def a_sweep(path_of, batches_of):
    def sweep(loss, theta, task, lr):
        inner = GradientDescent(lr, len(task.support), minibatches=True)
        path = adaptation_path(loss, theta, task.support, inner)
        p = gradient(loss)(path[-1], task.query)
        for point, batch in zip(path_of(path), batches_of(task.support)):
            p = p - lr * hessian(loss)(point, batch) @ p
        return p

    return sweep


@pytest.mark.parametrize(
    ("path_of", "batches_of", "mistake"),
    [
        (lambda p: p[-2::-1], lambda b: b[::-1], None),
        (lambda p: p[-2::-1], lambda b: b, "minibatches-forward"),
        (lambda p: p[::-1], lambda b: b[::-1], "hessian-after-step"),
        (lambda p: p[::-1], lambda b: [b[-1], *b[::-1]],
         "one-hessian-too-many"),
        (lambda p: [p[-1]] * len(p), lambda b: b[::-1], "hessian-at-end"),
        (lambda p: p, lambda b: b, "order"),
    ],
)  # fmt: skip
def test_points_and_minibatches_must_belong_together(
    path_of, batches_of, mistake
):
    verdict = check("chain-rule-2", a_sweep(path_of, batches_of))
    assert verdict.mistake == mistake
    assert verdict.passed == (mistake is None)


def test_the_bugs_are_told_one_after_the_other():
    every = check("chain-rule-3", with_bugs(cut=True, total=True, reused=True))
    two = check("chain-rule-3", with_bugs(total=True, reused=True))
    one = check("chain-rule-3", with_bugs(reused=True))
    summed, judged = "summed", "judged on the data they adapted to"
    assert every.message.startswith("all three bugs are left")
    assert not any(
        word in every.message for word in (summed, judged, "constants")
    )
    assert two.message.startswith("two bugs are left")
    assert summed in two.message and judged not in two.message
    assert one.message.startswith("one bug is left") and judged in one.message


def test_adapting_on_the_query_is_recognised():
    def meta(loss, theta, tasks, lr, steps):
        swapped = [type(t)(t.query, t.query) for t in tasks]
        return with_bugs()(loss, theta, swapped, lr, steps)

    assert check("chain-rule-3", meta).mistake == "adapts-on-query"


def test_a_first_order_head_is_recognised():
    def blocks(loss, theta, task, lr, steps):
        inner = GradientDescent({"body": 0.0, **lr}, steps)
        exact, direct = (
            meta_gradient(loss, theta, [task], inner, method)
            for method in ("reverse", "first_order")
        )
        return {**exact, "head": direct["head"]}

    assert check("chain-rule-5", blocks).mistake == "first-order-head"


def test_the_hinge_on_paper_loses_squares_and_exchanges_sides():
    theta, alpha, c = sp.symbols("theta alpha c")
    chance, jump = (1 + theta) / 2, -alpha * (theta - c) / 2

    def mistake(answer):
        return check("chain-rule-6", answer).mistake

    assert check(
        "chain-rule-6", theta - c - alpha * chance + jump + alpha**2 / 4
    )
    assert mistake(theta - c - alpha * chance + jump) == "square-lost"
    assert mistake(theta - c - alpha * chance) == "boundary-dropped"
    assert mistake(theta - c - alpha * (1 - chance)) == (
        "probabilities-exchanged"
    )
    assert mistake((1 - alpha) * theta - c) == "absolute-value"


# The prerequisites. ----------------------------------------------------------


def through(loss, theta, lr, by="theta"):
    (slope,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
    adapted = theta - lr * slope
    by = theta if by == "theta" else adapted
    return torch.autograd.grad(loss(adapted), by)[0]


def test_a_step_is_differentiated_on_a_copy():
    def on_a_copy(loss, theta, lr):
        return through(loss, theta.clone().requires_grad_(), lr)

    def detached(loss, theta, lr):
        return through(loss, theta.detach().requires_grad_(), lr)

    def in_place(loss, theta, lr):
        return through(loss, theta.requires_grad_(), lr)

    assert check("prerequisites-2", on_a_copy)
    assert check("prerequisites-2", detached)
    assert check("prerequisites-2", in_place).mistake == (
        "requires-grad-in-place"
    )


def test_the_gradient_by_the_adapted_parameters_is_not_blamed_on_the_graph():
    def by_adapted(loss, theta, lr):
        return through(loss, theta.clone().requires_grad_(), lr, "adapted")

    verdict = check("prerequisites-2", by_adapted)
    assert verdict.mistake == "first-order"
    assert "with respect to θ - α∇L(θ), not to θ" in verdict.message
