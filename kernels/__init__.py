"""Raw tensors in, raw tensors out. Each backend offers the same functions; `reference` defines them.

    reference   plain torch: the definition, the oracle, the fallback
    cpu         native code (csrc/), if its library was built
    gpu         Triton kernels, if Triton is installed

This package never imports sparselottery: a kernel can be read, tested and timed with nothing around it.
"""

from . import cpu, gpu, reference

__all__ = ["backends", "cpu", "gpu", "reference"]


def backends() -> dict[str, str]:
    """What runs here, for each device: the native code in use, or why the reference runs instead."""
    return {"cpu": cpu.status(), "gpu": gpu.status()}
