"""What is captured and replayed, and how `choose_execution` times it. A stand-in takes the place of CUDA's graphs."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparselottery import MaskedLinear, MaskedSequential, execution
from sparselottery.graphs import WARM_UP, BrokenCaptureError, captured, on_another_stream, works

MASK = torch.eye(6).bool()
CPU = torch.device("cpu")


class Graphs:
    """Captures by running; a capture of an execution in `refuses` fails. Notes what happens, in order."""

    refusal = RuntimeError("operation not permitted when stream is capturing\nand more")

    def __init__(self, monkeypatch, *refuses):
        self.happened, self.refuses, self.timed = [], refuses, []
        forward = MaskedLinear.forward

        def noted(layer, x):
            self.happened.append(layer.execution)
            return forward(layer, x)

        monkeypatch.setattr(MaskedLinear, "forward", noted)
        for name in ("on_another_stream", "captured", "interleaved_ms"):
            monkeypatch.setattr(execution, name, getattr(self, name))
        monkeypatch.setattr(execution, "REPLAYED_ON", ("cpu",))
        monkeypatch.setattr(execution, "_CACHE", {})

    def on_another_stream(self, work, device):
        assert device == torch.device("cpu")
        self.happened.append("aside")
        work()

    def captured(self, work, device):
        self.happened.append("capture")
        work()
        if self.happened[-1] in self.refuses:
            raise self.refusal
        return "replay"

    def interleaved_ms(self, *calls, **_):
        self.timed = [call if call == "replay" else "call" for call in calls]
        return [1.0, *[0.5] * (len(calls) - 1)]


def test_replays_are_timed(monkeypatch):
    graphs, layer = Graphs(monkeypatch), MaskedLinear(6, 6, mask=MASK)
    execution.choose_execution(layer, torch.randn(2, 6))
    assert graphs.timed == ["replay", "replay"]
    sparse, dense = (["aside", name] * WARM_UP + ["capture", name] for name in ("sparse", "dense"))
    assert graphs.happened[-len(sparse + dense) :] == sparse + dense
    assert (layer.execution, layer.measured.timed) == ("dense", "replayed")
    assert layer.why == "measured: sparse 1 ms, dense 0.5 ms for (2, 6), training, replayed"


def test_what_cannot_be_captured_is_called(monkeypatch):
    graphs, layer = Graphs(monkeypatch, "sparse"), MaskedLinear(6, 6, mask=MASK)
    execution.choose_execution(layer, torch.randn(2, 6))
    assert graphs.timed == ["call", "replay"]
    reason = "sparse called: operation not permitted when stream is capturing"
    assert layer.why == f"measured: sparse 1 ms, dense 0.5 ms for (2, 6), training, replayed; {reason}"


def test_a_capture_that_breaks_the_device_ends_the_choice(monkeypatch):
    graphs, layer = Graphs(monkeypatch, "sparse"), MaskedLinear(6, 6, mask=MASK)
    graphs.refusal = BrokenCaptureError("cpu does no further work of this process")
    with pytest.raises(BrokenCaptureError, match="no further work"):
        execution.choose_execution(layer, torch.randn(2, 6))
    assert graphs.timed == []
    assert layer.measured is None


class Cuda:
    """Streams and graphs of a stand-in for torch.cuda. A capture that fails leaves its stream the current one."""

    def __init__(self, monkeypatch):
        self.current = "the caller's"
        self.device, self.current_stream = nullcontext, lambda: self.current
        self.CUDAGraph = lambda: SimpleNamespace(replay="replay")
        for name in ("device", "current_stream", "stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph):
        before, self.current = self.current, "of the capture"
        yield
        self.current = before


def refuse():
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_capture_that_fails_leaves_a_device_that_works(monkeypatch):
    cuda = Cuda(monkeypatch)
    assert captured(lambda: None, CPU) == "replay"
    with pytest.raises(RuntimeError, match="operation not permitted") as caught:
        captured(refuse, CPU)
    assert not isinstance(caught.value, BrokenCaptureError)
    assert cuda.current == "the caller's"


def test_a_capture_that_fails_and_breaks_the_device_says_so(monkeypatch):
    def rand(*size, dtype, device):
        assert cuda.current == "the caller's"
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    cuda = Cuda(monkeypatch)
    monkeypatch.setattr(torch, "rand", rand)
    with pytest.raises(BrokenCaptureError) as caught:
        captured(refuse, CPU)
    assert str(caught.value) == (
        "cpu does no further work of this process: a capture failed, operation not permitted when stream is capturing"
    )


def test_a_device_works_that_ends_what_it_was_given(monkeypatch):
    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    assert works(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not works(torch.device("cuda"))


def test_each_layer_of_a_call_says_how_its_own_were_timed(monkeypatch):
    dead = MASK.index_fill(0, torch.tensor(1), False)
    graphs = Graphs(monkeypatch, "compact")
    model = MaskedSequential(MaskedLinear(6, 6, mask=dead), nn.ReLU(), MaskedLinear(6, 6, mask=MASK)).eval()
    execution.choose_execution(model, torch.randn(2, 6))
    assert graphs.timed == ["replay", "call", "replay", "replay"]
    assert model[0].measured.timed.startswith("replayed; compact called: operation")
    assert model[2].measured.timed == "replayed"


def test_a_mistake_is_no_refusal(monkeypatch):
    """What fails where nothing is captured fails."""
    Graphs(monkeypatch)

    def broken(work, device):
        raise RuntimeError("a kernel is wrong")

    monkeypatch.setattr(execution, "on_another_stream", broken)
    with pytest.raises(RuntimeError, match="a kernel is wrong"):
        execution.choose_execution(MaskedLinear(6, 6, mask=MASK), torch.randn(2, 6))


def test_on_the_cpu_calls_are_timed():
    layer = MaskedLinear(6, 6, mask=MASK)
    execution.choose_execution(layer, torch.randn(2, 6))
    assert layer.measured.timed == "called"
    assert layer.why.endswith("for (2, 6), training")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    device, total = torch.device("cuda"), torch.zeros(3, device="cuda")
    on_another_stream(lambda: total.add_(1), device)
    replay = captured(lambda: total.add_(2), device)
    assert total.tolist() == [1] * 3
    replay()
    assert total.tolist() == [3] * 3
    layer = MaskedLinear(6, 6, mask=MASK).cuda()
    execution.choose_execution(layer, torch.randn(2, 6, device=device))
    assert layer.measured.timed == "replayed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_waits_for_a_gpu_is_refused_or_breaks_the_process_and_says_which():
    """In a process of its own: the GPU may be lost to it."""
    program = (
        "import torch; from sparselottery.graphs import BrokenCaptureError, captured, works\n"
        "x = torch.ones(3, device='cuda')\n"
        "try: captured(lambda: x.sum().item(), x.device)\n"
        "except RuntimeError as error: print(isinstance(error, BrokenCaptureError) != works(x.device))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "True\n"
