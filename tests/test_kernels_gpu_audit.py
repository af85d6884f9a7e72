"""The audit of GPU kernels: it reads machine code, finds what is wrong with it, and nothing wrong with ours."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from sparselottery.kernels.gpu import device
from sparselottery.kernels.gpu.audit import aot, table
from sparselottery.kernels.gpu.audit import report as audit
from sparselottery.kernels.gpu.audit.aot import TARGETS, Compiled, specialisation
from sparselottery.kernels.gpu.audit.problems import Problem
from sparselottery.kernels.gpu.audit.report import Expected, Row, judge
from sparselottery.kernels.gpu.audit.sass import Code
from sparselottery.kernels.gpu.launch import Launch, launch

TESTS = Path(__file__).resolve().parent


def launches_nothing():
    """A kernel, of which only the name is asked."""


FINE = Compiled(Code(100, 0, 0, {"HGMMA": 4}, {128: 8, 32: 1}, 100, 0, 12.5), 3 * 1000)
HMMA = FINE._replace(code=FINE.code._replace(tensor_cores={"HMMA": 8}))
TILE = {"rows": 64, "columns": 16}


@pytest.mark.parametrize(
    ("target", "compiled", "expected", "verdict"),
    [
        ("sm_90", FINE, Expected(0.9, **TILE, stage=1000), "ok"),
        ("sm_90", FINE._replace(code=FINE.code._replace(stack=8)), Expected(), "spills"),
        ("sm_90", FINE._replace(code=FINE.code._replace(spills=1)), Expected(), "spills"),
        ("sm_90", FINE._replace(code=FINE.code._replace(loads={64: 16})), Expected(0.5), "wide loads 0% < 50%"),
        ("gfx942", FINE._replace(code=FINE.code._replace(loads={64: 16})), Expected(0.5), "ok"),
        ("sm_100", FINE, Expected(0.9, **TILE, stage=1000), "no UTCHMMA"),
        ("sm_120", FINE, Expected(0.9, **TILE, stage=1000), "no HMMA"),
        ("sm_90", FINE, Expected(0.9, 32, 16, 1000), "no HMMA"),
        ("sm_90", FINE, Expected(0.9, **TILE, stage=1001), "shared < 3 stages of 1001"),
        ("sm_80", HMMA, Expected(0, **TILE, stage=1500), "ok"),
        ("gfx942", HMMA, Expected(0, 32, 16, 1000), "no v_mfma"),
        ("gfx942", FINE._replace(shared=(64 << 10) + 1), Expected(), "shared > 65536"),
        ("sm_86", FINE._replace(shared=(99 << 10) + 1), Expected(), "shared > 101376"),
        ("sm_90", FINE._replace(shared=(99 << 10) + 1), Expected(), "ok"),
        ("sm_80", Compiled(FINE.code, 0), Expected(0.9, **TILE, stage=1), "no HMMA"),
        ("sm_90", FINE, Expected(nonzero=12), "a nonzero 12.5 > 12"),
        ("sm_90", FINE, Expected(nonzero=12.5), "ok"),
        ("gfx942", FINE, Expected(nonzero=12), "ok"),
        ("sm_90", FINE._replace(code=FINE.code._replace(barriers=2)), Expected(barriers=1), "barriers 2 > 1"),
        ("gfx942", FINE._replace(code=FINE.code._replace(barriers=2)), Expected(barriers=1), "barriers 2 > 1"),
        ("sm_90", FINE._replace(code=FINE.code._replace(barriers=2)), Expected(), "ok"),
        ("sm_90", FINE._replace(code=FINE.code._replace(spills=1)), Expected(0, **TILE, stage=1001),
         "spills; shared < 3 stages of 1001"),
    ],
)  # fmt: skip
def test_judge(target, compiled, expected, verdict):
    launched = Launch(launches_nothing, (1,), {}, {"num_stages": 3})
    assert judge(compiled, launched, target, expected, (3, 9)) == verdict


@pytest.mark.parametrize(
    ("version", "columns", "verdict"), [((3, 6), 8, "ok"), ((3, 9), 8, "no HGMMA"), ((3, 6), 16, "no HGMMA")]
)
def test_judge_by_triton(version, columns, verdict):
    launched = Launch(launches_nothing, (1,), {}, {"num_stages": 3})
    assert judge(HMMA, launched, "sm_90", Expected(0, 64, columns, 1500), version) == verdict


def test_specialisation():
    data = torch.zeros(64)

    def of(*args, num_warps=4, **constants):
        arguments = dict(zip("abc", args, strict=False)) | constants
        return specialisation(Launch("kernel", (1,), arguments, {"num_warps": num_warps}))

    assert of(data, 32, None) == of(torch.zeros(8), 48, None)
    assert of(3) == of(5)
    for one, other in [
        ((data,), (data[1:],)),
        ((data,), (data.half(),)),
        ((data,), (None,)),
        ((3,), (16,)),
        ((3,), (1,)),
        ((3,), (2**31 + 1,)),
        ((1,), (True,)),
        ((1,), (1.0,)),
        ((True,), (False,)),
    ]:
        assert of(*one) != of(*other)
    assert of(num_warps=4) != of(num_warps=8)
    assert of(BLOCK=3) == of(BLOCK=3) != of(BLOCK=5)
    assert of(3.0) == of(4.0)


def test_line():
    rows = [Row("problem", "_spmm_kernel", "sm_90", FINE, "ok"), Row("p", "_pack_kernel", "sm_80", None, "broken")]
    header, first, second = map(audit.line, [audit.HEADER, *map(audit.cells, rows)])
    assert len(audit.WIDTHS) == len(audit.HEADER)
    assert header.split("  ")[0] == "problem"
    assert first.split() == [
        "problem",
        "spmm",
        "sm_90",
        "100",
        "0",
        "0",
        "HGMMA:4",
        "128:8",
        "32:1",
        "100",
        "0",
        "3000",
        "ok",
    ]
    assert second.split() == ["p", "pack", "sm_80", "broken"]
    assert first.index("ok") == second.index("broken") == header.index("verdict")


def test_a_nonzero_is_told_on_cuda_cores():
    on_cuda_cores = FINE._replace(code=FINE.code._replace(tensor_cores={}))
    at = audit.HEADER.index("a nonzero")
    assert audit.cells(Row("p", "k", "sm_90", on_cuda_cores, "ok"))[at] == "12.50"
    assert audit.cells(Row("p", "k", "sm_90", FINE, "ok"))[at] == ""


def test_launches_are_made_for_the_target():
    with aot.compiling_for(TARGETS["sm_86"]):
        assert device.capability(torch.device("cpu")) == (8, 6)
        assert device.shared_memory(torch.device("cpu")) == 99 << 10
    assert device.capability(torch.device("cpu")) != (8, 6)


def test_rows_are_told_as_they_come(monkeypatch):
    told = threading.Event()

    def compile_launch(launched):
        assert launched.arguments["name"] == "first" or told.wait(5)
        return FINE

    def kernel(name):
        return Problem(name, lambda: launch(launches_nothing, (1,), name=name, num_warps=4))

    monkeypatch.setattr(audit, "missing", lambda: None)
    monkeypatch.setattr(audit, "compile_launch", compile_launch)
    monkeypatch.setattr("builtins.print", lambda text, **_: told.set() if text.startswith("first") else None)
    expectations = {"launches_nothing": lambda _: Expected()}
    file = io.StringIO()
    assert audit.run([kernel("first"), kernel("second")], ["sm_80"], file, expectations=expectations) == 0
    assert [row["problem"] for row in csv.DictReader(file.getvalue().splitlines())] == ["first", "second"]


def process(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Of Python, and of Triton without its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)


def audited(tmp_path: Path, *names: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit status and the rows by problem of an audit of `audited_kernels`."""
    path = tmp_path / "audit.csv"
    done = process(str(TESTS / "audited_kernels.py"), str(path), *names)
    assert path.exists(), done.stderr
    return done.returncode, {row["problem"]: row for row in csv.DictReader(path.read_text().splitlines())}


@pytest.mark.slow
def test_faults_are_found(tmp_path):
    good = ["good", "good again", "other k"]
    bad = {
        "spills": "spills",
        "odd rows": "wide loads",
        "odd start": "wide loads",
        "no tensor cores": "no HGMMA",
        "stages lost": "shared < 3 stages",
        "too much shared": "shared > 232448",
        "broken": "does not compile",
        "unknown": "not in EXPECTATIONS",
    }
    status, rows = audited(tmp_path, *good, *bad)
    assert status == 1
    assert list(rows) == ["good", *bad]
    good = rows["good"]
    assert (good["kernel"], good["target"], good["spill"], good["verdict"]) == ("dot", "sm_90", "0", "ok")
    assert good["tensor"].startswith("HGMMA:")
    assert good["loads"].startswith("128:")
    found = {name: rows[name]["verdict"] for name in bad}
    assert all(fault in found[name] for name, fault in bad.items()), found


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert audit.main(["--table"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "expected TRITON_INTERPRET to be unset" in err


def test_nothing_to_audit(monkeypatch):
    monkeypatch.setattr(audit, "missing", lambda: None)
    assert audit.main(["--only", "no such problem"]) == 2


def test_a_table_holds_everything(capsys):
    with pytest.raises(SystemExit, match="2"):
        audit.main(["--table", "--target", "sm_90"])
    assert "expected no other option" in capsys.readouterr().err


def test_a_target_that_triton_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr(audit, "missing", lambda: None)
    monkeypatch.setitem(TARGETS, "new", TARGETS["sm_90"]._replace(backend="new"))
    assert audit.run([], ["new"]) == 2
    assert "new skipped: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_kernel_compiles_to_what_the_table_says(tmp_path):
    problem, kernel, path = "linear 1024 32x32 x8192 bf16", "block_sddmm", tmp_path / "rows.csv"
    done = process("-m", "sparselottery.kernels.gpu.audit", "--only", problem, "--kernel", kernel, "--csv", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["target"] for row in rows] == list(TARGETS)
    here = ".".join(map(str, aot.triton_version()))
    if here in table.VERSIONS and table.triton_of(here) == triton.__version__:
        assert rows == [row for row in table.rows(here) if (row["problem"], row["kernel"]) == (problem, kernel)]


ONE_TILE = """
from sparselottery.kernels.gpu.audit import problems, report
one_tile = [each for each in problems.PROBLEMS if each.name == "linear 64-128 x256 fp32"]
print([row.verdict for row in report.audit(one_tile, "sm_90", "take")])
"""


# How many kernels layers of 9 densities need, against those of one of them.
DENSITIES = """
from functools import partial
import torch
from sparselottery.kernels.gpu.audit import problems, report
mask, found = problems._mask, [set(), set()]
for density in range(10, 28, 2):
    problems._mask = partial(mask, density=density / 100)
    for block in (1, 1), (16, 16):
        runs = [partial(problems._linear, batch, [272, 128], block, torch.float32, batch > 1) for batch in (1, 80)]
        runs.append(partial(problems._conv, 8, 8, 64, problems._square(64, 3, 1), block, torch.float32))
        for kinds in found if density == 10 else found[1:]:
            kinds.update(map(report.specialisation, problems_launches(runs)))
print(*map(len, found))
""".replace(
    "problems_launches(runs)", "(each for _, each in report.launches_of(problems.Problem('', run) for run in runs))"
)


def test_a_kernel_is_compiled_once_for_all_densities():
    done = process("-c", DENSITIES)
    one, all_of_them = done.stdout.split() or (done.stderr, "")
    assert one == all_of_them


def test_sizes_of_one_compile():
    """Triton makes a constant of an integer argument that is 1; the interpreter does not."""
    done = process("-c", ONE_TILE)
    assert done.stdout.strip() == "['ok']", done.stdout + done.stderr
