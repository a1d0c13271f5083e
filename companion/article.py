"""The two programs of the source article, made right.

Same names, same signatures. What was wrong with them, and how we know, is the
book's chapter "An article, its two programs, and what they compute"; in short:
the article's MAML computes FOMAML, its trajectory is one row repeated, and its
flow, which is kept here, is joint training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from companion.adaptation import GradientDescent
from companion.metagradient import meta_gradient
from companion.objective import Task

__all__ = ["MAML", "meta_learning_ode", "solve_meta_learning_ode"]


class LossTask(Protocol):
    """What `MAML` calls a task."""

    def loss(
        self, model: nn.Module, params: list[torch.Tensor]
    ) -> torch.Tensor:
        """The loss of ``model`` with ``params`` for its parameters."""
        ...


class GradientTask(Protocol):
    """What the article's flow calls a task."""

    def grad(self, theta: Any) -> Any:
        """The gradient of the task's loss at ``theta``."""
        ...


class MAML(nn.Module):
    """One step of MAML per call, by the exact meta-gradient.

    ``MAML(model, inner_lr, outer_lr)(tasks, num_updates)`` moves the model's
    parameters by one step of gradient descent on

        F(θ) = mean_i L_i(U_i(θ)),

    where U_i does ``num_updates`` gradient steps on L_i, and returns the
    model. As in the article, a task adapts on the loss that it is judged on
    (support = query), the outer step is taken here and not by an optimiser,
    and ``model`` itself is changed. Unlike in the article, the gradient is
    that of F: its listing drops the factors I - αH, which makes it FOMAML.

    Parameters
    ----------
    model
        A module. Its frozen parameters (``requires_grad=False``) are passed to
        the tasks, and stay.
    inner_lr, outer_lr
        The rates of the inner and of the outer steps, finite numbers.

    Notes
    -----
    The book's ``thm-listing-is-fomaml`` and ``thm-chain-rule``; Finn, Abbeel &
    Levine (2017), algorithm 1. For support and query apart, any optimiser,
    and functions that change nothing, see `companion.meta_gradient` and
    `companion.meta_train`.
    """

    def __init__(self, model: nn.Module, inner_lr: float, outer_lr: float):
        super().__init__()
        for name, lr in (("inner_lr", inner_lr), ("outer_lr", outer_lr)):
            if not math.isfinite(lr):
                raise ValueError(f"{name} must be finite, got {lr!r}")
        self.model = model
        self.inner_lr = inner_lr
        self.outer_lr = outer_lr

    def forward(self, tasks: Iterable[LossTask], num_updates: int) -> nn.Module:
        """Step the model once, on the mean over ``tasks``.

        Parameters
        ----------
        tasks
            Objects with ``loss(model, params)``, a scalar computed from
            ``params``, which come in the order of ``model.parameters()``
            (``torch.func.functional_call`` is the way to run a module on
            them).
        num_updates
            The number K of inner steps; with 0 the step is joint training.

        Returns
        -------
        nn.Module
            ``model``, changed.

        Raises
        ------
        ValueError
            If there are no tasks, ``num_updates`` is negative or no integer, a
            loss is no finite scalar, or a loss does not depend on ``params``.
            The model is then as it was.
        """
        parameters = list(self.model.parameters())
        learned = [k for k, p in enumerate(parameters) if p.requires_grad]
        if not learned:
            raise ValueError(
                "the model has no parameter that requires a gradient; "
                "unfreeze one with .requires_grad_()"
            )
        try:
            inner = GradientDescent(self.inner_lr, num_updates)
        except ValueError as error:
            raise ValueError(
                "num_updates must be a non-negative integer, got "
                f"{num_updates!r}"
            ) from error

        def loss(theta, task):
            params = [p.detach() for p in parameters]
            for k, value in zip(learned, theta):
                params[k] = value
            return task[0].loss(self.model, params)

        # In a list of one, any object with a loss is data like any other.
        tasks = [Task([task], [task]) for task in tasks]
        theta = [parameters[k].detach() for k in learned]
        slopes = meta_gradient(loss, theta, tasks, inner)
        with torch.no_grad():
            for k, slope in zip(learned, slopes):
                parameters[k].sub_(self.outer_lr * slope)
        return self.model


def meta_learning_ode(theta: Any, t: float, tasks: Iterable[GradientTask]):
    """The article's vector field, dθ/dt = -Σ_i ∇L_i(θ): joint training.

    It is not meta-learning. A task here has only a gradient, and the gradient
    is taken at θ, not after adapting; so the flow descends the joint loss
    Σ_i L_i, its equilibria are the stationary points of that loss, and the
    meta-objective may well increase along it. The flow of the meta-objective
    needs the tasks' Hessians along the inner steps, or losses that can be
    differentiated twice: its right-hand side is minus what
    `companion.meta_gradient`, which takes losses, returns.

    Parameters
    ----------
    theta
        A number, an array or a tensor.
    t
        The time, which the field does not depend on. It stands second, as
        ``scipy.integrate.odeint`` has it; ``solve_ivp`` wants it first.
    tasks
        Objects with ``grad(theta)``, shaped as ``theta``.

    Returns
    -------
    same kind as ``theta``
        The velocity.

    Raises
    ------
    ValueError
        If there are no tasks, or a gradient is not shaped as ``theta``.

    Notes
    -----
    The sum over tasks is the article's. Its price: the curvatures add up. For
    quadratic losses with Hessians A_i, whose sum A is positive definite,
    Euler's method converges from every start just when its step is positive
    and below 2/‖A‖, where ‖A‖ is the largest eigenvalue of A; for the mean of
    N tasks the bound is N times as large (the book's ``prop-stable-step``).
    """
    velocity = None
    for task in tasks:
        slope = task.grad(theta)
        if np.shape(slope) != np.shape(theta):
            raise ValueError(
                "a task's grad(theta) must be shaped as theta, got shape "
                f"{tuple(np.shape(slope))} for {tuple(np.shape(theta))}"
            )
        velocity = -slope if velocity is None else velocity - slope
    if velocity is None:
        raise ValueError("tasks must not be empty, got none")
    return velocity


def solve_meta_learning_ode(
    theta0: Any,
    tasks: Iterable[GradientTask],
    T: float = 1.0,
    dt: float = 0.01,
):
    """The article's flow from ``theta0`` to time T, by explicit Euler steps.

    This is gradient descent on the joint loss Σ_i L_i: see
    `meta_learning_ode` for why it is not meta-learning.

    Parameters
    ----------
    theta0
        The start: a number, an array or list of numbers, or a tensor.
        Integers become float64; floats keep their precision. Not changed.
    tasks
        Objects with ``grad(theta)``, shaped as ``theta``.
    T
        The time to end at, which the last row does exactly; 0 is allowed.
    dt
        The largest step: n = ⌈T/dt⌉ equal steps are taken.

    Returns
    -------
    ndarray or Tensor
        The n + 1 states, stacked: row k is the state at time kT/n, so
        ``np.linspace(0, T, len(result))`` are their times. A tensor if
        ``theta0`` is one, else an array.

    Raises
    ------
    ValueError
        If there are no tasks, T is negative, ``dt`` is not positive, or the
        states overflow, as they do when ``dt`` is too large for the sum over
        tasks (see `meta_learning_ode`).
    """
    if not (0 <= T < math.inf):
        raise ValueError(f"T must be a finite time of at least 0, got {T!r}")
    if not (0 < dt < math.inf):
        raise ValueError(f"dt must be a positive finite step, got {dt!r}")
    tasks = list(tasks)
    if not tasks:
        raise ValueError("tasks must not be empty, got none")
    tensor = isinstance(theta0, torch.Tensor)
    theta = _as_floats(theta0)
    # T/dt may come out a rounding error above the integer that was meant.
    n = math.ceil(T / dt * (1 - 1e-12))
    states = [theta]
    for k in range(n):
        velocity = meta_learning_ode(theta, k * T / n, tasks)
        theta = theta + (T / n) * velocity
        if not _is_finite(theta):
            raise ValueError(
                f"the state is not finite at t = {(k + 1) * T / n:g}; "
                f"dt = {dt!r} may be too large for the sum over "
                f"{len(tasks)} tasks, whose curvatures add up"
            )
        states.append(theta)
    return torch.stack(states) if tensor else np.stack(states)


def _as_floats(theta):
    if isinstance(theta, torch.Tensor):
        theta = theta.detach().clone()
        return theta if theta.is_floating_point() else theta.double()
    theta = np.array(theta)
    return theta.astype(float) if theta.dtype.kind in "biu" else theta


def _is_finite(theta):
    if isinstance(theta, torch.Tensor):
        return bool(torch.isfinite(theta).all())
    theta = np.asarray(theta)
    return theta.dtype.kind == "O" or bool(np.isfinite(theta).all())
