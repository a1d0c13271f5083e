"""The exercises of the chapter "Networks and robustness"."""

from __future__ import annotations

import sympy as sp
import torch
from torch.nn.functional import conv2d, cross_entropy

from companion.adaptation import GradientDescent, adapt
from companion.homework._exercise import Exercise, Mistake, remaining_bugs

__all__ = ["EXERCISES"]


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# robustness-1: logits one by one. -------------------------------------------

_gap, _constant = sp.symbols("margin C")

_ONE_BY_ONE = (
    Mistake(
        "joint-constant",
        "this is the radius where C is a constant of all logits as one vector; "
        "known one by one, one may rise while another falls, each at rate C.",
        _gap / (sp.sqrt(2) * _constant),
    ),
    Mistake(
        "one-logit-moves",
        "this lets one logit move and keeps the others; an attacker lowers "
        "one and raises another.",
        _gap / _constant,
    ),
    Mistake(
        "inverted",
        "this grows with C and shrinks with the margin; it should be the other "
        "way round.",
        2 * _constant / _gap,
    ),
    Mistake(
        "too-careful",
        "this is safe, and not the largest: the difference of two logits is "
        "2C-Lipschitz, without a further √2.",
        _gap / (2 * sp.sqrt(2) * _constant),
    ),
    Mistake(
        "far-too-careful",
        "this is safe, and twice too small: halve the margin or double the "
        "constant, not both.",
        _gap / (4 * _constant),
    ),
    Mistake(
        "times-for-over",
        "the margin is divided by the constant of the difference, 2C; "
        "this multiplies.",
        _gap * 2 * _constant,
    ),
    Mistake(
        "two-above",
        "the 2 belongs below: two logits that move against each other need "
        "half the way, not twice it.",
        2 * _gap / _constant,
    ),
    Mistake(
        "root-two-above",
        "this multiplies by √2 what an attacker on two sides divides, and for "
        "constants of the logits one by one it is a 2.",
        sp.sqrt(2) * _gap / _constant,
    ),
)


# robustness-2: the exact radius of a linear rule. ---------------------------


def _leads(M, b, x):
    """Leads over the other classes, and the differences of the rows."""
    logits = M @ x + b
    y = logits.argmax()
    others = torch.arange(len(b)) != y
    return (logits[y] - logits)[others], (M[y] - M)[others]


def _linear_radius(M, b, x):
    leads, rows = _leads(M, b, x)
    return (leads / rows.norm(dim=1)).min()


def _over(constant):
    """The smallest lead over some constant of the whole rule."""

    def radius(M, b, x):
        return _leads(M, b, x)[0].min() / constant(M)

    return radius


def _of_the_runner_up(M, b, x):
    leads, rows = _leads(M, b, x)
    nearest = leads.argmin()
    return leads[nearest] / rows[nearest].norm()


def _of_the_farthest(M, b, x):
    leads, rows = _leads(M, b, x)
    return (leads / rows.norm(dim=1)).max()


def _of_squares(M, b, x):
    leads, rows = _leads(M, b, x)
    return (leads / rows.square().sum(1)).min()


def _of_sums(M, b, x):
    logits = M @ x + b
    leads, _ = _leads(M, b, x)
    y = logits.argmax()
    others = torch.arange(len(b)) != y
    norms = M.norm(dim=1)
    return (leads / (norms[y] + norms[others])).min()


def _of_one_row(M, b, x):
    logits = M @ x + b
    leads, _ = _leads(M, b, x)
    return leads.min() / M[logits.argmax()].norm()


def _of_rows_of_others(M, b, x):
    others = torch.arange(len(b)) != (M @ x + b).argmax()
    return (_leads(M, b, x)[0] / M[others].norm(dim=1)).min()


def _of_mixed_classes(M, b, x):
    leads, rows = _leads(M, b, x)
    return leads.min() / rows.norm(dim=1).max()


def _of_all_pairs(M, b, x):
    logits = M @ x + b
    return torch.stack(
        [
            (logits[i] - logits[j]).abs() / (M[i] - M[j]).norm()
            for i in range(len(b))
            for j in range(i)
        ]
    ).min()


def _of_class_zero(M, b, x):
    logits = M @ x + b
    return ((logits[0] - logits[1:]) / (M[0] - M[1:]).norm(dim=1)).min()


def _of_sums_of_entries(M, b, x):
    leads, rows = _leads(M, b, x)
    return (leads / rows.abs().sum(1)).min()


def _rule_instances():
    # In each, the class whose boundary is nearest is not the runner-up. As
    # many inputs as other classes would let a norm over the wrong axis pass.
    generator = torch.Generator().manual_seed(21)
    found = []
    while len(found) < 3:
        rule = (
            _normal(generator, 4, 5),
            _normal(generator, 4),
            _normal(generator, 5),
        )
        leads, rows = _leads(*rule)
        if leads.argmin() != (leads / rows.norm(dim=1)).argmin():
            found.append(rule)
    return found


_LINEAR_RADII = (
    Mistake(
        "general-certificate",
        "this is margin/(√2‖M‖), which is safe and not the distance: use the "
        "constant of every difference of logits, ‖w_y - w_j‖.",
        _over(lambda M: 2**0.5 * torch.linalg.matrix_norm(M, 2)),
    ),
    Mistake(
        "frobenius",
        "this is margin/(√2‖M‖) with the Frobenius norm, which is what "
        "torch.linalg.matrix_norm computes unless it is told the order 2; and "
        "the distance needs ‖w_y - w_j‖, class by class.",
        _over(lambda M: 2**0.5 * torch.linalg.matrix_norm(M)),
    ),
    Mistake(
        "no-root-two",
        "this is margin/‖M‖: the √2 is missing, so this is not even safe.",
        _over(lambda M: torch.linalg.matrix_norm(M, 2)),
    ),
    Mistake(
        "runner-up-only",
        "this looks at the class with the second largest logit only; another "
        "class, with a smaller logit but a more different row, may be nearer.",
        _of_the_runner_up,
    ),
    Mistake(
        "farthest",
        "this is the largest of the distances; wanted is the nearest boundary.",
        _of_the_farthest,
    ),
    Mistake(
        "squared-norm",
        "the lead is divided by ‖w_y - w_j‖², which is the length of the step "
        "in units of w_y - w_j; the distance has the norm itself.",
        _of_squares,
    ),
    Mistake(
        "sum-of-norms",
        "‖w_y‖ + ‖w_j‖ is only a bound on ‖w_y - w_j‖; this is safe, and not "
        "the distance.",
        _of_sums,
    ),
    Mistake(
        "one-row",
        "this is the distance at which the predicted logit alone has lost the "
        "margin; the other logits move too.",
        _of_one_row,
    ),
    Mistake(
        "no-bias",
        "the bias is forgotten in the logits.",
        lambda M, b, x: _linear_radius(M, 0 * b, x),
    ),
    Mistake(
        "rows-of-the-others",
        "each lead is divided by ‖w_j‖, as if the predicted logit stood "
        "still; a lead changes with ‖w_y - w_j‖.",
        _of_rows_of_others,
    ),
    Mistake(
        "mixed-classes",
        "this divides the smallest lead by the largest ‖w_y - w_j‖, and they "
        "may be of two classes: safe, and not the distance. Divide class by "
        "class, then take the smallest.",
        _of_mixed_classes,
    ),
    Mistake(
        "all-pairs",
        "this is the nearest tie of any two classes; where two others tie, "
        "the predicted class stays. Compare the predicted one with each other.",
        _of_all_pairs,
    ),
    Mistake(
        "class-zero",
        "this takes class 0 for the predicted one; that is the class of the "
        "largest logit.",
        _of_class_zero,
    ),
    Mistake(
        "sum-of-entries",
        "‖w_y - w_j‖ is Euclidean here; this adds up the moduli of the entries.",
        _of_sums_of_entries,
    ),
)


# robustness-3: mend the certificate. ----------------------------------------


def with_bugs(*, stale=False, frobenius=False, one_sided=False):
    """The certificate of the exercise, with those of its bugs that are left."""

    def certify(M, support, query, lr, steps):
        def loss(M, data):
            return cross_entropy(data[0] @ M.T, data[1])

        adapted = adapt(loss, M, support, GradientDescent(lr, steps))
        norm = "fro" if frobenius else 2
        constant = torch.linalg.matrix_norm(M if stale else adapted, norm)
        top = (query @ adapted.T).topk(2, dim=1).values
        width = 1 if one_sided else 2**0.5
        return (top[:, 0] - top[:, 1]) / (width * constant)

    return certify


def _margins_before(M, support, query, lr, steps):
    """All of the initial network."""
    return with_bugs()(M, support, query, lr, 0)


def _mixed(M, support, query, lr, steps):
    """The margin of the initial network, the constant of the adapted one."""
    before = _margins_before(M, support, query, lr, steps)
    after = with_bugs()(M, support, query, lr, steps)
    stale = with_bugs(stale=True)(M, support, query, lr, steps)
    return before * after / stale


def _pairwise(M, support, query, lr, steps):
    def loss(M, data):
        return cross_entropy(data[0] @ M.T, data[1])

    adapted = adapt(loss, M, support, GradientDescent(lr, steps))
    none = torch.zeros(len(M), dtype=M.dtype)
    return torch.stack([_linear_radius(adapted, none, x) for x in query])


def _certificate_instances():
    generator = torch.Generator().manual_seed(22)
    found = []
    for classes, inputs, lr, steps in ((3, 4, 0.8, 2), (4, 3, 0.5, 5)):
        y = torch.arange(2 * classes) % classes
        found.append(
            (
                _normal(generator, classes, inputs),
                (_normal(generator, 2 * classes, inputs), y),
                _normal(generator, 5, inputs),
                lr,
                steps,
            )
        )
    return found


_BUG = {
    "stale": (
        "stale-constant",
        "the constant is that of M before it adapts; the certificate is of "
        + "the adapted classifier and needs its constant",
    ),
    "frobenius": (
        "frobenius",
        "torch.linalg.matrix_norm without an order is the Frobenius norm, "
        + "which is not smaller than the constant: safe, and too careful",
    ),
    "one_sided": (
        "no-root-two",
        "the √2 is missing: an attacker lowers one logit and raises another",
    ),
}


_CERTIFICATES = (
    *remaining_bugs(_BUG, with_bugs),
    Mistake(
        "nothing-adapts",
        "this certifies the classifier before it adapts, margins and all.",
        _margins_before,
    ),
    Mistake(
        "margin-before",
        "the constant is that of the adapted classifier, but the margins are "
        "from before; both belong to the same function.",
        _mixed,
    ),
    Mistake(
        "two-for-root-two",
        "with the constant of the logits as one vector it is √2, not 2: that "
        "is for constants of the logits one by one.",
        lambda *arguments: with_bugs()(*arguments) / 2**0.5,
    ),
    Mistake(
        "pair-by-pair",
        "this is the exact distance of exercise 2, which is larger and safe "
        "too; wanted here is the certificate with one constant, that of all "
        "logits.",
        _pairwise,
    ),
)


# robustness-4: how many shots? ----------------------------------------------

_alpha, _beta, _G, _K, _z = sp.symbols("alpha beta G K z")
_SHOTS = 2 * _G / (_beta * _z) * ((1 + _alpha * _beta) ** _K - 1)

_SHOT_MISTAKES = (
    Mistake(
        "convex-case",
        "this is for a convex loss with α ≤ 2/β, where the move grows in "
        "proportion to K; without convexity every step stretches by 1 + αβ.",
        2 * _alpha * _K * _G / _z,
    ),
    Mistake(
        "one-step",
        "this is for one step.",
        2 * _alpha * _G / _z,
    ),
    Mistake(
        "no-two",
        "two gradients of length at most G differ by up to 2G; a factor of 2 "
        "is missing.",
        _SHOTS / 2,
    ),
    Mistake(
        "last-term-only",
        "this is the stretch of the first step's move alone; every step adds "
        "one, and the sum is geometric.",
        2 * _alpha * _G / _z * (1 + _alpha * _beta) ** (_K - 1),
    ),
    Mistake(
        "no-minus-one",
        "the geometric sum is ((1 + αβ)^K - 1)/(αβ); with K = 0 nothing moves.",
        2 * _G / (_beta * _z) * (1 + _alpha * _beta) ** _K,
    ),
    Mistake(
        "rate-left-over",
        "the α before the sum cancels with that in its denominator αβ; here "
        "it is left over.",
        _alpha * _SHOTS,
    ),
    Mistake(
        "one-step-more",
        "the sum has K terms, 1 + r + ... + r^{K-1}; this has one more.",
        2 * _G / (_beta * _z) * ((1 + _alpha * _beta) ** (_K + 1) - 1),
    ),
    Mistake(
        "one-step-less",
        "the sum has K terms, 1 + r + ... + r^{K-1}; this has one less.",
        2 * _G / (_beta * _z) * ((1 + _alpha * _beta) ** (_K - 1) - 1),
    ),
    Mistake(
        "strongly-convex-case",
        "this is for a strongly convex loss, with β in the place of μ; there "
        "the steps shrink distances, and here they may stretch them.",
        2 * _G / (_beta * _z) * (1 - (1 - _alpha * _beta) ** _K),
    ),
    Mistake(
        "move-for-shots",
        "solve for m: it is the bound on the move times m, over z.",
        _z / (2 * _G / _beta * ((1 + _alpha * _beta) ** _K - 1)),
    ),
    Mistake(
        "not-over-z",
        "this is the move times m; it is at most z times m, so divide by z.",
        _SHOTS * _z,
    ),
    Mistake(
        "times-z",
        "a smaller move z takes more shots: divide by z.",
        _SHOTS * _z**2,
    ),
    Mistake(
        "alpha-for-one-over-beta",
        "the geometric sum has the denominator αβ, which leaves 1/β of the α "
        "before it.",
        2 * _alpha * _G / _z * ((1 + _alpha * _beta) ** _K - 1),
    ),
    Mistake(
        "stretch-of-the-start",
        "this is how far two starts run apart; here both start at one θ, and "
        "every step adds 2αG/m.",
        (1 + _alpha * _beta) ** _K,
    ),
    Mistake(
        "last-term-too-late",
        "this is one term, and the sum goes from r⁰ to r^{K-1}.",
        2 * _alpha * _G / _z * (1 + _alpha * _beta) ** _K,
    ),
)


# robustness-5: the norm of a convolution. -----------------------------------


def _blocks(kernel, size):
    """A matrix of outputs × inputs for each frequency."""
    return torch.fft.fft2(kernel, s=(size, size)).permute(2, 3, 0, 1)


def _circular_norm(kernel, size):
    return torch.linalg.matrix_norm(_blocks(kernel, size), 2).max()


def _zero_padded(kernel, size):
    shape = kernel.shape[1], size, size
    images = torch.eye(shape[0] * size**2, dtype=kernel.dtype)
    images = images.reshape(-1, *shape)
    columns = conv2d(images, kernel, padding=kernel.shape[-1] // 2)
    return torch.linalg.matrix_norm(columns.flatten(1), 2)


def _kernel_instances():
    generator = torch.Generator().manual_seed(23)
    return [
        (_normal(generator, 3, 2, 3, 3), 6),
        (_normal(generator, 2, 4, 5, 5), 7),
        (_normal(generator, 2, 2, 3, 3), 5),
    ]


_NORMS = (
    Mistake(
        "kernel-as-matrix",
        "this is the norm of the kernel as a matrix outputs × rest, as in "
        "spectral normalisation; an image shows every input to many windows, "
        "and the norm of the map is larger.",
        lambda kernel, size: torch.linalg.matrix_norm(kernel.flatten(1), 2),
    ),
    Mistake(
        "not-padded-to-the-image",
        "this takes the Fourier transform of the kernel on its own k × k "
        "pixels; the frequencies are those of the image, so pad with zeros to "
        "its size first.",
        lambda kernel, size: _circular_norm(kernel, kernel.shape[-1]),
    ),
    Mistake(
        "frobenius",
        "each frequency's matrix enters with its Frobenius norm, the default "
        "of matrix_norm; wanted is its spectral norm.",
        lambda kernel, size: torch.linalg.matrix_norm(
            _blocks(kernel, size)
        ).max(),
    ),
    Mistake(
        "channel-by-channel",
        "this is the largest entry over all frequencies and pairs of channels; "
        "the channels act together, as a matrix.",
        lambda kernel, size: _blocks(kernel, size).abs().max(),
    ),
    Mistake(
        "frequency-zero",
        "this looks at frequency 0 only, the sum of the kernel over its "
        "pixels; the largest may be at any frequency.",
        lambda kernel, size: torch.linalg.matrix_norm(kernel.sum((2, 3)), 2),
    ),
    Mistake(
        "wrong-axes",
        "matrix_norm acts on the last two axes, and these are the frequencies; "
        "bring the axes of the channels to the end first.",
        lambda kernel, size: torch.linalg.matrix_norm(
            torch.fft.fft2(kernel, s=(size, size)), 2
        ).max(),
    ),
    Mistake(
        "unitary-scale",
        'norm="ortho" divides by the number of pixels per axis; the transform '
        "of the image is to be unitary, that of the kernel is not.",
        lambda kernel, size: _circular_norm(kernel, size) / size,
    ),
    Mistake(
        "sum-of-frequencies",
        "a block-diagonal matrix has the largest norm of its blocks, not their "
        "sum.",
        lambda kernel, size: torch.linalg.matrix_norm(
            _blocks(kernel, size), 2
        ).sum(),
    ),
    Mistake(
        "real-part",
        "the Fourier transform is complex, and so are the matrices; this "
        "drops their imaginary parts.",
        lambda kernel, size: torch.linalg.matrix_norm(
            _blocks(kernel, size).real, 2
        ).max(),
    ),
    Mistake(
        "moduli",
        "this takes the modulus of every entry first; the phases of the "
        "channels matter to the norm of the matrix.",
        lambda kernel, size: torch.linalg.matrix_norm(
            _blocks(kernel, size).abs(), 2
        ).max(),
    ),
    Mistake(
        "squared",
        "this is the square, an eigenvalue of the map times its transpose; "
        "take the root.",
        lambda kernel, size: _circular_norm(kernel, size).square(),
    ),
    Mistake(
        "inverse-transform",
        "the inverse transform divides by the number of pixels; take the one "
        "that does not.",
        lambda kernel, size: _circular_norm(kernel, size) / size**2,
    ),
    Mistake(
        "larger-image",
        "this is the bound for zero padding, on an image with a margin; with "
        "circular padding the image has its own size.",
        lambda kernel, size: _circular_norm(
            kernel, size + kernel.shape[-1] // 2
        ),
    ),
    Mistake(
        "zero-padding",
        "this pads with zeros, which forgets what wraps around the edge.",
        _zero_padded,
    ),
)


# robustness-6: what does it say? --------------------------------------------

_TRUTHS = {"c": True} | dict.fromkeys("abdef", False)


def _but(**wrong):
    return _TRUTHS | wrong


_CLAIMS = {
    "a": Mistake(
        "size-alone",
        "a: multiply all logits by 1000. The constant is 1000 times as large, "
        "and so is every margin.",
        _but(a=True),
    ),
    "b": Mistake(
        "failed-attack",
        "b: that one attack fails does not mean that none succeeds, and a "
        "certificate is computed from a margin and a constant.",
        _but(b=True),
    ),
    "c": Mistake(
        "valid-certificate",
        "c: the product is a Lipschitz constant of the network whose weights "
        "it is computed from, and here that is the adapted one.",
        _but(c=False),
    ),
    "d": Mistake(
        "jump",
        "d: the product over the layers is continuous in the weights. Is the "
        "exact constant? Think of two units that cancel.",
        _but(d=True),
    ),
    "e": Mistake(
        "kernel-norm",
        "e: a 3×3 kernel of ones over 3 has norm 1 as a row. What does it do "
        "to a constant image?",
        _but(e=True),
    ),
    "f": Mistake(
        "lower-bound",
        "f: somewhere between the samples the network may be steeper: this is "
        "a lower bound, and a certificate needs an upper one.",
        _but(f=True),
    ),
}
_UNREADABLE = Mistake(
    "words",
    "hand in a dict with the keys 'a' to 'f', each with True or False.",
    {"a": True},
)


def _accept_truths(answer):
    if not isinstance(answer, dict):
        return _UNREADABLE
    given = {str(key).strip().lower(): value for key, value in answer.items()}
    if set(given) != set(_TRUTHS) or not all(
        isinstance(value, bool) for value in given.values()
    ):
        return _UNREADABLE
    for key, mistake in _CLAIMS.items():
        if given[key] != _TRUTHS[key]:
            return mistake
    return None


EXERCISES = (
    Exercise(
        id="robustness-1",
        title="Logits one by one",
        chapter=11,
        read='Chapter 11, the section on what "robust" means.',
        solution=_gap / (2 * _constant),
        mistakes=_ONE_BY_ONE,
    ),
    Exercise(
        id="robustness-2",
        title="The exact radius of a linear rule",
        chapter=11,
        read='Chapter 11, the section on what "robust" means.',
        solution=_linear_radius,
        instances=_rule_instances,
        mistakes=_LINEAR_RADII,
    ),
    Exercise(
        id="robustness-3",
        title="Mend the certificate",
        chapter=11,
        read='Chapter 11, "Adaptation changes the constant".',
        solution=with_bugs(),
        instances=_certificate_instances,
        mistakes=_CERTIFICATES,
    ),
    Exercise(
        id="robustness-4",
        title="How many shots?",
        chapter=11,
        read='Chapter 11, "Replacing one example".',
        solution=_SHOTS,
        mistakes=_SHOT_MISTAKES,
    ),
    Exercise(
        id="robustness-5",
        title="The norm of a convolution",
        chapter=11,
        read='Chapter 11, "A convolution is a linear map".',
        solution=_circular_norm,
        instances=_kernel_instances,
        mistakes=_NORMS,
        rtol=1e-6,  # phases in complex64 are right
    ),
    Exercise(
        id="robustness-6",
        title="What does it say?",
        chapter=11,
        read='Chapter 11, "The article\'s sentence, settled".',
        solution=_TRUTHS,
        accept=_accept_truths,
        mistakes=(_UNREADABLE, *_CLAIMS.values()),
    ),
)
