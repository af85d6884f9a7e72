"""`layer.weight`: made where it is used, written back at the mask, known without being made."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselottery import MaskedConv2d, MaskedLinear
from sparselottery.nn import weight as weights
from sparselottery.nn.weight import Weight

SHAPES = {"linear": (6, 5), "conv": (6, 5, 3, 2)}


def masked(kind="linear", **options):
    mask = torch.rand(SHAPES[kind]) < 0.5
    if kind == "linear":
        return MaskedLinear(5, 6, mask=mask, **options)
    return MaskedConv2d(5, 6, (3, 2), mask=mask, **options)


def dense_of(layer):
    """What the weight should be, by hand."""
    weight = torch.zeros(layer.shape, dtype=layer.values.dtype)
    weight[layer.mask] = layer.values.detach()
    return weight


@pytest.fixture
def made(monkeypatch):
    """Notes every dense tensor that is made."""
    calls, make = [], weights._Base._make
    monkeypatch.setattr(weights._Base, "_make", lambda self: calls.append(self) or make(self))
    return calls


@pytest.fixture(params=SHAPES)
def layer(request):
    return masked(request.param)


def test_metadata_makes_nothing(layer, made):
    weight, dense = layer.weight, nn.Parameter(dense_of(layer))
    made.clear()
    for read in (
        lambda w: (w.shape, w.size(), w.size(0), len(w), w.ndim, w.dim(), w.numel(), torch.numel(w)),
        lambda w: (w.stride(), w.is_contiguous(), w.storage_offset(), w.layout, w.element_size(), w.nbytes),
        lambda w: (w.dtype, w.device, w.is_cpu, w.is_cuda, w.is_meta, w.is_sparse, w.is_floating_point()),
        lambda w: (w.requires_grad, isinstance(w, nn.Parameter), torch.is_tensor(w), w.grad),
    ):
        assert read(weight) == read(dense)
    assert {weight: 1}[weight] == 1
    layer.requires_grad_(False)
    assert not weight.requires_grad
    assert not made
    with torch.no_grad():
        assert layer.requires_grad_(True).weight.requires_grad


def test_uses_are_dense_and_plain(layer):
    dense = dense_of(layer)
    for use in (
        lambda w: w * 2,
        lambda w: w.clone(),
        lambda w: torch.cat([w, w]),
        lambda w: torch.stack([w[0], w[1]]),
        lambda w: w.t() @ w if w.dim() == 2 else F.conv2d(torch.ones(1, 5, 4, 4), w),
        lambda w: w.double(),
        lambda w: w[w != 0],
    ):
        result = use(layer.weight)
        assert type(result) is torch.Tensor
        assert result.requires_grad
        assert torch.equal(result, use(dense))
    assert torch.equal(layer.weight, dense)
    assert repr(layer.weight.detach()) == repr(dense)
    assert (layer.weight.detach().numpy() == dense.numpy()).all()
    assert layer.weight.tolist() == dense.tolist()


def test_it_follows_the_values(layer):
    weight, row = layer.weight, layer.weight[1]
    with torch.no_grad():
        layer.values.add_(1)
    assert torch.equal(weight, dense_of(layer))
    assert torch.equal(row, dense_of(layer)[1])
    layer.double()
    assert layer.weight.dtype == torch.float64


def test_gradients_are_those_of_a_dense_weight(layer):
    x = torch.randn(layer.shape)
    for use in (
        lambda w: (w * x).sum(),
        lambda w: (w.flatten(1).t() @ x.flatten(1)).square().sum(),
        lambda w: (w[2] ** 3).sum() + w.view(-1)[::2].sum(),
        lambda w: torch.cat([*w.unbind()]).exp().sum(),
    ):
        dense = dense_of(layer).requires_grad_()
        use(dense).backward()
        use(layer.weight).backward()
        torch.testing.assert_close(layer.values.grad, dense.grad[layer.mask])
        assert torch.equal(layer.weight.grad, dense.grad * layer.mask)
        layer.weight.grad = None
        assert layer.values.grad is None
    (first,) = torch.autograd.grad((layer.weight**3).sum(), layer.values, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), layer.values)
    torch.testing.assert_close(second, 6 * layer.values)


def test_gradients_are_of_the_values_at_the_time_of_use(layer):
    weight, before = layer.weight, layer.values.detach().clone()
    loss = weight.square().sum()
    with torch.no_grad():
        layer.values.zero_()
    loss.backward()
    assert torch.equal(layer.values.grad, 2 * before)


class Product(torch.autograd.Function):
    """A function that knows of tensors only."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x)
        return x * w

    @staticmethod
    def backward(ctx, gy):
        return None, gy * ctx.saved_tensors[0]


def test_autograd_functions(layer):
    x = torch.randn(layer.shape)
    Product.apply(x, layer.weight).sum().backward()
    assert torch.equal(layer.values.grad, x[layer.mask])
    layer.values.grad = None
    Product.apply(x[1], layer.weight[1]).sum().backward()
    x[[0, 2, 3, 4, 5]] = 0
    assert torch.equal(layer.values.grad, x[layer.mask])


def test_below_torch_function(layer):
    """What C++ extensions see."""
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.ops.aten.mul(layer.weight, 2), 2 * dense_of(layer))
        torch.ops.aten.sum(layer.weight).backward()
    assert torch.equal(layer.values.grad, torch.ones(layer.nnz))
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        torch.ops.aten.fill_(layer.weight, 3)
    assert bool((layer.values == 3).all())


def setitem(w, index, value):
    w[index] = value


WRITES = {
    "init": lambda w: nn.init.xavier_uniform_(w),
    "init, orthogonal": lambda w: nn.init.orthogonal_(w),
    "data": lambda w: w.data.clamp_(-0.1, 0.1),
    "data of data": lambda w: w.data.data.detach().mul_(3),
    "detach": lambda w: w.detach().mul_(2),
    "setitem": lambda w: setitem(w.data, 0, 5.0),
    "setitem by mask": lambda w: setitem(w.data, w > 0, 0.0),
    "a row": lambda w: w.data[2].fill_(7),
    "a view of a view": lambda w: w.data.flatten(1).t()[1:3, ::2].neg_(),
    "split": lambda w: [part.mul_(i) for i, part in enumerate(w.data.split(2))],
    "rows": lambda w: [row.add_(i) for i, row in enumerate(w.data)],
    "out": lambda w: torch.add(w.detach(), 1, out=w.detach()),
    "foreach": lambda w: torch._foreach_mul_([w.data[0], w.data[1]], 4.0),
    "copy": lambda w: w.data.copy_(torch.arange(w.numel()).view(w.shape)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_reach_the_survivors(layer, write):
    values, dense, address = layer.values, nn.Parameter(dense_of(layer)), layer.values.data_ptr()
    version = values._version
    for weight in (dense, layer.weight):
        torch.manual_seed(1)
        write(weight)
    assert layer.values is values
    assert values.data_ptr() == address
    assert torch.equal(values, dense[layer.mask])
    assert values._version > version  # who keeps something made of them sees it
    assert torch.equal(layer.weight, dense * layer.mask)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writes_without_gradients(layer, mode):
    dense = dense_of(layer)
    with mode():
        assert layer.weight.mul_(2) is not None
        layer.weight *= 2
        layer.weight.add_(1)
        layer.weight[1] = 0
        layer.weight.data *= 2
        layer.weight[0] += 1
    dense = (dense * 4 + 1) * 2
    dense[1] = 0
    dense[0] += 1
    assert torch.equal(layer.weight, dense * layer.mask)


def test_writes_in_grad_mode_are_refused_as_those_to_a_leaf(layer):
    before = dense_of(layer)
    writes = lambda w: w.mul_(2), lambda w: w[0].mul_(2), lambda w: setitem(w, 0, 1.0), lambda w: w.view(-1).zero_()
    for write in writes:
        for weight in (layer.weight, nn.Parameter(before)):
            with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
                write(weight)
    assert torch.equal(layer.weight, before)
    layer.requires_grad_(False)
    layer.weight.mul_(2)
    assert torch.equal(layer.weight, 2 * before)


def test_a_forward_sees_what_was_written():
    layer, x = masked(), torch.randn(3, 5)
    for execution in layer.executions:
        layer.execution = execution
        layer.requires_grad_(False)(x)
        nn.init.normal_(layer.weight)
        torch.testing.assert_close(layer(x), F.linear(x, dense_of(layer), layer.bias))


def test_between_layers(layer):
    other = masked("linear" if layer.weight.dim() == 2 else "conv")
    with torch.no_grad():
        other.weight.copy_(layer.weight)
    assert torch.equal(other.weight, dense_of(layer) * other.mask)
    with pytest.raises(TypeError, match=r"weight of another layer: assign its clone\(\)"):
        other.weight = layer.weight


def test_assignment(layer):
    values, new = layer.values, torch.randn(layer.shape)
    layer.weight = new
    assert torch.equal(layer.weight, new * layer.mask)
    layer.weight = nn.Parameter(2 * new, requires_grad=False)
    assert torch.equal(layer.weight, 2 * new * layer.mask)
    assert not layer.weight.requires_grad
    layer.weight.requires_grad = True
    layer.weight[1].data = torch.zeros(layer.shape[1:])
    assert not layer.weight[1].any()
    with pytest.raises(ValueError, match="data: expected shape"):
        layer.weight[1].data = new
    layer.weight.data = new
    assert torch.equal(layer.weight, new * layer.mask)
    assert layer.values is values
    assert values.requires_grad
    assert list(dict(layer.named_parameters())) == ["values", "bias"]


WRONG = {
    "none": (lambda w: None, TypeError, "expected a tensor, got NoneType"),
    "dtype": (lambda w: w.double().detach(), TypeError, "expected dtype torch.float32, got torch.float64"),
    "shape": (lambda w: w[:2].detach(), ValueError, r"expected shape \(6, 5\) on cpu, got \(2, 5\) on cpu"),
    "device": (lambda w: torch.empty(6, 5, device="meta"), ValueError, r"got \(6, 5\) on meta"),
    "history": (lambda w: w * 2, TypeError, "torch.func.functional_call"),
}


@pytest.mark.parametrize(("value", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_assignments(value, error, message):
    layer = masked()
    before = dense_of(layer)
    with pytest.raises(error, match=f"weight: .*{message}"):
        layer.weight = value(layer.weight)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", [torch.Tensor.detach, nn.Parameter])
def test_functional_call_leaves_the_layer_as_it_was(kind):
    layer = masked()
    before, bias = dense_of(layer), layer.bias.detach().clone()
    state = {"bias": torch.ones(6), "weight": kind(torch.ones(6, 5))}
    with pytest.raises(TypeError, match="functional_call: expected values"):
        torch.func.functional_call(layer, state, (torch.randn(2, 5),))
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.bias, bias)


def test_what_it_cannot_do_is_said(layer, made):
    weight = layer.weight
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        with pytest.raises(RuntimeError, match=rf"{name}: .* ask layer.values"):
            getattr(weight, name)(print)
    refused = weight.retain_grad, weight.data_ptr, weight.untyped_storage, weight.share_memory_
    for call in (*refused, lambda: weight.resize_(3)):
        with pytest.raises(RuntimeError, match="not of a masked layer's weight"):
            call()
    with pytest.raises(RuntimeError, match=r"torch.autograd.grad: .*layer.values"):
        torch.autograd.grad(weight.sum(), weight)
    with pytest.raises(AttributeError, match=r"weight: .* cannot be deleted"):
        del layer.weight
    with pytest.raises(RuntimeError, match="clone"):
        nn.Parameter(weight)
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([weight], lr=1)
    with pytest.raises(ValueError, match="read-only"):
        weight.detach().numpy()[0] = 1
    with torch.no_grad():
        array = weight.detach().__array__()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_gradient_is_written_too(layer):
    layer.weight.sum().backward()
    layer.weight.grad.mul_(3)
    assert torch.equal(layer.values.grad, torch.full((layer.nnz,), 3.0))
    layer.weight.grad = torch.ones(layer.shape)
    layer.weight.grad *= 2
    layer.weight.grad.data = layer.weight.grad.data * 1
    for view in (layer.weight[0], layer.weight.detach(), layer.weight.grad):
        with pytest.raises(RuntimeError, match=r"got a view of a masked layer's weight"):
            view.grad = torch.ones(view.shape)
    assert torch.equal(layer.values.grad, torch.full((layer.nnz,), 2.0))


def test_after_another_mask():
    layer = masked()
    weight = layer.weight
    layer.load_state_dict(MaskedLinear(5, 6, mask=torch.eye(6, 5).bool()).state_dict())
    assert torch.equal(weight, dense_of(layer))


def test_copies_are_ordinary(layer):
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight)), torch.load(file)):
        assert type(twin) is torch.Tensor
        assert twin.is_leaf
        assert twin.requires_grad
        assert torch.equal(twin, dense_of(layer))


def test_where_somebody_traces_it_is_plain():
    layer, x = masked(), torch.randn(3, 5)

    kinds = []

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            kinds.append(type(self.layer.weight))
            return x @ self.layer.weight.t()

    torch.func.vmap(Read())(x)
    exported = torch.export.export(Read(), (x,)).module()
    torch.testing.assert_close(exported(x), x @ dense_of(layer).t())
    assert Weight not in kinds
    torch.testing.assert_close(Read()(x), x @ dense_of(layer).t())
    assert kinds[-1] is Weight
    torch.testing.assert_close(torch.func.vmap(lambda row, w=layer.weight: row @ w.t())(x), x @ dense_of(layer).t())


@pytest.mark.parametrize("make", [MaskedLinear, lambda *args: MaskedConv2d(args[0], args[1], 1, 1, 0, 1, 1, *args[2:])])
def test_the_constructor_takes_bias_where_the_dense_one_does(make):
    assert make(5, 6, False).bias is None
    with pytest.raises(TypeError, match="bias: expected a bool, got a tensor; a mask is given by keyword"):
        make(5, 6, torch.ones(6, 5) > 0)
    with pytest.raises(TypeError, match="positional"):
        make(5, 6, *[None] * 6)
