from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune as torch_prune

from sparselottery import convert
from sparselottery.convert import masks_of
from sparselottery.export import export
from sparselottery.interop import masks_from_scipy, masks_from_torch_prune, masks_from_zeros
from sparselottery.pruning import prune
from sparselottery.ticket import Ticket


def net():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 5))


def test_masks_of_torch_prune():
    model, x = net(), torch.randn(2, 2, 5, 5)
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.random_unstructured(model[2], "weight", 0.8)
    torch_prune.l1_unstructured(model[2], "weight", 0.5)
    expected = model(x).detach()
    masks, of_state = masks_from_torch_prune(model), masks_from_torch_prune(model.state_dict())
    assert of_state.keys() == masks.keys()
    assert all(of_state[name].equal(mask) for name, mask in masks.items())
    assert {name: mask.dtype for name, mask in masks.items()} == dict.fromkeys(("0.weight", "2.weight"), torch.bool)
    assert [int(mask.sum()) for mask in masks.values()] == [36, 18]
    with pytest.raises(ValueError, match=r"pruned by torch\.nn\.utils\.prune"):
        convert(model, masks)
    for layer in (model[0], model[2]):
        torch_prune.remove(layer, "weight")
    torch.testing.assert_close(convert(model, masks)(x).detach(), expected)


def test_torch_prune_of_something_else():
    model = net()
    with pytest.raises(ValueError, match="found no weight_mask"):
        masks_from_torch_prune(model)
    torch_prune.l1_unstructured(model[2], "bias", 0.5)
    with pytest.raises(ValueError, match=r"2\.bias: expected only weights to be pruned"):
        masks_from_torch_prune(model)


def test_zeros_when_asked_for(tmp_path):
    model = net()
    masks = prune(model, 0.9)
    export(convert(model, masks), tmp_path / "dense", format="dense")
    state = load_file(tmp_path / "dense")
    found = masks_from_zeros(state, list(masks))
    assert all(found[name].equal(mask) for name, mask in masks.items())
    model.load_state_dict(state)
    found = masks_from_zeros(model)
    assert all(found[name].equal(mask) for name, mask in masks.items())
    assert masks_from_zeros(net()) == {}
    assert masks_from_zeros(nn.Linear(2, 2), ["weight"])["weight"].all()
    with pytest.raises(ValueError, match="names: expected the weights to look at"):
        masks_from_zeros(state)
    with pytest.raises(ValueError, match=r"names: expected some of .*, got \['x'\]"):
        masks_from_zeros(state, ["x"])


def test_a_head_that_is_the_embedding_too_keeps_its_zeros():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False))
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[0] = model[1].weight[0] = 0
    masks = masks_from_zeros(model)
    assert list(masks) == ["0.weight", "1.weight"]
    converted, ids = convert(model, masks), torch.arange(6)
    assert converted[2].values is converted[0].values
    torch.testing.assert_close(converted(ids), model(ids))


def test_masks_of_scipy_matrices():
    model = net()
    masks = {"0.weight": torch.rand(4, 2, 3, 3) < 0.5, "2.weight": torch.rand(5, 36) < 0.1}
    matrices = {
        name: scipy.sparse.csr_array(mask.flatten(1).numpy().astype(np.float32)) for name, mask in masks.items()
    }
    matrices["0.weight"].data[0] = 0  # stored, so it survives
    found = masks_from_scipy({**matrices, "2.weight": matrices["2.weight"].tocsc()}, model)
    assert all(found[name].equal(mask) for name, mask in masks.items())
    convert(model, found)
    assert masks_from_scipy(matrices)["0.weight"].shape == (4, 18)
    with pytest.raises(ValueError, match="expected names among"):
        masks_from_scipy({"x": matrices["0.weight"]}, model)
    with pytest.raises(ValueError, match=r"expected shape \(5, 36\), got \(4, 18\)"):
        masks_from_scipy({"2.weight": matrices["0.weight"]}, model)
    with pytest.raises(TypeError, match="expected a scipy sparse matrix, got ndarray"):
        masks_from_scipy({"2.weight": np.ones((5, 36))}, model)


def test_boolean_dicts_are_masks():
    masks = {"2.weight": torch.from_numpy(np.random.default_rng(0).random((5, 36)) < 0.2)}
    assert masks_of(convert(net(), masks))["2.weight"].equal(masks["2.weight"])
    with pytest.raises(TypeError, match="expected a bool tensor"):
        convert(net(), {"2.weight": masks["2.weight"].float()})


def test_numpy_arrays_are_masks():
    masks = {"2.weight": np.random.default_rng(0).random((5, 36)) < 0.2}
    model = convert(net(), masks)
    assert masks_of(model)["2.weight"].numpy().tolist() == masks["2.weight"].tolist()
    assert int(prune(model, 0.5, masks)["2.weight"].sum()) == round(masks["2.weight"].sum() / 2)
    weights = {"2.weight": torch.ones(5, 36)}
    assert Ticket(weights, masks, {}).nnz == masks["2.weight"].sum()
    for wrong, got in [(masks["2.weight"].astype(int), "ndarray of int64"), (masks["2.weight"].tolist(), "list")]:
        for use in (lambda m: convert(net(), m), lambda m: prune(net(), 0.5, m), lambda m: Ticket(weights, m, {})):
            with pytest.raises(TypeError, match=f"expected a bool tensor or bool NumPy array, got {got}"):
                use({"2.weight": wrong})


def bert(transformers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)
    return transformers.BertForSequenceClassification(config), transformers.BertForSequenceClassification


def llama(transformers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlamaConfig(vocab_size=50, max_position_embeddings=16, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own and of what it imports
@pytest.mark.parametrize("make", [bert, llama])
def test_transformers_there_and_back(tmp_path, make):
    transformers = pytest.importorskip("transformers")
    model, kind = make(transformers)
    model.eval()
    tokens = torch.randint(50, (2, 7))
    masks = prune(model, 0.8)
    assert len(masks) >= 13
    converted = convert(model, masks)
    with torch.no_grad():
        expected = converted(tokens).logits

        export(converted, tmp_path / "model.safetensors", format="safetensors")
        model.config.save_pretrained(tmp_path)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        ticket = Ticket.load(tmp_path / "model.safetensors")
        assert ticket.architecture is None
        assert ticket.apply(kind(config)).eval()(tokens).logits.equal(expected)

        export(converted, tmp_path / "model.safetensors", format="dense")
        dense = kind.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(dense(tokens).logits, expected)
        again = masks_from_zeros(dense)
        assert all(again[name].equal(mask) for name, mask in masks.items())
