import contextlib
import json
import os

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import nn

import sparselottery.files
from sparselottery import MaskedLinear, convert
from sparselottery.architecture import describe
from sparselottery.convert import dense_state, masks_of
from sparselottery.files import atomic, digest, read
from sparselottery.ticket import Ticket

RECIPE = {"fraction": 0.2, "layers": ["fc1", "fc2"], "note": "ünïcode", "none": None}


def model(width=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def ticket(width=5):
    net = model(width)
    masks = {"0.weight": torch.rand(width, 4) < 0.4, "3.weight": torch.rand(3, width) < 0.4}
    return Ticket(net.state_dict(), masks, RECIPE)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ticket.safetensors"
    ticket().save(path)
    return path


@st.composite
def tickets(draw):
    weights, masks = {"bias": torch.tensor(draw(st.floats(width=32)))}, {}
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    for index in range(draw(st.integers(0, 3))):
        shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=4))
        name = f"{index}.weight" if draw(st.booleans()) else f"block.{index}.weight"
        weights[name] = torch.from_numpy(draw(hnp.arrays(dtype, shape)))
        masks[name] = torch.from_numpy(draw(hnp.arrays(bool, shape)))
    return Ticket(weights, masks, draw(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans()))))


@settings(deadline=None)
@given(tickets())
def test_a_ticket_survives_its_file(tmp_path_factory, ticket):
    path = tmp_path_factory.mktemp("ticket") / "t.safetensors"
    ticket.save(path)
    loaded = Ticket.load(path)
    assert loaded.same(ticket)
    assert loaded.recipe == ticket.recipe
    assert loaded.masks.keys() == ticket.masks.keys()
    for name, mask in ticket.masks.items():
        assert torch.equal(loaded.masks[name], mask)
        assert not loaded.weights[name][~mask].count_nonzero()
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def test_bfloat16_and_integers_survive_too(tmp_path):
    weights = {"weight": torch.randn(3, 4, dtype=torch.bfloat16), "steps": torch.tensor(7)}
    ticket = Ticket(weights, {"weight": torch.rand(3, 4) < 0.5}, {})
    ticket.save(tmp_path / "t")
    assert Ticket.load(tmp_path / "t").same(ticket)


def test_survivors_that_are_zero_stay_survivors(tmp_path):
    mask = torch.tensor([[True, False], [True, True]])
    Ticket({"weight": torch.zeros(2, 2)}, {"weight": mask}, {}).save(tmp_path / "t")
    assert torch.equal(Ticket.load(tmp_path / "t").masks["weight"], mask)


def test_it_owns_its_tensors():
    net, mask, recipe = model(), torch.ones(5, 4, dtype=torch.bool), {"list": [1]}
    ticket = Ticket(net.state_dict(), {"0.weight": mask}, recipe)
    expected = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.add_(1)
        mask.zero_()
        recipe["list"].append(2)
    assert torch.equal(ticket.weights["0.weight"], expected)
    assert ticket.nnz == 20
    assert ticket.recipe == {"list": [1]}
    applied = ticket.apply(model())
    with torch.no_grad():
        applied[0].values.zero_()
        applied[0].bias.zero_()
    assert torch.equal(ticket.weights["0.weight"], expected)


def test_same_sees_every_difference():
    weights, masks = {"weight": torch.tensor([[0.0, 1.0]])}, {"weight": torch.tensor([[True, True]])}
    ticket = Ticket(weights, masks, {"a": 1})
    assert ticket.same(Ticket(weights, masks, {"a": 1}))
    assert not ticket.same(Ticket({"weight": torch.tensor([[-0.0, 1.0]])}, masks, {"a": 1}))
    assert not ticket.same(Ticket(weights, {"weight": torch.tensor([[False, True]])}, {"a": 1}))
    assert not ticket.same(Ticket(weights, masks, {"a": 2}))


def test_counts():
    masks = {"a.weight": torch.eye(4, dtype=torch.bool), "b.weight": torch.zeros(2, 2, dtype=torch.bool)}
    ticket = Ticket({name: torch.ones(mask.shape) for name, mask in masks.items()}, masks, {})
    assert (ticket.nnz, ticket.density) == (4, 0.2)
    assert repr(ticket) == "Ticket(2 masked layers, 4 weights survive, density 0.2)"
    assert (Ticket({}, {}, {}).nnz, Ticket({}, {}, {}).density) == (0, 1.0)


def test_apply_gives_a_new_sparse_model_with_the_weights():
    given, ticket_ = model(), ticket()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    applied = ticket_.apply(given)
    assert type(given[0]) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert isinstance(applied[0], MaskedLinear)
    assert applied[0].nnz == int(ticket_.masks["0.weight"].sum())
    assert Ticket.from_model(applied, RECIPE).same(ticket_)
    again = ticket_.apply(applied)
    assert Ticket.from_model(again, RECIPE).same(ticket_)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (model(width=6), r"0.weight.*expected shape \(6, 4\), got \(5, 4\)"),
        (nn.Sequential(nn.Linear(4, 5)), "3.weight"),
        (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.ReLU(), nn.Linear(5, 3)), "1.running_mean"),
        (nn.Sequential(*model(), nn.Linear(3, 3)), "4.weight"),
        (nn.ReLU(), "0.weight"),
    ],
)
def test_apply_refuses_another_model_and_leaves_it_alone(wrong, message):
    before = {name: tensor.clone() for name, tensor in wrong.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ticket().apply(wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrong.state_dict().items())
    assert not any(isinstance(module, MaskedLinear) for module in wrong.modules())


def test_the_file_is_the_state_dict_of_the_converted_model(saved):
    other = convert(model(), {name: torch.ones_like(mask) for name, mask in ticket().masks.items()})
    other.load_state_dict(load_file(saved), strict=True)
    assert Ticket.from_model(other, RECIPE).same(ticket())


@pytest.mark.parametrize(
    ("weights", "masks", "recipe", "error", "message"),
    [
        ({}, {"weight": torch.ones(1, 1, dtype=torch.bool)}, {}, ValueError, "expected names among"),
        ({"weight": torch.ones(2, 2)}, {"weight": torch.ones(2, 2)}, {}, TypeError, "expected a bool tensor"),
        ({"weight": torch.ones(2, 2)}, {"weight": torch.ones(2, 1) > 0}, {}, ValueError, r"expected shape \(2, 2\)"),
        ({"bias": torch.ones(2)}, {"bias": torch.ones(2) > 0}, {}, ValueError, "expected those of weights of 2-D"),
        ({"weight": torch.ones(2)}, {"weight": torch.ones(2) > 0}, {}, ValueError, r"2-D or more, got 'weight'"),
        ({}, {}, {"loss": torch.ones(1)}, TypeError, "recipe: expected JSON-able contents"),
    ],
)
def test_parts_that_do_not_fit(weights, masks, recipe, error, message):
    with pytest.raises(error, match=message):
        Ticket(weights, masks, recipe)


def test_truncated_at_any_byte(saved):
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"ticket\.safetensors"):
            Ticket.load(saved)


def test_no_altered_byte_makes_another_ticket(saved):
    whole, original = saved.read_bytes(), ticket()
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        saved.write_bytes(altered)
        with contextlib.suppress(ValueError):
            assert Ticket.load(saved).same(original)  # white space in the header


def test_foreign_files(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"x\.safetensors: not a ticket: .*got \['format'\]"):
        Ticket.load(path)
    save_file({"weight": torch.ones(2)}, path, {"ticket": json.dumps({"version": 3})})
    with pytest.raises(ValueError, match="expected a ticket of version 1 to 2, got 3"):
        Ticket.load(path)
    damaged, foreign = "damaged ticket: expected JSON", "not a ticket: expected a JSON object"
    for metadata, told in {"no json": damaged, "{1}": damaged, "[]": foreign, "null": foreign}.items():
        save_file({"weight": torch.ones(2)}, path, {"ticket": metadata})
        with pytest.raises(ValueError, match=rf"x\.safetensors: {told}"):
            Ticket.load(path)
    path.write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(ValueError, match="not a safetensors file"):
        Ticket.load(path)
    with pytest.raises(ValueError, match="expected a file, a ticket or an export of format safetensors, got a folder"):
        Ticket.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Ticket.load(tmp_path / "nowhere")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.crow_indices": int32(0, 3, 2)}, "crow_indices"),
        ({"fc.crow_indices": int32(0, 2)}, "crow_indices: expected length 3"),
        ({"fc.crow_indices": int32(0, 1, 3)}, "crow_indices"),
        ({"fc.crow_indices": torch.tensor([0, 1, 2])}, "crow_indices: expected a 1-D int32"),
        ({"fc.col_indices": int32(0, 3)}, "col_indices"),
        ({"fc.col_indices": int32(-1, 0)}, "col_indices"),
        ({"fc.crow_indices": int32(0, 2, 2), "fc.col_indices": int32(1, 1)}, "ascending"),
        ({"fc.crow_indices": int32(0, 2, 2), "fc.col_indices": int32(2, 1)}, "ascending"),
        ({"fc.values": torch.ones(3)}, "values"),
        ({"fc.values": torch.ones(2, 1)}, "values"),
        ({"fc.values": None}, "missing"),
        ({"fc.weight": torch.ones(2, 3)}, "either dense or sparse"),
        ({"shapes": {"fc.weight": [2]}}, "shapes"),
        ({"shapes": {"fc.weight": [2, "3"]}}, "shapes"),
        ({"shapes": {"fc.weight": [2, -3]}}, "shapes"),
        ({"shapes": ["fc.weight"]}, "shapes"),
        ({"shapes": None}, "shapes"),
        ({"recipe": None}, "recipe"),
        ({"recipe": []}, "recipe: expected a mapping"),
        ({"shapes": {"fc.weight": [2, True]}}, "shapes"),
        ({"shapes": {"fc.weight": [2, float("nan")]}}, "shapes"),
        ({"shapes": {"fc.weight": [2, 2**31]}}, "shapes"),
        ({"shapes": {"fc.weight": [2, 2**20, 2**20]}}, "shapes"),
        ({"shapes": {"fc.weight": [2, 3], "fc.bias": [2, 3]}}, r"fc.bias: missing \['fc.bias.values'"),
        ({"tied": {"fc.weight": "fc.weight"}}, "tied: expected a mapping of other names than those in shapes"),
        ({"tied": {"head.weight": "weight"}}, r"tied\['head.weight'\]: expected a name in shapes, got 'weight'"),
        (
            {"tied": {"fc.bias": "fc.weight"}, "fc.bias": torch.ones(2)},
            "fc.bias: expected it to be either dense or tied, got both",
        ),
        ({"shapes": {"fc.weight": [2, 3], "..weight": [2, 3]}}, "expected names like '<layer>.weight'"),
        ({"blocks": {"x.weight": [1, 1]}}, "blocks"),
        ({"blocks": {"fc.weight": [0, 1]}}, "blocks"),
        ({"blocks": []}, "blocks"),
        ({"architecture": {"type": "os.system"}}, "architecture"),
        ({"fc.col_indices": torch.tensor([0, 3], dtype=torch.int16)}, "col_indices"),
        ({"fc.col_indices": torch.tensor([0, 2], dtype=torch.int8)}, "col_indices: expected a 1-D int32"),
        ({"fc.values": torch.ones(2, dtype=torch.int32)}, "values: expected 2 floating-point numbers"),
    ],
)
def test_well_signed_files_of_bad_writers(tmp_path, change, message):
    """The digest is right, the contents are not: every invariant of the format is checked on its own."""
    parts = {"fc.values": torch.ones(2), "fc.crow_indices": int32(0, 1, 2), "fc.col_indices": int32(0, 2)}
    head = {"version": 2, "shapes": {"fc.weight": [2, 3]}, "recipe": {}}

    def write(path, change):
        tensors = {k: v for k, v in {**parts, **change}.items() if isinstance(v, torch.Tensor)}
        signed = {**head, **{k: v for k, v in change.items() if "." not in k}}
        signed = {k: v for k, v in signed.items() if v is not None}
        signed["sha256"] = digest(signed, tensors)
        save_file(tensors, path, {"ticket": json.dumps(signed)})

    write(tmp_path / "good", {})
    assert Ticket.load(tmp_path / "good").weights["fc.weight"].tolist() == [[1, 0, 0], [0, 0, 1]]
    write(tmp_path / "bad", change)
    with pytest.raises(ValueError, match=f"bad: .*{message}"):
        Ticket.load(tmp_path / "bad")


def test_a_failed_save_leaves_what_was_there(saved, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(sparselottery.files, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        Ticket({}, {}, {}).save(saved)
    assert Ticket.load(saved).same(ticket())
    assert os.listdir(saved.parent) == [saved.name]


def test_atomic_folders(tmp_path):
    with atomic(tmp_path / "new") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("x")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "file").read_text() == "x"
    with pytest.raises(OSError, match="new"), atomic(tmp_path / "new") as temporary:
        temporary.mkdir()
    assert os.listdir(tmp_path) == ["new"]
    assert (tmp_path / "new" / "file").exists()


def test_from_model_takes_masks_from_indices_not_from_values():
    net = convert(model(), ticket().masks)
    with torch.no_grad():
        net[0].values.zero_()
    made = Ticket.from_model(net)
    assert torch.equal(made.masks["0.weight"], ticket().masks["0.weight"])
    assert made.masks.keys() == masks_of(net).keys()
    assert made.weights.keys() == dense_state(net).keys()


def signed(path, tensors, **head):
    head["sha256"] = digest(head, tensors)
    save_file(tensors, path, {"ticket": json.dumps(head)})


def test_files_of_version_1_still_load(tmp_path):
    old = ticket()
    tensors = old.dense()
    for name, (pattern, values) in old.csr().items():
        parts = {"values": values, "crow_indices": pattern.crow_indices, "col_indices": pattern.col_indices}
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    shapes = {name: list(shape) for name, shape in old.shapes.items()}
    signed(tmp_path / "old", tensors, version=1, shapes=shapes, recipe=RECIPE)
    assert Ticket.load(tmp_path / "old").same(old)
    assert Ticket.load(tmp_path / "old").architecture is None
    signed(tmp_path / "old", tensors, version=1, shapes=shapes, recipe=RECIPE, blocks={})
    with pytest.raises(ValueError, match="expected version, shapes and recipe"):
        Ticket.load(tmp_path / "old")


@pytest.mark.parametrize(("columns", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_column_indices_are_narrow_where_they_fit(tmp_path, columns, dtype):
    mask = torch.zeros(2, columns, dtype=torch.bool)
    mask[1, [0, 7, columns - 1]] = True
    Ticket({"weight": torch.ones(2, columns)}, {"weight": mask}, {}).save(tmp_path / "t")
    assert load_file(tmp_path / "t")["col_indices"].dtype == dtype
    assert read(tmp_path / "t").layers["weight"][0].col_indices.tolist() == [0, 7, columns - 1]
    assert read(tmp_path / "t").layers["weight"][0].col_indices.dtype == torch.int32
    assert torch.equal(Ticket.load(tmp_path / "t").masks["weight"], mask)


def test_a_ticket_of_a_plain_model_builds_it(tmp_path):
    net = convert(model(), ticket().masks).eval()
    Ticket.from_model(net).save(tmp_path / "t")
    built, x = Ticket.load(tmp_path / "t").apply(), torch.randn(3, 4)
    assert isinstance(built[0], MaskedLinear)
    assert not built.training
    assert torch.equal(built(x), net(x))
    with pytest.raises(ValueError, match="model: expected one"):
        ticket().apply()


def test_an_architecture_that_is_not_of_these_tensors(tmp_path):
    other = describe(model(width=6))
    Ticket(ticket().weights, ticket().masks, {}, other).save(tmp_path / "t")
    with pytest.raises(ValueError, match=r"t: architecture: expected a model with these tensors, got .*'0\.bias'"):
        Ticket.load(tmp_path / "t")


def test_few_bytes_of_huge_weights(tmp_path):
    parts = {"values": torch.ones(1), "crow_indices": int32(0, 1), "col_indices": int32(0)}
    signed(tmp_path / "t", parts, version=2, shapes={"weight": [1, 2**30]}, recipe={})
    assert read(tmp_path / "t").shapes == {"weight": (1, 2**30)}
    with pytest.raises(ValueError, match=r"t: shapes: expected at most .* weights in files of this size"):
        Ticket.load(tmp_path / "t")


def test_json_with_a_key_twice_or_without_end(tmp_path):
    for text in ('{"version": 2, "version": 2}', '{"recipe": ' + "[" * 10**5 + "]" * 10**5 + "}"):
        save_file({"weight": torch.ones(2)}, tmp_path / "t", {"ticket": text})
        with pytest.raises(ValueError, match="t: expected JSON"):
            Ticket.load(tmp_path / "t")


def test_later_changes_of_the_file_do_not_reach_what_was_read(saved):
    before, whole = read(saved), saved.read_bytes()
    expected = [values.clone() for _, values in before.layers.values()]
    with saved.open("r+b") as file:
        file.write(bytes(len(whole)))
    assert all(map(torch.equal, expected, (values for _, values in before.layers.values())))


@pytest.mark.parametrize("name", ["0.bias", "1.running_var", "1.weight", "1.num_batches_tracked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_tensors_of_another_dtype_than_their_module_has(tmp_path, name, dtype):
    plain = Ticket.from_model(convert(model(), ticket().masks))
    weights = {**plain.weights, name: plain.weights[name].to(dtype)}
    Ticket(weights, plain.masks, {}, plain.architecture).save(tmp_path / "t")
    with pytest.raises(ValueError, match=rf"t: {name[0]}\.\w+: expected "):
        Ticket.load(tmp_path / "t")


def test_densities_of_the_masked_and_of_all_weights():
    weights = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2), "b.weight": torch.ones(4, 2)}
    found = Ticket(weights, {"a.weight": torch.tensor([[True, False], [False, False]])}, {})
    assert (found.density, found.density_of_all) == (1 / 4, (1 + 8) / 12)
    assert Ticket({}, {}, {}).density_of_all == 1
