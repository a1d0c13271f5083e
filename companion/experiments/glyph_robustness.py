"""Certificates and attacks, before and after a glyph classifier adapts.

The attack is projected gradient ascent over a Euclidean ball; the certificate
is margin / (√2 Lip), with the product of spectral norms for Lip.
"""

from __future__ import annotations

import torch

from companion.adaptation import adapt
from companion.experiments import load
from companion.experiments.glyph_training import (
    INNER,
    QUERY_SHOTS,
    drawn,
    network,
    parameters,
    problem,
)
from companion.lipschitz import (
    certified_radius,
    lipschitz_lower_bound,
    lipschitz_upper_bound,
    with_parameters,
)

RUNS = ((640, 1), (640, 5))
N_TASKS, TEST_SEED = 40, 4
RADII = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
ATTACK_STEPS = 20
# How many tasks to measure the looseness of the constants on: it is slow.
N_SAMPLED = 5


def attacked(module, x, y, radius):
    """The worst inputs found in balls about ``x``: (n, 1, s, s) as ``x``.

    ``radius`` is a number, or one for each input. Ascent along the normalised
    gradient, with steps of a quarter of the radius, from ``x`` itself; the
    balls are not cut to the range of grey values, since no certificate is.
    """
    radius = torch.as_tensor(radius, dtype=x.dtype).expand(len(x))
    radius = radius.view(-1, 1, 1, 1)

    def length(v):
        return v.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)

    # Not the cross-entropy, whose gradient vanishes on sure answers.
    def deficit(x):
        logits = module(x)
        others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        return (others - logits.gather(1, y[:, None])[:, 0]).sum()

    moved = x
    for _ in range(ATTACK_STEPS):
        slope = torch.func.grad(deficit)(moved)
        step = moved + radius / 4 * slope / length(slope) - x
        moved = x + step * (radius / length(step)).clamp_max(1)
    return moved.detach()


def right(module, x, y):
    with torch.no_grad():
        return module(x).argmax(1) == y


def judged(module, x, y, lipschitz) -> dict[str, torch.Tensor]:
    """For one task: certificates, and who withstands the attack, by radius."""
    with torch.no_grad():
        certified = certified_radius(module(x), lipschitz, y)
    return {
        "certified": torch.stack([certified > r for r in RADII]),
        "withstood": torch.stack([
            right(module, attacked(module, x, y, r), y) for r in RADII
        ]),
        "right": right(module, x, y),
        "radius": certified,
    }  # fmt: skip


def make():
    """Shares over tasks and queries, before and after adaptation."""
    tensors, found = load("glyph_training").tensors, {}
    for run in RUNS:
        found[f"{run[1]} shots"] = robustness(parameters(tensors, *run), run[1])
    return {"radii": RADII, "shots": found}, {}


def robustness(theta, shots: int, n_tasks: int = N_TASKS) -> dict:
    """How robust the classifier is before and after adapting to new letters.

    ``lipschitz`` are the products of norms (before adapting there is one for
    all tasks, after it one a task), ``sampled`` the largest slopes found from
    the queries of the first tasks, which say how loose the products are.
    ``stale`` is the certificate of the adapted network from the constant
    before adapting: it is not valid, and ``broken`` is the share of it that
    an attack within it breaks.
    """
    loss, _ = problem()
    initial = with_parameters(network(), theta)
    constant = lipschitz_upper_bound(initial)
    before, after, constants, stale, broken = [], [], [], [], []
    sampled_before, sampled_after = [], []
    for support, (x, y) in drawn(N_TASKS, shots, "test", TEST_SEED)[:n_tasks]:
        adapted = adapt(loss, theta, support, INNER)
        module = with_parameters(network(), adapted)
        constants.append(lipschitz_upper_bound(module))
        if len(sampled_after) < N_SAMPLED:
            some = x[::QUERY_SHOTS]
            sampled_before.append(lipschitz_lower_bound(initial, some))
            sampled_after.append(lipschitz_lower_bound(module, some))
        before.append(judged(initial, x, y, constant))
        after.append(judged(module, x, y, constants[-1]))
        with torch.no_grad():
            old = certified_radius(module(x), constant, y)
        worst = attacked(module, x, y, 0.999 * old)
        stale.append(old)
        broken.append((old > 0) & ~right(module, worst, y))
    old = torch.cat(stale)
    return {
        "before": shares(before)
        | {"lipschitz": [constant], "sampled": sampled_before},
        "after": shares(after)
        | {"lipschitz": constants, "sampled": sampled_after},
        "stale": {
            "radius": float(old[old > 0].median()),
            "broken": float(torch.cat(broken).sum() / (old > 0).sum()),
        },
    }


def shares(tasks: list[dict[str, torch.Tensor]]) -> dict:
    """Means over all queries of all tasks."""
    together = {
        key: torch.cat([task[key] for task in tasks], -1) for key in tasks[0]
    }
    radius = together["radius"]
    return {
        "accuracy": float(together["right"].float().mean()),
        "certified": together["certified"].float().mean(1).tolist(),
        "withstood": together["withstood"].float().mean(1).tolist(),
        "median radius": float(radius[radius > 0].median()),
        # A certificate that an attack breaks would be a bug: none may.
        "violations": int(
            (together["certified"] & ~together["withstood"]).sum()
        ),
    }
