"""Every public entry under every global state of the program around it: the numbers of masked dense, whatever it is."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hosts import default_device, default_dtype
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparselottery import MaskedConv2d, MaskedLinear, Ticket, convert, explain, export, find_ticket, load_sparse, prune
from sparselottery.kernels import native

Net = Callable[[Tensor], Tensor]
DTYPES = [torch.float64, torch.bfloat16, torch.float16]


class Layers(nn.Module):
    """The layers themselves, called one by one."""

    def __init__(self, dense: nn.Sequential, masks: dict[str, Tensor]) -> None:
        super().__init__()
        conv, _, _, fc1, _, fc2 = dense
        like = {"device": "cpu", "dtype": torch.float32}
        self.conv = MaskedConv2d(3, 8, 3, padding=1, mask=masks["0.weight"], **like)
        self.fc1 = MaskedLinear(288, 16, mask=masks["3.weight"], **like)
        self.fc2 = MaskedLinear(16, 10, mask=masks["5.weight"], **like)
        for ours, theirs in ((self.conv, conv), (self.fc1, fc1), (self.fc2, fc2)):
            ours.load_state_dict(theirs.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.conv(x).relu().flatten(1)).relu())


class Given:
    """A dense net, its masks, and what stands in files."""

    def __init__(self, folder) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.dense = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 10)
        ).eval()
        self.masks = prune(self.dense, 0.8)
        self.truth = copy.deepcopy(self.dense)
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.truth.get_parameter(name).mul_(mask)
        self.file = folder / "ticket.safetensors"
        Ticket.from_model(convert(self.dense, self.masks)).save(self.file)
        self.x = torch.randn(5, 3, 6, 6)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Given:
    return Given(tmp_path_factory.mktemp("matrix"))


def _found(given: Given) -> nn.Module:
    """The ticket of one round of a training that changes nothing: it has the masks of `prune`."""
    return find_ticket(given.dense, lambda model: None, rounds=1, fraction=0.8).apply(given.dense).eval()


def _exported(given: Given) -> nn.Module:
    path = given.folder / "exported.safetensors"
    export(convert(given.dense, given.masks).eval(), path, format="safetensors")
    return load_sparse(path)


def _explained(given: Given) -> nn.Module:
    model = convert(given.dense, given.masks).eval()
    assert [row["execution"] for row in explain(model)] == ["sparse"] * 3
    return model


ENTRIES: dict[str, Callable[[Given], nn.Module]] = {
    "layers": lambda given: Layers(given.dense, given.masks).eval(),
    "convert": lambda given: convert(given.dense, given.masks).eval(),
    "find_ticket": _found,
    "load_sparse": lambda given: load_sparse(given.file),
    "export": _exported,
    "explain": _explained,
}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def anomaly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection")
        with torch.autograd.detect_anomaly():
            yield


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


SURROUNDINGS = {
    **{f"default dtype {str(dtype)[6:]}": lambda dtype=dtype: default_dtype(dtype) for dtype in DTYPES},
    "with device meta": lambda: torch.device("meta"),
    "default device meta": lambda: default_device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": deterministic,
    "anomaly": anomaly,
    "function mode": Functions,
    "dispatch mode": Dispatches,
}


def check(net: Net, given: Given, x: Tensor | None = None, tolerance: float = 1e-5) -> None:
    """Its outputs are those of masked dense and, where it is trained, so are the gradients of its input."""
    x = given.x if x is None else x
    with torch.inference_mode(False):  # whose tensors get no gradients
        ours, theirs = (x.detach().clone().requires_grad_() for _ in range(2))
    y = net(ours)
    assert type(y) is Tensor
    with torch.inference_mode(False), torch.enable_grad(), torch._C.DisableTorchFunction():
        expected = given.truth(theirs)
        expected.sum().backward()
    torch.testing.assert_close(y.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
    if y.requires_grad:
        y.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("state", SURROUNDINGS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_made_and_called_in_it(given, entry, state):
    with SURROUNDINGS[state]():
        net = ENTRIES[entry](given)
        check(net, given)
    if state != "inference_mode":  # whose tensors autograd refuses
        check(net, given)


@pytest.mark.parametrize("state", SURROUNDINGS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_called_in_it(given, entry, state):
    net = ENTRIES[entry](given)
    before = net(given.x).detach()
    with SURROUNDINGS[state]():
        check(net, given)
    torch.testing.assert_close(net(given.x).detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("entry", ENTRIES)
def test_autocast(given, entry):
    """As autocast of masked dense; a frozen net computes in the dtype of its file."""
    net = ENTRIES[entry](given)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = net(given.x), given.truth(given.x)
    assert y.dtype in (expected.dtype, torch.float32)
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("entry", ENTRIES)
def test_traced_for_another_batch(given, entry):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        traced = torch.jit.trace(ENTRIES[entry](given), given.x)
    x = torch.randn(7, 3, 6, 6)
    torch.testing.assert_close(traced(x).detach(), given.truth(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entry", ENTRIES)
def test_exported(given, entry):
    with torch.no_grad():
        program = torch.export.export(ENTRIES[entry](given), (given.x,))
    torch.testing.assert_close(program.module()(given.x).detach(), given.truth(given.x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entry", ENTRIES)
def test_compiled(given, entry):
    torch.compiler.reset()
    check(torch.compile(ENTRIES[entry](given), backend="aot_eager", fullgraph=True), given)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # by torch, at its first jvp
def test_functorch(given, entry):
    net, images = ENTRIES[entry](given), given.x[:, None]
    with torch.no_grad():
        y = torch.func.vmap(net)(images)[:, 0]
        _, tangent = torch.func.jvp(net, (given.x,), (torch.ones_like(given.x),))
        _, expected = torch.func.jvp(given.truth, (given.x,), (torch.ones_like(given.x),))
    torch.testing.assert_close(y, given.truth(given.x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entry", ENTRIES)
def test_threads_changed_between_calls(given, entry):
    net = ENTRIES[entry](given)
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        check(net, given)


@pytest.mark.parametrize("entry", ENTRIES)
def test_called_from_many_threads(given, entry):
    net, outputs = ENTRIES[entry](given), []

    def work() -> None:
        with torch.no_grad():
            outputs.extend(net(given.x) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(outputs) == 160
    for y in outputs:
        torch.testing.assert_close(y, given.truth(given.x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_called_after_a_fork(given, entry):
    """In a child that computes on one thread, as those of DataLoader do."""
    net = ENTRIES[entry](given)
    check(net, given)
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)
            check(net, given)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(native.LIBRARY is None, reason="needs the native kernels")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
def test_a_forked_child_has_no_team():
    """With two threads: those of the team of the parent are not in the child, and waiting for them has no end."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    net, x = convert(model, prune(model, 0.9)), torch.randn(64, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            net(x)
            time.sleep(1)  # on a busy machine a thread works alone for a while, and then again in a team
            wanted = net(x)
        child = os.fork()
        if not child:
            signal.alarm(60)  # ends it by a signal
            time.sleep(1.5)
            with torch.no_grad():
                y = net(x)
            torch.set_num_threads(1)  # torch's own team is not there either
            os._exit(0 if torch.equal(y, wanted) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)


FORKED = """
import os, signal, torch
from sparselottery import MaskedLinear
torch.set_num_threads(2)
layer, x = MaskedLinear(512, 512, mask=torch.rand(512, 512) < 0.1), torch.randn(256, 512)
gy = torch.ones(256, 512).add_(1)  # by two threads, of the same OpenMP as ours
child = os.fork()
if not child:
    signal.alarm(60)  # ends it
    layer(x).backward(gy)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(native.LIBRARY is None, reason="needs the native kernels")
def test_a_child_of_a_process_that_had_other_teams():
    """In a process of its own, which has never called a kernel."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True)


class Marked(Tensor):
    """A subclass that adds nothing."""


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "Parameter": lambda x: nn.Parameter(x),
    "subclass": lambda x: x.as_subclass(Marked),
    "batch-minor": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "every other sample": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "view that requires grad": lambda x: x.clone().requires_grad_(True).view(5, 3, 6, 6),
    "no samples": lambda x: x[:0],
    "flipped": lambda x: x.flip(-1),
    "conjugated twice": lambda x: torch.complex(x, x).conj().real,
    "negated view": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_inputs(given, entry, kind):
    net, x = ENTRIES[entry](given), INPUTS[kind](given.x)
    y, expected = net(x), given.truth(x)
    torch.testing.assert_close(
        y.detach().as_subclass(Tensor), expected.detach().as_subclass(Tensor), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("entry", ENTRIES)
def test_fake_tensors(given, entry):
    """Nothing is computed, and the shape, dtype and device are right."""
    net = ENTRIES[entry](given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = net(mode.from_tensor(given.x))
    assert isinstance(y, torch._subclasses.FakeTensor)
    assert (y.shape, y.dtype, y.device.type) == ((5, 10), torch.float32, "cpu")


@pytest.mark.parametrize("entry", ENTRIES)
def test_functionalized(given, entry):
    net = ENTRIES[entry](given)
    with torch.no_grad():
        y = torch.func.functionalize(net)(given.x)
    torch.testing.assert_close(y, given.truth(given.x).detach(), rtol=1e-5, atol=1e-5)
