"""MaskedSequential: fused runs and batch-minor activations give what its children give one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from chains import noted, spy
from torch import nn

from sparselottery import MaskedConv2d, MaskedLinear, MaskedSequential, convert, ops, prune, to_dense
from sparselottery.kernels import cpu, reference
from sparselottery.nn.fuse import Group, groups
from sparselottery.nn.sequential import rules


def group_sizes(children, x):
    """The number of children of each native call."""
    return [len(group.children) for group in groups(children, rules(x)) if isinstance(group, Group)]


def layer(in_features, out_features, bias=True):
    return MaskedLinear(in_features, out_features, bias, mask=torch.rand(out_features, in_features) < 0.4)


def shared():
    twin = layer(12, 12)
    return [layer(30, 12), nn.ReLU(), twin, nn.ReLU(), twin]


CHILDREN = {
    "nothing": lambda: [],
    "one layer": lambda: [layer(30, 20)],
    "two": lambda: [layer(30, 20), nn.ReLU(), layer(20, 10)],
    "two, the ReLU in place": lambda: [layer(30, 20), nn.ReLU(inplace=True), layer(20, 10)],
    "four": lambda: [layer(30, 9), nn.ReLU(), layer(9, 20, False), nn.ReLU(), layer(20, 7), nn.ReLU(), layer(7, 5)],
    "a ReLU first and last": lambda: [nn.ReLU(), layer(30, 20), nn.ReLU()],
    "two ReLUs between": lambda: [layer(30, 20), nn.ReLU(), nn.ReLU(), layer(20, 10)],
    "no ReLU between": lambda: [layer(30, 20), layer(20, 10)],
    "other activations": lambda: [layer(30, 20), nn.Tanh(), layer(20, 10), nn.GELU(), layer(10, 5)],
    "in place": lambda: [layer(30, 20), nn.LeakyReLU(0.1, True), layer(20, 10), nn.ELU(inplace=True)],
    "a dense layer between": lambda: [layer(30, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), layer(10, 5)],
    "a norm between": lambda: [layer(30, 20), nn.BatchNorm1d(20), nn.ReLU(), layer(20, 10), nn.LayerNorm(10)],
    "dropout and identity": lambda: [nn.Dropout(0.0), layer(30, 20), nn.Dropout(0.0), nn.Identity(), layer(20, 10)],
    "nested": lambda: [MaskedSequential(layer(30, 20), nn.ReLU()), nn.Sequential(nn.ReLU(), layer(20, 10))],
    "a shared layer": shared,
    "softmax at the end": lambda: [layer(30, 20), nn.Tanh(), layer(20, 10), nn.Softmax(1)],
}  # fmt: skip


def results(model, x):
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def assert_same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("batch", [2, 16, 17, 256])
@pytest.mark.parametrize("name", CHILDREN)
def test_equals_its_children_one_by_one(name, batch):
    children = [child.double() for child in CHILDREN[name]()]
    x = torch.randn(batch, 30, dtype=torch.float64)
    fused, plain = MaskedSequential(*children), nn.Sequential(*children)
    assert_same(results(fused, x), results(plain, x))
    fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))
        torch.testing.assert_close(fused(x[:1]), plain(x[:1]))
        assert fused(x[:0]).shape == plain(x[:0]).shape
    assert list(fused.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("shape", [(30,), (1, 30), (2, 3, 30), (2, 0, 30)])
@pytest.mark.parametrize("name", ["two", "no ReLU between", "other activations", "in place"])
def test_inputs_of_any_dimension(name, shape):
    children = CHILDREN[name]()
    x = torch.randn(shape)
    assert_same(results(MaskedSequential(*children), x), results(nn.Sequential(*children), x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    children = [child.to(dtype) for child in CHILDREN["four"]()]
    x = torch.randn(17, 30, dtype=dtype)
    y = MaskedSequential(*children)(x)
    assert y.dtype == dtype
    truth = nn.Sequential(*copy.deepcopy(children)).double()(x.double()).detach()
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=4 * torch.finfo(dtype).eps * float(truth.abs().max()))


def calls(monkeypatch):
    """The number of layers of each kernel call from now on."""
    made = []
    for module in (cpu, reference):
        forward = module.chain_forward
        monkeypatch.setattr(module, "chain_forward", lambda *a, f=forward: made.append(len(a[1])) or f(*a))
    spy(monkeypatch, "chain", lambda f, *a: noted(made, len(a[2]), f(*a)))
    return made


def test_a_run_is_one_call(monkeypatch):
    model, made = MaskedSequential(*CHILDREN["four"]()), calls(monkeypatch)
    model(torch.randn(4, 30))
    model[1:](torch.randn(4, 9))
    assert made == [4, 3]


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "forward pre": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward pre": lambda module, seen: module.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("child", range(3))
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_a_child_is_called_until_removed(monkeypatch, kind, child):
    model, seen = MaskedSequential(*CHILDREN["two"]()), []
    x = torch.randn(16, 30, requires_grad=True)
    expected = model(x)
    made = calls(monkeypatch)
    hook = HOOKS[kind](model[child], seen)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert (seen, made) == ([1], [1, 1])
    hook.remove()
    model(x)
    assert (seen, made) == ([1], [1, 1, 2])


def test_a_hook_on_every_module_is_called():
    model, seen = MaskedSequential(*CHILDREN["two"]()), []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        model(torch.randn(4, 30))
    assert seen == [*model, model]


def test_layers_that_do_not_fit_are_named():
    model = MaskedSequential(layer(30, 20), nn.ReLU(), layer(21, 10))
    with pytest.raises(ValueError, match="21"):
        model(torch.randn(4, 30))


@pytest.mark.parametrize("child", [0, 2])
def test_layers_of_two_dtypes_are_refused(child):
    model = MaskedSequential(layer(30, 20), nn.ReLU(), layer(20, 10))
    model[child].double()
    with pytest.raises(TypeError, match=r"expected torch.float\d\d.*got torch.float\d\d"):
        model(torch.randn(4, 30))


@pytest.mark.parametrize("batch", [1, 17])
def test_a_sample_that_is_not_a_number_stays_one(batch):
    model = MaskedSequential(MaskedLinear(3, 3), nn.ReLU(), MaskedLinear(3, 3))
    x = torch.randn(batch, 3)
    x[0, 0] = torch.nan
    for grad in (True, False):
        y = model.requires_grad_(grad)(x)
        assert y[0].isnan().all()
        assert y[1:].isfinite().all()


def test_frozen_layers_get_no_gradient():
    children = CHILDREN["four"]()
    plain = results(nn.Sequential(*children), x := torch.randn(17, 30))
    model = MaskedSequential(*children)
    whole = dict(zip([name for name, _ in model.named_parameters()], plain[2:], strict=True))
    for frozen in whole:
        model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name != frozen)
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name == frozen:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, whole[name])


def conv(in_channels, out_channels, **options):
    mask = torch.rand(out_channels, in_channels, 3, 3) < 0.4
    return MaskedConv2d(in_channels, out_channels, 3, mask=mask, **options)


def dense(module):
    module.execution = "dense"
    return module


# Children, and of each call of the sparse convolution whether the ReLU is in it, and windows of the pooling.
BARE, RELU, POOLED = (False, 1), (True, 1), (True, 2)
CONVOLUTIONS = {
    "a ReLU after": (lambda: [conv(4, 6), nn.ReLU()], [RELU]),
    "no ReLU after": (lambda: [conv(4, 6), conv(6, 5, bias=False)], [BARE, BARE]),
    "the ReLU in place": (lambda: [conv(4, 6), nn.ReLU(inplace=True), conv(6, 5)], [RELU, BARE]),
    "a norm between": (lambda: [conv(4, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5)], [BARE, BARE]),
    "another activation": (lambda: [conv(4, 6), nn.ReLU6()], [BARE]),
    "padding that is not by zeros": (lambda: [conv(4, 6, padding=1, padding_mode="reflect"), nn.ReLU()], [RELU]),
    "pooling and a head": (
        lambda: [conv(4, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), layer(72, 9), nn.ReLU(), layer(9, 5)],
        [POOLED],
    ),
    "pooling without a ReLU": (lambda: [conv(4, 6), nn.MaxPool2d((3, 3), 3)], [(False, 3)]),
    "windows that overlap": (lambda: [conv(4, 6), nn.ReLU(), nn.MaxPool2d(3, 2)], [RELU]),
    "padded windows": (lambda: [conv(4, 6), nn.ReLU(), nn.MaxPool2d(2, padding=1)], [RELU]),
    "windows with a rest": (lambda: [conv(4, 6), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)], [RELU]),
    "nothing pruned": (lambda: [MaskedConv2d(4, 6, 3), nn.ReLU()], []),
    "executed densely": (lambda: [dense(conv(4, 6)), nn.ReLU(), conv(6, 5), nn.ReLU()], [RELU]),
    "then executed densely": (lambda: [conv(4, 6), nn.ReLU(), nn.Flatten(), dense(layer(336, 5)), nn.ReLU()], [RELU]),
}


def convolutions(monkeypatch):
    """(relu, pool, whether there is a norm) of each call of a sparse convolution from now on, by either way."""
    made, conv2d, call_conv = [], ops.conv2d, ops.call_conv

    def long(*args, relu, pool, norm, **how):
        made.append((relu, pool, norm is not None))
        return conv2d(*args, relu=relu, pool=pool, norm=norm, **how)

    def short(x, layer, relu=False, pool=1, norm=None):
        return noted(made, (relu, pool, norm is not None), call_conv(x, layer, relu, pool, norm))

    monkeypatch.setattr(ops, "conv2d", long)
    monkeypatch.setattr(ops, "call_conv", short)
    return made


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_what_follows_are_one_call(monkeypatch, name):
    make, expected = CONVOLUTIONS[name]
    children = [child.double() for child in make()]
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    plain = results(nn.Sequential(*children), x)
    calls = convolutions(monkeypatch)
    model = MaskedSequential(*children)
    assert_same(results(model, x), plain)
    assert [each[:2] for each in calls] == expected
    assert list(model.state_dict()) == list(nn.Sequential(*children).state_dict())
    torch.testing.assert_close(model.eval()(x[:1]), nn.Sequential(*children)(x[:1]))


@pytest.mark.parametrize("child", range(2))
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_a_convolution_or_its_relu_is_called(kind, child):
    model, seen = MaskedSequential(conv(4, 6), nn.ReLU()), []
    x = torch.randn(2, 4, 9, 10, requires_grad=True)
    expected = model(x)
    HOOKS[kind](model[child], seen)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert seen == [1]


def test_a_chain_ends_at_a_layer_that_executes_densely(monkeypatch):
    model, made = MaskedSequential(*CHILDREN["four"]()), calls(monkeypatch)
    dense(model[4])
    x = torch.randn(16, 30)
    y = model(x)
    assert made == [2, 1]
    torch.testing.assert_close(y, nn.Sequential(*model)(x))


@pytest.mark.parametrize(("device", "with_norm", "without"), [("cpu", 4, 3), ("meta", 1, 2)])
def test_pooling_and_norms_are_in_the_call_on_the_cpu_only(device, with_norm, without):
    children = [conv(4, 6), nn.BatchNorm2d(6).eval(), nn.ReLU(), nn.MaxPool2d(2)]
    x = torch.empty(2, 4, 9, 10, device=device)
    with torch.no_grad():
        assert group_sizes(children, x) == [with_norm]
        assert group_sizes([children[0], *children[2:]], x) == [without]


def norm(**arguments):
    """A batchnorm of 6 channels that has seen some data."""
    module = nn.BatchNorm2d(6, **arguments)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -2, 2)
    module(3 * torch.randn(5, 6, 4, 4) + 1)
    return module


NORMS = {
    "a norm": (lambda: [conv(4, 6), norm()], True),
    "a norm without a scale": (lambda: [conv(4, 6, bias=False), norm(affine=False), nn.ReLU()], True),
    "a norm and all else": (lambda: [conv(4, 6, padding=1), norm(eps=0.1), nn.ReLU(), nn.MaxPool2d(2)], True),
    "a norm of each batch": (lambda: [conv(4, 6), norm(track_running_stats=False), nn.ReLU()], False),
    "a ReLU before the norm": (lambda: [conv(4, 6), nn.ReLU(), norm()], False),
}


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_in_the_call_in_evaluation_without_gradients(monkeypatch, name, dtype, batch):
    make, expected = NORMS[name]
    children, made = [child.to(dtype) for child in make()], convolutions(monkeypatch)
    plain, model = nn.Sequential(*children).eval(), MaskedSequential(*children).eval()
    x = torch.randn(batch, 4, 9, 10).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(
            model(x), plain(x), **({} if dtype == torch.float64 else {"atol": 0.1, "rtol": 0.05})
        )
    assert [has_norm for *_, has_norm in made] == [expected, False]
    made.clear()
    results(model, x)
    with torch.no_grad():
        model.train()(x)
    assert [has_norm for *_, has_norm in made] == [False, False]


@pytest.mark.parametrize("part", ["running_mean", "running_var", "weight", "bias"])
def test_a_norm_of_mixed_dtypes_is_not_in_the_call(part):
    children = [conv(4, 6), norm().eval()]
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        assert group_sizes(children, x) == [2]
        getattr(children[1], part).data = getattr(children[1], part).double()
        assert group_sizes(children, x) == [1]


class Sum(nn.Module):
    """Of a pair of tensors."""

    def forward(self, pair):
        return pair[0] + pair[1]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_children_may_take_and_give_what_is_no_tensor(mode, grad):
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    for children, given in ([Sum()], (x, x)), ([nn.Linear(8, 8), nn.ReLU(), Pair(), Sum()], x):
        dense = nn.Sequential(*children, nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        masks = prune(dense, 0.5)
        model = convert(dense, masks).train(mode)
        assert type(model) is MaskedSequential
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(given), to_dense(model)(given))


@pytest.mark.parametrize("x", [[1.0], None, "x"])
def test_what_is_no_tensor_is_refused_by_name(x):
    for dense in nn.Linear(4, 3), nn.Conv2d(2, 3, 2), nn.Conv1d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2):
        model = convert(nn.Sequential(dense), prune(nn.Sequential(dense), 0.5))
        for each in model, model[0]:
            with pytest.raises(TypeError, match=f"x: expected a tensor, got {type(x).__name__}"):
                each(x)
    model = convert(nn.Sequential(nn.Embedding(4, 3)), prune(nn.Sequential(nn.Embedding(4, 3)), 0.5))
    with pytest.raises(TypeError, match=f"ids: expected a tensor, got {type(x).__name__}"):
        model(x)
