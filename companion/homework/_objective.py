"""The exercises of the chapter "The objective"."""

from __future__ import annotations

import math

import sympy as sp
import torch

from companion.adaptation import GradientDescent, adapt
from companion.calculus import gradient
from companion.homework._exercise import Exercise, Mistake
from companion.objective import Task, meta_objective
from companion.tasks import linear_regression_loss, linear_regressions

__all__ = ["EXERCISES"]


# objective-1: the filter of two unequal steps. ------------------------------

_a, _alpha1, _alpha2 = sp.symbols("a alpha_1 alpha_2")
_theta, _c, _e = sp.symbols("theta c e")
_left_over = (1 - _alpha1 * _a) * (1 - _alpha2 * _a)
_DIRECTION = (
    "this is the direction w(a)(θ - c); the filter is the factor w(a) alone."
)

_FILTER = Exercise(
    id="objective-1",
    title="The filter of two unequal steps",
    chapter=2,
    read="the section “One quadratic task” and the proof of the filter "
    "theorem.",
    solution=_a * _left_over**2,
    mistakes=(
        Mistake(
            "first-order",
            "this is FOMAML's filter: what the steps leave over enters once, "
            "by the query gradient; its derivative brings it once more.",
            _a * _left_over,
        ),
        Mistake(
            "no-curvature",
            "the curvature of the query loss is missing: the gradient of "
            "½ a e² is a e.",
            _left_over**2,
        ),
        Mistake(
            "joint-training",
            "this is the filter of joint training: the query gradient is "
            "taken at θ, and nothing has adapted.",
            _a,
        ),
        Mistake(
            "one-step",
            "only one of the two steps is there.",
            _a * (1 - _alpha1 * _a) ** 2,
        ),
        Mistake(
            "one-step",
            "only one of the two steps is there.",
            _a * (1 - _alpha2 * _a) ** 2,
        ),
        Mistake(
            "rates-added",
            "two steps are not one step with the sum of the rates: the second "
            "starts from where the first ended, so the factors multiply.",
            _a * (1 - (_alpha1 + _alpha2) * _a) ** 2,
        ),
        Mistake(
            "ascent",
            "the steps go uphill: descent leaves over 1 - αa, not 1 + αa.",
            _a * ((1 + _alpha1 * _a) * (1 + _alpha2 * _a)) ** 2,
        ),
        Mistake(
            "no-rate",
            "the inner rates are missing from the factors 1 - αa.",
            _a * (1 - _a) ** 4,
        ),
        Mistake(
            "objective-not-filter",
            "this is half the filter, as it stands in the objective ½ w e²; "
            "the filter is w.",
            _a * _left_over**2 / 2,
        ),
        Mistake("direction", _DIRECTION, _a * _left_over**2 * (_theta - _c)),
        Mistake("direction", _DIRECTION, _a * _left_over**2 * _e),
        Mistake(
            "objective",
            "this is the objective ½ w(a)(θ - c)²; the filter is w(a) alone.",
            _a * _left_over**2 * (_theta - _c) ** 2 / 2,
        ),
        Mistake(
            "first-step-once",
            "the first step's factor must be squared too: it stands in the "
            "loss as well as in the derivative of the adapted parameters.",
            _a * (1 - _alpha1 * _a) * (1 - _alpha2 * _a) ** 2,
        ),
        Mistake(
            "first-step-once",
            "the second step's factor must be squared too: it stands in the "
            "loss as well as in the derivative of the adapted parameters.",
            _a * (1 - _alpha1 * _a) ** 2 * (1 - _alpha2 * _a),
        ),
    ),
)  # fmt: skip


# objective-2: the objective and its gradient, as a program. -----------------


def _curved_loss(theta, data):
    x, y = data
    return (torch.tanh(x @ theta) - y).square().mean()


def _curved_instances():
    generator = torch.Generator().manual_seed(20)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def task():
        return Task((normal(4, 3), normal(4)), (normal(6, 3), normal(6)))

    return [
        (_curved_loss, normal(3), [task() for _ in range(count)], lr)
        for count, lr in ((3, 0.3), (2, 0.7))
    ]


def with_errors(
    *,
    adapt_on="support",
    judge_on="query",
    sign=1,
    total=False,
    detached=False,
    steps=1,
    shared=False,
    reversed_pair=False,
):
    """The program of objective-2 with some errors in it."""

    def objective(loss, theta, tasks, lr):
        inner = GradientDescent(sign * lr, steps)
        swapped = [
            Task(getattr(task, adapt_on), getattr(task, judge_on))
            for task in tasks
        ]

        def F(theta):
            if shared:
                slopes = [gradient(loss)(theta, task.support) for task in tasks]
                adapted = theta - lr * sum(slopes) / len(tasks)
                return sum(loss(adapted, task.query) for task in tasks) / len(
                    tasks
                )
            if not detached:
                return meta_objective(loss, theta, swapped, inner)
            values = []
            for task in swapped:
                start = theta.detach()
                move = adapt(loss, start, task.support, inner) - start
                values.append(loss(theta + move, task.query))
            return sum(values) / len(values)

        scale = len(tasks) if total else 1
        pair = scale * F(theta), scale * gradient(F)(theta)
        return pair[::-1] if reversed_pair else pair

    return objective


_OBJECTIVE = Exercise(
    id="objective-2",
    title="The objective as a program",
    chapter=2,
    read="the section “Tasks and the objective”.",
    solution=with_errors(),
    instances=_curved_instances,
    mistakes=(
        Mistake(
            "sum-for-mean",
            "this is the sum over tasks; the objective is their mean, else "
            "the outer step grows with the number of tasks.",
            with_errors(total=True),
        ),
        Mistake(
            "first-order",
            "the value is right, but the gradient misses the factor I - αH: "
            "the inner gradient was taken as a constant (FOMAML). Let the "
            "gradient pass through the inner step.",
            with_errors(detached=True),
        ),
        Mistake(
            "support-as-query",
            "the adapted parameters are judged on the support data that they "
            "adapted on.",
            with_errors(judge_on="support"),
        ),
        Mistake(
            "query-as-support",
            "the task adapts on its query data, which it must not see before "
            "it is judged.",
            with_errors(adapt_on="query"),
        ),
        Mistake(
            "swapped",
            "support and query have changed places.",
            with_errors(adapt_on="query", judge_on="support"),
        ),
        Mistake(
            "joint-training",
            "this is joint training: the query loss is taken at θ, and no "
            "task has adapted.",
            with_errors(steps=0),
        ),
        Mistake(
            "ascent",
            "the inner step goes uphill: θ' = θ - α∇L, with a minus.",
            with_errors(sign=-1),
        ),
        Mistake(
            "two-steps",
            "each task takes two inner steps; one is asked for.",
            with_errors(steps=2),
        ),
        Mistake(
            "reversed-pair",
            "the gradient comes first and the value second; wanted is the "
            "pair (F(θ), ∇F(θ)), the value first.",
            with_errors(reversed_pair=True),
        ),
        Mistake(
            "one-step-for-all",
            "all tasks share one step, along the mean of their support "
            "gradients; each task must adapt by its own gradient alone.",
            with_errors(shared=True),
        ),
        Mistake(
            "sum-and-first-order",
            "two things: this sums over tasks where the mean is wanted, and "
            "its gradient takes the inner gradient for a constant (FOMAML).",
            with_errors(total=True, detached=True),
        ),
    ),
)


# objective-3: find the bug in a search for the best rate. -------------------


def best_rate_with(
    *, adapt_on="support", judge_on="query", leaks=False, returns="rate"
):
    """The search of objective-3, as it should be or with a bug."""

    def best_rate(loss, theta, tasks, rates):
        means = []
        for lr in rates:
            start, total = theta, 0
            for task in tasks:
                adapted = adapt(
                    loss, start, getattr(task, adapt_on), GradientDescent(lr, 1)
                )
                total = total + loss(adapted, getattr(task, judge_on))
                if leaks:
                    start = adapted
            means.append(float(total) / len(tasks))
        return {
            "rate": rates[means.index(min(means))],
            "largest": rates[means.index(max(means))],
            "index": means.index(min(means)),
            "loss": min(means),
            "losses": means,
        }[returns]

    return best_rate


def _first_rate(loss, theta, tasks, rates):
    return rates[0]


def _last_rate(loss, theta, tasks, rates):
    return rates[-1]


def _rate_instances():
    # In no order, with the best and the worst rate in the middle: an
    # answer that always returns the first or the last has another mistake.
    rates = [k / 8 for k in (8, 2, 9, 6, 12, 4, 1, 11, 7, 10, 3)]
    return [
        (
            linear_regression_loss,
            torch.zeros(2, dtype=torch.float64),
            list(
                linear_regressions(
                    4, shots, query_shots, 2, noise=noise, seed=seed
                )
            ),
            rates,
        )
        for shots, query_shots, noise, seed in (
            (5, 20, 1.5, 30), (4, 12, 0.5, 31), (10, 3, 1.0, 32),
        )
    ]  # fmt: skip


_RATE = Exercise(
    id="objective-3",
    title="A rate that flatters itself",
    chapter=2,
    read="the section “The best inner rate”.",
    solution=best_rate_with(),
    instances=_rate_instances,
    mistakes=(
        Mistake(
            "support-as-query",
            "the bug is still there: each rate is judged on the support data "
            "that the step has just fitted.",
            best_rate_with(judge_on="support"),
        ),
        Mistake(
            "query-as-support",
            "now the step adapts on the query data too: adapt on the support, "
            "judge on the query.",
            best_rate_with(adapt_on="query"),
        ),
        Mistake(
            "swapped",
            "support and query have changed places: adapt on the support, "
            "judge on the query.",
            best_rate_with(adapt_on="query", judge_on="support"),
        ),
        Mistake(
            "leak",
            "every task starts where the one before it ended, so tasks leak "
            "into each other; each must start from θ.",
            best_rate_with(leaks=True),
        ),
        Mistake(
            "largest",
            "this returns the rate with the largest loss.",
            best_rate_with(returns="largest"),
        ),
        Mistake(
            "first-rate",
            "this returns the first rate whatever the tasks. Does the step "
            "depend on the rate? If nothing adapts, all rates have the same "
            "loss, and the first one wins.",
            _first_rate,
        ),
        Mistake(
            "last-rate",
            "this returns the last rate whatever the tasks.",
            _last_rate,
        ),
        Mistake(
            "index",
            "this returns the index of the best rate; wanted is the rate.",
            best_rate_with(returns="index"),
        ),
        Mistake(
            "loss",
            "this returns the smallest mean loss; wanted is the rate that "
            "has it.",
            best_rate_with(returns="loss"),
        ),
        Mistake(
            "losses",
            "this returns the mean loss of every rate; wanted is the one rate "
            "with the smallest.",
            best_rate_with(returns="losses"),
        ),
    ),
    rtol=1e-6,
)


# objective-4: two tasks on which MAML and FOMAML disagree. ------------------


def _disagreement(answer):
    try:
        if isinstance(answer, (str, dict, set)):
            return _not_four
        sharp, flat, lr, steps = (float(x) for x in answer)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return _not_four
    if not all(math.isfinite(x) for x in (sharp, flat, lr, steps)):
        return _not_four
    if not steps.is_integer() or steps < 0:
        return _not_an_integer
    if min(sharp, flat, lr) <= 0:
        return _not_positive
    if sharp <= flat:
        return _order
    if lr * sharp >= 1:
        return _overshoot
    if steps == 0:
        return _no_steps

    def weight(a, power):
        return a * (1 - lr * a) ** power

    maml = weight(sharp, 2 * steps) < weight(flat, 2 * steps)
    fomaml = weight(sharp, steps) > weight(flat, steps)
    if maml and fomaml:
        return None
    return _both_flat if maml else _both_sharp


_not_four = Mistake(
    "not-four-numbers",
    "wanted is a tuple of four finite real numbers, (a_sharp, a_flat, alpha, "
    "K): two curvatures, the inner rate and the number of steps.",
    (0.55, 0.2, 1.0, 1, 1),
)
_not_positive = Mistake(
    "not-positive",
    "both curvatures and the rate must be positive.",
    (-0.2, -0.55, -1.0, 1),
)
_order = Mistake(
    "order",
    "the first curvature must be the larger one.",
    (0.2, 0.6, 1.0, 1),
)
_overshoot = Mistake(
    "overshoot",
    "both αa must lie strictly between 0 and 1; beyond 1 the inner step "
    "overshoots, and that is another effect.",
    (1.5, 0.2, 1.0, 1),
)
_no_steps = Mistake(
    "joint-training",
    "with no inner step every method is joint training, whose weight is the "
    "curvature.",
    (0.6, 0.2, 1.0, 0),
)
_not_an_integer = Mistake(
    "steps",
    "the number of steps must be a non-negative integer.",
    (0.6, 0.2, 1.0, 1.5),
)
_both_flat = Mistake(
    "both-prefer-flat",
    "MAML prefers the flat task, but so does FOMAML: the sharp curvature lies "
    "too far beyond both peaks.",
    (0.9, 0.3, 1.0, 1),
)
_both_sharp = Mistake(
    "both-prefer-sharp",
    "MAML still prefers the sharp task, and so does FOMAML: compare the "
    "curvatures with MAML's peak at 1/((2K+1)α).",
    (0.3, 0.1, 1.0, 1),
)

_DISAGREEMENT = Exercise(
    id="objective-4",
    title="Where MAML and FOMAML disagree",
    chapter=2,
    read="the section “Eight filters in one picture”.",
    solution=(0.55, 0.2, 1.0, 1),
    mistakes=(
        _not_four, _not_positive, _order, _overshoot, _no_steps, _not_an_integer, _both_flat,
        _both_sharp,
    ),
    accept=_disagreement,
)  # fmt: skip


# objective-5: the best rate for K steps. ------------------------------------

_K, _m, _spread, _noise = sp.symbols("K m sigma_w sigma", positive=True)
_prior_share = _noise**2 / (_m * _spread**2 + _noise**2)

_BAYES = Exercise(
    id="objective-5",
    title="Bayes in K steps",
    chapter=2,
    read="the section “When one step is the best there is”.",
    solution=1 - _prior_share ** (1 / _K),
    mistakes=(
        Mistake(
            "one-step-rate",
            "this is the rate for one step; K such steps trust the data too "
            "much.",
            1 - _prior_share,
        ),
        Mistake(
            "divided-by-steps",
            "K steps of α/K are not one step of α: each step starts from where "
            "the last one ended, so what is left over multiplies.",
            (1 - _prior_share) / _K,
        ),
        Mistake(
            "root-of-the-rate",
            "the K-th root belongs to what one step leaves over, 1 - α, not "
            "to α itself.",
            (1 - _prior_share) ** (1 / _K),
        ),
        Mistake(
            "power-for-root",
            "this is how much K steps of the one-step rate cover; you need "
            "the rate whose K steps cover what that one step does.",
            1 - _prior_share**_K,
        ),
        Mistake(
            "left-over",
            "this is 1 - α, what a step leaves over, in the place of α.",
            _prior_share ** (1 / _K),
        ),
        Mistake(
            "reused-support",
            "a rate of 1 fits the support data in one step: that is the best "
            "rate when the support is the query, and it forgets the prior.",
            sp.Integer(1),
        ),
        Mistake(
            "no-shots",
            "the number of shots is missing: the noise of a mean of m "
            "examples has the variance σ²/m.",
            1 - (_noise**2 / (_spread**2 + _noise**2)) ** (1 / _K),
        ),
        Mistake(
            "swapped-variances",
            "σ and σ_w have changed places: the more noise, the smaller the "
            "rate must be.",
            1 - (_m * _spread**2 / (_m * _spread**2 + _noise**2)) ** (1 / _K),
        ),
    ),
)

EXERCISES = (_FILTER, _OBJECTIVE, _RATE, _DISAGREEMENT, _BAYES)
