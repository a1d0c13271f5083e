"""The exercises of chapter 1, "An article, its two programs, ..."."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import sympy as sp
import torch

from companion.adaptation import GradientDescent, adapt, adaptation_path
from companion.calculus import gradient, hessian
from companion.homework._exercise import Exercise, Mistake, judge
from companion.metagradient import meta_gradient
from companion.objective import Task

__all__ = ["EXERCISES"]


# article-1: what the listing computes on a quadratic. -----------------------

_a, _c, _alpha, _K, _theta = sp.symbols("a c alpha K theta")
_slope = _a * (_theta - _c)

# Of answers without K, which may have lost it to a number of that name.
_NO_K = (
    "the answer has no K. If you wrote one, K was a number, left over from an "
    "earlier cell: define the symbols first."
)

_quadratic = Exercise(
    id="article-1",
    title="The listing on a quadratic",
    chapter=1,
    read="Chapter 1, the theorem on what the listing computes.",
    solution=_slope * (1 - _alpha * _a) ** _K,
    mistakes=(
        Mistake(
            "exact-for-first-order",
            "this is the exact meta-gradient: its second factor (1 - αa)^K is "
            "the derivative of the adapted parameters, which the listing's "
            "graph does not hold.",
            _slope * (1 - _alpha * _a) ** (2 * _K),
        ),
        Mistake(
            "gradient-at-theta",
            "this is the gradient at θ, before adapting: joint training. The "
            "listing takes it at the adapted parameters. And " + _NO_K,
            _slope,
        ),
        Mistake(
            "one-step",
            "this is right for one step only; the listing takes K. And "
            + _NO_K,
            _slope * (1 - _alpha * _a),
        ),
        Mistake(
            "one-step-objective",
            "this differentiates the article's formula, which has one step, "
            "and it differentiates it exactly; the program does neither. And "
            + _NO_K,
            _slope * (1 - _alpha * _a) ** 2,
        ),
        Mistake(
            "steps-as-one-long-step",
            "K steps of rate α are not one step of rate Kα: every step starts "
            "where the last one ended.",
            _slope * (1 - _K * _alpha * _a),
        ),
        Mistake(
            "missing-alpha",
            "the rate α is missing from the factor of each step.",
            _slope * (1 - _a) ** _K,
        ),
        Mistake(
            "reptile",
            "this is Reptile's direction (θ - θ_K)/α, the sum of the inner "
            "gradients; the listing returns the last gradient alone.",
            (_theta - _c) * (1 - (1 - _alpha * _a) ** _K) / _alpha,
        ),
        Mistake(
            "adapted-parameters",
            "this is θ_K - c, the distance still to go; the gradient of the "
            "loss there has the curvature a as a factor.",
            (_theta - _c) * (1 - _alpha * _a) ** _K,
        ),
        Mistake(
            "adapted-parameters",
            "this is θ_K, where the inner loop arrives; asked is the gradient "
            "of the loss there.",
            _c + (_theta - _c) * (1 - _alpha * _a) ** _K,
        ),
        Mistake(
            "loss",
            "this is the loss at θ_K, the value of the meta-objective; asked "
            "is the gradient that the listing computes.",
            _a * (_theta - _c) ** 2 * (1 - _alpha * _a) ** (2 * _K) / 2,
        ),
        Mistake(
            "sign",
            "this is the step downhill; asked is the gradient.",
            -_slope * (1 - _alpha * _a) ** _K,
        ),
    ),
)


def _in_K(answer):
    """None when right; an answer without K is told so, whatever else it is."""
    verdict = judge(_quadratic, answer)
    if verdict:
        return None
    name, message = verdict.mistake, verdict.message
    without_K = isinstance(answer, sp.Expr) and "K" not in {
        symbol.name for symbol in answer.free_symbols
    }
    if without_K and name in (None, "sign"):
        name, message = "no-K", _NO_K
    return Mistake(name, message, None)


article_1 = replace(_quadratic, accept=_in_K)


# article-2: mend the inner loop. --------------------------------------------


def _wave(theta, data):
    x, y = data
    return ((theta[0] * torch.tanh(theta[1] * x + theta[2]) - y) ** 2).mean()


def _mending():
    def data(seed, size):
        source = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(size, generator=source, dtype=torch.float64)
            for _ in range(2)
        )

    theta = torch.tensor([0.8, -0.6, 0.3], dtype=torch.float64)
    return [
        (_wave, theta.clone(), data(1, 5), data(2, 7), 0.4, 3),
        (_wave, theta.flip(0), data(3, 6), data(4, 4), 0.3, 2),
        (_wave, theta.clone(), data(5, 5), data(6, 5), 0.5, 1),
    ]


def _exact(loss, theta, support, query, lr, steps, method="reverse"):
    return meta_gradient(
        loss, theta, [Task(support, query)], GradientDescent(lr, steps), method
    )


def _factors(loss, theta, support, query, lr, steps):
    """The query gradient at θ_K and the K matrices I - αH_k."""
    path = adaptation_path(
        loss, theta, support, GradientDescent(float(lr), steps)
    )
    identity = torch.eye(len(theta), dtype=theta.dtype)
    factors = [
        identity - lr * hessian(loss)(point, support) for point in path[:-1]
    ]
    return gradient(loss)(path[-1], query), factors


def _last_step_only(*problem):
    slope, factors = _factors(*problem)
    return factors[-1] @ slope


def _reversed_factors(*problem):
    slope, factors = _factors(*problem)
    for factor in factors:
        slope = factor @ slope
    return slope


def _hessian_at_start(*problem):
    slope, factors = _factors(*problem)
    for _ in factors:
        slope = factors[0] @ slope
    return slope


def _hessian_at_end(loss, theta, support, query, lr, steps):
    inner = GradientDescent(lr, steps)
    adapted = adapt(loss, theta, support, inner)
    slope = gradient(loss)(adapted, query)
    for _ in range(steps):
        slope = slope - lr * hessian(loss)(adapted, support) @ slope
    return slope


def _without_alpha(loss, theta, support, query, lr, steps):
    slope, factors = _factors(loss, theta, support, query, lr, steps)
    identity = torch.eye(len(theta), dtype=theta.dtype)
    for factor in reversed(factors):
        slope = (identity - (identity - factor) / lr) @ slope
    return slope


_loop = Exercise(
    id="article-2",
    title="Mend the inner loop",
    chapter=1,
    read="Chapter 1, the section on four ways to write one update.",
    solution=_exact,
    instances=_mending,
    mistakes=(
        Mistake(
            "first-order",
            "this is the first-order gradient ∇L^q(θ_K). The graph from θ to "
            "θ_K is cut: by .data, .detach() or no_grad in the update, by an "
            "inner gradient without create_graph=True, or because you "
            "differentiate with respect to θ_K.",
            lambda *p: _exact(*p, method="first_order"),
        ),
        Mistake(
            "adapts-nothing",
            "this is the query gradient at θ itself: the inner loop changes "
            "nothing. A name rebound inside a for loop leaves the list as it "
            "was.",
            lambda loss, theta, support, query, lr, steps: gradient(loss)(
                theta, query
            ),
        ),
        Mistake(
            "support-for-query",
            "the adapted parameters are judged on the support data; judge "
            "them on the query data.",
            lambda loss, theta, support, query, lr, steps: _exact(
                loss, theta, support, support, lr, steps
            ),
        ),
        Mistake(
            "query-for-support",
            "you adapt on the query data; adapt on the support data.",
            lambda loss, theta, support, query, lr, steps: _exact(
                loss, theta, query, query, lr, steps
            ),
        ),
        Mistake(
            "support-and-query-swapped",
            "support and query have changed places.",
            lambda loss, theta, support, query, lr, steps: _exact(
                loss, theta, query, support, lr, steps
            ),
        ),
        Mistake(
            "one-step",
            "only one inner step is taken, or only the first one counts.",
            lambda loss, theta, support, query, lr, steps: _exact(
                loss, theta, support, query, lr, 1
            ),
        ),
        Mistake(
            "last-step-only",
            "only the last inner step is differentiated: something detaches "
            "the parameters between the steps.",
            _last_step_only,
        ),
        Mistake(
            "factors-in-the-wrong-order",
            "the factors I - αH_k stand in the wrong order: the last step's "
            "acts on the query gradient first.",
            _reversed_factors,
        ),
        Mistake(
            "hessian-at-theta",
            "the Hessian is taken at θ for every step; step k has its own, "
            "at θ_k.",
            _hessian_at_start,
        ),
        Mistake(
            "hessian-at-adapted",
            "the Hessian is taken at θ_K for every step; step k has its own, "
            "at θ_k.",
            _hessian_at_end,
        ),
        Mistake(
            "missing-alpha",
            "the rate α is missing from the factors I - αH_k.",
            _without_alpha,
        ),
        Mistake(
            "reptile",
            "this is Reptile's direction (θ - θ_K)/α.",
            lambda loss, theta, support, query, lr, steps: _exact(
                loss, theta, support, query, lr, steps, "reptile"
            ),
        ),
        Mistake(
            "displacement",
            "this is θ - θ_K, how far the inner loop went; asked is the "
            "gradient of the query loss.",
            lambda loss, theta, support, query, lr, steps: (
                theta - adapt(loss, theta, support, GradientDescent(lr, steps))
            ),
        ),
        Mistake(
            "adapted-parameters",
            "these are the adapted parameters θ_K; asked is the gradient of "
            "the query loss there, with respect to θ.",
            lambda loss, theta, support, query, lr, steps: adapt(
                loss, theta, support, GradientDescent(lr, steps)
            ),
        ),
        Mistake(
            "uphill",
            "the inner loop climbs: the sign of its step is wrong.",
            lambda loss, theta, support, query, lr, steps: _exact(
                loss, theta, support, query, -lr, steps
            ),
        ),
    ),
)


def _mends(answer):
    """None when a loop is right and the caller's theta is as it was."""
    verdict = judge(_loop, answer)
    if not verdict:
        return Mistake(verdict.mistake, verdict.message, None)
    problem = _mending()[0]
    answer(*problem)
    if problem[1].requires_grad:
        return Mistake(
            "requires-grad-on-argument",
            "the gradient is right, but the caller's theta requires gradients "
            "afterwards: call requires_grad_() on a clone.",
            None,
        )
    return None


article_2 = replace(_loop, accept=_mends)


# article-3: find the bugs in the ODE listing. -------------------------------


def _solver(field, theta0, T, dt):
    theta = np.array(theta0, dtype=float)
    states, steps = [theta], math.ceil(T / dt - 1e-9)
    for _ in range(steps):
        theta = theta + T / steps * field(theta)
        states.append(theta)
    return np.array(states)


def _wrong_solver(*, start, in_place, times, keep=lambda theta: theta):
    """The listing with some of its bugs left in."""

    def solve(field, theta0, T, dt):
        theta = start(theta0)
        states = [keep(theta)]
        for h in times(T, dt):
            if in_place:
                theta += h * field(theta)
            else:
                theta = theta + h * field(theta)
            states.append(keep(theta))
        return np.array(states)

    return solve


def _as_given(theta0):
    return theta0


def _as_float(theta0):
    return np.array(theta0, dtype=float)


def _equal_steps(T, dt):
    steps = math.ceil(T / dt - 1e-9)
    return [T / steps] * steps


def _whole_steps_past(T, dt):
    return [dt for _ in np.arange(0, T, dt)]


def _whole_steps_short(T, dt):
    return [dt] * int(T / dt + 1e-9)


def _last_shorter(T, dt):
    return [min(dt, T - t) for t in np.arange(0, T, dt)]


def _while_shorter(T, dt):
    t = 0.0
    while t < T:
        yield min(dt, T - t)
        t += dt


def _equal_by(count):
    return lambda T, dt: [T / count(T, dt)] * count(T, dt)


def _whole_ends(T, dt):
    t = 0.0
    steps = math.ceil(T / dt - 1e-9)
    while t < T:
        yield T / steps
        t += T / steps


_ALIASING = (
    "every row is the same state: theta += ... changes the one array that all "
    "rows refer to. Make a new array in every step."
)
_LONG = (
    "you take fewer steps than T/dt, so each is longer than dt: round T/dt up."
)
_ROUNDING = (
    "right where T/dt comes out exactly, wrong by a step where it does not: "
    "2.1/0.3 is a little more than 7 in floating point, and ten times 0.1, "
    "added up, a little less than 1. Count the steps first, with some room "
    "for rounding, and loop over the count."
)
_ANY_TIMES = (
    _equal_steps, _whole_steps_past, _last_shorter, _whole_steps_short,
)  # fmt: skip


def _solver_mistakes():
    for times in _ANY_TIMES:
        yield Mistake(
            "in-place-aliasing",
            _ALIASING + " It overwrites the caller's theta0, too.",
            _wrong_solver(start=_as_given, in_place=True, times=times),
        )
        yield Mistake(
            "in-place-aliasing",
            _ALIASING,
            _wrong_solver(start=_as_float, in_place=True, times=times),
        )
        yield Mistake(
            "overwrites-start",
            "theta += ... overwrites the caller's theta0. Start from a copy, "
            "in floating point.",
            _wrong_solver(
                start=_as_given, in_place=True, times=times, keep=np.copy
            ),
        )
    for name, message, times in (
        (
            "overshoot",
            (
                "the last step goes past T: arange(0, T, dt) counts whole steps. "
                "Take as many, all of them T divided by their number."
            ),
            _whole_steps_past,
        ),
        (
            "stops-short",
            "the solution ends before T: round T/dt up, and divide T by that.",
            _whole_steps_short,
        ),
        (
            "last-step-shortened",
            (
                "you shorten the last step only; asked are equal steps, T divided "
                "by their number."
            ),
            _last_shorter,
        ),
        (
            "steps-too-long",
            _LONG,
            _equal_by(lambda T, dt: int(T / dt + 1e-9)),
        ),
        ("steps-too-long", _LONG, _equal_by(lambda T, dt: round(T / dt))),
        (
            "step-too-many",
            (
                "you take a step more than needed: where dt divides T, T/dt is "
                "the number of steps."
            ),
            _equal_by(lambda T, dt: int(T / dt + 1e-9) + 1),
        ),
    ):
        yield Mistake(
            name,
            message,
            _wrong_solver(start=_as_float, in_place=False, times=times),
        )
    yield Mistake(
        "start-left-out",
        "the first row should be the start.",
        lambda *problem: _solver(*problem)[1:],
    )
    yield Mistake(
        "last-state-only",
        "this is the last state; asked are all of them, a row each.",
        lambda *problem: _solver(*problem)[-1],
    )
    yield Mistake(
        "sign",
        "you step against the field; the field has its minus sign already.",
        lambda field, theta0, T, dt: _solver(
            lambda theta: -field(theta), theta0, T, dt
        ),
    )


def _rounding_mistakes():
    for times in (
        _equal_by(lambda T, dt: math.ceil(T / dt)),
        _equal_by(lambda T, dt: len(np.arange(0, T, dt))),
        _whole_ends,
    ):
        yield Mistake(
            "rounding",
            _ROUNDING,
            _wrong_solver(start=_as_float, in_place=False, times=times),
        )


def _field(theta):
    return np.array([1.0, -2.0]) - np.array([[1.0, 2.0], [-1.0, 0.5]]) @ theta


def _solving():
    return [
        (_field, np.array([0.5, -1.0]), 1.0, 0.375),
        (_field, np.array([2.0, 1.0]), 1.0, 0.25),
        (_field, np.array([1.0, 0.5]), 1.125, 0.5),
    ]


_floats = Exercise(
    id="article-3",
    title="Find the bugs in the solver",
    chapter=1,
    read="Chapter 1, the section on the second program.",
    solution=_solver,
    instances=_solving,
    mistakes=tuple(_solver_mistakes()),
)
_rounded = replace(
    _floats,
    instances=lambda: [
        (_field, np.array([2.0, 1.0]), 2.1, 0.3),
        (_field, np.array([2.0, 1.0]), 1.0, 0.1),
    ],
    mistakes=(),
)
_integers = replace(
    _floats,
    instances=lambda: [(_field, np.array([3, -1]), 0.5, 0.375)],
    mistakes=(),
)


def _solves(answer):
    """None when a solver is mended, else the first mistake found.

    The plain cases come first: a program that stops at integers or takes a
    step too many by rounding could show nothing else.
    """
    verdict = judge(_floats, answer)
    if not verdict:
        return Mistake(verdict.mistake, verdict.message, None)
    if not judge(_integers, answer):
        return Mistake(
            "integer-start",
            "right for a start in floating point, wrong for one of integers: "
            "convert theta0 to floating point first.",
            None,
        )
    if not judge(_rounded, answer):
        return Mistake("rounding", _ROUNDING, None)
    return None


article_3 = replace(
    _floats,
    instances=None,
    mistakes=_floats.mistakes + tuple(_rounding_mistakes()),
    accept=_solves,
)


# article-4: the best rate when some of the query is support. -----------------

_m, _sigma, _sigma_w = sp.symbols("m sigma sigma_w")
_share = sp.symbols("share")
_signal, _noise = _sigma_w**2, _sigma**2 / _m


def _leaky(signal=_signal, noise=_noise, share=_share):
    return (signal + share * noise) / (signal + noise)


article_4 = Exercise(
    id="article-4",
    title="A leaky split",
    chapter=1,
    read="Chapter 1, the section on judging a task by the data it learned.",
    solution=_leaky(),
    mistakes=(
        Mistake(
            "support-for-query",
            "α = 1 is best where the support data alone judge, that is "
            "memorisation; here they are a share of the query.",
            sp.Integer(1),
        ),
        Mistake(
            "leak-ignored",
            "this is the best rate on fresh data; the share of the query "
            "that is support pulls it towards 1.",
            _leaky(share=0),
        ),
        Mistake(
            "shares-swapped",
            "the share is that of the support's own data; you gave it to the "
            "fresh data.",
            _leaky(share=1 - _share),
        ),
        Mistake(
            "noise-left-out",
            "on the support's own data the distance to go has noise in it, "
            "too: its mean square is σ_w² + σ²/m.",
            _signal / (_signal + (1 - _share) * _noise),
        ),
        Mistake(
            "leak-added",
            "you add the leaked part to all of the fresh one; the weights are "
            "share and 1 - share.",
            (_signal + _share * (_signal + _noise))
            / ((1 + _share) * (_signal + _noise)),
        ),
        Mistake(
            "forgot-the-shots",
            "the noise of m examples averages out: its variance is σ²/m, "
            "not σ².",
            _leaky(noise=_sigma**2),
        ),
        Mistake(
            "shots-upside-down",
            "more examples mean less noise: σ²/m, not mσ².",
            _leaky(noise=_m * _sigma**2),
        ),
        Mistake(
            "deviation-for-variance",
            "σ and σ_w are standard deviations; variances are what adds.",
            _leaky(_sigma_w, _sigma / sp.sqrt(_m)),
        ),
        Mistake(
            "complement",
            "this is 1 - α, the part of the way that the step leaves.",
            1 - _leaky(),
        ),
        Mistake(
            "noise-for-signal",
            "signal and noise have changed places: with more noise one should "
            "go less far.",
            _leaky(_noise, _signal),
        ),
    ),
)


# article-5: make F rise. ----------------------------------------------------


def _rises(answer):
    """None when F increases along the joint flow, else the mistake."""

    def mistake(name, message):
        return Mistake(name, message, None)

    wanted = "six numbers are wanted: a_1, c_1, a_2, c_2, alpha, theta"
    try:
        if isinstance(answer, (dict, set, str)):
            raise TypeError
        values = [float(x) for x in answer]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return mistake(
            "structure", f"{wanted}, in this order and in one flat tuple."
        )
    if len(values) != 6:
        return mistake("structure", f"{wanted}; these are {len(values)}.")
    if not all(math.isfinite(x) for x in values):
        return mistake("not-finite", "the numbers must be finite.")
    a_1, c_1, a_2, c_2, alpha, theta = values
    if min(a_1, a_2) <= 0:
        return mistake(
            "no-minimum", "both curvatures must be positive; one is not."
        )
    if alpha <= 0:
        return mistake(
            "no-adaptation",
            "α must be positive: with α = 0 F is the mean loss itself, and "
            "the flow decreases that.",
        )
    if c_1 == c_2:
        return mistake(
            "one-centre",
            "both tasks have the same minimiser, which is best for either "
            "objective; let the tasks disagree.",
        )
    if a_1 == a_2:
        return mistake(
            "equal-curvatures",
            "with equal curvatures ∇F is a multiple of the mean gradient, so "
            "the flow decreases F too; let the curvatures differ.",
        )
    tasks = [Task((a, c), (a, c)) for a, c in ((a_1, c_1), (a_2, c_2))]
    point = torch.tensor(theta, dtype=torch.float64)

    def loss(theta, data):
        a, c = data
        return a * (theta - c) ** 2 / 2

    joint, meta = (
        float(meta_gradient(loss, point, tasks, GradientDescent(alpha, steps)))
        for steps in (0, 1)
    )
    velocity = -2 * joint
    change = velocity * meta
    if abs(velocity) < 1e-12:
        return mistake(
            "at-rest",
            "θ is the equilibrium of the flow, so nothing moves; start "
            "somewhere else.",
        )
    if abs(change) < 1e-12:
        return mistake(
            "at-minimum",
            "θ is the minimiser of F, where F has no slope yet: it will rise, "
            "but its derivative at the start is zero. Move towards the "
            "joint optimum.",
        )
    if change < 0:
        return mistake(
            "outside",
            "F decreases here: both objectives pull θ the same way. They "
            "disagree only between the joint optimum and the minimiser of F.",
        )
    if {(a_1, c_1), (a_2, c_2)} == {(1, 0), (3, 1)}:
        return mistake(
            "the-books",
            "F increases there, but the two tasks are the book's; choose "
            "others.",
        )
    return None


article_5 = Exercise(
    id="article-5",
    title="A flow that forgets how to learn",
    chapter=1,
    read="Chapter 1, the section on the flow that is joint training.",
    solution=(0.1, 0.0, 1.0, 1.0, 0.5, 0.8),
    accept=_rises,
)


# article-6: a client's example, from its update. ----------------------------


def _client(loss, x, y, lr, steps, seed):
    source = torch.Generator().manual_seed(seed)
    before = tuple(
        torch.randn(*shape, generator=source, dtype=torch.float64)
        for shape in ((3, 4), (3,))
    )
    x = torch.tensor(x, dtype=torch.float64)

    def example(theta, data):
        W, b = theta
        return loss(W @ x + b, y)

    return before, adapt(example, before, None, GradientDescent(lr, steps))


def _updates():
    def squares(output, y):
        return ((output - torch.tensor(y, dtype=output.dtype)) ** 2).sum() / 2

    def cross_entropy(output, y):
        return torch.nn.functional.cross_entropy(output, torch.tensor(y))

    x, z = [1.5, -0.5, 2.0, 0.25], [-1.0, 0.75, 0.5, 3.0]
    return [
        _client(squares, x, [0.5, 1.0, -2.0], 0.1, 1, 1),
        _client(squares, z, [1.0, 0.0, 0.5], 0.02, 5, 2),
        _client(cross_entropy, x, 2, 0.5, 3, 3),
    ]


def _unmoved():
    """By name, updates in which some rows of W and b stay as they were."""
    softplus = torch.nn.functional.softplus
    z = [-1.0, 0.75, 0.5, 3.0]

    def client(rows, sign, seed):
        def loss(output, y):
            return softplus(-sign * output[rows]).sum()

        return _client(loss, z, None, 0.5, 2, seed)

    return {
        "first": client([1, 2], -1, 4),
        "last": client([0, 1], 1, 5),
        "middle, the others fall": client([0, 2], -1, 6),
        "middle, the others rise": client([0, 2], 1, 7),
        "first and last": client([1], -1, 8),
    }


def _moved(before, after):
    (W, b), (V, a) = before, after
    return V - W, a - b


def _reveal(before, after):
    dW, db = _moved(before, after)
    row = db.abs().argmax()
    return dW[row] / db[row]


def _row(before, after):
    return _moved(before, after)[0][_moved(before, after)[1].abs().argmax()]


def _upside_down(before, after):
    return 1 / _reveal(before, after)


def _of_final(before, after):
    row = _moved(before, after)[1].abs().argmax()
    return after[0][row] / after[1][row]


_moving = Exercise(
    id="article-6",
    title="What an update gives away",
    chapter=1,
    read="Chapter 1, the section on sharing weights.",
    solution=_reveal,
    instances=_updates,
    mistakes=(
        Mistake(
            "not-scaled",
            "this is x times an unknown factor: a row of the change of W. The "
            "change of b is that very factor.",
            _row,
        ),
        Mistake(
            "not-scaled",
            "this is x times an unknown factor: a row of the change of W. The "
            "change of b is that very factor.",
            lambda before, after: -_row(before, after),
        ),
        Mistake(
            "not-scaled",
            "this is x times an unknown factor: a row of the change of W. The "
            "change of b is that very factor.",
            lambda before, after: _moved(before, after)[0][0],
        ),
        Mistake(
            "upside-down",
            "this is 1/x, entry by entry: divide the change of W by the "
            "change of b.",
            _upside_down,
        ),
        Mistake(
            "weights-for-update",
            "this divides the new weights themselves; what gives x away is "
            "their change.",
            _of_final,
        ),
        Mistake(
            "every-row",
            "every row gives x; return one of them.",
            lambda before, after: (
                _moved(before, after)[0] / _moved(before, after)[1][:, None]
            ),
        ),
    ),
)


def _row_of(choose):
    def answer(before, after):
        dW, db = _moved(before, after)
        row = choose(db)
        return dW[row] / db[row]

    return answer


def _mean_of_ratios(before, after):
    dW, db = _moved(before, after)
    return (dW / db[:, None]).mean(dim=0)


_MOVED = " An entry of b that has not moved gives 0/0."
_CHOICES = (
    Mistake(
        "first-row",
        "right where the first entry of b has moved, which it need not."
        + _MOVED,
        _row_of(lambda db: 0),
    ),
    Mistake(
        "last-row",
        "right where the last entry of b has moved, which it need not."
        + _MOVED,
        _row_of(lambda db: -1),
    ),
    Mistake(
        "mean-of-ratios",
        "every entry of b must have moved for a mean of the ratios, and not "
        "every one need have." + _MOVED,
        _mean_of_ratios,
    ),
    Mistake(
        "largest-without-abs",
        "where all the changes of b are negative or zero, the largest one is "
        "zero; you want the largest in absolute value." + _MOVED,
        _row_of(torch.argmax),
    ),
    Mistake(
        "smallest-without-abs",
        "where all the changes of b are positive or zero, the smallest one is "
        "zero; you want the largest in absolute value." + _MOVED,
        _row_of(torch.argmin),
    ),
)


def _reveals(answer):
    """None when x is found from any row that moved, else the mistake.

    A row that has not moved gives nan, which is like no other nan; so a
    choice of rows is known by the updates on which it fails.
    """
    verdict = judge(_moving, answer)
    if not verdict:
        return Mistake(verdict.mistake, verdict.message, None)
    failed = _fails(answer)
    if not failed:
        return None
    for mistake in _CHOICES:
        if _fails(mistake.answer) == failed:
            return mistake
    return Mistake(
        "row-at-rest",
        "right where all of b has moved, wrong where some of it has not."
        + _MOVED,
        None,
    )


def _fails(answer):
    """The names of the updates from which an answer does not find x."""
    return {
        name
        for name in _unmoved()
        if not judge(
            replace(
                _moving,
                instances=lambda name=name: [_unmoved()[name]],
                mistakes=(),
            ),
            answer,
        )
    }


article_6 = replace(
    _moving,
    instances=None,
    mistakes=_moving.mistakes + _CHOICES,
    accept=_reveals,
)

EXERCISES = (
    article_1, article_2, article_3, article_4, article_5, article_6,
)  # fmt: skip
