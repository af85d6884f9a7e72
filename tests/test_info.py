import json
import platform

import torch

from sparselottery import info
from sparselottery.kernels import gpu, native


def test_info_says_what_runs():
    torch.set_num_threads(1)
    facts = info()
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == "1"
    assert (facts["cpu"], facts["gpu"]) == (native.status(), gpu.status())
    assert json.loads(json.dumps(facts)) == facts


def test_info_says_why_native_code_does_not_run(monkeypatch):
    monkeypatch.setattr(native, "_STATUS", "torch reference: no native library was built")
    assert info()["cpu"] == "torch reference: no native library was built"


def test_triton_is_looked_for_once(monkeypatch):
    """Not in every call of an op."""
    looked = []
    monkeypatch.setattr(gpu, "find_spec", looked.append)
    gpu.available.cache_clear()
    try:
        assert not any(gpu.runs_on(torch.device("cuda")) for _ in range(3))
    finally:
        gpu.available.cache_clear()
    assert looked == ["triton"]
