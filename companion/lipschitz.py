"""Lipschitz constants: of networks, of adaptation, of the meta-gradient.

A Lipschitz constant of f is a number C with ‖f(x) - f(y)‖ ≤ C ‖x - y‖ for all
x and y, in Euclidean norms; Lip(f) is the smallest. The functions on networks
bracket it: sampled Jacobians from below, a product over layers from above, and
on small ReLU networks the value itself. They copy the module, compute in
float64 on the CPU and return a float. The functions on adaptation and on the
meta-objective are plain formulas in the constants of a loss, and take numbers,
0-d tensors and sympy symbols alike. Derived in the chapters "Networks and
robustness" and "Smoothness of the meta-objective".
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.optimize
import sympy as sp
import torch
from torch import nn

from companion.calculus import Parameters, jacobian

__all__ = [
    "LinearRegion",
    "PowerIteration",
    "Residual",
    "adaptation_lipschitz",
    "certified_radius",
    "linear_regions",
    "lipschitz_exact",
    "lipschitz_lower_bound",
    "lipschitz_upper_bound",
    "power_iteration",
    "safe_meta_step",
    "smoothness_bound",
    "spectral_norm",
    "strong_convexity_bound",
    "with_parameters",
]

Number = Any  # an int, a float, a 0-d tensor or a sympy expression
LARGEST_MATRIX = 1_000_000  # entries of a matrix that is formed for its SVD


class Residual(nn.Module):
    """The residual sum x + f(x) around a module f that keeps the shape.

    Its Lipschitz constant is at most 1 + Lip(f).
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.module(x)


def with_parameters(module: nn.Module, theta: Parameters) -> nn.Module:
    """A copy of a module that holds the parameters ``theta``.

    Parameters
    ----------
    module
        Any module; it is not changed.
    theta
        A dict of tensors by the names of `companion.functional`, such as the
        adapted parameters of a task. Parameters that it does not name stay.

    Raises
    ------
    ValueError
        If ``theta`` names a parameter that the module has not.

    Examples
    --------
    >>> halved = {"weight": torch.eye(2) / 2}
    >>> lipschitz_upper_bound(with_parameters(nn.Linear(2, 2), halved))
    0.5
    """
    module = copy.deepcopy(module)
    try:
        _, unknown = module.load_state_dict(theta, strict=False)
    except RuntimeError as error:
        raise ValueError(f"theta does not fit the module: {error}") from error
    if unknown:
        raise ValueError(
            f"theta names what the module has not, got {sorted(unknown)}; its "
            f"parameters are {[name for name, _ in module.named_parameters()]}"
        )
    return module


# The norm of a linear map. --------------------------------------------------


def spectral_norm(
    matrix_or_layer: Any, input_shape: Sequence[int] | None = None
) -> Any:
    """The spectral norm: the largest singular value, and the smallest
    Lipschitz constant, of a linear map.

    Parameters
    ----------
    matrix_or_layer
        A matrix: a 2-D float tensor, or a real sympy matrix with at most two
        rows or two columns, or diagonal, of which the norm is returned in
        closed form. Or an affine layer: `torch.nn.Linear`, a convolution or
        average pooling.
    input_shape
        For a layer other than Linear, the shape of one input without the
        batch axis: (channels, height, width). The norm depends on it.

    Returns
    -------
    Tensor or sympy expression
        A scalar. For a tensor it is differentiable. A convolution or pooling
        whose matrix has more than a million entries is not written out: its
        norm is that of `power_iteration`, which approaches it from below.

    Raises
    ------
    TypeError, ValueError
        If it is no matrix and no affine layer, a sympy matrix without a closed
        form, or ``input_shape`` is missing or does not fit the layer.

    Notes
    -----
    The largest eigenvalue of a symmetric 2×2 matrix with diagonal a, b and
    off-diagonal c is ½ (a + b + √((a - b)² + 4c²)); here it is AᵀA or AAᵀ.

    Examples
    --------
    >>> a, b = sp.symbols("a b", positive=True)
    >>> spectral_norm(sp.Matrix([[0, a + b], [a, 0]]))
    a + b
    >>> spectral_norm(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    tensor(5.)
    """
    if isinstance(matrix_or_layer, sp.MatrixBase):
        return _symbolic_norm(matrix_or_layer)
    if isinstance(matrix_or_layer, torch.Tensor):
        return torch.linalg.matrix_norm(_matrix(matrix_or_layer), 2)
    layer, shape = _affine(matrix_or_layer, input_shape)
    written = isinstance(layer, nn.Linear)  # its matrix is there already
    if not written and _entries(layer, shape) > LARGEST_MATRIX:
        return torch.tensor(
            power_iteration(layer, shape).norm, dtype=torch.float64
        )
    return torch.linalg.matrix_norm(_layer_matrix(layer, shape), 2)


class PowerIteration(NamedTuple):
    """What `power_iteration` found.

    ``norm`` never exceeds the spectral norm, and some singular value lies
    within ``error`` of it. ``vector`` is the unit input at which ``norm`` is
    attained, and ``norms`` are the norms found, one an iteration.
    """

    norm: float
    error: float
    vector: torch.Tensor
    norms: tuple[float, ...]


def power_iteration(
    matrix_or_layer: Any,
    input_shape: Sequence[int] | None = None,
    *,
    iterations: int = 1000,
    tolerance: float = 1e-10,
    seed: int | torch.Generator = 0,
) -> PowerIteration:
    """The spectral norm by power iteration on AᵀA, with an error estimate.

    v ← AᵀAv / ‖AᵀAv‖ from a random start, so that a layer is only applied and
    transposed, never written out as a matrix.

    Parameters
    ----------
    matrix_or_layer, input_shape
        As for `spectral_norm`; no symbols.
    iterations
        The most that are made.
    tolerance
        Stop when the error estimate is at most ``tolerance`` times the norm.
    seed
        Of the start: an int, or a ``torch.Generator``, which is advanced.

    Returns
    -------
    PowerIteration
        The norm ‖Av‖ and its error estimate, in float64.

    Notes
    -----
    With a unit v, s = ‖Av‖ and the residual r = AᵀAv - s²v, some eigenvalue of
    AᵀA is within ‖r‖ of s², so a singular value is within ‖r‖/s of s, and one
    that is no smaller than s within ‖r‖/2s. It is the largest one unless the
    start was next to orthogonal to the largest one's vector: a bound from
    above for sure is `lipschitz_upper_bound`. The vector's error falls like
    (σ₂/σ₁)^{2k}, the norm's like (σ₂/σ₁)^{4k}.

    Examples
    --------
    >>> found = power_iteration(torch.diag(torch.tensor([3.0, 1.0])))
    >>> round(found.norm, 6), found.error < 1e-9
    (3.0, True)
    """
    if isinstance(iterations, bool) or not isinstance(
        iterations, numbers.Integral
    ):
        raise TypeError(f"iterations must be an integer, got {iterations!r}")
    if iterations < 1:
        raise ValueError(
            f"iterations must be a positive integer, got {iterations}"
        )
    if isinstance(matrix_or_layer, torch.Tensor):
        A = _matrix(matrix_or_layer).detach().double()
        shape, push, pull = A.shape[1:], A.mv, A.T.mv
    else:
        layer, shape = _affine(matrix_or_layer, input_shape)
        push, pull = _applied(layer, shape)
    v = torch.randn(shape, generator=_generator(seed), dtype=torch.float64)
    v, norms = v / v.norm(), []
    for _ in range(iterations):
        image = push(v)
        norms.append(float(image.norm()))
        back = pull(image)
        residual = float((back - norms[-1] ** 2 * v).norm())
        if not math.isfinite(residual):
            raise ValueError("the matrix or layer is not finite")
        error = residual / norms[-1] if norms[-1] else 0.0
        if error <= tolerance * norms[-1]:
            break
        vector, v = v, back / back.norm()
    else:
        v = vector
    return PowerIteration(norms[-1], error, v, tuple(norms))


def _symbolic_norm(A):
    if A.is_diagonal():
        return sp.Max(*(abs(a) for a in A.diagonal()))
    gram = A * A.T if A.rows < A.cols else A.T * A
    if gram.rows == 1:
        return sp.sqrt(gram[0])
    if gram.rows > 2:
        raise ValueError(
            "a sympy matrix needs at most two rows or two columns, or to be "
            f"diagonal, for its norm in closed form, got {A.rows}×{A.cols}; "
            "convert it to a tensor"
        )
    a, b, c = gram[0, 0], gram[1, 1], gram[0, 1]
    root = sp.sqrt(sp.factor((a - b) ** 2 + 4 * c**2))
    return sp.sqrt(sp.factor((a + b + root) / 2))


def _matrix(A):
    if A.ndim != 2 or not A.is_floating_point():
        raise ValueError(
            "a matrix must be a 2-D float tensor, got shape "
            f"{tuple(A.shape)} of {A.dtype}; the norm of a convolution is that "
            "of the layer, with input_shape=(channels, height, width)"
        )
    return A


def _affine(layer, shape):
    """A fixed copy of an affine layer, and the shape of its input."""
    forward = getattr(type(layer), "forward", None)
    if forward not in (*_CONVOLUTIONS, nn.Linear.forward, nn.AvgPool2d.forward):
        raise TypeError(
            "spectral_norm needs a matrix, a Linear, a convolution or an "
            f"AvgPool2d, got {type(layer).__name__}; a network has a "
            "lipschitz_upper_bound"
        )
    if forward is nn.Linear.forward:
        shape = (layer.in_features,)
    if shape is None:
        raise ValueError(
            f"the norm of {layer} depends on the size of its input, got "
            "input_shape=None; pass input_shape=(channels, height, width)"
        )
    return _fixed(layer), tuple(shape)


def _applied(layer, shape):
    """The linear part of an affine layer, and its transpose."""
    origin = torch.zeros(1, *shape, dtype=torch.float64)
    _, pull = torch.func.vjp(layer, origin)

    def push(v):
        return torch.func.jvp(layer, (origin,), (v[None],))[1]

    return push, lambda image: pull(image)[0][0]


def _layer_matrix(layer, shape):
    if isinstance(layer, nn.Linear):
        return layer.weight

    def flat(x):
        return layer(x.reshape(1, *shape)).flatten()

    origin = torch.zeros(math.prod(shape), dtype=torch.float64)
    return jacobian(flat)(origin)


def _entries(layer, shape):
    return math.prod(shape) * math.prod(_output_shape(layer, shape))


def _output_shape(layer, shape):
    return layer(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]


# Networks, from above. ------------------------------------------------------


def lipschitz_upper_bound(
    module: nn.Module, input_shape: Sequence[int] | None = None
) -> float:
    """A Lipschitz constant of a network: the product over its layers.

    Parameters
    ----------
    module
        A layer, or layers nested in `torch.nn.Sequential` and `Residual`:
        Linear (spectral norm), convolutions, average and maximum pooling in
        2-D, batch normalisation with its running statistics, Flatten, dropout
        in evaluation, softmax (½), and elementwise activations, each with the
        largest slope that it has anywhere.
    input_shape
        The shape of one input without the batch axis. With it convolutions
        are bounded by their norm on inputs of this size; without it, by a
        looser number that holds for inputs of all sizes.

    Returns
    -------
    float
        Lip(module) or more, up to rounding.

    Raises
    ------
    ValueError
        If a layer's constant is not known (the message names the layer and
        its place), or it has none: batch normalisation in training mixes the
        examples, dropout in training is another function at each call.

    Notes
    -----
    Szegedy et al. (2014) bound networks so. A convolution whose matrix is too
    large to be written out is a part of the circular one on a torus that its
    full output fits in; there the Fourier transform makes it block-diagonal,
    and a stride only drops outputs. For inputs of all sizes: an input enters
    at most c = Π ⌈k/(s/gcd(s, d))⌉ windows (kernel k, stride s, dilation d an
    axis), so the norm is at most √c times that of the kernel as a matrix
    output channels × (input channels · kernel). Maximum pooling has √c, the
    average over n inputs √(c/n).

    Examples
    --------
    >>> double = nn.Linear(1, 1)
    >>> _ = nn.init.constant_(double.weight, 2.0)
    >>> lipschitz_upper_bound(nn.Sequential(double, nn.Tanh(), double))
    4.0
    >>> lipschitz_upper_bound(Residual(double))
    3.0
    """
    shape = None if input_shape is None else tuple(input_shape)
    return float(_bound(_fixed(module), shape, "")[0])


def _bound(module, shape, name):
    """A module's constant, and the shape of its output where one is known."""
    forward = type(module).forward
    if forward is nn.Sequential.forward:
        product = 1.0
        for key, layer in enumerate(module):  # once for each use
            constant, shape = _bound(layer, shape, f"{name}.{key}".strip("."))
            product *= constant
        return product, shape
    if forward is Residual.forward:
        constant, output = _bound(
            module.module, shape, f"{name}.module".strip(".")
        )
        if output != shape:
            raise ValueError(
                f"the residual sum {name or 'itself'} adds {output} to {shape}"
            )
        return 1 + constant, shape
    if forward not in _CONSTANTS:
        raise ValueError(
            f"the Lipschitz constant of {name or 'the module'} is not known, "
            f"got {module}; compose it with nn.Sequential and Residual of "
            "layers that lipschitz_upper_bound names"
        )
    rule = _CONSTANTS[forward]
    try:
        constant = rule(module, shape) if callable(rule) else rule
        return constant, shape and tuple(_output_shape(module, shape))
    except (ValueError, RuntimeError) as error:
        error.add_note(f"in {name or 'the module'}, {module}")
        raise


def _convolution(layer, shape):
    """The norm of a convolution, or a bound on it."""
    zeros = layer.padding_mode == "zeros"
    if shape and _entries(layer, shape) <= LARGEST_MATRIX:
        return spectral_norm(layer, shape)
    if not zeros:
        raise ValueError(
            "a convolution that does not pad with zeros is bounded only with "
            f"a small input_shape, got {layer.padding_mode!r} and {shape}"
        )
    kernel = layer.weight.unflatten(0, (layer.groups, -1))
    unfolded = kernel.flatten(2)
    windows = _windows(layer.kernel_size, layer.stride, layer.dilation)
    bound = math.sqrt(windows) * torch.linalg.matrix_norm(unfolded, 2).max()
    return min(bound, _on_torus(layer, kernel, shape)) if shape else bound


def _on_torus(layer, kernel, shape):
    """The largest norm of the kernel's Fourier transform on a torus."""
    axes = list(zip(shape[1:], layer.kernel_size, layer.dilation, strict=True))
    spread = kernel.new_zeros(
        *kernel.shape[:3], *(d * (k - 1) + 1 for _, k, d in axes)
    )
    spread[(..., *(slice(None, None, d) for _, _, d in axes))] = kernel
    symbol = torch.fft.fftn(
        spread,
        s=[size + d * (k - 1) for size, k, d in axes],
        dim=list(range(3, 3 + len(axes))),
    )
    return torch.linalg.matrix_norm(symbol.flatten(3).movedim(-1, 0), 2).max()


def _windows(kernel, stride, dilation) -> int:
    """The largest number of windows that one input can enter."""
    axes = zip(_pair(kernel), _pair(stride), _pair(dilation))
    return math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in axes)


def _pair(value):
    return value if isinstance(value, tuple) else (value, value)


def _average_pool(layer, shape):
    if shape and _entries(layer, shape) <= LARGEST_MATRIX:
        return spectral_norm(layer, shape)
    outside = any(_pair(layer.padding)) and not layer.count_include_pad
    if outside or layer.ceil_mode or layer.divisor_override:
        raise ValueError(
            "an average over windows of different sizes is bounded only with "
            f"a small input_shape, got {shape}"
        )
    windows = _windows(layer.kernel_size, layer.stride, 1)
    return math.sqrt(windows / math.prod(_pair(layer.kernel_size)))


def _max_pool(layer, shape):
    return math.sqrt(_windows(layer.kernel_size, layer.stride, layer.dilation))


def _batch_norm(layer, shape):
    scale = torch.rsqrt(layer.running_var + layer.eps)
    return (scale if layer.weight is None else scale * layer.weight).abs().max()


def _gelu(layer, shape):
    # Φ + xφ is largest at x = √2, where the second derivative (2 - x²)φ is 0.
    exact = (1 + math.erf(1)) / 2 + 1 / (math.e * math.sqrt(math.pi))
    return exact if layer.approximate == "none" else 1.12899306865878


# x at which x tanh(x/2) = 2: there the slope of SiLU is largest, ½ + x/4.
_SILU = 2.3993572805154676

_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

# By `forward`, since that is what a layer computes: a subclass that overrides
# it is another layer. A number, or a function of the layer and its input shape.
_CONSTANTS: dict[Callable, float | Callable] = {
    nn.Linear.forward: spectral_norm,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    nn.AvgPool2d.forward: _average_pool,
    nn.MaxPool2d.forward: _max_pool,
    nn.BatchNorm1d.forward: _batch_norm,
    nn.Identity.forward: 1.0,
    nn.Flatten.forward: 1.0,
    nn.Unflatten.forward: 1.0,
    nn.Dropout.forward: 1.0,
    nn.ReLU.forward: 1.0,
    nn.ReLU6.forward: 1.0,
    nn.LeakyReLU.forward: lambda a, _: max(1.0, abs(a.negative_slope)),
    nn.ELU.forward: lambda a, _: max(1.0, abs(a.alpha)),
    nn.SELU.forward: 1.0507009873554804934 * 1.6732632423543772848,
    nn.Tanh.forward: 1.0,
    nn.Hardtanh.forward: 1.0,
    nn.Sigmoid.forward: 1 / 4,
    nn.Hardsigmoid.forward: 1 / 6,
    nn.LogSigmoid.forward: 1.0,
    nn.Softplus.forward: 1.0,
    nn.Softsign.forward: 1.0,
    nn.Softmax.forward: 1 / 2,
    nn.SiLU.forward: 1 / 2 + _SILU / 4,
    nn.GELU.forward: _gelu,
    nn.Hardswish.forward: 3 / 2,
}


def _fixed(module: nn.Module) -> nn.Module:
    """A float64 copy that computes one function of one example."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be a torch.nn.Module, got {type(module).__name__}"
        )
    for name, part in module.named_modules():
        normalises = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if normalises and (part.training or part.running_var is None):
            raise ValueError(
                f"{name or 'the module'} ({part}) normalises by the batch that "
                "it sees, so it is no function of one example; call "
                "module.eval() first, with track_running_stats=True"
            )
        drops = isinstance(part, nn.modules.dropout._DropoutNd)
        if drops and part.training and part.p > 0:
            raise ValueError(
                f"{name or 'the module'} ({part}) is another function at each "
                "call; call module.eval() first"
            )
    return copy.deepcopy(module).to("cpu", torch.float64).requires_grad_(False)


# Networks, from below. ------------------------------------------------------


def lipschitz_lower_bound(
    module: nn.Module,
    inputs: torch.Tensor,
    *,
    steps: int = 20,
    radius: float = 1.0,
    seed: int | torch.Generator = 0,
) -> float:
    """The largest Jacobian norm found: a lower bound on Lip(module).

    From every input, moves up the gradient of the norm and at random (the norm
    of a ReLU network is piecewise constant: there is no gradient), and keeps
    what is larger.

    Parameters
    ----------
    module
        Any module that computes one function of one example, differentiable
        almost everywhere.
    inputs
        Where to start, shape ``(n, *input shape)``.
    steps
        How many moves from each input; with 0 the Jacobians at the inputs.
    radius
        The length of the first move; the last is a hundredth of it.
    seed
        Of the random moves: an int, or a ``torch.Generator``, which is
        advanced.

    Returns
    -------
    float
        A lower bound, by the mean value theorem.

    Raises
    ------
    ValueError
        If there is no input or one is not finite, or the module has dropout
        or batch normalisation in training mode.

    Notes
    -----
    Inputs are jittered by about 1e-6. At a kink, such as 0 for a network
    without biases, autograd's "derivative" is a convention and may exceed
    Lip(module): for 2x - relu(x) + relu(-x), which is x, it is 2 at 0.

    Examples
    --------
    >>> double = nn.Linear(1, 1)
    >>> _ = nn.init.constant_(double.weight, 2.0)
    >>> lipschitz_lower_bound(double, torch.zeros(3, 1))
    2.0
    """
    module = _fixed(module)
    if inputs.ndim < 2 or not len(inputs) or not torch.isfinite(inputs).all():
        raise ValueError(
            "inputs must be a non-empty batch of finite inputs, shape "
            f"(n, *input shape), got shape {tuple(inputs.shape)}"
        )
    generator = _generator(seed)

    def norm(x):
        J = torch.func.jacrev(lambda x: module(x[None]).flatten())(x)
        return torch.linalg.matrix_norm(J.flatten(1), 2)

    climb = torch.func.vmap(torch.func.grad_and_value(norm))

    def directions(like):
        draw = torch.randn(like.shape, generator=generator, dtype=like.dtype)
        return _unit(draw)

    x = inputs.detach().to("cpu", torch.float64)
    x = x + 1e-6 * (1 + x.abs()) * directions(x)
    slope, best = climb(x)
    for step in range(steps):
        length = radius * 0.01 ** (step / max(1, steps - 1))
        move = _unit(_unit(slope) + directions(x) / 2)
        tried = x + length * move
        new_slope, new = climb(tried)
        better = (new > best).reshape(-1, *[1] * (x.ndim - 1))
        x = torch.where(better, tried, x)
        slope = torch.where(better, new_slope, slope)
        best = torch.maximum(best, new)
    return float(best.max())


def _unit(batch):
    norms = batch.flatten(1).norm(dim=1).clamp_min(1e-300)
    return batch / norms.reshape(-1, *[1] * (batch.ndim - 1))


def _generator(seed):
    if isinstance(seed, torch.Generator):
        return seed
    return torch.Generator().manual_seed(seed)


# Small networks, exactly. ---------------------------------------------------


@dataclass(frozen=True, eq=False)
class LinearRegion:
    """A region of inputs on which a ReLU network is affine.

    There f(x) = ``jacobian`` x + ``offset``. ``active`` tells of every unit
    whether it is positive, layer by layer; ``centre`` and ``radius`` are a
    ball inside the region.
    """

    active: tuple[bool, ...]
    jacobian: torch.Tensor
    offset: torch.Tensor
    centre: torch.Tensor
    radius: float


def lipschitz_exact(module: nn.Module, *, max_regions: int = 10_000) -> float:
    """Lip(module) of a small ReLU network: the largest Jacobian norm over its
    linear regions.

    Parameters
    ----------
    module, max_regions
        As for `linear_regions`.

    Returns
    -------
    float
        The smallest Lipschitz constant on the whole input space, up to
        rounding and to regions that hold no ball of radius 1e-9.

    Raises
    ------
    ValueError
        As `linear_regions`.

    Notes
    -----
    Between two inputs the network is affine on finitely many segments, so it
    is no steeper than its steepest region; and within that region it is so
    steep. Computing the number is NP-hard (Virmaux & Scaman 2018), which is
    why large networks are refused.

    Examples
    --------
    >>> up, down = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    >>> _ = up.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> _ = nn.init.ones_(down.weight)
    >>> absolute = nn.Sequential(up, nn.ReLU(), down)
    >>> lipschitz_exact(absolute)
    1.0
    >>> round(lipschitz_upper_bound(absolute), 6)
    2.0
    """
    regions = linear_regions(module, max_regions=max_regions)
    return float(max(spectral_norm(region.jacobian) for region in regions))


def linear_regions(
    module: nn.Module, *, max_regions: int = 10_000
) -> list[LinearRegion]:
    """The regions with interior on which a small ReLU network is affine.

    Parameters
    ----------
    module
        Linear, ReLU, LeakyReLU, Identity and Flatten layers, nested in
        `torch.nn.Sequential`, beginning with a Linear (or what flattens for
        it).
    max_regions
        The most that are tolerated.

    Returns
    -------
    list of LinearRegion
        Their closures cover the input space.

    Raises
    ------
    ValueError
        If the module has another layer (named), or may have more than
        ``max_regions`` regions: the message tells the count Π_l Σ_{j≤d_l}
        C(n_l, j) of Zaslavsky's bound, with n_l units in layer l and d_l the
        smallest width up to it, the input's included.
    """
    layers = list(_piecewise_linear(_fixed(module), ""))
    if not layers or not isinstance(layers[0], nn.Linear):
        raise ValueError(
            "module must begin with a Linear, got "
            f"{layers[0] if layers else 'no layer'}"
        )
    count = _most_regions(layers)
    if count > max_regions:
        raise ValueError(
            f"the module may have {count} linear regions, more than "
            f"max_regions = {max_regions}; take lipschitz_lower_bound and "
            "lipschitz_upper_bound, or a smaller network"
        )
    n = layers[0].in_features
    everywhere = _Cell(np.zeros((0, n)), np.zeros(0), np.zeros(n), _LARGEST)
    return list(_regions(layers, everywhere, np.eye(n), np.zeros(n), ()))


def _piecewise_linear(module, name):
    forward = type(module).forward
    if forward is nn.Sequential.forward:
        for key, layer in enumerate(module):  # once for each use
            yield from _piecewise_linear(layer, f"{name}.{key}".strip("."))
    elif forward in (nn.Linear.forward, *_SLOPES):
        yield module
    elif forward not in (nn.Identity.forward, nn.Flatten.forward):
        raise ValueError(
            f"{name or 'the module'} must be a Linear, ReLU, LeakyReLU, "
            f"Identity or Flatten, got {module}"
        )


# The slope of a unit that is negative.
_SLOPES = {
    nn.ReLU.forward: lambda layer: 0.0,
    nn.LeakyReLU.forward: lambda layer: layer.negative_slope,
}


def _most_regions(layers) -> int:
    count, smallest = 1, layers[0].in_features
    for layer in layers:
        if isinstance(layer, nn.Linear):
            width = layer.out_features
            smallest = min(smallest, width)
        else:
            count *= sum(math.comb(width, j) for j in range(smallest + 1))
    return count


def _regions(layers, cell, J, c, active) -> Iterator[LinearRegion]:
    """The regions within a cell on which the layers before are x ↦ Jx + c."""
    if not layers:
        arrays = map(torch.tensor, (J, c, cell.centre))
        yield LinearRegion(active, *arrays, cell.radius)
        return
    layer, *rest = layers
    if isinstance(layer, nn.Linear):
        W = layer.weight.numpy()
        b = 0.0 if layer.bias is None else layer.bias.numpy()
        yield from _regions(rest, cell, W @ J, W @ c + b, active)
        return
    negative = _SLOPES[type(layer).forward](layer)
    for part, signs in _cut(cell, J, c):
        slopes = np.where(signs, 1.0, negative)
        yield from _regions(
            rest, part, slopes[:, None] * J, slopes * c, active + signs
        )


def _cut(cell, J, c):
    """The parts into which the hyperplanes Jx + c = 0 cut a cell."""
    parts, tiny = [(cell, ())], 1e-14 * np.linalg.norm(J)
    for row, offset in zip(J, c):
        size = np.linalg.norm(row)
        if size <= tiny:
            parts = [
                (cell, (*signs, bool(offset > 0))) for cell, signs in parts
            ]
            continue
        parts = [
            (half, (*signs, sign))
            for cell, signs in parts
            for sign, half in cell.halves(row / size, offset / size)
        ]
    return parts


# A region counts if it holds a ball of the smallest radius; larger balls than
# the largest are not looked for, since most cells are unbounded.
_SMALLEST, _COMFORTABLE, _LARGEST = 1e-9, 1e-4, 10.0


@dataclass(frozen=True, eq=False)
class _Cell:
    """The polyhedron {x: normals x + offsets ≥ 0}, and a ball inside it."""

    normals: np.ndarray
    offsets: np.ndarray
    centre: np.ndarray
    radius: float

    def halves(self, normal, offset):
        """The sides of a hyperplane on which the cell has interior."""
        for sign in (True, False):
            n, b = (normal, offset) if sign else (-normal, -offset)
            half = replace(
                self,
                normals=np.vstack([self.normals, n]),
                offsets=np.append(self.offsets, b),
            )
            depth = n @ self.centre + b
            # Either the ball lies inside, or the part that is cut off holds a
            # smaller one, or a linear programme looks for one elsewhere.
            if depth < self.radius:
                half = replace(
                    half,
                    centre=self.centre + (self.radius - depth) / 2 * n,
                    radius=(self.radius + depth) / 2,
                )
            if half.radius < _COMFORTABLE:
                half = half._with_largest_ball()
            if half.radius > _SMALLEST:
                yield sign, half

    def _with_largest_ball(self):
        found = scipy.optimize.linprog(
            c=np.append(np.zeros_like(self.centre), -1.0),
            A_ub=np.column_stack([-self.normals, np.ones_like(self.offsets)]),
            b_ub=self.offsets,
            bounds=[*[(None, None)] * len(self.centre), (None, _LARGEST)],
            options={"primal_feasibility_tolerance": 1e-10},
        )
        if found.x is None:
            raise ArithmeticError(
                f"the linear programme of a region failed: {found.message}"
            )
        # The radius from the centre itself: the solver has a tolerance.
        centre = found.x[:-1]
        slack = (self.normals @ centre + self.offsets).min()
        return replace(self, centre=centre, radius=min(_LARGEST, slack))


# Robustness. ----------------------------------------------------------------


def certified_radius(logits: Any, lipschitz: Number, label: Any = None) -> Any:
    """How far an input may move before the prediction can change.

    margin / (√2 Lip): the difference of two outputs is √2 Lip-Lipschitz, since
    ‖e_i - e_j‖ = √2. No larger number holds for all networks with these
    logits and this constant.

    Parameters
    ----------
    logits
        The outputs, shape (..., classes), or a sympy column. With one output,
        whose sign is the class, the radius is ``|logit| / Lip``.
    lipschitz
        A Lipschitz constant of input ↦ logits, in Euclidean norms. A number, a
        0-d tensor, or a sympy expression.
    label
        The class that is to be kept, an integer or an integer tensor of shape
        (...). By default the predicted one; on symbols it must be given,
        unless there is one output.

    Returns
    -------
    Tensor or sympy expression
        The radius, shape (...), of an open ball of inputs that are classified
        like this one. 0 where two classes tie or the label is not predicted.

    Raises
    ------
    ValueError, TypeError
        If ``lipschitz`` is negative, a logit is not finite, or the label is
        missing or is no class.

    Notes
    -----
    Tsuzuku, Sato & Sugiyama (2018).

    Examples
    --------
    >>> certified_radius(torch.tensor([3.0, 1.0, 0.0]), 2**0.5)
    tensor(1.)
    """
    _check("lipschitz", lipschitz)
    if isinstance(logits, sp.MatrixBase):
        outputs = list(logits)
        if len(outputs) == 1:
            return abs(outputs[0]) / lipschitz
        if not isinstance(label, numbers.Integral) or not (
            0 <= label < len(outputs)
        ):
            raise ValueError(
                f"label must be one of the {len(outputs)} classes, since "
                f"symbols have no order, got {label!r}"
            )
        kept = outputs.pop(label)
        margin = sp.Max(0, kept - sp.Max(*outputs))
        return margin / (sp.sqrt(2) * lipschitz)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise TypeError(
            "logits must be a float tensor or a sympy column, got "
            f"{getattr(logits, 'dtype', type(logits).__name__)}"
        )
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(
            f"logits must have shape (..., classes), got {tuple(logits.shape)}"
        )
    if not torch.isfinite(logits).all():
        raise ValueError("logits must be finite, got nan or inf among them")
    if logits.shape[-1] == 1:
        margin, width = _binary_margin(logits[..., 0], label), 1.0
    else:
        margin, width = _margin(logits, label), math.sqrt(2)
    zero = torch.zeros_like(margin)
    return torch.where(margin > 0, margin / (width * lipschitz), zero)


def _binary_margin(logit, label):
    if label is None:
        return logit.abs()
    label = _labels(label, logit.shape, 2)
    return torch.where(label == 1, logit, -logit)


def _margin(logits, label):
    if label is None:
        first, second = logits.topk(2, dim=-1).values.unbind(-1)
        return first - second
    label = _labels(label, logits.shape[:-1], logits.shape[-1])[..., None]
    others = logits.scatter(-1, label, -math.inf)
    return logits.gather(-1, label)[..., 0] - others.amax(-1)


def _labels(label, shape, classes):
    label = torch.as_tensor(label)
    if label.is_floating_point() or label.shape not in (shape, ()):
        raise ValueError(
            f"label must be integers of shape {tuple(shape)}, got "
            f"{label.dtype} of shape {tuple(label.shape)}"
        )
    if label.numel() and not (0 <= label.min() and label.max() < classes):
        raise ValueError(
            f"label must lie between 0 and {classes - 1}, got {label.tolist()}"
        )
    return label.expand(shape)


# Adaptation. ----------------------------------------------------------------


def adaptation_lipschitz(
    lr: Number,
    steps: Any,
    *,
    smoothness: Number,
    strong_convexity: Number | None = None,
    wrt: Literal["theta", "data"] = "theta",
    gradient_bound: Number | None = None,
    shots: Number | None = None,
) -> Number:
    """A Lipschitz constant of K gradient steps, in θ or in the data.

    One step stretches by at most ``r = max(|1 - αμ|, |1 - αβ|)``, or 1 + αβ
    where nothing is known of μ. K steps stretch by r^K; and replacing one of m
    support examples moves θ' by at most (2αG/m) (1 + r + ... + r^{K-1}).

    Parameters
    ----------
    lr
        The inner rate α ≥ 0; any, for the formula needs no small one.
    steps
        The number K of inner steps, an integer or an integer symbol.
    smoothness
        β: the support loss has a β-Lipschitz gradient.
    strong_convexity
        μ with ∇²L ⪰ μI, between -β and β: 0 for a convex loss, positive for a
        strongly convex one; by default -β, which always holds.
    wrt
        ``"theta"`` for θ ↦ θ', ``"data"`` for one replaced example.
    gradient_bound
        With ``wrt="data"``, G: the loss is the mean over examples, and the
        gradients of two examples differ by at most 2G (as when none exceeds
        G), wherever the steps pass.
    shots
        With ``wrt="data"``, the number m of support examples.

    Returns
    -------
    float, Tensor or sympy expression
        With ``wrt="data"``: 2αKG/m for a convex loss with α ≤ 2/β;
        (2G/mμ)(1 - (1 - αμ)^K) for a strongly convex one with α ≤ 1/β;
        (2G/mβ)((1 + αβ)^K - 1) without convexity. All are attained.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range, missing, or not used.

    Notes
    -----
    The constants must hold on a convex set that contains all steps. After
    Hardt, Recht & Singer (2016), who do this for stochastic gradient descent.

    Examples
    --------
    >>> adaptation_lipschitz(0.5, 3, smoothness=1.0)
    3.375
    >>> alpha, beta = sp.symbols("alpha beta", positive=True)
    >>> adaptation_lipschitz(alpha, 2, smoothness=beta)
    (alpha*beta + 1)**2
    """
    r = _stretch(lr, steps, smoothness, strong_convexity)
    if wrt == "theta":
        if gradient_bound is not None or shots is not None:
            raise ValueError(
                "gradient_bound and shots are used only with wrt='data', got "
                f"{gradient_bound!r} and {shots!r}"
            )
        return r**steps
    if wrt != "data":
        raise ValueError(f"wrt must be 'theta' or 'data', got {wrt!r}")
    if gradient_bound is None or shots is None:
        raise ValueError(
            "wrt='data' needs gradient_bound and shots, got "
            f"{gradient_bound!r} and {shots!r}"
        )
    _check("gradient_bound", gradient_bound)
    _check("shots", shots, at_least=1)
    return 2 * lr * gradient_bound / shots * _geometric(r, steps)


def _stretch(lr, steps, smoothness, strong_convexity):
    """The Lipschitz constant of one gradient step."""
    _check("lr", lr)
    _check("smoothness", smoothness)
    _check_steps(steps)
    if strong_convexity is None:
        return 1 + lr * smoothness
    _check("strong_convexity", strong_convexity, at_least=-math.inf)
    if _false(abs(strong_convexity) <= smoothness):
        raise ValueError(
            "strong_convexity must lie between -smoothness and smoothness = "
            f"{smoothness}, got {strong_convexity}"
        )
    return _maximum(abs(1 - lr * strong_convexity), abs(1 - lr * smoothness))


def _geometric(r, steps):
    """1 + r + ... + r^{K-1}, which is K at r = 1."""
    if isinstance(steps, sp.Expr) and not steps.is_Integer:
        closed = (r**steps - 1) / (r - 1) if r != 1 else steps
        return sp.Piecewise((steps, sp.Eq(r, 1)), (closed, True))
    return sum(r**k for k in range(int(steps)))


# The meta-objective. --------------------------------------------------------


def smoothness_bound(
    lr: Number,
    steps: Any,
    *,
    smoothness: Number,
    hessian_lipschitz: Number,
    gradient_bound: Number,
    strong_convexity: Number | None = None,
    query_smoothness: Number | None = None,
) -> Number:
    """A Lipschitz constant of the meta-gradient ∇F after K inner steps.

    r^{2K} β + αρ r^{K-1} (1 + r + ... + r^{K-1}) G, where r = 1 + αβ, or
    ``max(|1 - αμ|, |1 - αβ|)`` where μ is known.

    Parameters
    ----------
    lr
        The inner rate α ≥ 0; any.
    steps
        The number K of inner steps, an integer or an integer symbol.
    smoothness
        β: the support loss has a β-Lipschitz gradient.
    hessian_lipschitz
        ρ: it has a ρ-Lipschitz Hessian.
    gradient_bound
        G: ‖∇L^q‖ ≤ G at the adapted parameters.
    strong_convexity
        μ with ∇²L^s ⪰ μI, between -β and β; by default -β.
    query_smoothness
        The β of the query loss, by default that of the support loss.

    Returns
    -------
    float, Tensor or sympy expression
        A bound on ‖∇F(θ) - ∇F(φ)‖ / ‖θ - φ‖ over a convex set, if the
        constants hold on a convex set that contains all inner steps from it.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range.

    Notes
    -----
    With r = 1 + αβ the second term is (ρ/β) r^{K-1} (r^K - 1) G. For tasks
    with different constants, take the mean over tasks of the bounds.

    Examples
    --------
    >>> constants = dict(hessian_lipschitz=0.0, gradient_bound=1.0)
    >>> smoothness_bound(0.5, 1, smoothness=2.0, **constants)
    8.0
    """
    r = _stretch(lr, steps, smoothness, strong_convexity)
    _check("hessian_lipschitz", hessian_lipschitz)
    _check("gradient_bound", gradient_bound)
    if query_smoothness is None:
        query_smoothness = smoothness
    _check("query_smoothness", query_smoothness)
    bend = _bend(lr, steps, hessian_lipschitz, r)
    return r ** (2 * steps) * query_smoothness + bend * gradient_bound


def _bend(lr, steps, hessian_lipschitz, r):
    """The Lipschitz constant of the Jacobian of K steps that stretch by r."""
    if steps == 0:
        return 0 * lr
    return lr * hessian_lipschitz * r ** (steps - 1) * _geometric(r, steps)


def strong_convexity_bound(
    lr: Number,
    steps: Any,
    *,
    smoothness: Number,
    hessian_lipschitz: Number,
    gradient_bound: Number,
    strong_convexity: Number,
    query_strong_convexity: Number | None = None,
) -> Number:
    """A constant of strong convexity of F after K inner steps with α ≤ 1/β.

    (1 - αβ)^{2K} μ - αρ r^{K-1} (1 + r + ... + r^{K-1}) G, where r = 1 - αμ.

    Parameters
    ----------
    lr
        The inner rate α, from 0 to 1/β.
    steps
        The number K of inner steps, an integer or an integer symbol.
    smoothness, hessian_lipschitz, gradient_bound
        β, ρ and G, as for `smoothness_bound`.
    strong_convexity
        μ ≥ 0 with ∇²L^s ⪰ μI.
    query_strong_convexity
        The μ of the query loss, by default that of the support loss.

    Returns
    -------
    float, Tensor or sympy expression
        A number m with ∇²F ⪰ m I where the constants hold, as for
        `smoothness_bound`. If it is not positive, F may fail to be convex.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range, such as α > 1/β: symbols are taken
        to fulfil it.

    Notes
    -----
    With one step, α ≤ 1/(2β) and α ≤ μ/(8ρG) this is at least the μ/8 of Finn
    et al. (2019), Theorem 1. A gradient bound and strong convexity exclude
    each other on the whole space: take a bounded set.

    Examples
    --------
    >>> alpha, beta, mu, rho, G = sp.symbols("alpha beta mu rho G")
    >>> strong_convexity_bound(
    ...     alpha, 1, smoothness=beta, strong_convexity=mu,
    ...     hessian_lipschitz=rho, gradient_bound=G,
    ... )
    -G*alpha*rho + mu*(-alpha*beta + 1)**2
    """
    _stretch(lr, steps, smoothness, strong_convexity)
    _check("strong_convexity", strong_convexity)
    _check("hessian_lipschitz", hessian_lipschitz)
    _check("gradient_bound", gradient_bound)
    if query_strong_convexity is None:
        query_strong_convexity = strong_convexity
    _check("query_strong_convexity", query_strong_convexity)
    if _false(lr * smoothness <= 1):
        raise ValueError(
            f"lr must be at most 1/smoothness = {1 / smoothness}, got {lr}"
        )
    shrink = 1 - lr * smoothness
    bend = _bend(lr, steps, hessian_lipschitz, 1 - lr * strong_convexity)
    return (
        shrink ** (2 * steps) * query_strong_convexity - bend * gradient_bound
    )


def safe_meta_step(lr: Number, steps: Any, **constants: Number) -> Number:
    """The outer rate η = 1/β_F at which descent on F is guaranteed.

    By the descent lemma F(θ - η∇F(θ)) ≤ F(θ) - η(1 - ηβ_F/2) ‖∇F(θ)‖², so F
    decreases for every η < 2/β_F, and by the most that the lemma promises,
    ‖∇F‖²/(2β_F), at this one.

    Parameters
    ----------
    lr, steps, **constants
        As for `smoothness_bound`, whose value is β_F.

    Returns
    -------
    float, Tensor or sympy expression
        η, infinite where β_F = 0.

    Examples
    --------
    >>> constants = dict(hessian_lipschitz=0.0, gradient_bound=1.0)
    >>> safe_meta_step(0.5, 1, smoothness=2.0, **constants)
    0.125
    """
    bound = smoothness_bound(lr, steps, **constants)
    if isinstance(bound, torch.Tensor):
        return 1 / bound
    if bound == 0:
        return sp.oo if isinstance(bound, sp.Expr) else math.inf
    return 1 / bound


# Numbers of three kinds. ----------------------------------------------------


def _check(name: str, value: Number, at_least: float = 0) -> None:
    """Raise unless ``value`` is one number, not known to be too small."""
    tensor = isinstance(value, torch.Tensor) and not value.ndim
    if not tensor and (
        isinstance(value, bool)
        or not isinstance(value, (numbers.Real, sp.Expr))
    ):
        raise TypeError(
            f"{name} must be a number, a 0-d tensor or a sympy expression, "
            f"got {value!r}"
        )
    if _is_nan(value) or _false(value >= at_least):
        wanted = "not nan" if at_least == -math.inf else f"at least {at_least}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _is_nan(value: Number) -> bool:
    return value is sp.nan if isinstance(value, sp.Expr) else math.isnan(value)


def _check_steps(steps: Any) -> None:
    symbol = isinstance(steps, sp.Expr) and not steps.is_number
    if symbol and steps.is_integer is not False and not steps.is_negative:
        return
    if isinstance(steps, bool) or not isinstance(
        steps, (numbers.Integral, sp.Integer)
    ):
        raise TypeError(
            f"steps must be an integer or an integer symbol, got {steps!r}"
        )
    if steps < 0:
        raise ValueError(f"steps must be a non-negative integer, got {steps}")


def _false(relation: Any) -> bool:
    """Whether a comparison is false; of symbols it may be undecided."""
    if isinstance(relation, sp.Basic):
        return relation == sp.false
    return not relation


def _maximum(u: Number, v: Number) -> Number:
    if isinstance(u, sp.Expr) or isinstance(v, sp.Expr):
        return sp.Max(u, v)
    if isinstance(u, torch.Tensor) or isinstance(v, torch.Tensor):
        return torch.maximum(torch.as_tensor(u), torch.as_tensor(v))
    return max(u, v)
