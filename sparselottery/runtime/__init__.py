"""Tickets and exports, run: frozen models that store and multiply only the surviving weights.

On the CPU in fp32 native kernels run whole Sequentials in one call, packed for the machine at their first use; all else
(CUDA, other dtypes, no native library) runs on the modules of `nn`.
"""

from .load import SparseModel, load_sparse

__all__ = ["SparseModel", "load_sparse"]
