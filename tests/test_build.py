"""The build runs notebooks anew when it must, and only then."""

import subprocess
from pathlib import Path

import build
import pytest

from companion import experiments


@pytest.fixture
def house(tmp_path, monkeypatch) -> Path:
    """A small book, and a jupyter-book that counts how often it is called."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(build, "SITE", tmp_path / "_build" / "html")
    monkeypatch.setattr(build, "CACHE", tmp_path / "_build" / ".jupyter_cache")
    for name in ("companion/a.py", "book/index.md", "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    calls = tmp_path / "calls"
    calls.write_text("")

    def jupyter_book(command, **options):
        assert {"-W", "-n", "--keep-going", "--all"} <= set(command)
        if (tmp_path / "book" / "index.md").read_text() == "broken":
            raise subprocess.CalledProcessError(1, command)
        build.SITE.mkdir()
        (build.SITE / "index.html").write_text("page")
        kept = (build.CACHE / "executed").exists()
        (build.CACHE / "executed").write_text("")
        calls.write_text(calls.read_text() + ("kept " if kept else "anew "))

    monkeypatch.setattr(build.subprocess, "run", jupyter_book)
    monkeypatch.setattr(build, "refuse_stale_results", lambda: None)
    return tmp_path


def calls(house: Path) -> str:
    build.build()
    return (house / "calls").read_text()


def test_nothing_is_built_twice(house):
    assert calls(house) == "anew "
    assert calls(house) == "anew "


def test_a_changed_page_keeps_the_executed_notebooks(house):
    calls(house)
    (house / "book" / "index.md").write_text("two")
    assert calls(house) == "anew kept "


@pytest.mark.parametrize("name", ["companion/a.py", "requirements.txt"])
def test_a_changed_companion_or_pin_runs_every_notebook_anew(house, name):
    calls(house)
    (house / name).write_text("two")
    assert calls(house) == "anew anew "


def test_a_removed_file_is_a_change(house):
    (house / "book" / "page.md").write_text("a page")
    calls(house)
    (house / "book" / "page.md").unlink()
    assert calls(house) == "anew kept "


def test_a_missing_site_is_built(house):
    calls(house)
    (build.SITE / "index.html").unlink()
    assert calls(house) == "anew kept "


def test_a_failed_build_fails_again(house, capsys):
    calls(house)
    (house / "book" / "index.md").write_text("broken")
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            build.build()
    assert build.main() == 1
    assert "not built" in capsys.readouterr().out


def test_a_stale_result_is_an_error(house, monkeypatch, capsys):
    calls(house)
    (house / "companion" / "a.py").write_text("two")
    monkeypatch.undo()
    for name, value in (
        ("ROOT", house),
        ("BUILD", house / "_build"),
        ("SITE", house / "_build" / "html"),
        ("CACHE", house / "_build" / ".jupyter_cache"),
    ):
        monkeypatch.setattr(build, name, value)
    monkeypatch.setattr(experiments, "fingerprint", lambda name: "another")
    for _ in range(2):
        assert build.main() == 1
        printed = capsys.readouterr().out
        assert "has changed since its result; run `make exp" in printed
    assert (house / "calls").read_text() == "anew "
