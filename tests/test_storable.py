"""Models whose state_dict holds more than dense tensors, in `find_ticket` and in tickets."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sparselottery import SparseLotteryWarning, Ticket, convert, find_ticket, prune
from sparselottery.convert import dense_state, load_dense_state


class Counter(nn.Module):
    """Its state is a dict that training changes in place."""

    def __init__(self):
        super().__init__()
        self.state = {"steps": 0}

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x):
        return x


def net(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), *more)


def with_buffer(buffer):
    model = net()
    model.register_buffer("extra", buffer)
    return model


def quantised():
    return torch.quantize_per_tensor(torch.arange(3.0), 0.5, 0, torch.quint8)


IRREGULAR = {
    "coo": lambda: torch.eye(6).to_sparse(),
    "csr": lambda: torch.eye(6).to_sparse_csr(),
    "quantised": quantised,
    "complex128": lambda: torch.ones(3, dtype=torch.complex128),
}
REGULAR = {
    "bool": lambda: torch.tensor([True, False]),
    "uint16": lambda: torch.ones(3, dtype=torch.uint16),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j]).conj().imag,
    "empty": lambda: torch.zeros(0, 3),
    "transposed": lambda: torch.rand(3, 4).t(),
    "expanded": lambda: torch.rand(1).expand(3),
}


def dense(tensor):
    return (tensor.dequantize() if tensor.is_quantized else tensor.to_dense()).clone()


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", [*IRREGULAR, *REGULAR])
def test_every_round_begins_with_the_buffer_as_it_was(name):
    model, starts = with_buffer((IRREGULAR | REGULAR)[name]()), []

    def train(trained):
        starts.append(dense(trained.extra))
        if trained.extra.is_quantized:
            trained.extra.copy_(torch.zeros(3))
        else:
            (trained.extra.values() if trained.extra.layout == torch.sparse_csr else trained.extra).zero_()

    ticket = find_ticket(model, train, rounds=1)
    before = dense(model.extra)
    assert len(starts) == 2
    for found in (*starts, dense(ticket.weights["extra"]), dense(ticket.apply(model).extra)):
        assert torch.equal(found.to(before.dtype), before)
    assert ticket.same(ticket)
    assert not ticket.same(Ticket({**ticket.weights, "extra": torch.ones(1)}, ticket.masks, ticket.recipe))


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", IRREGULAR)
@pytest.mark.parametrize("rewind_step", [0, 2])
def test_what_files_cannot_hold_is_refused_before_any_training(tmp_path, name, rewind_step):
    model = with_buffer(IRREGULAR[name]())

    def train(model, **steps):
        pytest.fail("it is trained")

    with pytest.raises(TypeError, match="extra: expected a dense tensor, as files hold no others, got a tensor of"):
        find_ticket(model, train, rounds=1, rewind_step=rewind_step, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="extra: expected a dense tensor"):
        Ticket.from_model(model).save(tmp_path / "t")


@pytest.mark.parametrize("name", REGULAR)
def test_what_files_hold(tmp_path, name):
    ticket = find_ticket(with_buffer(REGULAR[name]()), lambda model: None, rounds=1, out=tmp_path)
    assert Ticket.load(tmp_path / "ticket.safetensors").same(ticket)


def test_extra_state_is_reset_too():
    model, starts = net(Counter()), []

    def train(trained):
        starts.append(copy.deepcopy(trained[3].state))
        trained[3].state["steps"] += 7

    ticket = find_ticket(model, train, rounds=2)
    assert starts == [{"steps": 0}] * 3
    assert model[3].state == ticket.weights["3._extra_state"] == {"steps": 0}
    assert ticket.apply(model)[3].state is not ticket.weights["3._extra_state"]
    find_ticket(model, train, rounds=1, reset=False)
    assert starts[3:] == [{"steps": 0}, {"steps": 7}]


def test_extra_state_is_in_no_file(tmp_path):
    model = net(Counter())
    with pytest.raises(TypeError, match=r"3\._extra_state: expected a dense tensor, .* got dict of get_extra_state"):
        find_ticket(model, pytest.fail, rounds=1, out=tmp_path)
    with pytest.raises(TypeError, match=r"3\._extra_state"):
        Ticket.from_model(convert(model, prune(model, 0.5))).save(tmp_path / "t")


def test_weights_that_a_ticket_cannot_be_read_with(tmp_path):
    model = nn.Linear(4, 3, dtype=torch.complex64)
    assert find_ticket(model, lambda _: None, rounds=1, fraction=0.5).nnz == 6
    with pytest.raises(TypeError, match=r"weight: expected weights of one of .*, got torch\.complex64"):
        find_ticket(model, pytest.fail, rounds=1, out=tmp_path / "run")


def test_modules_of_two_dtypes_are_read_again(tmp_path):
    model = net()
    model[0].bias.data = model[0].bias.data.double()
    ticket = find_ticket(model, lambda _: None, rounds=1, out=tmp_path)
    assert Ticket.load(tmp_path / "ticket.safetensors").same(ticket)


def test_tensors_without_values_are_refused():
    with pytest.raises(ValueError, match=r"got the lazy '1\.weight': call the model once first"):
        find_ticket(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)), pytest.fail, rounds=1)
    with pytest.raises(ValueError, match=r"got the lazy '0\.weight': call the model once first"):
        find_ticket(nn.Sequential(nn.LazyLinear(2)), pytest.fail, rounds=1)
    with pytest.raises(ValueError, match=r"weights\['extra'\]: expected values, got a tensor on the meta device"):
        find_ticket(with_buffer(torch.ones(2, device="meta")), pytest.fail, rounds=1)


@pytest.mark.parametrize("name", ["weight_norm", "orthogonal", "spectral_norm"])
def test_parametrised_layers_are_left_whole(tmp_path, name):
    model = net()
    getattr(parametrizations, name)(model[0])
    with pytest.warns(SparseLotteryWarning, match="remove_parametrizations"):
        ticket = find_ticket(model, lambda _: None, rounds=1, out=tmp_path)
    assert list(ticket.masks) == ["2.weight"]
    assert torch.equal(ticket.apply(model)[0].weight, model[0].weight)
    assert Ticket.load(tmp_path / "ticket.safetensors").same(ticket)


def test_buffers_that_share_memory(tmp_path):
    model, memory = net(), torch.arange(6.0)
    for name, buffer in {"a": memory[:4], "b": memory[2:], "c": memory, "d": memory, "e": None}.items():
        model.register_buffer(name, buffer)
    ticket = find_ticket(model, lambda _: None, rounds=1, out=tmp_path)
    assert Ticket.load(tmp_path / "ticket.safetensors").same(ticket)
    assert torch.equal(ticket.apply(model).b, memory[2:])


def test_the_dense_state_of_shared_and_parametrised_layers():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(shared))
    masked = convert(model, {"0.weight": torch.eye(4) > 0})
    state = dense_state(masked)
    assert list(state) == list(model.state_dict())
    assert torch.equal(state["1.0.weight"], shared.weight * torch.eye(4))
    torch.nn.utils.parametrize.register_parametrization(masked[0], "bias", nn.Identity())
    assert list(dense_state(masked)) == list(state)
    load_dense_state(convert(model, {"0.weight": torch.eye(4) > 0}), state)
