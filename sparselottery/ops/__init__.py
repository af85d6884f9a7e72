"""The algebra, on torch tensors, dispatched by device.

    op      equation                                   gradients
    spmm    y = x Wᵀ + b                               gx = spmm(gy, Wᵀ)   gvalues = sddmm(gy, x)   gb = Σ gy
    sddmm   gvalues = (gyᵀ x) at the pattern           by the reference
    chain   spmm, ReLU, spmm, ReLU, ..., spmm          the same, from the back
    conv2d  y = relu?(x * W + b)                       the same, over the taps of W
    conv_transpose2d: y is the gx of conv2d, gx is conv2d
    rows    y = W[ids]                                 gvalues = Σ gy at the rows, of the pattern

x (N, I), y (N, O), values (nnz,), W (O, I) sparse; for conv2d x (N, C, H, W), y (N, O, OH, OW), I the C x taps of a
filter; for rows ids (N,), y (N, I). Eight torch ops carry all of it, `chain`, `conv2d`, `conv_transpose2d`, `rows` of
`torch.ops.sparselottery` and the `_backward` of each: an spmm is a chain of one, an sddmm is its gradient. Second
derivatives run on the reference.
"""

from .common import as_one_module, blocks_taken, check_layout, in_torch, too_old, unrecorded, untraced
from .conv import call_conv, call_conv_after_conv, compile_conv_plan, conv2d, takes_norm
from .conv_transpose import conv_transpose2d
from .embedding import rows
from .flops import are_counted, count_when_imported
from .linear import call_chain, chain, compile_plan

__all__ = [
    "are_counted",
    "as_one_module",
    "blocks_taken",
    "call_chain",
    "call_conv",
    "call_conv_after_conv",
    "chain",
    "check_layout",
    "compile_conv_plan",
    "compile_plan",
    "conv2d",
    "conv_transpose2d",
    "in_torch",
    "rows",
    "takes_norm",
    "too_old",
    "unrecorded",
    "untraced",
]

count_when_imported()
