"""The exercises of "Networks and robustness" know their mistakes."""

import numpy as np
import pytest
import scipy.optimize
import sympy as sp
import torch
from torch import nn

from companion import GradientDescent, adapt, functional
from companion.homework import check, exercises
from companion.homework._robustness import with_bugs
from companion.lipschitz import (
    adaptation_lipschitz,
    certified_radius,
    lipschitz_upper_bound,
    spectral_norm,
    with_parameters,
)


def instances(number):
    return exercises()[f"robustness-{number}"].instances()


# Right answers, written differently. ----------------------------------------


def test_logits_one_by_one_agree_with_the_certificate_of_a_tight_pair():
    C, margin = sp.symbols("C margin", positive=True)
    # C x and -C x: margin 2 C x, and as one vector the constant √2 C.
    pair = sp.Matrix([margin / 2, -margin / 2])
    radius = certified_radius(pair, spectral_norm(sp.Matrix([C, -C])), label=0)
    assert check("robustness-1", radius)


def test_the_linear_radius_may_come_from_an_optimiser():
    def by_projection(M, b, x):
        M, b, x = M.numpy(), b.numpy(), x.numpy()
        y = (M @ x + b).argmax()
        distances = [
            scipy.optimize.minimize(
                lambda u: u @ u,
                np.zeros_like(x),
                jac=lambda u: 2 * u,
                constraints={
                    "type": "eq",
                    "fun": lambda u, j=j: (M[y] - M[j]) @ (x + u) + b[y] - b[j],
                },
                method="SLSQP",
                options={"ftol": 1e-16},
            ).fun
            ** 0.5
            for j in range(len(b))
            if j != y
        ]
        return torch.tensor(min(distances))

    for rule in instances(2):
        found = exercises()["robustness-2"].solution(*rule)
        assert float(found) == pytest.approx(float(by_projection(*rule)))

    def by_loop(M, b, x):
        logits = M @ x + b
        y = int(logits.argmax())
        return min(
            float((logits[y] - logits[j]) / (M[y] - M[j]).norm())
            for j in range(len(b))
            if j != y
        )

    assert check("robustness-2", by_loop)


def test_the_mended_certificate_may_be_the_companions():
    def by_companion(M, support, query, lr, steps):
        layer = nn.Linear(*M.T.shape, bias=False).double()
        loss, _ = functional(layer, nn.functional.cross_entropy)
        adapted = with_parameters(
            layer,
            adapt(loss, {"weight": M}, support, GradientDescent(lr, steps)),
        )
        return certified_radius(adapted(query), lipschitz_upper_bound(adapted))

    assert check("robustness-3", by_companion)


def test_the_listing_of_the_chapter_has_all_three_bugs():
    def listing(M, support, query, lr, steps):
        constant = torch.linalg.matrix_norm(M)

        def loss(M, data):
            return nn.functional.cross_entropy(data[0] @ M.T, data[1])

        adapted = adapt(loss, M, support, GradientDescent(lr, steps))
        first, second = (query @ adapted.T).topk(2, dim=1).values.T
        return (first - second) / constant

    found = check("robustness-3", listing).mistake
    assert found == "stale-constant+frobenius+no-root-two"
    assert check("robustness-3", with_bugs(stale=True)).mistake == (
        "stale-constant"
    )


def test_the_shots_solve_the_bound_on_the_move():
    alpha, beta, G, z, m = sp.symbols("alpha beta G z m", positive=True)
    move = adaptation_lipschitz(
        alpha, 3, smoothness=beta, wrt="data", gradient_bound=G, shots=m
    )
    (shots,) = sp.solve(move - z, m)
    K = sp.Symbol("K")
    solution = exercises()["robustness-4"].solution.subs(K, 3)
    names = {s.name: s for s in (alpha, beta, G, z)}
    solution = solution.subs({s: names[s.name] for s in solution.free_symbols})
    assert sp.simplify(shots - solution) == 0
    assert check(
        "robustness-4",
        2 * alpha * G / z * ((1 + alpha * beta) ** K - 1) / (alpha * beta),
    )


def test_the_norm_of_a_convolution_may_come_from_its_matrix():
    def by_matrix(kernel, size):
        outputs, inputs, k, _ = kernel.shape
        layer = nn.Conv2d(
            inputs, outputs, k, padding=k // 2, padding_mode="circular"
        ).double()
        layer.weight.data.copy_(kernel)
        return spectral_norm(layer, input_shape=(inputs, size, size))

    assert check("robustness-5", by_matrix)


def test_several_wrong_claims_are_wrong():
    for value in (True, False):
        assert not check("robustness-6", dict.fromkeys("abcdef", value))
    right = dict.fromkeys("ABDEF", False) | {"C": True}
    assert check("robustness-6", right)


def test_the_norm_of_a_convolution_may_be_summed_by_hand():
    def by_hand(kernel, size):
        places = torch.arange(kernel.shape[-1])
        # In torch's default precision, as an arange in an exponential is.
        waves = torch.exp(
            -2j * torch.pi / size * torch.outer(torch.arange(size), places)
        )
        phases = (
            waves[:, None, None, None, :, None] * waves[:, None, None, None]
        )
        blocks = (kernel * phases).sum((-2, -1))
        return torch.linalg.matrix_norm(blocks, 2).max()

    def by_half_the_frequencies(kernel, size):
        blocks = torch.fft.rfft2(kernel, s=(size, size))
        return torch.linalg.svdvals(blocks.permute(2, 3, 0, 1)).max()

    assert check("robustness-5", by_half_the_frequencies)
    assert check("robustness-5", by_hand)
