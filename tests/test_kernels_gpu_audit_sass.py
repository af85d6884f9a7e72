"""Machine code, read from its disassembly."""

from __future__ import annotations

import pytest

from sparselottery.kernels.gpu.audit.sass import TMA, Code, read_gcn, read_sass

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
        /*00d0*/              @!P2 BRA 0x100 &req={1} ?trans5;
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00f0*/                   EXIT ;
        /*0100*/              @!P2 BRA 0x100 ;
        /*0110*/                   BRA 0xe0 ;
        /*0120*/                   BRA 0x120;
"""

# Two loops of 5 and 4 instructions on CUDA cores, of 2 and 1 multiply-adds; the second one waits.
SASS_FMAS = """
 Function kernel:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] &req={0} ?trans1;
        /*0020*/                   FFMA R8, R4, R5, R8 ;
        /*0030*/                   FFMA R9, R4, R6, R9 ;
        /*0040*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0050*/                   BRA.U UP0, 0x10                     &req={1}         ?trans6;
        /*0060*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   FFMA R8, R4, R5, R8 ;
        /*0090*/              @!P0 BRA 0x60 ;
        /*00a0*/                   EXIT                                &req={1}         ?trans5;
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
	v_fmac_f32_e32 v5, v1, v2
	v_pk_fma_f32 v[6:7], v[0:1], v[2:3], v[6:7]
	s_barrier
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
    assert read_sass(SASS) == Code(40, 16, 2, {"HGMMA": 1}, loads, 10, 0, 0.0)


def test_sass_on_cuda_cores():
    assert read_sass(SASS_FMAS) == Code(40, 0, 0, {}, {128: 1, 32: 1}, 9, 1, 10.0)


def test_sass_without_a_loop():
    straight = SASS.replace("BRA", "NOP")
    assert read_sass(straight).loads == {128: 1, 64: 1, 32: 1, 16: 1}
    assert read_sass(straight).loop == 0


def test_sass_bulk_copies():
    code = read_sass(SASS.replace("LDGSTS.E.BYPASS.LTC128B.128", "UTMALDG.2D"))
    assert code.loads == {TMA: 1, 64: 1, 32: 1}


def test_gcn():
    assert read_gcn(GCN) == Code(148, 8, 2, {"v_mfma": 1}, {128: 1, 32: 1, 16: 1}, 8, 1, 4 * 8 / 3)


@pytest.mark.parametrize("read", [read_sass, read_gcn])
def test_other_text(read):
    with pytest.raises(ValueError, match=r"expected the .* got 'nothing'"):
        read("nothing")


def test_share():
    code = Code(0, 0, 0, {}, {128: 2, 64: 2, 32: 4}, 0, 0, 0.0)
    assert (code.share(128), code.share(64), code.share(16)) == (0.5, 0.75, 1.0)
    assert code._replace(loads={}).share(128) == 1.0
