"""compute-sanitizer over tiny layers, with a script in its place, and the processes that it runs in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import test_gpu_only
import torch
from programs import install

from benchmarks.gpu import child, sanitize


def test_a_child_that_hangs_is_killed_with_its_children():
    started = time.monotonic()
    status, output = child.run(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 0.5)
    assert (status, output) == (None, "begun\n")
    assert time.monotonic() - started < 30
    assert child.run(["sh", "-c", "echo $WORD; exit 3"], 30, {"WORD": "said"}) == (3, "said\n")


SANITIZER = """case "$*" in
    *"racecheck"*"conv 1x1 fp32"*) echo "========= ERROR SUMMARY: 1 error $PYTORCH_NO_CUDA_MEMORY_CACHING"; exit 99;;
    *"memcheck"*"chain"*) exit 1;;
    *"memcheck"*"linear 64x1"*) sleep 60;;
esac
echo "nothing found"
"""


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "LIMIT", 3)
    return install(tmp_path, monkeypatch, sanitize.NAME, SANITIZER)


def test_what_the_sanitizer_finds_is_reported(sanitizer, tmp_path, capsys):
    assert sanitize.main(["--results", str(tmp_path / "new")]) == 1
    text = (tmp_path / "new" / "sanitize.txt").read_text()
    lines = text.splitlines()
    verdicts = [line for line in lines if ": memcheck, " in line or ": racecheck, " in line]
    bad = sorted(line.rpartition(",")[0] for line in set(verdicts) if not line.startswith("fine"))
    assert bad == [
        "ERRORS: racecheck, conv 1x1 fp32", "did not finish: memcheck, linear 64x1 bf16",
        "exit status 1: memcheck, chain 16x16 1x1 fp32",
    ]  # fmt: skip
    assert len(set(verdicts)) == len(sanitize.TOOLS) * len(sanitize.LAYERS)
    assert "========= ERROR SUMMARY: 1 error 1" in lines
    assert "nothing found" not in text
    assert lines[-1] == "NOT FINE: see above"
    assert capsys.readouterr().out == text[-sanitize.TAIL :]


def test_a_sanitizer_that_finds_nothing(sanitizer, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "LAYERS", sanitize.LAYERS[:2])
    assert sanitize.main([]) == 0
    assert capsys.readouterr().out.endswith("all fine\n")
    assert sanitize.main(["--seconds", "0"]) == 1
    assert capsys.readouterr().out.count("not reached") == 2 * 4  # each in full, and in the list


def test_a_folder_that_cannot_be_written_stops_no_sanitizer(sanitizer, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sanitize, "LAYERS", sanitize.LAYERS[:1])
    (tmp_path / "file").touch()
    assert sanitize.main(["--results", str(tmp_path / "file")]) == 0
    assert "all fine\nnote: not written" in capsys.readouterr().out


def test_the_sanitizer_is_found(tmp_path, monkeypatch):
    def put(folder):
        folder.mkdir(parents=True)
        path = folder / sanitize.NAME
        path.touch(mode=0o755)
        return path

    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    before = sanitize.find()  # of a toolkit that is here
    (tmp_path / "nvidia").mkdir()
    monkeypatch.setattr(
        sanitize, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [tmp_path]})
    )
    of_pip = put(tmp_path / "nvidia" / "cu13" / "bin")
    assert sanitize.find() == (before or of_pip)
    of_home = put(tmp_path / "home" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert sanitize.find() == of_home
    of_home.chmod(0o644)
    assert sanitize.find() == (before or of_pip)


def test_without_a_sanitizer_or_a_gpu_nothing_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sanitize, "find", lambda: None)
    assert sanitize.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("not run: there is no compute-sanitizer on PATH")
    monkeypatch.setattr(sanitize, "find", lambda: Path("/bin/true"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "sanitize.txt").read_text() == "not run: torch sees no GPU\n"


def test_the_sanitized_layers_exist():
    path, name = sanitize.TEST.split("::")
    assert (child.ROOT / path).samefile(test_gpu_only.__file__)
    assert callable(getattr(test_gpu_only, name))
    assert set(sanitize.LAYERS) == set(test_gpu_only.LAYERS)
