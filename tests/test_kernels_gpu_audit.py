"""The audit of GPU kernels: it reads machine code, finds what is wrong with it, and nothing wrong with ours."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sparselottery.kernels.gpu.audit import aot
from sparselottery.kernels.gpu.audit import report as audit
from sparselottery.kernels.gpu.audit.aot import Compiled, specialisation
from sparselottery.kernels.gpu.audit.report import Expected, Row, judge
from sparselottery.kernels.gpu.audit.sass import TMA, Code, read_gcn, read_sass
from sparselottery.kernels.gpu.launch import Launch

TESTS = Path(__file__).resolve().parent

# A loop (0020 to 00b0) that loads, its exit in the middle of nowhere, around a loop that waits (0060 to 0070); at the
# end a second wait, out of line, that jumps back to where the first loop ended.
SASS = """
 Function kernel:
  REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   LDG.E.U16 R1, [R2.64] ;      /* 0x0 */
        /*0010*/              @!P0 BRA 0xc0 ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64], P0 ;
        /*0030*/                   LDG.E.LTC128B.64 R4, desc[UR4][R2.64] ;
        /*0040*/              @!P1 LDG.E R4, desc[UR4][R2.64] ;
        /*0050*/                   STL [R1], R4 ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4] ;
        /*0070*/              @!P0 BRA 0x60 ;
        /*0080*/                   LDL R4, [R1] ;
        /*0090*/                   HGMMA.64x64x16.F32 R24, gdesc[UR12], R24 ;
        /*00a0*/               @P1 CALL.REL.NOINC 0xc0 ;
        /*00b0*/                   BRA 0x20 ;
        /*00c0*/                   LDGDEPBAR ;
        /*00d0*/              @!P2 BRA 0x100 ;
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00f0*/                   EXIT ;
        /*0100*/              @!P2 BRA 0x100 ;
        /*0110*/                   BRA 0xe0 ;
        /*0120*/                   BRA 0x120;
"""

GCN = """
kernel:
	s_load_dwordx2 s[0:1], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	global_load_dword v1, v[2:3], off
	global_load_ushort v1, v[2:3], off
	v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
	s_cbranch_scc1 .LBB0_1
.LBB0_2:                                ; %._crit_edge
	global_load_dwordx2 v[2:3], v[2:3], off
	global_store_dwordx2 v[0:1], v[2:3], off
	s_endpgm
    .private_segment_fixed_size: 8
    .vgpr_count:     148
    .vgpr_spill_count: 2
"""


def test_sass():
    loads = {128: 1, 64: 1, 32: 1}
    assert read_sass(SASS) == Code(40, 16, 2, {"HGMMA": 1}, loads, 10)


def test_sass_without_a_loop():
    straight = SASS.replace("BRA", "NOP")
    assert read_sass(straight).loads == {128: 1, 64: 1, 32: 1, 16: 1}
    assert read_sass(straight).loop == 0


def test_sass_bulk_copies():
    code = read_sass(SASS.replace("LDGSTS.E.BYPASS.LTC128B.128", "UTMALDG.2D"))
    assert code.loads == {TMA: 1, 64: 1, 32: 1}


def test_gcn():
    assert read_gcn(GCN) == Code(148, 8, 2, {"v_mfma": 1}, {128: 1, 32: 1, 16: 1}, 5)


@pytest.mark.parametrize("read", [read_sass, read_gcn])
def test_other_text(read):
    with pytest.raises(ValueError, match=r"expected the .* got 'nothing'"):
        read("nothing")


def test_share():
    code = Code(0, 0, 0, {}, {128: 2, 64: 2, 32: 4}, 0)
    assert (code.share(128), code.share(64), code.share(16)) == (0.5, 0.75, 1.0)
    assert code._replace(loads={}).share(128) == 1.0


def launches_nothing():
    """A kernel, of which only the name is asked."""


FINE = Compiled(Code(100, 0, 0, {"HGMMA": 4}, {128: 8, 32: 1}, 100), 3 * 1000)


@pytest.mark.parametrize(
    ("target", "compiled", "expected", "verdict"),
    [
        ("sm_90", FINE, Expected(0.9, 64, 1000), "ok"),
        ("sm_90", FINE._replace(code=FINE.code._replace(stack=8)), Expected(), "spills"),
        ("sm_90", FINE._replace(code=FINE.code._replace(spills=1)), Expected(), "spills"),
        ("sm_90", FINE._replace(code=FINE.code._replace(loads={64: 16})), Expected(0.5), "wide loads 0% < 50%"),
        ("gfx942", FINE._replace(code=FINE.code._replace(loads={64: 16})), Expected(0.5), "ok"),
        ("sm_100", FINE, Expected(0.9, 64, 1000), "no UTCHMMA"),
        ("sm_90", FINE, Expected(0.9, 32, 1000), "no HMMA"),
        ("sm_90", FINE, Expected(0.9, 64, 1001), "shared < 3 stages of 1001"),
        ("sm_80", FINE._replace(code=FINE.code._replace(tensor_cores={"HMMA": 8})), Expected(0, 64, 1500), "ok"),
        ("gfx942", FINE._replace(shared=(64 << 10) + 1), Expected(), "shared > 65536"),
        ("sm_90", FINE._replace(shared=(64 << 10) + 1), Expected(), "ok"),
        ("sm_80", Compiled(FINE.code, 0), Expected(0.9, 64, 1), "no HMMA"),
        ("sm_90", Compiled(FINE.code._replace(spills=1), 0), Expected(0, 64, 1), "spills; shared < 3 stages of 1"),
    ],
)
def test_judge(target, compiled, expected, verdict):
    assert judge(compiled, Launch(launches_nothing, (1,), {}, {"num_stages": 3}), target, expected) == verdict


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


def test_table():
    rows = [Row("problem", "_spmm_kernel", "sm_90", FINE, "ok"), Row("p", "_pack_kernel", "sm_80", None, "broken")]
    header, first, second = audit.table(rows).splitlines()
    assert header.split() == list(audit.HEADER)
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
        "3000",
        "ok",
    ]
    assert second.split() == ["p", "pack", "sm_80", "broken"]
    assert first.index("ok") == second.index("broken") == header.index("verdict")


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
    assert rows["good"]["verdict"] == "ok"
    found = {name: rows[name]["verdict"] for name in bad}
    assert all(fault in found[name] for name, fault in bad.items()), found


@pytest.mark.slow
def test_good_kernels_exit_with_0(tmp_path):
    status, rows = audited(tmp_path, "good")
    assert status == 0
    (row,) = rows.values()
    assert (row["kernel"], row["target"], row["spill"]) == ("dot", "sm_90", "0")
    assert row["tensor"].startswith("HGMMA:")
    assert row["loads"].startswith("128:")


def test_the_interpreter_is_refused():
    done = process("-m", "sparselottery.kernels.gpu.audit", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected TRITON_INTERPRET to be unset" in done.stderr


def test_nothing_to_audit():
    done = process("-m", "sparselottery.kernels.gpu.audit", "--only", "no such problem")
    assert done.returncode == 2


def test_a_target_that_triton_does_not_know():
    code = (
        "from sparselottery.kernels.gpu.audit import report as audit\n"
        "audit.TARGETS['new'] = audit.TARGETS['sm_90']._replace(backend='new')\n"
        "raise SystemExit(audit.run(audit.PROBLEMS[:1], ['new']))"
    )
    done = process("-c", code)
    assert done.returncode == 2
    assert "new skipped: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_our_kernels(target):
    done = process("-m", "sparselottery.kernels.gpu.audit", "--target", target)
    assert done.returncode == 0, "\n".join(
        [done.stderr, *(line for line in done.stdout.splitlines() if not line.endswith(" ok"))]
    )


def test_targets_are_described():
    assert set(aot.TARGETS) == set(audit.TENSOR_CORES) == set(audit.WIDE)
