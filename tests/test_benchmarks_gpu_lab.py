"""The lab on a GPU, tried on the CPU: stopped, killed or moved to another machine, it ends with the same rows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import gpu_lab
import grids
import pytest
import torch

from benchmarks import results
from benchmarks.gpu import lab, lab_archive
from benchmarks.gpu.lab_archive import Archive
from benchmarks.torture.runs import TIMES
from sparselottery.lab import controls, executors, grid
from sparselottery.lab.grid import Grid
from sparselottery.ticket import Ticket

ROOT = Path(__file__).resolve().parent.parent


def command(folder: Path, *options: str) -> list[str]:
    places = ["--results", str(folder / "results"), "--runs", str(folder / "runs")]
    return [sys.executable, str(ROOT / "tests/gpu_lab.py"), "--smoke", *places, *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def in_a_thread(work, take, place):
    """An executor that starts no process."""
    events = SimpleQueue()

    def tried(job):
        events.put(executors._tried(work, job, lambda payload: events.put(("progress", payload))))

    while (job := take()) is not None:
        Thread(target=tried, args=(job,), daemon=True).start()
        kind = "progress"
        while kind == "progress":
            kind, payload = events.get()
            yield executors.Event(job, kind, payload)


def call(folder: Path, *options: str) -> str:
    """The lab in this process; returns its log."""
    with pytest.MonkeyPatch.context() as patch:
        gpu_lab.stand_in(patch.setattr)
        patch.setitem(executors.EXECUTORS, "processes", in_a_thread)
        patch.setattr(grid, "_data", cache(gpu_lab.load))
        assert lab.main(command(folder, *options)[2:]) == 0
    return (folder / "results/log.txt").read_text()


def rows(folder: Path, experiment: str) -> list[dict]:
    _, found = results.read(folder / "results" / f"gpu-lab-{experiment}.csv")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert "everything of the plan is done" in call(folder, "--seconds", "500")
    return folder


def test_a_row_for_each_training_and_few_files(whole):
    ladder, reinits = 3, 2
    assert len(rows(whole, "conv-2")) == 2 * (ladder + reinits)
    assert len(rows(whole, "resnet-18")) == ladder + 1 + ladder
    assert {row["rewind_step"] for row in rows(whole, "resnet-18")} == {0, 2}
    head, _ = results.read(whole / "results/gpu-lab-conv-2.csv")
    assert head["data"] == "random numbers"
    assert "iterations 6 in place of 20000" in head["settings"]
    names = sorted(path.name for path in (whole / "results").rglob("*"))
    assert names == ["gpu-lab-conv-2.csv", "gpu-lab-resnet-18.csv", "gpu-lab-runs-0.part", "log.txt"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for living processes in /proc")
def test_stopped_killed_and_moved_it_ends_with_the_same_rows(whole, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    told = call(here, "--experiments", "conv-2", "--seconds", "0.01")
    assert "jobs are left: python -m benchmarks.gpu.lab --smoke" in told
    process = subprocess.Popen(
        command(here, "--experiments", "conv-2"), env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list(here.rglob("round-*.json"))) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    while grids.running(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 0 < len(list(here.rglob("round-*.json"))) < 10
    assert "random numbers; images by no decoder" in (here / "results/log.txt").read_text()
    shutil.copytree(here / "results", there / "results")  # and nothing else
    assert "files out of the archive" in call(there, "--experiments", "conv-2", "--seconds", "500")
    assert rows(there, "conv-2") == rows(whole, "conv-2")
    call(here, "--experiments", "conv-2", "--seconds", "500")
    assert rows(here, "conv-2") == rows(whole, "conv-2")


def test_an_archive_gives_back_what_going_on_needs(whole, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(lab_archive, "PART_BYTES", 200_000)
    (runs,) = (whole / "runs").glob("*-resnet-18-*/trial-0/reinit")
    runs = runs.parent.parent
    state = runs / "x.paused.safetensors"
    state.write_bytes(bytes(range(251)))
    assert Archive(runs, tmp_path, 2**30).pack() == []
    parts = list(tmp_path.iterdir())
    assert len(parts) > 2
    assert max(path.stat().st_size for path in parts) < 201_000
    archive = Archive(tmp_path / "runs", tmp_path, 0)
    files = archive.unpack()
    assert archive.unpack() == []  # what is there stays
    for path in runs.rglob("*.*"):
        name = path.relative_to(runs)
        if path.name == "ticket.safetensors":
            assert str(name) not in files
        elif path.name in ("round-00.safetensors", "round-01.safetensors"):
            found, expected = Ticket.load(tmp_path / "runs" / name), Ticket.load(path)
            assert all(torch.equal(found.masks[key], mask) for key, mask in expected.masks.items())
            assert found.recipe == {**expected.recipe, controls.MASK_ONLY: True}
        else:
            assert (tmp_path / "runs" / name).read_bytes() == path.read_bytes()
    state.unlink()
    assert archive.pack() == ["x.paused.safetensors"]  # beyond the limit; and fewer parts than before
    archive.unpack()
    (tmp_path / "gpu-lab-runs-0.part").unlink()
    with pytest.raises(ValueError, match="expected all parts"):
        archive.unpack()


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Archive, "_member", lambda *_: ("json/../../evil.json", lab_archive.zlib.compress(b"{}")))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").touch()
    archive = Archive(tmp_path / "runs", tmp_path / "results", 2**20)
    archive.pack()
    with pytest.raises(ValueError, match="expected names in the folder"):
        archive.unpack()
    assert not (tmp_path.parent / "evil.json").exists()


def test_the_plan():
    late, zero, more, _ = lab.plan("resnet-18", "cuda")
    assert [grid.settings.iterations for grid in (late, zero)] == [30_000] * 2
    assert (late.settings.rewind_step, zero.settings.rewind_step, late.name) == (1000, 0, more.name)
    conv = lab.plan("conv-2", "cuda")
    assert {grid.name for grid in conv} == {conv[0].name}
    assert (conv[0].settings.iterations, conv[0].settings.execution, conv[0].settings.device) == (
        20_000,
        "measured",
        "cuda",
    )
    trainings = [sum(map(grid.trainings, grid.jobs)) for grid in (conv[0], late, zero)]
    assert trainings == [11, 8, 6]
    assert isinstance(lab.tiny(late), Grid)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_without_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        lab.main(["--results", str(tmp_path)])
    assert "torch sees none" in capsys.readouterr().err
