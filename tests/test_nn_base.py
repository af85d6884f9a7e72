"""The executions that a masked layer has, how one is set, and what each keeps."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from sparselottery import MaskedConv2d, MaskedLinear, MaskedSequential, ops
from sparselottery.nn import Measured
from sparselottery.pattern import BLOCKS


def blocks(rows, columns, size=8):
    """A mask (rows * size, columns * size) of every other block, like a chessboard."""
    board = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 0
    return board.repeat_interleave(size, 0).repeat_interleave(size, 1)


def linear(mask):
    return MaskedLinear(*reversed(mask.shape), mask=mask)


def conv(mask, **options):
    """1x1 filters at the mask."""
    return MaskedConv2d(mask.shape[1], mask.shape[0], 1, mask=mask[:, :, None, None], **options)


BUILT = {"linear": linear, "conv": conv}
SPARSE = torch.eye(16, dtype=torch.bool)
EMPTY_ROW = SPARSE.index_fill(0, torch.tensor(3), False)


@pytest.fixture
def block_kernels(monkeypatch):
    """As if there were kernels for blocks here: the layouts that layers and plans were compiled for are noted."""
    compiled = []
    monkeypatch.setattr(ops, "call_chain", lambda *args: None)  # of the CPU, which has no kernels for blocks
    monkeypatch.setattr(ops, "blocks_taken", lambda *args: tuple(each for each in BLOCKS if each[1] > 1))
    for name in ("compile_plan", "compile_conv_plan"):
        compile_one = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, f=compile_one: compiled.append(args[-1]) or f(*args))
    return compiled


@pytest.mark.parametrize("kind", BUILT)
def test_what_is_unknown_or_impossible_is_refused(kind):
    layer = BUILT[kind](SPARSE)
    with pytest.raises(ValueError, match=r"execution: expected one of \('sparse', 'block', .*'dense'\), got 'auto'"):
        layer.execution = "auto"
    with pytest.raises(ValueError, match=r"\('sparse', 'dense'\), got 'block': there are no kernels for blocks of"):
        layer.execution = "block"
    with pytest.raises(ValueError, match=r"expected one of \('dense',\), got 'sparse': nothing is pruned"):
        BUILT[kind](torch.ones(4, 4, dtype=torch.bool)).execution = "sparse"
    assert (layer.execution, layer.why) == ("sparse", "not measured")


@pytest.mark.usefixtures("block_kernels")
def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="got 'block': its mask does not consist of whole blocks"):
        linear(SPARSE).execution = "block"
    with pytest.raises(ValueError, match=r"there are no kernels for its blocks, \(16, 1\), on cpu"):
        linear(torch.eye(3, dtype=torch.bool).repeat_interleave(16, 0)).execution = "block"


@pytest.mark.parametrize("kind", BUILT)
def test_blocks_are_the_default_where_there_are_kernels(kind, block_kernels):
    layer = BUILT[kind](blocks(2, 3))
    assert (layer.execution, layer.block, layer.executions) == ("block", (8, 8), ("sparse", "block", "dense"))
    assert block_kernels == [(8, 8)]
    layer.execution = "sparse"
    assert (layer.execution, layer.block, layer.why) == ("sparse", (1, 1), "set by hand")
    layer.execution = None
    assert (layer.execution, layer.block, layer.why) == ("block", (8, 8), "not measured")
    assert block_kernels == [(8, 8), (1, 1), (8, 8)]
    twin = copy.deepcopy(layer)
    assert (twin.execution, twin.block) == ("block", (8, 8))
    assert BUILT[kind](SPARSE).execution == "sparse"


@pytest.mark.parametrize("kind", BUILT)
def test_another_pattern_has_other_executions(kind, block_kernels):
    """What was set is kept, and taken up where it is possible."""
    layer, other = BUILT[kind](blocks(2, 2)), BUILT[kind](EMPTY_ROW)
    layer.execution = "block"
    layer.load_state_dict(other.state_dict())
    assert (layer.execution, layer.block) == ("sparse", (1, 1))
    assert layer.why == "not block, as was set: its mask does not consist of whole blocks"
    layer.load_state_dict(BUILT[kind](blocks(2, 2)).state_dict())
    assert (layer.execution, layer.block, layer.why) == ("block", (8, 8), "set by hand")
    other.execution = "compact"
    other.load_state_dict(BUILT[kind](SPARSE).state_dict())
    assert other.execution == "sparse"
    assert other.why == "not compact, as was set: every row and every column has survivors"
    other.load_state_dict(BUILT[kind](torch.ones(16, 16, dtype=torch.bool)).state_dict())
    assert (other.execution, other.executions, other.why) == ("dense", ("dense",), "nothing is pruned")


@pytest.mark.parametrize("kind", BUILT)
def test_only_what_the_execution_needs_is_kept(kind):
    layer = BUILT[kind](EMPTY_ROW)
    plan, sizes = layer.plan.clone(), {}
    for execution in ("dense", "compact", "sparse"):
        layer.execution = execution
        sizes[execution] = [
            0 if buffer is None else buffer.numel()
            for buffer in (layer.plan, layer._positions, layer._rows, layer._columns)
        ]
    assert sizes == {"dense": [0, 15, 0, 0], "compact": [0, 15, 15, 15], "sparse": [len(plan), 0, 0, 0]}
    assert torch.equal(layer.plan, plan)
    assert BUILT[kind](torch.ones(4, 4, dtype=torch.bool)).plan.numel() == 0
    assert list(layer.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]


def test_a_plan_that_fits_is_not_compiled_again(monkeypatch):
    layer, compiled, compile_plan = linear(SPARSE), [], ops.compile_plan
    monkeypatch.setattr(ops, "compile_plan", lambda *args: compiled.append(args) or compile_plan(*args))
    layer.execution = "sparse"
    layer.execution = None
    layer.double().to("cpu").requires_grad_(False)
    assert not compiled


def test_through_meta_and_back():
    """Nothing is compiled of indices that are not there."""
    layer, other, x = linear(EMPTY_ROW), linear(SPARSE), torch.randn(3, 16)
    layer.execution = "dense"
    layer.measured = Measured({"sparse": 2.0, "dense": 1.0}, (3, 16), True)
    layer.to("meta").to_empty(device="cpu").load_state_dict(other.state_dict())
    assert layer.execution == "sparse"
    assert torch.equal(layer(x), other(x))


def test_layers_of_several_executions_in_a_sequential(block_kernels, monkeypatch):
    """Single weights and blocks share a call, in which each has its own block."""
    calls, chain = [], ops.chain
    monkeypatch.setattr(ops, "chain", lambda *args, **how: calls.append(how) or chain(*args, **how))
    rows = torch.rand(16, 16) < 0.5
    rows[3] = False
    layers = [linear(rows), linear(blocks(2, 2)), linear(rows), linear(blocks(2, 2)), linear(blocks(2, 2))]
    layers[2].execution = "compact"
    model = MaskedSequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), *layers[2:4], nn.Tanh(), layers[4])
    x = torch.randn(5, 16)
    expected = nn.Sequential(*model)(x)
    calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert [call["blocks"] for call in calls] == [[(1, 1), (8, 8)], [(8, 8)], [(8, 8)]]
    assert [call["batch_minor"] for call in calls] == [False] * 3  # wide blocks read and write any layout


@pytest.mark.usefixtures("block_kernels")
def test_activations_stay_batch_minor_if_a_writer_or_reader_has_them_so(monkeypatch):
    calls, chain = [], ops.chain
    monkeypatch.setattr(ops, "chain", lambda *args, **how: calls.append(how["batch_minor"]) or chain(*args, **how))
    single, wide = linear(SPARSE), linear(blocks(2, 2))
    MaskedSequential(single, nn.Tanh(), wide, nn.Tanh(), wide, nn.Tanh(), single)(torch.randn(5, 16))
    assert calls == [True, False, True, False]


@pytest.mark.parametrize("batch", [16, 17])
@pytest.mark.parametrize("grad", [True, False])
def test_what_comes_out_is_contiguous(batch, grad):
    """As of nn.Linear, whatever x is: users take views of it."""
    x, layer = torch.randn(16, batch).t(), linear(SPARSE)
    with torch.set_grad_enabled(grad):
        for model in (layer, MaskedSequential(layer, nn.Tanh(), linear(SPARSE))):
            y = model(x)
            assert y.is_contiguous()
            torch.testing.assert_close(y, model(x.contiguous()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("execution", ["sparse", "block", "compact", "dense"])
@pytest.mark.parametrize("kind", BUILT)
def test_there_and_back(kind, execution):
    """A plan is that of its device, for which forward and backward never wait."""
    mask = blocks(4, 4, 16)
    mask[:16], x = False, torch.randn(3, 64) if kind == "linear" else torch.randn(3, 64, 5, 5)
    layer = BUILT[kind](mask)
    layer.measured = Measured({"sparse": 1.0, "dense": 2.0}, tuple(x.shape), True)
    expected, plan = layer(x), layer.plan.clone()
    layer.cuda()
    assert (layer.execution, layer.block, layer.measured) == ("block", (16, 16), None)
    layer.execution = execution
    on_gpu = x.cuda().requires_grad_()
    layer(on_gpu).sum().backward()  # compiles the kernels
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = layer(on_gpu)
            y.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-2, atol=5e-3)  # convolutions may use TF32
    layer.cpu()
    layer.execution = None
    assert torch.equal(layer.plan, plan)
    assert torch.equal(layer(x), expected)
