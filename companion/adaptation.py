"""Inner algorithms: how a task adapts the parameters it is given.

An inner algorithm is anything with a method

    path(loss, theta, data) -> iterator over θ_0 = theta, θ_1, ..., θ_K = θ'

so momentum, Adam or per-step rates are a few lines of the reader's own (the
chapter "The chain rule" writes three such algorithms in its section
*Differentiating the inner algorithm itself*).
`GradientDescent` is the one that MAML uses.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import sympy as sp
import torch

from companion.calculus import (
    Parameters,
    check_parameters,
    is_finite,
    is_symbolic,
    times,
    tree_leaves,
    tree_map,
    tree_structure,
    value_and_gradient,
)

__all__ = ["GradientDescent", "InnerAlgorithm", "adapt", "adaptation_path"]

Loss = Callable[[Parameters, Any], Any]


@runtime_checkable
class InnerAlgorithm(Protocol):
    """What `adapt` needs: the path that the parameters take.

    Optional: ``methods``, the names of the meta-gradient methods that fit the
    algorithm (by default those that need nothing but the path).
    """

    def path(
        self, loss: Loss, theta: Parameters, data: Any
    ) -> Iterator[Parameters]:
        """Yield θ_0 = ``theta``, then every later iterate."""
        ...


def parameters_of(inner: InnerAlgorithm) -> dict[str, Any]:
    """The algorithm's own parameters (rates, step counts, ...) by name."""
    if is_dataclass(inner):
        return {f.name: getattr(inner, f.name) for f in fields(inner)}
    return dict(getattr(inner, "__dict__", {}))


@dataclass(frozen=True, eq=False)
class GradientDescent:
    """K explicit gradient steps, θ_{k+1} = θ_k - α ∇L(θ_k).

    Parameters
    ----------
    lr
        The rate α: a number, a 0-d tensor, a sympy expression, or learned
        rates structured as ``theta``, multiplied elementwise (Meta-SGD).
    steps
        The number K of steps, a non-negative integer; with 0 the parameters
        stay, and the meta-objective is that of joint training.
    minibatches
        If true, the data hold a fresh minibatch for every step: a list of K
        data, or tensors with a leading axis of length K.

    Raises
    ------
    ValueError
        If ``steps`` is negative or no integer, or ``lr`` is not finite.
    """

    lr: Any
    steps: int
    minibatches: bool = False

    methods = (
        "reverse", "forward", "first_order", "reptile", "finite_difference",
    )  # fmt: skip

    def __post_init__(self):
        try:
            steps = -1 if isinstance(self.steps, bool) else self.steps
            steps = operator.index(steps)
        except TypeError:
            steps = -1
        if steps < 0:
            raise ValueError(
                f"steps must be a non-negative integer, got {self.steps!r}"
            )
        object.__setattr__(self, "steps", steps)
        for rate in tree_leaves(self.lr):
            if isinstance(rate, numbers.Real) and not math.isfinite(rate):
                raise ValueError(f"lr must be finite, got {rate!r}")
            tensor = isinstance(rate, torch.Tensor) and not rate.is_meta
            if tensor and not is_finite(rate):
                raise ValueError(f"lr must be finite, got {rate!r}")
            if not isinstance(
                rate, (numbers.Real, torch.Tensor, sp.Expr, sp.MatrixBase)
            ):
                raise TypeError(
                    "lr must be a number, a tensor, a sympy expression or a "
                    f"tree of them, got {type(rate).__name__}"
                )

    def path(
        self, loss: Loss, theta: Parameters, data: Any
    ) -> Iterator[Parameters]:
        """θ_0, ..., θ_K."""
        yield theta
        for point, _ in self.moves(loss, theta, data):
            yield point

    def moves(self, loss: Loss, theta: Parameters, data: Any) -> Iterator:
        """The pairs (θ_{k+1}, ∇L(θ_k)) for k = 0, ..., K - 1."""
        rates = _rates(self.lr, theta)
        batches = self._batches(data)
        for step in range(self.steps):
            value, slope = value_and_gradient(loss)(theta, batches(step))
            if not is_finite(value, slope):
                raise ValueError(
                    "the support loss or its gradient is not finite (loss "
                    f"{float(value.detach())}) at inner step {step} of "
                    f"{self.steps}; is lr = {self.lr!r} too large for this loss?"
                )
            theta = tree_map(_descend, theta, rates, slope)
            yield theta, slope

    def _batches(self, data: Any) -> Callable:
        if not self.minibatches:
            return lambda step: data
        tensors = (
            [] if isinstance(data, list)
            else [x for x in tree_leaves(data) if isinstance(x, torch.Tensor)]
        )  # fmt: skip
        lengths = {x.shape[0] if x.ndim else None for x in tensors}
        lengths = {len(data)} if isinstance(data, list) else lengths
        if lengths != {self.steps}:
            raise ValueError(
                f"with minibatches=True the data need a leading axis of "
                f"length steps = {self.steps}, got {lengths or 'no tensors'}"
            )
        if isinstance(data, list):
            return data.__getitem__
        return lambda step: tree_map(
            lambda x: x[step] if isinstance(x, torch.Tensor) else x, data
        )


def adapt(
    loss: Loss, theta: Parameters, data: Any, inner: InnerAlgorithm
) -> Parameters:
    """The adapted parameters θ' = U(θ): where the inner algorithm ends.

    Parameters
    ----------
    loss
        ``loss(theta, data)``, a scalar.
    theta
        The initial parameters: tensors or symbols, or a tree of them.
    data
        The support data of one task; anything that ``loss`` understands.
    inner
        The inner algorithm, such as ``GradientDescent(lr, steps)``.

    Returns
    -------
    Parameters
        θ', structured as ``theta``. Differentiable: ``gradient`` of anything
        built from it is the exact meta-gradient.

    Raises
    ------
    ValueError, TypeError
        If the loss is not a finite scalar that depends on ``theta``, or the
        data are on another dtype or device than ``theta``.

    Notes
    -----
    The book's equation ``eq-adaptation``; Finn, Abbeel & Levine (2017), eq. 1.
    """
    for adapted in _path(loss, theta, data, inner):
        pass
    return adapted


def adaptation_path(
    loss: Loss, theta: Parameters, data: Any, inner: InnerAlgorithm
) -> list[Parameters]:
    """The K + 1 parameters θ_0 = θ, θ_1, ..., θ_K = θ' of `adapt`.

    No two entries share memory, and none shares it with ``theta``.
    """
    path = _path(loss, theta, data, inner)
    return [
        tree_map(lambda x: x.clone() if hasattr(x, "clone") else x, point)
        for point in path
    ]


def _path(loss, theta, data, inner):
    check_inner(inner)
    check_data(theta, data)
    return inner.path(loss, theta, data)


def check_inner(inner: InnerAlgorithm) -> None:
    """Raise unless ``inner`` is an inner algorithm."""
    if isinstance(inner, type) or not isinstance(inner, InnerAlgorithm):
        raise TypeError(
            "inner must be an inner algorithm such as GradientDescent(lr=0.1, "
            f"steps=1), got {inner!r}"
        )


def check_data(theta: Parameters, data: Any, name: str = "data") -> None:
    """Raise unless ``theta`` is sound and the tensors in ``data`` fit it."""
    symbolic = is_symbolic(theta)
    if not symbolic:
        check_parameters(theta)
    for x in tree_leaves(data):
        if not isinstance(x, torch.Tensor):
            continue
        if symbolic:
            raise TypeError(
                f"theta is symbolic but {name} holds tensors; "
                "give both as symbols or both as tensors"
            )
        like = tree_leaves(theta)[0]
        if x.device != like.device:
            raise ValueError(
                f"{name} is on {x.device} but theta is on {like.device}; "
                f"move one of them with .to({str(like.device)!r})"
            )
        if x.is_floating_point() and x.dtype != like.dtype:
            raise ValueError(
                f"{name} holds {x.dtype} but theta holds {like.dtype}; "
                f"convert one of them with .to({like.dtype})"
            )


def _descend(theta, rate, slope):
    # Never torch.add(theta, slope, alpha=-rate): see the book's notes on
    # compiled programs, which can lose that factor without a word.
    return theta - times(rate, slope)


def _rates(lr, theta):
    """The rate of every leaf of ``theta``."""
    structure = tree_structure(theta)
    if tree_structure(lr) == structure:
        return tree_map(_fitting_rate, lr, theta)
    if tree_structure(lr) != tree_structure(0):
        raise ValueError(
            "lr must be a scalar or structured as theta, got the structure "
            f"{tree_structure(lr)} for {structure}"
        )
    return tree_map(lambda leaf: _fitting_rate(lr, leaf), theta)


def _fitting_rate(rate, leaf):
    if isinstance(leaf, torch.Tensor) and isinstance(
        rate, (sp.Basic, sp.MatrixBase)
    ):
        raise TypeError(
            f"lr is the sympy object {rate} but theta holds tensors; "
            "convert it with float(lr)"
        )
    shape = tuple(getattr(rate, "shape", ()))
    if shape not in ((), tuple(getattr(leaf, "shape", ()))):
        raise ValueError(
            "lr must be a scalar or shaped as the parameter it moves, got "
            f"shape {shape} for a parameter of shape {tuple(leaf.shape)}"
        )
    if (
        isinstance(rate, torch.Tensor)
        and isinstance(leaf, torch.Tensor)
        and (shape and rate.dtype != leaf.dtype or rate.device != leaf.device)
    ):
        raise ValueError(
            f"lr is {rate.dtype} on {rate.device} but theta is {leaf.dtype} "
            f"on {leaf.device}; convert it with .to(theta)"
        )
    return rate
