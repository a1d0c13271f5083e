"""Tasks, and the objective that meta-learning minimises."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch

from companion.adaptation import (
    InnerAlgorithm,
    Loss,
    adapt,
    adaptation_path,
    check_data,
    check_inner,
    parameters_of,
)
from companion.calculus import (
    Parameters,
    differentiated,
    is_finite,
    is_symbolic,
    scalar,
    select,
    tree_leaves,
    tree_map,
)

__all__ = ["Evaluation", "Task", "TaskBatch", "evaluate", "meta_objective"]


class Task(NamedTuple):
    """One task: what it adapts on, and what it is judged on.

    Both are anything that the loss understands: a pair ``(x, y)`` of tensors,
    symbols, a sympy function, or None for a loss that needs no data.
    """

    support: Any
    query: Any


@dataclass(frozen=True, eq=False)
class TaskBatch(Sequence):
    """Many tasks of one shape, stacked: the fast form of a list of tasks.

    Every tensor in ``support`` and ``query`` has a leading task axis of one
    common length; what is not a tensor is shared by the tasks. A batch is
    also a sequence of its `Task` s.

    Raises
    ------
    ValueError
        If there is no tensor, no task, or the tensors disagree on the axis.

    Examples
    --------
    >>> x = torch.zeros(25, 10, 1)
    >>> len(TaskBatch(support=(x, x), query=(x, x)))
    25
    """

    support: Any
    query: Any

    def __post_init__(self):
        sizes = {
            x.shape[0] if x.ndim else None
            for x in tree_leaves((self.support, self.query))
            if isinstance(x, torch.Tensor)
        }
        if len(sizes) != 1 or None in sizes:
            raise ValueError(
                "the tensors of a TaskBatch need a leading task axis of one "
                f"length, got {sorted(sizes, key=str) or 'no tensors'}"
            )
        if 0 in sizes:
            raise ValueError("tasks must not be empty, got a batch of none")
        object.__setattr__(self, "_size", sizes.pop())

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> TaskBatch:
        """Stack tasks of one structure and one shape.

        What is no tensor must be the same object in all tasks.
        """
        tasks = check_tasks(tasks)

        def stack(*leaves):
            if isinstance(leaves[0], torch.Tensor):
                shapes = {tuple(x.shape) for x in leaves}
                if len(shapes) > 1:
                    raise ValueError(
                        "tasks of different shapes cannot be stacked, got "
                        f"{sorted(shapes)}; pass them as a list instead"
                    )
                return torch.stack(leaves)
            if any(x is not leaves[0] and x != leaves[0] for x in leaves):
                raise ValueError(
                    "what is not a tensor must be the same in all tasks of a "
                    f"batch, got {leaves[0]!r} and another; pass a list"
                )
            return leaves[0]

        return cls(*(tree_map(stack, *parts) for parts in zip(*tasks)))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return TaskBatch(*(self._part(p, index) for p in self._parts))
        if not -len(self) <= index < len(self):
            raise IndexError(f"task {index} of a batch of {len(self)}")
        return Task(*(self._part(part, index) for part in self._parts))

    def __iter__(self) -> Iterator[Task]:
        return (self[index] for index in range(len(self)))

    @property
    def _parts(self):
        return self.support, self.query

    @staticmethod
    def _part(tree, index):
        return tree_map(
            lambda x: select(x, index) if isinstance(x, torch.Tensor) else x,
            tree,
        )


Tasks = Sequence[Task] | TaskBatch


def meta_objective(
    loss: Loss, theta: Parameters, tasks: Tasks, inner: InnerAlgorithm
):
    """The meta-objective F(θ): the mean query loss after adapting.

    F(θ) = mean_i L_i^q(U_i(θ)), where U_i adapts on the support data of task i.

    Parameters
    ----------
    loss
        ``loss(theta, data)``, a scalar, written for one task.
    theta
        The initial parameters: tensors or symbols, or a tree of them.
    tasks
        A sequence of `Task` s, which may differ in size, or a `TaskBatch`.
    inner
        The inner algorithm; with ``steps=0`` F is the joint objective.

    Returns
    -------
    Tensor or sympy expression
        A scalar, differentiable in ``theta`` and in the rates of ``inner``.

    Raises
    ------
    ValueError, TypeError
        For an empty set of tasks, a bare `Task`, a loss that is not a finite
        scalar, and data on another dtype or device than ``theta``.

    Notes
    -----
    The book's ``eq-meta-objective``; Finn, Abbeel & Levine (2017), eq. 1.
    """
    tasks = check_tasks(tasks, theta)
    values = per_task(
        lambda task: task_objective(loss, theta, task, inner),
        tasks,
        theta,
        inner,
    )
    value = mean(values)
    if not is_finite(value):
        raise ValueError(f"the query loss is not finite, got {float(value)}")
    return value


def task_objective(loss, theta, task, inner):
    """One task's share of the meta-objective, L^q(U(θ))."""
    return scalar(loss(adapt(loss, theta, task.support, inner), task.query))


class Evaluation(NamedTuple):
    """A metric of every task after every inner step, and its summary.

    ``per_task`` has the shape (tasks, K + 1), ``mean`` and ``std`` the shape
    (K + 1,): column 0 is before adapting. ``std`` is the sample standard
    deviation over tasks (zero for one task); the standard error of ``mean``
    is ``std / sqrt(tasks)``.
    """

    per_task: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def evaluate(
    loss: Loss,
    theta: Parameters,
    tasks: Tasks,
    inner: InnerAlgorithm,
    metric: Callable | None = None,
) -> Evaluation:
    """How well ``theta`` adapts: a metric on the query data, step by step.

    Parameters
    ----------
    loss, theta, tasks, inner
        As for `meta_objective`; tensors only.
    metric
        ``metric(theta, data)``, one number; by default the loss.

    Returns
    -------
    Evaluation
        The metric before adapting and after each of the K inner steps, for
        every task, with its mean and spread over the tasks.
    """
    metric = metric or loss
    if is_symbolic(theta):
        raise TypeError(
            "evaluate needs theta of tensors, got symbols; the formula of the "
            "mean is meta_objective(loss, theta, tasks, inner)"
        )
    tasks = check_tasks(tasks, theta)
    with torch.no_grad():
        per_task = torch.stack([
            torch.stack([
                torch.as_tensor(metric(point, task.query)).detach()
                for point in adaptation_path(loss, theta, task.support, inner)
            ])
            for task in tasks
        ])  # fmt: skip
    if not is_finite(per_task):
        task, step = (~torch.isfinite(per_task)).nonzero()[0].tolist()
        raise ValueError(
            f"the metric is not finite, got {float(per_task[task, step])} on "
            f"tasks[{task}] after {step} inner steps"
        )
    spread = per_task.std(0) if len(tasks) > 1 else torch.zeros_like(
        per_task[0]
    )  # fmt: skip
    return Evaluation(per_task, per_task.mean(0), spread)


# Means over tasks. ----------------------------------------------------------


def check_tasks(tasks: Tasks, theta: Parameters = None) -> Tasks:
    """The tasks as a batch or a non-empty tuple, fitting ``theta``."""
    if isinstance(tasks, Task):
        raise TypeError(
            "tasks must be a sequence of tasks, got a bare Task; "
            "write [task] for a set of one"
        )
    if not isinstance(tasks, TaskBatch):
        if not isinstance(tasks, Sequence):
            raise TypeError(
                "tasks must be a sequence of Task or a TaskBatch, got "
                f"{type(tasks).__name__}"
            )
        tasks = tuple(tasks)
        if not tasks:
            raise ValueError("tasks must not be empty, got none")
        for index, task in enumerate(tasks):
            if not isinstance(task, Task):
                raise TypeError(
                    "tasks must hold Task(support, query), got "
                    f"{type(task).__name__} in tasks[{index}]"
                )
    if theta is not None:
        if isinstance(tasks, TaskBatch):
            check_data(theta, task_data(tasks), "tasks")
        else:
            for index, task in enumerate(tasks):
                check_data(theta, tuple(task), f"tasks[{index}]")
    return tasks


def per_task(
    f: Callable, tasks: Tasks, theta: Parameters, inner: InnerAlgorithm
):
    """``f`` of every task: results with a task axis for a batch, or a list.

    ``theta`` and ``inner`` are what ``f`` depends on besides the task.

    A batch is computed with one `torch.func.vmap`, which must stay the
    outermost transform: a derivative taken from outside through a vmapped
    batch or layer norm is wrong by some percent (pytorch/functorch #534). So
    where somebody differentiates from outside, a batch goes task by task, as
    does one whose loss cannot be vmapped.
    """
    check_inner(inner)
    data, reason = task_data(tasks), None
    together = isinstance(tasks, TaskBatch) and getattr(
        inner, "vmappable", True
    )
    if together and not differentiated((theta, parameters_of(inner), data)):
        axes = [
            tree_map(lambda x: 0 if isinstance(x, torch.Tensor) else None, p)
            for p in data
        ]
        try:
            return torch.func.vmap(
                lambda support, query: f(Task(support, query)),
                in_dims=tuple(axes),
            )(*data)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
    results = []
    for index, task in enumerate(tasks):
        try:
            results.append(f(task))
        except (
            TypeError, ValueError, ArithmeticError, RuntimeError,
        ) as error:  # fmt: skip
            error.add_note(f"in tasks[{index}]")
            raise
    if reason:
        warnings.warn(
            "the loss cannot be computed for all tasks at once, so the tasks "
            f"went one by one, more slowly; the reason: {reason}",
            stacklevel=4,
        )
    return results


def mean(values):
    """The mean over tasks of what `per_task` returned, leaf by leaf."""
    if isinstance(values, list):
        return tree_map(lambda *each: reduce(add, each) / len(each), *values)
    return tree_map(lambda x: x.mean(0), values)


def task_data(tasks: Tasks) -> tuple:
    """All data of the tasks: the stacked ones of a batch, or a pair a task."""
    if isinstance(tasks, TaskBatch):
        return tasks.support, tasks.query
    return tuple(tuple(task) for task in tasks)
