"""Run notebooks in place, and drop the pictures: `python book/_tools/notebooks.py`.

Without arguments all chapters, otherwise the given notebooks. A notebook is
committed with its outputs, so that a change in what it says shows in the
diff and the tests can compare; but as text only. Pictures differ from
one machine to the next, and the build draws them anew.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ("image/png", "image/jpeg")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def chapters() -> list[Path]:
    """Every notebook of the book."""
    return sorted(
        path
        for path in (ROOT / "book").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    )


def strip(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Keep of the outputs what is text and the same on every machine."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            for output in cell.outputs:
                for picture in PICTURES:
                    output.get("data", {}).pop(picture, None)
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    return notebook


def run(path: Path) -> None:
    """Execute a notebook where it stands, strip it, and write it back.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell raises; the notebook then stays as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    path.write_text(
        nbformat.writes(strip(notebook)) + "\n", encoding="utf-8", newline="\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    failed = 0
    for path in parser.parse_args().notebooks or chapters():
        print(f"{path} ...", end=" ", flush=True)
        start = time.monotonic()
        try:
            run(path)
        except (CellExecutionError, OSError) as error:
            failed += 1
            print(f"failed\n{error}")
        else:
            print(f"{time.monotonic() - start:.0f} s")
    return min(failed, 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
