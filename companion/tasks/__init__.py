"""Task distributions, one file each: what the book's learners learn from.

Every function draws a `TaskBatch` from a seed: an int, or a
``torch.Generator`` that is advanced, as `meta_train` wants it. Tensors are
float64 unless another ``dtype`` is asked for, and the same seed gives the same
tasks in any dtype. Beside support and query, a batch carries what its tasks
were drawn from (amplitudes, phases, weights), for figures and closed forms.
"""

from companion.tasks.glyphs import Glyphs, glyph_characters, glyphs
from companion.tasks.linear_regressions import (
    LinearRegressions,
    linear_regression_loss,
    linear_regressions,
)
from companion.tasks.quadratics import quadratic_loss, quadratics
from companion.tasks.sinusoids import Sinusoids, sinusoids

__all__ = [
    "Glyphs",
    "LinearRegressions",
    "Sinusoids",
    "glyph_characters",
    "glyphs",
    "linear_regression_loss",
    "linear_regressions",
    "quadratic_loss",
    "quadratics",
    "sinusoids",
]
