from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.image import imread

from sparselottery.lab import experiment, grid
from sparselottery.lab.report import draw, figures, folder, page, summary, tables, write
from sparselottery.lab.settings import preset
from sparselottery.ticket import Ticket

CONTROLS = ("reinit", "rearranged", "one-shot", "pruned", "order")
SETTINGS = preset("digits", rounds=3, iterations=20, eval_every=10)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADINGS = (
    *("Tickets and controls", "While training", "Time", "Round by round", "Layers", "Input pixels", "Masks"),
    *("Initial values of the survivors", "How far weights move", "Connections per unit"),
    *("Do trials find the same ticket?", "Linear mode connectivity"),
)
ROUND = "trial-0/ticket/round-01.json"
VOID = {"meta", "link", "img", "br"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished grid: 2 trials, 3 rounds, 5 controls."""
    home = tmp_path_factory.mktemp("runs") / "grid"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        quick = partial(experiment.interleaved_ms, bursts=1, burst_ms=0.1)
        patch.setattr(experiment, "interleaved_ms", quick)
        wanted = grid.Grid(SETTINGS, trials=2, controls=CONTROLS)
        home.mkdir()
        for job in wanted.jobs:
            grid.work(wanted, home, job, lambda _: None)
        (home / "grid.json").write_text(json.dumps(grid._described(wanted, home, "a note on the data")))
    return home


@pytest.fixture(scope="module")
def report(run, tmp_path_factory) -> Path:
    return write(run, tmp_path_factory.mktemp("report"))


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture
def bare(monkeypatch):
    """Without figures, which other tests look at."""
    monkeypatch.setattr("sparselottery.lab.report.contents.drawings", lambda rows: [])


class Page(HTMLParser):
    """The elements and the visible text of a page; AssertionError if its tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(path.read_text())
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def test_says_what_was_run(report):
    text = Page(report).text
    assert "Lenet-300-100 on the digits" in text
    assert "2 trials of iterative magnitude pruning, 3 rounds of 20 %, layer by layer" in text
    assert "20 iterations of 60 images with Adam at learning rate 0.0012" in text
    assert "of the preset's 3,000 iterations" in text
    assert "A note on the data." in text
    assert "Measured on " in text
    assert "Unfinished" not in text


def test_shows_every_section(report):
    shown = Page(report)
    for heading in HEADINGS:
        assert heading in shown.text
    pictures = [attributes["src"] for tag, attributes in shown.elements if tag == "img"]
    drawings = len(list((report.parent / "figures").glob("*.svg")))
    assert shown.count("svg") == drawings == 2 + 2 + 2 + 3 * 4 + 2
    assert len(pictures) == 3 + 3
    assert len(list((report.parent / "figures").glob("*.png"))) == drawings + len(pictures)


def test_asks_for_nothing(report):
    shown = Page(report)
    assert shown.count("script") == 0
    loaded = [value for _, attributes in shown.elements for name, value in attributes.items()
              if name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset") and value]  # fmt: skip
    assert loaded
    assert all(value.startswith(("data:", "#")) for value in loaded)
    assert not re.search(r"https?:|@import|url\((?!#)", report.read_text())


def test_ids_are_unique(report):
    ids = [attributes["id"] for _, attributes in Page(report).elements if "id" in attributes]
    assert ids
    assert len(set(ids)) == len(ids)


def test_numbers_are_the_records(run, report):
    rows = tables.read(report.parent / "csv" / "trainings.csv")
    assert len(rows) == 2 * (4 + 4 * 3 + 4)
    for row in rows:
        place = "ticket" if row["control"] == "ticket" else f"{row['control']}/draw-{row['draw']}"
        record = json.loads((run / f"trial-{row['trial']}" / place / f"round-{row['round']:02d}.json").read_text())
        for key in folder.NUMBERS:
            assert row[key] == record.get(key)
    means = {(row["control"], row["round"]): row for row in tables.read(report.parent / "csv" / "rounds.csv")}
    both = [row["early_stop_test_accuracy"] for row in rows if (row["control"], row["round"]) == ("ticket", 2)]
    found = means["ticket", 2]
    assert found["early_stop_test_accuracy"] == pytest.approx(sum(both) / 2)
    assert (found["early_stop_test_accuracy_min"], found["early_stop_test_accuracy_max"]) == (min(both), max(both))


def test_layers_are_the_masks(run, report):
    for row in tables.read(report.parent / "csv" / "layers.csv"):
        masks = Ticket.load(run / f"trial-{row['trial']}" / "ticket" / f"round-{row['round']:02d}.safetensors").masks
        assert row["nnz"] == int(masks[row["layer"]].sum())
        assert row["shape"] == "x".join(map(str, masks[row["layer"]].shape))


def test_movement_ends_one_round_early(report):
    rows = tables.read(report.parent / "csv" / "movement.csv")
    assert {row["round"] for row in rows} == {0, 1, 2}
    layers = tables.read(report.parent / "csv" / "layers.csv")
    nnz = {(row["round"], row["layer"]): row["nnz"] for row in layers if row["trial"] == 0}
    for row in rows:
        assert row["kept_weights"] == nnz[row["round"] + 1, row["layer"]]
        assert row["kept_weights"] + row["pruned_weights"] == nnz[row["round"], row["layer"]]
        assert row["kept_25"] <= row["kept_50"] <= row["kept_75"]


def test_connectivity_ends_at_the_two_nets(run, report):
    rows = tables.read(report.parent / "csv" / "connectivity.csv")
    at = {(row["trial"], row["round"], row["share"]): row["test_error"] for row in rows}
    for trial, number in {(row["trial"], row["round"]) for row in rows}:
        for share, place in ((0, "ticket"), (1, "order/draw-0")):
            record = json.loads((run / f"trial-{trial}" / place / f"round-{number:02d}.json").read_text())
            assert 1 - at[trial, number, share] == pytest.approx(record["final_test_accuracy"], abs=3e-3)


def test_mask_pictures_are_the_masks(run, report):
    mask = Ticket.load(run / "trial-0" / "ticket" / "round-03.safetensors").masks["fc2.weight"]
    image = imread(report.parent / "figures" / "mask-fc2.png")
    assert torch.equal(torch.from_numpy(image if image.ndim == 2 else image[..., 0]) == 0, mask)


def test_same_rows_same_figures(report):
    rows = tables.read(report.parent / "csv" / "rounds.csv")
    before = dict(matplotlib.rcParams)
    one, other = (figures.step_times(rows) for _ in range(2))
    assert draw.svg(one, "step") == draw.svg(other, "step")
    assert draw.png(one) == draw.png(other)
    assert draw.on_white(draw.svg(one, "step")) == (report.parent / "figures" / "step.svg").read_text()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.usefixtures("bare")
def test_a_folder_of_find(run, tmp_path):
    found = shutil.copytree(run / "trial-1" / "ticket", tmp_path / "found")
    written = write(found)
    assert written == found / "report" / "report.html"
    text = Page(written).text
    assert "1 trial of" in text
    assert "of the preset's 3,000 iterations" in text
    assert "does not say on which machine" in text
    assert "Unfinished" not in text


@pytest.mark.parametrize(
    "missing",
    [
        ["trial-1/ticket/ticket.safetensors", "trial-1/ticket/round-03.safetensors"],
        ["trial-1/ticket", "trial-1/one-shot"],
        ["trial-0/rearranged/draw-0/round-02.json"],
        ["trial-0/order", "trial-1/order"],
        ["trial-1"],
    ],
)
def test_says_that_a_run_is_unfinished(copy, missing):
    for name in missing:
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    assert "Unfinished" in summary.notes(folder.read(copy))[-1]


def test_a_finished_run_has_no_such_note(run):
    assert not any("Unfinished" in note for note in summary.notes(folder.read(run)))


def test_a_run_that_has_just_begun(copy):
    for path in copy.glob("trial-*/*"):
        shutil.rmtree(path) if (path.parent.name, path.name) != ("trial-0", "ticket") else None
    for path in (copy / "trial-0" / "ticket").glob("*"):
        path.unlink() if path.name.startswith(("round-01", "round-02", "round-03", "ticket")) else None
    text = Page(write(copy)).text
    assert "Unfinished: 1 trainings of tickets and 0 of controls" in text
    assert "How far weights move" not in text


@pytest.mark.usefixtures("bare")
def test_nothing_from_files_becomes_html(copy):
    evil = "<img src=x onerror=alert(1)>\"'&"
    shutil.copytree(copy / "trial-0" / "reinit", copy / "trial-0" / evil.replace("/", ""))
    described = json.loads((copy / "grid.json").read_text())
    described |= {"note": evil, "scale": evil, "machine": evil, evil: evil}
    described["settings"] |= {"model": evil, "data": evil, "rounds": evil, "iterations": evil, "optimizer": evil}
    (copy / "grid.json").write_text(json.dumps(described))
    written = write(copy)
    html, shown = written.read_text(), Page(written)
    assert "<img src=x" not in html
    assert not any("onerror" in attributes for _, attributes in shown.elements)
    assert shown.text.count(evil) > 10


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        (ROUND, "{", "expected a JSON file"),
        (ROUND, "[]", "expected a JSON object"),
        (ROUND, '{"density": "<b>", "nnz": 1, "total": 2}', "density: expected a finite number"),
        (ROUND, '{"density": NaN, "nnz": 1, "total": 2}', "density: expected a finite number"),
        (ROUND, '{"density": 0, "nnz": 1, "total": 2}', r"density: expected one in \(0, 1\]"),
        (ROUND, '{"density": 1, "total": 2}', "expected a number 'nnz'"),
        (ROUND, '{"density": 1, "nnz": 1, "total": 2, "curves": {"iteration": [1]}}', "lists of one length"),
        (ROUND, '{"density": 1, "nnz": 1, "total": 2, "curves": {"iteration": 1}}', "expected a list, got int"),
        ("trial-0/ticket/round-01.safetensors", "", "round-01.safetensors"),
        ("grid.json", "", "grid.json: expected a JSON file"),
    ],
)
def test_damaged_files_are_named(copy, name, contents, message):
    (copy / name).write_text(contents)
    with pytest.raises(ValueError, match=message):
        write(copy)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"grid\.json or settings\.json"):
        write(tmp_path)
    (tmp_path / "grid.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="finished round"):
        write(tmp_path)


@pytest.mark.usefixtures("bare")
def test_connectivity_says_why_it_is_missing(copy, monkeypatch):
    def absent(name):
        raise FileNotFoundError(f"{name}: not on this machine")

    monkeypatch.setattr("sparselottery.lab.report.tickets.data.load", absent)
    text = Page(write(copy)).text
    assert "Linear mode connectivity was left out: FileNotFoundError: digits: not on this machine" in text


def test_figures_are_coloured_by_the_page(report):
    html = report.read_text()
    inside = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    colors = set(re.findall(r"#[0-9a-f]{6}", "".join(inside)))
    assert not colors & set(draw.DARK)
    assert "var(--0b5cad)" in inside[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_renders_in_a_browser(report, tmp_path):
    dom, errors = browse(report, tmp_path)
    assert not errors
    shown = tmp_path / "dom.html"
    shown.write_text(dom)
    assert Page(shown).count("svg") == Page(report).count("svg")
    assert "Round by round" in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize(
    "part",
    [
        "<script>alert(1)</script>",
        '<img src="http://localhost:9/x.png">',
        '<p style="background:url(http://localhost:9/)">x</p>',
    ],
)
def test_the_browser_would_tell(part, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.document("title", [part]))
    _, errors = browse(path, tmp_path)
    assert errors


def browse(path: Path, home: Path) -> tuple[str, list[str]]:
    """The page's elements once it is shown, and the lines of the browser's console."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    command += [f"--user-data-dir={home / 'browser'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
