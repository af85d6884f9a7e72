"""Puts the measured rows and their figures into the site, so that every number can point at its row."""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("benchmarks/results/*/*.csv", "benchmarks/results/*/*.svg", "CHANGELOG.md", "SECURITY.md")


def on_files(files: Files, config) -> Files:
    """mkdocs calls it with the files of docs/. Rows appear under results/, as they lie in benchmarks/results/."""
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix().removeprefix("benchmarks/").lower()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **given) -> str:
    """mkdocs calls it with the text of a page, whose links are those of a checkout: here the rows are in results/."""
    return markdown.replace("../benchmarks/results/", "results/")
