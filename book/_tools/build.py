"""Build the book: `python book/_tools/build.py`, from anywhere.

What `jupyter-book build book -W -n --keep-going` does, and three things that
it leaves to the author. A stored result of an experiment that other code has
made than today's is an error. Its cache of executed notebooks knows the notebooks' own
cells only, so here it is thrown away when the companion or a pinned version
has changed. And a second build reads changed pages only, so a warning would
be reported once and then forgotten: here every page is read anew, unless
nothing at all has changed, and then there is nothing to do.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "_build"
SITE = BUILD / "html"
CACHE = BUILD / ".jupyter_cache"

CODE = ("companion", "requirements.txt", "pyproject.toml")
SOURCES = (*CODE, "book", "_config.yml", "book/_tools/build.py")
IGNORED = {"__pycache__", ".ipynb_checkpoints", "_build"}


def files(names: Iterable[str]) -> Iterator[Path]:
    """The files under the given names, in one order on every system."""
    for name in names:
        path = ROOT / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in found:
            if file.is_file() and not IGNORED.intersection(file.parts):
                yield file


def fingerprint(names: Iterable[str]) -> str:
    """A hash of the names and contents of all files under the names."""
    digest = hashlib.sha256(sys.version.encode())
    for file in files(names):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def holds(stamp: Path, value: str) -> bool:
    return stamp.is_file() and stamp.read_text() == value


def drop_stale_cache() -> None:
    """Forget executed notebooks that another companion has executed."""
    stamp, code = CACHE / "companion.sha256", fingerprint(CODE)
    if not holds(stamp, code):
        shutil.rmtree(CACHE, ignore_errors=True)
        CACHE.mkdir(parents=True)
        stamp.write_text(code)


def refuse_stale_results() -> None:
    """Stored results must be of today's code.

    Raises
    ------
    companion.experiments.StaleResultError
        If one is not, with the remedy.
    """
    # Here, since a build that has nothing to do need not wait for torch.
    from companion import experiments

    for name in experiments.EXPERIMENTS:
        experiments.load(name)


def jupyter_book() -> str:
    """The program that stands beside this Python."""
    beside = Path(sys.executable).parent
    return shutil.which("jupyter-book", path=beside) or "jupyter-book"


def kernel_settings() -> Path:
    """Settings for the kernels: a machine's own loopback needs no warning."""
    profile = BUILD / ".ipython" / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    settings = profile / "ipython_kernel_config.py"
    settings.write_text('get_config().IPKernelApp.log_level = "ERROR"\n')
    return profile.parent


def build() -> Path:
    """Build the site if anything it is made of has changed.

    Returns
    -------
    Path
        The folder that holds ``index.html``.

    Raises
    ------
    subprocess.CalledProcessError
        If the build gave a warning or an error.
    companion.experiments.StaleResultError
        If a stored result is not of today's code.
    """
    BUILD.mkdir(exist_ok=True)
    with FileLock(BUILD / ".lock"):
        stamp, sources = BUILD / "html.sha256", fingerprint(SOURCES)
        if not (holds(stamp, sources) and (SITE / "index.html").is_file()):
            stamp.unlink(missing_ok=True)
            refuse_stale_results()
            drop_stale_cache()
            # Pages and names that are no longer in the book would stay.
            shutil.rmtree(SITE, ignore_errors=True)
            shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
            subprocess.run(
                [
                    *(jupyter_book(), "build", "book"),
                    *("--all", "-W", "-n", "--keep-going"),
                ],
                cwd=ROOT,
                env={"OMP_NUM_THREADS": "1"}
                | os.environ
                | {"IPYTHONDIR": str(kernel_settings())},
                check=True,
            )
            stamp.write_text(sources)
    return SITE


def main() -> int:
    try:
        site = build()
    except subprocess.CalledProcessError as error:
        print("The book was not built: see the warnings above.", flush=True)
        return error.returncode
    except RuntimeError as error:
        print(f"The book was not built: {error}.", flush=True)
        return 1
    print(f"The book is built. Open {(site / 'index.html').as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
