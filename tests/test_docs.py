"""The pages of docs/: their examples run, their numbers are those of committed rows, and the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparselottery
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


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_tables_of_numbers_name_their_rows(page):
    """The section of a table with decimals, or headed "Measured", links a committed file or says that none was kept."""
    for section in re.split(r"^(?=## )", page.read_text(), flags=re.MULTILINE):
        cells = [cell.strip(" *") for line in section.splitlines() if line[:1] == "|" for cell in line.split("|")]
        if section.startswith("## Measured") or any(re.fullmatch(r"\d+\.\d+", cell) for cell in cells):
            assert re.search(r"results/\S+\.csv|no rows were kept|no rows kept", section), section


def test_links_lead_to_files_of_the_checkout():
    for page in (ROOT / "README.md", *PAGES):
        text = re.sub(r"^```.*?^```|`[^`]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)  # code has none
        for link in re.findall(r'(?:\]\(|\b(?:src|href)=")([^)"\s]+)', text):
            file = link.partition("#")[0]
            assert "://" in link or not file or (page.parent / file).is_file(), f"{page.name}: {link}"


def test_make_has_the_targets_that_are_named():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *ROOT.glob(".github/workflows/*.yml")]
    named = [re.findall(r"(?:`|run: |^ {4})make ([a-z0-9 -]+)", page.read_text(), flags=re.MULTILINE) for page in texts]
    found = {target for calls in named for call in calls for target in call.split()}
    assert {"demo", "test", "lint", "docs"} <= found <= targets


def test_one_version():
    assert f"\nversion: {sparselottery.__version__}\n" in (ROOT / "CITATION.cff").read_text()


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
