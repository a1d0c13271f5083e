"""Launch buttons, and the notebooks' first cell.

The repository's public address stands in `_config.yml` alone. As a Sphinx
extension this file takes the launch buttons away while that address is empty.
As a program, ``python book/_extensions/launch.py``, it writes the address into
the first cell of every notebook, which installs the companion in Colab (a
notebook that Colab opens comes without the repository around it).
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
TAG = "remove-cell"


def address(config: Path = ROOT / "_config.yml") -> str:
    """The repository's public address, or "" while it is not known."""
    return yaml.safe_load(config.read_text("utf-8"))["repository"]["url"]


def install_cell(url: str) -> str:
    """The source of the first code cell of every notebook."""
    return (
        "import sys\n"
        "\n"
        'if "google.colab" in sys.modules:\n'
        f'    repository = "{url}"\n'
        "    %pip install -q git+{repository} torchdiffeq"
    )


def first_cell(notebook: Path) -> dict:
    """The first code cell of a notebook."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return next(cell for cell in cells if cell["cell_type"] == "code")


def notebooks() -> list[Path]:
    """The book's notebooks."""
    return sorted(
        path
        for path in (ROOT / "book").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    )


def write(notebook: Path, url: str) -> bool:
    """Put the address into a notebook's first cell; tell if that changed it."""
    text = notebook.read_text("utf-8")
    content = json.loads(text)
    cell = next(c for c in content["cells"] if c["cell_type"] == "code")
    if TAG not in cell["metadata"].get("tags", ()):
        raise ValueError(
            f"the first code cell of {notebook} must be the one that installs "
            f"the companion, with the tag {TAG}:\n\n{install_cell(url)}"
        )
    cell["source"] = install_cell(url).splitlines(keepends=True)
    new = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if new != text:
        notebook.write_text(new, "utf-8")
    return new != text


def _buttons(app, config) -> None:
    options = config.html_theme_options
    if options.get("repository_url"):
        options["use_repository_button"] = True
        options["use_issues_button"] = True
    else:
        options.pop("launch_buttons", None)


def setup(app) -> dict[str, bool]:
    app.connect("config-inited", _buttons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    for path in notebooks():
        if write(path, address()):
            print(path.relative_to(ROOT))
