"""The buffer of dense and compact executions: when it is written, and what its gradients are."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from denses import BUILT, Writes, X, assert_right, conv, expected, in_place, linear, mask_of
from torch import nn

from sparselottery import MaskedLinear
from sparselottery.kernels import cpu_pattern, native
from sparselottery.nn import dense as module


@pytest.fixture
def writes(monkeypatch):
    return Writes(monkeypatch)


@pytest.mark.parametrize("execution", ["dense", "compact"])
@pytest.mark.parametrize("name", BUILT)
def test_trains_as_the_sparse_layer_does(name, execution, writes):
    make, x = BUILT[name]
    torch.manual_seed(2)
    ours = make(execution, dtype=torch.float64)
    reference = copy.deepcopy(ours)
    reference.execution = "sparse"
    x, losses = x.double(), []
    for layer in (ours, reference):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            inputs = x.clone().requires_grad_()
            loss = layer(inputs).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.detach(), inputs.grad, layer.values.grad.clone()]
        losses.append(layer(x).detach())
        if layer is ours:
            assert writes == {"written": 4, "made": 0}
    half = len(losses) // 2
    torch.testing.assert_close(losses[:half], losses[half:])


@pytest.mark.parametrize("execution", ["dense", "compact"])
@pytest.mark.parametrize("how", ["frozen", "no_grad", "inference_mode"])
def test_values_that_stay_are_written_once(how, execution, writes):
    layer = linear(execution)
    layer.values.requires_grad_(how != "frozen")
    with {"frozen": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[how]():
        first, second = layer(X), layer(X)
        assert writes == {"written": 1, "made": 0}
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected(layer, X))


def replaced(layer):
    layer.values.data = layer.values.data * 2


def twice_replaced(layer):
    """The third may come to stand where the first did."""
    layer.values.data = layer.values.data * 2
    layer.values.data = layer.values.data * 2


def in_inference(layer):
    with torch.inference_mode():
        layer.values.mul_(3)


def initialised(layer):
    layer.reset_parameters()


def loaded(layer):
    layer.load_state_dict(MaskedLinear(5, 4, mask=mask_of()).state_dict())


def assigned(layer):
    layer.load_state_dict(MaskedLinear(5, 4, mask=mask_of()).state_dict(), assign=True)


def another_pattern(layer):
    layer.load_state_dict(MaskedLinear(5, 4, mask=torch.eye(4, 5).bool()).state_dict())


def dense_loaded(layer):
    layer.load_state_dict(nn.Linear(5, 4).state_dict())


def stepped(layer):
    trained = layer.values.requires_grad_()
    trained.grad = torch.ones_like(trained)
    torch.optim.Adam([trained], lr=0.1).step()
    trained.requires_grad_(False)


def unseen_then_eval(layer):
    layer.values.data.mul_(3)
    layer.eval()


CHANGES = [replaced, twice_replaced, in_place, in_inference, initialised, loaded, assigned, another_pattern,
           dense_loaded, stepped, unseen_then_eval]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("trained", [True, False])
def test_every_change_is_seen(change, trained):
    layer = linear()
    layer.values.requires_grad_(trained)
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            before = layer(X)
            change(layer)
            assert_right(layer)
            assert not torch.equal(layer(X), before)


def test_in_training_even_changes_that_no_version_shows():
    layer = linear()
    layer(X)
    layer.values.data.mul_(3)
    assert_right(layer)


def test_two_forwards_then_two_backwards():
    layer, x = linear(), X.clone().requires_grad_()
    grads = torch.autograd.grad(layer(x).sum() + layer(x.tanh()).square().sum(), [x, layer.values])
    wanted = torch.autograd.grad(expected(layer, x).sum() + expected(layer, x.tanh()).square().sum(), [x, layer.values])
    torch.testing.assert_close(grads, wanted)
    first, second = layer(x).square().sum(), layer(2 * x).square().sum()
    first.backward()
    second.backward()


def test_a_backward_after_the_step_is_that_of_its_forward():
    layer, x = linear(), X.clone().requires_grad_()
    wanted = torch.autograd.grad(expected(layer, x).square().sum(), [x, layer.values])
    y = layer(x)
    in_place(layer)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [x, layer.values]), wanted)


@pytest.mark.parametrize("second", ["training", "no_grad", "inference_mode"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_backward_whose_weight_is_overwritten_raises(trained, second):
    layer, x = linear(), X.clone().requires_grad_()
    layer.values.requires_grad_(trained)
    y = layer(x)
    in_place(layer)
    with {"training": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[second]():
        layer(X)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_other_forwards_of_the_same_values_disturb_no_backward():
    layer, x = linear(), X.clone().requires_grad_()
    with torch.no_grad():
        layer(X)
    y = layer(x)
    layer.eval()
    with torch.no_grad():
        layer(X)
    with torch.inference_mode():
        layer(X)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, layer.weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("execution", ["dense", "compact"])
@pytest.mark.parametrize("name", BUILT)
def test_gradients_of_any_order(name, execution):
    make, x = BUILT[name]
    layer = make(execution, dtype=torch.float64)
    x = x[:1, ..., :3, :3] if x.dim() == 4 else x
    inputs = x.double().requires_grad_(), layer.values
    # The parameter itself, which gradcheck perturbs in place.
    assert torch.autograd.gradcheck(lambda x, _: layer(x), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, _: layer(x), inputs, fast_mode=True)


def test_frozen_values_pass_the_gradient_of_x_only():
    layer, x = linear(), X.clone().requires_grad_()
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.values.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))


def test_the_buffer_goes_with_the_execution():
    layer = linear()
    layer(X)
    buffer = weakref.ref(layer._dense._state.weight)
    assert buffer().shape == (4, 5)
    layer.execution = "sparse"
    assert buffer() is None
    assert_right(layer)


def test_positions_are_int32_where_they_fit():
    assert linear()._positions.dtype == conv("compact")._positions.dtype == torch.int32
    assert module.smallest(torch.tensor([2**33]), 2**34).dtype == torch.int64


def test_what_was_written_keeps_its_address():
    """Other values there would pass for it."""
    layer = linear()
    layer(X)
    address = layer.values.data_ptr()
    replaced(layer)
    assert layer._dense._state.memory.data_ptr() == address


def test_after_training_values_are_written_again():
    layer = linear()
    layer(X)
    layer.values.data.mul_(3)
    with torch.no_grad():
        assert_right(layer)


def test_a_buffer_begun_in_inference_serves_training():
    layer, x = linear().requires_grad_(False), X.clone().requires_grad_()
    with torch.inference_mode():
        layer(X)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))


def test_a_parameter_that_was_assigned_is_written_to_the_buffer(writes):
    layer = linear()
    assigned(layer)
    writes.forget()
    layer(X)
    assert writes == {"written": 1, "made": 0}


def test_a_buffer_of_another_dtype_is_freed():
    layer = linear()
    layer(X)
    buffer = weakref.ref(layer._dense._state.weight)
    layer.double()
    assert buffer() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("execution", ["dense", "compact", "sparse"])
def test_what_lies_between_rows_is_not_read(execution, dtype):
    """Where a processor multiplies tiles of bfloat16 (AMX), torch's product reads on behind each row."""
    mask = torch.rand(96, 33) < 0.5
    mask[0] = False
    layer = MaskedLinear(33, 96, mask=mask, dtype=dtype)
    layer.execution = execution
    x = torch.full((3, 17, 70), torch.nan, dtype=dtype)[..., :33].copy_(torch.randn(3, 17, 33))
    for rows in (x, x[0], x[0, 0]):
        rows = rows.detach().requires_grad_()
        assert not layer(rows).isnan().any()
        layer(rows).sum().backward()
        assert not rows.grad.isnan().any()
        assert not layer.values.grad.isnan().any()
        with torch.no_grad():
            assert not layer(rows).isnan().any()


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("size", [1, 14, 64, 129, 1000, 300_001])  # of the last threads take shares
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_values_go_to_their_places_and_back(dtype, size, density):
    places = (torch.rand(size) < density).nonzero().squeeze(1)
    values, noise = torch.arange(1, len(places) + 1).to(dtype), torch.randn(size).to(dtype)
    by_bits = [cpu_pattern.bits(places.int(), size)] if native.available() else []
    for positions, bits in ((places, None), *[(places.int(), each) for each in by_bits]):
        memory = torch.full((size + 32,), -1, dtype=dtype)
        flat = memory[16:-16].zero_()
        module._write(values, flat, positions, bits)
        assert torch.equal(flat, torch.zeros_like(flat).scatter(0, places, values))
        assert (memory[:16] == -1).all()
        assert (memory[-16:] == -1).all()
        for gradient in (noise, noise.repeat_interleave(2)[::2]):
            assert torch.equal(module._gathered(gradient, positions, bits), gradient[places])


@pytest.mark.skipif(not native.available(), reason="no native library")
def test_bits_say_where_values_are():
    for size in (1, 63, 64, 65, 1000):
        mask = torch.rand(size) < 0.5
        words = cpu_pattern.bits(mask.nonzero().squeeze(1).int(), size).view(torch.int64).tolist()
        found = [bool(word >> bit & 1) for word in words for bit in range(64)]
        assert found[:size] == mask.tolist()
        assert not any(found[size:])


def test_a_gradient_of_the_gradient_goes_through(writes):
    layer = linear("dense", dtype=torch.float64)
    (gradient,) = torch.autograd.grad(layer(X.double()).square().sum(), layer.values, create_graph=True)
    (twice,) = torch.autograd.grad(gradient.square().sum(), layer.values)
    reference = copy.deepcopy(layer)
    weight = module.scatter(reference.values, reference.pattern.positions(), reference.shape)
    loss = torch.nn.functional.linear(X.double(), weight, reference.bias).square().sum()
    (gradient,) = torch.autograd.grad(loss, reference.values, create_graph=True)
    torch.testing.assert_close(twice, torch.autograd.grad(gradient.square().sum(), reference.values)[0])
