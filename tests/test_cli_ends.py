"""How commands end early: interrupted, with nobody reading on, or only asked for their version."""

import os
import shlex
import signal
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

import sparselottery
from sparselottery import cli
from sparselottery.lab import experiment

FIND = ["find", "--rounds", "2", "--iterations", "60"]


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(experiment, "interleaved_ms", partial(experiment.interleaved_ms, bursts=1, burst_ms=0.1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_find_interrupted(tmp_path, capsys, monkeypatch, number, code):
    """It says what is kept and the command that goes on; that one does."""
    train, calls, handler = experiment.train, [], signal.getsignal(signal.SIGTERM)

    def interrupted(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 2:
            signal.raise_signal(number)
        return train(*args, **kwargs)

    monkeypatch.setattr(experiment, "train", interrupted)
    argv = [*FIND, "--out", str(tmp_path / "a folder")]
    monkeypatch.setattr(sys, "argv", ["/bin/sparselottery", *argv])
    assert cli.main() == code
    (folder,) = (tmp_path / "a folder").iterdir()
    said = capsys.readouterr().err
    command = shlex.join(["sparselottery", *argv])
    assert said == f"\nsparselottery: interrupted; 1 of 3 trainings are kept in {folder}; goes on with: {command}\n"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert cli.main(shlex.split(command)[1:]) == 0
    assert len(calls) == 4
    assert "nothing was trained" not in capsys.readouterr().out
    assert not list(folder.glob(".*"))


def test_how_it_was_started(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparselottery.cli.export.versions", interrupt)
    monkeypatch.setattr(sys, "argv", ["/x/sparselottery/__main__.py"])
    assert cli.main(["info"]) == 130
    said = capsys.readouterr().err
    assert said.startswith("\nsparselottery: interrupted; nothing half-written is left; goes on with: python")
    assert said.endswith(" -m sparselottery info\n")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    cli.main(["info"])
    assert capsys.readouterr().err.endswith("goes on with: torchrun --nproc-per-node 2 -m sparselottery info\n")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("how", ["script", "module"])
def test_interrupted_while_it_imports_torch(tmp_path, how):
    root = Path(sparselottery.__file__).parent.parent
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    script = tmp_path / "sparselottery"
    script.write_text("import sys\nsys.path.pop(0)\nfrom sparselottery.cli import main\nsys.exit(main())\n")
    command = [script] if how == "script" else ["-m", "sparselottery"]
    paths = os.pathsep.join(map(str, (root, tmp_path)))
    done = subprocess.run([sys.executable, *command, "info"], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths}, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "\nsparselottery: interrupted before anything was begun\n"


def test_a_program_that_imports_it_keeps_its_own_ends():
    code = "import sys, sparselottery; assert sys.excepthook is sys.__excepthook__"
    subprocess.run([sys.executable, "-c", code], check=True)


def no_reader():
    """The end of a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    return os.fdopen(writes, "w")


@pytest.mark.parametrize("argv", ["info", "find --rounds 1 --iterations 20", "--help", "--version"])
def test_nobody_reads_on(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with no_reader() as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert cli.main(argv.split()) == 141
        pipe.write("what comes after goes nowhere")
    assert capsys.readouterr().err == ""


def test_without_an_output(monkeypatch):
    """As a shell starts it with >&-."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info"]) == 0


def test_another_broken_pipe_is_an_error(capsys, monkeypatch):
    def broken():
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr("sparselottery.cli.export.versions", broken)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "sparselottery: of a worker\n"


def test_nobody_reads_a_process(tmp_path):
    with no_reader() as pipe:
        command = [sys.executable, "-m", "sparselottery", "info"]
        env = {**os.environ, "PYTHONPATH": str(Path(sparselottery.__file__).parents[1])}
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, env=env, cwd=tmp_path, timeout=100)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("installed", [True, False])
def test_version(installed, capsys, monkeypatch):
    def version(name):
        if not installed:
            raise metadata.PackageNotFoundError(name)
        return "9.8.7"

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    expected = "9.8.7" if installed else sparselottery.__version__
    assert capsys.readouterr().out == f"sparselottery {expected}\n"
