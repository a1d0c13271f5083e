"""What several test files need: kernels that start, the site, a browser."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbval.kernel
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/_tools"))

import build as book_build

NO_BROWSER = "BROWSER TESTS SKIPPED"


class LocalKernelManager(nbval.kernel.KernelManager):
    """Kernels that talk through files of their own and not over TCP.

    Two workers' kernels now and then pick the same free port, and then one of
    them never answers.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if os.name == "posix":
            # Not pytest's folders: a socket's path has 107 characters at most.
            self.sockets = tempfile.TemporaryDirectory(prefix="nbval-")
            self.transport = "ipc"
            self.ip = os.path.join(self.sockets.name, "kernel")


nbval.kernel.KernelManager = LocalKernelManager


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built book, built first if it is missing or stale."""
    return book_build.build()


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """A headless Chromium: the system's, else the one Playwright installs."""
    from playwright.sync_api import Error, sync_playwright

    arguments = (
        *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--disable-quic"),
        "--no-first-run",
    )
    system = map(shutil.which, ("chromium", "chromium-browser"))
    with sync_playwright() as playwright:
        for path in (*filter(None, system), None):
            try:
                chromium = playwright.chromium.launch(
                    executable_path=path, args=list(arguments)
                )
                break
            except Error as error:
                reason = error
        else:
            message = (
                f"{NO_BROWSER}: no Chromium starts here; install the system's "
                "package chromium, or run `.venv/bin/playwright install "
                "chromium`"
            )
            if os.environ.get("CI"):
                pytest.fail(f"{message}\n{reason}", pytrace=False)
            pytest.skip(message)
        yield chromium
        chromium.close()


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    lines = [str(report.longrepr) for report in skipped]
    tests = [line for line in lines if NO_BROWSER in line]
    if tests:
        words = tests[0][tests[0].index(NO_BROWSER) :].rstrip("')")
        terminalreporter.write_line(
            f"{words} ({len(tests)} tests)", red=True, bold=True
        )
