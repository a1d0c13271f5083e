"""The exercises of the chapter "The chain rule"."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import sympy as sp
import torch

from companion.adaptation import GradientDescent, adaptation_path
from companion.calculus import (
    dot,
    gradient,
    hessian,
    hessian_vector_product,
    tree_map,
)
from companion.homework._exercise import Exercise, Mistake
from companion.metagradient import meta_gradient
from companion.objective import Task

__all__ = ["EXERCISES"]


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# chain-rule-1: two minibatches, by hand. ------------------------------------

_theta = sp.Matrix(sp.symbols("theta_1 theta_2"))
_c = sp.Matrix(sp.symbols("c_1 c_2"))
_alpha = sp.Symbol("alpha")
_A = sp.Matrix([[2, 1], [1, 1]])
_B = sp.Matrix([[1, 0], [0, 3]])


def _factor(matrix, rate=_alpha):
    return sp.eye(2) - rate * matrix


_adapted = _factor(_B) * _factor(_A) * _theta
_slope = _adapted - _c


def _by_hand(name, message, answer):
    return Mistake(name, message, sp.Matrix(answer))


_TWO_MINIBATCHES = (
    _by_hand(
        "order",
        "the factors stand in the wrong order: the last inner step is the "
        "first to meet the query gradient, so its factor stands next to it.",
        _factor(_B) * _factor(_A) * _slope,
    ),
    _by_hand(
        "path-order",
        "the two outer factors are in order, but θ_2 is not: the step on A "
        "is taken first, so its factor stands next to θ.",
        _factor(_A) * _factor(_B) * (_factor(_A) * _factor(_B) * _theta - _c),
    ),
    _by_hand(
        "first-order",
        "this is the query gradient at θ_2 alone (FOMAML): both factors "
        "I - αH_k are missing.",
        _slope,
    ),
    _by_hand(
        "one-factor",
        "only one factor is there; each of the two inner steps brings one.",
        _factor(_B) * _slope,
    ),
    _by_hand(
        "one-factor",
        "only one factor is there; each of the two inner steps brings one.",
        _factor(_A) * _slope,
    ),
    _by_hand(
        "gradient-at-theta",
        "the query gradient is taken at θ; it belongs at the adapted "
        "parameters θ_2.",
        _factor(_A) * _factor(_B) * (_theta - _c),
    ),
    _by_hand(
        "joint-training",
        "this is the query gradient at θ, as if nothing had been adapted.",
        _theta - _c,
    ),
    _by_hand(
        "hessian-sign",
        "the Hessians come with the wrong sign: a step *subtracts* αg_k, so "
        "its Jacobian is I - αH_k.",
        _factor(_A, -_alpha) * _factor(_B, -_alpha) * _slope,
    ),
    _by_hand(
        "no-rate",
        "the rate α is missing in the factors I - αH_k.",
        _factor(_A, 1) * _factor(_B, 1) * _slope,
    ),
    _by_hand(
        "rate-squared",
        "the rate α stands squared in the factors I - αH_k.",
        _factor(_A, _alpha**2) * _factor(_B, _alpha**2) * _slope,
    ),
    _by_hand(
        "minibatches-swapped",
        "the two minibatches are used in the wrong order: A comes first.",
        _factor(_B) * _factor(_A) * (_factor(_A) * _factor(_B) * _theta - _c),
    ),
    _by_hand(
        "one-hessian",
        "both factors have the first minibatch's Hessian; the second step "
        "uses B.",
        _factor(_A) ** 2 * _slope,
    ),
    _by_hand(
        "one-minibatch",
        "both steps descend the first minibatch; the second step uses B.",
        _factor(_A) ** 2 * (_factor(_A) ** 2 * _theta - _c),
    ),
    _by_hand(
        "one-minibatch",
        "both steps descend the second minibatch; the first step uses A.",
        _factor(_B) ** 2 * (_factor(_B) ** 2 * _theta - _c),
    ),
    _by_hand(
        "one-step",
        "this is one step on the sum of the two losses; there are two steps, "
        "one after the other.",
        _factor(_A + _B) * (_factor(_A + _B) * _theta - _c),
    ),
)


# The losses that coding answers are compared on: curved, so that a Hessian at
# the wrong point shows, and with support and query that differ.


def quartic(theta, data):
    """½ (θ-c)ᵀA(θ-c) + Σθ⁴/12: no two Hessians on its paths commute."""
    A, c = data
    return dot(theta - c, A @ (theta - c)) / 2 + (theta**4).sum() / 12


def _quartic_data(generator):
    root = _normal(generator, 3, 3)
    return root @ root.T / 3, _normal(generator, 3)


def _quartic_task(generator):
    return Task(_quartic_data(generator), _quartic_data(generator))


def _one_task_instances():
    generator = torch.Generator().manual_seed(3)
    return [
        (quartic, _normal(generator, 3), _quartic_task(generator), lr, steps)
        for lr, steps in ((0.2, 3), (0.1, 2), (0.15, 1))
    ]


# chain-rule-2: the reverse sweep, with a minibatch for each step. ------------


def _minibatch_instances():
    generator = torch.Generator().manual_seed(4)
    return [
        (
            quartic,
            _normal(generator, 3),
            Task(
                [_quartic_data(generator) for _ in range(steps)],
                _quartic_data(generator),
            ),
            lr,
        )
        for lr, steps in ((0.2, 3), (0.1, 2), (0.15, 1))
    ]


def _by_minibatches(method):
    def sweep(loss, theta, task, lr):
        steps = len(task.support)
        inner = GradientDescent(lr=lr, steps=steps, minibatches=True)
        return meta_gradient(loss, theta, [task], inner, method=method)

    return sweep


def _wrong_sweep(
    *,
    order=-1,
    points: Callable = lambda k, steps: k,
    batches: Callable = lambda k, steps: k,
    first=0,
    beyond=0,
    rate: Callable = lambda lr: lr,
    query_at=-1,
    judge=None,
    curvature=None,
):
    """A reverse sweep with a mistake in it.

    Factor k has its Hessian at the point ``points(k)`` of the path, for the
    minibatch ``batches(k)``; k runs from ``first`` to K - 1 + ``beyond``.
    """

    def sweep(loss, theta, task, lr):
        steps = len(task.support)
        inner = GradientDescent(lr=lr, steps=steps, minibatches=True)
        path = adaptation_path(loss, theta, task.support, inner)
        adjoint = gradient(loss)(
            path[query_at], task.query if judge is None else task.support[judge]
        )
        for k in range(first, steps + beyond)[::order]:
            data = task.support[min(batches(k, steps), steps - 1)]
            adjoint = adjoint - rate(lr) * hessian_vector_product(loss)(
                path[points(k, steps)],
                adjoint,
                task.query if curvature == "query" else data,
            )
        return adjoint

    return sweep


def _query_hessian_too(loss, theta, task, lr):
    # One factor more, of the query loss where the path ends.
    inner = GradientDescent(lr, len(task.support), minibatches=True)
    end = adaptation_path(loss, theta, task.support, inner)[-1]
    H = hessian(loss)(end, task.query)

    def once_more(theta, data):
        value = loss(theta, data)
        if data is task.query:
            slope = gradient(loss)(end, task.query)
            value = dot(slope - lr * (H @ slope), theta)
        return value

    return _by_minibatches("reverse")(once_more, theta, task, lr)


def _full_batch(loss, theta, task, lr):
    # Every step descends the mean of all minibatches.
    def mean(theta, data):
        if isinstance(data, list):
            return sum(loss(theta, batch) for batch in data) / len(data)
        return loss(theta, data)

    inner = GradientDescent(lr, len(task.support))
    return meta_gradient(mean, theta, [task], inner)


def _first_minibatch(loss, theta, task, lr):
    inner = GradientDescent(lr, len(task.support))
    first = Task(task.support[0], task.query)
    return meta_gradient(loss, theta, [first], inner)


def _joint(loss, theta, task, *_):
    return gradient(loss)(theta, task.query)


_REVERSE_SWEEP = (
    Mistake(
        "first-order",
        "this is the query gradient at θ_K alone (FOMAML): no factor "
        "I - αH_k has touched it.",
        _by_minibatches("first_order"),
    ),
    Mistake(
        "order",
        "the sweep runs forward, so the factors stand in the wrong order; "
        "start at the last step and go back to the first.",
        _wrong_sweep(order=1),
    ),
    Mistake(
        "minibatches-forward",
        "the points come backward but the minibatches forward: step k has "
        "its Hessian at θ_k for the minibatch that it descended.",
        _wrong_sweep(batches=lambda k, steps: steps - 1 - k),
    ),
    Mistake(
        "hessian-after-step",
        "the Hessian is taken at θ_{k+1}; the step from θ_k has its Jacobian "
        "at θ_k, before the step.",
        _wrong_sweep(points=lambda k, steps: k + 1),
    ),
    Mistake(
        "hessian-at-start",
        "all Hessians are taken at θ_0; that of step k belongs at θ_k.",
        _wrong_sweep(points=lambda k, steps: 0),
    ),
    Mistake(
        "hessian-at-end",
        "all Hessians are taken at θ_K; that of step k belongs at θ_k.",
        _wrong_sweep(points=lambda k, steps: steps),
    ),
    Mistake(
        "one-hessian-too-many",
        "there is one Hessian too many, at θ_K: no step starts there.",
        _wrong_sweep(beyond=1),
    ),
    Mistake(
        "one-hessian-too-many",
        "there is one Hessian too many, the query loss's at θ_K: no step "
        "starts there.",
        _query_hessian_too,
    ),
    Mistake(
        "one-hessian",
        "all Hessians are those of the first minibatch; each step has its own.",
        _wrong_sweep(batches=lambda k, steps: 0),
    ),
    Mistake(
        "one-hessian",
        "all Hessians are those of the last minibatch; each step has its own.",
        _wrong_sweep(batches=lambda k, steps: steps - 1),
    ),
    Mistake(
        "first-minibatch",
        "every step descends the first minibatch; each has its own.",
        _first_minibatch,
    ),
    Mistake(
        "full-batch",
        "every step descends the mean of all minibatches; each has its own.",
        _full_batch,
    ),
    Mistake(
        "gradient-at-theta",
        "the sweep starts with the query gradient at θ; it belongs at θ_K.",
        _wrong_sweep(query_at=0),
    ),
    Mistake(
        "joint-training",
        "this is the query gradient at θ, as if nothing had been adapted.",
        _joint,
    ),
    Mistake(
        "query-curvature",
        "the Hessians are those of the query loss; the inner steps descend "
        "the minibatches.",
        _wrong_sweep(curvature="query"),
    ),
    Mistake(
        "support-for-query",
        "the sweep starts with a support gradient, on the last minibatch; "
        "the objective is judged on the query data.",
        _wrong_sweep(judge=-1),
    ),
    Mistake(
        "hessian-sign",
        "the Hessian terms are added; a step subtracts, so its factor is "
        "I - αH_k.",
        _wrong_sweep(rate=lambda lr: -lr),
    ),
    Mistake(
        "no-rate",
        "the rate α is missing in the factors I - αH_k.",
        _wrong_sweep(rate=lambda lr: 1.0),
    ),
    Mistake(
        "rate-squared",
        "the rate α stands squared in the factors I - αH_k.",
        _wrong_sweep(rate=lambda lr: lr**2),
    ),
    Mistake(
        "one-step-short",
        "the sweep leaves out the first inner step (k = 0).",
        _wrong_sweep(first=1),
    ),
)


# chain-rule-3: find the bugs. -----------------------------------------------


def with_bugs(
    *, cut=False, total=False, reused=False, adapts_on="support", share=None
):
    """The loop of the exercise, with those of its three bugs that are left.

    ``adapts_on`` and ``share`` make room for bugs that mending brings in: the
    data of the inner loop, and what is left of the sum over tasks.
    """

    def meta(loss, theta, tasks, lr, steps):
        result = torch.zeros_like(theta)
        for task in tasks:
            start = theta.clone().requires_grad_()
            adapted = start
            for _ in range(steps):
                value = loss(adapted, getattr(task, adapts_on))
                (slope,) = torch.autograd.grad(
                    value, adapted, create_graph=not cut
                )
                adapted = adapted - lr * slope
            judged = loss(adapted, task.support if reused else task.query)
            result = result + torch.autograd.grad(judged, start)[0]
        if share is not None:
            return share(result, tasks, steps)
        return result if total else result / len(tasks)

    return meta


def _only(which):
    def meta(loss, theta, tasks, lr, steps):
        return with_bugs()(loss, theta, [tasks[which]], lr, steps)

    return meta


def _divided_in_the_loop(loss, theta, tasks, lr, steps):
    result = torch.zeros_like(theta)
    for task in tasks:
        exact = with_bugs()(loss, theta, [task], lr, steps)
        result = (result + exact) / len(tasks)
    return result


def _bug_instances():
    generator = torch.Generator().manual_seed(5)
    return [
        (
            quartic,
            _normal(generator, 3),
            [_quartic_task(generator) for _ in range(count)],
            lr,
            steps,
        )
        for count, lr, steps in ((3, 0.2, 2), (2, 0.1, 1))
    ]


_BUG = {
    "cut": (
        "no-create-graph",
        "the inner gradients are constants to autograd, as in FOMAML",
    ),
    "total": ("sum-for-mean", "the tasks are summed, not averaged"),
    "reused": (
        "support-for-query",
        "the adapted parameters are judged on the data they adapted to",
    ),
}


def _remaining(flags):
    """What is said while bugs are left: how many, and later the first."""
    left = [_BUG[bug] for bug, there in flags.items() if there]
    count = ("one bug is", "two bugs are", "all three bugs are")[len(left) - 1]
    if len(left) == len(_BUG):
        name, told = "all-bugs", ". Mend one, and you are told of another."
    else:
        name = "+".join(name for name, _ in left)
        told = f"{': ' if len(left) == 1 else '. The first: '}{left[0][1]}."
    return Mistake(name, f"{count} left{told}", with_bugs(**flags))


_BUGS = tuple(
    sorted(
        (
            _remaining(dict(zip(_BUG, flags)))
            for flags in product((False, True), repeat=3)
            if any(flags)
        ),
        key=lambda mistake: mistake.name.count("+"),
    )
) + (
    Mistake(
        "adapts-on-query",
        "the inner loop adapts on the query data; it adapts on the support "
        "data, and only the last loss is the query's.",
        with_bugs(adapts_on="query"),
    ),
    Mistake(
        "support-and-query-swapped",
        "support and query have changed places.",
        with_bugs(adapts_on="query", reused=True),
    ),
    Mistake(
        "divided-by-steps",
        "the sum over tasks is divided by the number of steps; the "
        "meta-objective is a mean over tasks.",
        with_bugs(share=lambda result, tasks, steps: result / steps),
    ),
    Mistake(
        "divided-in-the-loop",
        "the sum so far is divided in the loop, after every task; divide "
        "once, after the loop.",
        _divided_in_the_loop,
    ),
    Mistake(
        "one-task",
        "this is the first task's gradient: the return stands in the loop.",
        _only(0),
    ),
    Mistake(
        "one-task",
        "this is the last task's gradient: the result is overwritten, not "
        "added to.",
        _only(-1),
    ),
    Mistake(
        "joint-training",
        "this is the mean query gradient at θ, as if nothing had been adapted.",
        lambda loss, theta, tasks, lr, steps: (
            sum(_joint(loss, theta, task, lr, steps) for task in tasks)
            / len(tasks)
        ),
    ),
)


# chain-rule-4: the gradient with respect to the rate. -----------------------


def _rate_gradient(loss, theta, task, lr, steps):
    inner = GradientDescent(lr=lr, steps=steps)
    return meta_gradient(loss, theta, [task], inner, wrt="lr")


def _wrong_rate_gradient(
    *,
    transport=True,
    early=False,
    after=False,
    rate: Callable = lambda lr: lr,
    start=False,
    query="query",
    sign=1,
    last=False,
    query_at=-1,
):
    """Forward sensitivities with a mistake in them."""

    def recursion(loss, theta, task, lr, steps):
        inner = GradientDescent(lr=lr, steps=steps)
        path = adaptation_path(loss, theta, task.support, inner)
        s = torch.zeros_like(theta)
        for k in range(steps):
            slope = gradient(loss)(path[0 if start else k], task.support)
            if early:
                s = s - slope
            if transport:
                s = s - rate(lr) * hessian_vector_product(loss)(
                    path[k + after], s, task.support
                )
            if last:
                s = torch.zeros_like(theta)
            if not early:
                s = s - slope
        judge = gradient(loss)(path[query_at], getattr(task, query))
        return sign * dot(judge, s)

    return recursion


_RATE = (
    Mistake(
        "first-order",
        "the sensitivities are only added up; each inner step also carries "
        "the earlier ones along with I - αH_k.",
        _wrong_rate_gradient(transport=False),
    ),
    Mistake(
        "last-step-only",
        "only the last step's gradient is there; α has moved every step.",
        _wrong_rate_gradient(last=True),
    ),
    Mistake(
        "sign",
        "the sign is wrong: a larger rate moves θ' *against* the support "
        "gradients.",
        _wrong_rate_gradient(sign=-1),
    ),
    Mistake(
        "transported-too-early",
        "the step's own gradient is carried along by its own factor: it is "
        "(I - αH_k)s_k - g_k, not (I - αH_k)(s_k - g_k).",
        _wrong_rate_gradient(early=True),
    ),
    Mistake(
        "hessian-after-step",
        "the Hessian is taken at θ_{k+1}; it belongs at θ_k, before the step.",
        _wrong_rate_gradient(after=True),
    ),
    Mistake(
        "gradient-at-start",
        "all inner gradients are taken at θ_0; that of step k belongs at θ_k.",
        _wrong_rate_gradient(start=True),
    ),
    Mistake(
        "gradient-at-theta",
        "the query gradient is taken at θ; it belongs at θ_K.",
        _wrong_rate_gradient(query_at=0),
    ),
    Mistake(
        "hessian-sign",
        "the Hessian term is added; the factor is I - αH_k.",
        _wrong_rate_gradient(rate=lambda lr: -lr),
    ),
    Mistake(
        "no-rate",
        "the rate α is missing in the factor I - αH_k.",
        _wrong_rate_gradient(rate=lambda lr: 1.0),
    ),
    Mistake(
        "support-for-query",
        "the last factor is the support gradient; the objective is judged on "
        "the query data.",
        _wrong_rate_gradient(query="support"),
    ),
)


# chain-rule-5: adapt two blocks of three. ------------------------------------


def features(theta, data):
    """Mean squared error of head · (scale ⊙ tanh(body x))."""
    x, y = data
    scaled = torch.tanh(x @ theta["body"]) * theta["scale"]
    return ((scaled @ theta["head"] - y) ** 2).mean()


def _block_instances():
    generator = torch.Generator().manual_seed(7)

    def data():
        return _normal(generator, 5, 2), _normal(generator, 5)

    return [
        (
            features,
            {
                "body": _normal(generator, 2, 3),
                "scale": _normal(generator, 3),
                "head": _normal(generator, 3),
            },
            Task(data(), data()),
            lr,
            steps,
        )
        for lr, steps in (
            ({"scale": 0.1, "head": 0.3}, 2),
            ({"scale": 0.2, "head": 0.05}, 1),
        )
    ]


def _at_rates(rates: Callable, method="reverse", query="query"):
    """The meta-gradient where the blocks learn at the rates ``rates(lr)``."""

    def blocks(loss, theta, task, lr, steps):
        zero = dict.fromkeys(theta, 0.0)
        inner = GradientDescent(lr={**zero, **rates(lr)}, steps=steps)
        judged = Task(task.support, getattr(task, query))
        return meta_gradient(loss, theta, [judged], inner, method=method)

    return blocks


_two_blocks = _at_rates(lambda lr: lr)
_two_blocks_direct = _at_rates(lambda lr: lr, "first_order")


def _direct(*which):
    """Exact but for some blocks, which get their direct gradient alone."""

    def blocks(*arguments):
        exact, direct = _two_blocks(*arguments), _two_blocks_direct(*arguments)
        return {
            name: (direct if name in which else exact)[name] for name in exact
        }

    return blocks


def _block_sweep(
    kept: Callable = lambda to, of: True,
    rate: Callable = lambda lr, to, of: lr[of],
):
    """The recursion for the adjoints, without some blocks of the Hessians."""

    def blocks(loss, theta, task, lr, steps):
        inner = GradientDescent(lr={"body": 0.0, **lr}, steps=steps)
        path = adaptation_path(loss, theta, task.support, inner)
        p = gradient(loss)(path[-1], task.query)
        for point in path[-2::-1]:
            before = dict(p)
            for of in lr:
                one = {k: x if k == of else 0 * x for k, x in p.items()}
                curved = hessian_vector_product(loss)(point, one, task.support)
                for to in p:
                    if kept(to, of):
                        before[to] = before[to] - rate(lr, to, of) * curved[to]
            p = before
        return p

    return blocks


def _body_frozen(*arguments):
    exact = _two_blocks(*arguments)
    return {**exact, "body": torch.zeros_like(exact["body"])}


_BLOCKS = (
    Mistake(
        "mixed-block-dropped",
        "the body gets only its direct query gradient: the adapted blocks "
        "depend on the body too, through the mixed blocks of the Hessian.",
        _direct("body"),
    ),
    Mistake(
        "mixed-block-dropped",
        "of the body's two mixed blocks the one with the scale is missing.",
        _block_sweep(lambda to, of: (to, of) != ("body", "scale")),
    ),
    Mistake(
        "mixed-block-dropped",
        "of the body's two mixed blocks the one with the head is missing.",
        _block_sweep(lambda to, of: (to, of) != ("body", "head")),
    ),
    Mistake(
        "blocks-uncoupled",
        "scale and head see their own curvature only; they have a mixed "
        "block with each other as well.",
        _block_sweep(lambda to, of: to in ("body", of)),
    ),
    Mistake(
        "rate-of-the-row",
        "each block of the Hessian is multiplied with the rate of its row; "
        "the adjoint takes that of its column, as in I - HPᵀ.",
        _block_sweep(rate=lambda lr, to, of: lr.get(to, 0.0)),
    ),
    Mistake(
        "rate-of-the-row",
        "between scale and head the Hessian is multiplied with the rate of "
        "its row; the adjoint takes that of its column, as in I - HPᵀ.",
        _block_sweep(rate=lambda lr, to, of: lr.get(to, lr[of])),
    ),
    Mistake(
        "body-frozen",
        "the body has gradient zero: it is not adapted, but it is learned.",
        _body_frozen,
    ),
    Mistake(
        "first-order",
        "this is the query gradient at the adapted parameters alone (FOMAML).",
        _two_blocks_direct,
    ),
    Mistake(
        "first-order-head",
        "the head gets only its direct query gradient: its own curvature and "
        "its mixed block with the scale are missing.",
        _direct("head"),
    ),
    Mistake(
        "first-order-scale",
        "the scale gets only its direct query gradient: its own curvature and "
        "its mixed block with the head are missing.",
        _direct("scale"),
    ),
    Mistake(
        "first-order-adapted",
        "scale and head get only their direct query gradients: the blocks of "
        "the Hessian in their rows are missing.",
        _direct("scale", "head"),
    ),
    Mistake(
        "rates-swapped",
        "scale and head have each other's rate.",
        _at_rates(lambda lr: {"scale": lr["head"], "head": lr["scale"]}),
    ),
    Mistake(
        "one-rate",
        "both blocks have the head's rate.",
        _at_rates(lambda lr: dict.fromkeys(lr, lr["head"])),
    ),
    Mistake(
        "one-rate",
        "both blocks have the scale's rate.",
        _at_rates(lambda lr: dict.fromkeys(lr, lr["scale"])),
    ),
    Mistake(
        "head-only",
        "this adapts the head only (ANIL); the scale is adapted as well.",
        _at_rates(lambda lr: {"head": lr["head"]}),
    ),
    Mistake(
        "scale-only",
        "this adapts the scale only; the head is adapted as well.",
        _at_rates(lambda lr: {"scale": lr["scale"]}),
    ),
    Mistake(
        "everything-adapted",
        "this adapts the body as well, at the head's rate.",
        _at_rates(lambda lr: {**lr, "body": lr["head"]}),
    ),
    Mistake(
        "everything-adapted",
        "this adapts the body as well, at the scale's rate.",
        _at_rates(lambda lr: {**lr, "body": lr["scale"]}),
    ),
    Mistake(
        "joint-training",
        "this is the query gradient at θ, as if nothing had been adapted.",
        _joint,
    ),
    Mistake(
        "support-for-query",
        "the adapted parameters are judged on the support data.",
        _at_rates(lambda lr: lr, query="support"),
    ),
    Mistake(
        "sign",
        "the answer has the wrong sign.",
        lambda *arguments: tree_map(lambda x: -x, _two_blocks(*arguments)),
    ),
)


# chain-rule-6: a hinge at a random place. -----------------------------------

_t, _a, _k = sp.symbols("theta alpha c")
_right = (_t - _a - _k) ** 2 / 2  # θ right of the kink: the step is taken
_left = (_t - _k) ** 2 / 2  # θ left of it: no step
_pathwise = (1 + _t) / 2 * (_t - _a - _k) + (1 - _t) / 2 * (_t - _k)
_exchanged = (1 - _t) / 2 * (_t - _a - _k) + (1 + _t) / 2 * (_t - _k)
_moving = (_right - _left) / 2  # the density ½ times the jump

_HINGE = (
    Mistake(
        "boundary-dropped",
        "this is the mean of autograd's gradients: the term of the moving "
        "jump is missing.",
        _pathwise,
    ),
    Mistake(
        "boundary-sign",
        "the jump has the wrong sign: it is the objective just right of the "
        "kink minus that just left of it.",
        _pathwise - _moving,
    ),
    Mistake(
        "density",
        "the jump is weighed with 1; the density of b is ½.",
        _pathwise + 2 * _moving,
    ),
    Mistake(
        "boundary-only",
        "this is the term of the moving jump alone; the slopes between the "
        "jumps are missing.",
        _moving,
    ),
    Mistake(
        "objective",
        "this is the expected objective itself; wanted is its derivative.",
        (1 + _t) / 2 * _right + (1 - _t) / 2 * _left,
    ),
    Mistake(
        "sides-swapped",
        "left and right are swapped: the hinge max(0, θ - b) has slope 1 "
        "where θ > b.",
        sp.diff((1 - _t) / 2 * _right + (1 + _t) / 2 * _left, _t),
    ),
    Mistake(
        "probabilities-exchanged",
        "the probabilities of the two sides are exchanged: b lies left of θ "
        "with probability (1 + θ)/2.",
        _exchanged + _moving,
    ),
    Mistake(
        "probabilities-exchanged",
        "the probabilities of the two sides are exchanged: b lies left of θ "
        "with probability (1 + θ)/2. And the term of the moving jump is "
        "missing.",
        _exchanged,
    ),
    Mistake(
        "square-lost",
        "the jump is taken to first order in α; the square of α is part of it.",
        _pathwise + _moving - _a**2 / 4,
    ),
    Mistake(
        "jump-of-the-slope",
        "the jump is that of the slope; it is the objective that jumps.",
        _pathwise - _a / 2,
    ),
    Mistake(
        "absolute-value",
        "this is the derivative for |θ - b|; the hinge is flat left of b.",
        (1 - 2 * _a) * _t - _k * (1 - _a),
    ),
    Mistake(
        "absolute-value",
        "this is autograd's mean for |θ - b|; the hinge is flat left of b, "
        "and the term of the moving jump is missing.",
        (1 - _a) * _t - _k,
    ),
)


EXERCISES = (
    Exercise(
        id="chain-rule-1",
        title="Two minibatches, by hand",
        chapter=3,
        read="the theorem of K inner steps, and the section on their order.",
        solution=_factor(_A) * _factor(_B) * _slope,
        mistakes=_TWO_MINIBATCHES,
    ),
    Exercise(
        id="chain-rule-2",
        title="The reverse sweep, with minibatches",
        chapter=3,
        read="the section “Two sweeps”, and the theorem of K inner steps.",
        solution=_by_minibatches("reverse"),
        instances=_minibatch_instances,
        mistakes=_REVERSE_SWEEP,
    ),
    Exercise(
        id="chain-rule-3",
        title="Find the bugs",
        chapter=3,
        read="the section “One inner step”, and the definition of the "
        "meta-objective in chapter 2.",
        solution=with_bugs(),
        instances=_bug_instances,
        mistakes=_BUGS,
    ),
    Exercise(
        id="chain-rule-4",
        title="Learn the rate",
        chapter=3,
        read="the section “Differentiating the inner algorithm itself”.",
        solution=_rate_gradient,
        instances=_one_task_instances,
        mistakes=_RATE,
    ),
    Exercise(
        id="chain-rule-5",
        title="Adapt two blocks of three",
        chapter=3,
        read="the section “Adapting the head only”, and the theorem on a "
        "preconditioned inner loop.",
        solution=_two_blocks,
        instances=_block_instances,
        mistakes=_BLOCKS,
    ),
    Exercise(
        id="chain-rule-6",
        title="A hinge at a random place",
        chapter=3,
        read="the section “When it fails”, on kinks.",
        solution=_pathwise + _moving,
        mistakes=_HINGE,
    ),
)
