"""Derivatives of programs, on sympy symbols and on torch tensors alike.

Everything here takes a function and returns a function. The derivative itself
is the one place in the package where the two algebras part ways: sympy
differentiates the expression that the program builds, torch differentiates the
program. What is built *from* derivatives (the Hessian, its products, the
meta-gradient) is written once.

``theta`` is a sympy expression, a sympy matrix, a torch tensor, or a (nested)
dict, list or tuple of these. A vector is a sympy column or a 1-D tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce, wraps
from typing import Any

import sympy as sp
import torch
from torch.utils import _pytree as pytree

__all__ = [
    "Parameters",
    "dot",
    "gradient",
    "hessian",
    "hessian_vector_product",
    "jacobian",
    "value_and_gradient",
]

Parameters = Any  # a tensor, a sympy expression or matrix, or a tree of them


def value_and_gradient(f: Callable) -> Callable:
    """The value and the gradient of a scalar function, in one pass.

    Parameters
    ----------
    f
        ``f(theta, *args)``, a scalar: a 0-d tensor, a sympy expression or a
        1×1 sympy matrix.

    Returns
    -------
    Callable
        ``(theta, *args) -> (f, df/dtheta)``; the gradient has the structure,
        the shapes and (tensors) the dtype of ``theta``. A part of ``theta``
        that ``f`` does not use has gradient zero.

    Raises
    ------
    TypeError
        If ``theta`` holds anything but float tensors or sympy expressions.
    ValueError
        If ``f`` is not a scalar, or (tensors) does not depend on ``theta`` at
        all, as when the graph was cut by ``.data`` or ``detach``.
    """

    @wraps(f)
    def of(theta, *args):
        if is_symbolic(theta):
            return _symbolic_value_and_gradient(f, theta, args)
        check_parameters(theta)

        # A closure, so that torch.func leaves the other arguments alone.
        def checked(theta):
            try:
                value = scalar(f(theta, *args))
            except RuntimeError as error:
                error.add_note(f"in the loss, with {_shapes(theta)}")
                raise
            _check_dependence(value, theta)
            return value

        gradient, value = torch.func.grad_and_value(checked)(theta)
        return value, gradient

    return of


def gradient(f: Callable) -> Callable:
    """The gradient of a scalar function with respect to its first argument.

    ``gradient(f)(theta, *args)`` is ∂f/∂θ, structured as ``theta``. See
    `value_and_gradient` for what ``f`` may be and for the errors raised.

    Examples
    --------
    >>> x = sp.Symbol("x")
    >>> gradient(lambda x: x**3)(x)
    3*x**2
    >>> gradient(lambda x: x**3)(torch.tensor(2.0))
    tensor(12.)
    """

    @wraps(f)
    def of(theta, *args):
        return value_and_gradient(f)(theta, *args)[1]

    return of


def jacobian(f: Callable, mode: str = "reverse") -> Callable:
    """The Jacobian of a function with respect to its first argument.

    Parameters
    ----------
    f
        ``f(theta, *args)``: a scalar, a vector, or a tree of them.
    mode
        ``"reverse"`` (a backward pass per output) or ``"forward"`` (a forward
        pass per input); the same numbers at another price. On symbols there
        is nothing to choose.

    Returns
    -------
    Callable
        For vectors of n inputs and m outputs an m×n matrix; where one of the
        two is a scalar, a vector; for trees, the output's tree of the input's
        tree of such blocks.
    """
    if mode not in ("reverse", "forward"):
        raise ValueError(f"mode must be 'reverse' or 'forward', got {mode!r}")

    @wraps(f)
    def of(theta, *args):
        if is_symbolic(theta):
            return _symbolic_jacobian(f, theta, args)
        check_parameters(theta)
        if mode == "forward":
            return _forward_jacobian(f, theta, args)
        return torch.func.jacrev(lambda theta: f(theta, *args))(theta)

    return of


def hessian(f: Callable) -> Callable:
    """The Hessian of a scalar function: the Jacobian of its gradient.

    ``hessian(f)(theta, *args)`` is an n×n matrix when ``theta`` is a vector,
    a scalar when it is one, and for trees the tree of trees of blocks.
    """
    return jacobian(gradient(f))


def hessian_vector_product(f: Callable) -> Callable:
    """The product of the Hessian with a vector, without forming the Hessian.

    ``hessian_vector_product(f)(theta, v, *args)`` is ∇⟨∇f(θ), v⟩ (Pearlmutter
    1994), structured as ``theta``: two gradients' work, whatever the size of
    ``theta``. ``v`` is structured as ``theta``.
    """

    @wraps(f)
    def of(theta, v, *args):
        def directional(theta):
            return dot(gradient(f)(theta, *args), v)

        return gradient(directional)(theta)

    return of


def dot(u: Parameters, v: Parameters):
    """The scalar product ⟨u, v⟩ of two parameters of the same structure.

    Tensors, sympy columns, plain numbers, and trees of them (the sum over the
    leaves).

    Raises
    ------
    ValueError
        If the structures or the shapes differ.
    """
    products = tree_map(_dot, u, v)
    return reduce(operator.add, pytree.tree_leaves(products))


def _dot(u, v):
    shapes = getattr(u, "shape", ()), getattr(v, "shape", ())
    if tuple(shapes[0]) != tuple(shapes[1]):
        raise ValueError(
            f"dot needs two arguments of one shape, got {tuple(shapes[0])} "
            f"and {tuple(shapes[1])}"
        )
    product = times(u, v)
    if isinstance(product, sp.MatrixBase):
        return reduce(operator.add, product, sp.S.Zero)
    return product.sum() if isinstance(product, torch.Tensor) else product


# The algebra that the rest of the package is written in. --------------------


def tree_map(f: Callable, tree: Parameters, *rest: Parameters) -> Parameters:
    """Apply ``f`` leaf by leaf to trees of one structure."""
    try:
        return pytree.tree_map(f, tree, *rest)
    except ValueError as error:
        structures = {str(pytree.tree_structure(t)) for t in (tree, *rest)}
        if len(structures) == 1:
            raise
        raise ValueError(
            "these must have the same structure, got "
            + " and ".join(sorted(structures))
        ) from error


tree_leaves = pytree.tree_leaves
tree_flatten = pytree.tree_flatten
tree_unflatten = pytree.tree_unflatten
tree_structure = pytree.tree_structure


def ravel(theta: Parameters) -> tuple[torch.Tensor, Callable]:
    """Tensors as one vector, and the function that brings them back."""
    leaves, structure = tree_flatten(theta)

    def unravel(vector):
        parts = vector.split([x.numel() for x in leaves])
        shaped = [p.reshape(x.shape) for p, x in zip(parts, leaves)]
        return tree_unflatten(shaped, structure)

    return torch.cat([x.reshape(-1) for x in leaves]), unravel


def times(u, v):
    """The elementwise product of two leaves, or a scalar times a leaf."""
    if isinstance(u, sp.MatrixBase) and isinstance(v, sp.MatrixBase):
        return u.multiply_elementwise(v)
    return u * v


def is_symbolic(theta: Parameters) -> bool:
    """Whether any leaf of ``theta`` is a sympy object."""
    return any(
        isinstance(leaf, (sp.Basic, sp.MatrixBase))
        for leaf in tree_leaves(theta)
    )


def scalar(value):
    """The value of a loss, checked to be one number of one of the algebras."""
    if isinstance(value, sp.MatrixBase):
        if value.shape != (1, 1):
            raise ValueError(
                "a loss must be a scalar, got a sympy matrix of shape "
                f"{value.shape}; a scalar product is dot(u, v)"
            )
        return value[0, 0]
    if isinstance(value, torch.Tensor):
        if value.ndim:
            raise ValueError(
                "a loss must be a scalar, got a tensor of shape "
                f"{tuple(value.shape)}; reduce it, for example with .mean()"
            )
        if value.is_complex():
            raise TypeError(f"a loss must be a real number, got {value.dtype}")
        return value
    if isinstance(value, (sp.Expr, int, float)):
        return sp.sympify(value)
    raise TypeError(
        "a loss must return a 0-d tensor or a sympy expression, got "
        f"{type(value).__name__}"
    )


def check_parameters(theta: Parameters) -> None:
    """Raise unless ``theta`` is a tree of float tensors of one dtype."""
    leaves = tree_leaves(theta)
    if not leaves:
        raise ValueError("theta must hold at least one tensor, got none")
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(
                "theta must hold torch tensors or sympy expressions, got "
                f"{type(leaf).__name__}; for a number write torch.tensor(...)"
            )
        if not leaf.is_floating_point():
            raise TypeError(
                f"theta must hold floating-point tensors, got {leaf.dtype}; "
                "convert it with .to(torch.float64)"
            )
    if len({(leaf.dtype, leaf.device) for leaf in leaves}) > 1:
        raise ValueError(
            "theta must be of one dtype and on one device, got "
            + ", ".join(sorted({f"{x.dtype} on {x.device}" for x in leaves}))
        )


def is_finite(*trees: Parameters) -> bool:
    """Whether every float in the trees is finite; True where nobody can tell.

    Symbols have no value, and a tensor inside `torch.func.vmap` shows none:
    there the caller outside the vmap checks the result.
    """
    tensors = [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]
    if any(_functorch.is_batchedtensor(_peeled(x)) for x in tensors):
        return True
    return all(bool(torch.isfinite(x).all()) for x in tensors)


# Symbols. -------------------------------------------------------------------


def _variables(theta):
    """Fresh variables shaped as theta, and what to put back for them.

    Differentiating by fresh variables makes the derivative partial: a θ that
    also stands in the other arguments is not touched, and the point of
    differentiation may be any expression.
    """
    back = {}

    def fresh(leaf):
        if isinstance(leaf, sp.MatrixExpr):
            raise TypeError(
                "theta must be an explicit sympy matrix, got the symbol "
                f"{leaf}; use {leaf}.as_explicit()"
            )
        if isinstance(leaf, sp.MatrixBase):
            # Not applyfunc, which gives equal entries one variable.
            return type(leaf)(*leaf.shape, [fresh(x) for x in leaf])
        leaf = sp.sympify(leaf)
        assumptions = (
            leaf.assumptions0 if leaf.is_Symbol else {"real": leaf.is_real}
        )
        variable = sp.Dummy("x", **assumptions)
        back[variable] = leaf
        return variable

    return tree_map(fresh, theta), back


def _put_back(expression, back):
    # xreplace is much the faster, but would write Derivative(L(a*b), a*b).
    if expression.has(sp.Derivative, sp.Subs, sp.Integral):
        return expression.subs(back)
    return expression.xreplace(back)


def _symbolic_value_and_gradient(f, theta, args):
    variables, back = _variables(theta)
    value = scalar(f(variables, *args))

    def derivative(leaf):
        if isinstance(leaf, sp.MatrixBase):
            return leaf.applyfunc(derivative)
        return _put_back(sp.diff(value, leaf), back)

    return _put_back(value, back), tree_map(derivative, variables)


def _symbolic_jacobian(f, theta, args):
    variables, back = _variables(theta)

    def block(y, x):
        rows = list(y) if isinstance(y, sp.MatrixBase) else [sp.sympify(y)]
        columns = list(x) if isinstance(x, sp.MatrixBase) else [x]
        entries = [
            [_put_back(sp.diff(row, column), back) for column in columns]
            for row in rows
        ]
        if not isinstance(y, sp.MatrixBase):
            entries = sp.Matrix(entries[0])
            return entries if isinstance(x, sp.MatrixBase) else entries[0]
        return sp.Matrix(entries)

    return tree_map(
        lambda y: tree_map(lambda x: block(y, x), variables),
        f(variables, *args),
    )


# Tensors. The only lines that look below torch's public surface. ------------

_functorch = torch._C._functorch


def under_transform(*trees: Parameters) -> bool:
    """Whether a tensor in the trees is inside a `torch.func` transform."""
    return any(
        isinstance(leaf, torch.Tensor)
        and _functorch.is_functorch_wrapped_tensor(leaf)
        for leaf in tree_leaves(trees)
    )


def select(x: torch.Tensor, index: Any) -> torch.Tensor:
    """``x[index]``, a constant in every transform that ``x`` is not part of.

    Inside a transform torch wraps whatever comes out of an operation, and one
    could not tell any more that nobody differentiates with respect to it.
    """
    if under_transform(x):
        return x[index]
    with torch._C._DisableFuncTorch():
        return x[index]


def differentiated(inputs: Any) -> bool:
    """Whether somebody outside is differentiating with respect to these."""
    return under_transform(inputs) or (
        torch.is_grad_enabled()
        and any(
            isinstance(x, torch.Tensor) and x.requires_grad
            for x in tree_leaves(inputs)
        )
    )


def _peeled(tensor):
    """The tensor without the layers that differentiation put around it."""
    while _functorch.is_gradtrackingtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _forward_jacobian(f, theta, args):
    # Not torch.func.jacfwd: it gives the data no tangents, and the mean of
    # F.mse_loss then fails (pytorch #123996). Here the data's are zeros.
    leaves, structure = tree_flatten(theta)
    data, rest = tree_flatten(args)
    floats = [
        k for k, x in enumerate(data)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]  # fmt: skip

    def g(leaves, tensors):
        for k, x in zip(floats, tensors):
            data[k] = x
        return f(tree_unflatten(leaves, structure), *tree_unflatten(data, rest))

    point = leaves, [data[k] for k in floats]
    zeros = [torch.zeros_like(x) for x in point[1]]

    def block(k):
        x = leaves[k]

        def column(unit):
            along = [torch.zeros_like(y) for y in leaves]
            along[k] = unit.reshape(x.shape)
            return torch.func.jvp(g, point, (along, zeros))[1]

        units = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        columns = torch.func.vmap(column)(units)
        return tree_map(
            lambda c: c.movedim(0, -1).reshape((*c.shape[1:], *x.shape)),
            columns,
        )

    blocks = [block(k) for k in range(len(leaves))]
    outputs = [tree_flatten(b) for b in blocks]
    by_output = [
        tree_unflatten(list(parts), structure)
        for parts in zip(*(parts for parts, _ in outputs))
    ]
    return tree_unflatten(by_output, outputs[0][1])


def _shapes(theta):
    shapes = tree_map(lambda leaf: tuple(leaf.shape), theta)
    return f"theta of the shape {shapes}; do its data fit that?"


def _check_dependence(value, theta):
    if not isinstance(value, torch.Tensor):
        # A plain number: computed from no tensor, or taken out by .item().
        value = torch.tensor(0.0)
    level = max(_functorch.maybe_get_level(x) for x in tree_leaves(theta))
    if _functorch.maybe_get_level(value) != level or not value.requires_grad:
        raise ValueError(
            "the loss does not depend on theta, so it has no gradient; "
            "does the loss use its first argument, and does nothing in it "
            "cut the graph (.data, .detach(), .item(), torch.no_grad)?"
        )
