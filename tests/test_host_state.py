"""The state of the host program changes no result: default dtype and device, meta, buffers that others wrote."""

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hosts import MODELS, case_of, default_device, default_dtype, mlp, one_thread, same
from torch import Tensor, nn

import sparselottery as sl

PACKAGE = Path(sl.__file__).parent

# Factories that take their dtype or device from the process unless both are named; those of integers need the device.
FACTORIES = {
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "as_tensor",
    "rand",
    "randn",
    "eye",
    "linspace",
    "scalar_tensor",
}
INTEGERS = {"arange", "randint", "randperm"}
PROGRAMS = ("lab", "cli", "kernels/gpu/audit", "bench_model.py")  # they set these states, and nobody imports them


def factories() -> Iterator[tuple[str, str]]:
    """(where, what) of each call of a factory that leaves something to the process."""
    for path in sorted(PACKAGE.glob("**/*.py")) + sorted((PACKAGE / "kernels").glob("**/*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(PROGRAMS):
            for call in ast.walk(ast.parse(path.read_text())):
                yield from ((f"{name}:{call.lineno}", ast.unparse(call)) for _ in range(_is_open(call)))


def _is_open(node: ast.AST) -> bool:
    function = node.func if isinstance(node, ast.Call) else None
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return False
    needed = {"dtype", "device"} if function.attr in FACTORIES else {"device"} if function.attr in INTEGERS else set()
    given = {keyword.arg for keyword in node.keywords}
    return function.value.id == "torch" and None not in given and not needed <= given


def test_factories_name_dtype_and_device():
    assert dict(factories()) == {}
    source = "torch.empty(2)\ntorch.arange(3, device='cpu')\ntorch.ones(1, dtype=d)\nx.new_empty(1)"
    assert [node.lineno for node in ast.walk(ast.parse(source)) if _is_open(node)] == [1, 3]


# Global states


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "with meta": lambda: torch.device("meta"),
    "set meta": lambda: default_device("meta"),
}


@pytest.fixture(params=MODELS)
def case(request) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    return case_of(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(params=STATES)
def state(request) -> Callable:
    return STATES[request.param]


def test_convert_and_layers(case, state):
    model, masks, x = case
    expected = sl.convert(model, masks)
    y, y1 = expected(x), expected(x[:1])
    with state():
        converted = sl.convert(model, masks)
        results = converted(x), converted(x[:1]), expected(x)
        alone = [layer(x) for layer in (converted[0], expected[0])]
        dense = sl.to_dense(converted)(x)
        again = sl.masks_of(converted) if hasattr(sl, "masks_of") else masks
    assert all(map(same, (*results, converted(x)), (y, y1, y, y)))
    assert same(*alone)
    torch.testing.assert_close(dense, y)
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())


def test_gradients(case, state):
    model, masks, x = case
    converted = sl.convert(model, masks)
    grads = []
    for context in (nullcontext, state):
        given = x.clone().requires_grad_()
        with context():
            grads.append(torch.autograd.grad(converted(given).square().sum(), [given, *converted.parameters()]))
    assert all(map(same, *grads))


@pytest.mark.parametrize("batch", [1, 4])
def test_load_sparse(case, state, batch, tmp_path):
    model, masks, x = case
    path = tmp_path / "x.safetensors"
    sl.Ticket.from_model(sl.convert(model, masks)).save(path)
    before = sl.load_sparse(path)
    y, x = before(x[:batch]).clone(), x[:batch]
    with state():
        loaded, given = sl.load_sparse(path), sl.load_sparse(path, model)
        between = sl.load_sparse(path)
        results = loaded(x), given(x), before(x)
    assert all(same(each, y) for each in (*results, between(x), loaded(x), before(x)))


def test_export_and_tickets(case, state, tmp_path):
    model, masks, x = case
    converted = sl.convert(model, masks)
    y, expected = converted(x), sl.Ticket.from_model(converted)
    with state():
        ticket = sl.Ticket.from_model(converted)
        ticket.save(tmp_path / "x.safetensors")
        ticket = sl.Ticket.load(tmp_path / "x.safetensors")
        applied = ticket.apply(), ticket.apply(model)
        for format in ("safetensors", "npz", "dense"):
            sl.export(converted, tmp_path / f"{format}-in", format=format)
    for format in ("safetensors", "npz", "dense"):
        sl.export(converted, tmp_path / f"{format}-out", format=format)
        ours, theirs = (
            {path.name: path.read_bytes() for path in (folder.iterdir() if folder.is_dir() else [folder])}
            for folder in (tmp_path / f"{format}-in", tmp_path / f"{format}-out")
        )
        assert list(ours.values()) == [theirs[name.replace("-in", "-out")] for name in ours], format
    assert ticket.same(expected)
    assert all(same(each(x), y) for each in applied)


def test_find_ticket(state):
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(8, 20)

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    torch.manual_seed(1)
    expected = sl.find_ticket(copy.deepcopy(model), train, rounds=2, fraction=0.5)
    torch.manual_seed(1)
    with state():
        found = sl.find_ticket(copy.deepcopy(model), train, rounds=2, fraction=0.5)
    assert found.same(expected)


def test_choose_execution(case, state):
    model, masks, x = case
    y = sl.convert(model, masks)(x)
    with state():
        converted = sl.convert(model, masks, example_input=x)
    torch.testing.assert_close(converted(x), y)


# The meta device


def test_a_ticket_makes_a_model_on_meta_real(case):
    model, masks, x = case
    converted = sl.convert(model, masks)
    ticket = sl.Ticket.from_model(converted)
    applied = ticket.apply(copy.deepcopy(model).to("meta"))
    assert same(applied(x), converted(x))
    assert all(p.requires_grad for p in applied.parameters())
    lacking = copy.deepcopy(model).to("meta")
    lacking.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(ValueError, match=r"'table'.*got none"):
        ticket.apply(lacking)
    other = nn.Sequential(nn.Linear(2, 3)).to("meta")
    with pytest.raises(ValueError, match=r"expected '0\.weight'"):
        ticket.apply(other)


def test_a_shared_bias_on_meta_stays_shared():
    def tied(device: str) -> nn.Module:
        model = nn.Sequential(*(nn.Linear(4, 4, device=device) for _ in range(3)))
        model[2].bias = model[1].bias
        return model

    model = tied("cpu")
    applied = sl.Ticket(model.state_dict(), {"0.weight": torch.eye(4) > 0}, {}).apply(tied("meta"))
    assert applied[2].bias is applied[1].bias
    assert torch.equal(applied[1].bias, model[1].bias)


@pytest.mark.parametrize("state", ["with meta", "set meta"], indirect=True)
def test_layers_under_meta(state):
    x, mask = torch.randn(2, 3, 8, 8), torch.rand(4, 3, 3, 3) < 0.5
    with state():
        layers = sl.MaskedConv2d(3, 4, 3), sl.MaskedLinear(8, 5), sl.MaskedConv2d(3, 4, 3, mask=mask)
    assert all(tensor.is_meta for layer in layers for tensor in layer.state_dict().values())
    assert all(layer(x.to("meta")).is_meta for layer in layers)
    with pytest.raises(ValueError, match="on meta, where the values are, got one on cpu"):
        layers[2](x)
    with state(), pytest.raises(ValueError, match="mask: expected one with data"):
        sl.MaskedLinear(2, 2, mask=torch.ones(2, 2, dtype=torch.bool))
