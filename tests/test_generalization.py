"""Generalisation: closed forms against draws, shortcuts against refits."""

import itertools
import math

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import (
    GradientDescent,
    Task,
    TaskBatch,
    gradient,
    hessian,
    meta_objective,
)
from companion.generalization import (
    confidence_interval,
    excess_risk,
    generalization_gap,
    leave_one_out,
    meta_regression,
    meta_ridge,
    monte_carlo,
    rademacher_bound,
    rademacher_complexity,
    replace_one,
    stability_bound,
    wasserstein_bound,
)
from companion.tasks import linear_regression_loss, linear_regressions

f64 = torch.float64
close = torch.testing.assert_close
seeds = st.integers(0, 10**6)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=f64)


# Confidence intervals. ------------------------------------------------------


def test_a_confidence_interval_is_that_of_student():
    # Three draws 1, 2, 3: mean 2, standard error 1/√3, and for two degrees
    # of freedom the quantile of p is (2p - 1)/√(2p(1 - p)).
    estimate = confidence_interval([1.0, 2.0, 3.0])
    assert estimate.value == 2 and estimate.level == 0.95
    reach = 0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3)
    assert estimate.high - 2 == pytest.approx(reach, rel=1e-9)
    assert 2 - estimate.low == pytest.approx(reach, rel=1e-9)
    assert estimate.covers(4.4) and not estimate.covers(4.5)
    wider = confidence_interval([1.0, 2.0, 3.0], level=0.99)
    assert wider.low < estimate.low < estimate.high < wider.high


def test_a_confidence_interval_covers_as_often_as_it_says():
    samples = normal(2000, 5)
    covered = sum(confidence_interval(row, 0.9).covers(0.0) for row in samples)
    # Five standard errors of a share of 0.9 in 2000.
    assert abs(covered / 2000 - 0.9) < 5 * math.sqrt(0.09 / 2000)


@pytest.mark.parametrize(
    "samples, level, words",
    [
        ([1.0], 0.95, "samples must be at least two finite numbers"),
        ([1.0, math.nan], 0.95, "got 2 with 1 finite"),
        ([1.0, 2.0], 1.0, "level must be between 0 and 1, got 1.0"),
    ],
)
def test_a_confidence_interval_needs_samples_and_a_level(samples, level, words):
    with pytest.raises(ValueError, match=words):
        confidence_interval(samples, level)


# The exact excess risk. -----------------------------------------------------


def test_the_excess_risk_of_one_step_has_the_book_s_form():
    n, m, q, d = sp.symbols("n m q d", positive=True)
    alpha, sigma, sigma_w = sp.symbols("alpha sigma sigma_w", positive=True)
    ours = excess_risk(n, m, q, d, lr=alpha, spread=sigma_w, noise=sigma)
    book = (
        (1 - alpha) ** 2 * sigma_w**2
        + sigma**2 / q
        + alpha**2 * sigma**2 / m
    ) * d / (2 * n)  # fmt: skip
    assert sp.expand(ours - book) == 0


def test_the_excess_risk_follows_from_the_minimiser_of_symbolic_tasks():
    # One dimension, two tasks: the companion's own meta-objective on symbols,
    # minimised, and the expectation taken by second moments.
    theta, alpha, m, q = sp.symbols("theta alpha m q", positive=True)
    sigma, sigma_w = sp.symbols("sigma sigma_w", positive=True)
    w, s, z = (sp.symbols(f"{name}:2") for name in "wsz")

    def loss(theta, mean):
        # ½ mean (θ - y)², but for a constant: only the mean of y matters.
        return (theta - mean) ** 2 / 2

    tasks = [Task(w[i] + s[i], w[i] + z[i]) for i in range(2)]
    F = meta_objective(loss, theta, tasks, GradientDescent(alpha, steps=2))
    (minimiser,) = sp.solve(sp.diff(F, theta), theta)
    new = meta_objective(
        loss, theta, [Task(sp.Integer(0), 0)], GradientDescent(alpha, 2)
    )
    excess = sp.Poly(sp.expand(new.subs(theta, minimiser)), *w, *s, *z)
    variance = dict.fromkeys(w, sigma_w**2)
    variance |= dict.fromkeys(s, sigma**2 / m) | dict.fromkeys(z, sigma**2 / q)
    expected = sum(
        excess.coeff_monomial(x**2) * variance[x] for x in excess.gens
    )
    ours = excess_risk(
        2, m, q, 1, lr=alpha, steps=2, spread=sigma_w, noise=sigma
    )
    assert sp.simplify(expected - ours) == 0


@pytest.mark.parametrize("lr, steps", [(0.3, 1), (0.3, 4), (-0.2, 1), (1.6, 1)])
def test_monte_carlo_agrees_with_the_exact_excess_and_gap(lr, steps):
    sizes = {"n_tasks": 4, "shots": 5, "query_shots": 3, "dim": 3}
    model = {"lr": lr, "steps": steps, "spread": 1.2, "noise": 0.7}
    drawn = monte_carlo(**sizes, **model, repeats=4000, level=0.999, seed=1)
    for estimate, exact in (
        (drawn.excess, excess_risk(**sizes, **model)),
        (drawn.gap, generalization_gap(**sizes, **model)),
    ):
        assert estimate.covers(exact)
        # And it is no lazy interval: 15 % off is outside.
        assert not estimate.covers(0.8 * exact)
        assert not estimate.covers(1.2 * exact)


def test_the_gap_is_twice_the_excess():
    model = {"lr": 0.5, "spread": 1.0, "noise": 0.5}
    assert generalization_gap(5, 4, 6, 2, **model) == 2 * excess_risk(
        5, 4, 6, 2, **model
    )


def test_a_gaussian_design_has_another_excess():
    sizes, model = (5, 3, 3, 3), {"lr": 0.5, "spread": 1.0, "noise": 0.5}
    drawn = monte_carlo(
        *sizes, **model, design="gaussian", repeats=2000, seed=0
    )
    assert not drawn.excess.covers(excess_risk(*sizes, **model))


def test_monte_carlo_is_determined_by_its_seed():
    arguments = (3, 3, 3, 2)
    model = {"lr": 0.5, "spread": 1.0, "noise": 0.5, "repeats": 50}
    first, again, other = (
        monte_carlo(*arguments, **model, seed=s) for s in (0, 0, 1)
    )
    assert first == again != other


def test_the_excess_risk_takes_arrays():
    n = np.array([1, 2, 4])
    values = excess_risk(n, 4, 4, 2, lr=0.5, spread=1.0, noise=0.5)
    np.testing.assert_allclose(values, values[0] / n)


def test_a_rate_of_one_has_no_single_minimiser():
    model = {"lr": 1.0, "spread": 1.0, "noise": 0.5}
    with pytest.raises(ValueError, match="no single minimiser; take lr != 1"):
        excess_risk(5, 4, 4, 2, **model)
    with pytest.raises(ValueError, match="no single minimiser"):
        monte_carlo(5, 4, 4, 2, **model, repeats=2, seed=0)
    tasks = linear_regressions(5, 4, 4, 2, design="orthonormal", seed=0)
    with pytest.raises(ValueError, match="not unique"):
        meta_ridge(tasks, 1.0)
    with pytest.raises(ValueError, match="no single minimiser"):
        excess_risk(5, 4, 4, 2, lr=sp.Integer(1), spread=1, noise=1)


def test_orthonormal_designs_need_as_many_shots_as_dimensions():
    for shots, query_shots, name in ((2, 3, "shots"), (3, 2, "query_shots")):
        with pytest.raises(ValueError, match=f"needs {name} >= dim, got"):
            excess_risk(1, shots, query_shots, 3, lr=0.5, spread=1, noise=1)


# The linear model as least squares. -----------------------------------------


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(0, 4), st.floats(-0.5, 1.5))
def test_meta_regression_is_the_meta_objective(seed, steps, lr):
    tasks = linear_regressions(4, 3, 5, 2, seed=seed)
    theta = normal(2, seed=seed)
    Z, t = meta_regression(tasks, lr, steps)
    assert Z.shape == (4, 5, 2) and t.shape == (4, 5)
    expected = meta_objective(
        linear_regression_loss, theta, tasks, GradientDescent(lr, steps)
    )
    close((Z @ theta - t).square().mean() / 2, expected)


def test_meta_regression_takes_a_list_of_tasks():
    tasks = linear_regressions(4, 3, 5, 2, seed=0)
    for ours, theirs in zip(
        meta_regression(list(tasks), 0.3), meta_regression(tasks, 0.3)
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_meta_ridge_is_a_stationary_point(strength):
    tasks, inner = linear_regressions(4, 3, 5, 2, seed=0), (0.3, 2)
    theta = meta_ridge(tasks, *inner, strength=strength)

    def objective(theta):
        F = meta_objective(
            linear_regression_loss, theta, tasks, GradientDescent(*inner)
        )
        return F + strength * theta @ theta / 2

    assert gradient(objective)(theta).norm() < 1e-12
    assert torch.linalg.eigvalsh(hessian(objective)(theta)).min() > 0


def test_meta_ridge_refuses_what_has_no_single_minimiser():
    tasks = linear_regressions(1, 3, 2, 3, seed=0)
    with pytest.raises(ValueError, match="not unique.*take strength > 0"):
        meta_ridge(tasks, 0.3)
    assert meta_ridge(tasks, 0.3, strength=0.1).shape == (3,)
    with pytest.raises(ValueError, match="strength must be at least 0, got"):
        meta_ridge(tasks, 0.3, strength=-1.0)


# Leave one out. -------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(2, 6), st.floats(0.0, 2.0))
def test_the_shortcut_is_the_refit(seed, dim, more, strength):
    X, y = normal(dim + more, dim, seed=seed), normal(dim + more, seed=seed + 1)
    close(
        leave_one_out(X, y, strength=strength),
        leave_one_out(X, y, strength=strength, method="refit"),
        rtol=1e-7, atol=1e-9,
    )  # fmt: skip


def test_the_refit_never_sees_the_example_that_it_leaves_out():
    X, y = normal(6, 2), normal(6, seed=1)
    for method in ("shortcut", "refit"):
        before = leave_one_out(X, y, strength=0.2, method=method)
        moved = y.clone()
        moved[3] += 10
        after = leave_one_out(X, moved, strength=0.2, method=method)
        close(after[3], before[3] + 10)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_whole_tasks_are_left_out(strength):
    tasks = linear_regressions(6, 3, 4, 2, seed=0)
    Z, t = meta_regression(tasks, 0.4, 2)
    residuals = leave_one_out(Z, t, strength=strength)
    assert residuals.shape == t.shape
    close(residuals, leave_one_out(Z, t, strength=strength, method="refit"))
    others = list(tasks)[:2] + list(tasks)[3:]
    # Sums there, means here.
    theta = meta_ridge(others, 0.4, 2, strength=strength / (5 * 4))
    close(residuals[2], t[2] - Z[2] @ theta)


def test_leaving_out_tasks_estimates_the_risk_of_new_tasks():
    # The mean over draws, with n - 1 tasks in each fit: F* and the excess.
    sizes, model = (6, 3, 3, 2), {"lr": 0.4, "spread": 1.0, "noise": 0.5}
    estimates = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        Z, t = meta_regression(
            linear_regressions(
                *sizes, spread=1.0, noise=0.5,
                design="orthonormal", seed=generator,
            ), 0.4,
        )  # fmt: skip
        estimates.append(leave_one_out(Z, t).square().mean() / 2)
    best = (2 * (0.6**2 + 0.4**2 * 0.25 / 3) + 0.25) / 2
    expected = best + excess_risk(5, *sizes[1:], **model)
    assert confidence_interval(estimates, 0.999).covers(expected)


def test_the_identity_holds_on_symbols():
    x = sp.symbols("x:3")
    y = sp.Matrix(sp.symbols("y:3"))
    X, strength = sp.Matrix(x), sp.Symbol("lambda", positive=True)
    shortcut, refit = (
        leave_one_out(X, y, strength=strength, method=method)
        for method in ("shortcut", "refit")
    )
    assert (shortcut - refit).applyfunc(sp.simplify) == sp.zeros(3, 1)
    assert shortcut.shape == (3, 1) and shortcut != sp.zeros(3, 1)


def test_an_example_that_cannot_be_left_out_raises():
    X = torch.eye(3, dtype=f64)[[0, 0, 1, 1, 2]]
    for method in ("shortcut", "refit"):
        with pytest.raises(ValueError, match="not unique.*strength > 0"):
            leave_one_out(X, normal(5), method=method)
        left = leave_one_out(X, normal(5), strength=0.1, method=method)
        close(left[-1], normal(5)[-1])
    with pytest.raises(ValueError, match="method must be 'shortcut' or"):
        leave_one_out(X, normal(5), method="guess")


# Stability. -----------------------------------------------------------------

INNER = GradientDescent(0.4, steps=1)


def risk(theta, task):
    return meta_objective(linear_regression_loss, theta, [task], INNER)


def test_replacing_a_task_is_fitting_again():
    tasks, others = (linear_regressions(4, 3, 4, 2, seed=s) for s in (0, 1))

    def fit(tasks):
        return meta_ridge(tasks, 0.4)

    stability = replace_one(fit, risk, tasks, others)
    theta, rows = fit(tasks), []
    for i in range(4):
        replaced = list(tasks)
        replaced[i] = others[i]
        rows.append(fit(replaced))
        close(stability.moves[i], (rows[i] - theta).norm())
        close(
            stability.changes[i],
            risk(rows[i], tasks[i]) - risk(theta, tasks[i]),
        )
    largest = max(
        abs(risk(row, task) - risk(theta, task))
        for row, task in itertools.product(rows, [*tasks, *others])
    )
    close(stability.largest, largest)
    alone = replace_one(fit, risk, list(tasks), list(others))
    for one, other in zip(stability, alone):
        close(one, other)


def test_the_mean_change_estimates_the_gap_without_bias():
    sizes, model = (4, 3, 3, 2), {"spread": 1.0, "noise": 0.5}
    generator, means = torch.Generator().manual_seed(0), []

    def risk(theta, task):
        Z, t = meta_regression([task], 0.4)
        return (Z @ theta - t).square().mean() / 2

    for _ in range(150):
        drawn = linear_regressions(
            8, *sizes[1:], **model, design="orthonormal", seed=generator
        )
        stability = replace_one(
            lambda tasks: meta_ridge(tasks, 0.4), risk, drawn[:4], drawn[4:]
        )
        means.append(stability.changes.mean())
    gap = generalization_gap(*sizes, lr=0.4, **model)
    estimate = confidence_interval(means, 0.999)
    assert estimate.covers(gap) and not estimate.covers(0)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 8), st.floats(0.05, 3.0))
def test_regularised_fits_are_as_stable_as_the_theorem_says(seed, n, strength):
    # Quadratic risks ½(θ - c)², |c| ≤ 1: the fit is shrunk to [-1, 1], where
    # they are 2-Lipschitz.
    drawn = torch.rand(2 * n, generator=torch.Generator().manual_seed(seed))
    c = 2 * drawn.double() - 1
    tasks = TaskBatch(c[:n, None], c[:n, None])
    others = TaskBatch(c[n:, None], c[n:, None])

    stability = replace_one(
        lambda tasks: tasks.support.mean(0) / (1 + strength),
        lambda theta, task: (theta - task.query).square().sum() / 2,
        tasks,
        others,
    )
    bound = stability_bound(2.0, strength, n)
    assert 0 < stability.largest <= bound
    assert stability.moves.max() <= 2 * 2.0 / (strength * n)


def test_the_stability_bound_is_attained_by_linear_risks():
    # Risks ±Gθ: replacing +G by -G moves the minimiser by 2G/(λn).
    tasks, others = [Task(None, 1.0)] * 3, [Task(None, -1.0)] * 3

    def fit(tasks):
        return torch.tensor([-sum(t.query for t in tasks) * 2 / (3 * 0.5)])

    stability = replace_one(
        fit, lambda theta, task: 2 * theta[0] * task.query, tasks, others
    )
    bound = stability_bound(2.0, 0.5, 3)
    assert stability.largest == pytest.approx(bound)


def test_others_must_be_as_many_as_tasks():
    tasks = linear_regressions(4, 3, 4, 2, seed=0)
    with pytest.raises(ValueError, match="as many as tasks, 4, got 3"):
        replace_one(lambda t: meta_ridge(t, 0.4), risk, tasks, tasks[:3])


def test_the_stability_bound_takes_symbols_and_refuses_what_is_not_positive():
    G, strength, n = sp.symbols("G lambda n", positive=True)
    assert stability_bound(G, strength, n) == 2 * G**2 / (strength * n)
    a, b, c = sp.symbols("a b c")
    assert stability_bound(a, b, c) == 2 * a**2 / (b * c)
    for arguments, name in (
        ((-1.0, 1.0, 5), "lipschitz"),
        ((1.0, 0.0, 5), "strength"),
        ((1.0, 1.0, 0), "n_tasks"),
    ):
        with pytest.raises(ValueError, match=f"the bound needs {name}"):
            stability_bound(*arguments)


# Rademacher complexity. -----------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 8), st.integers(1, 3), st.floats(0.1, 3.0))
def test_the_enumeration_is_the_mean_of_suprema(seed, n, dim, radius):
    X = normal(n, dim, seed=seed)
    suprema = []
    for signs in itertools.product((-1.0, 1.0), repeat=n):
        correlated = torch.tensor(signs, dtype=f64) @ X / n
        # The supremum over the ball, at the ball's point in that direction.
        best = radius * correlated / correlated.norm()
        suprema.append(float(correlated @ best))
    exact = rademacher_complexity(X, radius)
    assert exact == pytest.approx(np.mean(suprema), rel=1e-12)
    lengths = X.norm() * radius / n
    assert float(lengths) / math.sqrt(2) <= exact * (1 + 1e-12)
    assert exact <= float(lengths) * (1 + 1e-12)
    assert lengths <= rademacher_bound(X, radius) * (1 + 1e-12)


def test_the_rademacher_bound_is_attained_by_orthogonal_points():
    X = 3 * torch.eye(9, dtype=f64)[:6]
    assert rademacher_complexity(X, 2.0) == pytest.approx(
        rademacher_bound(X, 2.0), rel=1e-14
    )
    # And missed by √2 by two points at one place.
    twice = torch.ones(2, 1, dtype=f64)
    assert rademacher_bound(twice) / rademacher_complexity(
        twice
    ) == pytest.approx(math.sqrt(2))


def test_too_many_points_are_refused_with_their_count():
    assert rademacher_complexity(normal(12, 2)) > 0
    with pytest.raises(ValueError, match=r"at most 20 points .* got 21.*2\^21"):
        rademacher_complexity(normal(21, 2))
    for f in (rademacher_complexity, rademacher_bound):
        with pytest.raises(ValueError, match=r"X must hold points.*\(0, 2\)"):
            f(normal(0, 2))
        with pytest.raises(ValueError, match="radius must be at least 0"):
            f(normal(3, 2), -1.0)


# Wasserstein. ---------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 20), st.integers(1, 20), st.floats(0.1, 5.0))
def test_a_lipschitz_function_changes_its_mean_by_no_more_than_w1(
    seed, n, m, lipschitz
):
    P, Q = normal(n, seed=seed), 2 * normal(m, seed=seed + 1) + 1

    def f(x):
        return lipschitz * torch.sin(x + seed)

    bound = wasserstein_bound(lipschitz, P, Q)
    assert abs(f(P).mean() - f(Q).mean()) <= bound * (1 + 1e-12)


def test_a_shift_attains_the_wasserstein_bound():
    P = normal(50)
    assert wasserstein_bound(3.0, P, P + 0.7) == pytest.approx(2.1)
    # Weights: half of the mass goes from 0 to 1.
    assert wasserstein_bound(
        1.0, [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]
    ) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="lipschitz must be at least 0"):
        wasserstein_bound(-1.0, P, P)
