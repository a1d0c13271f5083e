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


# chain-rule-2: the reverse sweep. -------------------------------------------


def _sweep(loss, theta, task, lr, steps):
    inner = GradientDescent(lr=lr, steps=steps)
    return meta_gradient(loss, theta, [task], inner)


def _wrong_sweep(
    *,
    order=-1,
    after=False,
    start=False,
    short=0,
    rate: Callable = lambda lr: lr,
    query_at=-1,
    support="support",
    query="query",
    curvature="support",
):
    """A reverse sweep with a mistake in it."""

    def sweep(loss, theta, task, lr, steps):
        inner = GradientDescent(lr=lr, steps=steps)
        path = adaptation_path(loss, theta, getattr(task, support), inner)
        adjoint = gradient(loss)(path[query_at], getattr(task, query))
        for k in range(short, steps)[::order]:
            point = path[0 if start else k + after]
            adjoint = adjoint - rate(lr) * hessian_vector_product(loss)(
                point, adjoint, getattr(task, curvature)
            )
        return adjoint

    return sweep


def _first_order(loss, theta, task, lr, steps):
    inner = GradientDescent(lr=lr, steps=steps)
    return meta_gradient(loss, theta, [task], inner, method="first_order")


def _joint(loss, theta, task, lr, steps):
    return gradient(loss)(theta, task.query)


_REVERSE_SWEEP = (
    Mistake(
        "first-order",
        "this is the query gradient at θ_K alone (FOMAML): no factor "
        "I - αH_k has touched it.",
        _first_order,
    ),
    Mistake(
        "order",
        "the sweep runs forward, so the factors stand in the wrong order; "
        "start at the last step and go back to the first.",
        _wrong_sweep(order=1),
    ),
    Mistake(
        "hessian-after-step",
        "the Hessian is taken at θ_{k+1}; the step from θ_k has its Jacobian "
        "at θ_k, before the step.",
        _wrong_sweep(after=True),
    ),
    Mistake(
        "hessian-at-start",
        "all Hessians are taken at θ_0; that of step k belongs at θ_k.",
        _wrong_sweep(start=True),
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
        "the support loss.",
        _wrong_sweep(curvature="query"),
    ),
    Mistake(
        "support-for-query",
        "the sweep starts with the support gradient; the objective is judged "
        "on the query data.",
        _wrong_sweep(query="support"),
    ),
    Mistake(
        "support-and-query-swapped",
        "support and query have changed places.",
        _wrong_sweep(support="query", query="support", curvature="query"),
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
        _wrong_sweep(short=1),
    ),
)


# chain-rule-3: find the bugs. -----------------------------------------------


def with_bugs(*, cut=False, total=False, reused=False):
    """The loop of the exercise, with those of its three bugs that are left."""

    def meta(loss, theta, tasks, lr, steps):
        result = torch.zeros_like(theta)
        for task in tasks:
            start = theta.clone().requires_grad_()
            adapted = start
            for _ in range(steps):
                (slope,) = torch.autograd.grad(
                    loss(adapted, task.support), adapted, create_graph=not cut
                )
                adapted = adapted - lr * slope
            judged = loss(adapted, task.support if reused else task.query)
            result = result + torch.autograd.grad(judged, start)[0]
        return result if total else result / len(tasks)

    return meta


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
        for count, lr, steps in ((3, 0.2, 3), (2, 0.1, 1))
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
    left = [_BUG[bug] for bug, there in flags.items() if there]
    return Mistake(
        "+".join(name for name, _ in left),
        (
            "one bug is left: "
            if len(left) == 1
            else f"{len(left)} are left:\n  "
        )
        + ";\n  ".join(text for _, text in left)
        + ".",
        with_bugs(**flags),
    )


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


# chain-rule-5: adapt the head only. -----------------------------------------


def features(theta, data):
    """Mean squared error of head · tanh(body x)."""
    x, y = data
    return ((torch.tanh(x @ theta["body"]) @ theta["head"] - y) ** 2).mean()


def _anil_instances():
    generator = torch.Generator().manual_seed(7)

    def data():
        return _normal(generator, 5, 2), _normal(generator, 5)

    return [
        (
            features,
            {"body": _normal(generator, 2, 3), "head": _normal(generator, 3)},
            Task(data(), data()),
            lr,
            steps,
        )
        for lr, steps in ((0.3, 2), (0.2, 1))
    ]


def _learned(body, head, method="reverse"):
    """The meta-gradient where body and head learn at these shares of lr."""

    def anil(loss, theta, task, lr, steps):
        rates = {"body": body * lr, "head": head * lr}
        inner = GradientDescent(lr=rates, steps=steps)
        return meta_gradient(loss, theta, [task], inner, method=method)

    return anil


def _body_detached(loss, theta, task, lr, steps):
    # The head's gradient is whole, the body's is the direct one only.
    exact = _learned(0, 1)(loss, theta, task, lr, steps)
    direct = _learned(0, 1, "first_order")(loss, theta, task, lr, steps)
    return {"body": direct["body"], "head": exact["head"]}


def _body_frozen(loss, theta, task, lr, steps):
    exact = _learned(0, 1)(loss, theta, task, lr, steps)
    return {"body": torch.zeros_like(exact["body"]), "head": exact["head"]}


_ANIL = (
    Mistake(
        "mixed-block-dropped",
        "the body gets only its direct query gradient: the adapted head "
        "depends on the body too, through the mixed Hessian block.",
        _body_detached,
    ),
    Mistake(
        "body-frozen",
        "the body has gradient zero: it is not adapted, but it is learned.",
        _body_frozen,
    ),
    Mistake(
        "first-order",
        "this is the query gradient at the adapted parameters alone (FOMAML).",
        _learned(0, 1, "first_order"),
    ),
    Mistake(
        "everything-adapted",
        "this adapts the body as well: it is MAML.",
        _learned(1, 1),
    ),
    Mistake(
        "body-adapted",
        "this adapts the body and leaves the head alone.",
        _learned(1, 0),
    ),
    Mistake(
        "joint-training",
        "this is the query gradient at θ, as if nothing had been adapted.",
        _joint,
    ),
    Mistake(
        "support-for-query",
        "the adapted head is judged on the support data.",
        lambda loss, theta, task, lr, steps: _learned(0, 1)(
            loss, theta, Task(task.support, task.support), lr, steps
        ),
    ),
    Mistake(
        "sign",
        "the answer has the wrong sign.",
        lambda *arguments: tree_map(lambda x: -x, _learned(0, 1)(*arguments)),
    ),
)


# chain-rule-6: a hinge at a random place. -----------------------------------

_t, _a, _k = sp.symbols("theta alpha c")
_right = (_t - _a - _k) ** 2 / 2  # θ right of the kink: the step is taken
_left = (_t - _k) ** 2 / 2  # θ left of it: no step
_pathwise = (1 + _t) / 2 * (_t - _a - _k) + (1 - _t) / 2 * (_t - _k)
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
        "absolute-value",
        "this is the derivative for |θ - b|; the hinge is flat left of b.",
        (1 - 2 * _a) * _t - _k * (1 - _a),
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
        title="The reverse sweep",
        chapter=3,
        read="the section “Two sweeps”.",
        solution=_sweep,
        instances=_one_task_instances,
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
        title="Adapt the head only",
        chapter=3,
        read="the section “Adapting the head only”.",
        solution=_learned(0, 1),
        instances=_anil_instances,
        mistakes=_ANIL,
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
