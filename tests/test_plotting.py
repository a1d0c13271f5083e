"""The figures' style: colours apart, labels apart, numbers rounded."""

import itertools
import re
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from companion import plotting
from companion.plotting import COLORS, label_lines, show_interactive, use_style

METHODS = [
    "joint", "MAML", "FOMAML", "Reptile", "iMAML", "first-order iMAML",
    "continuous MAML", "continuous Reptile", "scratch",
]  # fmt: skip


@pytest.fixture(autouse=True)
def clean():
    backend = mpl.get_backend()
    plt.switch_backend("agg")
    with mpl.rc_context():
        yield
    plt.close("all")
    plt.switch_backend(backend)


# Colours. -------------------------------------------------------------------


def linear(color):
    c = np.array(mpl.colors.to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    to_xyz = np.array(
        [
            [0.4124, 0.3576, 0.1805],
            [0.2126, 0.7152, 0.0722],
            [0.0193, 0.1192, 0.9505],
        ]
    )
    t = to_xyz @ rgb / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira & Fernandes (2009), complete deficiency.
VISION = {
    "full": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def test_every_method_has_a_colour():
    assert list(COLORS) == METHODS


@pytest.mark.parametrize("vision", VISION)
def test_colours_can_be_told_apart_by_everybody(vision):
    seen = {
        name: lab(np.clip(VISION[vision] @ linear(color), 0, 1))
        for name, color in COLORS.items()
    }
    for first, second in itertools.combinations(seen, 2):
        distance = np.linalg.norm(seen[first] - seen[second])
        assert distance > 15, (first, second)


def test_colours_stand_out_from_the_page():
    for name, color in COLORS.items():
        luminance = np.array([0.2126, 0.7152, 0.0722]) @ linear(color)
        assert 1.05 / (luminance + 0.05) > 2.2, name


# Style. ---------------------------------------------------------------------


def test_the_ground_is_transparent(tmp_path):
    use_style()
    fig, ax = plt.subplots()
    ax.plot([0, 1], [0, 1])
    fig.savefig(tmp_path / "figure.png")
    picture = plt.imread(tmp_path / "figure.png")
    assert picture.shape[2] == 4
    assert (picture[..., 3] == 0).mean() > 0.8


def test_text_can_be_read_on_a_phone():
    """At 350 pixels across, the smallest text has 8 pixels or more."""
    use_style()
    width = mpl.rcParams["figure.figsize"][0] * 72
    for text in ("font.size", "xtick.labelsize", "legend.fontsize"):
        assert mpl.rcParams[text] * 350 / width >= 8


def test_the_style_is_in_the_package_and_is_valid():
    assert plotting._STYLE.name == "book.mplstyle"
    mpl.rc_params_from_file(
        plotting._STYLE, fail_on_error=True, use_default_template=False
    )


# Labels. --------------------------------------------------------------------


def boxes(fig, labels):
    fig.canvas.draw()
    renderer = fig.canvas.get_renderer()
    # The text alone: an annotation's box contains its joint.
    return [
        mpl.text.Text.get_window_extent(label, renderer) for label in labels
    ]


def filters(ax, K=3):
    a = np.linspace(0, 1, 50)
    curves = {
        "joint": a,
        "MAML": a * (1 - a) ** (2 * K),
        "FOMAML": a * (1 - a) ** K,
        "Reptile": 1 - (1 - a) ** K,
        "iMAML": a / (1 + a) ** 2,
        "first-order iMAML": a / (1 + a),
        "continuous MAML": a * np.exp(-2 * K * a),
        "continuous Reptile": 1 - np.exp(-K * a),
    }
    for name, curve in curves.items():
        ax.plot(a, curve, label=name, color=COLORS[name])


def test_the_labels_of_the_filter_picture_do_not_overlap():
    use_style()
    fig, ax = plt.subplots()
    filters(ax)
    labels = label_lines(ax)
    assert [t.get_text() for t in labels] == METHODS[:-1]
    for t in labels:
        assert t.get_color() == COLORS[t.get_text()]
    for first, second in itertools.combinations(boxes(fig, labels), 2):
        assert not first.overlaps(second)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_coinciding_lines_have_labels_apart(scale):
    use_style()
    fig, ax = plt.subplots()
    ax.set_yscale(scale)
    for k in range(4):
        ax.plot([0, 1], [1, 2], label=f"line {k}")
    labels = label_lines(ax)
    placed = boxes(fig, labels)
    for first, second in itertools.combinations(placed, 2):
        assert not first.overlaps(second)
    # On average they stand where the lines end.
    middle = np.mean([(box.y0 + box.y1) / 2 for box in placed])
    assert abs(middle - ax.transData.transform((1, 2))[1]) < 5


def test_a_lonely_label_stands_at_its_line_without_a_joint():
    fig, ax = plt.subplots()
    (line,) = ax.plot([0, 1], [0, 1], label="alone")
    (label,) = label_lines(ax)
    (box,) = boxes(fig, [label])
    x, y = ax.transData.transform((1, 1))
    assert 0 < box.x0 - x < 15
    assert abs((box.y0 + box.y1) / 2 - y) < 5
    assert label.arrow_patch is None
    assert label.get_color() == line.get_color()


def test_lines_without_label_or_out_of_sight_get_none():
    _, ax = plt.subplots()
    ax.plot([0, 1], [0, 1])
    ax.plot([0, 1], [5, 6], label="above")
    ax.plot([0, 1], [np.nan, np.nan], label="nowhere")
    ax.plot([0, 1, 2], [0, 1, np.nan], label="here")
    ax.set_ylim(0, 2)
    assert [t.get_text() for t in label_lines(ax)] == ["here"]
    assert label_lines(plt.subplots()[1]) == []


def test_chosen_lines_only():
    _, ax = plt.subplots()
    first, _ = ax.plot([0, 1], [[0, 1], [1, 0]], label=["one", "two"])
    assert [t.get_text() for t in label_lines(ax, [first])] == ["one"]


def test_spreading_moves_as_little_as_it_must():
    spread = plotting._spread
    assert spread([0.0, 10.0, 20.0], 5) == [0.0, 10.0, 20.0]
    assert spread([10.0, 10.0], 4) == [8.0, 12.0]
    assert spread([11.0, 10.0, 30.0], 4) == [12.5, 8.5, 30.0]


# Interactive figures. -------------------------------------------------------

go = pytest.importorskip("plotly.graph_objects")


def figure():
    x = np.linspace(0, 1, 4)
    return go.Figure(
        data=[go.Scatter(x=x, y=np.sin(x) / 3, name="α = ½")],
        frames=[go.Frame(data=[go.Scatter(x=x, y=x / 7)], name="one")],
        layout={
            "sliders": [{"steps": [{"label": "one", "method": "animate"}]}]
        },
    )


def shown(monkeypatch, *args, **kwargs):
    outputs = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, raw: outputs.append(data)
    )
    show_interactive(*args, **kwargs)
    (bundle,) = outputs
    return bundle


def test_the_page_needs_no_other_host_and_no_package(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    bundle = shown(monkeypatch, figure(), "fig-filter", alt='a "curve"')
    assert set(bundle) == {"text/html", "text/plain"}
    page = bundle["text/html"]
    assert '<div id="fig-filter" class="plotly-graph-div"' in page
    assert 'aria-label="a &quot;curve&quot;"' in page
    assert not re.search(r"<script[^>]+src=", page)
    assert "cdn" not in page
    assert '"displayModeBar": false' in page
    assert "bdata" not in page
    assert len(page) < 10_000


def test_the_stored_page_is_the_same_every_time(monkeypatch):
    pages = [shown(monkeypatch, figure(), "fig-a") for _ in range(2)]
    assert pages[0] == pages[1]


def test_numbers_are_rounded_and_noise_is_zero():
    rounded = plotting._rounded
    assert rounded([1 / 3, 1e-17, 1.0, 2], 5) == [0.33333, 0, 1, 2]
    assert rounded(np.array([[1 / 3], [2 / 3]]), 3) == [[0.333], [0.667]]
    assert rounded({"a": (np.float64(1 / 7), "x", None, True)}, 2) == {
        "a": [0.14, "x", None, True]
    }
    # What is small by itself is no noise.
    assert rounded([1.23456789e-9, 2e-9], 5) == [1.2346e-09, 2e-09]
    assert rounded(float("inf"), 5) == float("inf")


def test_arrays_that_plotly_encoded_are_decoded():
    content = plotting._rounded(figure().to_plotly_json(), 5)
    assert content["data"][0]["x"] == [0, 0.33333, 0.66667, 1]
    grid = go.Figure(go.Heatmap(z=np.eye(2) / 3)).to_plotly_json()
    assert plotting._rounded(grid, 3)["data"][0]["z"] == [
        [0.333, 0],
        [0, 0.333],
    ]


def test_rounding_hides_the_machine(monkeypatch):
    page = shown(monkeypatch, figure(), "fig-a")["text/html"]
    other = figure()
    other.data[0].y = np.array(other.data[0].y) * (1 + 1e-15)
    assert shown(monkeypatch, other, "fig-a")["text/html"] == page


def test_the_figure_is_not_changed(monkeypatch):
    given = figure()
    before = given.to_json()
    shown(monkeypatch, given, "fig-a")
    assert given.to_json() == before


def test_in_a_jupyter_server_plotly_draws_itself(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "chapter.ipynb")
    bundle = shown(monkeypatch, figure(), "fig-a")
    assert "data" in bundle["application/vnd.plotly.v1+json"]


@pytest.mark.parametrize("name", ["", "1st", "fig a", 'x"><', "-x"])
def test_a_name_that_is_no_id_raises(name):
    with pytest.raises(ValueError, match="name must be an id"):
        show_interactive(figure(), name)


def test_the_companion_needs_no_plotly():
    """Importing it loads none, and its absence is told with the remedy."""
    code = (
        "import sys; import companion, companion.plotting as p;"
        "assert 'plotly' not in sys.modules;"
        "sys.modules['plotly'] = None;"
        "p.show_interactive(None, 'fig-a')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode
    assert "ImportError: interactive figures need plotly" in result.stderr
