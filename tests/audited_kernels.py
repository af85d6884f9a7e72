"""Kernels with known faults; `python audited_kernels.py CSV [NAME...]` audits those of these names for sm_90.

A process of its own: the tests run Triton's interpreter, which compiles nothing.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from sparselottery.kernels.gpu.audit.problems import Problem
from sparselottery.kernels.gpu.audit.report import Expected, run
from sparselottery.kernels.gpu.launch import launch


@triton.jit
def _dot_kernel(
    x, w, y, index, k, ld, BM: tl.constexpr, BK: tl.constexpr, OUT: tl.constexpr
):  # fmt: skip
    m, n, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, OUT), tl.arange(0, BK)
    acc = tl.zeros([BM, OUT], tl.float32)
    for start in range(0, k, BK):
        at = start if index is None else tl.load(index + start)
        x_tile = tl.load(x + m[:, None] * ld + tl.multiple_of(at, 16) + i[None, :])
        w_tile = tl.load(w + (start + i)[:, None] * OUT + n[None, :])
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    tl.store(y + m[:, None] * OUT + n[None, :], acc.to(y.dtype.element_ty))


@triton.jit
def _broken_kernel(x):
    tl.store(x, x)


@triton.jit
def _unknown_kernel(x, y):
    tl.store(y, tl.load(x))


def dot(dtype=torch.float16, ld=1024, offset=0, bm=128, bk=64, stages=3, k=1024, index=None, **options):
    x = torch.zeros(4096 * ld + 16, dtype=dtype)[offset:]
    w, y = torch.zeros(k, 64, dtype=dtype), torch.zeros(4096, 64, dtype=dtype)
    sizes = {"BM": bm, "BK": bk, "OUT": 64}
    launch(
        _dot_kernel,
        (4096 // bm,),
        x=x,
        w=w,
        y=y,
        index=index,
        k=k,
        ld=ld,
        **sizes,
        num_warps=4,
        num_stages=stages,
        **options,
    )


PROBLEMS = {
    "good": dot,
    "good again": dot,  # equal launches are compiled once
    "other k": lambda: dot(k=512),  # of equal specialisation
    "spills": lambda: dot(torch.float32, bm=64, bk=16, maxnreg=40),
    "odd rows": lambda: dot(ld=1023),
    "odd start": lambda: dot(offset=1),
    "no tensor cores": lambda: dot(torch.float32, bm=64, bk=16),
    "stages lost": lambda: dot(index=torch.zeros(1024, dtype=torch.int32)),  # to the load that another one needs
    "too much shared": lambda: dot(stages=12),
    "broken": lambda: launch(_broken_kernel, (1,), x=torch.zeros(1), num_warps=1),
    "unknown": lambda: launch(_unknown_kernel, (1,), x=torch.zeros(1), y=torch.zeros(1), num_warps=1),
}


def _expected(of):
    sizes = of.arguments
    stage = (sizes["BM"] + sizes["OUT"]) * sizes["BK"] * sizes["x"].element_size()
    return Expected(0.75, sizes["BM"], sizes["OUT"], stage)


if __name__ == "__main__":
    path, *names = sys.argv[1:]
    problems = [Problem(name, PROBLEMS[name]) for name in names]
    expectations = {"_dot_kernel": _expected, "_broken_kernel": lambda of: Expected()}
    with open(path, "w") as file:
        sys.exit(run(problems, ["sm_90"], file, expectations=expectations))
