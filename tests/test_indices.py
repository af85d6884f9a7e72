"""Kernels follow no index tensor that was not validated, however it came."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from chains import spy
from hosts import MODELS, case_of, one_thread, same
from torch import Tensor, nn

import sparselottery as sl
from sparselottery.kernels import abi, cpu, cpu_net, cpu_train, native
from sparselottery.nn import MaskedLayer
from sparselottery.pattern import Pattern
from sparselottery.runtime import layer as frozen

NATIVE = pytest.mark.skipif(not native.available(), reason=native.status())


@pytest.fixture(params=MODELS)
def case(request) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    return case_of(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# Indices that nobody has validated


def reinitialised(model: nn.Module, fill: int = 2**30) -> nn.Module:
    """As after meta and to_empty, with memory that is surely nonsense."""
    model = model.to("meta").to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(fill)
    return model


EXECUTIONS = ["sparse", "dense", "compact"]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("assign", [False, True])
def test_meta_to_empty_load(case, execution, assign):
    model, masks, x = case
    masks["0.weight"][0] = False  # "compact" needs a dead row
    converted = sl.convert(model, masks)
    converted[0].execution = execution
    y, saved = converted(x), copy.deepcopy(converted.state_dict())
    empty = copy.deepcopy(converted)
    empty = reinitialised(empty)
    for run in (empty, empty[0], lambda x: empty[0](x[:1])):
        with pytest.raises(ValueError, match=r"crow_indices: .*load_state_dict"):
            run(x)
    empty.load_state_dict(saved, assign=assign)
    torch.testing.assert_close(empty(x), y)
    torch.testing.assert_close(empty(x[:1]), y[:1])
    grads = [torch.autograd.grad(each(x).sum(), list(each.parameters())) for each in (empty, converted)]
    torch.testing.assert_close(*grads)
    straight = copy.deepcopy(converted).to_empty(device="cpu")  # without meta between
    straight.load_state_dict(saved, assign=assign)
    torch.testing.assert_close(straight(x), y)
    on_meta = copy.deepcopy(converted).to("meta")
    on_meta.load_state_dict(saved, assign=True)
    torch.testing.assert_close(on_meta(x), y)


@pytest.mark.parametrize("assign", [False, True])
def test_other_threads_may_call_while_it_loads(case, assign, monkeypatch):
    model, masks, x = case
    model = sl.convert(model, masks)
    expected, load, seen = model(x), nn.Module._load_from_state_dict, []

    def load_later(module, *args):
        seen.append(same(model(x), expected))
        load(module, *args)

    monkeypatch.setattr(nn.Module, "_load_from_state_dict", load_later)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert len(seen) > 2
    assert all(seen)


@pytest.mark.filterwarnings("ignore:.*which is a no-op")
def test_a_dense_checkpoint_needs_a_mask(case):
    model, masks, _ = case
    for broken in (reinitialised(sl.convert(model, masks)), sl.convert(model, masks).to("meta")):
        with pytest.raises(RuntimeError, match="weight: "):
            broken.load_state_dict(model.state_dict())


def changed_by_hand(layer: MaskedLayer, how: str, name: str, wrong: bool) -> None:
    """Writes to a buffer, puts another in its place, or puts it back as it was."""
    tensor = getattr(layer, name)
    other = tensor.clone()
    if wrong:
        other[len(other) // 2] = 2**30
    if how == "write":
        tensor.copy_(other)
    elif how == "set":
        setattr(layer, name, other)
    elif how == "buffers":
        layer._buffers[name] = other
    else:
        state = layer.state_dict() | {name: other}
        layer.load_state_dict(state, assign=how == "assign")


@pytest.mark.parametrize("name", ["crow_indices", "col_indices", "plan"])
@pytest.mark.parametrize("how", ["write", "set", "buffers"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_buffers_written_by_hand(case, name, how, execution):
    model, masks, x = case
    masks["0.weight"][0] = False
    converted = sl.convert(model, masks)
    converted[0].execution = execution
    y = converted(x)
    changed_by_hand(converted[0], how, name, wrong=False)
    assert same(converted(x), y)
    if name == "plan":
        if execution == "sparse" and native.available():
            changed_by_hand(converted[0], how, name, wrong=True)
            assert same(converted(x), y)  # made anew
        return
    changed_by_hand(converted[0], how, name, wrong=True)
    for run in (converted, converted[0]):
        with pytest.raises(ValueError, match=r"indices.*load_state_dict"):
            run(x)
    converted.load_state_dict(sl.convert(model, masks).state_dict())
    torch.testing.assert_close(converted(x), y)


@pytest.mark.parametrize("how", ["load", "assign"])
def test_wrong_indices_are_not_loaded(case, how):
    model, masks, x = case
    converted = sl.convert(model, masks)
    y = converted(x)
    with pytest.raises(RuntimeError, match="col_indices: expected values in"):
        changed_by_hand(converted[0], how, "col_indices", wrong=True)
    assert same(converted(x), y)


def test_another_pattern_set_by_hand_is_computed():
    layer = sl.MaskedLinear(6, 4, mask=torch.arange(24).view(4, 6) % 3 == 0)
    layer.execution = "dense"
    with torch.no_grad():
        layer.col_indices.copy_((layer.col_indices + 1) % 6)
        layer.col_indices = layer.col_indices.view(4, 2).sort().values.flatten()
        x = torch.randn(3, 6)
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        layer.execution = "sparse"
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        layer.col_indices = layer.col_indices.to(torch.int16)
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        layer.col_indices = layer.col_indices[:-1]
        with pytest.raises(ValueError, match="crow_indices: expected to run from 0"):
            layer(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_their_plan_but_only_a_good_one(copied):
    layer = sl.MaskedLinear(16, 8, mask=torch.rand(8, 16) < 0.5)
    twin, x = copied(layer), torch.randn(2, 16)
    plan = twin.plan
    assert same(twin(x), layer(x))
    assert twin.plan is plan
    layer.col_indices[0] = 99
    with pytest.raises(ValueError, match="col_indices"):
        copied(layer)(x)


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.float64), lambda m: m.share_memory()])
def test_moves_that_leave_the_indices_keep_the_plan(move):
    layer = sl.MaskedLinear(16, 8, mask=torch.rand(8, 16) < 0.5)
    plan = layer.plan
    layer = move(layer)
    layer(torch.randn(2, 16, dtype=layer.values.dtype))
    assert layer.plan is plan


def test_inference_mode():
    x, mask = torch.randn(2, 16), torch.rand(8, 16) < 0.5
    with torch.inference_mode():
        layer = sl.MaskedLinear(16, 8, mask=mask)
        y = layer(x)
        layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=True)
        assert torch.equal(layer(x), y)
        layer.col_indices[0] = 99
        with pytest.raises(ValueError, match="col_indices"):
            layer(x)


# Frozen layers


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("assign", [False, True])
def test_frozen_layers(case, assign, batch, tmp_path):
    model, masks, x = case
    x = x[:batch]
    sl.Ticket.from_model(sl.convert(model, masks)).save(tmp_path / "x.safetensors")
    net = sl.load_sparse(tmp_path / "x.safetensors")
    y, saved = net(x).clone(), copy.deepcopy(net.state_dict())
    doubled = {name: tensor * 2 if name.endswith("values") else tensor.clone() for name, tensor in saved.items()}
    net.load_state_dict(doubled, assign=assign)
    twice = net(x).clone()
    assert not torch.allclose(twice, y)
    net.load_state_dict(copy.deepcopy(saved), assign=assign)
    assert same(net(x), y)
    empty = reinitialised(copy.deepcopy(net))
    with pytest.raises(ValueError, match=r"crow_indices: .*load_state_dict"):
        empty(x)
    empty.load_state_dict(doubled, assign=assign)
    assert same(empty(x), twice)
    layer = net.net[0]
    layer.load_state_dict({name: doubled[f"net.0.{name}"].clone() for name in layer.state_dict()}, assign=assign)
    assert not torch.allclose(net(x), y)
    layer.values = saved["net.0.values"].clone()
    assert same(net(x), y)
    layer.col_indices[0] = 2**30
    with pytest.raises(ValueError, match="col_indices"):
        net(x)
    layer.col_indices = saved["net.0.col_indices"].clone()
    assert same(net(x), y)


@pytest.mark.parametrize("assign", [False, True])
def test_frozen_layers_show_changes_after_them(assign, case, tmp_path, monkeypatch):
    """Else a thread that calls in between would pack the old tensors for good."""
    model, masks, _ = case
    sl.Ticket.from_model(sl.convert(model, masks)).save(tmp_path / "x.safetensors")
    layer, shown = sl.load_sparse(tmp_path / "x.safetensors").net[0], []
    monkeypatch.setattr(frozen, "_replaced", lambda old, new: shown.append(any(b is new for b in layer.buffers())))
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=assign)
    layer.values = layer.values.clone()
    assert all(shown)


@pytest.mark.parametrize("called", [False, True])
def test_writes_that_show_no_version_reach_no_kernel(case, called, tmp_path):
    model, masks, x = case
    sl.Ticket.from_model(sl.convert(model, masks)).save(tmp_path / "x.safetensors")
    for batch in (1, 4, 40):
        net, inputs = sl.load_sparse(tmp_path / "x.safetensors"), x.repeat(10, *[1] * (x.dim() - 1))[:batch]
        y = net(inputs).clone() if called else None
        net.net[0].col_indices.data.fill_(2**30)
        if called:
            assert same(net(inputs), y)
        else:
            with pytest.raises(ValueError, match="col_indices"):
                net(inputs)


@pytest.mark.parametrize("assign", [False, True])
def test_dense_neighbours_of_frozen_layers_load_too(assign, tmp_path):
    model, masks, x = case_of("mlp")
    del masks["2.weight"]
    sl.Ticket.from_model(sl.convert(model, masks)).save(tmp_path / "x.safetensors")
    net = sl.load_sparse(tmp_path / "x.safetensors")
    y = net(x).clone()
    state = copy.deepcopy(net.state_dict())
    state["net.2.weight"] *= 2
    net.load_state_dict(state, assign=assign)
    expected = copy.deepcopy(model)
    expected[2].weight.data *= 2
    torch.testing.assert_close(net(x), sl.convert(expected, masks)(x).detach())
    assert not torch.allclose(net(x), y)


# Calls of the ops, with whatever plan


def ops_arguments() -> tuple[list, tuple]:
    """Of chain, for two patterns of the same sizes: (x and values, (indices and plans) of each)."""
    masks = [torch.rand(12, 20, generator=torch.Generator().manual_seed(seed)).argsort(1) < 6 for seed in (0, 1)]
    patterns = [Pattern.from_mask(mask) for mask in masks]
    plans = [sl.ops.compile_plan(pattern) for pattern in patterns]
    return patterns, plans


WRONG_PLANS = {
    "unwritten": lambda plan: torch.full_like(plan, 2**30),
    "zeros": torch.zeros_like,
    "cut": lambda plan: plan[:-1].clone(),
    "short": lambda plan: plan[:5].clone(),
    "strided": lambda plan: plan.repeat_interleave(2)[::2],
    "of a convolution": lambda plan: sl.nn.MaskedConv2d(20, 12, 1, mask=torch.rand(12, 20, 1, 1) < 0.3).plan,
    "of other sizes": lambda plan: sl.MaskedLinear(21, 12, mask=torch.rand(12, 21) < 0.3).plan,
}


@NATIVE
@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("wrong", WRONG_PLANS)
def test_ops_refuse_plans_of_others(wrong, batch):
    (pattern, _), (plan, _) = ops_arguments()
    x, values = torch.randn(batch, 20), torch.randn(pattern.nnz)
    args = [values], [None], [pattern.crow_indices], [pattern.col_indices]
    y, saved = torch.ops.sparselottery.chain(x, *args, [plan], [1, 1], False, True)
    bad = WRONG_PLANS[wrong](plan)
    with pytest.raises(ValueError, match="plan: expected one that was compiled for these"):
        torch.ops.sparselottery.chain(x, *args, [bad], [1, 1], False, False)
    args = [values], *args[2:], [bad], [1, 1], True, [True], [True]
    with pytest.raises(ValueError, match="plan: expected one that was compiled for these"):
        torch.ops.sparselottery.chain_backward(torch.randn_like(y), x, saved, *args)


@NATIVE
@pytest.mark.parametrize("wrong", ["unwritten", "zeros", "cut", "strided", "of a linear layer", "of another stride"])
def test_convolutions_refuse_plans_of_others(wrong):
    mask, x = torch.rand(4, 3, 3, 3) < 0.5, torch.randn(2, 3, 8, 8)
    layer, strided = sl.MaskedConv2d(3, 4, 3, mask=mask), sl.MaskedConv2d(3, 4, 3, 2, mask=mask)
    others = {"of a linear layer": sl.MaskedLinear(27, 4, mask=mask.flatten(1)).plan, "of another stride": strided.plan}
    bad = others[wrong] if wrong in others else WRONG_PLANS[wrong](layer.plan)
    indices = layer.crow_indices, layer.col_indices
    y, winners = torch.ops.sparselottery.conv2d(
        x, layer.values, None, *indices, layer.plan, [1, 1], layer.geometry, False, 1
    )
    with pytest.raises(ValueError, match="plan: expected one that was compiled for these"):
        torch.ops.sparselottery.conv2d(x, layer.values, None, *indices, bad, [1, 1], layer.geometry, False, 1)
    args = layer.values, *indices, bad, [1, 1], layer.geometry, False, 1, True, True, True
    with pytest.raises(ValueError, match="plan: expected one that was compiled for these"):
        torch.ops.sparselottery.conv2d_backward(torch.ones_like(y), x, y, winners, *args)


@NATIVE
def test_kernels_follow_the_plan_alone():
    (pattern, _), (plan, _) = ops_arguments()
    x, values = torch.randn(1, 20), torch.randn(pattern.nnz)
    y, _ = cpu.chain_forward(x, [values], [None], [pattern.crow_indices], [pattern.col_indices], [plan], False, False)
    nonsense = [torch.full_like(indices, 2**30) for indices in (pattern.crow_indices, pattern.col_indices)]
    again, _ = cpu.chain_forward(x, [values], [None], *([each] for each in nonsense), [plan], False, False)
    assert torch.equal(again, y)


def test_compiled_graphs_refuse_unwritten_plans():
    if not native.available():
        pytest.skip(native.status())
    layer, x = sl.MaskedLinear(16, 8, mask=torch.rand(8, 16) < 0.5), torch.randn(3, 16)
    expected, saved = layer(x).detach(), copy.deepcopy(layer.state_dict())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.no_grad():
        layer.plan.fill_(2**30)
        with pytest.raises(ValueError, match="plan: expected"):
            compiled(x)
    layer.load_state_dict(saved)
    torch.testing.assert_close(compiled(x), expected)


def test_x_elsewhere_is_refused():
    layer = sl.MaskedLinear(16, 8, mask=torch.rand(8, 16) < 0.5)
    with pytest.raises(ValueError, match="x: expected a tensor on cpu"):
        layer(torch.empty(2, 16, device="meta"))


# The library and what Python knows of it


@pytest.mark.skipif(not any(native.Path(native.__file__).parent.glob("_native_*")), reason="none was built")
def test_the_library_that_was_built_is_of_this_version():
    assert native.available(), native.status()


@NATIVE
@pytest.mark.parametrize("source", abi.TABLE)
def test_a_library_of_another_version_is_not_loaded(source, monkeypatch):
    numbers = abi.TABLE[source]
    monkeypatch.setitem(abi.TABLE, source, (*numbers[:-1], numbers[-1] + 1))
    library, status = native._best()
    assert library is None
    assert "rebuild" in status
    assert f"{source}.cpp" in status


@NATIVE
def test_packed_arguments_have_the_sizes_of_the_table(monkeypatch):
    sizes = []

    spy(monkeypatch, "train", lambda function, args: sizes.append(len(args)) or function(args))
    (pattern, _), _ = ops_arguments()
    values, indices = torch.randn(pattern.nnz), (pattern.crow_indices, pattern.col_indices)
    x = torch.randn(4, 20)
    trainer = cpu_train.Trainer([cpu_train.Layer(20, *indices, values, None)], "sgd", (0.9, 0.0))
    trainer(x, torch.zeros(4, dtype=torch.int64), torch.arange(4)[None], [0.1])
    assert sizes == [abi.TRAIN_ARGS + abi.TRAIN_LAYER]
    stage = cpu_net.Linear(20, *indices, values, None)
    assert len(cpu_net.Net([stage], (20,), 1)._block) == abi.NET_ARGS + abi.NET_STAGE
    assert len(cpu_net.Rows([stage], 1)._block) == abi.ROWS_ARGS + abi.ROWS_LAYER
    assert len(cpu_net.Chain([stage], 1)._block) == abi.FROZEN_ARGS + abi.FROZEN_LAYER
