"""The buffer of dense executions where it is not alone: other values, tracers, copies, threads, CUDA graphs."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from denses import BUILT, Writes, X, assert_right, expected, in_place, linear
from torch import nn
from torch.nn.utils import prune

from sparselottery import MaskedLinear
from sparselottery.nn import dense as module


@pytest.fixture
def writes(monkeypatch):
    return Writes(monkeypatch)


def test_other_values_leave_the_buffer_alone():
    """As of an inner loop, and of a second model, through the same layer."""
    layer, x = linear(), X.clone().requires_grad_()
    y = layer(x)
    others = [layer.values * 2, nn.Parameter(layer.values.detach() * 3), layer.values.detach() * 4]
    ys = [torch.func.functional_call(layer, {"values": other}, (x,)) for other in others]
    for other, got in zip(others, ys, strict=True):
        torch.testing.assert_close(got, torch.func.functional_call(layer, {"values": other}, (x,)))
    torch.testing.assert_close(ys[0], 2 * (y - layer.bias) + layer.bias)
    (y.sum() + sum(other.sum() for other in ys)).backward()
    torch.testing.assert_close(x.grad, 10 * layer.weight.sum(0).expand(3, -1))


def test_transforms():
    layer = linear()
    layer(X)
    values = torch.stack([layer.values.detach() * factor for factor in (1, 2)])

    def call(values, x):
        return torch.func.functional_call(layer, {"values": values}, (x,))

    y = torch.func.vmap(call, (0, None))(values, X)
    torch.testing.assert_close(y[1], 2 * (y[0] - layer.bias) + layer.bias)
    jacobian = torch.func.jacrev(lambda x: layer(x))(X[0])
    torch.testing.assert_close(jacobian, layer.weight)
    grads = torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x,)).sum())(
        dict(layer.named_parameters()), X
    )
    torch.testing.assert_close(grads["values"], torch.autograd.grad(layer(X).sum(), layer.values)[0])


def test_values_that_are_computed():
    """As by torch's pruning, in place of the parameter."""
    layer = linear()
    layer(X)
    prune.l1_unstructured(layer, "values", 3)
    assert_right(layer)
    layer(X).sum().backward()
    expected = X.sum(0)[layer.col_indices.long()] * layer.values_mask
    torch.testing.assert_close(layer.values_orig.grad, expected, atol=1e-6, rtol=1e-5)
    assert (layer.values_mask == 0).sum() == 3


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", BUILT)
def test_compiles_whole_and_exports(name, trained, writes):
    make, x = BUILT[name]
    layer = make().requires_grad_(trained)
    layer(x)
    writes.forget()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected(layer, x))
        in_place(layer)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), expected(layer, x))
    assert set(exported.state_dict) == {"values", "bias", "crow_indices", "col_indices"}
    assert writes["written"] == 0


@pytest.mark.parametrize("name", BUILT)
def test_autocast(name):
    make, x = BUILT[name]
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            y = layer(x)
            torch.testing.assert_close(y, expected(layer, x))
            layer.values.grad = None
            y.float().sum().backward()
            assert layer.values.grad.dtype == torch.float32
            in_place(layer)


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getbuffer().nbytes


@pytest.mark.parametrize("execution", ["dense", "compact"])
def test_copies_and_files_have_no_buffer(execution):
    layer = MaskedLinear(64, 64, mask=torch.eye(64).bool().index_fill(0, torch.tensor(1), False))
    layer.execution = execution
    x, size = torch.randn(2, 64), saved(layer)
    y = layer(x)
    assert saved(layer) < size + 1000  # a buffer is 16 kB
    assert list(layer.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.execution == execution
        assert torch.equal(twin(x), y)
        in_place(twin)
        assert_right(twin, x)
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("execution", ["dense", "compact"])
def test_a_copy_keeps_a_buffer_of_its_own(execution, writes):
    layer = linear(execution)
    layer(X)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        writes.forget()
        with torch.no_grad():
            twin(X)
            twin(X)
        assert writes == {"written": 1, "made": 0}


def test_moves(writes):
    layer = linear()
    layer(X)
    layer.double()
    with torch.no_grad():
        assert_right(layer, X.double())
        writes.forget()
        layer(X.double())
        assert writes == {"written": 0, "made": 0}
    layer.to("meta")
    assert layer(X.double().to("meta")).is_meta
    layer.to_empty(device="cpu").load_state_dict(linear().state_dict())
    assert_right(layer, X.double())


def test_threads_share_it():
    layer = linear()

    def call(_):
        with torch.inference_mode():
            return layer(X)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            in_place(layer)
            wanted = expected(layer, X)
            for y in pool.map(call, range(8)):
                torch.testing.assert_close(y.clone(), wanted)


def test_threads_train_it():
    """A weight that threads write anew is no change to a backward that others have begun."""
    torch.manual_seed(0)
    layer, threads = linear(), 4

    def forward(_):
        x = torch.randn(2, 5, requires_grad=True)
        return layer(x).square().sum()

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(50):
            in_place(layer)
            losses = list(pool.map(forward, range(threads)))
            assert len(list(pool.map(torch.Tensor.backward, losses))) == threads


def test_a_writer_is_alone(monkeypatch):
    """Of two threads that see a change the second one finds it written: versions tell of one."""
    layer, write, inside = linear(), module._write, threading.Event()
    layer(X)
    in_place(layer)

    def slow(*args):
        inside.set()
        time.sleep(0.05)
        return write(*args)

    monkeypatch.setattr(module, "_write", slow)
    x = [torch.randn(2, 5, requires_grad=True) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(layer, x[0])
        inside.wait()
        second = pool.submit(layer, x[1])
        for y in (first.result(), second.result()):
            y.square().sum().backward()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("execution", ["dense", "compact"])
def test_another_process_changes_values(execution):
    layer = linear(execution).share_memory()
    with torch.no_grad():
        layer(X)
        child = multiprocessing.get_context("fork").Process(target=in_place, args=(layer,))
        child.start()
        child.join()
        assert_right(layer)


def test_gradients_of_a_batch_of_outputs_at_once():
    """By torch's older vmap, as vectorised Jacobians take them."""
    layer = linear()
    y = layer(X)
    rows = torch.eye(y.numel()).view(-1, *y.shape)
    (found,) = torch.autograd.grad(y, layer.values, rows, is_grads_batched=True, retain_graph=True)
    for row, gradient in zip(rows, found, strict=True):
        torch.testing.assert_close(gradient, *torch.autograd.grad(y, layer.values, row, retain_graph=True))


def test_replicas_make_their_own_weight(writes):
    layer = linear()
    layer(X)
    replica = layer._replicate_for_data_parallel()
    replica.values = layer.values * 2
    replica._parameters = layer._parameters | {"values": None}
    writes.forget()
    torch.testing.assert_close(replica(X), 2 * (layer(X) - layer.bias) + layer.bias)
    assert writes["made"] == 1


class Graph:
    """As if calls were captured, on a stream of its own: a stand-in for CUDA, where only a replay writes."""

    def __init__(self, monkeypatch):
        self.capturing, self.writes, write = False, [], module._write
        monkeypatch.setattr(module, "_capturing", lambda values: self.capturing)
        monkeypatch.setattr(module, "_stream", lambda values: int(self.capturing))
        monkeypatch.setattr(
            module,
            "_write",
            lambda *args: self.writes.append(lambda: write(*args)) if self.capturing else write(*args),
        )

    def capture(self, call):
        self.capturing = True
        call()
        self.capturing = False
        return len(self.writes)

    def replay(self):
        with torch.no_grad():
            for write in self.writes:
                write()


@pytest.fixture
def graph(monkeypatch):
    return Graph(monkeypatch)


@pytest.mark.parametrize("grad", [True, False])
def test_a_capture_writes_always(grad, graph):
    layer = linear()
    with torch.set_grad_enabled(grad):
        layer(X)
        layer(X)
        assert graph.capture(lambda: layer(X)) == 1


def test_after_a_capture_nothing_is_taken_on_trust(graph):
    """Replays change values, and the buffer, without a trace."""
    layer = linear()
    with torch.no_grad():
        layer(X)
        in_place(layer)
        graph.capture(lambda: layer(X))
        assert_right(layer)  # what was captured was not done
        for _ in range(2):
            layer.values.data.mul_(2)
            graph.replay()
            layer.values.data.mul_(2)
            assert_right(layer)


@pytest.mark.parametrize("execution", ["dense", "compact"])
def test_a_capture_of_frozen_values_writes_nothing_unless_they_changed(execution, graph, writes):
    layer = linear(execution).requires_grad_(False)
    layer(X)
    assert graph.capture(lambda: layer(X)) == 0
    writes.forget()
    layer(X)
    assert writes["written"] == 0  # nor does a call after it
    in_place(layer)
    assert graph.capture(lambda: layer(X)) == 1
    assert_right(layer)  # what was captured was not done


def test_a_capture_of_values_that_were_just_frozen_writes(graph):
    """A step, or a replay of one, may have changed them unseen."""
    layer = linear()
    layer(X)
    layer.requires_grad_(False)
    assert graph.capture(lambda: layer(X)) == 1


def test_a_buffer_is_not_of_the_memory_of_a_graph(graph, writes):
    layer = linear()
    graph.capture(lambda: layer(X))
    assert (writes["made"], layer._dense._state) == (1, None)


def test_another_stream_does_not_wait_for_the_writer(monkeypatch, writes):
    streams = [1]
    monkeypatch.setattr(module, "_stream", lambda values: streams[-1])
    layer, x = linear(), X.clone().requires_grad_()
    layer.values.requires_grad_(False)
    y = layer(x)
    layer(X)
    assert writes["written"] == 1
    streams.append(2)
    layer(X)
    layer(X)
    assert writes["written"] == 2
    y.sum().backward()  # the same values: no newer version


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("execution", ["dense", "compact"])
def test_in_a_cuda_graph(execution):
    layer, x = linear(execution).cuda(), X.cuda()
    layer.execution = execution
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(3):
        in_place(layer)
        graph.replay()
        torch.testing.assert_close(y, expected(layer, x))
        torch.testing.assert_close(layer(x), expected(layer, x))
