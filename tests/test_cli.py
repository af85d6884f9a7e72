from __future__ import annotations

import json
import runpy
import sys
from functools import partial

import pytest
import scipy.sparse
import torch
from torch import nn

from sparselottery import cli, convert
from sparselottery.cli import tables
from sparselottery.lab import data, experiment
from sparselottery.lab.data import ENVIRONMENT
from sparselottery.lab.models import MODELS
from sparselottery.lab.settings import preset
from sparselottery.orders import order_of
from sparselottery.ticket import Ticket

FIND = ["find", "--rounds", "2", "--iterations", "60"]


@pytest.fixture(autouse=True)
def same_threads():
    """--threads is for the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(experiment, "interleaved_ms", partial(experiment.interleaved_ms, bursts=1, burst_ms=0.1))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run, for reading."""
    out = tmp_path_factory.mktemp("runs")
    assert cli.main([*FIND, "--out", str(out)]) == 0
    (folder,) = out.iterdir()
    return folder


def fails(capsys, *argv: object) -> str:
    """What the command says on stderr when it exits with 2: one line."""
    assert cli.main([str(arg) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparselottery: ")
    assert error.count("\n") == 1
    return error


def test_find_prints_a_row_per_round_and_where_the_ticket_is(tmp_path, capsys):
    assert cli.main([*FIND, "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    head, _, columns, *rounds, note, _, _, ticket, explain, export = capsys.readouterr().out.splitlines()
    assert str(folder) in head
    assert columns.split("  ")[:4] == ["round", "weights %", "test %", "stops at"]
    assert [row.split()[:2] for row in rounds] == [["0", "100.0"], ["1", "80.2"], ["2", "64.3"]]
    assert {len(row) for row in rounds} == {len(columns)}
    assert note.startswith("speed-up: over the faster of")
    whole = rounds[0].split()[4]
    for row in rounds:
        ours, *others, speed_up = row.split()[4:8]
        assert others[0] == whole
        ratio = min(map(float, others)) / float(ours)
        assert float(speed_up.removesuffix("x")) == pytest.approx(ratio, rel=0.05, abs=0.01)
    assert f"{folder}/ticket.safetensors (64.3% of the weights" in ticket
    assert f"sparselottery explain {folder}" in explain
    assert f"sparselottery export {folder} --out" in export
    assert Ticket.load(folder / "ticket.safetensors").density == pytest.approx(0.643, abs=1e-3)


def test_find_again_prints_the_finished_rounds(tmp_path, capsys, monkeypatch):
    cli.main([*FIND, "--out", str(tmp_path)])
    first = capsys.readouterr().out
    monkeypatch.setattr(experiment, "train", None)
    assert cli.main([*FIND, "--out", str(tmp_path)]) == 0
    said = "nothing was trained: the run was finished before\n"
    again = capsys.readouterr().out
    assert said not in first
    assert said in again
    assert again.replace(said, "") == first


def test_find_passes_every_option_on(tmp_path, capsys):
    options = "--rounds 2 --iterations 40 --fraction 0.5 --batch 30 --seed 3 --one-shot --threads 1"
    assert cli.main(["find", *options.split(), "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    settings = json.loads((folder / "settings.json").read_text())["settings"]
    assert settings == settings | {"rounds": 2, "iterations": 40, "fraction": 0.5, "batch": 30, "seed": 3}
    assert settings == settings | {"one_shot": True, "retrain": "rewind", "data": "digits"}
    _, note, _, *rows = capsys.readouterr().out.splitlines()[:5]
    assert note == "note: scale 0.0133: 40 of the preset's 3,000 iterations"
    assert settings["scale"] in note
    assert [row.split()[0] for row in rows] == ["0", "1"]


def test_find_prunes_blocks(tmp_path):
    assert cli.main([*FIND, "--granularity", "16x8", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    ticket = Ticket.load(folder / "ticket.safetensors")
    assert ticket.recipe["granularity"] == {"fc1.weight": [16, 8], "fc2.weight": [16, 8]}
    mask = ticket.masks["fc1.weight"][:288].view(18, 16, 8, 8)
    assert torch.equal(mask.all(3).all(1), mask.any(3).any(1))
    assert cli.main([*FIND, "--granularity", "1x1", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, preset("digits", rounds=2, iterations=60).name}


def test_find_prunes_rows(tmp_path, capsys):
    for _ in range(2):  # the second time it is found done
        assert cli.main([*FIND, "--granularity", "rows", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    ticket = Ticket.load(folder / "ticket.safetensors")
    assert ticket.recipe["granularity"] == {"fc1.weight": "rows", "fc2.weight": "rows"}
    assert torch.equal(ticket.masks["fc1.weight"].all(1), ticket.masks["fc1.weight"].any(1))
    assert "got rows" in fails(capsys, *FIND, "--granularity", "rows", "--permute", "--out", tmp_path)


def test_find_prunes_permuted_blocks(tmp_path, capsys):
    assert cli.main([*FIND, "--granularity", "16x8", "--permute", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    ticket = Ticket.load(folder / "ticket.safetensors")
    assert ticket.recipe["granularity"] == {"fc1.weight": "16x8 permuted", "fc2.weight": "16x8 permuted"}
    pattern = ticket.csr()["fc1.weight"][0]
    assert not order_of(pattern, pattern.shape, (16, 8)).is_natural
    assert "permute: expected a granularity" in fails(capsys, *FIND, "--permute", "--out", tmp_path)


@pytest.mark.parametrize("option", [["--rewind-step", "20"], ["--retrain", "continue"], ["--retrain", "fine-tune"]])
def test_find_resets_otherwise(tmp_path, option):
    assert cli.main([*FIND, *option, "--out", str(tmp_path)]) == 0


def test_find_draws_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    cli.main([*FIND, "--out", str(tmp_path)])
    plain = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    cli.main([*FIND, "--out", str(tmp_path)])
    fancy = capsys.readouterr().out
    assert "round 0 of 2" in fancy
    assert all(line in fancy for line in plain)  # not wrapped to the terminal's width


def test_what_is_said_on_a_terminal_is_shown_as_it_is(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with tables.progress("round 0", 1) as (_, say):
        say("net:fire: 11 trainings [bold]")
    assert "net:fire: 11 trainings [bold]" in capsys.readouterr().out


def test_find_without_the_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert "train-images-idx3-ubyte" in fails(capsys, "find", "--data", "mnist", "--out", tmp_path / "runs")
    assert "cifar-10-batches-bin" in fails(capsys, "find", "--model", "conv-2", "--out", tmp_path / "runs")
    assert cli.main(["find", "--data", "mnist", "--out", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().out == ""  # no head of a table that does not follow


def test_find_a_convolutional_net_and_explain_it(tmp_path, capsys, monkeypatch):
    parts = []
    for count in (16, 4, 4):
        parts += [torch.randn(count, 3, 8, 8), torch.randint(10, (count,))]
    monkeypatch.setattr(data, "load", lambda name: data.Dataset(name, 10, *parts, note="JPEG-recompressed"))
    options = "--model conv-2 --rounds 1 --iterations 2 --batch 4 --lr 0.001 --warmup 1"
    assert cli.main(["find", *options.split(), "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("cifar10-conv-2-")
    settings = json.loads((folder / "settings.json").read_text())["settings"]
    assert settings == settings | {"model": "conv-2", "lr": 0.001, "warmup": 1, "note": "JPEG-recompressed"}
    head, *notes, _, _, _, _, _, _, _, _, _ = capsys.readouterr().out.splitlines()
    assert head.startswith("cifar10: conv-2, 2 trainings of 2 iterations")
    assert notes == ["note: scale 0.0001: 2 of the paper's 20,000 iterations", "note: JPEG-recompressed"]
    assert cli.main(["explain", str(folder)]) == 0
    assert "fc1" in capsys.readouterr().out


def test_find_with_data_that_the_net_does_not_take(tmp_path, capsys):
    error = fails(capsys, "find", "--data", "cifar10", "--out", tmp_path)
    assert "lenet-300-100: expected data among digits, mnist, fashion-mnist, got 'cifar10'" in error


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--fraction=1.5", "fraction: expected less than 1, got 1.5"),
        ("--rounds=0", "rounds: expected at least 1, got 0"),
        ("--iterations=0", "iterations: expected at least 1, got 0"),
        ("--scale=0.001", "iterations: expected at least 1, got 0"),
        ("--batch=0", "batch: expected at least 1, got 0"),
        ("--batch=2000", "batch: expected at most the 1257 training images, got 2000"),
        ("--eval-every=0", "eval_every: expected at least 1, got 0"),
        ("--lr=-1", "lr: expected at least 0, got -1.0"),
        ("--lr=nan", "lr: expected at least 0, got nan"),
        ("--rewind-step=60", "rewind_step: expected less than the 60 iterations, got 60"),
        ("--granularity=999x999", "granularity: expected blocks smaller than 'fc1.weight'"),
        ("--fc-share=9", "rates['fc1.weight']: expected a value in [0, 1), got 1.8"),
    ],
)
def test_find_with_a_value_that_makes_no_sense(tmp_path, capsys, option, message):
    assert cli.main([*FIND, option, "--out", str(tmp_path)]) == 2
    said, error = capsys.readouterr()
    assert error.startswith(f"sparselottery: {message}")
    assert not said
    assert not list(tmp_path.iterdir())


def test_find_on_a_gpu_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([*FIND, "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr() == (
        "",
        "sparselottery: device: expected cpu, or cuda where torch sees a GPU, got 'cuda'\n",
    )
    assert not list(tmp_path.iterdir())


def test_find_on_a_damaged_run(tmp_path, capsys):
    cli.main([*FIND, "--out", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    path = folder / "round-01.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    capsys.readouterr()
    assert str(path) in fails(capsys, *FIND, "--out", tmp_path)


def test_explain(run_folder, capsys):
    assert cli.main(["explain", str(run_folder)]) == 0
    title, header, *layers, ms, packs, _ = capsys.readouterr().out.splitlines()
    assert "round-02.safetensors: 64.3% of the weights; measured with 2 threads" in title
    columns = "layer shape density nnz bytes dense_bytes execution plan_bytes flops packs "
    columns += "sparse_ms block_ms permuted_ms compact_ms dense_ms why"
    assert header.split() == columns.split()
    assert [layer.split()[:2] for layer in layers] == [["fc1", "300x64"], ["fc2", "100x300"], ["fc3", "10x100"]]
    assert all(layer.split()[6] in ("sparse", "dense") for layer in layers)
    assert all("measured: sparse" in layer for layer in layers)
    assert layers[0].endswith("for (60, 64), training")
    assert ms.startswith("ms: ")
    assert packs.startswith("packs: ")


def test_explain_of_another_net(tmp_path, capsys):
    model = convert(nn.Sequential(nn.Linear(2, 2)), {"0.weight": torch.eye(2, dtype=torch.bool)})
    Ticket.from_model(model).save(tmp_path / "round-00.safetensors")
    assert "sparselottery find" in fails(capsys, "explain", tmp_path)


@pytest.mark.parametrize("command", [["explain"], ["export", "--out", "x"]])
def test_no_run_there(tmp_path, capsys, command):
    assert "round-NN.safetensors" in fails(capsys, *command, tmp_path / "nothing")


def test_export_npz(run_folder, tmp_path, capsys):
    out = tmp_path / "trained"
    assert cli.main(["export", str(run_folder), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    trained = Ticket.load(run_folder / "round-02.safetensors")
    matrix = scipy.sparse.load_npz(out / "fc1.weight.npz")
    assert (torch.from_numpy(matrix.toarray()) == trained.weights["fc1.weight"]).all()


def test_export_safetensors_of_a_round(run_folder, tmp_path):
    out = tmp_path / "trained.safetensors"
    assert cli.main(["export", str(run_folder), "--format", "safetensors", "--round", "1", "--out", str(out)]) == 0
    assert Ticket.load(out).density == Ticket.load(run_folder / "round-01.safetensors").density


@pytest.mark.parametrize("format", ["torch-csr", "torch-bsr", "dense", "pt2"])
def test_export_in_other_formats(run_folder, tmp_path, capsys, format):
    options = ["--format", format, "--fold-batchnorm", "--remove-dead", "--out", str(tmp_path / "out")]
    assert cli.main(["export", str(run_folder), *options]) == 0
    written, folded, dead = capsys.readouterr().out.splitlines()
    assert written.endswith(f"({format}, {(tmp_path / 'out').stat().st_size:,} bytes)")
    assert folded == "batchnorms folded: 0"
    assert dead.startswith("dead units removed: ")


def test_export_onnx(run_folder, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out.onnx"
    assert cli.main(["export", str(run_folder), "--format", "onnx", "--sparse-initializer", "--out", str(out)]) == 0
    assert len(onnx.load(out).graph.sparse_initializer) == 3


def test_export_of_a_net_that_is_no_tree(tmp_path, capsys):
    shape = (3, 8, 8)
    net = MODELS["resnet-18"](shape, 10)
    masks = {"fc.weight": torch.rand(net.fc.weight.shape) < 0.5}
    settings = {"model": "resnet-18", "shape": shape, "classes": 10, "batch": 2}
    run = tmp_path / "run"
    run.mkdir()
    Ticket.from_model(convert(net, masks), {"settings": settings}).save(run / "round-00.safetensors")
    out = tmp_path / "out.pt2"
    assert cli.main(["export", str(run), "--format", "pt2", "--remove-dead", "--out", str(out)]) == 0
    assert "note: nothing was simplified" in capsys.readouterr().out


def test_export_without_its_extra(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    error = fails(capsys, "export", run_folder, "--format", "onnx", "--out", tmp_path / "out")
    assert error == "sparselottery: onnx is not installed: pip install 'sparselottery[export]'\n"


def test_export_of_a_round_that_is_not_there(run_folder, tmp_path, capsys):
    assert "round 7" in fails(capsys, "export", run_folder, "--round", 7, "--out", tmp_path / "x")


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert f"torch   {torch.__version__}" in capsys.readouterr().out


def test_bench(capsys):
    assert cli.main(["bench", "--shape", "4,8,6", "2,3,5", "--density", "0.5", "0.1", "--threads", "1"]) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert "1 threads" in title
    assert header.count("speed-up") == 2
    assert [row.split()[:2] for row in rows] == [["4x8x6", "0.5"], ["4x8x6", "0.1"], ["2x3x5", "0.5"], ["2x3x5", "0.1"]]


def test_bench_of_no_density(capsys):
    assert "density" in fails(capsys, "bench", "--shape", "4,8,6", "--density", "2")


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "bench --shape 4,8",
        "bench --shape 4,8,0",
        "find --data x",
        "find --threads 0",
        "find --granularity 16",
        "find --granularity 16x0",
        "find --granularity 16x16x1",
        "find --granularity axb",
    ],
)
def test_usage(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv.split())
    assert exit_info.value.code == 2
    assert "usage: sparselottery" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    error = fails(capsys, *FIND, "--out", tmp_path)
    assert error == "sparselottery: sklearn.datasets is not installed: pip install 'sparselottery[lab]'\n"


def test_python_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparselottery", "info"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("sparselottery", run_name="__main__")
    assert exit_info.value.code == 0
    assert "torch" in capsys.readouterr().out
