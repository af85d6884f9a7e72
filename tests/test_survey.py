"""One survey of a model: its weights, what holds them, what is refused and why, what is tied and what is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from sparselottery import MaskedLinear, SparseLotteryWarning, convert, explain, find_ticket, prune, to_dense
from sparselottery.convert import prunable
from sparselottery.survey import survey


def tied(other, part="weight"):
    model = nn.Sequential(nn.Linear(4, 4), other)
    setattr(model[0], part, getattr(other, part))
    return model


def parametrized(part):
    model = nn.Sequential(nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(model[0], part, nn.Identity())
    return model


def read_by(other):
    """A model that reads the weight of its layer itself."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter(other, model[0].weight)
    return model


def with_more():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].low_rank = nn.Parameter(torch.zeros(4, 1))
    return model


def with_another_forward():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    return model


class OwnLinear(nn.Linear):
    """As it is used by people who initialise it their way."""

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


UNMASKABLE = {
    "LSTM": (lambda: nn.Sequential(nn.LSTM(3, 4)), "nn.LSTM multiplies its weights itself"),
    "LayerNorm": (lambda: nn.Sequential(nn.LayerNorm((3, 4))), "there is no masked layer for nn.LayerNorm: register"),
    "LazyLinear": (lambda: nn.Sequential(nn.LazyLinear(4)), "nn.LazyLinear has no shape .* call the model once first"),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), "max_norm rewrites rows"),
    "sparse gradients": (lambda: nn.Sequential(nn.Embedding(5, 4, sparse=True)), "sparse=False has one"),
    "OwnConvForward": (lambda: nn.Sequential(OwnConvForward(3, 4, 5)), "a subclass of nn.Conv2d: its forward may"),
    "tied to what is refused": (
        lambda: tied(nn.Embedding(4, 4, max_norm=1.0)),
        "0.weight is also 1.weight, and .* untie them: its max_norm",
    ),
    "read by the model": (lambda: read_by("bins"), "bins is also 0.weight, and masking it would untie them"),
    "a parametrized weight": (lambda: parametrized("weight"), r"remove_parametrizations\(layer, 'weight'\)"),
    "a parametrized bias": (lambda: parametrized("bias"), "remove_parametrizations"),
    "another parameter": (with_more, "more than a weight and a bias: low_rank"),
    "another forward": (with_another_forward, "its forward was replaced"),
}


def test_a_lazy_weight_has_a_row_without_a_shape():
    rows = explain(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))
    assert [(row["shape"], row["bytes"], row["prunable"]) for row in rows] == [((0, 0), 0, False), ((2, 4), 32, True)]
    assert "call the model once first" in rows[0]["why"]


@pytest.mark.parametrize("name", UNMASKABLE)
def test_what_cannot_be_masked_is_not_prunable(name):
    make, why = UNMASKABLE[name]
    model = make()
    assert prunable(model) == {}
    with pytest.raises(ValueError, match=rf"masks\['0.weight'\]: expected a layer that can be masked, got .*{why}"):
        convert(model, {"0.weight": torch.ones(1, dtype=torch.bool)})


def test_a_subclass_whose_forward_is_its_bases_is_taken():
    model = nn.Sequential(OwnLinear(4, 4))
    converted = convert(model, {"0.weight": torch.eye(4) > 0})
    assert type(converted[0]) is MaskedLinear
    x = torch.randn(2, 4)
    torch.testing.assert_close(converted(x), x)
    assert type(to_dense(converted)[0]) is OwnLinear


def test_layers_that_share_a_weight_have_one_mask():
    for other, x in ((nn.Linear(4, 4), torch.randn(3, 4)), (nn.Embedding(4, 4), torch.arange(3))):
        model = nn.Sequential(other, nn.Linear(4, 4))
        model[1].weight = other.weight
        masks = prune(model, 0.5)
        assert list(masks) == ["0.weight"]
        assert survey(model).tied == {"1.weight": "0.weight"}
        converted = convert(model, masks)
        assert converted[0].values is converted[1].values
        assert converted[0].crow_indices is converted[1].crow_indices
        with torch.no_grad():
            model[0].weight.mul_(masks["0.weight"])
        torch.testing.assert_close(converted(x), model(x))
        converted(x).sum().backward()
        model(x).sum().backward()
        torch.testing.assert_close(converted[0].values.grad, model[0].weight.grad[masks["0.weight"]])
        again = convert(converted, prune(converted, 0.5))
        assert again[0].values is again[1].values
        assert len(again[0].values) == 4
        dense = to_dense(converted)
        assert dense[0].weight is dense[1].weight
        with pytest.raises(ValueError, match=r"'1.weight'.*: expected '0.weight', the first name of this weight"):
            convert(model, {"1.weight": masks["0.weight"]})


def test_layers_that_share_a_bias_go_on_sharing_it():
    masks = {f"{n}.weight": torch.eye(4) > 0 for n in (0, 1)}
    for names in (["0.weight"], ["1.weight"], list(masks)):
        converted = convert(tied(nn.Linear(4, 4), "bias"), {name: masks[name] for name in names})
        assert converted[0].bias is converted[1].bias
        assert to_dense(converted)[0].bias is not converted[0].bias
        dense = to_dense(converted)
        assert dense[0].bias is dense[1].bias


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_what_torch_has_pruned_is_refused(part):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch_prune.l1_unstructured(model[0], part, 0.5)
    message = r"torch.nn.utils.prune: keep its weight_mask.* torch.nn.utils.prune.remove\(layer, 'weight'\)"
    for call in (lambda: convert(model, {"0.weight": torch.ones(4, 4, dtype=torch.bool)}), lambda: prune(model, 0.5)):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_way_from_a_model_that_torch_has_pruned():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    x, masks = torch.randn(3, 4), {"0.weight": model[0].weight_mask.bool()}
    torch_prune.remove(model[0], "weight")
    torch.testing.assert_close(convert(model, masks)(x), model(x))


def test_weights_in_module_order():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LSTM(4, 2), nn.LayerNorm(4), nn.Conv2d(4, 4, 3))
    found = survey(model)
    assert [weight.name for weight in found.weights] == [
        "0.weight", "2.weight_ih_l0", "2.weight_hh_l0", "4.weight",
    ]  # fmt: skip
    assert list(found.maskable) == ["0.weight", "4.weight"]
    assert found.refused.keys() == {"2.weight_ih_l0", "2.weight_hh_l0"}
    assert found.share == (16 + 144) / (16 + 144 + 32 + 16)
    with pytest.warns(SparseLotteryWarning):
        converted = survey(convert(model, {"0.weight": torch.eye(4) > 0}))
    assert [weight.name for weight in converted.weights] == [weight.name for weight in found.weights]
    assert (converted.refused, converted.share) == (found.refused, found.share)
    assert survey(nn.ReLU()).share == 1


def test_what_a_notable_share_keeps_dense_is_told_once():
    masks = {"0.weight": torch.eye(4) > 0}

    def model():
        return nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 2))

    def calls(net):
        yield lambda: prune(net, 0.5)
        yield lambda: convert(net, masks)
        yield lambda: find_ticket(net, lambda _: None, rounds=0)

    for first in range(3):
        net = model()
        with pytest.warns(
            SparseLotteryWarning, match="25% of the model's weights can be pruned.*75% as 1.weight_ih_l0"
        ) as said:
            list(calls(net))[first]()
        assert said[0].filename == __file__
        for call in calls(net):
            call()
    ordinary = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 3))
    ordinary.register_parameter("position", nn.Parameter(torch.randn(9, 10)))
    prune(ordinary, 0.5)


def test_the_shares_are_in_the_rows_of_explain():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 2))
    assert [row["prunable"] for row in explain(model)] == [True, False, False]
