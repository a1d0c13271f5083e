"""How well the glyph classifiers adapt: to tasks they know, and to new ones."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from companion.adaptation import adaptation_path
from companion.experiments import load
from companion.experiments.glyph_training import (
    INNER,
    RUNS,
    drawn,
    label,
    network,
    parameters,
    problem,
    training_tasks,
)
from companion.objective import TaskBatch

N_TASKS, NEW_SEED, TEST_SEED = 300, 2, 3


def measured(theta, tasks: TaskBatch) -> dict[str, torch.Tensor]:
    """Query accuracy and loss, each (n_tasks, K + 1), a column a step."""
    loss, _ = problem()
    module = network()

    def one(support, query):
        x, y = query
        outputs = [
            torch.func.functional_call(module, point, (x,))
            for point in adaptation_path(loss, theta, support, INNER)
        ]
        right = [(z.argmax(-1) == y).to(z.dtype).mean() for z in outputs]
        return torch.stack(right), torch.stack(
            [cross_entropy(z, y) for z in outputs]
        )

    with torch.no_grad():
        right, losses = torch.func.vmap(one)(tasks.support, tasks.query)
    return {"accuracy": right, "loss": losses}


def task_sets(n_tasks: int, shots: int) -> dict[str, TaskBatch]:
    """What a run is judged on, from the known to the new."""
    return {
        "training tasks": training_tasks(n_tasks, shots)[:N_TASKS],
        "new tasks": drawn(N_TASKS, shots, "train", NEW_SEED),
        "new letters": drawn(N_TASKS, shots, "test", TEST_SEED),
    }


def summary(values: torch.Tensor) -> dict[str, list[float]]:
    """The mean over tasks after every inner step, and its standard error."""
    error = values.std(0) / len(values) ** 0.5
    return {"mean": values.mean(0).tolist(), "error": error.tolist()}


def judged(theta, n_tasks: int, shots: int) -> dict:
    """Accuracy and loss of some parameters on every set of tasks."""
    return {
        name: {k: summary(x) for k, x in measured(theta, tasks).items()}
        for name, tasks in task_sets(n_tasks, shots).items()
    }


def make():
    """Every run, and the untrained network for each number of shots."""
    tensors = load("glyph_training").tensors
    runs = {
        label(*run): {"n_tasks": run[0], "shots": run[1]}
        | judged(parameters(tensors, *run), *run)
        for run in RUNS
    }
    _, untrained = problem()
    scratch = {
        str(shots): judged(untrained, 40, shots)["new letters"]
        for shots in sorted({shots for _, shots in RUNS})
    }
    return {"runs": runs, "untrained": scratch}, {}
