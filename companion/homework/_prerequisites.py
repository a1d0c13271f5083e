"""The exercises of the prerequisites."""

from __future__ import annotations

import sympy as sp
import torch

from companion.calculus import gradient, hessian
from companion.homework._exercise import Exercise, Mistake

__all__ = ["EXERCISES"]


# prerequisites-1: pull a covector back. -------------------------------------


def _jacobian(theta):
    x, y = theta
    one = torch.ones_like(x)
    return torch.stack([torch.stack([y, x]), torch.stack([one, 2 * y])])


def _pull_back(theta, v):
    return _jacobian(theta).T @ v


def _points():
    return [
        (
            torch.tensor(theta, dtype=torch.float64),
            torch.tensor(v, dtype=torch.float64),
        )
        for theta, v in (([0.5, -1.5], [1.0, 2.0]), ([2.0, 0.3], [-0.7, 0.4]))
    ]


_PULL_BACK = (
    Mistake(
        "not-transposed",
        "this is J v, which pushes a direction of the inputs forward; pulled "
        "back is Jᵀ v.",
        lambda theta, v: _jacobian(theta) @ v,
    ),
    Mistake(
        "direction-ignored",
        "this adds up the rows of J: v has not been used.",
        lambda theta, v: _jacobian(theta).T @ torch.ones_like(v),
    ),
    Mistake(
        "whole-jacobian",
        "this is the whole Jacobian; asked is its transpose times v.",
        lambda theta, v: _jacobian(theta),
    ),
    Mistake(
        "whole-jacobian",
        "this is the whole Jacobian, transposed; asked is its product with v.",
        lambda theta, v: _jacobian(theta).T,
    ),
)


# prerequisites-2: differentiate through a step. -----------------------------


def _after_step(loss, theta, lr):
    return loss(theta - lr * gradient(loss)(theta))


def _through(loss, theta, lr):
    return gradient(lambda theta: _after_step(loss, theta, lr))(theta)


def _first_order(loss, theta, lr):
    return gradient(loss)(theta - lr * gradient(loss)(theta))


def _factor(loss, theta, lr, at=None):
    identity = torch.eye(len(theta), dtype=theta.dtype)
    return identity - lr * hessian(loss)(theta if at is None else at)


def _wave(theta):
    return torch.sin(theta).prod() + (theta**4).sum() / 4


def _bowl(theta):
    return (theta[0] * theta[1] ** 2 + theta[0] ** 2) / 2


class _Watching(torch.nn.Module):
    """A loss whose state tells whether theta has come to require gradients.

    Values cannot tell: ``theta.requires_grad_()`` leaves them as they are.
    """

    def __init__(self, function, theta):
        super().__init__()
        self.function, self.theta = function, theta

    def forward(self, theta):
        return self.function(theta)

    def get_extra_state(self):
        return torch.tensor(self.theta.requires_grad)


def _losses():
    theta = torch.tensor([0.7, -0.4], dtype=torch.float64)
    return [
        (_Watching(function, start), start, lr)
        for function, start, lr in (
            (_wave, theta, 0.3),
            (_bowl, theta + 0.5, 0.2),
        )
    ]


def _in_place(answer):
    def marking(loss, theta, lr):
        return answer(loss, theta.requires_grad_(), lr)

    return marking


_THROUGH = (
    Mistake(
        "first-order",
        "the derivative of the inner gradient is missing. Either the graph "
        "was cut there (create_graph=True was left out, or detach, .data or "
        "no_grad stand in between), or all was recorded and the outer "
        "gradient was taken with respect to θ - α∇L(θ), not to θ.",
        _first_order,
    ),
    Mistake(
        "requires-grad-in-place",
        "the value is right, but requires_grad_() has marked the caller's own "
        "theta; work on a copy, theta.clone().requires_grad_().",
        _in_place(_through),
    ),
    Mistake(
        "requires-grad-in-place",
        "requires_grad_() has marked the caller's own theta (work on a copy, "
        "theta.clone().requires_grad_()), and the derivative of the inner "
        "gradient is missing.",
        _in_place(_first_order),
    ),
    Mistake(
        "gradient-at-theta",
        "this is the gradient at θ, before the step.",
        lambda loss, theta, lr: gradient(loss)(theta),
    ),
    Mistake(
        "hessian-at-adapted",
        "the Hessian is taken after the step; the step's Jacobian I - αH has "
        "it at θ, before the step.",
        lambda loss, theta, lr: (
            _factor(loss, theta, lr, theta - lr * gradient(loss)(theta))
            @ _first_order(loss, theta, lr)
        ),
    ),
    Mistake(
        "factor-at-theta",
        "the outer gradient is taken at θ; it belongs at θ - α∇L(θ).",
        lambda loss, theta, lr: (
            _factor(loss, theta, lr) @ gradient(loss)(theta)
        ),
    ),
    Mistake(
        "missing-alpha",
        "the rate α is missing from the factor I - αH.",
        lambda loss, theta, lr: (
            _factor(loss, theta, 1.0) @ _first_order(loss, theta, lr)
        ),
    ),
    Mistake(
        "uphill",
        "the step climbs: it should subtract the gradient.",
        lambda loss, theta, lr: _through(loss, theta, -lr),
    ),
)


# prerequisites-3: the rate, on an unknown loss. -----------------------------

_theta, _alpha, _z = sp.symbols("theta alpha z")
_L = sp.Function("L")
_slope = _L(_theta).diff(_theta)
_slope_after = sp.Subs(_L(_z).diff(_z), _z, _theta - _alpha * _slope)

_RATE = (
    Mistake(
        "sign",
        "the sign is wrong: a larger rate moves the parameter *against* the "
        "gradient.",
        _slope * _slope_after,
    ),
    Mistake(
        "inner-derivative-dropped",
        "the derivative of the inside, θ - αL'(θ), with respect to α is "
        "missing.",
        _slope_after,
    ),
    Mistake(
        "gradient-at-theta",
        "the outer derivative is taken at θ; it belongs at θ - αL'(θ).",
        -(_slope**2),
    ),
    Mistake(
        "derivative-by-theta",
        "this is the derivative with respect to θ; asked is the one with "
        "respect to α.",
        (1 - _alpha * _L(_theta).diff(_theta, 2)) * _slope_after,
    ),
)


EXERCISES = (
    Exercise(
        id="prerequisites-1",
        title="Pull back by hand",
        chapter=0,
        read="the section “Jacobians, and which way they act”.",
        solution=_pull_back,
        instances=_points,
        mistakes=_PULL_BACK,
    ),
    Exercise(
        id="prerequisites-2",
        title="Differentiate through a step",
        chapter=0,
        read="the section “Differentiating a derivative”.",
        solution=_through,
        instances=_losses,
        mistakes=_THROUGH,
    ),
    Exercise(
        id="prerequisites-3",
        title="The best rate, for a loss nobody knows",
        chapter=0,
        read="the section “sympy in five cells”.",
        solution=-_slope * _slope_after,
        mistakes=_RATE,
    ),
)
