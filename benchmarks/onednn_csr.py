"""oneDNN's product of a CSR matrix, through its C interface: torch hides the one that it is built with.

PyPI's onednn-cpu-gomp (3.2, of 2023) installs a library that has it; the newer onednn wants a SYCL device.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import scipy.sparse

PATHS = [Path(folder) / "lib/libdnnl.so.3" for folder in (sys.prefix, sys.base_prefix)]
CPU, IN_ORDER, F32, S32 = 1, 1, 3, 4  # of dnnl_types.h
SRC, WEIGHTS, DST = 1, 33, 17

Handle, Extents = ctypes.c_void_p, ctypes.c_int64 * 12


class Argument(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("memory", Handle)]


def installed() -> Path | None:
    """The library, where there is one."""
    return next((path for path in PATHS if path.exists()), None)


class Product:
    """y = W @ x, fp32: W (O, I) CSR, x (I, N) and y (O, N) row-major. Memory and primitive are made once."""

    def __init__(self, weight: scipy.sparse.csr_array, columns: int) -> None:
        self._library = ctypes.CDLL(str(installed()))
        rows, inner = weight.shape
        self.x, self.y = np.zeros((inner, columns), np.float32), np.zeros((rows, columns), np.float32)
        indices = [weight.indices.astype(np.int32), weight.indptr.astype(np.int32)]
        self._stored = [weight.data.astype(np.float32), *indices]
        self._engine = self._made("engine_create", CPU, ctypes.c_size_t(0))
        self._stream = self._made("stream_create", self._engine, IN_ORDER)
        sizes = 2, Extents(rows, inner), F32, ctypes.c_int64(weight.nnz), S32, S32
        sparse = self._made("memory_desc_create_with_csr_encoding", *sizes)
        x, y = (
            self._made("memory_desc_create_with_strides", 2, Extents(*each.shape), F32, Extents(columns, 1))
            for each in (self.x, self.y)
        )
        described = self._made("matmul_primitive_desc_create", self._engine, sparse, x, None, y, None)
        self._primitive = self._made("primitive_create", described)
        handles = (Handle * 3)(*(each.ctypes.data for each in self._stored))
        memories = {SRC: self._made("memory_create_v2", sparse, self._engine, 3, handles)}
        for kind, description, each in ((WEIGHTS, x, self.x), (DST, y, self.y)):
            memories[kind] = self._made("memory_create", description, self._engine, Handle(each.ctypes.data))
        self._arguments = (Argument * 3)(*(Argument(kind, memory) for kind, memory in memories.items()))

    def run(self) -> np.ndarray:
        self._call("primitive_execute", self._primitive, self._stream, 3, self._arguments)
        self._call("stream_wait", self._stream)
        return self.y

    def _made(self, name: str, *arguments: object) -> Handle:
        made = Handle()
        self._call(name, ctypes.byref(made), *arguments)
        return made

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, f"dnnl_{name}")(*arguments):
            raise RuntimeError(f"dnnl_{name}: expected status 0, got {status}")
