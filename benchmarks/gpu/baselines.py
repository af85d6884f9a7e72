"""Ours and what it is measured against, as entries of a race on one problem.

Everyone computes [y], or [y, gx, gvalues, gbias] and, in a step, a fused Adam step of weight and bias. Modules run as
users run them; torch's sparse products are composed by hand in the fastest way known, past autograd.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.bars import OURS
from benchmarks.gpu.cases import TWO_OF_FOUR, block
from benchmarks.gpu.problems import Problem
from benchmarks.gpu.timing import Entry, clock
from benchmarks.timing import Candidate
from sparselottery import convert
from sparselottery.execution import choose_execution
from sparselottery.export import to_semi_structured
from sparselottery.graphs import BrokenCaptureError

LEARNING_RATE = 1e-9  # the weights hardly move, so that results stay alike
L2_BYTES = 60e6  # an H200's, for GPUs that do not tell
LARGE_BATCH = 64  # from here on activations, not weights, are most of what moves
MEMORY_SHARE = 0.03  # of the GPU, at most, for all copies of a dense weight
BSR_METAS = [(64, 3, 4), (128, 3, 4), (128, 4, 8)]  # columns of y a program, num_stages, num_warps


def entries(problem: Problem, pattern: str, op: str) -> dict[str, Entry]:
    """Whoever there is for this problem, by name. op: forward, forward+backward or step."""
    found = _ours(problem, op)
    for last in (False, True) if problem.is_conv else (False,):
        name, suffix = "nn_conv2d" if problem.is_conv else "nn_linear", "_channels_last" if last else ""
        found[name + suffix] = Entry(partial(_dense, problem, op, False, last), True)
        found["masked_dense" + suffix] = Entry(partial(_dense, problem, op, True, last), True)
    if pattern == TWO_OF_FOUR:
        found["torch_semi_structured"] = Entry(partial(_semi_structured, problem), True)
    height, width = block(pattern)
    if not problem.is_conv and op != "step":
        if width == 1:
            found["torch_csr"] = Entry(partial(_torch_csr, problem, op), False)
        elif problem.weight.dtype == torch.bfloat16:  # its kernels multiply fp32 as fp64
            found["torch_bsr"] = Entry(partial(_torch_bsr, problem, op, (height, width)), False)
    return found


def copies(problem: Problem, device: str) -> int:
    """How many weights one after the other no cache can hold, if it is weights that a call waits for; else 1."""
    if device != "cuda" or problem.is_conv or len(problem.x) >= LARGE_BATCH:
        return 1
    properties = torch.cuda.get_device_properties(problem.weight.device)
    size, itemsize = problem.weight.numel(), problem.weight.element_size()
    needed = math.ceil(2 * getattr(properties, "L2_cache_size", L2_BYTES) / (problem.truth[2].numel() * itemsize))
    return max(1, min(needed, int(MEMORY_SHARE * properties.total_memory / (size * itemsize))))


def _ours(problem: Problem, op: str) -> dict[str, Entry]:
    """As convert chooses, and every execution that there is by force."""
    example = problem.x.detach().requires_grad_(op != "forward")
    layer = convert(problem.layer().train(op != "forward"), {"weight": problem.mask})
    found = {}
    for execution in layer.executions:
        forced = copy.deepcopy(layer)
        forced.execution = execution
        found[f"{OURS}_{execution}"] = _masked(problem, op, forced)
    try:
        choose_execution(layer, example)
    except BrokenCaptureError:
        raise
    except Exception as error:  # then this one alone is missing
        return {OURS: Entry(partial(_raise, error), False), **found}
    return {OURS: _masked(problem, op, layer), **found}


def _raise(error: Exception) -> NoReturn:
    raise error


def _masked(problem: Problem, op: str, layer: nn.Module) -> Entry:
    def make() -> Candidate:
        own = copy.deepcopy(layer)
        return _candidate(problem, op, own, own.values, own.bias)

    return Entry(make, layer.execution == "dense", layer.execution)


def _dense(problem: Problem, op: str, masked: bool, last: bool) -> Candidate:
    """torch's layer, or weight * mask; images in channels_last or not."""
    layer, mask = problem.layer(), problem.mask.to(problem.weight.dtype)
    if last:
        layer, mask = (t.to(memory_format=torch.channels_last) for t in (layer, mask))
    if not masked:
        call: Callable[[Tensor], Tensor] = layer
    elif problem.is_conv:
        call = lambda x: F.conv2d(x, layer.weight * mask, layer.bias, padding=1)  # noqa: E731
    else:
        call = lambda x: F.linear(x, layer.weight * mask, layer.bias)  # noqa: E731
    return _candidate(problem, op, call, layer.weight, layer.bias, last)


def _candidate(
    problem: Problem, op: str, call: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor, last: bool = True
) -> Candidate:
    """call(x), with gradients of x, weight and bias unless op is forward. last: images are channels_last."""
    x, gy = problem.x, problem.gy
    if problem.is_conv and not last:
        x, gy = x.contiguous(), gy.contiguous()
    x = x.detach().requires_grad_(op != "forward")
    outputs: list[Tensor] = []
    # capturable: no step count is read back from the GPU
    adam = torch.optim.Adam([weight, bias], LEARNING_RATE, fused=True, capturable=x.is_cuda) if op == "step" else None

    def forward() -> None:
        with torch.no_grad():
            outputs[:] = [call(x)]

    def forward_backward() -> None:
        y = call(x)
        outputs[:] = [y.detach(), *torch.autograd.grad(y, (x, weight, bias), gy)]
        if adam is not None:
            weight.grad, bias.grad = outputs[2:]
            adam.step()

    return Candidate(forward if op == "forward" else forward_backward, lambda: _comparable(problem, outputs))


def _comparable(problem: Problem, outputs: list[Tensor]) -> list[Tensor]:
    """What a candidate left, as the truth is given: images row-major, a weight's gradient at the mask."""
    found = [t.contiguous() if t.dim() == 4 else t for t in outputs[:2]] + outputs[2:]
    if len(found) > 2 and found[2].dim() > 1:
        found[2] = found[2][problem.mask]
    return found


def _torch_csr(problem: Problem, op: str) -> Candidate:
    """torch.sparse (cuSPARSE): y = W xᵀ, gx = Wᵀ gyᵀ on a CSR of Wᵀ whose values follow W's, and sampled_addmm."""
    x, gy, bias = problem.x, problem.gy, problem.bias
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        weight, weight_t = problem.weight.to_sparse_csr(), problem.weight.t().to_sparse_csr()
    order = torch.zeros(problem.mask.shape, dtype=torch.int64, device=x.device)
    order[problem.mask] = torch.arange(weight.values().numel(), device=x.device)
    order = order.t()[problem.mask.t()]
    outputs: list[Tensor] = []

    def run() -> None:
        outputs[:] = [(weight @ x.t()).t().add(bias).contiguous()]
        if op != "forward":
            torch.index_select(weight.values(), 0, order, out=weight_t.values())
            gvalues = torch.sparse.sampled_addmm(weight, gy.t(), x, beta=0).values()
            outputs[1:] = [(weight_t @ gy.t()).t().contiguous(), gvalues, gy.sum(0)]

    return Candidate(run, lambda: outputs)


def _semi_structured(problem: Problem) -> Candidate:
    """Sparse tensor cores, by torch's own tensor."""
    layer = to_semi_structured(nn.Sequential(convert(problem.layer(), {"weight": problem.mask})))
    outputs: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            outputs[:] = [layer(problem.x)]

    return Candidate(run, lambda: outputs)


def _torch_bsr(problem: Problem, op: str, shape: tuple[int, int]) -> Candidate:
    """torch's own Triton kernels for blocks, tuned: bsr_dense_addmm and sampled_addmm."""
    kernels = import_module("torch.sparse._triton_ops")
    x, gy, bias = problem.x, problem.gy, problem.bias
    weight, weight_t = problem.weight.to_sparse_bsr(shape), problem.weight.t().to_sparse_bsr(shape)
    alive = problem.mask[:: shape[0], :: shape[1]]
    order = torch.zeros(alive.shape, dtype=torch.int64, device=x.device)
    order[alive] = torch.arange(len(weight.values()), device=x.device)
    order = order.t()[alive.t()]
    outputs: list[Tensor] = []

    meta, meta_t = _meta(kernels, weight, x, bias), _meta(kernels, weight_t, gy, None)

    def run() -> None:
        outputs[:] = [_bsr_product(kernels, weight, x, bias, meta)]
        if op != "forward":
            weight_t.values().copy_(weight.values().index_select(0, order).transpose(1, 2))
            gweight = kernels.sampled_addmm(weight, gy.t(), x, beta=0)
            outputs[1:] = [_bsr_product(kernels, weight_t, gy, None, meta_t), gweight, gy.sum(0)]

    def read() -> list[Tensor]:
        return [*outputs[:2], *(t.to_dense()[problem.mask] if t.layout != torch.strided else t for t in outputs[2:])]

    return Candidate(run, read)


def _meta(kernels: ModuleType, bsr: Tensor, rows: Tensor, bias: Tensor | None) -> dict[str, int]:
    """The fastest launch of bsr_dense_addmm among BSR_METAS, found once for matrices of this kind."""
    key = tuple(bsr.shape), tuple(bsr.values().shape), len(rows)
    if key not in _METAS:
        timed = {}
        for columns, stages, warps in BSR_METAS:
            meta = {"SPLIT_N": max(1, len(rows) // columns), "GROUP_SIZE_ROW": 4, "num_stages": stages,
                    "num_warps": warps}  # fmt: skip
            call = partial(_bsr_product, kernels, bsr, rows, bias, meta)
            timed[min(clock(rows.device.type).seconds(call, 3) for _ in range(2))] = meta
        _METAS[key] = timed[min(timed)]
    return _METAS[key]


_METAS: dict[tuple, dict[str, int]] = {}


def _bsr_product(kernels: ModuleType, bsr: Tensor, rows: Tensor, bias: Tensor | None, meta: dict[str, int]) -> Tensor:
    """rows @ bsrᵀ + bias."""
    y = rows.new_empty(len(rows), bsr.shape[0])
    added = y.t() if bias is None else bias[:, None].expand(-1, len(rows))
    kernels.bsr_dense_addmm(added, bsr, rows.t(), beta=0 if bias is None else 1, out=y.t(), meta=dict(meta))
    return y
