"""The outer loop: descend the meta-objective over sampled tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from companion.adaptation import InnerAlgorithm, Loss
from companion.calculus import (
    Parameters,
    check_parameters,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from companion.metagradient import Problem, meta_value_and_gradient
from companion.objective import Tasks

__all__ = ["MetaTrained", "meta_train"]


class MetaTrained(NamedTuple):
    """What `meta_train` returns.

    ``theta`` are the trained parameters, ``inner`` the inner algorithm with
    its learned rates, ``history`` the objective on each iteration's tasks
    before the step, a float64 tensor of the length of the iterations.
    """

    theta: Parameters
    inner: InnerAlgorithm
    history: torch.Tensor


def meta_train(
    loss: Loss,
    theta: Parameters,
    sample_tasks: Callable[[torch.Generator], Tasks],
    inner: InnerAlgorithm,
    *,
    optimizer: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer],
    iterations: int,
    method: str = "reverse",
    wrt: str | tuple[str, ...] = "theta",
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
) -> MetaTrained:
    """Meta-train parameters on a distribution of tasks.

    Parameters
    ----------
    loss, theta, inner
        As for `meta_objective`; ``theta`` is where training starts, and is
        not changed.
    sample_tasks
        ``sample_tasks(generator)`` draws the tasks of one iteration, with the
        randomness of that ``torch.Generator`` and no other.
    optimizer
        Makes any torch optimiser from a list of tensors, for example
        ``functools.partial(torch.optim.Adam, lr=1e-3)``.
    iterations
        How many outer steps in all, those of a resumed checkpoint included.
    method, wrt
        As for `meta_gradient`: ``wrt=("theta", "lr")`` learns the inner rates
        as well (Meta-SGD).
    seed
        Determines every draw: the same seed gives the same result, bit by
        bit, on the same machine and version of torch.
    checkpoint
        A file. If it exists, training goes on from it, to bitwise the same
        result as without the interruption; it is written every
        ``checkpoint_every`` iterations and at the end.

    Returns
    -------
    MetaTrained

    Raises
    ------
    ValueError
        If ``iterations`` is negative or no integer, if the objective is not
        finite (with the iteration), or if the checkpoint belongs to a run
        with another seed, method, ``wrt`` or other parameters, or is further
        than ``iterations``.

    Notes
    -----
    A progress bar is shown on a terminal, and nothing anywhere else.
    """
    whole = isinstance(iterations, int) and not isinstance(iterations, bool)
    if not whole or iterations < 0:
        raise ValueError(
            f"iterations must be a non-negative integer, got {iterations!r}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if checkpoint_every < 1:
        raise ValueError(
            f"checkpoint_every must be a positive integer, got "
            f"{checkpoint_every!r}"
        )
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must make an optimiser from a list of tensors, such "
            "as functools.partial(torch.optim.Adam, lr=1e-3), got one that "
            f"is made: {type(optimizer).__name__}"
        )
    check_parameters(theta)
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    start = Problem.of(loss, theta, inner, names).variables
    leaves, structure = tree_flatten(tree_map(_parameter, start))
    steps = optimizer(leaves)
    generator = torch.Generator().manual_seed(seed)
    history: list[float] = []
    run = {
        "seed": seed, "method": method, "wrt": list(names),
        "shapes": [list(x.shape) for x in leaves],
        "dtypes": [str(x.dtype) for x in leaves],
    }  # fmt: skip
    if checkpoint is not None and Path(checkpoint).exists():
        history = _resume(checkpoint, run, leaves, steps, generator)
        if len(history) > iterations:
            raise ValueError(
                f"the checkpoint {checkpoint} is of {len(history)} "
                f"iterations, more than the {iterations} asked for; delete "
                "it or name another file"
            )

    def here():
        variables = tree_unflatten([x.detach() for x in leaves], structure)
        fields = dict(variables)
        at = fields.pop("theta", theta)
        return at, replace(inner, **fields) if fields else inner

    todo = range(len(history), iterations)
    # disable=None: a bar on a terminal, nothing in a notebook or a file.
    for iteration in tqdm(todo, desc="meta-training", disable=None):
        tasks = sample_tasks(generator)
        values = []

        def closure(iteration=iteration, tasks=tasks, values=values):
            at, algorithm = here()
            try:
                value, slope = meta_value_and_gradient(
                    loss, at, tasks, algorithm, method, names
                )
            except (TypeError, ValueError) as error:
                error.add_note(f"in iteration {iteration} of meta_train")
                raise
            for leaf, direction in zip(leaves, tree_leaves(slope)):
                leaf.grad = direction.clone()
            values.append(float(value))
            return value

        steps.step(closure)
        history.append(values[0])
        done = iteration + 1
        if checkpoint is not None and (
            done % checkpoint_every == 0 or done == iterations
        ):
            _save(checkpoint, run, leaves, steps, generator, history)
    trained, algorithm = here()
    return MetaTrained(
        tree_map(torch.clone, trained),
        algorithm,
        torch.tensor(history, dtype=torch.float64),
    )


def _parameter(leaf):
    return leaf.detach().clone().requires_grad_()


def _save(path, run, leaves, steps, generator, history):
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    torch.save(
        {
            "run": run,
            "variables": [x.detach() for x in leaves],
            "optimizer": steps.state_dict(),
            "generator": generator.get_state(),
            "history": history,
        },
        partial,
    )
    # A run that is killed while it writes keeps the checkpoint before.
    os.replace(partial, path)


def _resume(path, run, leaves, steps, generator):
    saved = torch.load(path, weights_only=True)
    for key, value in run.items():
        if saved["run"][key] != value:
            raise ValueError(
                f"the checkpoint {path} is of a run with {key} = "
                f"{saved['run'][key]}, this one has {value}; delete it or "
                "name another file"
            )
    with torch.no_grad():
        for leaf, value in zip(leaves, saved["variables"]):
            leaf.copy_(value)
    steps.load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    return saved["history"]
