"""What machine code consists of, read from its disassembly: NVIDIA's SASS or AMD's GCN.

    read_sass(text)   what `cuobjdump -sass -res-usage` prints of one kernel
    read_gcn(text)    the assembly with which AMD's compiler ends

Loads are counted where a kernel spends its time: in the innermost of the loops that load from global memory. So are
barriers and, on CUDA cores, the instructions for each NONZERO multiply-adds: 4 / nonzero is the share of these.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

TMA = 1024  # stands for the bits of a bulk copy, which the instruction does not tell
TENSOR_CORES = ("UTCHMMA", "HGMMA", "HMMA", "v_mfma")
BARRIERS = ("BAR.SYNC", "s_barrier")
FMAS = {"FFMA": 1, "FFMA2": 2, "v_fma_f32": 1, "v_fmac_f32": 1, "v_fma_mix_f32": 1, "v_pk_fma_f32": 2}
NONZERO = 4  # a warp multiplies a weight by 128 samples, or two by 64


class Code(NamedTuple):
    """A kernel's machine code."""

    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # NVIDIA: instructions that spill or reload; AMD: vector registers spilled
    tensor_cores: dict[str, int]  # opcode of TENSOR_CORES -> instructions
    loads: dict[int, int]  # bits a thread -> loads from global memory, in the innermost loops that have any
    loop: int  # instructions in those loops
    barriers: int  # of those, how many wait for the other threads of the program
    nonzero: float  # instructions for NONZERO multiply-adds of a thread, in the loop that needs fewest; 0: has none

    def share(self, wide: int) -> float:
        """The share of the bytes of `loads` that comes `wide` or more bits at a time; 1 where nothing is loaded."""
        total = sum(bits * count for bits, count in self.loads.items())
        return sum(bits * count for bits, count in self.loads.items() if bits >= wide) / total if total else 1.0


class Instruction(NamedTuple):
    opcode: str
    target: str | None  # label or address to which it may jump
    passes: bool  # may the next instruction follow it?


_SASS_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)([^;&?]*)[^;]*;")  # scheduling: &req ?trans
_SASS_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_SASS_LOADS = {"LDG", "LDGSTS", "LD"}
_SASS_TMA = {"UBLKCP", "UTMALDG"}
_SASS_BITS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
_GCN_LINE = re.compile(r"(?:\.?\w+:|\s+([a-z]\w+)([^;]*))")
_GCN_LOAD = re.compile(r"(?:global|buffer|flat)_load_(?:lds_)?(\w+)")
_GCN_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def read_sass(text: str) -> Code:
    """The code of the one kernel in `text`. Raises ValueError where there is none."""
    usage = _SASS_USAGE.search(text)
    if usage is None:
        raise ValueError(f"expected the output of cuobjdump -sass -res-usage, got {text[:200]!r}")
    instructions, places = [], {}
    for address, predicate, opcode, operands in _SASS_LINE.findall(text):
        places[f"{int(address, 16):#x}"] = len(instructions)
        kind, operands = opcode.split(".")[0], operands.split()
        condition = bool(predicate) or (kind != "RET" and len(operands) > 1)
        jumps = kind == "BRA" or (kind == "CALL" and condition)  # a call otherwise comes back
        passes = condition or kind not in {"BRA", "EXIT", "RET"}
        instructions.append(Instruction(opcode, operands[-1] if jumps else None, passes))
    spills = sum(each.opcode.startswith(("LDL", "STL")) for each in instructions)
    return _code(instructions, places, _sass_bits, int(usage[1]), int(usage[2]), spills)


def read_gcn(text: str) -> Code:
    """The code of the one kernel in `text`. Raises ValueError where there is none."""
    usage = [re.search(rf"\.{name}:\s+(\d+)", text) for name in _GCN_USAGE]
    if None in usage:
        raise ValueError(f"expected the assembly of an AMD kernel, got {text[:200]!r}")
    instructions, places = [], {}
    for line in text.splitlines():
        match = _GCN_LINE.match(line)
        if match is None:
            continue
        if match[1] is None:
            places[line.split(":")[0]] = len(instructions)
        else:
            opcode, operands = match[1], match[2].strip()
            target = operands if opcode.startswith(("s_branch", "s_cbranch")) else None
            instructions.append(Instruction(opcode, target, opcode not in {"s_branch", "s_endpgm"}))
    registers, stack, spills = (int(match[1]) for match in usage)
    return _code(instructions, places, _gcn_bits, registers, stack, spills)


_GCN_USAGE = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")


def _code(
    instructions: list[Instruction], places: dict[str, int], bits_of: Callable[[str], int], *usage: int
) -> Code:  # fmt: skip
    bits = [bits_of(each.opcode) for each in instructions]
    loading = [loop for loop in _loops(instructions, places) if any(bits[at] for at in loop)]
    innermost = [loop for loop in loading if not any(other < loop for other in loading)]
    hot = set().union(*innermost)
    # Without a loop, all of it is.
    loads = Counter(bits[at] for at in (hot or range(len(bits))) if bits[at])
    opcodes = Counter(name for each in instructions for name in TENSOR_CORES if each.opcode.startswith(name))
    barriers = sum(instructions[at].opcode.startswith(BARRIERS) for at in hot)
    fmas = [sum(_fmas(instructions[at].opcode) for at in loop) for loop in innermost]
    nonzeros = [NONZERO * len(loop) / each for loop, each in zip(innermost, fmas, strict=True) if each]
    return Code(*usage, dict(opcodes), dict(loads), len(hot), barriers, min(nonzeros, default=0.0))


def _fmas(opcode: str) -> int:
    return FMAS.get(opcode.split(".")[0].removesuffix("_e32").removesuffix("_e64"), 0)


def _loops(instructions: list[Instruction], places: dict[str, int]) -> list[set[int]]:
    """The natural loops: of each instruction to which one that it dominates jumps back, all on the way between."""
    jumps = {at: places[each.target] for at, each in enumerate(instructions) if each.target in places}
    ends = {at + 1 for at, each in enumerate(instructions) if at in jumps or not each.passes}
    starts = sorted({0, *jumps.values(), *ends} - {len(instructions)})  # of basic blocks
    blocks = [range(*pair) for pair in pairwise([*starts, len(instructions)])]
    before: list[set[int]] = [set() for _ in blocks]
    for number, block in enumerate(blocks):
        if block[-1] in jumps:
            before[bisect_left(starts, jumps[block[-1]])].add(number)
        if instructions[block[-1]].passes and number + 1 < len(blocks):
            before[number + 1].add(number)
    dominators = _dominators(before)
    loops: dict[int, set[int]] = {}
    for head, sources in enumerate(before):
        for source in sources:
            if head in dominators[source]:
                loop, todo = loops.setdefault(head, {head}), [source]
                while todo:
                    if (at := todo.pop()) not in loop:
                        loop.add(at)
                        todo += before[at]
    return [{at for number in loop for at in blocks[number]} for loop in loops.values()]


def _dominators(before: list[set[int]]) -> list[set[int]]:
    """Of each block, given those from which it is entered; none of a block that is never reached."""
    found: list[set[int] | None] = [{0}] + [None] * (len(before) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(before)):
            known = [found[source] for source in before[block] if found[source] is not None]
            if known and (common := set.intersection(*known) | {block}) != found[block]:
                found[block], changed = common, True
    return [each or set() for each in found]


def _sass_bits(opcode: str) -> int:
    """Bits a thread that an instruction loads from global memory, TMA for a bulk copy, 0 for any other."""
    head, *modifiers = opcode.split(".")
    if head in _SASS_TMA:
        return TMA
    return next((_SASS_BITS[each] for each in modifiers if each in _SASS_BITS), 32) if head in _SASS_LOADS else 0


def _gcn_bits(opcode: str) -> int:
    load = _GCN_LOAD.match(opcode)
    if load is None:
        return 0
    return _GCN_BITS.get(load[1], 8 if "byte" in load[1] else 16)
