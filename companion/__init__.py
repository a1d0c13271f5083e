"""The companion of *The Calculus of Meta-Learning*.

One program, two algebras: every function here takes sympy symbols and torch
tensors alike, so that the book's derivations differentiate the very lines that
its numbers run.
"""

from companion.adaptation import (
    GradientDescent,
    InnerAlgorithm,
    adapt,
    adaptation_path,
)
from companion.calculus import (
    dot,
    gradient,
    hessian,
    hessian_vector_product,
    jacobian,
    value_and_gradient,
)
from companion.flow import GradientFlow
from companion.metagradient import meta_gradient, meta_value_and_gradient
from companion.models import functional, mlp
from companion.objective import (
    Evaluation,
    Task,
    TaskBatch,
    evaluate,
    meta_objective,
)
from companion.proximal import ConvergenceError, Proximal
from companion.training import MetaTrained, meta_train

__version__ = "0.1.0"

__all__ = [
    "ConvergenceError",
    "Evaluation",
    "GradientDescent",
    "GradientFlow",
    "InnerAlgorithm",
    "MetaTrained",
    "Proximal",
    "Task",
    "TaskBatch",
    "adapt",
    "adaptation_path",
    "dot",
    "evaluate",
    "functional",
    "gradient",
    "hessian",
    "hessian_vector_product",
    "jacobian",
    "meta_gradient",
    "meta_objective",
    "meta_train",
    "meta_value_and_gradient",
    "mlp",
    "value_and_gradient",
]
