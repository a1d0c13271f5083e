"""The meta-gradient ∇F(θ), by several roads.

Every method is a rule for one task, from the variables to (value, gradient);
the meta-gradient is the mean of the rules' results over the tasks.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, reduce
from operator import add

import torch

from companion.adaptation import (
    InnerAlgorithm,
    Loss,
    adapt,
    check_inner,
    parameters_of,
)
from companion.calculus import (
    Parameters,
    is_finite,
    is_symbolic,
    jacobian,
    scalar,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    under_transform,
    value_and_gradient,
)
from companion.objective import (
    Tasks,
    check_tasks,
    mean,
    per_task,
    task_data,
    task_objective,
)

__all__ = ["METHODS", "meta_gradient", "meta_value_and_gradient"]


def meta_gradient(
    loss: Loss,
    theta: Parameters,
    tasks: Tasks,
    inner: InnerAlgorithm,
    method: str = "reverse",
    wrt: str | tuple[str, ...] = "theta",
):
    """The gradient of the meta-objective, or an estimate of it.

    Parameters
    ----------
    loss, theta, tasks, inner
        As for `meta_objective`.
    method
        * ``"reverse"``: exact, by the chain rule through the inner loop,
          ∇F = (I - αH_0)···(I - αH_{K-1}) ∇L^q(θ_K), averaged over tasks;
        * ``"forward"``: the same by forward sensitivities, one column per
          parameter; cheap in memory, for few parameters;
        * ``"first_order"``: FOMAML, the query gradient ∇L^q(θ_K);
        * ``"reptile"``: (θ - θ_K)/α, the sum of the K inner gradients; the
          query data do not enter. With one step it is the plain gradient;
        * ``"finite_difference"``: central differences of F, the slow referee;
        * ``"adjoint"``, ``"implicit"``: other names for ``"reverse"`` with
          `GradientFlow` and `Proximal`, whose reverse modes they are.
    wrt
        ``"theta"``, the name of a parameter of ``inner`` such as ``"lr"``, or
        a tuple of such names. First-order estimates know only ``"theta"``.

    Returns
    -------
    Parameters
        Structured as ``theta`` (or as the named parameter); for a tuple
        ``wrt`` a named tuple of them, in its order. Detached, unless computed
        inside a `torch.func` transform, where it is differentiable.

    Raises
    ------
    ValueError
        If the method does not exist or does not fit ``inner``, and as
        `meta_objective` does.

    Notes
    -----
    The book's ``thm-chain-rule`` for the exact methods; Finn, Abbeel & Levine
    (2017) for MAML and FOMAML, Nichol, Achiam & Schulman (2018) for Reptile.
    """
    return meta_value_and_gradient(loss, theta, tasks, inner, method, wrt)[1]


def meta_value_and_gradient(
    loss: Loss,
    theta: Parameters,
    tasks: Tasks,
    inner: InnerAlgorithm,
    method: str = "reverse",
    wrt: str | tuple[str, ...] = "theta",
):
    """The pair (F(θ), `meta_gradient`), in one pass over the tasks.

    The value is the meta-objective, whatever the method. Parameters and
    errors are those of `meta_gradient`.
    """
    tasks = check_tasks(tasks, theta)
    problem = Problem.of(loss, theta, inner, wrt)
    rule = _rule(method, problem)
    # A graph is kept only for a transform around us, which asked for it.
    with torch.set_grad_enabled(
        under_transform(theta, parameters_of(inner), task_data(tasks))
    ):
        results = per_task(
            lambda task: rule(problem, task), tasks, theta, inner
        )
        value, slope = mean(results)
        if not is_finite(value, slope):
            # Task by task, the inner loop itself says where it broke.
            per_task(
                lambda task: adapt(loss, theta, task.support, inner),
                list(tasks),
                theta,
                inner,
            )
            raise ValueError(
                "the query loss or its gradient is not finite at the adapted "
                f"parameters: the mean loss is {float(value)}"
            )
    if isinstance(wrt, str):
        return value, slope[wrt]
    return value, _named(tuple(wrt))(**slope)


@cache
def _named(names):
    return namedtuple("MetaGradient", names)


@dataclass(frozen=True)
class Problem:
    """What is differentiated: θ, or parameters of the inner algorithm."""

    loss: Loss
    theta: Parameters
    inner: InnerAlgorithm
    variables: dict[str, Parameters]

    @classmethod
    def of(cls, loss, theta, inner, wrt):
        check_inner(inner)
        names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
        known = ("theta", *parameters_of(inner))
        for name in names:
            if name not in known:
                raise ValueError(
                    f"wrt must name {' or '.join(map(repr, known))}, "
                    f"got {name!r}"
                )
        variables = {
            name: theta
            if name == "theta"
            else _as_variable(name, getattr(inner, name), theta)
            for name in names
        }
        return cls(loss, theta, inner, variables)

    def objective(self, variables, task):
        """L^q(U(θ)) of one task, as a function of the variables."""
        rest = dict(variables)
        theta = rest.pop("theta", self.theta)
        inner = replace(self.inner, **rest) if rest else self.inner
        return task_objective(self.loss, theta, task, inner)


def _as_variable(name, value, theta):
    """A parameter of the inner algorithm as something to differentiate by."""
    if is_symbolic(theta):
        return value
    like = next(x for x in tree_leaves(theta))

    def as_tensor(x):
        if isinstance(x, int) or not isinstance(x, (float, torch.Tensor)):
            raise TypeError(
                f"the meta-gradient with respect to {name} needs a float or "
                f"a float tensor, got {x!r}"
            )
        return torch.as_tensor(x, dtype=like.dtype, device=like.device)

    return tree_map(as_tensor, value)


# The rules: (problem, task) -> (value, gradient by name). -------------------


def _reverse(problem, task):
    return value_and_gradient(problem.objective)(problem.variables, task)


def _forward(problem, task):
    slope = jacobian(problem.objective, mode="forward")
    return (
        problem.objective(problem.variables, task),
        slope(problem.variables, task),
    )


def _first_order(problem, task):
    adapted = adapt(problem.loss, problem.theta, task.support, problem.inner)
    value, slope = value_and_gradient(problem.loss)(adapted, task.query)
    return value, {"theta": slope}


def _reptile(problem, task):
    loss, theta = problem.loss, problem.theta
    adapted, slopes = theta, []
    for adapted, slope in problem.inner.moves(loss, theta, task.support):
        slopes.append(slope)
    total = tree_map(lambda *each: reduce(add, each), *slopes)
    return scalar(loss(adapted, task.query)), {"theta": total}


def _finite_difference(problem, task):
    leaves, structure = tree_flatten(problem.variables)

    def objective(k, leaf):
        moved = [*leaves[:k], leaf, *leaves[k + 1 :]]
        return problem.objective(tree_unflatten(moved, structure), task)

    def slope(k, leaf):
        columns = []
        for unit in torch.eye(leaf.numel(), dtype=leaf.dtype):
            unit = unit.to(leaf.device).reshape(leaf.shape)
            size = (leaf * unit).sum().abs().clamp(min=1)
            step = torch.finfo(leaf.dtype).eps ** (1 / 3) * size * unit
            right, left = leaf + step, leaf - step
            rise = objective(k, right) - objective(k, left)
            columns.append(rise / (right - left).sum())
        return torch.stack(columns).reshape(leaf.shape)

    slopes = [slope(k, leaf) for k, leaf in enumerate(leaves)]
    value = problem.objective(problem.variables, task)
    return value, tree_unflatten(slopes, structure)


METHODS: dict[str, Callable] = {
    "reverse": _reverse,
    "forward": _forward,
    "first_order": _first_order,
    "reptile": _reptile,
    "finite_difference": _finite_difference,
    # The reverse mode of the algorithms that bring a derivative of their own.
    "adjoint": _reverse,
    "implicit": _reverse,
}
_ANY_PATH = ("reverse", "forward", "first_order", "finite_difference")
_THETA_ONLY = ("first_order", "reptile")


def _rule(method, problem):
    fitting = getattr(problem.inner, "methods", _ANY_PATH)
    if method not in fitting:
        raise ValueError(
            f"method must be one of {', '.join(map(repr, fitting))} for "
            f"{type(problem.inner).__name__}, got {method!r}"
        )
    if method in _THETA_ONLY and set(problem.variables) != {"theta"}:
        raise ValueError(
            f"method {method!r} estimates the gradient with respect to "
            f"'theta' only, got wrt {tuple(problem.variables)}"
        )
    if method == "reptile" and problem.inner.steps == 0:
        raise ValueError(
            "method 'reptile' needs at least one inner step, got steps=0: "
            "its direction θ - θ_K would be zero"
        )
    if method == "finite_difference" and is_symbolic(problem.theta):
        raise ValueError(
            "method 'finite_difference' needs numbers, got symbols; "
            "use 'reverse'"
        )
    return getattr(problem.inner, "rules", {}).get(method) or METHODS[method]
