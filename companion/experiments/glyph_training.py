"""Few-shot classifiers of glyphs, meta-trained by MAML.

One small tanh network, from fixed sets of training tasks: some of 1-shot tasks
and of growing size, and some of one size with growing shots.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from companion.adaptation import GradientDescent
from companion.models import functional, mlp
from companion.objective import TaskBatch
from companion.tasks.glyphs import Glyphs, glyphs
from companion.training import MetaTrained, meta_train

WAYS, SIDE, WIDTH = 5, 14, 64
QUERY_SHOTS = 5
INNER = GradientDescent(lr=0.5, steps=3)
META_BATCH, ITERATIONS, OUTER_LR = 8, 600, 3e-3
# (number of training tasks, shots) of every run.
RUNS = ((10, 1), (40, 1), (160, 1), (640, 1), (40, 2), (40, 5), (640, 5))
DTYPE = torch.float32
TRAINING_SEED, INITIAL_SEED = 1, 0


def label(n_tasks: int, shots: int) -> str:
    """A run's name among the results."""
    return f"{n_tasks} tasks, {shots} shots"


def network() -> nn.Sequential:
    """The classifier before it is trained: images to logits."""
    sizes = SIDE**2, WIDTH, WAYS
    layers = mlp(sizes, seed=INITIAL_SEED, dtype=DTYPE)
    return nn.Sequential(nn.Flatten(), *layers)


def problem():
    """The loss of a task's data, and the initial parameters."""
    return functional(network(), cross_entropy)


@cache
def drawn(n_tasks: int, shots: int, split: str, seed: int) -> Glyphs:
    """Tasks of the size that the network sees."""
    return glyphs(
        n_tasks, shots, QUERY_SHOTS,
        ways=WAYS, side=SIDE, split=split, seed=seed, dtype=DTYPE,
    )  # fmt: skip


def training_tasks(n_tasks: int, shots: int) -> Glyphs:
    """The fixed set of tasks that a run is trained on."""
    return drawn(n_tasks, shots, "train", TRAINING_SEED)


def train(
    n_tasks: int, shots: int, iterations: int = ITERATIONS
) -> MetaTrained:
    """One run, or its first iterations."""
    tasks = training_tasks(n_tasks, shots)

    def sample_tasks(generator):
        some = torch.randint(n_tasks, (META_BATCH,), generator=generator)
        return TaskBatch(
            tuple(x[some] for x in tasks.support),
            tuple(x[some] for x in tasks.query),
        )

    loss, theta = problem()
    return meta_train(
        loss, theta, sample_tasks, INNER,
        optimizer=partial(torch.optim.Adam, lr=OUTER_LR),
        iterations=iterations, seed=0,
    )  # fmt: skip


def parameters(
    tensors: dict[str, torch.Tensor], n_tasks: int, shots: int
) -> dict[str, torch.Tensor]:
    """A run's trained parameters, from the tensors of this result."""
    prefix = f"{label(n_tasks, shots)}/"
    return {
        key.removeprefix(prefix): x
        for key, x in tensors.items()
        if key.startswith(prefix)
    }


def make():
    """The objective of the first iterations, and all trained parameters."""
    history, tensors = {}, {}
    for run in RUNS:
        trained = train(*run)
        history[label(*run)] = {
            "first": trained.history[:10].tolist(),
            "last": float(trained.history[-100:].mean()),
        }
        for key, x in trained.theta.items():
            tensors[f"{label(*run)}/{key}"] = x
    return {"history": history}, tensors
