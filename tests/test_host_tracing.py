"""Those who trace, transform, compile or copy: they see what the dense model computes, whatever takes the call."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from sparselottery import Ticket, convert, prune, to_dense
from sparselottery.runtime import load_sparse

X = {"mlp": (4, 32), "rows": (4, 3, 32), "cnn": (4, 3, 8, 8), "padded": (4, 4, 9, 8)}
HOLDS = ("converted", "frozen")
pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


def dense(name: str) -> nn.Sequential:
    torch.manual_seed(1)
    if name in ("mlp", "rows"):
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    if name == "cnn":
        conv = nn.Conv2d(3, 8, 3, padding=1)
        rest = nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
        return nn.Sequential(conv, *rest).eval()
    same = nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="reflect", groups=2)
    return nn.Sequential(same, nn.ReLU(), nn.Conv2d(6, 5, 3, stride=(1, 2), dilation=2, bias=False)).eval()


def masked(name: str) -> nn.Module:
    model = dense(name)
    masks = prune(model, 0.8)
    for mask in masks.values():
        mask[:1] = False  # a dead row, so that there is a compact execution
    return convert(model, masks).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(model, what it computes as a dense model, an input, another with more samples) by kind and name."""

    def make(kind: str, name: str = "mlp"):
        model = masked(name)
        expected = to_dense(model)
        if kind == "frozen":
            path = tmp_path_factory.mktemp("host") / "net.safetensors"
            Ticket.from_model(model).save(path)
            model = load_sparse(path)
        elif kind != "converted":
            for layer in (m for m in model.modules() if hasattr(m, "execution")):
                layer.execution = kind if kind in layer.executions else None
        x = torch.randn(X[name])
        return model, expected, x, torch.cat([x, 2 * x, x[:1]])

    return make


def equal(ours, theirs) -> None:
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# torch.jit, and what is made of it


class TestJit:
    @pytest.mark.parametrize("name", X)
    @pytest.mark.parametrize("kind", [*HOLDS, "compact", "dense"])
    @pytest.mark.parametrize("grad", [True, False])
    def test_a_trace_computes_the_same_for_another_batch_size(self, models, kind, name, grad):
        model, expected, x, more = models(kind, name)
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(model, x)  # warnings are errors: none of the tracer's
        equal(traced(more), expected(more))
        equal(traced(x[:1]), expected(x[:1]))
        equal(model(more), expected(more))

    def test_a_trace_has_the_values_and_trains_them(self, models):
        model, _, x, _ = models("converted")
        traced = torch.jit.trace(model, x)
        assert dict(traced.named_parameters()).keys() == dict(model.named_parameters()).keys()
        traced(x).square().sum().backward()
        found = {name: p.grad for name, p in traced.named_parameters()}
        model.zero_grad()
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            equal(found[name], parameter.grad)

    @pytest.mark.parametrize("kind", HOLDS)
    def test_a_trace_is_of_torchs_operators_alone(self, models, kind):
        model, _, x, more = models(kind, "cnn")
        traced, file = torch.jit.trace(model, x), io.BytesIO()
        operators = {node.kind() for node in traced.inlined_graph.nodes()}
        assert {operator.partition("::")[0] for operator in operators} == {"aten", "prim"}
        assert "prim::PythonOp" not in operators
        torch.jit.save(traced, file)
        file.seek(0)
        equal(torch.jit.load(file)(more), model(more))

    @pytest.mark.parametrize("kind", HOLDS)
    def test_a_graph_with_hooks_that_name_scopes(self, models, kind):
        """As fvcore and SummaryWriter.add_graph trace."""
        model, _, x, _ = models(kind)
        names = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, args, name=name: names.append(name))
        graph, _ = torch.jit._get_trace_graph(model, (x,))
        assert str(graph).count("aten::linear") == 2
        assert [name for name in names if name] == [name for name, _ in model.named_modules() if name]

    @pytest.mark.parametrize("kind", HOLDS)
    def test_a_script_is_refused(self, models, kind):
        model, *_ = models(kind)
        with pytest.raises(TypeError, match=r"torch\.jit\.script: expected .* torch\.jit\.trace or torch\.export"):
            torch.jit.script(nn.Sequential(model))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("kind", HOLDS)
    def test_onnx_by_the_old_exporter(self, models, kind):
        runtime = pytest.importorskip("onnxruntime")
        model, expected, x, more = models(kind, "cnn")
        file = io.BytesIO()
        torch.onnx.export(
            model, (x,), file, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "n"}}
        )
        session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        equal(torch.from_numpy(session.run(None, {"x": more.numpy()})[0]), expected(more).detach())


# Graphs of Python programs


@pytest.mark.parametrize("name", X)
@pytest.mark.parametrize("kind", HOLDS)
def test_fx_keeps_layers_as_modules(models, kind, name):
    model, expected, _, more = models(kind, name)
    if kind == "frozen":
        with pytest.raises(TypeError, match="trace its `net`"):
            torch.fx.symbolic_trace(model)
    traced = torch.fx.symbolic_trace(nn.Sequential(model))
    assert {node.op for node in traced.graph.nodes} == {"placeholder", "call_module", "output"}
    assert torch.equal(traced(more), nn.Sequential(*leaves(model))(more))
    equal(traced(more), expected(more))


def leaves(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not list(module.children())]


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("kind", HOLDS)
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(models, kind, name, mode):
    model, expected, x, more = models(kind, name)
    traced = make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    given = x if mode == "real" else more
    equal(traced(given), expected(given))
    equal(model(more), expected(more))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("kind", HOLDS)
def test_compile_and_export(models, kind, name):
    model, expected, x, more = models(kind, name)
    equal(model(x), expected(x))  # so that it remembers what it found
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    tree = model.net if kind == "frozen" else model
    program = torch.export.export(tree, (x,), dynamic_shapes=dynamic).module()
    equal(
        torch.export.export(model, (x,), dynamic_shapes=(dynamic,) if kind == "frozen" else dynamic).module()(x),
        expected(x),
    )
    for each in (x, more):
        equal(compiled(each), expected(each))
        equal(program(each), expected(each))
    equal(model(more), expected(more))


def test_a_frozen_net_by_inductor(models):
    model, expected, x, more = models("frozen")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for each in (x, more):
        equal(compiled(each), expected(each))


# Transforms


@pytest.mark.parametrize("name", X)
@pytest.mark.parametrize("kind", [*HOLDS, "compact", "dense"])
def test_functorch(models, kind, name):
    model, expected, x, _ = models(kind, name)
    direction = torch.randn_like(x)
    for ours, theirs in zip(
        torch.func.jvp(model, (x,), (direction,)), torch.func.jvp(expected, (x,), (direction,)), strict=True
    ):
        equal(ours, theirs)
    equal(torch.vmap(model)(torch.stack([x, direction])), torch.stack([expected(x), expected(direction)]))
    equal(torch.vmap(lambda sample: model(sample[None])[0])(x), expected(x))

    def gradient(model):
        return torch.func.grad(lambda x: model(x).square().sum())

    equal(gradient(model)(x), gradient(expected)(x))
    value, linear = torch.func.linearize(model, x)
    equal(value, expected(x))
    equal(linear(direction), torch.func.jvp(expected, (x,), (direction,))[1])
    equal(torch.func.functionalize(model)(x), expected(x))
    state = {key: t * 2 if t.is_floating_point() else t for key, t in model.state_dict().items()}
    swapped = torch.func.functional_call(model, state, (x,))
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(state)
    equal(swapped, to_dense(fresh)(x) if kind != "frozen" else swapped)


@pytest.mark.parametrize("kind", HOLDS)
def test_second_derivatives(models, kind):
    model, expected, x, _ = models(kind)

    def hessian(model):
        return torch.func.hessian(lambda x: model(x).square().sum())(x[:1])

    equal(hessian(model), hessian(expected))


@pytest.mark.parametrize("name", X)
@pytest.mark.parametrize("kind", HOLDS)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_derivatives(models, kind, name, grad):
    model, expected, x, _ = models(kind, name)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        dual = forward_ad.make_dual(x, x.cos())
        ours, theirs = (forward_ad.unpack_dual(each(dual)) for each in (model, expected))
    equal(ours.primal, theirs.primal)
    equal(ours.tangent, theirs.tangent)


# Modes, and tensors whose memory does not hold what they show


class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class PassesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("kind", HOLDS)
def test_modes_leave_nothing_behind(models, kind, name):
    model, expected, x, _ = models(kind, name)
    untouched = copy.deepcopy(model)
    for mode in (Passes(), PassesFunctions()):
        with mode:
            equal(model(x), expected(x))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        y = model(fake.from_tensor(x))
    assert isinstance(y, FakeTensor)
    assert y.shape == (4, 10)
    assert torch.equal(model(x), untouched(x))


class Subclass(torch.Tensor):
    pass


def negative(x):
    """x as a view of the memory of -x."""
    view = torch._neg_view(-x)  # as torch.complex(x, -x).conj().imag is one
    assert view.is_neg()
    assert torch.equal(view, x)
    return view


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("kind", HOLDS)
@pytest.mark.parametrize("grad", [True, False])
def test_tensors_that_are_not_what_their_memory_holds(models, kind, name, grad):
    model, expected, x, _ = models(kind, name)
    model(x)  # a frozen net has bound its call
    with torch.set_grad_enabled(grad):
        equal(model(negative(x)), expected(x))
        equal(model(torch._efficientzerotensor(x.shape)), expected(torch.zeros(x.shape)))
        equal(model(nn.Parameter(x)), expected(x))
        equal(model(x.as_subclass(Subclass)).as_subclass(torch.Tensor), expected(x))
        functional = model(torch._to_functional_tensor(x))
        torch._sync(functional)
        equal(torch._from_functional_tensor(functional), expected(x))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_gradients_of_such_tensors(models, name):
    model, expected, x, _ = models("converted", name)
    ours, theirs = model[0], expected[0]
    for gy, given in (
        (negative(torch.randn(4, 10)), x),
        (torch.randn(4, 10), negative(x)),
        (torch._efficientzerotensor((4, 10)), x),
    ):
        leaf = given.detach().requires_grad_()
        found = torch.autograd.grad(model(leaf), [leaf, ours.values, ours.bias], gy)
        gx, gweight, gbias = torch.autograd.grad(expected(leaf), [leaf, theirs.weight, theirs.bias], gy)
        for got, right in zip(found, (gx, ours.pattern.gather(gweight.flatten(1)), gbias), strict=True):
            equal(got, right)


# Copies


@pytest.mark.parametrize("name", X)
@pytest.mark.parametrize("kind", HOLDS)
def test_copies_before_and_after_the_first_call(models, kind, name):
    model, _, x, more = models(kind, name)

    def saved(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    def pickled(model):
        return pickle.loads(pickle.dumps(model))

    copiers = pickled, saved, copy.deepcopy
    copies = [copier(model) for copier in copiers]
    expected = model(x), model(more)
    copies += [copier(each) for copier in copiers for each in (model, copies[0])]
    for each in copies:
        assert torch.equal(each(x), expected[0])
        assert torch.equal(each(more), expected[1])
        assert not each.training


def test_a_copy_has_its_own_tensors_and_the_hooks(models):
    model, _, x, _ = models("frozen")
    model.register_forward_hook(double)
    expected = model(x)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        each.net[0].values.zero_()
        assert torch.equal(model(x), expected)
        each._forward_hooks.clear()
        assert not torch.equal(each(x), expected)


def double(module, args, y):
    return 2 * y


def test_a_frozen_net_in_a_spawned_process(models):
    model, _, x, _ = models("frozen")
    expected = model(x)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(model, (x,)), expected)
