"""How the book's figures look: one style, one colour a method, direct labels.

Call `use_style` once, at the top of a notebook. The colours can be told apart
by colour-blind readers (all but two are those of Okabe and Ito, 2008); yet no
figure should need them, since `label_lines` names each line at its end.
"""

from __future__ import annotations

import base64
import html
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["COLORS", "label_lines", "show_interactive", "use_style"]

_OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky blue": "#56B4E9",
    "bluish green": "#009E73",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "reddish purple": "#CC79A7",
}

COLORS: dict[str, str] = {
    "joint": _OKABE_ITO["black"],
    "MAML": _OKABE_ITO["blue"],
    "FOMAML": _OKABE_ITO["sky blue"],
    "Reptile": _OKABE_ITO["bluish green"],
    "iMAML": _OKABE_ITO["vermillion"],
    "first-order iMAML": _OKABE_ITO["orange"],
    "continuous MAML": _OKABE_ITO["reddish purple"],
    "continuous Reptile": "#6000C0",  # theirs is a yellow too pale for a line
    "scratch": "#555555",
}
"""The colour of every method, the same in all chapters."""

_STYLE = Path(__file__).with_name("book.mplstyle")


def use_style() -> None:
    """Set matplotlib to the book's style; in a notebook, at double density."""
    plt.style.use(_STYLE)
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if getattr(get_ipython(), "kernel", None) is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        # Not svg: a picture of vectors holds unrounded coordinates, which
        # differ from machine to machine.
        set_matplotlib_formats("retina")


def label_lines(
    ax: Axes,
    lines: list[Line2D] | None = None,
    *,
    size: float | None = None,
    gap: float = 1.2,
) -> list[Annotation]:
    """Write each line's label at its right end, in its colour.

    Call it last: the labels fit the limits that the axes have then. Labels
    that would overlap are moved apart, and joined to their lines by a thin
    one.

    Parameters
    ----------
    ax
        The axes.
    lines
        Which lines; by default all that have a label.
    size
        The font size; by default the style's.
    gap
        The least distance of two labels, in units of the font size.

    Returns
    -------
    list of Annotation
        The labels, in the order of the lines.
    """
    lines = list(ax.get_lines() if lines is None else lines)
    ends = {line: _right_end(ax, line) for line in lines if _label(line)}
    lines = [line for line, end in ends.items() if end is not None]
    if not lines:
        return []
    size = size or mpl.rcParams["legend.fontsize"]
    size = mpl.font_manager.FontProperties(size=size).get_size_in_points()
    at = {line: ax.transData.transform(ends[line]) for line in lines}
    point = ax.figure.dpi / 72
    right = max(x for x, _ in at.values())
    heights = _spread([y for _, y in at.values()], gap * size * point)
    labels = []
    for line, height in zip(lines, heights):
        x, y = at[line]
        moved = abs(height - y) > size * point / 3 or right - x > size * point
        joint = {
            "arrowstyle": "-",
            "color": line.get_color(),
            "linewidth": 0.7,
            "shrinkA": 1,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        labels.append(
            ax.annotate(
                line.get_label(),
                xy=ends[line],
                xytext=(
                    (right - x) / point + (14 if moved else 5),
                    (height - y) / point,
                ),
                textcoords="offset points",
                va="center",
                ha="left",
                size=size,
                color=line.get_color(),
                annotation_clip=False,
                arrowprops=joint if moved else None,
            )
        )
    return labels


def _label(line):
    label = str(line.get_label())
    return "" if label.startswith("_") else label


def _right_end(ax, line):
    """The last point of the line inside the axes, in data coordinates."""
    points = np.column_stack([
        np.asarray(part, dtype=float) for part in line.get_data()
    ])  # fmt: skip
    (left, right), (low, high) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    x, y = points.T
    with np.errstate(invalid="ignore"):
        inside = (left <= x) & (x <= right) & (low <= y) & (y <= high)
    return tuple(points[inside][-1]) if inside.any() else None


def _spread(wanted, gap):
    """Positions at least ``gap`` apart, in order, nearest to the wanted ones.

    The least-squares answer: neighbours that collide form a block, which sits
    where its members wish on average.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    blocks: list[list[float]] = []
    for rank, index in enumerate(order):
        blocks.append([wanted[index] - rank * gap])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    level = [_mean(block) for block in blocks for _ in block]
    placed = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        placed[index] = level[rank] + rank * gap
    return placed


def _mean(values):
    return sum(values) / len(values)


def show_interactive(
    figure: go.Figure, name: str, *, alt: str = "", digits: int = 5
) -> None:
    """Display a plotly figure as a static page can hold it.

    The page brings plotly.js; the figure needs no server and no network. Its
    numbers are rounded, so that what a notebook stores is the same on every
    machine, and its look is that of the book's other figures.

    Parameters
    ----------
    figure
        A plotly figure, which is not changed.
    name
        The id of the figure in the page: letters, digits and hyphens.
    alt
        What the figure shows, for a reader who cannot see it.
    digits
        How many significant digits of every number are kept.

    Raises
    ------
    ImportError
        If plotly is not installed: only the book needs it.
    ValueError
        If ``name`` is not fit for an id.
    """
    from IPython.display import display

    if not re.fullmatch("[A-Za-z][A-Za-z0-9-]*", name):
        raise ValueError(
            "name must be an id of letters, digits and hyphens that starts "
            f"with a letter, got {name!r}"
        )
    bundle = _bundle(figure, name, alt, digits)
    display(bundle, raw=True)


def _bundle(figure, name, alt, digits):
    try:
        import plotly.graph_objects as go
        import plotly.io as pio
    except ImportError as error:
        raise ImportError(
            "interactive figures need plotly: pip install plotly"
        ) from error
    content = _rounded(figure.to_plotly_json(), digits)
    content["layout"]["template"] = _template()
    styled = go.Figure(content)
    page = pio.to_html(
        styled,
        full_html=False,
        include_plotlyjs=_plotly_js(),
        div_id=name,
        config={"responsive": True, "displayModeBar": False},
    )
    if alt:
        page = (
            f'<div role="figure" aria-label="{html.escape(alt)}">{page}</div>'
        )
    bundle = {"text/plain": f"<interactive figure {name}>", "text/html": page}
    # A Jupyter server's front end has no plotly.js for the HTML; it draws
    # plotly's own format. What the book's build stores is the HTML alone.
    if "JPY_SESSION_NAME" in os.environ:
        bundle["application/vnd.plotly.v1+json"] = content
    return bundle


def _plotly_js():
    """Where plotly.js comes from: the book's page, or in Colab its host."""
    return "cdn" if "google.colab" in sys.modules else False


def _template() -> dict[str, Any]:
    axis = {
        "showgrid": False,
        "zeroline": False,
        "showline": True,
        "linecolor": "#555555",
        "ticks": "outside",
        "tickcolor": "#555555",
        "automargin": True,
    }
    return {
        "layout": {
            "colorway": list(_OKABE_ITO.values()),
            "font": {
                "family": "DejaVu Sans, Verdana, sans-serif",
                "size": 13,
                "color": "#333333",
            },
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 50, "r": 20, "t": 30, "b": 50},
            "xaxis": axis,
            "yaxis": axis,
            "hovermode": "closest",
        }
    }


def _rounded(value, digits):
    """The value with lists for arrays and rounded numbers.

    What is lost against its neighbours in a list is rounding noise: zero.
    """
    if isinstance(value, dict):
        if {"dtype", "bdata"} <= set(value):
            value = _decoded(value)
        else:
            return {k: _rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        noise = 1e-12 * max(map(_size, value), default=0)
        return [
            0 if 0 < _size(v) < noise else _rounded(v, digits) for v in value
        ]
    if isinstance(value, float) and math.isfinite(value):
        value = float(f"{value:.{digits}g}")
        return int(value) if value == int(value) else value
    return value


def _size(value):
    number = isinstance(value, float) and math.isfinite(value)
    return abs(value) if number else 0


def _decoded(typed):
    values = np.frombuffer(
        base64.b64decode(typed["bdata"]), dtype=typed["dtype"]
    )
    if "shape" in typed:
        shape = [int(n) for n in str(typed["shape"]).split(",")]
        values = values.reshape(shape)
    return values
