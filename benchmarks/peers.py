"""What sparselottery is measured against, and sparselottery itself, as candidates on one problem.

Axes: N batch, I in, O out. Row-major x (N, I) in, row-major y (N, O) and gx (N, I) out: every transpose is counted.
Modules run as users run them, through autograd; the hand-composed peers pay for no autograd at all.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from benchmarks.onednn_csr import Product, installed
from benchmarks.timing import Candidate
from sparselottery import convert

try:
    from sparseprop.modules import SparseLinear

    SPARSEPROP_MISSING = None
except ImportError as error:
    SPARSEPROP_MISSING = f"SparseProp is not installed ({error}); `make peers` installs it"
COMPILER = os.environ.get("CXX", "g++")  # where torch.compile looks
COMPILER_MISSING = None if shutil.which(COMPILER) else f"no C++ compiler {COMPILER}, so no row of torch.compile"


@dataclass(frozen=True)
class Problem:
    """A masked linear layer with its input and output gradient. weight (O, I) holds zeros where mask is False."""

    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    gy: Tensor

    @classmethod
    def random(cls, batch: int, in_features: int, out_features: int, density: float, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(out_features, in_features, generator=generator) < density
        weight = torch.randn(out_features, in_features, generator=generator) / (density * in_features) ** 0.5
        weight[weight == 0] = 1  # randn does give exact zeros, and SparseProp would prune them
        weight *= mask
        bias = torch.randn(out_features, generator=generator)
        x, gy = (torch.randn(batch, size, generator=generator) for size in (in_features, out_features))
        return cls(x, weight, mask, bias, gy)

    def truth(self, backward: bool) -> list[Tensor]:
        """fp64: [y], or [y, gx, gvalues (nnz,), gbias]."""
        x, weight, gy = self.x.double(), self.weight.double(), self.gy.double()
        y = x @ weight.t() + self.bias.double()
        return [y, gy @ weight, (gy.t() @ x)[self.mask], gy.sum(0)] if backward else [y]


def nn_linear(problem: Problem, backward: bool) -> Candidate:
    """torch's dense layer (MKL)."""
    layer = linear(problem)
    return module(problem, layer, lambda: layer.weight.grad[problem.mask], backward)


def sparselottery(problem: Problem, backward: bool) -> Candidate:
    """As `convert` makes it of an example: sparse, or dense where that is faster on such a batch."""
    example = problem.x.detach().requires_grad_(backward)
    layer = convert(linear(problem).train(backward), {"weight": problem.mask}, example)
    return module(problem, layer, lambda: layer.values.grad, backward)


def sparseprop(problem: Problem, backward: bool) -> Candidate:
    """The AVX2 kernels of Nikdan et al. (2023). It infers the mask from weight != 0, which holds for our weights."""
    layer = SparseLinear(problem.weight, bias=nn.Parameter(problem.bias.clone()))
    return module(problem, layer, lambda: layer.W_val.grad, backward)


def sparselab(problem: Problem, backward: bool) -> Candidate:
    """SparseLab's layer, whose vector kernels are NEON's and scalar elsewhere; rows without room for new survivors."""
    from sparselab import SparseLinear, layout, ops

    ops._transpose_cache.clear()  # by the ids of matrices, which new ones have again
    layer = SparseLinear(problem.x.shape[1], problem.gy.shape[1])
    layer._csr = layout.from_dense(problem.weight, padding_ratio=0)
    layer._values = nn.Parameter(torch.from_numpy(np.asarray(layer._csr.values)))
    layer.bias = nn.Parameter(problem.bias.clone())
    stored = layer._values.detach() != 0  # an empty row holds a zero
    return module(problem, layer, lambda: layer._values.grad[stored], backward)


def onednn(problem: Problem, backward: bool) -> Candidate:
    """oneDNN's dense layer with a packed weight, which torch.compile uses for frozen models; forward only."""
    if backward:
        raise ValueError("onednn: the packed linear layer has no backward")
    packed = torch.ops.mkldnn._reorder_linear_weight(problem.weight, problem.x.shape[0])
    return _returning(
        lambda: [torch.ops.mkldnn._linear_pointwise(problem.x, packed, problem.bias, "none", [], "")],
    )


def torch_csr(problem: Problem, backward: bool) -> Candidate:
    """torch.sparse on CSR (MKL sparse), composed by hand in the fastest way found.

    y = W xᵀ; gx = Wᵀ gyᵀ on the stored CSR of Wᵀ (twice as fast as W.t()), whose values follow W's at every step;
    gvalues = sampled_addmm.
    """
    x, gy, bias = problem.x, problem.gy, problem.bias
    weight = _torch_csr(problem.weight, problem.mask)
    weight_t = _torch_csr(problem.weight.t(), problem.mask.t())
    order = torch.zeros(problem.mask.shape, dtype=torch.int64)
    order[problem.mask] = torch.arange(weight.values().numel())
    order = order.t()[problem.mask.t()]

    def forward() -> list[Tensor]:
        if len(x) == 1:
            return [(torch.mv(weight, x[0]) + bias).unsqueeze(0)]
        return [(weight @ x.t()).t().add(bias).contiguous()]

    def forward_backward() -> list[Tensor]:
        torch.index_select(weight.values(), 0, order, out=weight_t.values())
        gx = (weight_t @ gy.t()).t().contiguous()
        gvalues = torch.sparse.sampled_addmm(weight, gy.t(), x, beta=0).values()
        return [*forward(), gx, gvalues, gy.sum(0)]

    return _returning(forward_backward if backward else forward)


def scipy_csr(problem: Problem, backward: bool) -> Candidate:
    """scipy.sparse on CSR (one thread). It has no SDDMM: gvalues are read from the dense gradient.

    That is torch's: numpy's product leaves threads of OpenBLAS that spin for 25 ms, while others are timed.
    """
    x, gy, bias = problem.x.numpy(), problem.gy.numpy(), problem.bias.numpy()
    index = scipy.sparse.csr_array(problem.mask.numpy())
    values = problem.weight[problem.mask].numpy()
    weight = scipy.sparse.csr_array((values, index.indices, index.indptr), shape=index.shape)
    survivors = problem.mask.flatten().nonzero().flatten().numpy()

    def forward() -> list[np.ndarray]:
        return [np.ascontiguousarray((weight @ x.T).T + bias)]

    def forward_backward() -> list[np.ndarray]:
        gx = np.ascontiguousarray((weight.T @ gy.T).T)
        gvalues = (problem.gy.t() @ problem.x).numpy().ravel()[survivors]
        return [*forward(), gx, gvalues, gy.sum(0)]

    return _returning(forward_backward if backward else forward)


def onednn_csr(problem: Problem, backward: bool) -> Candidate:
    """oneDNN on CSR, composed as torch_csr is. It has no SDDMM: gvalues are read from the dense gradient."""
    x, gy, bias = problem.x, problem.gy, problem.bias
    weight = scipy.sparse.csr_array(problem.weight.numpy())
    product, back = Product(weight, len(x)), Product(weight.T.tocsr(), len(x))
    survivors = problem.mask.flatten().nonzero().flatten()

    def forward() -> list[Tensor]:
        product.x[:] = x.numpy().T
        return [torch.from_numpy(product.run()).t() + bias]

    def forward_backward() -> list[Tensor]:
        back.x[:] = gy.numpy().T
        gvalues = (gy.t() @ x).flatten()[survivors]
        return [*forward(), torch.from_numpy(back.run()).t().contiguous(), gvalues, gy.sum(0)]

    return _returning(lambda: [result.contiguous() for result in (forward_backward if backward else forward)()])


def sparse_peers() -> list[Callable[[Problem, bool], Candidate]]:
    """The sparse libraries that are installed."""
    optional = {
        sparseprop: SPARSEPROP_MISSING is None,
        sparselab: importlib.util.find_spec("sparselab") is not None,
        onednn_csr: installed() is not None,
    }
    return [torch_csr, scipy_csr, *(peer for peer, here in optional.items() if here)]


def linear(problem: Problem) -> nn.Linear:
    """The dense layer, in the dtype of the problem."""
    layer = nn.Linear(problem.x.shape[1], problem.gy.shape[1], dtype=problem.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(problem.weight)
        layer.bias.copy_(problem.bias)
    return layer


def module(
    problem,
    layer: nn.Module,
    gvalues: Callable[[], Tensor],
    backward: bool,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Candidate:
    """A layer run as users run it: under no_grad, or forward and backward with a gradient for x as well.

    problem: has `x` and `gy`. y comes in `memory_format`, the gradient of x in the format of x.
    """
    leaves = [problem.x.clone().requires_grad_(backward), *layer.parameters()]
    x = leaves[0]
    y = x

    def forward() -> None:
        nonlocal y
        with torch.no_grad():
            y = layer(x).contiguous(memory_format=memory_format)

    def forward_backward() -> None:
        nonlocal y
        for leaf in leaves:
            leaf.grad = None
        y = layer(x).contiguous(memory_format=memory_format)
        y.backward(problem.gy)

    if backward:
        return Candidate(forward_backward, lambda: [y.detach(), x.grad, gvalues(), layer.bias.grad])
    return Candidate(forward, lambda: [y])


def _returning(run: Callable[[], list]) -> Candidate:
    """A candidate that leaves its results in what `run` returns."""
    return Candidate(run, lambda: [torch.as_tensor(result) for result in run()])


def _torch_csr(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` at `mask` as a torch CSR tensor with int32 indices."""
    index = scipy.sparse.csr_array(mask.numpy())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(index.indptr.astype(np.int32)),
            torch.from_numpy(index.indices.astype(np.int32)),
            weight[mask],
            size=weight.shape,
            check_invariants=True,
        )
