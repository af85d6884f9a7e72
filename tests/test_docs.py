"""The pages of docs/: their examples run, their numbers are those of committed rows, and the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results, scoreboard

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("docs/**/*.md"))
EXAMPLE = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def examples(page: Path) -> list[str]:
    return EXAMPLE.findall(page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_examples_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    names = {"__name__": "example"}
    for number, text in enumerate(examples(page), 1):
        exec(compile(text, f"{page.name}, example {number}", "exec"), names)


def test_the_scoreboard_is_that_of_the_rows():
    commits = re.compile(r"\| [^|]* \|$", flags=re.MULTILINE)  # the last column: in a shallow clone git knows none
    made = scoreboard.page(results.folders([]), commit=lambda path: "")
    assert commits.sub("", scoreboard.PAGE.read_text()) == commits.sub("", made)


def test_every_page_has_a_place_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    assert [name for page in PAGES if (name := page.relative_to(ROOT / "docs").as_posix()) not in listed] == []


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install '.[docs]'")
def test_the_site_builds_without_a_warning_and_asks_nobody_else(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    told = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(build, cwd=ROOT, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(https?:[^\"' >]+)", page.read_text())
        assert [each for each in loaded if "canonical" not in each] == [], page
