"""What stands for a model's arguments, in all that takes an example, and what is found in its results."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from sparselottery import Ticket, calls, convert, export, load_sparse, prune
from sparselottery.convert import masked_layers
from sparselottery.export import FORMATS


class Net(nn.Module):
    """Of a batch x, a mask (N, 1) of it and a vector without a batch."""

    def __init__(self, make=dict):
        super().__init__()
        self.first, self.second, self.make = nn.Linear(20, 40), nn.Linear(40, 5), make

    def forward(self, x, mask=None, *, shift=None):
        y = self.first(x)
        y = y if mask is None else y * mask
        return self.make(hidden=y, last=self.second(y if shift is None else y + shift))


class Batch(UserDict):
    """As the tokenizers of transformers give."""


X, MASK, SHIFT = torch.randn(3, 20), torch.rand(3, 1), torch.randn(40)
EXAMPLES = [X, (X, MASK), {"x": X, "shift": SHIFT}, Batch(mask=MASK, x=X), {"x": X, "mask": None}]


@pytest.fixture
def sparse():
    model = Net().eval()
    return convert(model, prune(model, 0.8)).eval()


@pytest.mark.parametrize("example", EXAMPLES)
def test_convert(example):
    model = Net()
    converted = convert(model, prune(model, 0.8), example)
    assert [layer.measured.input_shape for layer in masked_layers(converted).values()] == [(3, 20), (3, 40)]


def test_convert_leaves_the_example_alone():
    class Writes(Net):
        def forward(self, x):
            return super().forward(x["x"].mul_(0))

    model, example = Writes(), {"x": {"x": torch.ones(2, 20)}}
    convert(model, prune(model, 0.8), example)
    assert example["x"]["x"].sum() == 40


@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_export(sparse, tmp_path, format, example):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    export(sparse, tmp_path / "net", format=format, example_input=example)
    if format == "pt2":
        given = calls.arguments(example).with_batch(7)
        loaded = torch.export.load(tmp_path / "net").module()
        with torch.no_grad():
            torch.testing.assert_close(given(loaded), given(sparse))


@pytest.mark.parametrize("example", EXAMPLES)
def test_load_sparse(sparse, tmp_path, example):
    Ticket.from_model(sparse).save(tmp_path / "net")
    loaded, given = load_sparse(tmp_path / "net", Net(), example_input=example), calls.arguments(example)
    torch.testing.assert_close(given(loaded), given(sparse.requires_grad_(False)))


def test_a_batch_of_one_is_made_two(sparse, tmp_path):
    export(sparse, tmp_path / "net", format="pt2", example_input={"x": X[:1], "mask": MASK[:1], "shift": SHIFT})
    loaded = torch.export.load(tmp_path / "net").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x=X, mask=MASK, shift=SHIFT), sparse(X, MASK, shift=SHIFT))


@pytest.mark.parametrize("name", ["more", "kwargs"])
def test_what_torch_export_takes_no_shapes_of_is_refused(tmp_path, name):
    class Open(Net):
        def forward(self, x, **kwargs):
            return super().forward(x)

    sparse = convert(Open(), prune(Open(), 0.5)).eval()
    with pytest.raises(ValueError, match=f"expected arguments that the model's forward names, got '{name}'"):
        export(sparse, tmp_path / "net", format="pt2", example_input={"x": X, name: 1})


def test_a_fault_in_one_of_several_outputs_is_found(sparse, tmp_path, monkeypatch):
    write, fault = FORMATS["pt2"]

    def changed(job, path):
        write(job, path)
        with torch.no_grad():
            job.model.second.bias[0] += 0.5

    monkeypatch.setitem(FORMATS, "pt2", (changed, fault))
    with pytest.raises(OSError, match=r"differ from the source's by up to 0\.5"):
        export(sparse, tmp_path / "net", format="pt2", example_input={"x": X})


Pair = namedtuple("Pair", "hidden last")


@dataclass
class Result:
    hidden: torch.Tensor
    last: torch.Tensor
    note: str = "no tensor"


@pytest.mark.parametrize("make", [dict, Pair, Result, lambda hidden, last: [[hidden], (None, last)]])
def test_outputs(make):
    hidden, last = calls.outputs(Net(make)(X))
    assert (hidden.shape, last.shape) == ((3, 40), (3, 5))


def test_a_model_output():
    generic = pytest.importorskip("transformers.utils.generic")

    @dataclass
    class Output(generic.ModelOutput):
        hidden: torch.Tensor | None = None
        nothing: torch.Tensor | None = None
        last: tuple[torch.Tensor, ...] | None = None

    found = calls.outputs(Output(hidden=X, last=(MASK, SHIFT)))
    assert all(each is expected for each, expected in zip(found, (X, MASK, SHIFT), strict=True))


def test_a_result_without_tensors_is_refused():
    with pytest.raises(TypeError, match="expected one that returns tensors, got one that returns str"):
        calls.outputs("y")


def test_with_batch():
    given = calls.arguments({"x": torch.arange(6).view(3, 2), "shift": torch.ones(2), "flag": True}).with_batch(5)
    assert given.kwargs["x"][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert given.kwargs["shift"].tolist() == [1, 1]
    assert given.kwargs["flag"] is True
