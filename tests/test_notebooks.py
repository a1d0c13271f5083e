"""What a notebook of the book must be, apart from being right.

That its outputs are what its cells give today, strict nbval tests. A cell
that was never run passes there, and so does a picture that has gone; so these
tests look at what is stored.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import notebooks as tool
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = tool.chapters()
CHAPTERS = [path for path in NOTEBOOKS if path.parent != ROOT / "book"]
LINES = 22
# The article's programs are quoted as they stand.
EXHIBITS = ("class MAML(nn.Module):", "def meta_learning_ode(theta, t, tasks):")
HIDDEN = {"hide-input", "hide-cell", "remove-cell", "remove-input"}

UNSTABLE = {
    "an object's address": r"\b0x[0-9a-f]{6,}",
    "a machine's path": r"(/home/|/Users/|/root/|/tmp/|site-packages|[A-Z]:\\)",
    "a widget": r"application/vnd\.jupyter\.widget",
    "a progress bar": r"\d(it/s|s/it)\b",
    "this machine's folder": re.escape(str(ROOT)),
}


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "path", paths, ids=[path.stem for path in paths]
    )


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> Iterator[tuple[str, nbformat.NotebookNode]]:
    for number, cell in enumerate(read(path).cells):
        if cell.cell_type == "code":
            first = cell.source.strip().partition("\n")[0]
            yield f"{path.name}, cell {number}: {first}", cell


def tags(cell: nbformat.NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", ()))


def prose(path: Path) -> str:
    return "\n\n".join(
        cell.source for cell in read(path).cells if cell.cell_type == "markdown"
    )


def test_the_book_has_notebooks():
    assert CHAPTERS


@each(NOTEBOOKS)
def test_notebook_is_valid_and_of_a_plain_python_3_kernel(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}


@each(NOTEBOOKS)
def test_every_cell_was_run_from_top_to_bottom(path):
    counts = []
    for where, cell in code_cells(path):
        assert cell.source.strip(), f"{where} is empty"
        assert cell.execution_count is not None, f"{where} was never run"
        counts.append(cell.execution_count)
    assert counts == list(range(1, len(counts) + 1))


@each(NOTEBOOKS)
def test_no_cell_failed_unless_it_is_meant_to(path):
    for where, cell in code_cells(path):
        failed = any(out.output_type == "error" for out in cell.outputs)
        assert failed == ("raises-exception" in tags(cell)), where


@each(NOTEBOOKS)
def test_nothing_is_printed_to_the_error_stream(path):
    for where, cell in code_cells(path):
        assert not any(out.get("name") == "stderr" for out in cell.outputs), (
            where
        )


@each(NOTEBOOKS)
def test_no_check_is_switched_off(path):
    for where, cell in code_cells(path):
        off = {tag for tag in tags(cell) if tag.startswith("nbval")}
        assert not off and "NBVAL" not in cell.source, where


@each(NOTEBOOKS)
def test_no_picture_is_stored(path):
    for where, cell in code_cells(path):
        for output in cell.outputs:
            kinds = set(output.get("data", {}))
            assert not any(kind.startswith("image/") for kind in kinds), where
    assert "attachments" not in path.read_text("utf-8")


@each(NOTEBOOKS)
@pytest.mark.parametrize("what", UNSTABLE)
def test_outputs_are_the_same_on_every_machine(path, what):
    for where, cell in code_cells(path):
        for output in cell.outputs:
            found = re.search(UNSTABLE[what], str(output))
            assert not found, f"{where} shows {what}: {found[0]}"


@each(NOTEBOOKS)
def test_no_cell_measures_time_or_calls_a_shell(path):
    for where, cell in code_cells(path):
        if tags(cell) & {"remove-cell"}:
            continue  # the installation in Colab
        assert not re.search(r"^\s*(%%?time|!)", cell.source, re.MULTILINE), (
            where
        )
        assert "tqdm" not in cell.source, where


@each(NOTEBOOKS)
def test_cells_are_short(path):
    for where, cell in code_cells(path):
        if tags(cell) & HIDDEN or cell.source.startswith(EXHIBITS):
            continue
        lines = set()
        for statement in ast.parse(cell.source).body:
            if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                lines.update(range(statement.lineno, statement.end_lineno + 1))
        source = cell.source.splitlines()
        long = sum(1 for line in lines if source[line - 1].strip())
        assert long <= LINES, f"{where}: {long} lines"


@each(NOTEBOOKS)
def test_code_fits_the_text_column(path):
    for where, cell in code_cells(path):
        if cell.source.startswith(EXHIBITS):
            continue
        longest = max(map(len, cell.source.splitlines()))
        assert longest <= 80, f"{where}: a line of {longest} characters"


@each(NOTEBOOKS)
def test_every_figure_has_a_name_a_caption_and_a_text_for_the_blind(path):
    names = []
    for where, cell in code_cells(path):
        outputs = "".join(map(str, cell.outputs))
        if "<Figure size" in outputs:
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            image = cell.metadata.get("mystnb", {}).get("image", {})
            assert figure.get("name", "").startswith("fig-"), where
            assert len(figure.get("caption", "")) >= 20, where
            assert len(image.get("alt", "")) >= 20, where
            assert image["alt"] != figure["caption"], where
            names.append(figure["name"])
        if "plotly-graph-div" in outputs:
            assert re.search(r'aria-label="[^"]{20,}"', outputs), where
        if "plt." in cell.source or "show_interactive(" in cell.source:
            assert tags(cell) & HIDDEN, f"{where}: plot code is not hidden"
    assert len(set(names)) == len(names)


@each(CHAPTERS)
def test_chapter_starts_with_title_promise_and_outcomes(path):
    title, *_ = read(path).cells
    assert re.match(r"(\([\w-]+\)=\n+)?# \S", title.source)
    opening = prose(path).partition("\n## ")[0]
    promise = re.search(r"After this chapter you can\b(.*)", opening, re.DOTALL)
    assert promise, "no outcomes before the first section"
    outcomes = re.findall(r"^(?:[-*]|\d\.) ", promise[1], re.MULTILINE)
    assert 3 <= len(outcomes) <= 6


@each(CHAPTERS)
def test_chapter_has_exercises_with_solutions_that_are_checked(path):
    text = prose(path)
    code = "\n".join(cell.source for _, cell in code_cells(path))
    labels = re.findall(
        r"^[`:]{3,}\{exercise\}.*\n(?:---\n)?:?label: (\S+)", text, re.MULTILINE
    )
    assert len(labels) == len(
        re.findall(r"^[`:]{3,}\{exercise\}", text, re.MULTILINE)
    )
    assert len(labels) >= 4
    for label in labels:
        assert label.startswith("ex-")
        assert re.search(
            r"\{solution(-start)?\} " + re.escape(label) + "$",
            text,
            re.MULTILINE,
        ), f"{label} has no solution"
        name = label.removeprefix("ex-")
        assert re.search(rf"""check\(\s*["']{name}["']""", code), (
            f"the solution of {label} is not checked"
        )


@each(CHAPTERS)
def test_chapter_has_a_practice_exercises_and_notes(path):
    headings = re.findall(r"^##+ (.+)$", prose(path), re.MULTILINE)
    assert any(heading.startswith("In practice") for heading in headings)
    assert any("Exercise" in heading for heading in headings)
    assert any(heading.startswith("Notes") for heading in headings)


def test_the_tool_drops_pictures_and_keeps_text():
    cell = nbformat.v4.new_code_cell(
        "plot()",
        metadata={"execution": {"iopub.status.busy": "now"}, "tags": ["a"]},
        outputs=[
            nbformat.v4.new_output(
                "display_data",
                {"image/png": "...", "text/plain": "<Figure size 1x1>"},
            ),
            nbformat.v4.new_output("stream", name="stdout", text="1"),
        ],
    )
    notebook = nbformat.v4.new_notebook(
        cells=[cell],
        metadata={"language_info": {"name": "python", "version": "3.11.7"}},
    )
    stripped = tool.strip(notebook)
    first, second = stripped.cells[0].outputs
    assert first.data == {"text/plain": "<Figure size 1x1>"}
    assert second.text == "1"
    assert stripped.cells[0].metadata == {"tags": ["a"]}
    assert stripped.metadata.language_info == {"name": "python"}


def test_the_tool_leaves_a_notebook_that_fails_as_it_was(tmp_path, capsys):
    path = tmp_path / "fails.ipynb"
    cells = [nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    with pytest.raises(tool.CellExecutionError, match="ZeroDivisionError"):
        tool.run(path)
    assert path.read_bytes() == before
