"""The exercises of "Smoothness of the meta-objective" know their mistakes."""

import sympy as sp
import torch

from companion import GradientDescent, Task, hessian, meta_objective
from companion.homework import check, exercises
from companion.lipschitz import (
    safe_meta_step,
    smoothness_bound,
    strong_convexity_bound,
)
from companion.tasks import quadratic_loss

# Right answers, written differently. ----------------------------------------


def test_the_limit_of_short_steps_is_that_of_the_companions_bound():
    beta, b, rho, G, c, k = sp.symbols("beta b rho G c k", positive=True)
    r = 1 + c * beta / k
    bound = (
        b * r ** (2 * k) + rho / beta * (r ** (2 * k - 1) - r ** (k - 1)) * G
    )
    assert check("smoothness-1", sp.limit(bound, k, sp.oo))
    for K in (1, 3):
        found = smoothness_bound(
            c / K, K, smoothness=beta, hessian_lipschitz=rho,
            gradient_bound=G, query_smoothness=b,
        )  # fmt: skip
        assert sp.simplify(found - bound.subs(k, K)) == 0


def test_the_constant_seen_from_a_point_may_come_from_the_companion():
    def by_companion(theta, tasks, lr, beta, rho, slope):
        bounds = [
            smoothness_bound(
                lr, 1, smoothness=beta, hessian_lipschitz=rho,
                gradient_bound=float(torch.linalg.vector_norm(
                    slope(theta - lr * slope(theta, support), query)
                )),
            )
            for support, query in tasks
        ]  # fmt: skip
        return sum(bounds) / len(bounds)

    assert check("smoothness-2", by_companion)


def test_the_safe_rate_is_the_companions():
    def by_companion(lr, steps, beta, rho, G):
        return safe_meta_step(
            lr, steps, smoothness=beta, hessian_lipschitz=rho, gradient_bound=G
        )

    def closed(lr, steps, beta, rho, G):
        r = 1 + lr * beta
        bend = rho / beta * r ** (steps - 1) * (r**steps - 1)
        return (r ** (2 * steps) * beta + bend * G) ** -1

    assert check("smoothness-3", by_companion)
    assert check("smoothness-3", closed)


def test_truths_may_be_words_and_several_wrong_ones_are_wrong():
    truth = {key: str(key in "bdf") for key in "abcdefg"}
    assert check("smoothness-4", truth)
    assert not check("smoothness-4", dict.fromkeys("abcdefg", True))
    assert not check("smoothness-4", dict.fromkeys("abcdefg", False))
    assert check("smoothness-4", truth | {"a": "maybe"}).mistake == "form"


def test_the_outer_limit_is_that_of_the_hessian_of_the_meta_objective():
    def by_automatic_differentiation(matrices, lr, steps):
        zero = torch.zeros(matrices.shape[-1], dtype=matrices.dtype)
        tasks = [Task((A, zero), (A, zero)) for A in matrices]
        inner = GradientDescent(lr, steps)
        H = hessian(lambda y: meta_objective(quadratic_loss, y, tasks, inner))
        return 2 / torch.linalg.matrix_norm(H(zero), 2)

    assert check("smoothness-5", by_automatic_differentiation)


def test_the_limit_of_the_inner_rate_is_where_the_companions_bound_vanishes():
    beta, mu, rho, G, alpha = sp.symbols("beta mu rho G alpha", positive=True)
    bound = strong_convexity_bound(
        alpha, 1, smoothness=beta, strong_convexity=mu, hessian_lipschitz=rho,
        gradient_bound=G,
    )  # fmt: skip
    values = {beta: 2, mu: 1, rho: 3, G: sp.Rational(1, 2)}
    found = exercises()["smoothness-6"].solution
    named = {sp.Symbol(s.name): v for s, v in values.items()}
    roots = sp.solve(bound.subs(values), alpha)
    assert sp.simplify(found.subs(named) - min(roots)) == 0
    assert 0 < min(roots) < sp.Rational(1, 2) < max(roots)
    assert check(
        "smoothness-6",
        min(sp.solve(bound, alpha), key=lambda s: s.subs(values)),
    )
